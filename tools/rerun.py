"""Trains a record again from its script, where the validation text does not exist, and scores what comes out.

A score that was reached by training on the validation text cannot be reached without it. The script runs without its
comments, which might hold what it pretends to learn, and what it says of its steps, seconds and losses is compared with
the record's log and with the judge's own clock. Weights that lie in the script in some other way would still come out.
So the new artifact is scored on unseen text too: that of --unseen, or the end of the training text, which is kept from
the training then. The command is tools/verify.py --rerun.
"""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import tempfile
import time
import tokenize
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from judge import (
    Options,
    RecordError,
    Tokenizer,
    UnitScores,
    check_score,
    check_tokenizer,
    rescore,
    text_sha256,
    tg,
    write_shard,
)
from record import (
    Check,
    CurvePoint,
    JudgeError,
    Submission,
    file_sha256,
    log_path,
    parse_log,
    read_json,
    read_text,
    run_faults,
    script_path,
    seed_result,
    track_of,
    verdict,
)
from sandbox import Bind, Limits, Sandboxed, is_visible, isolation

# Bits per byte between two trainings on machines of one kind: five standard deviations of the seeds, within bounds.
MIN_MARGIN = 0.01
MAX_MARGIN = 0.02

MAX_FILE_BYTES = 2**28  # of a file that the training writes
MAX_OUT_BYTES = 2**30  # of all of them
MAX_OPEN_FILES = 512
MAX_PROCESSES = 256
RUN_ID = "rerun"

# Nats by which the training loss of a step may differ from that in the record's log, in all but a few of the steps.
MAX_LOSS_DIFFERENCE = 0.3
SHARE_OF_STEPS = 0.9
# Seconds of the judge's clock that the ledger of a run may leave out, or add: so many, and this share of all.
CLOCK_SECONDS = 30.0
CLOCK_SHARE = 0.2


class Training(NamedTuple):
    """What a record is trained from again."""

    script: Path
    settings: dict[str, Any]
    seed: str
    data: Path
    tokenizer: Path
    train_shards: list[Path]


class Retrained(NamedTuple):
    """What a training left."""

    artifact: Path
    run: dict[str, Any]  # its JSON
    log: str
    seconds: float  # by the judge's clock


def rerun(
    folder: Path, submission: Submission, options: Options, seed: str, max_seconds: float | None = None
) -> tuple[list[Check], UnitScores | None]:
    """Train the record in `folder` with `seed`, then score the artifact. -> checks, and the score if there is one

    The training may take `max_seconds`, by default half an hour more than twice the record's own limit.
    """
    if isolation() != "namespaces":
        reason = f"the validation text cannot be hidden from the script ({isolation()})"
        return [Check("isolation", False, reason)], None
    if " cpu:" not in submission.hardware:
        raise JudgeError(
            f"the record was trained on {submission.hardware}, and --rerun trains on CPUs only, which would say "
            "nothing about it: leave --rerun out"
        )
    if is_visible(options.data):
        raise JudgeError(f"{options.data} lies in a folder that the script can read: move it, or use another Python")
    tokenizer = check_tokenizer(options.tokenizer)
    if not tokenizer.ok:
        return [tokenizer], None
    if max_seconds is None:
        max_seconds = 1800 + 2 * float(submission.settings.get("max_wallclock_seconds") or 0)

    limits = Limits(options.memory_bytes, MAX_FILE_BYTES, MAX_OPEN_FILES, processes=MAX_PROCESSES, may_fork=True)
    with tempfile.TemporaryDirectory(prefix="rerun") as name:
        # Another user runs the script where root judges, and has to reach the folders below.
        Path(name).chmod(0o755)
        out = Path(name, "out")
        out.mkdir()
        try:
            script = Path(name, "train_gpt.py")
            script.write_bytes(without_comments(script_path(folder).read_bytes()))
            shards = sorted(options.data.glob("fineweb_train_[0-9]*.bin"))
            training = Training(script, submission.settings, seed, options.data, options.tokenizer, shards)
            margin = min(max(MIN_MARGIN, 5 * (submission.val_bpb_std or 0.0)), MAX_MARGIN)
            if options.unseen is None:
                training, unseen = hold_out(training, Path(name, "unseen"))
                options = dataclasses.replace(options, unseen=unseen)
                margin = MAX_MARGIN  # with less text its batches are others, as with another seed
            seconds = train_again(training, out, limits, max_seconds)
            retrained = read_results(out, seconds)
        except RecordError as error:
            return [Check(error.check, False, str(error))], None
        except (ValueError, KeyError, TypeError, AttributeError, OSError, ArithmeticError, RecursionError) as error:
            reason = f"it cannot be trained again, or left no results: {error!r:.300}"
            return [Check("train", False, reason)], None

        checks = [
            check_training(submission, seed, retrained),
            check_curve(read_text(log_path(folder, seed)), retrained, submission),
        ]
        # The script that scores is the one that trained, without the comments that could hold what training did not.
        more, scores = rescore(script, retrained.artifact, submission, options)
        checks += more
        if scores is not None:
            checks.append(check_score("rerun", scores, submission.val_bpb, margin, may_be_better=True))
        return checks, scores


def without_comments(source: bytes) -> bytes:
    """A script with its comments left out and every other line where it was; ValueError if it is not Python."""
    lines = [line.decode() for line in source.splitlines(keepends=True)]
    try:
        tokens = list(tokenize.tokenize(io.BytesIO(source).readline))
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"the script cannot be read as Python: {error}") from None
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            end = lines[row - 1][token.end[1] :]
            lines[row - 1] = lines[row - 1][:column] + end
    return "".join(lines).encode()


def hold_out(training: Training, folder: Path) -> tuple[Training, Path]:
    """Keep documents at the end of the training text from the training, as unseen text of the validation's length.

    -> the training without them, and the folder with their shards. ValueError where that cannot be done.
    """
    n_tokens = len(tg.TokenStream(str(training.data), "fineweb_val_[0-9]*.bin"))
    decoder = Tokenizer(training.tokenizer.read_bytes(), training.tokenizer)
    bos_id = int(training.settings["bos_id"])
    last = tg.TokenStream(str(training.data), training.train_shards[-1].name) if training.train_shards else None
    if last is None or len(last) < 3 * n_tokens:
        raise JudgeError(
            f"{training.data} has no training shard that is long enough to keep a part of it unseen: name an unseen "
            "text with --unseen"
        )
    ids = last.read(0, len(last))
    starts = np.flatnonzero(ids == bos_id)
    starts = starts[starts >= len(ids) - n_tokens]
    if len(starts) < 2:
        raise JudgeError("the end of the training text holds no two documents: name an unseen text with --unseen")

    texts = [decoder.decode(document[1:]) for document in np.split(ids, starts)[1:]]
    tokens = []
    n_bytes = []
    for text in texts:
        document, counted = decoder.encode_with_bytes(text)
        tokens += [np.array([bos_id], np.uint16), document]
        n_bytes += [np.zeros(1, np.uint16), counted.astype(np.uint16)]
    write_text(folder, np.concatenate(tokens), np.concatenate(n_bytes), text_sha256(texts), training.tokenizer)

    shortened = folder / training.train_shards[-1].name
    write_shard(shortened, ids[: starts[0]])
    return training._replace(train_shards=[*training.train_shards[:-1], shortened]), folder


def write_text(folder: Path, ids: np.ndarray, n_bytes: np.ndarray, sha256: str, tokenizer: Path) -> None:
    """Shards of a text to score, with the manifest that the root's script wants to see."""
    folder.mkdir()
    write_shard(folder / "fineweb_val_000000.bin", ids)
    write_shard(folder / "fineweb_val_bytes_000000.bin", n_bytes)
    files = {path.name: file_sha256(path) for path in folder.glob("fineweb_val_*.bin")}
    manifest = {
        "bytes_rule": "decoded",
        "splits": {"val": {"text_sha256": sha256, "files": files}},
        "tokenizer": {"sha256": file_sha256(tokenizer), "lossless": False},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def train_again(training: Training, out: Path, limits: Limits, max_seconds: float) -> float:
    """Run the script with its settings where the validation text does not exist; log and artifact go to `out`.

    -> the seconds that it took
    """
    decoy = out.parent / "decoy"
    make_decoy(training, decoy)
    binds = [
        Bind(training.script.resolve(), "/record/train_gpt.py"),
        Bind(training.tokenizer.resolve(), "/data/tokenizer.model"),
        Bind(out, "/out", writable=True),
    ]
    for path in [*decoy.iterdir(), *training.train_shards]:
        binds.append(Bind(path.resolve(), f"/data/{path.name}"))

    env = {}
    for setting, value in training.settings.items():
        env[setting.upper()] = str(int(value)) if isinstance(value, bool) else str(value)
    env |= {
        "SEED": training.seed,
        "RUN_ID": RUN_ID,
        "DATA_PATH": "/data",
        "TOKENIZER_PATH": "/data/tokenizer.model",
        "OUT_DIR": "/out",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }

    if "artifact_dir" in training.settings:  # of an earlier script, which takes another folder for its artifact
        env["ARTIFACT_DIR"] = "/out"

    with (out / "screen.txt").open("w+b") as screen:
        process = Sandboxed(
            ["/record/train_gpt.py"], binds, limits, env, stdin=subprocess.DEVNULL, stdout=screen, stderr=screen
        )
        started = time.monotonic()
        try:
            status = wait(process, out, started + max_seconds)
        finally:
            process.close()
        seconds = time.monotonic() - started
        screen.seek(0)
        lines = screen.read().decode(errors="replace").strip().splitlines()
    if status != 0:
        last_line = lines[-1][:300] if lines else ""
        raise RecordError("train", f"the script ended with status {status}: {last_line}")
    return seconds


def wait(process: Sandboxed, out: Path, end: float) -> int:
    """The exit status of a training. RecordError if it takes too long or writes too much."""
    while True:
        try:
            return process.popen.wait(1.0)
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() > end:
            raise RecordError("time", "the training took longer than it may (--train-timeout)")
        n_bytes = sum(path.lstat().st_size for path in out.rglob("*"))
        if n_bytes > MAX_OUT_BYTES:
            raise RecordError("train", f"the training wrote {n_bytes} bytes, at most {MAX_OUT_BYTES} are allowed")


def make_decoy(training: Training, folder: Path) -> None:
    """Write training text under the names of the validation split, as long as that one if there is enough."""
    n_tokens = len(tg.TokenStream(str(training.data), "fineweb_val_[0-9]*.bin"))
    train = tg.TokenStream(str(training.data), "fineweb_train_[0-9]*.bin")
    ids = train.read(0, min(n_tokens, len(train)))
    train.require_below(int(training.settings["vocab_size"]), ids, 0)

    # Any number of bytes would do, since nobody looks at the score.
    n_bytes = np.where(ids == int(training.settings["bos_id"]), 0, 2).astype(np.uint16)
    write_text(folder, ids, n_bytes, "unknown", training.tokenizer)


def read_results(out: Path, seconds: float) -> Retrained:
    """The artifact and the results that a training left; ValueError if it left none."""
    folder = out / RUN_ID
    json_path = folder / "run.json"
    log_path = folder / "log.txt"
    if not folder.exists():  # an earlier script
        folder = out
        json_path = out / f"{RUN_ID}.json"
        log_path = out / f"{RUN_ID}.txt"
    for path in [folder, *folder.iterdir()]:
        if path.is_symlink():
            raise ValueError(f"it left {path.name}, a link, which could lead out of the sandbox")

    artifacts = [path for path in sorted(folder.glob("final_model.*.ptz")) if path.is_file()]
    if not artifacts:
        raise ValueError("it left no final_model.*.ptz")
    run = read_json(json_path)
    if found := run_faults(run):
        raise ValueError(f"{json_path.name} is not the JSON of a training run: {found[0]}")
    return Retrained(artifacts[0], run, read_text(log_path), seconds)


def check_training(submission: Submission, seed: str, retrained: Retrained) -> Check:
    """Whether the new training stays within the limits of the track, and took the time that it says."""
    result = seed_result(retrained.run)
    n_bytes = retrained.artifact.stat().st_size + submission.bytes_code
    track = track_of(submission)
    problems = []
    if track and track.max_total_bytes is not None and n_bytes > track.max_total_bytes:
        problems.append(f"{n_bytes} bytes in all, the track allows {track.max_total_bytes}")
    # Written so that NaN, which the script may well report, is a problem too.
    if track and track.max_train_seconds is not None and not result.train_seconds <= track.max_train_seconds:
        problems.append(f"{result.train_seconds:.1f} s of training, the track allows {track.max_train_seconds:g}")

    ledger = sum(result.ledger_seconds.values())
    allowed = CLOCK_SECONDS + CLOCK_SHARE * retrained.seconds
    if not abs(ledger - retrained.seconds) <= allowed:
        problems.append(f"its ledger has {ledger:.1f} s, the judge's clock {retrained.seconds:.1f} s")

    found = file_sha256(retrained.artifact)
    for other, old in submission.seed_results.items():
        if other != seed and old.artifact_sha256 == found:
            problems.append(f"seed {seed} gives the artifact of seed {other}: it does not come from the training")
    summary = (
        f"seed {seed} was trained again with the validation text hidden: {result.train_seconds:.1f} s of training, "
        f"{n_bytes:,} bytes of code and artifact"
    )
    return verdict("train", problems, summary)


def check_curve(old_log: str, retrained: Retrained, submission: Submission) -> Check:
    """Whether the losses of the new training go down as those in the record's log, step by step."""
    try:
        old = parse_log(old_log).train_curve
        new = parse_log(retrained.log).train_curve
    except ValueError as error:
        return Check("curve", False, str(error))
    problems = []
    if not submission.settings.get("max_wallclock_seconds") and last_step(old) != last_step(new):
        problems.append(f"{last_step(new)} steps, the record's log has {last_step(old)}")

    losses = {point.step: point.loss for point in old}
    differences = [abs(point.loss - losses[point.step]) for point in new if point.step in losses]
    if len(differences) < 2:
        problems.append("the two logs share no steps that could be compared")
        return verdict("curve", problems, "")
    usual = float(np.quantile(differences, SHARE_OF_STEPS))
    ok = usual <= MAX_LOSS_DIFFERENCE
    figures = (
        f"they differ by at most {usual:.3f} nats at nine in ten of {len(differences)} steps, "
        f"with {MAX_LOSS_DIFFERENCE} allowed"
    )
    if not ok:
        problems.append(f"the training losses do not go down as in the record's log: {figures}")
    return verdict("curve", problems, f"the training losses go down as in the record's log ({figures})")


def last_step(curve: list[CurvePoint]) -> int:
    return max((point.step for point in curve), default=0)
