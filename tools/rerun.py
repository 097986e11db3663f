"""Trains a record again from its script, where the validation text does not exist, and scores what comes out.

A score that was reached by training on the validation text cannot be reached without it. The command is
tools/verify.py --rerun.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from judge import Options, RecordError, UnitScores, check_score, rescore, tg, write_shard
from record import Check, SeedResult, Submission, read_json, script_path, seed_result, track_of, verdict
from sandbox import Bind, Limits, Sandboxed, isolation

# Bits per byte between two trainings on machines of one kind: five standard deviations of the seeds, within bounds.
MIN_MARGIN = 0.01
MAX_MARGIN = 0.02

MAX_FILE_BYTES = 2**28  # of a file that the training writes
MAX_OPEN_FILES = 512
RUN_ID = "rerun"


class Training(NamedTuple):
    """What a record is trained from again."""

    script: Path
    settings: dict[str, Any]
    seed: str
    data: Path
    tokenizer: Path


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
        reason = f"the run was made on {submission.hardware}: trained on the CPU, it would say nothing about the claim"
        return [Check("hardware", False, reason)], None
    if max_seconds is None:
        max_seconds = 1800 + 2 * float(submission.settings.get("max_wallclock_seconds") or 0)

    training = Training(script_path(folder), submission.settings, seed, options.data, options.tokenizer)
    limits = Limits(options.memory_bytes, MAX_FILE_BYTES, MAX_OPEN_FILES)
    with tempfile.TemporaryDirectory(prefix="rerun") as name:
        out = Path(name, "out")
        out.mkdir()
        try:
            train_again(training, out, limits, max_seconds)
            artifact, result = read_results(out)
        except RecordError as error:
            return [Check(error.check, False, str(error))], None
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            reason = f"it cannot be trained again, or left no results: {error!r:.300}"
            return [Check("train", False, reason)], None

        checks = [check_training(submission, seed, artifact, result)]
        more, scores = rescore(training.script, artifact, submission, options)
        checks += more
        if scores is not None:
            margin = min(max(MIN_MARGIN, 5 * (submission.val_bpb_std or 0.0)), MAX_MARGIN)
            checks.append(check_score("rerun", scores, submission.val_bpb, margin, may_be_better=True))
        return checks, scores


def train_again(training: Training, out: Path, limits: Limits, max_seconds: float) -> None:
    """Run the script with its settings where the validation text does not exist; log and artifact go to `out`."""
    decoy = out.parent / "decoy"
    make_decoy(training, decoy)
    binds = [
        Bind(training.script.resolve(), "/record/train_gpt.py"),
        Bind(training.tokenizer.resolve(), "/data/tokenizer.model"),
        Bind(out, "/out", writable=True),
    ]
    for path in [*decoy.iterdir(), *training.data.glob("fineweb_train_[0-9]*.bin")]:
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
        "ARTIFACT_DIR": "/out",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }

    with (out / "screen.txt").open("w+b") as screen:
        process = Sandboxed(
            ["/record/train_gpt.py"], binds, limits, env, stdin=subprocess.DEVNULL, stdout=screen, stderr=screen
        )
        try:
            status = process.popen.wait(max_seconds)
        except subprocess.TimeoutExpired:
            raise RecordError("time", f"the training took more than {max_seconds:g} s") from None
        finally:
            process.close()
        screen.seek(0)
        lines = screen.read().decode(errors="replace").strip().splitlines()
    if status != 0:
        last_line = lines[-1][:300] if lines else ""
        raise RecordError("train", f"the script ended with status {status}: {last_line}")


def make_decoy(training: Training, folder: Path) -> None:
    """Write training text under the names of the validation split, as long as that one if there is enough."""
    n_tokens = len(tg.TokenStream(str(training.data), "fineweb_val_[0-9]*.bin"))
    train = tg.TokenStream(str(training.data), "fineweb_train_[0-9]*.bin")
    ids = train.read(0, min(n_tokens, len(train)))
    train.require_below(int(training.settings["vocab_size"]), ids, 0)

    folder.mkdir()
    write_shard(folder / "fineweb_val_000000.bin", ids)
    # Any number of bytes would do, since nobody looks at the score.
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.where(ids == int(training.settings["bos_id"]), 0, 2))
    sha256 = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    tokenizer_sha256 = hashlib.sha256(training.tokenizer.read_bytes()).hexdigest()
    manifest = {
        "splits": {"val": {"text_sha256": "decoy", "files": sha256}},
        "tokenizer": {"sha256": tokenizer_sha256, "lossless": False},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def read_results(out: Path) -> tuple[Path, SeedResult]:
    """The artifact and the results that a training left; ValueError if it left none."""
    for path in out.iterdir():
        if path.is_symlink():
            raise ValueError(f"it left {path.name}, a link, which could lead out of the sandbox")
    artifacts = [path for path in sorted(out.glob("final_model.*.ptz")) if path.is_file()]
    if not artifacts:
        raise ValueError("it left no final_model.*.ptz")
    return artifacts[0], seed_result(read_json(out / f"{RUN_ID}.json"))


def check_training(submission: Submission, seed: str, artifact: Path, result: SeedResult) -> Check:
    """Whether the new training stays within the limits of the track."""
    n_bytes = artifact.stat().st_size + submission.bytes_code
    track = track_of(submission)
    problems = []
    if track and track.max_total_bytes is not None and n_bytes > track.max_total_bytes:
        problems.append(f"{n_bytes} bytes in all, the track allows {track.max_total_bytes}")
    # Written so that NaN, which the script may well report, is a problem too.
    if track and track.max_train_seconds is not None and not result.train_seconds <= track.max_train_seconds:
        problems.append(f"{result.train_seconds:.1f} s of training, the track allows {track.max_train_seconds:g}")
    summary = f"seed {seed}, validation text hidden: {n_bytes} bytes in all, {result.train_seconds:.1f} s of training"
    return verdict("train", problems, summary)
