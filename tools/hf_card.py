"""The model card of an exported model: README.md, and the figure in it.

    from hf_card import CardFacts, write_card

    write_card(subject, CardFacts("my-model", "mit", [Path("lmeval.json")]), folder)

Everything in it is read from what the run left: run.json, the log, a record's submission.json, and the JSON files of
tools/evaluate.py. What none of them tells is left to the author, in comments.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plot
from artifact import Subject
from evaluate import CHOICE_ROWS, NAMES, TEXT_ROWS
from huggingface_hub import EvalResult, ModelCardData
from parameters import counted_twice, parameters_by_component
from record import Submission, file_sha256, load_submission
from sample import CARD_SAMPLING, card_samples

# Data sets of the Hub that published shards are made from, by how the names of the shards' folders begin.
HUB_DATA = {"fineweb10B": "HuggingFaceFW/fineweb"}
HUB_BENCHMARKS = {
    "wikitext2": "EleutherAI/wikitext_document_level",
    "blimp": "nyu-mll/blimp",
    "arc_easy": "allenai/ai2_arc",
}
# What the front matter tells of a benchmark; the card has the other figures too.
HUB_METRICS = {"bpb": "bits per byte", "acc": "accuracy", "acc_norm": "accuracy by log-probability per character"}
PROTOCOLS = {
    "lmeval": "the definitions of lm-evaluation-harness 0.4.13",
    "board": "the definitions of the boards for tiny models: no BOS, at most 256 tokens",
}
# Settings that change nothing about the model.
NOT_TOLD = {"OUT_DIR", "RUN_ID", "DATA_PATH", "TOKENIZER_PATH", "SEED"}
OPEN_END = "<!-- Write here what the files of the run do not tell: {} -->"


class CardFacts(NamedTuple):
    """What the author tells."""

    name: str
    licence: str  # as the Hub spells it, such as apache-2.0; empty if the author names none
    results: Sequence[Path]  # JSON files of tools/evaluate.py


class Card(NamedTuple):
    """All that the card is made of."""

    facts: CardFacts
    subject: Subject
    submission: Submission | None
    results: list[dict[str, Any]]
    has_curve: bool

    @property
    def licence(self) -> str:
        """The author's, or that of the record, in the spelling of the Hub."""
        if self.facts.licence or self.submission is None:
            return self.facts.licence.lower()
        return self.submission.licence.lower()


def write_card(subject: Subject, facts: CardFacts, folder: Path) -> None:
    """Write README.md, and beside it the figure and copies of the benchmark files.

    Raises OSError or ValueError for files that cannot be read, and for results of another artifact.
    """
    home = subject.artifact.resolve().parent
    submission = load_submission(home) if (home / "submission.json").is_file() else None
    results = [read_results(path, subject) for path in facts.results]
    for path, result in zip(facts.results, results, strict=True):
        shutil.copyfile(path, folder / f"results_{result['protocol']}.json")

    log = find_log(subject, home)
    has_curve = log is not None and draw_curve(log, folder / "loss.svg")
    card = Card(facts, subject, submission, results, has_curve)
    text = f"---\n{front_matter(card)}\n---\n\n" + "\n".join(sections(card))
    (folder / "README.md").write_text(text, encoding="utf-8")


def find_log(subject: Subject, home: Path) -> Path | None:
    """The log of the run that wrote the artifact."""
    seed = subject.run.get("seed")
    for path in (home / "log.txt", home / f"train_seed{seed}.log"):
        if path.is_file():
            return path
    return None


def draw_curve(log: Path, picture: Path) -> bool:
    """Draw the loss of a run. -> whether there was enough of it"""
    curve = plot.read_curve(log, "steps", "loss", smooth=0.08)
    if len(curve.train) + len(curve.val) < 2:
        return False
    plot.draw([plot.Line("loss", [curve])], "steps", "loss", "curves", picture)
    return True


def read_results(path: Path, subject: Subject) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    sha256 = file_sha256(subject.artifact)
    if results.get("artifact_sha256") != sha256 or results.get("protocol") not in PROTOCOLS:
        raise ValueError(
            f"{path} is not what tools/evaluate.py --out wrote for the artifact with sha256 {sha256}: evaluate it again"
        )
    return results


# --- Front matter ---


def front_matter(card: Card) -> str:
    """What the Hub reads, as YAML."""
    data_set = str(card.subject.run.get("train_dataset", ""))
    data = ModelCardData(
        language="en",
        license=card.licence or "unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["parameter-golf"],
        datasets=[hub for prefix, hub in HUB_DATA.items() if data_set.startswith(prefix)] or None,
        model_name=card.facts.name,
        eval_results=list(hub_results(card)),
    )
    return data.to_yaml()


def hub_results(card: Card) -> Iterator[EvalResult]:
    """The figures of every benchmark that was scored as a whole, and the score of the run."""
    if "val_bpb" in card.subject.run and not card.subject.run.get("partial"):
        yield EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=f"validation split of {card.subject.run['train_dataset']}",
            metric_type="bpb",
            metric_name=HUB_METRICS["bpb"],
            metric_value=round(card.subject.run["val_bpb"], 4),
        )
    for results in card.results:
        for task, of_task in results["tasks"].items():
            if of_task["partial"] or task not in HUB_BENCHMARKS:
                continue
            for metric, name in HUB_METRICS.items():
                if of_task.get(metric) is not None:
                    yield EvalResult(
                        task_type="text-generation",
                        dataset_type=HUB_BENCHMARKS[task],
                        dataset_name=f"{NAMES[task]}, protocol {results['protocol']}",
                        # Results that share data set and config are put under one name.
                        dataset_config=results["protocol"],
                        metric_type=metric,
                        metric_name=name,
                        metric_value=round(of_task[metric], 4),
                    )


# --- Text ---


def sections(card: Card) -> Iterator[str]:
    """The card, part by part."""
    yield from introduction(card)
    yield from usage(card)
    yield from figures(card)
    yield from parameters(card)
    yield from data(card)
    yield from training(card)
    yield from samples(card)
    yield from limits(card)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def introduction(card: Card) -> Iterator[str]:
    run = card.subject.run
    n_parameters = sum(p.numel() for p in card.subject.model.parameters())
    yield f"# {card.facts.name}"
    yield ""
    if card.submission is not None:
        yield card.submission.blurb
        yield ""
    text = f"A language model of {n_parameters:,} parameters, trained from nothing by one script of parameter golf"
    if "val_bpb" in run:
        part = f"{run['val_documents']:,} validation documents"
        if run.get("partial"):
            part = f"first {run['scored_tokens']:,} validation tokens"
        text += (
            f". It was stored in {run['bytes_artifact']:,} bytes, which these weights are read from, and scores "
            f"{run['val_bpb']:.4f} bits per byte on the {part} of {run['train_dataset']}"
        )
    yield f"{text}. It continues texts; it was not taught to follow instructions."
    yield ""


def usage(card: Card) -> Iterator[str]:
    bos = card.subject.tokenizer.sp.id_to_piece(card.subject.config.bos_id)
    yield f"""## Use

```python
from transformers import pipeline

speak = pipeline("text-generation", model="{card.facts.name}", trust_remote_code=True)
print(speak("Once upon a time")[0]["generated_text"])
```

The model's code, `golf_script.py`, is part of this folder, which is why `trust_remote_code` is needed. The tokenizer
puts `{bos}` in front of a text, and generation ends where the model begins a next document.
"""


def figures(card: Card) -> Iterator[str]:
    yield "## Figures"
    yield ""
    if not card.results:
        yield OPEN_END.format("benchmarks, by tools/evaluate.py and --results")
        yield ""
    for results in card.results:
        yield f"By {PROTOCOLS[results['protocol']]}. Figures of another protocol cannot be compared with these."
        yield ""
        yield from table(("benchmark", "figure", ""), list(figure_rows(results)))


def figure_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for task, of_task in results["tasks"].items():
        if task in ("context", "samples"):
            # The card tells of them in sections of their own.
            continue
        name = NAMES[task]
        if of_task["partial"]:
            name += f" (a part: {', '.join(of_task['partial'])})"
        for key, words, digits, factor in (*CHOICE_ROWS, *TEXT_ROWS):
            value = of_task.get(key)
            if value is None:
                continue
            text = f"{factor * value:,.{digits}f}"
            error = of_task.get(f"{key}_stderr")
            if error is not None:
                text += f" ± {factor * error:.{digits}f}"
            yield name, words, text


def parameters(card: Card) -> Iterator[str]:
    model = card.subject.model
    counts = parameters_by_component(model.named_parameters())
    total = sum(counts.values())
    rows = [(name, f"{n:,}") for name, n in counts.items()]
    yield "## Parameters"
    yield ""
    yield from table(("component", "parameters"), [*rows, ("**all**", f"**{total:,}**")])
    twice = counted_twice(card.subject.config, counts)
    yield f"The embedding is the output matrix too. With that counted twice, the model has {twice:,} parameters."
    yield ""


def data(card: Card) -> Iterator[str]:
    run = card.subject.run
    tokenizer = card.subject.tokenizer
    if run.get("tokenizer_lossless"):
        lossless = "It gives any text back"
    else:
        lossless = "It may change a text, such as its blanks and line ends"
    kind = tokenizer.settings["model_type"]
    yield "## Data and tokenizer"
    yield ""
    rows = [
        ("training text", f"{run['train_dataset']}, {run['train_tokens']:,} tokens" if run else "not known"),
        ("validation text, sha256", f"`{run.get('val_text_sha256') or 'not known'}`"),
        ("validation shards, sha256", f"`{run.get('val_shards_sha256') or 'not known'}`"),
        ("tokenizer", f"SentencePiece {kind}, {tokenizer.sp.get_piece_size():,} pieces. {lossless}"),
        ("tokenizer, sha256", f"`{file_sha256(tokenizer.path)}`"),
        ("artifact, sha256", f"`{file_sha256(card.subject.artifact)}`"),
        ("script, sha256", f"`{file_sha256(card.subject.script)}`"),
    ]
    yield from table(("", ""), rows)
    yield OPEN_END.format("where the training text comes from, and under which licence")
    yield ""


def training(card: Card) -> Iterator[str]:
    run = card.subject.run
    if not run:
        return
    yield "## Training"
    yield ""
    n_tokens = run["steps"] * run["train_batch_tokens"]
    device = run["device"].split(":", 1)[-1].replace("_", " ")
    yield (
        f"{run['steps']:,} steps on {n_tokens:,} tokens with a context of {run['train_seq_len']:,}, in "
        f"{run['train_seconds']:,.0f} seconds on {run['world_size']}x {device}, with torch {run['torch']} and seed "
        f"{run['seed']}."
    )
    changed = [f"{name}={value}" for name, value in run["settings_changed"].items() if name not in NOT_TOLD]
    yield f"Settings: `{' '.join(['PRESET=' + run['preset'], *changed])}`."
    yield ""
    if card.has_curve:
        yield "![loss of training and validation](loss.svg)"
        yield ""


def samples(card: Card) -> Iterator[str]:
    of_card = card_samples(card.subject)
    yield "## Samples"
    yield ""
    yield (
        f"Seeds {of_card[0].seed} to {of_card[-1].seed}, temperature {CARD_SAMPLING.temperature}, top-p "
        f"{CARD_SAMPLING.top_p}, at most {CARD_SAMPLING.max_tokens} tokens. They are the first ones, not the best ones."
    )
    yield ""
    for sample in of_card:
        yield f"> **{sample.prompt}**{markdown(sample.text.removeprefix(sample.prompt))}"
        yield ""


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, inside a quotation."""
    for character in "\\`*_#<>[]|&~$":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", "  \n> ")


def context_of_use(card: Card) -> str:
    """What tools/evaluate.py says of the context that the model claims, as a sentence, or nothing."""
    for results in card.results:
        found = results["tasks"].get("context")
        if found is None:
            continue
        error = "" if found["gain_stderr"] is None else f" ± {found['gain_stderr']:.4f}"
        verdict = "is of use" if found["holds"] else "does harm"
        return (
            f"The farther half of {found['claimed']:,} tokens {verdict}: it saves {found['gain']:.4f}{error} nats per "
            "token at their end."
        )
    return ""


def limits(card: Card) -> Iterator[str]:
    context = card.subject.config.eval_seq_len
    licence = card.licence or "The author has not named one, so that you may not pass the model on."
    yield f"""## Limits

It is small, and makes up most of what sounds like a fact. It was scored with a context of {context:,} tokens; nobody
has looked at what it does beyond. {context_of_use(card)}

It repeats what its training text says about people, with whatever is wrong in that.

## Licence

{licence}

{OPEN_END.format("how much of the work was done by machines, which competitions ask for")}
"""
