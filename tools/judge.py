"""Scores a record without trusting its code, which turns ids into logits in a sandbox. Everything else happens here.

The text, its bytes, the windows, the softmax and the sums are those of the root's train_gpt.py and of the documents, so
that nothing the record's code does can change what is counted. The command is tools/verify.py.

    load_artifact(path, device)    class A, a fixed predictor: a module with .config as GPTConfig; module(ids) are its
                                   logits
    load_predictor(path, device)   class B, one that adapts: .config as GPTConfig, and
    .predict(ids) -> (T, V)        log-probabilities; row t is the distribution of ids[t], given all that was observed
                                   before and ids[:t]
    .observe(ids)                  called once for every chunk, after it was scored

All ids are int64 tensors on the CPU, (B, T) for class A and (T,) for class B.

Whether a record knows what it has not seen. Before anything is scored, the judge draws places of the text that nobody
can guess. For each it asks a process of the record, the blind one, for the distribution of the next token, and shows it
only what may be known there. Then the text is scored, and at those places the same distributions have to come out. What
makes this safe is the order, not the walls of the sandbox. Two processes on one machine can always exchange a few bits,
by locks, by what the kernel keeps in memory, by the time that things take. So no process of the record may have seen
the token at a place, or anything that follows, before the blind one has answered there:

- Class A: all places are asked before the first row is scored. A place is asked before every other place whose context
  shows its token, and never in one batch with it (`in_turns`).
- Class B: all places of a chunk are asked before the chunk is scored, from left to right, in a process that observed
  the same chunks. Nobody in the sandbox has seen the chunk then.

A record that answers honestly while it is asked and knows more while it is scored gives other distributions. The same
channel could tell the scored process, the other way round, which places were asked, so that it cheats at all others.
So as many places again, which no process was asked about before, are asked after they were scored. To pass both times
a record has to carry the places one way and the text the other way, through a sandbox that refuses all channels that we
know of. Where a leak would pay most is not taken from the record's answers but estimated by a bigram model of the text.

What this cannot see is knowledge that lies in the artifact, the script or the tokenizer from the beginning: for this
there are the checks `tokenizer` and `vocabulary`, --unseen and --rerun. And no earlier judging on the same machine
should have left a trace of the text: use a machine, or a start of it, that the record has not run on.

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
import hashlib
import math
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch
from record import ROOT, Check, JudgeError, Submission, known_text, track_of, verdict
from sandbox import Bind, Limits, Sandboxed, is_visible, isolation
from significance import student_quantile
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
from tokenizer import Tokenizer, model_faults, vocabulary_bytes

import train_gpt as tg

WORKER = Path(__file__).with_name("worker.py")
OUT_OF_MEMORY = re.compile(r"^MemoryError|can't allocate memory|std::bad_alloc")
VIOLATIONS = {*FORBIDDEN_EVENTS, FORBIDDEN_FILE}  # names of the checks that the worker's audit hook can fail
MAX_CONFIG_BYTES = 2**16
MAX_ROW_LOGITS = 2**28
BATCH_TOKENS = 524_288  # per forward pass, at most

# The promise: a record that knows its target at one place in LEAK_RATE is found with a chance of POWER. For this,
# places are drawn at random (`places_needed`), and this share of their number besides, with chances in proportion to
# what a bigram model loses at a place, because that is where a leak pays most.
LEAK_RATE = 1000
POWER = 0.99
COSTLY_SHARE = 0.1
# Of the number of places drawn at random: so many more are asked only after they were scored. As many, so that the
# promise holds against both directions: the blind process cannot help the scored one, nor the other way round.
LATE_SHARE = 1.0
# Tokens that all questions may cost together: so many, or so many times the tokens of the text if those are more.
MAX_QUESTION_TOKENS = 2**26
MAX_QUESTION_TEXTS = 4
QUESTION_ROWS = 32  # per forward pass, at most
QUESTION_COLUMNS = 16  # the width of a forward pass is a multiple of this
# Questions that are asked twice, to measure how much rounding changes the answers of this record.
REPEATED_QUESTIONS = 64

# A token that occurs more often than this is predicted more by the bigrams than by the unigrams of the text.
BIGRAM_BACKOFF = 8.0

# What rounding explains: a sum of probabilities whose log is not 0, and a probability that differs when asked twice.
MAX_LOG_SUM = 1e-3
MAX_CHANGE = 1e-4


class Rounding(NamedTuple):
    """How much an answer may differ if the same question is asked under other circumstances."""

    distance: float  # half the sum of the differences of two distributions
    nats: float  # of the target, one standard deviation


# Whatever is measured of a record, rounding explains at least and at most this. Measured on a CPU with one document
# further left in its row: 1e-6 and 2e-7 in float32, 0.01 and 0.004 in bfloat16.
LEAST_ROUNDING = Rounding(2e-5, 2e-4)
MOST_ROUNDING = Rounding(2e-2, 0.02)
MAX_DEVIATIONS = 20  # of Rounding.nats, at a single place

FREE_VOCABULARY_BYTES = 2**16  # the largest published tokenizer, of 8192 pieces, has 55,013
# Pieces of the tokenizer that occur once in the text: so many for each one that does not occur, and these besides.
MAX_ONCE_PER_NEVER = 2
FREE_ONCE = 64
MAX_ONCE_SHARE = 0.5  # of the bytes of the text
MIN_GIVEN_BACK = 0.9  # of the bytes of the text, by a lossy tokenizer
# Lines of the text that also stand in the standard library; shorter ones are not counted.
MAX_LIBRARY_SHARE = 0.1
MIN_LINE_CHARACTERS = 20

# A sample with fewer units, or a wider interval in bits per byte (half width at 95 %), is not compared with a claim.
MIN_SAMPLE = 30
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
        self,
        process: Sandboxed,
        errors: IO[bytes],
        answer_seconds: float,
        violations: dict[str, str],
        until: float = math.inf,
    ) -> None:
        self.process = process
        self.requests = cast(IO[bytes], process.popen.stdin)
        self.replies = cast(IO[bytes], process.popen.stdout)
        self.errors = errors
        self.answer_seconds = answer_seconds
        self.violations = violations
        self.until = until

    @classmethod
    def start(
        cls,
        script: Path,
        artifact: Path,
        predictor_class: str,
        limits: Limits,
        answer_seconds: float,
        violations: dict[str, str],
        until: float = math.inf,
    ) -> RecordProcess:
        """Start the process and wait until it has loaded the artifact. RecordError if it does not.

        answer_seconds   how long any answer may take
        until            when all of them have to be there, in seconds of time.monotonic()
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
            # Triton kernels are run by Triton's interpreter, where there is a Triton.
            # Threads that wait sleep. They would take the cores from the judge's own.
            env={
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
                "OMP_WAIT_POLICY": "passive",
                "TRITON_INTERPRET": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        started = cls(process, errors, answer_seconds, violations, until)
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

        seconds = min(self.answer_seconds, max(0.0, self.until - time.monotonic()))
        timer = threading.Timer(seconds, expire)
        timer.start()
        try:
            yield
        except (EOFError, ValueError, RecursionError, OSError) as error:
            if expired.is_set():
                if seconds < self.answer_seconds:
                    raise RecordError("time", "judging takes too long in all: raise --total-timeout") from None
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

        if "judge_error" in header:
            reason = str(header["judge_error"])[:300]
            raise JudgeError(
                f"the judge's own Python lacks something in the sandbox ({reason}), which says "
                "nothing about the record: pip install -r requirements.txt into the Python that runs this"
            )
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

    def request(self, header: dict[str, Any], ids: np.ndarray, max_bytes: int) -> tuple[dict[str, Any], bytes]:
        # A process that reads nothing would also block `send`.
        with self.deadline("run"):
            send(self.requests, header | {"shape": list(ids.shape)}, np.ascontiguousarray(ids, "<i8").tobytes())
            return self.next_answer("run", max_bytes)

    def ask(self, do: str, ids: np.ndarray, columns: Sequence[int] | None = None) -> Tensor:
        """Send ids, int64 of any shape, and receive float32 values of that shape and the vocabulary.

        With `columns` only the values of one column of each row come back, or of (T,) ids those of some columns.
        """
        shape = [*ids.shape, self.config.vocab_size]
        header: dict[str, Any] = {"do": do}
        if columns is not None:
            shape = [len(columns), self.config.vocab_size]
            header["columns"] = list(columns)

        n_bytes = 4 * math.prod(shape)
        header, payload = self.request(header, ids, n_bytes)
        if header.get("shape") != shape or len(payload) != n_bytes:
            raise RecordError("run", f"{do} returned shape {header.get('shape')}, not {shape}")

        values = torch.frombuffer(bytearray(payload), dtype=torch.float32).view(shape)
        # Minus infinity is a probability of 0, which some give to pieces that never occur.
        largest = values.amax(-1) if do == "logits" else values.exp()
        if bool(values.isnan().any()) or not bool(torch.isfinite(largest).all()):
            raise RecordError("normalised", f"{do} returned values that are not finite")
        return values

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V) float32"""
        return self.ask("logits", ids.numpy())

    def next_token(self, ids: Tensor, columns: Sequence[int]) -> Tensor:
        """Log-probabilities of what follows one column of each row. (B, T) int64, B columns -> (B, V) float32"""
        return self.ask("logits", ids.numpy(), columns).log_softmax(1)

    def predict(self, ids: np.ndarray) -> Tensor:
        """(T,) -> (T, V) float32 log-probabilities"""
        return self.ask("predict", ids)

    def predict_at(self, ids: np.ndarray, place: int) -> Tensor:
        """Log-probabilities of the token at one place of a chunk. (T,) -> (V,) float32, normalised"""
        return self.ask("predict", ids, [place])[0].log_softmax(0)

    def observe(self, ids: np.ndarray) -> None:
        self.request({"do": "observe"}, ids, 0)


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
    windows = f"a context of {config.eval_seq_len} tokens, by {config.eval_method}"
    return verdict("load", problems, f"the artifact loads, and is scored as its settings say: {windows}")


def check_identity(identity: Mapping[str, Any], submission: Submission) -> Check:
    """Whether this is the text that the record was scored on."""
    problems = []
    for key in ("val_text_sha256", "val_documents", "val_bytes", "val_accounting", "val_tokens", "val_shards_sha256"):
        claimed = getattr(submission, key)
        if identity[key] != claimed:
            problems.append(f"{key} is {identity[key]}, the record was scored on {claimed}")
    return verdict("text", problems, "the text and its tokens are those that the record was scored on")


def refuse_other_shards(identity: Mapping[str, Any], submission: Submission, options: Options) -> None:
    """JudgeError if the judge named other data than those that were scored, which says nothing about the record."""
    keys = ("val_text_sha256", "val_shards_sha256")
    others = [key for key in keys if identity[key] != getattr(submission, key)]
    if others and not options.data_is_own:
        key = others[0]
        raise JudgeError(
            f"--data={options.data} holds another text or other tokens than the record was scored on ({key} is "
            f"{identity[key]:.12}, not {getattr(submission, key):.12}): name the data set of its README.md"
        )


def check_tokenizer(tokenizer: Path) -> Check:
    """Whether the file holds a tokenizer and nothing else that could tell the text (data/tokenizer.py)."""
    model = tokenizer.read_bytes()
    problems = model_faults(model)
    summary = f"the tokenizer is an ordinary SentencePiece model with {vocabulary_bytes(model):,} bytes of pieces"
    return verdict("tokenizer", problems, summary)


def check_vocabulary_bytes(tokenizer: Path, submission: Submission) -> Check:
    """Whether the vocabulary still fits under the track's limit, where it is larger than the published ones.

    The published challenge counts no tokenizer, and so its largest one is free. What a vocabulary has beyond that
    counts like the artifact, which could hold the same.
    """
    counted = max(0, vocabulary_bytes(tokenizer.read_bytes()) - FREE_VOCABULARY_BYTES)
    track = track_of(submission)
    limit = track.max_total_bytes if track else None
    n_bytes = submission.bytes_total + counted
    allowed = "the track has no limit" if limit is None else f"the track allows {limit:,}"
    reason = (
        f"the vocabulary adds {counted:,} bytes to the size, of which {FREE_VOCABULARY_BYTES:,} are free: "
        f"{n_bytes:,} in all ({allowed})"
    )
    return Check("vocabulary_bytes", limit is None or n_bytes <= limit, reason)


def check_vocabulary(split: tg.ValSplit, tokenizer: Path) -> Check:
    """Whether the pieces were found in other text, and are not the scored text itself, cut up.

    Of pieces that come from other text, some occur once in the scored one by chance, and then about as many or more do
    not occur at all (Good 1953). Pieces that are cut from the scored text all occur, most of them once, and a model
    that knows their order knows the text. With as many idle pieces this can be hidden here, and --unseen shows it.
    """
    sp = Tokenizer(tokenizer.read_bytes(), tokenizer).sp
    sizes = np.zeros(sp.get_piece_size(), np.int64)
    for i in range(len(sizes)):
        piece = sp.id_to_piece(i)
        is_text = not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i))
        if is_text and len(piece) > 1:
            sizes[i] = len(piece.encode())

    counts = np.bincount(split.ids, minlength=len(sizes))
    used_once = (counts == 1) & (sizes > 0)
    n_once = int(used_once.sum())
    n_never = int(((counts == 0) & (sizes > 0)).sum())
    share = float(sizes[used_once].sum() / split.bytes[1:].sum(dtype=np.int64))
    reason = f"{n_once} pieces occur once in the text and make up {share:.1%} of it, {n_never} do not occur"

    if n_once > MAX_ONCE_PER_NEVER * n_never + FREE_ONCE:
        return Check("vocabulary", False, f"{reason}: that many look like the text itself, cut up")
    if share > MAX_ONCE_SHARE:
        return Check("vocabulary", False, f"{reason}: score on a longer text, or with a smaller vocabulary")
    return Check("vocabulary", True, f"the pieces do not look like the scored text, cut up: {reason}")


def check_bytes_of_text(
    split: tg.ValSplit, tokenizer: Path, documents: Path | None, bos_id: int, submission: Submission, data_is_own: bool
) -> list[Check]:
    """Whether the byte counts of the data are those that the tokens give back, document by document.

    Neither the byte counts nor what the manifest says of the tokenizer is believed. A tokenizer is lossless if the
    decoded tokens have the sha256 of the scored text. With any other one the documents themselves are needed, of which
    nearly all has to be given back. The tokens, and the bytes that each token gives back, are made again and compared.
    """
    name = "bytes_of_text"
    if split.identity["val_accounting"] == "pieces":
        reason = "the bytes are counted from the tokenizer's pieces, so they are those of normalised text"
        if data_is_own:
            reason += ". For the record's own data that proves nothing: name other data with --data"
        return [Check(name, not data_is_own, reason)]

    starts = np.flatnonzero(split.ids == bos_id)
    if not len(starts) or starts[0] > 0:
        return [Check(name, False, "the tokens do not begin with a document: export the data again")]
    tokens = [ids[1:] for ids in np.split(split.ids, starts)[1:]]
    counted = np.add.reduceat(split.bytes.astype(np.int64), starts)
    decoder = Tokenizer(tokenizer.read_bytes(), tokenizer)
    try:
        decoded = [decoder.decode(ids) for ids in tokens]
    except ValueError as error:
        return [Check(name, False, f"the tokens cannot be decoded: {error}")]

    claimed_sha256 = split.identity["val_text_sha256"]
    is_lossless = text_sha256(decoded) == claimed_sha256
    checks = [check_lossless(is_lossless, submission)]
    if is_lossless:
        texts = decoded
    elif documents is None:
        reason = "the decoded tokens are not the text that was scored: name its documents with --documents"
        return [*checks, Check(name, False, reason)]
    else:
        texts = [text for text in read_documents([documents]) if text.strip()]
        if text_sha256(texts) != claimed_sha256:
            reason = f"{documents} has sha256 {text_sha256(texts)}, the data name {claimed_sha256}"
            return [*checks, Check(name, False, reason)]

    # Another way to cut the same text into pieces could be one that the model finds easier, which is no tokenizer.
    encoded = [decoder.encode_with_bytes(text) for text in texts]
    same_tokens = len(encoded) == len(tokens) and all(
        np.array_equal(ids, found) for ids, (found, _) in zip(tokens, encoded, strict=True)
    )
    if not same_tokens:
        reason = f"the tokens are not those that {tokenizer.name} makes of the text: export the data again"
        return [*checks, Check(name, False, reason)]
    expected = np.array([n_bytes.sum() for _, n_bytes in encoded])

    n_bytes_of_text = sum(len(text.encode()) for text in texts)
    found = f"decoding gives back {expected.sum():,} of the {n_bytes_of_text:,} bytes of {len(expected):,} documents"
    if expected.sum() < MIN_GIVEN_BACK * n_bytes_of_text:
        # What is left out need not be predicted. So whoever chose it could leave out all that is hard.
        reason = f"{found}, and a score needs {MIN_GIVEN_BACK:.0%}: export the text with another tokenizer"
        return [*checks, Check(name, False, reason)]
    if not np.array_equal(expected, counted):
        return [*checks, Check(name, False, f"{found}, and the data count {counted.sum():,} in {len(counted):,}")]
    checks.append(Check(name, True, f"{found}, as the data count them"))
    checks.append(check_hidden(texts, submission))
    return checks


def text_sha256(texts: Sequence[str]) -> str:
    """The identity of a text, as data/build_shards.py writes it into the manifest."""
    hashed = hashlib.sha256()
    for text in texts:
        hashed.update(framed(text))
    return hashed.hexdigest()


def check_lossless(is_lossless: bool, submission: Submission) -> Check:
    """Whether the record says of its tokenizer what the decoded tokens show."""
    if is_lossless:
        found = "the tokenizer is lossless, because decoding gives back the text"
    else:
        found = "the tokenizer is lossy: what decoding does not give back counts no bytes"
    ok = submission.tokenizer_lossless is is_lossless
    return Check("lossless", ok, found if ok else f"{found}; the record says tokenizer_lossless is {not is_lossless}")


def check_hidden(texts: Sequence[str], submission: Submission) -> Check:
    """Whether the text lies in the sandbox: in the standard library, which every script can read there.

    A known text of that kind is a demonstration, which ranks nowhere, so that nobody gains by reading it.
    """
    in_library = library_lines()
    lines = [line.strip() for text in texts for line in text.splitlines()]
    long_lines = [line for line in lines if len(line) >= MIN_LINE_CHARACTERS]
    share = sum(line in in_library for line in long_lines) / max(1, len(long_lines))

    reason = f"{share:.1%} of the lines of the text stand in Python's standard library, which the sandbox holds"
    known = known_text(submission.val_documents, submission.val_text_sha256)
    if known is not None and known.demonstration:
        return Check("hidden", True, f"{reason}; such a text is a demonstration, which ranks nowhere")
    if share > MAX_LIBRARY_SHARE:
        reason += ": such a text is a demonstration, and has to be listed as one in records/texts.json"
    return Check("hidden", share <= MAX_LIBRARY_SHARE, reason)


def library_lines() -> set[str]:
    """The lines of the running Python's standard library, of its help topics too, without the blanks around them."""
    lines: set[str] = set()
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in stdlib.rglob("*.py"):
        if not {"site-packages", "dist-packages"}.intersection(path.relative_to(stdlib).parts):
            lines.update(line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    with contextlib.suppress(ImportError):  # some systems leave the help topics out
        from pydoc_data.topics import topics

        for topic in topics.values():
            lines.update(line.strip() for line in topic.splitlines())
    return lines


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
    def n(self) -> int:
        """Units that were scored."""
        return len(self.nats)

    @property
    def whole(self) -> bool:
        """Whether every unit of the split was scored."""
        return self.n == self.n_units and not self.is_prefix

    @property
    def error_of_source(self) -> float:
        """Standard error of bpb as that of the source which the units are a sample of (ratio estimator)."""
        if self.n < 2:
            return math.inf
        residuals = self.nats / math.log(2) - self.bpb * self.bytes
        variance = self.n / (self.n - 1) * (residuals**2).sum()
        return float(math.sqrt(variance) / self.bytes.sum())

    @property
    def error(self) -> float:
        """Standard error of bpb as that of the whole split."""
        if self.whole:
            return 0.0
        if self.is_prefix:
            return math.inf  # an adaptive predictor gets better along the text: the first documents tell nothing
        return self.error_of_source * math.sqrt(1 - self.n / self.n_units)

    @property
    def interval(self) -> float:
        """Half width of the 95 % interval of the whole split's bpb."""
        return 0.0 if self.whole else self.error * student_quantile(0.975, self.n - 1)


def allowed_by_chance(error: float, n: int) -> float:
    """By how much an estimate from n units with this standard error may be off, in 1 case of 370 on each side.

    For many units this is 3 standard errors.
    """
    return error * student_quantile(0.99865, n - 1)


def sample_fault(scores: UnitScores) -> str:
    """Why the score of a sample cannot be compared with a claim, whatever it is; empty if it can."""
    if scores.is_prefix:
        return (
            f"val_bpb {scores.bpb:.6f} of the first {scores.n} documents cannot be compared with the claim, because an "
            "adaptive predictor gets better along the text: leave --sample out"
        )
    if not scores.whole and (scores.n < MIN_SAMPLE or scores.interval > MAX_INTERVAL):
        return (
            f"a sample of {scores.n} units gives val_bpb {scores.bpb:.4f} +- {scores.interval:.3f}; to compare it with "
            f"the claim takes {MIN_SAMPLE} units or more and +- {MAX_INTERVAL} or less: raise --sample, or leave it out"
        )
    return ""


def check_score(name: str, scores: UnitScores, claim: float, margin: float, may_be_better: bool = False) -> Check:
    """Whether a score in bits per byte is the one that was claimed, within `margin` and the uncertainty of a sample."""
    if fault := sample_fault(scores):
        return Check(name, False, fault)

    excess = scores.bpb - claim
    if scores.whole:
        allowed = margin
        found = f"val_bpb is {scores.bpb:.6f} over {scores.n_targets:,} targets"
        remark = f"the two may differ by {allowed:.4f}"
    else:
        allowed = margin + allowed_by_chance(scores.error, scores.n)
        found = f"val_bpb is {scores.bpb:.6f} +- {scores.interval:.4f} in {scores.n} of {scores.n_units} units"
        remark = f"a sample of this size does not notice a difference below {allowed:.4f}"
    ok = excess <= allowed and (may_be_better or -excess <= allowed)
    return Check(name, ok, f"{found}, and the record claims {claim:.6f} ({remark})")


# ----------------------------------------------------------------------------------------------------------------------
# Places where the record is asked what it knows
# ----------------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A place of the text where the record is asked before the text is scored."""

    position: int  # of the target, in the split
    target: int
    at_random: bool  # otherwise it was drawn because a bigram model loses much there
    is_late: bool  # asked after it was scored
    row: int  # the row of the scored batches that has it
    before: tuple[range, ...]  # positions of all that stands before the target in its row, in order

    @property
    def column(self) -> int:
        """Of its row: the last column of what stands before the target."""
        return sum(map(len, self.before)) - 1

    def context(self, ids: np.ndarray) -> np.ndarray:
        """The ids of everything that stands before the target in its row."""
        return np.concatenate([ids[part.start : part.stop] for part in self.before]).astype(np.int64)


def bigram_nats(ids: np.ndarray) -> np.ndarray:
    """Nats of each token given the one before it, from the counts of this very text without the token. (N,) -> (N,)"""
    ids = ids.astype(np.int64)
    _, token, token_counts = np.unique(ids, return_inverse=True, return_counts=True)
    unigram = (token_counts[token] - 0.5) / len(ids)

    _, pair, pair_counts = np.unique(ids[:-1] * 2**16 + ids[1:], return_inverse=True, return_counts=True)
    others = pair_counts[pair] - 1 + BIGRAM_BACKOFF * unigram[1:]
    bigram = others / (token_counts[token[:-1]] - 1 + BIGRAM_BACKOFF)
    return -np.log(np.concatenate((unigram[:1], bigram)))


def places_needed(n_targets: int) -> int:
    """How many of so many targets have to be drawn to keep the promise.

    None of k leaks among n targets is drawn with a chance of at most (1 - N / n)^k. For a long text N is 4606.
    """
    n_leaks = max(1.0, n_targets / LEAK_RATE)
    return math.ceil(n_targets * (1 - (1 - POWER) ** (1 / n_leaks)))


class Drawn(NamedTuple):
    """Positions to ask at, in order."""

    positions: np.ndarray  # (M,)
    at_random: np.ndarray  # (M,) bool
    is_late: np.ndarray  # (M,) bool: asked after they were scored


def draw_positions(ids: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> Drawn:
    """Positions to ask at, out of `targets` (N,)."""
    n_random = places_needed(len(targets))
    random = rng.choice(targets, n_random, replace=False)

    others = np.setdiff1d(targets, random, assume_unique=True)
    n_costly = min(int(COSTLY_SHARE * n_random), len(others))
    costly = others[:0]
    if n_costly:
        nats = bigram_nats(ids)[others]
        costly = rng.choice(others, n_costly, replace=False, p=nats / nats.sum())

    others = np.setdiff1d(others, costly, assume_unique=True)
    late = rng.choice(others, min(int(LATE_SHARE * n_random), len(others)), replace=False)
    positions = np.sort(np.concatenate((random, costly, late)))
    return Drawn(positions, ~np.isin(positions, costly), np.isin(positions, late))


def draw_places(
    ids: np.ndarray, rows: Sequence[Sequence[tg.Window]], n_columns: int, rng: np.random.Generator
) -> list[Place]:
    """The places of `rows` where the record is asked, by position. RecordError if that would take too long.

    n_columns   the length of a row
    """
    targets = np.concatenate([np.arange(window.first, window.stop) for row in rows for window in row])
    drawn = draw_positions(ids, targets, rng)
    require_affordable(len(drawn.positions), n_columns, len(ids))

    places = []
    for number, row in enumerate(rows):
        before: tuple[range, ...] = ()
        for window in row:
            first, stop = np.searchsorted(drawn.positions, (window.first, window.stop))
            for i in range(first, stop):
                position = int(drawn.positions[i])
                place = Place(
                    position=position,
                    target=int(ids[position]),
                    at_random=bool(drawn.at_random[i]),
                    is_late=bool(drawn.is_late[i]),
                    row=number,
                    before=(*before, range(window.start, position)),
                )
                places.append(place)
            before = (*before, range(window.start, window.stop - 1))
    return sorted(places, key=lambda place: place.position)


def require_affordable(n_places: int, n_columns: int, n_tokens: int) -> None:
    """RecordError if so many questions of so many tokens would cost much more than scoring the text."""
    cost = n_places * n_columns
    allowed = max(MAX_QUESTION_TOKENS, MAX_QUESTION_TEXTS * n_tokens)
    if cost > allowed:
        raise RecordError(
            "causal",
            f"{n_places} places have to be asked to find a leak at 1 in {LEAK_RATE} with {POWER:.0%}, and with "
            f"EVAL_SEQ_LEN={n_columns} that takes {cost} tokens for a text of {n_tokens}, more than {allowed}: "
            f"evaluate with EVAL_SEQ_LEN={allowed // n_places} or less, or on a longer text",
        )


def in_turns(places: Sequence[Place]) -> list[list[int]]:
    """Numbers of places in the turns in which they are asked. `places` have to be ordered by position.

    A place comes in a turn before every other place whose context shows its target, so that nobody knows the target
    when its turn has come.
    """
    positions = np.array([place.position for place in places])
    turns = np.zeros(len(places), np.int64)
    for i, place in enumerate(places):
        for part in place.before:
            first, stop = np.searchsorted(positions, (part.start, part.stop))
            turns[i] = max(turns[i], 1 + turns[first:stop].max(initial=-1))

    by_turn: list[list[int]] = [[] for _ in range(turns.max(initial=-1) + 1)]
    for i, turn in enumerate(turns.tolist()):
        by_turn[turn].append(i)
    return by_turn


class Answers:
    """Two answers of the record at each of many places: with some context that should not matter, and without it."""

    def __init__(self) -> None:
        self.at_random: list[bool] = []
        self.distances: list[float] = []  # half the sum of the differences of two distributions: from 0 to 1
        self.gains: list[float] = []  # nats that the context saves at the target

    def compare(self, target: int, at_random: bool, with_context: Tensor, without_context: Tensor) -> None:
        """Add a place. Both answers are log-probabilities, (V,)."""
        self.at_random.append(at_random)
        self.distances.append(float((with_context.exp() - without_context.exp()).abs().sum() / 2))
        self.gains.append(float(with_context[target] - without_context[target]))

    def rounding(self) -> Rounding:
        """What explains the differences between answers to one and the same question, within bounds."""
        distance = max(self.distances, default=0.0)
        nats = max(map(abs, self.gains), default=0.0)
        return Rounding(
            min(max(4 * distance, LEAST_ROUNDING.distance), MOST_ROUNDING.distance),
            min(max(nats, LEAST_ROUNDING.nats), MOST_ROUNDING.nats),
        )


def check_repeated(answers: Answers) -> Check:
    """Whether the record gives the same answer to the same question, up to the coarsest rounding."""
    distance = max(answers.distances)
    gain = max(map(abs, answers.gains))
    max_gain = MAX_DEVIATIONS * MOST_ROUNDING.nats
    ok = distance <= MOST_ROUNDING.distance and gain <= max_gain
    asked = f"asked {len(answers.gains)} questions twice"
    if distance == gain == 0.0:
        return Check("deterministic", ok, f"{asked}; the answers were the same")
    outcome = "the answers were the same up to rounding" if ok else "the answers differ by more than rounding"
    figures = (
        f"distributions by {distance:.2g} at most, with {MOST_ROUNDING.distance:g} allowed; "
        f"targets by {gain:.2g} nats, with {max_gain:g} allowed"
    )
    return Check("deterministic", ok, f"{asked}; {outcome} ({figures})")


def check_same_answers(name: str, context: str, answers: Answers, rounding: Rounding) -> Check:
    """Whether answers change by no more than rounding when some context is taken away.

    Each distribution has to stay the same as a whole, and no target may be likelier with the context. The average over
    the targets that were taken at random has a closer limit, because a little at every place would add up. Targets that
    are less likely with the context count in the distance only.
    """
    at_random = np.array(answers.at_random)
    gains = np.array(answers.gains)
    distance = max(answers.distances)
    gain = float(gains.max())
    mean_gain = float(gains[at_random].mean()) if at_random.any() else 0.0

    max_gain = MAX_DEVIATIONS * rounding.nats
    max_mean_gain = 3 * rounding.nats / math.sqrt(max(1, at_random.sum()))
    ok = distance <= rounding.distance and gain <= max_gain and mean_gain <= max_mean_gain
    asked = f"asked again at {len(gains):,} places without {context}"
    if not distance and not gains.any():
        return Check(name, ok, f"{asked}; nothing changed")
    outcome = "nothing changed but the rounding" if ok else "the predictions changed, so it used what it may not know"
    figures = (
        f"distributions differ by {distance:.2g} at most, with {rounding.distance:g} allowed; "
        f"a target gains {max(gain, 0.0):.2g} nats at most, with {max_gain:.2g} allowed, "
        f"and {mean_gain:.2g} on average, with {max_mean_gain:.2g} allowed"
    )
    return Check(name, ok, f"{asked}; {outcome} ({figures})")


# ----------------------------------------------------------------------------------------------------------------------
# Fixed predictors (class A)
# ----------------------------------------------------------------------------------------------------------------------


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


class WindowSample(NamedTuple):
    """The windows of a split that are scored: all of them, or those of some units taken at random."""

    rows: list[list[tg.Window]]  # as the root's script packs them
    units: np.ndarray  # (N,) the unit of every position of the split
    n_units: int  # of the whole split


def sample_windows(split: tg.ValSplit, config: tg.GPTConfig, sample: int, rng: np.random.Generator) -> WindowSample:
    """The windows of `sample` units, or of all if it is 0."""
    windows = list(tg.scoring_windows(split.ids, config))
    units = units_of_targets(windows, split, config)
    all_units = np.unique(units[1:])
    if 0 < sample < len(all_units):
        chosen = set(rng.choice(all_units, sample, replace=False).tolist())
        windows = [window for window in windows if units[window.first] in chosen]
    return WindowSample(tg.pack_rows(windows, split.ids, config), units, len(all_units))


def score_fixed(
    process: RecordProcess,
    split: tg.ValSplit,
    sample: WindowSample,
    rng: np.random.Generator,
    inspect: Callable[[int, Tensor], None] = lambda row, logits: None,
) -> UnitScores:
    """Score rows of windows as `evaluate` of the root's script does.

    inspect   is called for every row with its number and its logits, (T, V)
    """
    config = process.config
    rows = sample.rows
    n_rows = rows_of_batch(rows, config)
    nats = np.zeros(len(split.ids))
    for begin in tqdm(range(0, len(rows), n_rows), "score", unit=" batches", disable=None):
        batch_rows = rows[begin : begin + n_rows]
        batch = tg.fill_rows(batch_rows, split.ids, n_rows, config.eval_seq_len)
        hide_ends(batch, batch_rows, split.ids, rng)
        logits = process.logits(batch.inputs)
        batch_nats = tg.target_nats(logits, batch.targets)

        is_scored = batch.positions >= 0
        nats[batch.positions[is_scored].numpy()] = batch_nats[is_scored].double().numpy()
        for i in range(len(batch_rows)):
            inspect(begin + i, logits[i])

    targets = np.concatenate([np.arange(window.first, window.stop) for row in rows for window in row])
    _, unit = np.unique(sample.units[targets], return_inverse=True)
    return UnitScores(
        nats=np.bincount(unit, nats[targets]),
        bytes=np.bincount(unit, split.bytes[targets]),
        n_targets=len(targets),
        n_units=sample.n_units,
    )


def rows_of_batch(rows: Sequence[Sequence[tg.Window]], config: tg.GPTConfig) -> int:
    """How many of these rows are scored in one forward pass."""
    return min(len(rows), tg.rows_per_pass(config, BATCH_TOKENS))


def hide_ends(
    batch: tg.RowBatch, rows: Sequence[Sequence[tg.Window]], ids: np.ndarray, rng: np.random.Generator
) -> None:
    """Fill the padding of a batch with text from somewhere, because padding would tell where a document ends."""
    for i in range(len(batch.inputs)):
        n_used = sum(window.n_inputs for window in rows[i]) if i < len(rows) else 0
        somewhere = ids[int(rng.integers(len(ids))) :].astype(np.int64)
        batch.inputs[i, n_used:] = torch.from_numpy(np.resize(somewhere, batch.inputs.size(1) - n_used))


def ask_contexts(process: RecordProcess, contexts: Mapping[int, np.ndarray]) -> dict[int, Tensor]:
    """The distributions after some contexts, by their numbers. -> (V,) log-probabilities each

    Contexts of about one length share a batch, which is as wide as the longest of them.
    """
    answers: dict[int, Tensor] = {}
    numbers = sorted(contexts, key=lambda number: len(contexts[number]))
    for begin in range(0, len(numbers), QUESTION_ROWS):
        part = numbers[begin : begin + QUESTION_ROWS]
        width = min(process.config.eval_seq_len, round_up(len(contexts[part[-1]]), QUESTION_COLUMNS))
        batch = ask_batch(process, [contexts[number] for number in part], width)
        answers |= zip(part, batch, strict=True)
    return answers


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def ask_batch(process: RecordProcess, contexts: Sequence[np.ndarray], width: int) -> Tensor:
    """The distributions after contexts, one in each row of a batch. -> (B, V) log-probabilities"""
    inputs = torch.zeros(len(contexts), width, dtype=torch.int64)
    for i, context in enumerate(contexts):
        inputs[i, : len(context)] = torch.from_numpy(context)
    return process.next_token(inputs, [len(context) - 1 for context in contexts])


def ask_repeatedly(
    process: RecordProcess,
    places: Sequence[Place],
    turn: Sequence[int],
    ids: np.ndarray,
    n_rows: int,
    rng: np.random.Generator,
) -> Answers:
    """Ask some questions of one turn twice: the second time in another order, and in a batch as large as those scored.

    n_rows   of a batch that is scored
    """
    chosen = rng.permutation(turn)[: min(REPEATED_QUESTIONS, n_rows)].tolist()
    contexts = {i: places[i].context(ids) for i in chosen}
    first = ask_contexts(process, contexts)
    in_all_rows = np.resize(chosen, n_rows).tolist()
    second = ask_batch(process, [contexts[i] for i in in_all_rows], process.config.eval_seq_len)

    answers = Answers()
    for i, answer in zip(in_all_rows, second, strict=True):
        answers.compare(places[i].target, True, first[i], answer)
    return answers


def ask_blind(
    process: RecordProcess, places: Sequence[Place], turns: Sequence[Sequence[int]], ids: np.ndarray
) -> Tensor:
    """What the record predicts at each place before it can know what follows. -> (N, V) log-probabilities"""
    answers = torch.empty(len(places), process.config.vocab_size)
    with tqdm(total=len(places), desc="ask", unit=" places", disable=None) as progress:
        for turn in turns:
            contexts = {i: places[i].context(ids) for i in turn}
            for i, answer in ask_contexts(process, contexts).items():
                answers[i] = answer
            progress.update(len(turn))
    return answers


def first_of_documents(places: Sequence[Place], ids: np.ndarray, bos_id: int) -> dict[int, np.ndarray]:
    """Places whose row shows documents before the one that they stand in. -> number of the place: ids of its document

    Only the first place of each document. What stands before its target holds no other target that is asked for, so
    that these questions tell nothing.
    """
    found = {}
    known = set()
    for i, place in enumerate(places):
        context = place.context(ids)
        starts = np.flatnonzero(context == bos_id)
        if not len(starts):
            continue
        document = context[starts[-1] :]
        begin = place.position - len(document)
        if begin not in known and len(document) < len(context):
            found[i] = document
        known.add(begin)
    return found


def judge_fixed(
    blind: RecordProcess,
    start: Callable[[], RecordProcess],
    split: tg.ValSplit,
    options: Options,
    rng: np.random.Generator,
) -> tuple[UnitScores, list[Check]]:
    """Ask at places that are drawn first, then score, and compare what comes out at these places."""
    ids = split.ids
    config = blind.config
    with blind:
        sample = sample_windows(split, config, options.sample, rng)
        drawn = draw_places(ids, sample.rows, config.eval_seq_len, rng)
        places = [place for place in drawn if not place.is_late]
        late_places = [place for place in drawn if place.is_late]
        turns = in_turns(places)

        # Documents without those before them come first: nobody can repeat then what it answered when it knew more.
        documents = first_of_documents(places, ids, config.bos_id) if config.document_masks else {}
        alone = ask_contexts(blind, documents)

        repeated = ask_repeatedly(blind, places, turns[0], ids, rows_of_batch(sample.rows, config), rng)
        expected = ask_blind(blind, places, turns, ids)

    early_of_row: dict[int, list[int]] = {}
    for i, place in enumerate(places):
        early_of_row.setdefault(place.row, []).append(i)
    late_of_row: dict[int, list[int]] = {}
    for i, place in enumerate(late_places):
        late_of_row.setdefault(place.row, []).append(i)
    with_future = Answers()
    late_scored = torch.empty(len(late_places), config.vocab_size)

    def compare(row: int, logits: Tensor) -> None:
        for i in early_of_row.get(row, []):
            place = places[i]
            scored = logits[place.column].log_softmax(0)
            with_future.compare(place.target, place.at_random, scored, expected[i])
        for i in late_of_row.get(row, []):
            late_scored[i] = logits[late_places[i].column].log_softmax(0)

    with start() as process:
        scores = score_fixed(process, split, sample, rng, compare)
    if late_places:
        with start() as afterwards:
            late_expected = ask_blind(afterwards, late_places, in_turns(late_places), ids)
        for place, scored, answer in zip(late_places, late_scored, late_expected, strict=True):
            with_future.compare(place.target, place.at_random, scored, answer)

    checks = [
        check_same_answers("causal", "what follows", with_future, repeated.rounding()),
        check_repeated(repeated),
    ]
    if documents:
        with_documents = Answers()
        for i, answer in alone.items():
            with_documents.compare(places[i].target, True, expected[i], answer)
        checks.append(check_same_answers("documents", "the documents before", with_documents, MOST_ROUNDING))
    return scores, checks


def check_unseen(
    start: Callable[[], RecordProcess],
    judge_class: JudgeOfClass,
    scores: UnitScores,
    options: Options,
    rng: np.random.Generator,
) -> Check:
    """Whether the scored text is about as hard as another one of its source. A model trained on it finds it easier.

    The other text is judged in the same way, blind process and all: a record that looks ahead only there would make it
    look as easy as the text that it knows.
    """
    assert options.unseen is not None
    with start() as blind:
        split = load_split(options.unseen, options.tokenizer, blind.config)
        other, checks = judge_class(blind, start, split, options, rng)
    failed = [f"{check.name}: {check.reason}" for check in checks if not check.ok]
    if failed:
        return Check("unseen", False, f"{options.unseen.name}, the other text: {'; '.join(failed)}")
    gap = other.bpb - scores.bpb
    chance = allowed_by_chance(math.hypot(other.error_of_source, scores.error_of_source), min(other.n, scores.n))
    ok = gap <= chance + UNSEEN_GAP
    outcome = "the scored text is no easier than" if ok else "the scored text is much easier than"
    reason = (
        f"{outcome} {options.unseen.name}, text of its source: {scores.bpb:.4f} and {other.bpb:.4f} bits per byte "
        f"(a gap of {gap:+.4f}; chance explains {chance:.4f}, and {UNSEEN_GAP} more is allowed)"
    )
    return Check("unseen", ok, reason)


# ----------------------------------------------------------------------------------------------------------------------
# Adaptive predictors (class B)
# ----------------------------------------------------------------------------------------------------------------------


class AdaptivePass(NamedTuple):
    """What scoring an adaptive predictor found."""

    scores: UnitScores
    with_future: Answers  # at the places, with what follows in the chunk and without
    repeated: Answers  # at the same places: two processes that are asked to predict one chunk
    largest_log_sum: float  # of the probabilities of a token
    largest_change: float  # of a probability, if a chunk is predicted twice


def score_adaptive(
    process: RecordProcess, twin: RecordProcess, split: tg.ValSplit, documents: int, rng: np.random.Generator
) -> AdaptivePass:
    """Predict, score, then observe, chunk by chunk through the split, or its first `documents`.

    `twin` is the blind process, which observes the same. Before `process` is shown a chunk, the twin is asked about
    places in it, from left to right, with copies in which older text replaces everything from the place on; about the
    late ones afterwards.
    """
    ids = split.ids.astype(np.int64)
    size = process.config.eval_seq_len
    starts = np.flatnonzero(ids == process.config.bos_id)
    end = int(starts[documents]) + 1 if 0 < documents < len(starts) else len(ids)
    chunks = [(begin, min(begin + size, end)) for begin in range(1, end, size)]
    drawn = draw_positions(ids, np.arange(1, end), rng)
    require_affordable(len(drawn.positions), min(size, end), len(ids))
    repeated_chunks = set(rng.choice(len(chunks), min(REPEATED_QUESTIONS, len(chunks)), replace=False).tolist())

    nats = np.zeros(end)
    with_future = Answers()
    repeated = Answers()
    largest_log_sum = 0.0
    largest_change = 0.0
    for observer in (process, twin):
        observer.observe(ids[:1])

    for number, (begin, stop) in enumerate(tqdm(chunks, "score", unit=" chunks", disable=None)):
        chunk = ids[begin:stop]
        first, last = np.searchsorted(drawn.positions, (begin, stop))
        places = {i: int(drawn.positions[i]) - begin for i in range(first, last)}
        copies = {i: with_older_text(ids, begin, stop, place, rng) for i, place in places.items()}
        early = [i for i in places if not drawn.is_late[i]]
        late = [i for i in places if drawn.is_late[i]]
        expected = {i: twin.predict_at(copies[i], places[i]) for i in early}
        log_probs = process.predict(chunk)
        log_sums = log_probs.logsumexp(1, keepdim=True)
        largest_log_sum = max(largest_log_sum, float(log_sums.abs().max()))
        log_probs = log_probs - log_sums
        nats[begin:stop] = -log_probs[torch.arange(len(chunk)), torch.from_numpy(chunk)].double().numpy()
        expected |= {i: twin.predict_at(copies[i], places[i]) for i in late}
        for i, answer in expected.items():
            is_random = bool(drawn.at_random[i])
            with_future.compare(int(chunk[places[i]]), is_random, log_probs[places[i]], answer)

        # The chunk is no secret any more, and has to be predicted as before: by the same process and by the other one.
        if number in repeated_chunks:
            again = process.predict(chunk).softmax(1)
            largest_change = max(largest_change, float((again - log_probs.exp()).abs().max()))
            others = twin.predict(chunk).log_softmax(1)
            for place in rng.permutation(len(chunk))[:REPEATED_QUESTIONS].tolist():
                repeated.compare(int(chunk[place]), True, log_probs[place], others[place])

        for observer in (process, twin):
            observer.observe(chunk)

    scores = sum_by_document(nats, split, starts)
    return AdaptivePass(scores, with_future, repeated, largest_log_sum, largest_change)


def judge_adaptive(
    blind: RecordProcess,
    start: Callable[[], RecordProcess],
    split: tg.ValSplit,
    options: Options,
    rng: np.random.Generator,
) -> tuple[UnitScores, list[Check]]:
    """Score an adaptive predictor; a second process is asked about each chunk before the first one sees it."""
    with blind, start() as process:
        found = score_adaptive(process, blind, split, options.sample, rng)

    normalised = (
        "the probabilities of every token have to add up to 1; the log of their sum is "
        f"{found.largest_log_sum:.2g} at most, with {MAX_LOG_SUM:g} allowed"
    )
    side_effects = (
        "a chunk that is predicted twice has to get the same probabilities; they differ by "
        f"{found.largest_change:.2g} at most, with {MAX_CHANGE:g} allowed"
    )
    checks = [
        Check("normalised", found.largest_log_sum <= MAX_LOG_SUM, normalised),
        check_same_answers("causal", "what follows in the chunk", found.with_future, found.repeated.rounding()),
        check_repeated(found.repeated),
        Check("side_effects", found.largest_change <= MAX_CHANGE, side_effects),
    ]
    return found.scores, checks


def with_older_text(ids: np.ndarray, begin: int, stop: int, place: int, rng: np.random.Generator) -> np.ndarray:
    """The chunk ids[begin:stop] with text from before it in the positions from `place` on.

    Noise in their place would tell the record that it is being tested.
    """
    older = ids[int(rng.integers(begin)) : begin]
    return np.concatenate([ids[begin : begin + place], np.resize(older, stop - begin - place)])


def sum_by_document(nats: np.ndarray, split: tg.ValSplit, starts: np.ndarray) -> UnitScores:
    """The score of the first positions of a split, whose documents begin at `starts`. nats (N,), by position"""

    def document(targets: np.ndarray) -> np.ndarray:
        # The BOS behind a document is a target of that document. What stands before the first BOS counts to the first.
        return np.maximum(np.searchsorted(starts, targets - 1, side="right"), 1) - 1

    targets = np.arange(1, len(nats))
    unit = document(targets)
    # Not len(starts): a BOS at the end of the split opens a document without a target.
    n_units = int(document(np.array([len(split.ids) - 1]))[0]) + 1
    return UnitScores(
        nats=np.bincount(unit, nats[targets]),
        bytes=np.bincount(unit, split.bytes[targets]),
        n_targets=len(targets),
        n_units=n_units,
        is_prefix=len(nats) < len(split.ids),
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
    total_seconds: float = 6 * 3600.0  # of all answers together
    memory_bytes: int = 8 * 2**30  # of address space, for each of the record's processes
    without_walls: bool = False  # run the record's code even where the sandbox has no walls


JudgeOfClass = Callable[
    [RecordProcess, Callable[[], RecordProcess], tg.ValSplit, Options, np.random.Generator],
    tuple[UnitScores, list[Check]],
]


def rescore(
    script: Path, artifact: Path, submission: Submission, options: Options
) -> tuple[list[Check], UnitScores | None]:
    """Score an artifact with a record's script. -> checks, and the score if there is one

    The score is not compared with a claim yet; check_score does that.
    """
    checks = [check_isolation(options.without_walls)]
    if not checks[0].ok:
        return checks, None

    for path in (options.data, options.documents, options.unseen):
        if path is not None and is_visible(path):
            raise JudgeError(f"{path} lies in a folder that the record's code can read: move it, or use another Python")

    violations: dict[str, str] = {}
    configs: list[tg.GPTConfig] = []
    until = time.monotonic() + options.total_seconds

    def start() -> RecordProcess:
        process = RecordProcess.start(
            script,
            artifact,
            submission.predictor_class,
            Limits(memory_bytes=options.memory_bytes),
            options.answer_seconds,
            violations,
            until,
        )
        configs.append(process.config)
        if process.config != configs[0]:
            process.close()
            raise RecordError("load", "the script says another config each time that it loads the artifact")
        return process

    scores = None
    try:
        # The first process has to be the blind one. For now it only tells what windows the artifact asks for.
        with start() as blind:
            checks.append(check_config(blind.config, submission))
            split, more = judge_text(blind.config, submission, options)
            checks += more
            if split is not None:
                judge_class = judge_fixed if submission.predictor_class == "A" else judge_adaptive
                rng = np.random.default_rng(options.seed)
                scores, more = judge_class(blind, start, split, options, rng)
                checks += more
                if options.unseen:
                    checks.append(check_unseen(start, judge_class, scores, options, rng))
    except RecordError as error:
        checks.append(Check(error.check, False, str(error)))
    except JudgeError:
        raise
    except Exception as error:  # whatever a record makes the judge stumble over is a failure of the record
        checks.append(Check("run", False, f"it cannot be judged: {error!r:.300}"))

    for name, detail in sorted(violations.items()):
        checks.append(Check(name, False, f"the script tried {detail}"))
    return checks, scores


def check_isolation(without_walls: bool) -> Check:
    """Whether the record's code can be kept from the network and from other files, or the judge does without."""
    found = isolation()
    if found == "namespaces":
        return Check("isolation", True, "its code runs in a sandbox, without network and other files")
    if without_walls:
        return Check("isolation", True, f"its code runs without a sandbox, as --without-walls asks ({found})")
    reason = f"{found}, so that the record's code could read the text and change files: judge it on Linux with user "
    return Check("isolation", False, f"{reason}namespaces, or trust it and add --without-walls")


def judge_text(
    config: tg.GPTConfig, submission: Submission, options: Options
) -> tuple[tg.ValSplit | None, list[Check]]:
    """Read the text and count its bytes. -> the split, or None if it cannot be read, and checks"""
    try:
        checks = [check_tokenizer(options.tokenizer)]
        if not checks[0].ok:
            return None, checks
        checks.append(check_vocabulary_bytes(options.tokenizer, submission))
        split = load_split(options.data, options.tokenizer, config)
        refuse_other_shards(split.identity, submission, options)
        checks.append(check_identity(split.identity, submission))
        checks.append(check_vocabulary(split, options.tokenizer))
        checks += check_bytes_of_text(
            split, options.tokenizer, options.documents, config.bos_id, submission, options.data_is_own
        )
    except (ValueError, OSError) as error:
        return None, [Check("text", False, f"the text cannot be read: {error}")]
    return split, checks
