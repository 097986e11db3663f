"""Scores a record without trusting its code, which turns ids into logits in a sandbox. Everything else happens here.

The text, its bytes, the windows, the softmax and the sums are those of the root's train_gpt.py and of the documents, so
that nothing the record's code does can change what is counted. A fixed predictor (class A) is asked for logits, and
what it answered at some secret places is asked again in a second process that never sees what follows there. An
adaptive predictor (class B) is asked for the distributions of a chunk before it may observe the chunk. The command is
tools/verify.py.

    load_artifact(path, device)    class A: a module with .config as GPTConfig; module(ids) are its logits
    load_predictor(path, device)   class B: .config as GPTConfig, and
    .predict(ids) -> (T, V)        log-probabilities; row t is the distribution of ids[t], given all that was observed
                                   before and ids[:t]
    .observe(ids)                  called once for every chunk, after it was scored

All ids are int64 tensors on the CPU, (B, T) for class A and (T,) for class B.

The score that a record of class B claims is that of this loop over the whole validation split `ids`, and its script has
to report it as val_loss and val_bpb:

    predictor.observe(ids[:1])
    for start in range(1, len(ids), predictor.config.eval_seq_len):
        chunk = ids[start : start + predictor.config.eval_seq_len]
        nats -= predictor.predict(chunk)[range(len(chunk)), chunk].sum()
        predictor.observe(chunk)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import heapq
import math
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch
from record import ROOT, Check, Submission, verdict
from sandbox import Bind, Limits, Sandboxed, isolation
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from worker import FORBIDDEN_EVENTS, FORBIDDEN_FILE, SCORING_FIELDS, receive, send

# All that the tools use of the rest of the project. The root's train_gpt.py has the windows, the cross-entropy and the
# bytes of tokens. From data/ come the documents and the decoder, which count the bytes of a text a second time, and the
# writer of shards, with which tools/rerun.py hides a text. Both folders go first, ahead of packages of the same names.
sys.path.insert(0, str(ROOT / "data"))
sys.path.insert(0, str(ROOT))
from documents import framed, read_documents
from shards import write_shard as write_shard
from tokenizer import Tokenizer

import train_gpt as tg

WORKER = Path(__file__).with_name("worker.py")
OUT_OF_MEMORY = re.compile(r"^MemoryError|can't allocate memory|std::bad_alloc")
VIOLATIONS = {*FORBIDDEN_EVENTS, FORBIDDEN_FILE}  # names of the checks that the worker's audit hook can fail
MAX_CONFIG_BYTES = 2**16
MAX_ROW_LOGITS = 2**28
BATCH_TOKENS = 524_288  # per forward pass, at most

# SentencePiece's default for the longest piece that it trains.
MAX_PIECE_CHARACTERS = 16

# Places that are asked again: up to this many at random, and up to half as many where the record did surprisingly well.
PROBES = 512
PROBE_ROWS = 32  # per forward pass, at most
MAX_TURNS = 8

# A token that occurs more often than this is predicted more by the bigrams than by the unigrams of the text.
BIGRAM_BACKOFF = 8.0
MAX_LOG_RATIO = 12.0  # nats

# What rounding explains: a sum of probabilities whose log is not 0, and a probability that differs when asked twice.
MAX_LOG_SUM = 1e-3
MAX_CHANGE = 1e-4


class Rounding(NamedTuple):
    """How much an answer may differ if the same question stands in another batch, or further left in its row."""

    distance: float  # half the sum of the differences of two distributions
    nats: float  # of the target, one standard deviation


# Measured on a CPU: 0 in another batch; further left in a row 1e-6 and 2e-7 in float32, 0.01 and 0.004 in bfloat16.
ROUNDING = {"float32": Rounding(2e-5, 2e-4), "bfloat16": Rounding(2e-2, 0.02)}
MAX_DEVIATIONS = 20  # of Rounding.nats, at a single place

# Bits per byte by which the scores of two machines may differ: half of what a record has to gain.
SAME_SCORE = 0.001
# Bits per byte: a sample with a wider interval (half width at 95 %) is too small to be compared with a claim.
MAX_INTERVAL = 0.1
# Bits per byte by which the scored text may be easier than unseen text of its source, beyond what chance explains.
UNSEEN_GAP = 0.02


# ----------------------------------------------------------------------------------------------------------------------
# The record's code in a process of its own
# ----------------------------------------------------------------------------------------------------------------------


class RecordError(Exception):
    """The record's code did not do what it has to. `check` is the name of the check that this fails."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(reason)
        self.check = check


class RecordProcess:
    """The judge's end of a process in the sandbox that runs the code of a record with one artifact."""

    config: tg.GPTConfig  # of the artifact; only SCORING_FIELDS are set

    def __init__(
        self, process: Sandboxed, errors: IO[bytes], answer_seconds: float, violations: dict[str, str]
    ) -> None:
        self.process = process
        self.requests = cast(IO[bytes], process.popen.stdin)
        self.replies = cast(IO[bytes], process.popen.stdout)
        self.errors = errors
        self.answer_seconds = answer_seconds
        self.violations = violations

    @classmethod
    def start(
        cls,
        script: Path,
        artifact: Path,
        predictor_class: str,
        limits: Limits,
        answer_seconds: float,
        violations: dict[str, str],
    ) -> RecordProcess:
        """Start the process and wait until it has loaded the artifact. RecordError if it does not.

        answer_seconds   how long any answer may take
        violations       is filled with what the code does besides answering: the first case by the name of the check
                         that it fails, shared by all processes of a record
        """
        artifact_inside = f"/record/{artifact.name}"
        binds = [
            Bind(WORKER, "/judge/worker.py"),
            Bind(script.resolve(), "/record/train_gpt.py"),
            Bind(artifact.resolve(), artifact_inside),
        ]
        errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by close()
        process = Sandboxed(
            ["/judge/worker.py", "/record/train_gpt.py", artifact_inside, predictor_class],
            binds,
            limits,
            env={"OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        started = cls(process, errors, answer_seconds, violations)
        try:
            started.config = started.receive_config()
        except BaseException:
            started.close()
            raise
        return started

    def __enter__(self) -> RecordProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.close()
        self.errors.close()

    @contextlib.contextmanager
    def deadline(self, check: str) -> Iterator[None]:
        """Kill the process if the block takes longer than answer_seconds.

        RecordError with check `time` if that happens, and with `check` if the process ends or breaks the protocol.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.process.kill()

        timer = threading.Timer(self.answer_seconds, expire)
        timer.start()
        try:
            yield
        except (EOFError, ValueError, RecursionError, OSError) as error:
            if expired.is_set():
                raise RecordError("time", f"there was no answer within {self.answer_seconds:g} s") from None
            reason = self.last_error_line() or repr(error)
            raise RecordError(check, f"its process ended or broke the protocol: {reason}") from None
        finally:
            timer.cancel()

    def next_answer(self, check: str, max_bytes: int) -> tuple[dict[str, Any], bytes]:
        """The next answer. What the audit hook reports before it goes into `violations`."""
        while True:
            header, payload = receive(self.replies, max_bytes)
            if "violation" not in header:
                break
            name = str(header["violation"])
            detail = str(header.get("detail"))[:200]
            self.violations.setdefault(name if name in VIOLATIONS else "violation", detail)

        if "error" in header:
            reason = str(header["error"])[:600]
            raise RecordError("memory" if OUT_OF_MEMORY.search(reason) else check, reason)
        return header, payload

    def receive_config(self) -> tg.GPTConfig:
        with self.deadline("load"):
            header, _ = self.next_answer("load", MAX_CONFIG_BYTES)
        try:
            values = {name: header["config"][name] for name in SCORING_FIELDS}
            config = dataclasses.replace(tg.GPTConfig(), **values)
        except (ValueError, TypeError, KeyError) as error:
            raise RecordError("load", f"the artifact has no config that can be scored: {error!r}") from None
        row_logits = config.eval_seq_len * config.vocab_size
        if not 0 < row_logits <= MAX_ROW_LOGITS:
            reason = f"EVAL_SEQ_LEN={config.eval_seq_len} makes rows of {row_logits} logits, not 1 to {MAX_ROW_LOGITS}"
            raise RecordError("load", reason)
        return config

    def last_error_line(self) -> str:
        """The last line that the process wrote to standard error."""
        size = self.errors.seek(0, 2)
        self.errors.seek(max(0, size - 2000))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def request(self, do: str, ids: np.ndarray, max_bytes: int) -> tuple[dict[str, Any], bytes]:
        header = {"do": do, "shape": list(ids.shape)}
        # A process that reads nothing would also block `send`.
        with self.deadline("run"):
            send(self.requests, header, np.ascontiguousarray(ids, "<i8").tobytes())
            return self.next_answer("run", max_bytes)

    def ask(self, do: str, ids: np.ndarray) -> Tensor:
        """Send ids, int64 of any shape, and receive float32 values of that shape and the vocabulary."""
        shape = [*ids.shape, self.config.vocab_size]
        n_bytes = 4 * math.prod(shape)
        header, payload = self.request(do, ids, n_bytes)
        if header.get("shape") != shape or len(payload) != n_bytes:
            raise RecordError("run", f"{do} returned shape {header.get('shape')}, not {shape}")

        values = torch.frombuffer(bytearray(payload), dtype=torch.float32).view(shape)
        # Logits have to be finite. Of log-probabilities, minus infinity is a probability of 0.
        finite = values if do == "logits" else values.exp()
        if not bool(torch.isfinite(finite).all()):
            raise RecordError("normalised", f"{do} returned values that are not finite")
        return values

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V) float32"""
        return self.ask("logits", ids.numpy())

    def predict(self, ids: np.ndarray) -> Tensor:
        """(T,) -> (T, V) float32 log-probabilities"""
        return self.ask("predict", ids)

    def observe(self, ids: np.ndarray) -> None:
        self.request("observe", ids, 0)


# ----------------------------------------------------------------------------------------------------------------------
# The text and its bytes
# ----------------------------------------------------------------------------------------------------------------------


def load_split(folder: Path, tokenizer: Path, config: tg.GPTConfig) -> tg.ValSplit:
    """The validation split of a data folder, as the root's script reads it. ValueError for files that contradict."""
    sp, tokenizer_sha256 = tg.load_tokenizer(str(tokenizer), config.vocab_size, config.bos_id)
    return tg.load_val_split(str(folder), sp, tokenizer_sha256)


def check_config(config: tg.GPTConfig, submission: Submission) -> Check:
    """Whether the artifact asks for the windows that the record's settings name."""
    problems = []
    for name in SCORING_FIELDS:
        value = getattr(config, name)
        if name in submission.settings and submission.settings[name] != value:
            problems.append(f"{name} is {value} in the artifact and {submission.settings[name]} in the settings")
    return verdict("load", problems, f"a context of {config.eval_seq_len}, windows by {config.eval_method}")


def check_identity(identity: Mapping[str, Any], submission: Submission) -> Check:
    """Whether this is the text that the record was scored on."""
    problems = []
    for key in ("val_text_sha256", "val_documents", "val_bytes", "val_accounting", "val_tokens", "val_shards_sha256"):
        claimed = getattr(submission, key)
        if identity[key] != claimed:
            problems.append(f"{key} is {identity[key]}, the record was scored on {claimed}")
    return verdict("text", problems, "the text and its tokens are those of the record")


def check_tokenizer(tokenizer: Path) -> Check:
    """Whether its pieces are short. Long ones would be a model of the text that counts no bytes."""
    sp = Tokenizer(tokenizer.read_bytes(), tokenizer).sp
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size()) if not sp.is_byte(i) and not sp.is_control(i)]
    longest = max(map(len, pieces))
    reason = f"its longest piece has {longest} characters, at most {MAX_PIECE_CHARACTERS} are allowed"
    return Check("tokenizer", longest <= MAX_PIECE_CHARACTERS, reason)


def check_bytes_of_text(
    split: tg.ValSplit, tokenizer: Path, documents: Path | None, bos_id: int, data_is_own: bool
) -> Check:
    """Whether the byte counts of the data are those of the text, document by document.

    The text is read from `documents`, or decoded from the tokens where the tokenizer is lossless. Where neither is
    possible, data that the judge names are believed, and data that came with the record (`data_is_own`) are not.
    """
    name = "bytes_of_text"
    if split.identity["val_accounting"] == "pieces":
        return unproven_bytes("they are those of the tokenizer's pieces, of normalised text", data_is_own)

    starts = np.flatnonzero(split.ids == bos_id)
    if not len(starts) or starts[0] > 0:
        return Check(name, False, "the tokens do not begin with a document: export the data again")
    counted = np.add.reduceat(split.bytes.astype(np.int64), starts)

    if documents is not None:
        source = "the documents"
        texts = [text for text in read_documents([documents]) if text.strip()]
    elif split.identity["tokenizer_lossless"] is True:
        source = "the decoded tokens"
        decoder = Tokenizer(tokenizer.read_bytes(), tokenizer)
        try:
            texts = [decoder.decode(ids[1:]) for ids in np.split(split.ids, starts)[1:]]
        except ValueError as error:
            return Check(name, False, f"the tokens cannot be decoded: {error}")
    else:
        reason = "they are those of the sidecar, because the tokenizer is not lossless (--documents would count them)"
        return unproven_bytes(reason, data_is_own)

    lengths = np.array([len(text.encode()) for text in texts])
    if not np.array_equal(lengths, counted):
        found = f"{source} have {lengths.sum()} bytes in {len(lengths)} documents"
        return Check(name, False, f"{found}, the data count {counted.sum()} bytes in {len(counted)}")

    hashed = hashlib.sha256()
    for text in texts:
        hashed.update(framed(text))
    if hashed.hexdigest() != split.identity["val_text_sha256"]:
        claimed = split.identity["val_text_sha256"]
        return Check(name, False, f"{source} have sha256 {hashed.hexdigest()}, the data name {claimed}")
    return Check(name, True, f"{source} have {lengths.sum()} bytes in {len(lengths)} documents, as counted")


def unproven_bytes(reason: str, data_is_own: bool) -> Check:
    if data_is_own:
        reason += ", and for the record's own data that proves nothing: name others with --data"
    return Check("bytes_of_text", not data_is_own, reason)


# ----------------------------------------------------------------------------------------------------------------------
# Scores and their uncertainty
# ----------------------------------------------------------------------------------------------------------------------


class UnitScores(NamedTuple):
    """Sums of the units of a split that were scored: documents, or windows where these do not follow documents."""

    nats: np.ndarray
    bytes: np.ndarray
    n_targets: int
    n_units: int  # of the whole split
    is_prefix: bool = False  # the first units of the split, instead of a sample at random

    @property
    def bpb(self) -> float:
        return float(self.nats.sum() / math.log(2) / self.bytes.sum())

    @property
    def whole(self) -> bool:
        """Whether every unit of the split was scored."""
        return len(self.nats) == self.n_units

    @property
    def interval(self) -> float:
        """Half width of the 95 % interval of the whole split's bpb."""
        if self.whole:
            return 0.0
        if self.is_prefix:
            return math.inf  # an adaptive predictor gets better along the text: the first documents tell nothing
        part_left = 1 - len(self.nats) / self.n_units
        return self.interval_of_source * math.sqrt(part_left)

    @property
    def interval_of_source(self) -> float:
        """The same for the source that the split is a sample of (ratio estimator)."""
        n = len(self.nats)
        if n < 2:
            return math.inf
        residuals = self.nats / math.log(2) - self.bpb * self.bytes
        variance = n / (n - 1) * (residuals**2).sum()
        return float(1.96 * math.sqrt(variance) / self.bytes.sum())


def check_score(name: str, scores: UnitScores, claim: float, margin: float, may_be_better: bool = False) -> Check:
    """Whether a score in bits per byte is the one that was claimed, within `margin` and the uncertainty of a sample."""
    if scores.is_prefix and not scores.whole:
        reason = (
            f"val_bpb {scores.bpb:.6f} of the first {len(scores.nats)} documents "
            f"(partial:{scores.n_targets}_targets); this is not compared with the claim, because an adaptive predictor "
            "gets better along the text"
        )
        return Check(name, True, reason)
    if scores.interval > MAX_INTERVAL:
        reason = f"{len(scores.nats)} units give +- {scores.interval:.3f} bits per byte, too little to compare"
        return Check(name, False, f"{reason}: raise --sample")

    allowed = margin + 1.5 * scores.interval  # 1.5 half widths are 3 standard deviations
    excess = scores.bpb - claim
    ok = excess <= allowed and (may_be_better or -excess <= allowed)
    if scores.whole:
        found = f"val_bpb {scores.bpb:.6f} ({scores.n_targets} targets)"
    else:
        sample = f"partial:{len(scores.nats)}_of_{scores.n_units}_units"
        found = f"val_bpb {scores.bpb:.6f} +- {scores.interval:.4f} ({sample})"
    return Check(name, ok, f"{found}, the record claims {claim:.6f}; they may differ by {allowed:.4f}")


# ----------------------------------------------------------------------------------------------------------------------
# Places that are asked again
# ----------------------------------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """A place that was scored: what stood before it, and what the record answered."""

    position: int  # of the target, in the split
    target: int
    seen: np.ndarray  # positions of everything before the target in its row, in order
    row: np.ndarray  # the ids at these positions
    document: np.ndarray  # those of them that belong to the document of the last one
    at_random: bool  # otherwise it was chosen because the record knew more than a bigram model
    log_probs: Tensor  # (V,)


class Reservoir:
    """Keeps the `size` places of a stream that have the largest keys.

    With keys log(u) / weight, for u uniform in (0, 1), this is a weighted sample without replacement (Efraimidis and
    Spirakis 2006).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.heap: list[tuple[float, int, Probe]] = []  # smallest key first; positions break ties

    def candidates(self, keys: np.ndarray) -> np.ndarray:
        """Indices of the keys that are large enough to be kept. (N,) float64 -> (M,) int64"""
        largest = np.argsort(keys)[-self.size :]
        if len(self.heap) < self.size:
            return largest
        smallest_kept = self.heap[0][0]
        return largest[keys[largest] > smallest_kept]

    def add(self, key: float, probe: Probe) -> None:
        entry = (key, probe.position, probe)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        else:
            heapq.heappushpop(self.heap, entry)

    def probes(self) -> list[Probe]:
        return [probe for _, _, probe in self.heap]


def bigram_nats(ids: np.ndarray) -> np.ndarray:
    """Nats of each token given the one before it, from the counts of this very text without the token. (N,) -> (N,)

    A predictor that sees its target beats this by far. So does a good model, but at fewer places.
    """
    _, token, token_counts = np.unique(ids, return_inverse=True, return_counts=True)
    unigram = (token_counts[token] - 0.5) / len(ids)

    _, pair, pair_counts = np.unique(ids[:-1] * 2**16 + ids[1:], return_inverse=True, return_counts=True)
    others = pair_counts[pair] - 1 + BIGRAM_BACKOFF * unigram[1:]
    bigram = others / (token_counts[token[:-1]] - 1 + BIGRAM_BACKOFF)
    return -np.log(np.concatenate((unigram[:1], bigram)))


def likelihood_ratio(bigram: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """How many times likelier the record finds tokens than the bigram model does. (N,), (N,) nats -> (N,)"""
    return np.exp((bigram - nats).clip(-MAX_LOG_RATIO, MAX_LOG_RATIO))


class ProbeSampler:
    """Chooses the places of a text that are asked again, while batches of it are scored.

    Some are taken at random. Others are taken with chances in proportion to likelihood_ratio, which finds rare leaks.
    """

    def __init__(self, ids: np.ndarray, bos_id: int, size: int, rng: np.random.Generator) -> None:
        self.ids = ids.astype(np.int64)
        self.bos_id = bos_id
        self.rng = rng
        self.bigram = bigram_nats(self.ids)
        self.at_random = Reservoir(size)
        self.where_it_knew = Reservoir(math.ceil(size / 2))

    def offer(self, rows: Sequence[Sequence[tg.Window]], batch: tg.RowBatch, nats: Tensor, logits: Tensor) -> None:
        """Take part of the places of a batch that was made of `rows`. nats (B, T), logits (B, T, V)"""
        is_scored = batch.positions >= 0
        cells = is_scored.nonzero().tolist()
        positions = batch.positions[is_scored].numpy()
        ratio = likelihood_ratio(self.bigram[positions], nats[is_scored].double().numpy())

        for reservoir, weights in ((self.at_random, np.ones_like(ratio)), (self.where_it_knew, ratio)):
            keys = np.log(self.rng.random(len(positions))) / weights
            for index in reservoir.candidates(keys).tolist():
                i, column = cells[index]
                # Positions of the inputs of the row, one window behind the other as fill_rows puts them.
                inputs = np.concatenate([np.arange(window.start, window.stop - 1) for window in rows[i]])
                seen = inputs[: column + 1]
                position = int(positions[index])
                probe = Probe(
                    position=position,
                    target=int(self.ids[position]),
                    seen=seen,
                    row=self.ids[seen],
                    document=last_document(self.ids[seen], self.bos_id),
                    at_random=reservoir is self.at_random,
                    log_probs=torch.log_softmax(logits[i, column], 0),
                )
                reservoir.add(float(keys[index]), probe)

    def probes(self) -> list[Probe]:
        """Every place once. One that was taken both ways counts as taken at random."""
        chosen = [*self.where_it_knew.probes(), *self.at_random.probes()]
        return list({probe.position: probe for probe in chosen}.values())


def last_document(row: np.ndarray, bos_id: int) -> np.ndarray:
    """What the end of a row can see through document masks: the last BOS and everything after it."""
    starts = np.flatnonzero(row == bos_id)
    return row[starts[-1] :] if len(starts) else row


class Comparison(NamedTuple):
    """The record's two answers at one place: with the context that should not matter, and without. Each (V,) nats"""

    target: int
    at_random: bool
    with_context: Tensor
    without_context: Tensor

    @property
    def distance(self) -> float:
        """Half the sum of the differences of the two distributions: from 0 to 1."""
        return float((self.with_context.exp() - self.without_context.exp()).abs().sum() / 2)

    @property
    def gain(self) -> float:
        """Nats that the context saves at the target."""
        return float((self.with_context - self.without_context)[self.target])


def check_same_answers(name: str, context: str, comparisons: Sequence[Comparison], rounding: Rounding) -> Check:
    """Whether answers change by no more than rounding when some context is taken away.

    Each distribution has to stay the same as a whole, and no target may be likelier with the context. The average over
    the targets that were taken at random has a closer limit, because a little at every place would add up. Targets that
    are less likely with the context count in the distance only.
    """
    at_random = np.array([comparison.at_random for comparison in comparisons])
    gains = np.array([comparison.gain for comparison in comparisons])
    distance = max(comparison.distance for comparison in comparisons)
    gain = float(gains.max())
    mean_gain = float(gains[at_random].mean())

    max_gain = MAX_DEVIATIONS * rounding.nats
    max_mean_gain = 3 * rounding.nats / math.sqrt(at_random.sum())
    ok = distance <= rounding.distance and gain <= max_gain and mean_gain <= max_mean_gain
    reason = (
        f"asked again at {len(comparisons)} places without {context}: distributions differ by up to {distance:.2g} "
        f"(rounding explains {rounding.distance:g}), with it targets gain up to {gain:.2g} nats ({max_gain:g}) and "
        f"{mean_gain:.2g} on average ({max_mean_gain:.2g})"
    )
    return Check(name, ok, reason)


# ----------------------------------------------------------------------------------------------------------------------
# Fixed predictors (class A)
# ----------------------------------------------------------------------------------------------------------------------


class ScoringPass(NamedTuple):
    """What remains of a pass over windows."""

    nats: np.ndarray  # (N,) float64, by position of the target; 0 where nothing was scored
    probes: list[Probe]
    batch: tg.RowBatch  # one of the batches, to be scored again
    batch_nats: Tensor


def score_windows(
    logits_fn: Callable[[Tensor], Tensor],
    split: tg.ValSplit,
    windows: Sequence[tg.Window],
    config: tg.GPTConfig,
    rng: np.random.Generator,
) -> ScoringPass:
    """Score windows as `evaluate` of the root's script does, and remember some places and one batch."""
    rows = tg.pack_rows(windows, split.ids, config)
    n_rows = min(len(rows), tg.rows_per_pass(config, BATCH_TOKENS))
    begins = range(0, len(rows), n_rows)
    remembered = begins[int(rng.integers(len(begins)))]
    sampler = ProbeSampler(split.ids, config.bos_id, min(PROBES, len(rows)), rng)

    nats = np.zeros(len(split.ids))
    for begin in tqdm(begins, "score", unit=" batches", disable=None):
        batch_rows = rows[begin : begin + n_rows]
        batch = tg.fill_rows(batch_rows, split.ids, n_rows, config.eval_seq_len)
        logits = logits_fn(batch.inputs)
        batch_nats = tg.target_nats(logits, batch.targets)

        is_scored = batch.positions >= 0
        nats[batch.positions[is_scored].numpy()] = batch_nats[is_scored].double().numpy()
        sampler.offer(batch_rows, batch, batch_nats, logits)
        if begin == remembered:
            kept = batch, batch_nats
    return ScoringPass(nats, sampler.probes(), *kept)


def units_of_targets(windows: Sequence[tg.Window], split: tg.ValSplit, config: tg.GPTConfig) -> np.ndarray:
    """The unit of every position of the split as a target; position 0 is none and has -1. -> (N,) int64"""
    units = np.full(len(split.ids), -1)
    if config.eval_method == "document":
        # The BOS behind a document is a target of that document.
        units[1:] = np.cumsum(split.ids == config.bos_id)[:-1]
    else:
        for number, window in enumerate(windows):
            units[window.first : window.stop] = number
    return units


def score_fixed(
    process: RecordProcess, split: tg.ValSplit, sample: int, rng: np.random.Generator
) -> tuple[UnitScores, ScoringPass]:
    """Score a split, or `sample` of its units taken at random."""
    windows = list(tg.scoring_windows(split.ids, process.config))
    units = units_of_targets(windows, split, process.config)
    all_units = np.unique(units[1:])
    if 0 < sample < len(all_units):
        chosen = set(rng.choice(all_units, sample, replace=False).tolist())
        windows = [window for window in windows if units[window.first] in chosen]
    scoring = score_windows(process.logits, split, windows, process.config, rng)

    targets = np.concatenate([np.arange(window.first, window.stop) for window in windows])
    _, unit = np.unique(units[targets], return_inverse=True)
    scores = UnitScores(
        nats=np.bincount(unit, scoring.nats[targets]),
        bytes=np.bincount(unit, split.bytes[targets]),
        n_targets=len(targets),
        n_units=len(all_units),
    )
    return scores, scoring


def in_turns(probes: Sequence[Probe]) -> list[list[Probe]]:
    """Probes in the turns in which they are asked again, at most MAX_TURNS; later ones are left out.

    A process may remember what it was asked. So a place is asked before every other place whose row shows its target.
    """
    probes = sorted(probes, key=lambda probe: probe.position)
    positions = np.array([probe.position for probe in probes])
    turns = np.zeros(len(probes), np.int64)
    for i, probe in enumerate(probes):
        turns_before = turns[np.isin(positions, probe.seen)]
        turns[i] = 1 + turns_before.max(initial=-1)

    by_turn: list[list[Probe]] = [[] for _ in range(MAX_TURNS)]
    for probe, turn in zip(probes, turns.tolist(), strict=True):
        if turn < MAX_TURNS:
            by_turn[turn].append(probe)
    return by_turn


def ask_again(process: RecordProcess, turns: Sequence[Sequence[np.ndarray]], shape: torch.Size) -> list[Tensor]:
    """The distribution after each context, one context in a row, turn by turn. `shape` is that of a scored batch."""
    n_rows = min(PROBE_ROWS, shape[0])
    parts = [turn[i : i + n_rows] for turn in turns for i in range(0, len(turn), n_rows)]
    answers = []
    for contexts in tqdm(parts, "ask again", unit=" batches", disable=None):
        inputs = torch.zeros(n_rows, shape[1], dtype=torch.int64)
        for i, context in enumerate(contexts):
            inputs[i, : len(context)] = torch.from_numpy(context)
        logits = process.logits(inputs)
        for i, context in enumerate(contexts):
            answers.append(torch.log_softmax(logits[i, len(context) - 1], 0))
    return answers


def check_fixed(
    start: Callable[[], RecordProcess], scoring: ScoringPass, document_masks: bool, rounding: Rounding
) -> list[Check]:
    """Ask fresh processes again, which never see what follows: the answers have to be those that were scored."""
    turns = in_turns(scoring.probes)
    probes = [probe for turn in turns for probe in turn]
    shape = scoring.batch.inputs.shape

    with start() as process:
        by_row = ask_again(process, [[probe.row for probe in turn] for turn in turns], shape)
        nats = tg.target_nats(process.logits(scoring.batch.inputs), scoring.batch.targets)
    comparisons = [
        Comparison(probe.target, probe.at_random, probe.log_probs, row)
        for probe, row in zip(probes, by_row, strict=True)
    ]
    checks = [check_same_answers("causal", "what follows", comparisons, rounding)]

    if document_masks:
        # Another process, because one that saw the whole row could repeat for its last document what it answered.
        with start() as process:
            by_document = ask_again(process, [[probe.document for probe in turn] for turn in turns], shape)
        comparisons = [
            Comparison(probe.target, probe.at_random, row, document)
            for probe, row, document in zip(probes, by_row, by_document, strict=True)
        ]
        checks.append(check_same_answers("documents", "the documents before", comparisons, rounding))

    difference = float((nats - scoring.batch_nats).abs().max())
    allowed = MAX_DEVIATIONS * rounding.nats
    reason = f"a second process scores a batch with differences of up to {difference:.2g} nats, {allowed:g} is rounding"
    return [*checks, Check("deterministic", difference <= allowed, reason)]


def check_unseen(
    process: RecordProcess, scores: UnitScores, folder: Path, tokenizer: Path, sample: int, rng: np.random.Generator
) -> Check:
    """Whether the scored text is about as hard as another one of its source. A model trained on it finds it easier."""
    split = load_split(folder, tokenizer, process.config)
    other, _ = score_fixed(process, split, sample, rng)
    gap = other.bpb - scores.bpb
    chance = 1.5 * math.hypot(other.interval_of_source, scores.interval_of_source)  # 3 standard deviations
    reason = (
        f"{folder.name} has {other.bpb:.4f} bits per byte, {gap:+.4f} against the scored text; chance explains "
        f"{chance:.4f}, and {UNSEEN_GAP} is allowed beyond"
    )
    return Check("unseen", gap <= chance + UNSEEN_GAP, reason)


# ----------------------------------------------------------------------------------------------------------------------
# Adaptive predictors (class B)
# ----------------------------------------------------------------------------------------------------------------------


def score_adaptive(
    process: RecordProcess,
    twin: RecordProcess,
    split: tg.ValSplit,
    documents: int,
    rng: np.random.Generator,
    rounding: Rounding,
) -> tuple[UnitScores, list[Check]]:
    """Predict, score, then observe, chunk by chunk through the split, or its first `documents`.

    `twin` observes the same. For some chunks it is asked to predict a copy in which older text replaces everything from
    a secret place on: a predictor that looks ahead answers something else at that place. The twin is a process of its
    own because the scored one might remember the chunk. The place is chosen after the scored prediction was made. In
    every second of these chunks it is one where the record knew a lot, as ProbeSampler chooses them.
    """
    ids = split.ids.astype(np.int64)
    size = process.config.eval_seq_len
    starts = np.flatnonzero(ids == process.config.bos_id)
    end = int(starts[documents]) + 1 if 0 < documents < len(starts) else len(ids)
    chunks = [(begin, min(begin + size, end)) for begin in range(1, end, size)]
    probed = set(rng.choice(len(chunks), min(PROBES, len(chunks)), replace=False).tolist())

    bigram = bigram_nats(ids)
    nats = np.zeros(end)
    comparisons: list[Comparison] = []
    largest_log_sum = 0.0
    largest_change = 0.0
    process.observe(ids[:1])
    twin.observe(ids[:1])
    for number, (begin, stop) in enumerate(tqdm(chunks, "score", unit=" chunks", disable=None)):
        chunk = ids[begin:stop]
        log_probs = process.predict(chunk)
        log_sums = log_probs.logsumexp(1, keepdim=True)
        largest_log_sum = max(largest_log_sum, float(log_sums.abs().max()))
        log_probs = log_probs - log_sums
        nats[begin:stop] = -log_probs[torch.arange(len(chunk)), torch.from_numpy(chunk)].double().numpy()

        if number in probed:
            at_random = len(comparisons) % 2 == 0
            ratio = likelihood_ratio(bigram[begin:stop], nats[begin:stop])
            weights = np.ones_like(ratio) if at_random else ratio
            place = int(rng.choice(len(chunk), p=weights / weights.sum()))

            altered = with_older_text(ids, begin, stop, place, rng)
            answer = twin.predict(altered)[place].log_softmax(0)
            comparisons.append(Comparison(int(chunk[place]), at_random, log_probs[place].clone(), answer))

            again = process.predict(chunk).softmax(1)
            largest_change = max(largest_change, float((again - log_probs.exp()).abs().max()))

        process.observe(chunk)
        twin.observe(chunk)

    normalised = f"the log of a sum of probabilities is up to {largest_log_sum:.2g}; rounding explains {MAX_LOG_SUM:g}"
    side_effects = (
        f"{len(probed)} chunks predicted twice change probabilities by up to {largest_change:.2g}; "
        f"rounding explains {MAX_CHANGE:g}"
    )
    checks = [
        Check("normalised", largest_log_sum <= MAX_LOG_SUM, normalised),
        check_same_answers("causal", "what follows in the chunk", comparisons, rounding),
        Check("side_effects", largest_change <= MAX_CHANGE, side_effects),
    ]
    return sum_by_document(nats, split, starts), checks


def with_older_text(ids: np.ndarray, begin: int, stop: int, place: int, rng: np.random.Generator) -> np.ndarray:
    """The chunk ids[begin:stop] with text from before it in the positions from `place` on.

    Noise in their place would tell the record that it is being tested.
    """
    older = ids[int(rng.integers(begin)) : begin]
    return np.concatenate([ids[begin : begin + place], np.resize(older, stop - begin - place)])


def sum_by_document(nats: np.ndarray, split: tg.ValSplit, starts: np.ndarray) -> UnitScores:
    """The score of the first positions of a split, whose documents begin at `starts`. nats (N,), by position"""
    targets = np.arange(1, len(nats))
    # The BOS behind a document is a target of that document. What stands before the first BOS counts to the first one.
    document = np.maximum(np.searchsorted(starts, targets - 1, side="right"), 1) - 1
    return UnitScores(
        nats=np.bincount(document, nats[targets]),
        bytes=np.bincount(document, split.bytes[targets]),
        n_targets=len(targets),
        n_units=len(starts),
        is_prefix=True,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The whole rescoring
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How to score again, as the command line of tools/verify.py says."""

    data: Path  # folder of shards with the text that was scored
    tokenizer: Path
    data_is_own: bool  # the data came with the record
    documents: Path | None = None  # the text itself, to count its bytes
    unseen: Path | None = None  # folder of shards with another text of the same source
    sample: int = 0  # documents to score: at random, or for class B the first ones; 0 means all
    seed: int | None = None  # of the sample and of the secret places; None draws a new one
    answer_seconds: float = 600.0
    memory_bytes: int = 8 * 2**30  # of address space, for each of the record's processes


def rescore(
    script: Path, artifact: Path, submission: Submission, options: Options
) -> tuple[list[Check], UnitScores | None]:
    """Score an artifact with a record's script. -> checks, and the score if there is one

    The score is not compared with a claim yet; check_score does that.
    """
    rng = np.random.default_rng(options.seed)
    rounding = ROUNDING.get(str(submission.settings.get("compute_dtype")), ROUNDING["bfloat16"])
    violations: dict[str, str] = {}
    start = functools.partial(
        RecordProcess.start,
        script,
        artifact,
        submission.predictor_class,
        Limits(memory_bytes=options.memory_bytes),
        options.answer_seconds,
        violations,
    )

    checks = [Check("isolation", True, isolation())]
    scores = None
    try:
        with start() as process:
            config = process.config
            checks.append(check_config(config, submission))
            split = load_split(options.data, options.tokenizer, config)
            checks.append(check_identity(split.identity, submission))
            checks.append(check_tokenizer(options.tokenizer))
            checks.append(
                check_bytes_of_text(split, options.tokenizer, options.documents, config.bos_id, options.data_is_own)
            )

            if submission.predictor_class == "A":
                scores, scoring = score_fixed(process, split, options.sample, rng)
                if options.unseen:
                    checks.append(check_unseen(process, scores, options.unseen, options.tokenizer, options.sample, rng))
            else:
                with start() as twin:
                    scores, more = score_adaptive(process, twin, split, options.sample, rng, rounding)
                checks += more

        if submission.predictor_class == "A":
            checks += check_fixed(start, scoring, config.document_masks, rounding)
    except RecordError as error:
        checks.append(Check(error.check, False, str(error)))
    except (ValueError, OSError) as error:
        checks.append(Check("text", False, f"the text cannot be read: {error}"))

    for name, detail in sorted(violations.items()):
        checks.append(Check(name, False, f"the script tried {detail}"))
    return checks, scores
