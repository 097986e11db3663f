"""Scores a record from outside: its code turns ids into logits in a process of its own, everything else happens here.

The text, its bytes, the windows, the softmax and the sums are those of the root's train_gpt.py and of the documents, so
that nothing the record's code does can change what is counted. A fixed predictor (class A) is asked for logits; what
it said at some secret places is asked again in a second process that never sees what follows there. An adaptive
one (class B) is asked for the distributions of a chunk before it may observe it. tools/verify.py is the command.

    load_predictor(path, device)   class B; .config as GPTConfig, and
    .predict(ids) -> (T, V)        log-probabilities: row t is that of ids[t] after all that was observed and ids[:t]
    .observe(ids)                  called once for every chunk, after it was scored

The score that a record of class B claims is that of this loop over the whole validation split `ids`, and its script has
to report it as val_loss and val_bpb:

    predictor.observe(ids[:1])
    for start in range(1, len(ids), predictor.config.eval_seq_len):
        chunk = ids[start : start + predictor.config.eval_seq_len]
        nats -= predictor.predict(chunk)[range(len(chunk)), chunk].sum()
        predictor.observe(chunk)
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import math
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from record import ROOT, Check
from sandbox import Bind, Limits, Sandboxed
from serve import EVENTS, JUDGED, receive, send
from tqdm import tqdm  # type: ignore[import-untyped]

sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from documents import framed, read_documents  # noqa: E402
from shards import write_shard  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

import train_gpt as tg  # noqa: E402

OUT_OF_MEMORY = re.compile(r"^MemoryError|can't allocate memory|std::bad_alloc")
WATCHED = {*EVENTS, "files_read"}
SERVE = Path(__file__).with_name("serve.py")
PROBES = 512  # places at random that are asked again in another process, at most; half as many where it knew a lot
ASKED_ROWS, MOST_TURNS = 32, 8  # of a batch that asks again; one after the other
BACKOFF, LIKELIER = 8.0, 12.0  # of the bigram model; most nats by which a prediction is likelier than its
REPEATED = 1e-4  # of a probability, by the same process
LONGEST_PIECE = 16  # characters, as SentencePiece trains by default: longer ones are a model of their text
MOST_LOGITS = 2**28  # of one row of a batch
NORMALISED = 1e-3  # of the log of the sum of probabilities, float32 over a vocabulary


class Rounding(NamedTuple):
    """What the same question may change in an answer, asked in another batch or further left in a row."""

    distance: float  # half the sum of the differences of two distributions
    nats: float  # of the target, one standard deviation


# Measured on a CPU: 0 in another batch; further left in a row 1e-6 and 2e-7 in float32, 0.01 and 0.004 in bfloat16.
ROUNDING = {"float32": Rounding(2e-5, 2e-4), "bfloat16": Rounding(2e-2, 0.02)}


class RecordError(Exception):
    """The record's code did not do what it has to; `check` is the name of the check that fails by it."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(reason)
        self.check = check


class Record:
    """The code of a record with one artifact, in a process of its own. `violations` gets what it should not do."""

    def __init__(
        self,
        script: Path,
        artifact: Path,
        predictor_class: str,
        limits: Limits,
        seconds: float,
        violations: dict[str, str],
    ) -> None:
        binds = [Bind(SERVE, "/judge/serve.py"), Bind(script.resolve(), "/record/train_gpt.py")]
        binds.append(Bind(artifact.resolve(), f"/record/{artifact.name}"))
        program = ["/judge/serve.py", "/record/train_gpt.py", f"/record/{artifact.name}", predictor_class]
        self.seconds, self.violations = seconds, violations
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by close()
        env = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        pipe = subprocess.PIPE
        self.process = Sandboxed(program, binds, limits, env, stdin=pipe, stdout=pipe, stderr=self.errors)
        assert self.process.popen.stdin is not None
        assert self.process.popen.stdout is not None
        self.requests, self.replies = self.process.popen.stdin, self.process.popen.stdout
        try:
            told = self.reply("load", 2**16)[0].get("config", {})
            self.config = dataclasses.replace(tg.GPTConfig(), **{name: told[name] for name in JUDGED})
            fits = 0 < self.config.eval_seq_len * self.config.vocab_size <= MOST_LOGITS
            if not fits:
                raise ValueError(f"EVAL_SEQ_LEN={self.config.eval_seq_len} makes no rows, or rows too large to judge")
        except (ValueError, TypeError, KeyError) as error:
            self.close()
            raise RecordError("load", f"its config is none to score by: {error}") from None
        except RecordError:
            self.close()
            raise

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.close()
        self.errors.close()

    def reply(self, check: str, most: int, ask: Callable[[], None] = lambda: None) -> tuple[dict[str, Any], bytes]:
        """Ask, and receive the next message that is no report of the audit hook; RecordError for none in time."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(self.seconds, stop)
        timer.start()
        try:
            ask()  # who does not read blocks this, too
            while True:
                header, payload = receive(self.replies, most)
                if "violation" not in header:
                    break
                name = str(header["violation"])
                self.violations.setdefault(name if name in WATCHED else "violation", str(header.get("detail"))[:200])
        except (EOFError, ValueError, RecursionError, OSError) as error:
            if late.is_set():
                raise RecordError("time", f"no answer within {self.seconds:g} s") from None
            raise RecordError(check, f"its process ended or spoke nonsense: {self.last_words() or error}") from None
        finally:
            timer.cancel()
        if "error" in header:
            reason = str(header["error"])[:600]
            raise RecordError("memory" if OUT_OF_MEMORY.search(reason) else check, reason)
        return header, payload

    def last_words(self) -> str:
        self.errors.seek(0, 2)
        self.errors.seek(max(0, self.errors.tell() - 2000))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def request(self, do: str, ids: np.ndarray, most: int) -> tuple[dict[str, Any], bytes]:
        header, payload = {"do": do, "shape": list(ids.shape)}, np.ascontiguousarray(ids, "<i8").tobytes()
        return self.reply("run", most, lambda: send(self.requests, header, payload))

    def ask(self, do: str, ids: np.ndarray) -> torch.Tensor:
        """Send ids, int64 of any shape, and receive float32 values of that shape and the vocabulary."""
        shape = (*ids.shape, self.config.vocab_size)
        header, payload = self.request(do, ids, 4 * math.prod(shape))
        if header.get("shape") != list(shape) or len(payload) != 4 * math.prod(shape):
            raise RecordError("run", f"{do} returned shape {header.get('shape')}, not {list(shape)}")
        values = torch.frombuffer(bytearray(payload), dtype=torch.float32).view(shape)
        if not bool(torch.isfinite(values if do == "logits" else values.exp()).all()):
            raise RecordError("normalised", f"{do} returned values that are not finite")
        return values

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 -> (B, T, V) float32"""
        return self.ask("logits", ids.numpy())

    def predict(self, ids: np.ndarray) -> torch.Tensor:
        """(T,) -> (T, V) float32 log-probabilities"""
        return self.ask("predict", ids)

    def observe(self, ids: np.ndarray) -> None:
        self.request("observe", ids, 0)


# ----------------------------------------------------------------------------------------------------------------------
# The text and its bytes
# ----------------------------------------------------------------------------------------------------------------------


def load_split(folder: Path, tokenizer: Path, vocab_size: int, bos_id: int) -> tg.ValSplit:
    """The validation split of a data folder, read by the root's script. ValueError for files that contradict."""
    config = dataclasses.replace(tg.GPTConfig(), vocab_size=vocab_size, bos_id=bos_id)
    hp = dataclasses.replace(tg.Hyperparameters(), data_path=str(folder), tokenizer_path=str(tokenizer))
    sp, digest = tg.load_tokenizer(str(tokenizer), config)
    return tg.load_val_split(hp, config, sp, digest)


def check_tokenizer(tokenizer: Path) -> Check:
    """Whether the tokenizer is one: pieces of any length would be a model that counts no bytes."""
    sp = Tokenizer(tokenizer.read_bytes(), tokenizer).sp
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size()) if not sp.is_byte(i) and not sp.is_control(i)]
    longest = max(map(len, pieces))
    reason = f"{len(pieces)} pieces of up to {longest} characters, {LONGEST_PIECE} are allowed"
    return Check("tokenizer", longest <= LONGEST_PIECE, reason)


def recount(split: tg.ValSplit, tokenizer: Path, documents: Path | None, bos_id: int, own: bool) -> Check:
    """Whether the bytes of every document are those of its text: decoded where the tokenizer is lossless, else read.

    What cannot be counted is believed of data that the judge names, not of those that come with a record (`own`).
    """
    name, known = "bytes_of_text", split.identity["val_text_sha256"]
    if split.identity["val_accounting"] == "pieces":
        remedy = "" if not own else ": in the record's own data that proves nothing, give --data and --tokenizer"
        return Check(name, not own, f"counted from the tokenizer's pieces, bytes of the normalised text{remedy}")
    starts = np.flatnonzero(split.ids == bos_id)
    if not len(starts) or starts[0] > 0:
        return Check(name, False, "its tokens do not start with a document: export the data again")
    counted = np.add.reduceat(split.bytes.astype(np.int64), starts)
    if documents is not None:
        texts = [text for text in read_documents([documents]) if text.strip()]
    elif split.identity["tokenizer_lossless"] is True:
        decoder = Tokenizer(tokenizer.read_bytes(), tokenizer)
        try:
            texts = [decoder.decode(ids[1:]) for ids in np.split(split.ids, starts)[1:]]
        except ValueError as error:
            return Check(name, False, f"its tokens do not decode: {error}")
    else:
        return Check(name, not own, "taken from the sidecar, the tokenizer is not lossless: --documents would count")
    hashed = hashlib.sha256()
    for text in texts:
        hashed.update(framed(text))
    lengths = np.array([len(text.encode()) for text in texts])
    if len(lengths) != len(counted) or bool((lengths != counted).any()):
        told = f"{len(counted)} documents of {counted.sum()} bytes"
        return Check(name, False, f"the data tell {told}, the text has {len(lengths)} of {lengths.sum()}")
    if hashed.hexdigest() != known:
        return Check(name, False, f"the text has sha256 {hashed.hexdigest()}, the data say {known}")
    source = "the documents" if documents else "its tokens, decoded,"
    return Check(name, True, f"{source} have {lengths.sum()} bytes in {len(lengths)} documents, as counted")


# ----------------------------------------------------------------------------------------------------------------------
# Fixed predictors (class A)
# ----------------------------------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """A place that was scored: what stood before it, and what the record said."""

    position: int  # of the target, in the split
    target: int
    row: np.ndarray  # everything before it in its row of the batch
    document: np.ndarray  # everything before it in its document, as far as the window reaches
    seen: list[range]  # positions of what is in `row`
    at_random: bool  # else chosen because the record knew more than a bigram model
    log_probs: torch.Tensor  # (V,)


class Reservoir:
    """The `size` places of a stream with the largest keys: a weighted sample without replacement, if a key is log(u) /
    weight for u uniform in (0, 1) (Efraimidis and Spirakis 2006)."""

    def __init__(self, size: int) -> None:
        self.size, self.kept = size, list[tuple[float, int, Probe]]()  # a heap; positions break ties

    def entering(self, keys: np.ndarray) -> np.ndarray:
        """Which of some places have a chance to be kept. (N,) float64 -> (M,) int64"""
        best = np.argsort(keys)[-self.size :]
        return best if len(self.kept) < self.size else best[keys[best] > self.kept[0][0]]

    def add(self, key: float, probe: Probe) -> None:
        push = heapq.heappush if len(self.kept) < self.size else heapq.heappushpop
        push(self.kept, (key, probe.position, probe))


def bigram_nats(ids: np.ndarray) -> np.ndarray:
    """What each token takes by the one before it, with the counts of this text less the token itself. (N,) -> (N,) nats

    Who sees what comes beats this by far where it matters; so do good models, but at fewer places.
    """
    _, token, count = np.unique(ids, return_inverse=True, return_counts=True)
    unigram = (count[token] - 0.5) / len(ids)
    _, pair, pairs = np.unique(ids[:-1] * 2**16 + ids[1:], return_inverse=True, return_counts=True)
    p = (pairs[pair] - 1 + BACKOFF * unigram[1:]) / (count[token[:-1]] - 1 + BACKOFF)
    return -np.log(np.concatenate((unigram[:1], p)))


def likelier_than(expected: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """How many times likelier a record found tokens than expected, within bounds. (N,), (N,) nats -> (N,)"""
    return np.exp((expected - nats).clip(-LIKELIER, LIKELIER))


class Scored(NamedTuple):
    """Sums by unit (a document, or a window where windows do not follow documents)."""

    nats: np.ndarray
    bytes: np.ndarray
    targets: int
    n_units: int  # of the whole split
    prefix: bool = False  # the first units of the split, else a sample at random

    @property
    def bpb(self) -> float:
        return float(self.nats.sum() / math.log(2) / self.bytes.sum())

    @property
    def whole(self) -> bool:
        """Whether every unit of the split was scored."""
        return len(self.nats) == self.n_units

    @property
    def interval(self) -> float:
        """Half width of the 95 % interval of the split's bpb; 0 where all of it was scored."""
        if self.prefix and not self.whole:
            return math.inf  # an adaptive predictor gets better along the text: the first documents tell nothing
        left = 1 - len(self.nats) / self.n_units
        return self.interval_of_source * math.sqrt(left) if left else 0.0

    @property
    def interval_of_source(self) -> float:
        """The same for the text that the split is a sample of (ratio estimator)."""
        n = len(self.nats)
        if n < 2:
            return math.inf
        rest = self.nats / math.log(2) - self.bpb * self.bytes
        return float(1.96 * math.sqrt(n / (n - 1) * (rest**2).sum()) / self.bytes.sum())


class Pass(NamedTuple):
    """What a pass over windows leaves."""

    nats: np.ndarray  # by window
    probes: list[Probe]
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # inputs, targets and nats of one batch


def units_of(windows: Sequence[tg.Window], split: tg.ValSplit, config: tg.GPTConfig) -> np.ndarray:
    """The unit of each window."""
    if config.eval_method != "document":
        return np.arange(len(windows))
    starts = np.flatnonzero(split.ids == config.bos_id)
    return np.searchsorted(starts, [window.first - 1 for window in windows], side="right")


def score_windows(
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    split: tg.ValSplit,
    windows: Sequence[tg.Window],
    config: tg.GPTConfig,
    rng: np.random.Generator,
) -> Pass:
    """As `evaluate` of the root's script, window by window, remembering some places: at random, and with chances in
    proportion to how much likelier than a bigram model the record found their targets, which finds rare leaks."""
    ids, seq_len = split.ids.astype(np.int64), config.eval_seq_len
    expected = bigram_nats(ids)
    rows = tg.pack_rows(windows, split.ids, config)
    n_rows = max(1, min(tg.Hyperparameters().val_batch_size, tg.EVAL_LOGITS // config.vocab_size) // seq_len)
    n_rows = min(n_rows, len(rows))
    n_probes = min(PROBES, len(rows))
    reservoirs = {True: Reservoir(n_probes), False: Reservoir(math.ceil(n_probes / 2))}  # by Probe.at_random
    remembered = int(rng.integers(math.ceil(len(rows) / n_rows)))
    documents = np.flatnonzero(split.ids == config.bos_id)
    nats, kept, index = np.zeros(len(windows)), None, 0
    for number, begin in enumerate(tqdm(range(0, len(rows), n_rows), "score", unit=" batches", disable=None)):
        inputs, targets = torch.zeros(2, n_rows, seq_len, dtype=torch.int64)
        cells: list[tuple[int, int, tg.Window]] = []
        for i, row in enumerate(rows[begin : begin + n_rows]):
            column = 0
            for window in row:
                start, _, last = window
                end = column + last - 1 - start
                inputs[i, column:end] = torch.from_numpy(ids[start : last - 1])
                targets[i, column:end] = torch.from_numpy(ids[start + 1 : last])
                cells.append((i, column, window))
                column = end
        logits = logits_fn(inputs)
        losses = tg.target_nats(logits, targets)
        scored = [losses[i, c + w.first - 1 - w.start : c + w.last - 1 - w.start].double().numpy() for i, c, w in cells]
        nats[index : index + len(cells)] = [part.sum() for part in scored]
        index += len(cells)
        owners = np.repeat(np.arange(len(cells)), [len(part) for part in scored])
        positions = np.concatenate([np.arange(w.first, w.last) for _, _, w in cells])
        likelier = likelier_than(expected[positions], np.concatenate(scored))
        for at_random, reservoir in reservoirs.items():
            keys = np.log(rng.random(len(positions))) / (1.0 if at_random else likelier)
            for j in reservoir.entering(keys):
                (i, column, (start, _, _)), position = cells[owners[j]], int(positions[j])
                at, opened = column + position - 1 - start, documents[documents < position]
                document = ids[max(start, int(opened[-1])) if len(opened) else start : position]
                seen = [range(w.start, w.last - 1) for row, c, w in cells if row == i and c < column]
                said, before = torch.log_softmax(logits[i, at], 0), inputs[i, : at + 1].numpy()
                seen.append(range(start, position))
                probe = Probe(position, int(ids[position]), before, document, seen, at_random, said)
                reservoir.add(float(keys[j]), probe)
        if number == remembered:
            kept = inputs, targets, losses
    probes = {probe.position: probe for random in (False, True) for _, _, probe in reservoirs[random].kept}
    assert kept is not None
    return Pass(nats, list(probes.values()), kept)


def score_fixed(record: Record, split: tg.ValSplit, sample: int, rng: np.random.Generator) -> tuple[Scored, Pass]:
    """Score a split, or `sample` of its units taken at random."""
    windows = list(tg.scoring_windows(split.ids, record.config))
    units = units_of(windows, split, record.config)
    names = np.unique(units)
    if 0 < sample < len(names):
        chosen = set(rng.choice(names, sample, replace=False).tolist())
        windows = [w for w, unit in zip(windows, units.tolist(), strict=True) if unit in chosen]
        units = units[np.isin(units, list(chosen))]
    done = score_windows(record.logits, split, windows, record.config, rng)
    _, place = np.unique(units, return_inverse=True)
    n_bytes = np.array([int(split.bytes[w.first : w.last].sum(dtype=np.int64)) for w in windows])
    targets = sum(w.last - w.first for w in windows)
    sums = np.bincount(place, done.nats), np.bincount(place, n_bytes)
    return Scored(*sums, targets, len(names)), done


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Half the sum of the differences of two distributions, given as log-probabilities: from 0 to 1."""
    return float((a.exp() - b.exp()).abs().sum() / 2)


def in_turns(probes: Sequence[Probe]) -> list[list[Probe]]:
    """Probes by when to ask for them: who is asked remembers, so a place comes before all that show its target."""
    probes = sorted(probes, key=lambda probe: probe.position)
    positions, turn = np.array([probe.position for probe in probes]), np.zeros(len(probes), np.int64)
    for i, probe in enumerate(probes):
        shown = [turn[(positions >= part.start) & (positions < part.stop)] for part in probe.seen]
        turn[i] = 1 + max((int(part.max()) for part in shown if len(part)), default=-1)
    return [[p for p, t in zip(probes, turn, strict=True) if t == now] for now in range(MOST_TURNS)]


def ask_again(record: Record, turns: Sequence[Sequence[np.ndarray]], shape: torch.Size) -> list[torch.Tensor]:
    """The distribution after each context, one context a row, turn by turn; `shape` is that of the batches scored."""
    said, n_rows = list[torch.Tensor](), min(ASKED_ROWS, shape[0])
    parts = [turn[i : i + n_rows] for turn in turns for i in range(0, len(turn), n_rows)]
    for part in tqdm(parts, "ask again", unit=" batches", disable=None):
        inputs = torch.zeros(n_rows, shape[1], dtype=torch.int64)
        for i, context in enumerate(part):
            inputs[i, : len(context)] = torch.from_numpy(context)
        logits = record.logits(inputs)
        said += [torch.log_softmax(logits[i, len(context) - 1], 0) for i, context in enumerate(part)]
    return said


def probe_fixed(record: Record, other: Record | None, done: Pass, rounding: Rounding) -> list[Check]:
    """Ask a fresh process, which never sees what follows, for what the scored one said.

    `other`, where documents are masked, is one more: who saw a row could repeat for its last document what it said.
    """
    (inputs, answers, losses), turns = done.batch, in_turns(done.probes)
    probes = [probe for turn in turns for probe in turn]
    targets, at_random = [probe.target for probe in probes], [probe.at_random for probe in probes]
    told = [probe.log_probs for probe in probes]
    by_row = ask_again(record, [[probe.row for probe in turn] for turn in turns], inputs.shape)
    checks = [compared("causal", "what follows", told, by_row, targets, at_random, rounding)]
    if other:
        by_document = ask_again(other, [[probe.document for probe in turn] for turn in turns], inputs.shape)
        checks.append(compared("documents", "the documents before", by_row, by_document, targets, at_random, rounding))
    again = float((tg.target_nats(record.logits(inputs), answers) - losses).abs().max())
    reason = f"a batch again in a second process: differs by {again:.2g} nats"
    return [*checks, Check("deterministic", again <= 20 * rounding.nats, reason)]


def compared(
    name: str,
    what: str,
    told: list[torch.Tensor],
    blind: list[torch.Tensor],
    targets: Sequence[int],
    at_random: Sequence[bool],
    rounding: Rounding,
) -> Check:
    """Whether distributions stay the same without some context, but for rounding: each as a whole and at its target,
    and at the targets on average, where a little everywhere would add up."""
    far = max(distance(x, y) for x, y in zip(told, blind, strict=True))
    gains = np.array([float((x - y)[target]) for x, y, target in zip(told, blind, targets, strict=True)])
    gain, most = float(gains[at_random].mean()), float(gains.max())
    allowed = 3 * rounding.nats / math.sqrt(sum(at_random))
    found = f"distance {far:.2g}, {most:+.2g} nats at most and {gain:+.2g} per token; rounding makes"
    reason = (
        f"{len(targets)} places without {what}: {found} {rounding.distance:g}, {20 * rounding.nats:g}, {allowed:.2g}"
    )
    return Check(name, far <= rounding.distance and most <= 20 * rounding.nats and gain <= allowed, reason)


# ----------------------------------------------------------------------------------------------------------------------
# Adaptive predictors (class B)
# ----------------------------------------------------------------------------------------------------------------------


def score_adaptive(
    record: Record, twin: Record, split: tg.ValSplit, documents: int, rng: np.random.Generator, rounding: Rounding
) -> tuple[Scored, list[Check]]:
    """Predict, score, then observe, chunk by chunk through the split, or its first `documents`.

    `twin`, a process of its own because the scored one would remember, observes the same, but is asked for some chunks
    with other, older text from a secret place on: what looks ahead in a chunk says something else there. The place
    is chosen when the prediction is there, in every second chunk where it knew a lot, as in score_windows.
    """
    ids, size = split.ids.astype(np.int64), record.config.eval_seq_len
    expected = bigram_nats(ids)
    starts = np.flatnonzero(ids == record.config.bos_id)
    end = int(starts[documents]) + 1 if 0 < documents < len(starts) else len(ids)
    chunks = [(a, min(a + size, end)) for a in range(1, end, size)]
    probed = set(rng.choice(len(chunks), min(PROBES, len(chunks)), replace=False).tolist())
    normalised = repeated = 0.0
    told, blind, targets, at_random = list[torch.Tensor](), list[torch.Tensor](), list[int](), list[bool]()
    nats = np.zeros(end)
    for process in (record, twin):
        process.observe(ids[:1])
    for number, (a, b) in enumerate(tqdm(chunks, "score", unit=" chunks", disable=None)):
        chunk = ids[a:b]
        log_probs = record.predict(chunk)
        total = log_probs.logsumexp(1, keepdim=True)
        normalised, log_probs = max(normalised, float(total.abs().max())), log_probs - total
        nats[a:b] = -log_probs[torch.arange(b - a), torch.from_numpy(chunk)].double().numpy()
        if number in probed:
            at_random.append(len(at_random) % 2 == 0)
            likelier = likelier_than(expected[a:b], nats[a:b])
            weights = np.ones(b - a) if at_random[-1] else likelier
            cut = int(rng.choice(b - a, p=weights / weights.sum()))
            past = int(rng.integers(a))  # text it knows, and no noise to tell it by
            altered = twin.predict(np.concatenate([chunk[:cut], np.resize(ids[past:a], b - a - cut)]))
            told.append(log_probs[cut].clone())
            blind.append(altered[cut] - altered[cut].logsumexp(0))
            targets.append(int(chunk[cut]))
            again = record.predict(chunk)
            repeated = max(repeated, float((again.softmax(1) - log_probs.exp()).abs().max()))
        for process in (record, twin):
            process.observe(chunk)
    first = np.maximum(np.searchsorted(starts, np.arange(1, end) - 1, side="right"), 1) - 1
    sums = np.bincount(first, nats[1:]), np.bincount(first, split.bytes[1:end])
    reason = f"log of the sum of probabilities {normalised:.2g}, at most {NORMALISED:g} is rounding"
    twice = f"{len(probed)} chunks predicted twice: probabilities differ by {repeated:.2g}, at most {REPEATED:g}"
    checks = [
        Check("normalised", normalised <= NORMALISED, reason),
        compared("causal", "what follows in the chunk", told, blind, targets, at_random, rounding),
        Check("side_effects", repeated <= REPEATED, twice),
    ]
    return Scored(*sums, end - 1, len(starts), prefix=True), checks


# ----------------------------------------------------------------------------------------------------------------------
# Training again
# ----------------------------------------------------------------------------------------------------------------------


def make_decoy(data: Path, folder: Path, tokenizer: Path, vocab_size: int, bos_id: int) -> None:
    """A validation split that is none: training text of the same length, so that a script finds what it looks for."""
    tokens = len(tg.TokenStream(str(data), "fineweb_val_[0-9]*.bin"))
    train = tg.TokenStream(str(data), "fineweb_train_[0-9]*.bin")
    ids = train.read(0, min(tokens, len(train)))
    train.require_below(vocab_size, ids, 0)
    folder.mkdir()
    write_shard(folder / "fineweb_val_000000.bin", ids)
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.where(ids == bos_id, 0, 2))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    entry = {"sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest(), "lossless": False}
    manifest = {"splits": {"val": {"text_sha256": "decoy", "files": files}}, "tokenizer": entry}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


class Training(NamedTuple):
    """What a record is trained from again."""

    script: Path
    settings: dict[str, Any]
    seed: str
    data: Path
    tokenizer: Path


def train_again(job: Training, out: Path, limits: Limits, seconds: float) -> None:
    """Run the script with its settings where the validation text does not exist; logs and artifact go to `out`."""
    vocab_size, bos_id = int(job.settings["vocab_size"]), int(job.settings["bos_id"])
    decoy = out.parent / "decoy"
    make_decoy(job.data, decoy, job.tokenizer, vocab_size, bos_id)
    shards = [*decoy.iterdir(), *job.data.glob("fineweb_train_[0-9]*.bin")]
    binds = [Bind(path.resolve(), f"/data/{path.name}") for path in shards]
    binds += [
        Bind(job.script.resolve(), "/record/train_gpt.py"),
        Bind(job.tokenizer.resolve(), "/data/tokenizer.model"),
    ]
    binds.append(Bind(out, "/out", writable=True))
    env = {name.upper(): str(int(v) if isinstance(v, bool) else v) for name, v in job.settings.items()}
    env |= {"SEED": job.seed, "RUN_ID": "rerun", "DATA_PATH": "/data", "TOKENIZER_PATH": "/data/tokenizer.model"}
    env |= {"OUT_DIR": "/out", "ARTIFACT_DIR": "/out", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with (out / "screen.txt").open("w+b") as screen:
        process = Sandboxed(["/record/train_gpt.py"], binds, limits, env, stdout=screen, stderr=screen)
        try:
            status = process.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RecordError("time", f"training took more than {seconds:g} s") from None
        finally:
            process.close()
        screen.seek(0)
        lines = screen.read().decode(errors="replace").strip().splitlines()
    if status:
        raise RecordError("train", f"the script ended with status {status}: {lines[-1][:300] if lines else ''}")
