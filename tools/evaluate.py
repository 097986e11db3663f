"""Score an artifact on WikiText-2, BLiMP, ARC-Easy and its own validation text.

    python tools/evaluate.py runs/latest                                       fetches the benchmarks from the Hub
    python tools/evaluate.py runs/latest --data DIR --protocol board --out board.json
    python tools/evaluate.py runs/latest --data DIR --limit 10                 a quick look, marked partial

What is scored is the compressed artifact: a file, the folder of a run, or the folder of a record. The model comes from
the record's script, which runs without a sandbox: evaluate what you would run anyway. Softmax and windows are those of
the root's train_gpt.py. tools/benchmarks.py says what files --data takes.

Two protocols, whose figures must not be compared with each other:

lmeval   The definitions of lm-evaluation-harness 0.4.13, for a model that gets a BOS before every text.
         blimp      a BOS, a space and the sentence, scored whole. acc: the good one has the higher probability.
         arc_easy   "Question: {stem}\\nAnswer:", then a space and the choice, of which only the choice is scored.
                    acc: the right one has the highest probability; acc_norm: the highest log-probability per
                    character.
         wikitext2  each article detokenized, behind a BOS, in windows of the model's context. The last window of an
                    article is filled up with context. Bytes and words are those before detokenizing.
board    The definitions of the boards for tiny models, as their cards describe them. Nothing gets a BOS, so that the
         first token of a text is not scored, and nothing is longer than 256 tokens.
         blimp      the sentence, its first 256 tokens.
         arc_easy   as above, cut after 256 tokens, acc only.
         wikitext2  the whole split as one text, in windows of 256 tokens that do not overlap.

In both, three more tasks:

bpb      the score of the validation split as train_gpt.py computes it, in the windows that the artifact names
context  whether the model can use the context that it claims. The last quarter of windows of that length, from
         WikiText-2, is scored twice: behind all that stands before it, and behind the nearer half of the window only.
         The claim holds unless the longer context makes it worse, by more than two standard errors over the windows.
samples  texts of fixed prompts and seeds (tools/sample.py)

A tie is wrong here. The harness takes the first of equal choices, which in BLiMP is the right one. The number of ties
is told. Errors are standard errors as the harness computes them: sqrt(p (1 - p) / (n - 1)) for the mean of n answers,
and for BLiMP, a mean over sets, from the variance within the sets. They say nothing about another seed.

Bits per byte come twice: per byte of the text, and per byte of what its tokens decode to. A tokenizer that folds
characters or drops line ends has to predict fewer bytes than the text has, and the second number does not reward that.

How long it takes, measured with PRESET=smoke (2.1 million parameters) on two cores of an AMD EPYC that had other work
too: WikiText-2 111 to 138 s, 62 sets of BLiMP 355 to 411 s, half of ARC-Easy 34 to 42 s, together 410 s of CPU time.
With --limit 10, the first four tasks took 32 s.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Threads that wait should sleep. Beside other jobs on two cores, that is three times as fast (train_gpt.py).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from artifact import BATCH_TOKENS, Stretch, Subject, encode, open_subject, score_stretches
from benchmarks import ArcEasy, Blimp, Question, Wikitext, detokenize, load_arc_easy, load_blimp, load_wikitext
from record import ROOT, data_path, file_sha256
from sample import card_samples

sys.path.insert(0, str(ROOT))
import train_gpt as tg

PROTOCOLS = ("lmeval", "board")
TASKS = ("wikitext2", "blimp", "arc_easy", "bpb", "context", "samples")
BOARD_TOKENS = 256
CONTEXT_WINDOWS = 32

# With --limit N: N pairs of every set, N questions, and this many times N characters or tokens of a text.
LIMIT_UNIT = 1000

Results = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------------
# Windows
# ----------------------------------------------------------------------------------------------------------------------


def rolling_windows(ids: Sequence[int], bos_id: int, context: int) -> Iterator[Stretch]:
    """Windows that score each of `ids` once, as lm_eval.utils.get_rolling_token_windows makes them with context_len=1.

    The first begins with a BOS. Each later one scores the next `context` tokens after the one before them; the last one
    scores what is left, behind as many tokens of context as fit.
    """
    text = [bos_id, *ids]
    for first in range(1, len(text), context):
        stop = min(first + context, len(text))
        start = 0 if first == 1 else stop - 1 - context
        yield Stretch(text[start:stop], stop - first)


def flat_windows(ids: Sequence[int], context: int) -> Iterator[Stretch]:
    """Windows of `context` inputs that do not overlap. They score each of `ids` but the first, once."""
    config = tg.GPTConfig(eval_method="flat", eval_seq_len=context)
    for window in tg.scoring_windows(np.array(ids, np.uint16), config):
        yield Stretch(ids[window.start : window.stop], window.stop - window.first)


# ----------------------------------------------------------------------------------------------------------------------
# Tasks that choose
# ----------------------------------------------------------------------------------------------------------------------


def standard_error(answers: Sequence[bool]) -> float | None:
    """Of the mean of these answers: sqrt(p (1 - p) / (n - 1)), and nothing for fewer than two."""
    n = len(answers)
    if n < 2:
        return None
    p = sum(answers) / n
    return math.sqrt(p * (1 - p) / (n - 1))


def pooled_error(errors: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """Standard error of the mean over groups, from those of the groups (lm_eval.api.metrics.pooled_sample_stderr)."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors) or sum(sizes) == len(sizes):
        return None
    squares = sum((size - 1) * size * error**2 for error, size in zip(known, sizes, strict=True))
    return math.sqrt(squares / (sum(sizes) - len(sizes)) / sum(sizes))


def chooses(scores: Sequence[float], gold: int) -> bool:
    """Whether the right choice has a higher score than every other one. A tie is wrong."""
    return all(scores[gold] > score for i, score in enumerate(scores) if i != gold)


def is_tie(scores: Sequence[float], gold: int) -> bool:
    """Whether the right choice shares the highest score."""
    return scores[gold] == max(scores) and not chooses(scores, gold)


def sentence_stretch(subject: Subject, sentence: str, protocol: str, context: int) -> Stretch:
    if protocol == "board":
        ids = encode(subject, sentence)[:BOARD_TOKENS]
        return Stretch(ids, max(0, len(ids) - 1))
    ids = encode(subject, " " + sentence)
    # What is too long for the model loses its beginning.
    return Stretch([subject.config.bos_id, *ids][-(context + 1) :], min(len(ids), context))


def choice_stretch(subject: Subject, question: Question, choice: str, protocol: str, context: int) -> Stretch:
    """The question and one choice, encoded together: the tokens after those of the question alone are the choice's."""
    prompt = f"Question: {question.stem}\nAnswer:"
    ids = encode(subject, f"{prompt} {choice}")
    n_prompt = len(encode(subject, prompt))
    if len(ids) <= n_prompt:
        raise ValueError(f"the choice {choice!r} of {question.stem!r} has no token of its own: check the data")
    if protocol == "board":
        return Stretch(ids[:BOARD_TOKENS], max(0, min(len(ids), BOARD_TOKENS) - n_prompt))
    return Stretch([subject.config.bos_id, *ids][-(context + 1) :], min(len(ids) - n_prompt, context))


def run_blimp(subject: Subject, options: Options, blimp: Blimp) -> Results:
    """Accuracy over the sets, each with the same weight, and that of every set."""
    sets = {name: pairs[: options.limit] for name, pairs in sorted(blimp.sets.items())}
    stretches = [
        sentence_stretch(subject, sentence, options.protocol, options.context)
        for pairs in sets.values()
        for pair in pairs
        for sentence in pair
    ]
    sums = [-float(scored.nats.sum()) for scored in score_stretches(subject, stretches, "blimp", options.batch_tokens)]

    by_set = dict[str, Results]()
    scores = iter(zip(sums[::2], sums[1::2], strict=True))
    for name, pairs in sets.items():
        of_pairs = [next(scores) for _ in pairs]
        answers = [chooses(pair, 0) for pair in of_pairs]
        by_set[name] = {
            "acc": statistics.fmean(answers),
            "acc_stderr": standard_error(answers),
            "n": len(answers),
            "ties": sum(is_tie(pair, 0) for pair in of_pairs),
        }
    of_sets = list(by_set.values())
    return {
        "acc": statistics.fmean(result["acc"] for result in of_sets),
        "acc_stderr": pooled_error([r["acc_stderr"] for r in of_sets], [r["n"] for r in of_sets]),
        "n": sum(result["n"] for result in of_sets),
        "ties": sum(result["ties"] for result in of_sets),
        "source": blimp.source,
        "partial": [*blimp.missing, *options.limited(f"{options.limit} pairs of each set")],
        "sets": by_set,
    }


def run_arc_easy(subject: Subject, options: Options, arc: ArcEasy) -> Results:
    """Accuracy, and in the protocol lmeval also that of log-probabilities divided by the characters of the choice."""
    questions = arc.questions[: options.limit]
    stretches = [
        choice_stretch(subject, question, choice, options.protocol, options.context)
        for question in questions
        for choice in question.choices
    ]
    scores = score_stretches(subject, stretches, "arc_easy", options.batch_tokens)
    sums = iter([-float(scored.nats.sum()) for scored in scores])

    answers = []
    answers_norm = []
    ties = 0
    for question in questions:
        of_choices = [next(sums) for _ in question.choices]
        per_character = [score / len(choice) for score, choice in zip(of_choices, question.choices, strict=True)]
        answers.append(chooses(of_choices, question.gold))
        answers_norm.append(chooses(per_character, question.gold))
        ties += is_tie(of_choices, question.gold)

    results: Results = {"acc": statistics.fmean(answers), "acc_stderr": standard_error(answers)}
    if options.protocol == "lmeval":
        results["acc_norm"] = statistics.fmean(answers_norm)
        results["acc_norm_stderr"] = standard_error(answers_norm)
    return {
        **results,
        "n": len(answers),
        "ties": ties,
        "source": arc.source,
        "partial": [*arc.missing, *options.limited(f"{options.limit} questions")],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Tasks that read
# ----------------------------------------------------------------------------------------------------------------------


def loss_by_position(positions: np.ndarray, nats: np.ndarray) -> list[Results]:
    """Mean nats of the targets by the number of tokens that the model saw before them.

    positions   (N,) that number, from 1 on
    nats        (N,)
    The parts are 1, 2, 3-4, 5-8 and so on. A model that uses its context does not get worse from one to the next, up to
    the length it claims.
    """
    rows = []
    parts = np.ceil(np.log2(positions)).astype(np.int64)
    for part in range(int(parts.max(initial=-1)) + 1):
        of_part = nats[parts == part]
        if of_part.size:
            first = 2 ** (part - 1) + 1 if part else 1
            rows.append({"from": first, "to": 2**part, "tokens": int(of_part.size), "loss": float(of_part.mean())})
    return rows


def text_results(positions: np.ndarray, nats: np.ndarray, n_bytes: int | None, n_decoded: int, n_words: int) -> Results:
    """All figures of a text.

    positions   see loss_by_position
    n_bytes     of the text, or nothing where they are not known
    n_decoded   of what its tokens decode to, in bytes
    n_words     of the text; 0 where they are not known
    """
    total = float(nats.sum())
    results: Results = {
        "nats": total,
        "tokens": int(nats.size),
        "bytes": n_bytes,
        "bytes_normalised": n_decoded,
        "words": n_words or None,
        "loss": total / nats.size,
        "token_perplexity": exp(total / nats.size),
        "tokens_per_byte": nats.size / (n_bytes or n_decoded),
        "bpb": total / math.log(2) / n_bytes if n_bytes else None,
        "bpb_normalised": total / math.log(2) / n_decoded,
        "byte_perplexity": exp(total / n_bytes) if n_bytes else None,
        "word_perplexity": exp(total / n_words) if n_words else None,
    }
    return {**results, "loss_by_position": loss_by_position(positions, nats)}


def exp(x: float) -> float | None:
    """e**x, or nothing where it is too large for JSON."""
    return math.exp(x) if x < 700 else None


def positions_of(stretch: Stretch) -> np.ndarray:
    """How many tokens stand before each target. (n_targets,)"""
    return np.arange(len(stretch.ids) - stretch.n_targets, len(stretch.ids))


def decoded_bytes(subject: Subject, ids: Sequence[int]) -> int:
    """Bytes of the text that these tokens decode to."""
    try:
        text = subject.tokenizer.decode(np.array(ids, np.int64))
    except ValueError:
        # With --limit, a text may be cut behind an operator (data/transforms.py), which stands for nothing by itself.
        text = subject.tokenizer.decode(np.array(ids[:-1], np.int64))
    return len(text.encode())


class Reading(NamedTuple):
    """A text as a protocol reads it."""

    stretches: list[Stretch]
    n_bytes: int
    n_decoded: int  # bytes of what the tokens decode to
    n_words: int
    n_documents: int


def read_for_board(subject: Subject, text: str) -> Reading:
    ids = encode(subject, text)
    return Reading(
        stretches=list(flat_windows(ids, BOARD_TOKENS)),
        n_bytes=len(text.encode()),
        n_decoded=decoded_bytes(subject, ids),
        n_words=len(text.split()),
        n_documents=1,
    )


def read_as_harness(subject: Subject, pages: Sequence[str], context: int) -> Reading:
    stretches = list[Stretch]()
    n_decoded = 0
    for page in pages:
        ids = encode(subject, detokenize(page))
        stretches += rolling_windows(ids, subject.config.bos_id, context)
        n_decoded += decoded_bytes(subject, ids)
    return Reading(
        stretches=stretches,
        n_bytes=sum(len(page.encode()) for page in pages),
        n_decoded=n_decoded,
        # What stands between blanks, and before the first and behind the last of them, where it may be nothing.
        n_words=sum(len(re.split(r"\s+", page)) for page in pages),
        n_documents=len(pages),
    )


def run_wikitext2(subject: Subject, options: Options, wikitext: Wikitext) -> Results:
    if options.protocol == "board":
        n_characters = LIMIT_UNIT * options.limit if options.limit else None
        reading = read_for_board(subject, "".join(wikitext.pages)[:n_characters])
        limited = options.limited(f"{n_characters} characters")
    else:
        reading = read_as_harness(subject, wikitext.pages[: options.limit], options.context)
        limited = options.limited(f"{options.limit} articles")

    scores = score_stretches(subject, reading.stretches, "wikitext2", options.batch_tokens)
    positions = np.concatenate([positions_of(stretch) for stretch in reading.stretches])
    nats = np.concatenate([scored.nats for scored in scores])
    return {
        **text_results(positions, nats, reading.n_bytes, reading.n_decoded, reading.n_words),
        "documents": reading.n_documents,
        "source": wikitext.source,
        "partial": [*wikitext.missing, *limited],
    }


def find_val_data(subject: Subject) -> Path:
    """The shards that the artifact's run was scored on. Raises FileNotFoundError if they are not here."""
    folders = [data_path(subject.artifact.parent)]
    named = str(subject.run.get("data_path", ""))
    if named:
        folders += [Path(named), ROOT / named]
    for folder in folders:
        if any(folder.glob("fineweb_val_[0-9]*.bin")):
            return folder
    raise FileNotFoundError(
        f"{subject.artifact} leads to no validation shards ({named or 'without a run.json beside it'}): "
        "name their folder by --val-data, or leave bpb out of --tasks"
    )


def run_bpb(subject: Subject, options: Options, folder: Path) -> Results:
    """The score of the validation split in a folder of shards, as `evaluate` of train_gpt.py sums it up."""
    sp = subject.tokenizer.sp
    sha256 = hashlib.sha256(subject.tokenizer.model).hexdigest()
    max_tokens = LIMIT_UNIT * options.limit if options.limit else 0
    split = tg.load_val_split(str(folder), sp, sha256, max_tokens)

    windows = list(tg.scoring_windows(split.ids, subject.config))
    stretches = [
        Stretch(split.ids[window.start : window.stop].tolist(), window.stop - window.first) for window in windows
    ]
    scores = score_stretches(subject, stretches, "bpb", options.batch_tokens)

    documents = np.split(split.ids, np.flatnonzero(split.ids == subject.config.bos_id))
    n_decoded = sum(decoded_bytes(subject, ids[ids != subject.config.bos_id].tolist()) for ids in documents)
    # Published shards do not tell the bytes of their source.
    knows_source = split.identity["val_accounting"] == "sidecar"
    n_bytes = int(split.bytes[1:].sum(dtype=np.int64))
    return {
        **text_results(
            np.concatenate([positions_of(stretch) for stretch in stretches]),
            np.concatenate([scored.nats for scored in scores]),
            n_bytes if knows_source else None,
            n_decoded if knows_source else n_bytes,
            n_words=0,
        ),
        "documents": split.identity["val_documents"],
        "source": folder.name,
        "val_text_sha256": split.identity["val_text_sha256"],
        "val_shards_sha256": split.identity["val_shards_sha256"],
        "val_accounting": split.identity["val_accounting"],
        "partial": options.limited(f"{len(split.ids)} of {split.identity['val_tokens']} tokens"),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Context and samples
# ----------------------------------------------------------------------------------------------------------------------


def run_context(subject: Subject, options: Options, wikitext: Wikitext) -> Results:
    """What the farther half of the claimed context is worth to the targets at its end, in nats per token."""
    context = options.context
    ids = encode(subject, "".join(wikitext.pages))
    n_windows = min(options.limit or CONTEXT_WINDOWS, CONTEXT_WINDOWS, (len(ids) - 1) // context)
    n_targets = context // 4
    if n_windows < 1 or n_targets < 1:
        raise ValueError(f"{wikitext.source} has {len(ids)} tokens: no context of {context} can be tested on it")

    stretches = []
    for window in range(n_windows):
        start = window * (len(ids) - 1 - context) // max(1, n_windows - 1)
        stop = start + context + 1
        stretches.append(Stretch(ids[start:stop], n_targets))
        stretches.append(Stretch(ids[start + context // 2 : stop], n_targets))
    scores = score_stretches(subject, stretches, "context", options.batch_tokens)

    # One figure for each window, because targets of one window are not independent.
    far = [float(scored.nats.mean()) for scored in scores[::2]]
    near = [float(scored.nats.mean()) for scored in scores[1::2]]
    gains = [with_less - with_all for with_all, with_less in zip(far, near, strict=True)]
    gain = statistics.fmean(gains)
    error = statistics.stdev(gains) / math.sqrt(n_windows) if n_windows > 1 else None
    return {
        "claimed": context,
        "holds": gain + 2 * (error or 0.0) >= 0,
        "gain": gain,
        "gain_stderr": error,
        "loss": statistics.fmean(far),
        "loss_with_half": statistics.fmean(near),
        "windows": n_windows,
        "source": wikitext.source,
        "partial": options.limited(f"{n_windows} windows"),
    }


def run_samples(subject: Subject, options: Options, data: None) -> Results:
    """Texts that the model goes on with."""
    return {"samples": [sample._asdict() for sample in card_samples(subject)], "source": "fixed seeds", "partial": []}


# ----------------------------------------------------------------------------------------------------------------------
# Command
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """How to score, the same for all tasks."""

    protocol: str
    context: int  # tokens that the model sees at once, at most; the board has its own
    data: Path | None = None
    val_data: Path | None = None
    limit: int | None = None
    batch_tokens: int = BATCH_TOKENS

    def limited(self, what: str) -> list[str]:
        return [what] if self.limit else []


def load_task(task: str, subject: Subject, options: Options) -> Any:
    """What a task scores. Raises OSError or ValueError, naming file or data set and what to do."""
    if task in ("wikitext2", "context"):
        return load_wikitext(options.data)
    if task == "blimp":
        return load_blimp(options.data)
    if task == "arc_easy":
        return load_arc_easy(options.data)
    if task == "samples":
        return None
    return options.val_data or find_val_data(subject)


RUN_TASK: dict[str, Callable[[Subject, Options, Any], Results]] = {
    "wikitext2": run_wikitext2,
    "blimp": run_blimp,
    "arc_easy": run_arc_easy,
    "bpb": run_bpb,
    "context": run_context,
    "samples": run_samples,
}


def run_tasks(subject: Subject, tasks: Sequence[str], options: Options) -> Results:
    """The figures of all tasks and what they are figures of, ready for JSON."""
    # Whatever is missing should be told before minutes are spent on the first task.
    data = {task: load_task(task, subject, options) for task in tasks}
    of_tasks = dict[str, Results]()
    for task in tasks:
        began = time.perf_counter()
        of_tasks[task] = RUN_TASK[task](subject, options, data[task])
        of_tasks[task]["seconds"] = round(time.perf_counter() - began, 2)
    return {
        "protocol": options.protocol,
        "partial": any(result["partial"] for result in of_tasks.values()),
        "artifact": subject.artifact.name,
        "artifact_sha256": file_sha256(subject.artifact),
        "script_sha256": file_sha256(subject.script),
        "tokenizer_sha256": file_sha256(subject.tokenizer.path),
        "run_id": subject.run.get("run_id"),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "vocab_size": subject.config.vocab_size,
        "context": BOARD_TOKENS if options.protocol == "board" else options.context,
        "judge_version": tg.JUDGE_VERSION,
        "torch": torch.__version__,
        "device": str(subject.device),
        "threads": torch.get_num_threads(),
        "tasks": of_tasks,
    }


# What stands in the table for a key of the JSON, by task: (key, words, digits, factor).
TEXT_ROWS = (
    ("bpb", "bits per byte of the text", 4, 1),
    ("bpb_normalised", "bits per byte of the decoded tokens", 4, 1),
    ("loss", "cross-entropy, nats per token", 4, 1),
    ("tokens_per_byte", "tokens per byte", 4, 1),
    ("token_perplexity", "perplexity per token", 2, 1),
    ("byte_perplexity", "perplexity per byte", 4, 1),
    ("word_perplexity", "perplexity per word", 1, 1),
)
CHOICE_ROWS = (
    ("acc", "accuracy, %", 2, 100),
    ("acc_norm", "accuracy by log-probability per character, %", 2, 100),
)
NAMES = {
    "wikitext2": "WikiText-2",
    "blimp": "BLiMP",
    "arc_easy": "ARC-Easy",
    "bpb": "Validation split",
    "context": "Context",
    "samples": "Samples",
}


def task_lines(task: str, result: Results) -> list[str]:
    """The table of one task."""
    title = f"{NAMES[task]} ({result['source']}, {result['seconds']:.1f} s)"
    if result["partial"]:
        title += f"  PARTIAL: {', '.join(result['partial'])}"
    lines = ["", title]
    if task == "context":
        return [*lines, *context_lines(result)]
    if task == "samples":
        return [*lines, *(f"  {line}" for sample in result["samples"] for line in [*sample["text"].splitlines(), ""])]
    for key, words, digits, factor in (*CHOICE_ROWS, *TEXT_ROWS):
        if result.get(key) is None:
            continue
        line = f"  {words:<46}{factor * result[key]:>12,.{digits}f}"
        if result.get(f"{key}_stderr") is not None:
            line += f" +- {factor * result[f'{key}_stderr']:.{digits}f}"
        lines.append(line)

    if "ties" in result:
        lines.append(f"  {'answers':<46}{result['n']:>12,}, of them {result['ties']} ties, which are wrong")
    if "loss_by_position" in result:
        lines.append("  nats per token by the number of tokens before it")
        rows = result["loss_by_position"]
        lines.append("".join(f"{row['to']:>8}" for row in rows))
        lines.append("".join(f"{row['loss']:>8.3f}" for row in rows))
    return lines


def context_lines(result: Results) -> list[str]:
    verdict = "holds" if result["holds"] else "DOES NOT HOLD"
    error = "" if result["gain_stderr"] is None else f" +- {result['gain_stderr']:.4f}"
    return [
        f"  the claim of {result['claimed']:,} tokens {verdict}",
        f"  {'nats per token that its farther half saves':<46}{result['gain']:>12.4f}{error}",
        f"  {'windows':<46}{result['windows']:>12,}",
    ]


def table(results: Results) -> str:
    head = [
        f"{results['artifact']} {results['artifact_sha256'][:8]}, {results['parameters']:,} parameters",
        f"Protocol {results['protocol']}, context of {results['context']} tokens",
    ]
    if results["partial"]:
        head.append("PARTIAL: not the whole of every benchmark, see below")
    return "\n".join([*head, *(line for task, r in results["tasks"].items() for line in task_lines(task, r))])


def parse_tasks(text: str) -> list[str]:
    tasks = list(dict.fromkeys(text.split(",")))
    for task in tasks:
        if task not in TASKS:
            raise argparse.ArgumentTypeError(f"{task!r} is not one of {','.join(TASKS)}")
    return tasks


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="a file, or the folder of a run or a record")
    parser.add_argument("--tasks", type=parse_tasks, default=list(TASKS), metavar="TASK,...", help=",".join(TASKS))
    parser.add_argument("--protocol", choices=PROTOCOLS, default="lmeval", help="default: %(default)s")
    parser.add_argument("--data", type=Path, metavar="DIR", help="local benchmark files, instead of the Hub's")
    parser.add_argument("--val-data", type=Path, metavar="DIR", help="shards for bpb (default: those of the run)")
    parser.add_argument("--limit", type=int, metavar="N", help="score a part only, marked partial")
    parser.add_argument("--context", type=int, metavar="N", help="tokens that the model sees (default: EVAL_SEQ_LEN)")
    parser.add_argument(
        "--script", type=Path, help="the train_gpt.py that wrote the artifact (default: found beside it)"
    )
    parser.add_argument("--tokenizer", type=Path, help="the .model file (default: the one with the artifact's sha256)")
    parser.add_argument("--device", default="cpu", help="as torch names it (default: %(default)s)")
    parser.add_argument(
        "--batch-tokens", type=int, default=BATCH_TOKENS, metavar="N", help="tokens per pass (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures there")
    args = parser.parse_args(argv)
    for option in ("limit", "context", "batch_tokens"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        subject = open_subject(args.artifact, args.script, args.tokenizer, args.device)
        options = Options(
            protocol=args.protocol,
            context=args.context or subject.config.eval_seq_len,
            data=args.data,
            val_data=args.val_data,
            limit=args.limit,
            batch_tokens=args.batch_tokens,
        )
        results = run_tasks(subject, args.tasks, options)
        print(table(results))
        if args.out:
            args.out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
