"""Says how far a record can be trusted: one line per check, and a last one that sums up.

    python tools/verify.py records/TRACK/FOLDER              from its files alone, in a second
    python tools/verify.py FOLDER --rescore                  scores its artifact again, in a sandbox, by our sums
    python tools/verify.py FOLDER --rescore --sample 200     the same for 200 documents, with an interval
    python tools/verify.py FOLDER --rerun --data DATA        trains again from its script, and scores what comes out

It exits with 0 if all checks pass, with 1 if one fails, and with 2 if the arguments do not allow to judge, which says
nothing about the record.

The text is that of the record's own data/ or of --data, whose manifest.json names its tokenizer. --documents names the
source of a text whose tokenizer is not lossless. --unseen names another text of the same source: whoever trained on the
scored text does worse there. --json prints the checks as JSON. --sign NAME adds what --rescore or --rerun found to the
record's reviews.json.

The record's code runs in a sandbox, on Linux as root or where an ordinary user may make namespaces; elsewhere nothing
runs without --without-walls. A leak of the whole target at one place in 1,000 is found in 99 of 100 cases. Judge a
record on a machine that it has not run on (tools/judge.py says why).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import platform
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from record import (
    FOLDER_NAME,
    PER_RUN,
    ROOT,
    SAME_SCORE,
    UNIQUE_RESULTS,
    Check,
    JudgeError,
    Review,
    RunLog,
    Submission,
    Track,
    add_review,
    artifact_path,
    benchmarks_path,
    confirmations,
    counted,
    data_path,
    day_fault,
    evaluation_faults,
    file_sha256,
    files_of,
    is_published,
    known_text,
    load_evaluation,
    load_reviews,
    load_submission,
    load_tracks,
    log_path,
    newest_judge_version,
    open_dispute,
    parse_log,
    read_file,
    read_json,
    read_run,
    read_text,
    record_folders,
    run_path,
    script_path,
    seeds_named,
    sha256,
    summarize,
    text_named,
    track_of,
    verdict,
)
from significance import below
from source import find_faults

sys.path.append(str(ROOT / "data"))  # for the model of a tokenizer

MAX_PROBLEMS = 6  # in the reason of one check
MAX_CHANGES = 8  # settings that differ from the base, in the reason of one check
# Bytes of a file in a record, by the end of its name; an artifact and the data are as large as the claims say.
MAX_FILE_BYTES = {".md": 2**20, ".json": 2**20, ".log": 2**22, ".svg": 2**22, ".png": 2**22, ".py": 2**20}
DATA_FILE = re.compile(r"fineweb_val_(bytes_)?\d{6}\.bin|manifest\.json|tokenizer\.model")
SHARD_HEADER_BYTES = 1024  # uint16 values follow it (data/shards.py)
MAX_TOKENIZER_BYTES = 2**22
MAX_HASHED_BYTES = 2**28  # of an artifact where the track has no limit, and of all shards in a record
MAX_SIGNED_INTERVAL = 0.01  # bits per byte, half width at 95 % of the score in a review
SAME_TRAINING = 0.05  # bits per byte, by which a score may differ when the model is trained again elsewhere
LEAST_BPB = 0.1  # English takes 0.6 to 1.3 bits per letter to those who know it best (Shannon 1951)

# What the log of a run has to print, besides the seconds of every phase.
LOGGED_KEYS = {
    *("artifact_sha256", "bytes_artifact", "bytes_code", "bytes_total", "code_sha256", "compute_dtype", "date"),
    *("device", "judge_version", "model_params", "python", "seed", "torch", "train_tokens", "val_accounting"),
    *("val_bytes", "val_documents", "val_shards_sha256", "val_text_sha256", "val_tokens", "world_size"),
}
# The log prints the scores more than once, with different digits, and a stride of 0 as what it stands for.
NOT_COMPARED = {"val_loss", "val_bpb", "eval_stride"}

# ----------------------------------------------------------------------------------------------------------------------
# Checks of the files alone
# ----------------------------------------------------------------------------------------------------------------------


def static_checks(folder: Path) -> list[Check]:
    """Everything that the files of a record tell by themselves."""
    folder = folder.resolve()
    checks = [guarded("files", check_files, folder)]
    try:
        submission = load_submission(folder)
    except (ValueError, OSError) as error:
        return [*checks, Check("schema", False, str(error))]
    checks.append(guarded("schema", check_schema, submission))
    checks.append(guarded("track", check_track, folder, submission))
    checks += check_source(folder, submission)

    try:
        runs = {seed: read_run(run_path(folder, seed)) for seed in submission.seed_results}
        logs = {seed: parse_log(read_text(log_path(folder, seed))) for seed in submission.seed_results}
    except (ValueError, OSError) as error:
        return [*checks, Check("logs", False, str(error))]
    return [
        *checks,
        guarded("summary", check_summary, folder, submission, runs),
        guarded("logs", check_logs, submission, logs, runs),
        guarded("seeds", check_seeds, folder, submission),
        guarded("bytes", check_bytes, folder, submission),
        guarded("clock", check_clock, submission, logs),
        guarded("targets", check_targets, submission),
        guarded("implied_bytes", check_implied_bytes, submission),
        guarded("data", check_data, folder, submission),
        guarded("lineage", check_lineage, folder, submission),
        guarded("reviews", check_reviews, folder, submission),
        *benchmark_checks(folder, submission),
    ]


def guarded(name: str, check: Callable[..., Check], *arguments: Any) -> Check:
    """The outcome of a check. If it breaks on what a record holds, that is a failure of the record, not of the tool."""
    try:
        return check(*arguments)
    except Exception as error:
        return Check(name, False, f"it cannot be judged: {error!r:.300}")


def check_schema(submission: Submission) -> Check:
    """Whether submission.json says when and by whom, and by which version of the judge's rules."""
    problems = []
    if submission.schema_version != 1:
        problems.append(f"schema_version is {submission.schema_version}, not 1")
    if fault := day_fault(submission.date):
        problems.append(f"the date {submission.date!r:.40} {fault}")
    if not re.fullmatch(r"unknown|[0-9a-f]{64}", submission.val_text_sha256):
        problems.append(f"val_text_sha256 {submission.val_text_sha256!r:.80} is neither a sha256 nor unknown")
    if not re.fullmatch(r"[!-~]+( [!-~]+)*", submission.hardware) or submission.hardware.endswith("_"):
        problems.append(f"the hardware {submission.hardware!r:.80} is not a name in ASCII")
    for name in ("model_params", "train_tokens", "val_tokens", "val_documents", "val_bytes"):
        if getattr(submission, name) <= 0:
            problems.append(f"{name} is {getattr(submission, name)}, not above 0")
    for seed, result in submission.seed_results.items():
        if result.steps < 0:
            problems.append(f"seed {seed}: {result.steps} steps")
        if result.val_bpb < LEAST_BPB:
            problems.append(f"seed {seed}: val_bpb {result.val_bpb:g} is below {LEAST_BPB}, which no text allows")
    newest = newest_judge_version()
    if not 1 <= submission.judge_version <= newest:
        problems.append(f"judge_version {submission.judge_version} is not from 1 to {newest}")
    summary = f"submission.json is complete, and its scores follow the rules of judge {submission.judge_version}"
    if submission.judge_version < newest:
        summary += f", which have changed since (today's are those of judge {newest})"
    return verdict("schema", problems[:MAX_PROBLEMS], summary)


def check_files(folder: Path) -> Check:
    """Whether the files of a record are there, and no others."""
    problems = []
    for name in ("README.md", "submission.json", script_path(folder).name):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
    if not FOLDER_NAME.fullmatch(folder.name):
        problems.append(f"the folder's name {folder.name!r} is not YYYY-MM-DD_Name")

    artifacts = sorted(folder.glob("final_model.*.ptz"))
    if len(artifacts) > 1:
        problems.append(f"there are {len(artifacts)} artifacts ({artifacts[0].name}, {artifacts[1].name}): keep one")
    try:
        paths = files_of(folder)
    except ValueError as error:
        return Check("files", False, "; ".join([*problems, str(error)]))
    for path in paths:
        name = str(path.relative_to(folder))
        if path.is_symlink():
            problems.append(f"{name} is a link")
        elif not path.is_file():
            problems.append(f"{name} is not an ordinary file")
        elif not belongs_in_record(path, folder):
            problems.append(f"{name} does not belong in a record: all code is in its script")
        elif path.stat().st_size > MAX_FILE_BYTES.get(path.suffix, math.inf):
            problems.append(
                f"{name} has {path.stat().st_size} bytes, at most {MAX_FILE_BYTES[path.suffix]} are allowed"
            )

    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"and {len(problems) - MAX_PROBLEMS} more"]
    return verdict("files", problems, "all that a record needs is in the folder, and nothing else")


def belongs_in_record(path: Path, folder: Path) -> bool:
    if path in (script_path(folder), artifact_path(folder)):
        return True
    if path.parent == folder:
        return path.suffix in (".md", ".json", ".log", ".svg", ".png")
    return path.parent == data_path(folder) and DATA_FILE.fullmatch(path.name) is not None


def check_track(folder: Path, submission: Submission) -> Check:
    """Whether the record keeps the rules of its track that concern neither bytes nor seconds nor seeds."""
    rules_version, tracks = load_tracks()
    track = tracks.get(submission.track)
    if track is None:
        return Check("track", False, f"there is no track {submission.track!r}, only {', '.join(tracks)}")

    problems = []
    if folder.parent.name != submission.track:
        problems.append(f"it lies in {folder.parent.name} and says {submission.track}")
    if not 1 <= submission.rules_version <= rules_version:
        problems.append(f"rules_version {submission.rules_version} is not from 1 to {rules_version}")
    if not folder.name.startswith(submission.date):
        problems.append(f"the folder's name does not begin with the date {submission.date}")

    problems += rule_faults(submission, track)
    summary = (
        f"it keeps the rules of {submission.track} (version {submission.rules_version}), "
        f"as a predictor of class {submission.predictor_class} trained on {submission.hardware}"
    )
    return verdict("track", problems, summary)


def benchmark_checks(folder: Path, submission: Submission) -> list[Check]:
    """What is asked for besides, where the track asks for benchmarks."""
    track = track_of(submission)
    if track is None or not track.benchmarks:
        return []
    return [
        guarded("benchmarks", check_benchmarks, folder, submission, track),
        guarded("card", check_card, folder, submission),
    ]


def check_benchmarks(folder: Path, submission: Submission, track: Track) -> Check:
    """Whether benchmarks.json is of one of the record's runs, and says what submission.json says."""
    evaluation = load_evaluation(benchmarks_path(folder))
    artifacts = {result.artifact_sha256 for result in submission.seed_results.values()}
    problems = evaluation_faults(evaluation, artifacts, track)
    for name, claim in submission.benchmarks.items():
        if claim != evaluation.benchmarks.get(name):
            problems.append(f"{name} is {claim} in submission.json and {evaluation.benchmarks.get(name)} in the file")
    return verdict("benchmarks", problems, f"benchmarks by the protocol {evaluation.protocol}, samples, and a context")


def check_card(folder: Path, submission: Submission) -> Check:
    """Whether README.md tells of the model what competitions for tiny models ask for."""
    text = read_text(folder / "README.md")
    problems = []
    if "<!-- Write here" in text:
        problems.append("README.md still has the comment that asks what is new: put the answer in its place")
    asked = {
        "number of parameters": f"{submission.model_params:,}",
        "context": f"{submission.context:,}",
        "licence": submission.licence,
    }
    problems += [f"README.md does not tell the {what}, {value}" for what, value in asked.items() if value not in text]
    return verdict("card", problems, "README.md tells parameters, context, licence and what is new")


def refusals(submission: Submission, track: Track) -> list[str]:
    """All rules of a track that a record breaks, whatever else its files say. tools/submission.py new asks this."""
    faults = rule_faults(submission, track) + size_faults(submission, track) + time_faults(submission, track)
    n_seeds = len(submission.seed_results)
    if n_seeds < track.min_seeds:
        faults.append(f"{counted(n_seeds, 'seed')}, the track asks for {track.min_seeds}")
    return faults


def rule_faults(submission: Submission, track: Track) -> list[str]:
    """The rules of a track, other than those for bytes, seconds and seeds, that a record breaks."""
    problems = []
    right_number = track.world_size is None or submission.hardware.startswith(f"{track.world_size}x ")
    if track.device not in submission.hardware or not right_number:
        wanted = track.device if track.world_size is None else f"{track.world_size}x {track.device}".strip()
        problems.append(f"it was trained on {submission.hardware}, the track asks for {wanted}")

    if track.max_parameters and submission.model_params > track.max_parameters:
        problems.append(f"{submission.model_params} parameters, the track allows {track.max_parameters}")
    if track.min_context_tokens and submission.context < track.min_context_tokens:
        problems.append(f"a context of {submission.context} tokens, the track asks for {track.min_context_tokens}")
    if track.max_train_tokens and submission.train_tokens > track.max_train_tokens:
        problems.append(f"{submission.train_tokens} training tokens, the track allows {track.max_train_tokens}")

    if track.licences and submission.licence not in track.licences:
        problems.append(f"licence {submission.licence!r}, the track allows {', '.join(track.licences)}")
    for name in track.benchmarks:
        if name not in submission.benchmarks:
            problems.append(f"benchmark {name} is missing")

    known = known_text(submission.val_documents, submission.val_text_sha256)
    if track.text:
        has_size = text_named(track.text).has_size(submission.val_documents, submission.val_bytes)
        if not has_size or (known is not None and known.name != track.text):
            scored = f"{submission.val_documents} documents of {submission.val_bytes} bytes"
            problems.append(f"it was scored on {known.name if known else scored}, not on {track.text}")
    if track.target_val_bpb:
        p = below(track.target_val_bpb, submission.values("val_bpb"))
        if p >= track.p_value:
            problems.append(
                f"val_bpb {submission.val_bpb:.4f} is below {track.target_val_bpb} at p = {p:.2g}, "
                f"the track asks for p < {track.p_value}"
            )
    return problems


def size_faults(submission: Submission, track: Track) -> list[str]:
    limit = track.max_total_bytes
    faults = []
    for seed, result in submission.seed_results.items():
        if limit is not None and result.bytes_total > limit:
            faults.append(f"seed {seed}: {result.bytes_total:,} bytes of code and artifact, the track allows {limit:,}")
    return faults


def time_faults(submission: Submission, track: Track) -> list[str]:
    faults = []
    for seed, result in submission.seed_results.items():
        limits = (
            ("training", result.train_seconds, track.max_train_seconds),
            ("evaluation", result.eval_seconds, track.max_eval_seconds),
        )
        for phase, seconds, limit in limits:
            if limit is not None and seconds > limit:
                faults.append(f"seed {seed}: {seconds:.2f} s of {phase}, the track allows {limit:g}")
    return faults


def check_source(folder: Path, submission: Submission) -> list[Check]:
    """Whether people can read the script, and whether it is the one that ran."""
    path = script_path(folder)
    try:
        data = read_file(path, MAX_FILE_BYTES[".py"])
        faults = find_faults(data)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        return [Check("source", False, f"{path.name} cannot be read as Python: {error!s:.200}")]

    problems = list(faults.unreadable)
    if sha256(data) != submission.code_sha256:
        reason = f"{path.name} is not the script that ran: its sha256 is not code_sha256"
        if submission.code_sha256 in (sha256(data.replace(b"\r\n", b"\n")), sha256(data.replace(b"\n", b"\r\n"))):
            reason += (
                " because its line ends were changed, as git does with core.autocrlf: set it to false and check the "
                "record out again (git rm --cached -r . && git reset --hard)"
            )
        problems.insert(0, reason)
    n_lines = data.count(b"\n")
    return [
        verdict("source", problems[:MAX_PROBLEMS], f"{path.name} is the script that ran, {n_lines} readable lines"),
        verdict("no_network", faults.network[:MAX_PROBLEMS], "the script imports nothing that talks to a network"),
    ]


def check_summary(folder: Path, submission: Submission, runs: Mapping[str, Any]) -> Check:
    """Whether submission.json says what follows from the JSON of its runs."""
    try:
        derived = summarize(
            list(runs.values()), read_file(script_path(folder), MAX_FILE_BYTES[".py"]), submission.about
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ArithmeticError) as error:
        return Check("summary", False, f"no submission follows from the JSON of its runs: {error!r:.300}")

    claims = dataclasses.asdict(submission)
    problems = []
    last_day = max(str(run["date"])[:10] for run in runs.values())
    if submission.date < last_day:
        problems.append(f"the date is {submission.date}, and its last run was made on {last_day}")
    for key, value in dataclasses.asdict(derived).items():
        if key != "benchmarks" and not same(value, claims[key]):
            problems.append(f"{key} is {claims[key]!r:.60}, from its runs follows {value!r:.60}")
    summary = (
        f"the means, sizes and settings in submission.json follow from the JSON of its {counted(len(runs), 'run')}"
    )
    return verdict("summary", problems[:MAX_PROBLEMS], summary)


def same(a: Any, b: Any) -> bool:
    """Equality that allows for another order of additions."""
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def check_logs(submission: Submission, logs: Mapping[str, RunLog], runs: Mapping[str, Any]) -> Check:
    """Whether the log of every seed says what the JSON of its run says, to the digits that it prints.

    That is the score, what the log has to print, everything else that is in both, and the changed settings.
    """
    problems = []
    for seed, log in logs.items():
        result = submission.seed_results[seed]
        run = runs[seed]
        if log.final is None:
            problems.append(f"the log of seed {seed} has no final score")
            continue
        line, val_loss, val_bpb = log.final
        if abs(val_loss - result.val_loss) > 1e-8 or abs(val_bpb - result.val_bpb) > 1e-8:
            problems.append(
                f"seed {seed}: {line} has {val_loss} and {val_bpb}, the JSON {result.val_loss} and {result.val_bpb}"
            )

        logged = log.values | changed_settings(log)
        required = LOGGED_KEYS | {key for key in run if key.startswith("seconds_")}
        for key in sorted(required | (run.keys() & logged.keys()) - NOT_COMPARED):
            text = logged.get(key, "nothing")
            if not is_printed_as(run.get(key), text):
                problems.append(f"seed {seed}: the log says {key} {text:.60}, the JSON {run.get(key)!s:.60}")
    summary = f"{counted(len(logs), 'log')} and the JSON of the runs say the same"
    return verdict("logs", problems[:MAX_PROBLEMS], summary)


def changed_settings(log: RunLog) -> dict[str, str]:
    """The settings that the log lists as changed, except those that may differ between the runs of a record."""
    settings = {}
    for item in log.values.get("settings", "").split(","):
        name, equals, text = item.partition("=")
        if equals and name.lower() not in PER_RUN:
            settings[name.lower()] = text
    return settings


def is_printed_as(value: Any, text: str) -> bool:
    """Whether a log may print a value like this: a number rounded to the digits it shows, true and false as 1 and 0."""
    if isinstance(value, bool):
        return text in (str(value), str(int(value)))
    if isinstance(value, float) and re.fullmatch(r"-?\d+\.\d+", text):
        digits = len(text.partition(".")[2])
        return abs(float(text) - value) <= 0.51 * 10.0**-digits
    return text == str(value)


def check_seeds(folder: Path, submission: Submission) -> Check:
    """Whether there are enough seeds, and none was left out."""
    problems = []
    track = track_of(submission)
    if track and len(submission.seed_results) < track.min_seeds:
        problems.append(f"{len(submission.seed_results)} seeds, the track asks for {track.min_seeds}")
    for seed in submission.seed_results:
        # "1" and "01" would be one seed that counts twice.
        if not seed.isdecimal() or not seed.isascii() or str(int(seed)) != seed:
            problems.append(f"the seed {seed[:40]!r} is not a number in its shortest form")
    problems += same_results(submission)
    seeds_in_folder = {path.stem.removeprefix("train_seed") for path in folder.glob("train_seed*.*")}
    for seed in sorted(seeds_in_folder - submission.seed_results.keys()):
        problems.append(f"the folder has a run of seed {seed}, which submission.json leaves out")

    artifact = artifact_path(folder)
    shown = seed_of(submission, artifact) if artifact is not None else ""
    others = [seed for seed in submission.seed_results if seed != shown]
    summary = f"every run in the folder counts: {seeds_named(submission.seed_results)}"
    if others:
        summary += f"; there is no artifact of {seeds_named(others)} in it to score again"
    return verdict("seeds", problems[:MAX_PROBLEMS], summary)


def same_results(submission: Submission) -> list[str]:
    """Seeds that cannot be runs of their own, because two of them share the artifact or the loss to the last digit."""
    problems = []
    seed_with: dict[tuple[str, Any], str] = {}
    for seed, result in submission.seed_results.items():
        for key in UNIQUE_RESULTS:
            other = seed_with.setdefault((key, getattr(result, key)), seed)
            if other != seed:
                problems.append(f"seeds {other} and {seed} have the same {key}")
    return problems


def check_bytes(folder: Path, submission: Submission) -> Check:
    """Whether the sizes are those of the files, and within the track's limit."""
    problems = []
    script = script_path(folder)
    if script.is_file() and not script.is_symlink() and script.stat().st_size != submission.bytes_code:
        problems.append(f"{script.name} has {script.stat().st_size} bytes, not {submission.bytes_code}")

    track = track_of(submission)
    limit = track.max_total_bytes if track else None
    for seed, result in submission.seed_results.items():
        if result.bytes_total != result.bytes_artifact + submission.bytes_code:
            parts = f"{result.bytes_artifact} + {submission.bytes_code}"
            problems.append(f"seed {seed}: {result.bytes_total} bytes in all, not {parts}")
    if track is not None:
        problems += size_faults(submission, track)

    artifact = artifact_path(folder)
    if artifact is None:
        owner = "the artifact is not in the folder"
    elif fault := size_fault(artifact, limit or MAX_HASHED_BYTES):
        owner = ""
        problems.append(fault)
    else:
        seed = seed_of(submission, artifact)
        owner = f"{artifact.name} in the folder is that of seed {seed}"
        if not seed:
            problems.append(f"{artifact.name} is not the artifact of any of its seeds, by size and sha256")
    allowed = "the track has no limit" if limit is None else f"the track allows {limit:,}"
    summary = f"code and artifact take at most {submission.bytes_total:,} bytes ({allowed}); {owner}"
    return verdict("bytes", problems[:MAX_PROBLEMS], summary)


def size_fault(path: Path, max_bytes: int) -> str:
    """Why a file takes too long to read, or holds less than its size says; empty if neither is so."""
    status = path.lstat()
    if status.st_size > max_bytes:
        return f"{path.name} has {status.st_size} bytes, at most {max_bytes} are read"
    blocks = getattr(status, "st_blocks", None)  # of 512 bytes; Windows has none
    if blocks is not None and status.st_size > 2**20 and 512 * blocks < status.st_size // 2:
        return f"{path.name} has {status.st_size} bytes and is mostly empty on the disk"
    return ""


@functools.lru_cache(maxsize=8)
def sha256_of(path: Path, size: int, modified_ns: int) -> str:
    return file_sha256(path)


def seed_of(submission: Submission, artifact: Path) -> str:
    """The seed whose run wrote the artifact, or an empty text."""
    status = artifact.stat()
    candidates = [seed for seed, result in submission.seed_results.items() if result.bytes_artifact == status.st_size]
    if not candidates or artifact.is_symlink() or not artifact.is_file() or size_fault(artifact, MAX_HASHED_BYTES):
        return ""
    found = sha256_of(artifact, status.st_size, status.st_mtime_ns)
    return next((seed for seed in candidates if submission.seed_results[seed].artifact_sha256 == found), "")


def check_clock(submission: Submission, logs: Mapping[str, RunLog]) -> Check:
    """Whether the ledger of seconds keeps the track's limits, and has the time that the log trains for."""
    track = track_of(submission)
    max_train_seconds = track.max_train_seconds if track else None
    problems = [] if track is None else time_faults(submission, track)
    for seed, result in submission.seed_results.items():
        ledger = result.ledger_seconds
        curve = logs[seed].train_curve + logs[seed].val_curve
        times = [point.seconds for point in curve if not math.isnan(point.seconds)]
        if result.steps and not times:
            problems.append(f"seed {seed}: the log has no time of any step")
        if times and max(times) > ledger.get("train", 0.0) + 0.5:
            problems.append(f"seed {seed}: the log trains for {max(times):.1f} s, the ledger for {ledger.get('train')}")
        if min(ledger.values(), default=0.0) < 0:
            problems.append(f"seed {seed}: the ledger has a phase below 0 s")

    longest = max((result.train_seconds for result in submission.seed_results.values()), default=0.0)
    allowed = "the track has no limit" if max_train_seconds is None else f"the track allows {max_train_seconds:g}"
    summary = f"the longest training took {longest:.1f} s, calibration included ({allowed})"
    return verdict("clock", problems[:MAX_PROBLEMS], summary)


def check_targets(submission: Submission) -> Check:
    """Whether every token of the split but the first was scored exactly once."""
    problems = []
    split = f"{submission.val_tokens} tokens of {submission.val_bytes} bytes"
    for seed, result in submission.seed_results.items():
        if (result.scored_tokens, result.scored_bytes) != (submission.val_tokens - 1, submission.val_bytes):
            scored = f"{result.scored_tokens} targets and {result.scored_bytes} bytes scored"
            problems.append(f"seed {seed}: {scored}, the split has {split}")
    summary = f"every token but the first was scored exactly once, {submission.val_tokens - 1:,} in all"
    return verdict("targets", problems[:MAX_PROBLEMS], summary)


def check_implied_bytes(submission: Submission) -> Check:
    """Whether the two losses were divided by the bytes of the split: val_loss / ln 2 * targets / val_bpb."""
    problems = []
    for seed, result in submission.seed_results.items():
        implied = math.inf
        # Numbers beyond 64 bits may come from any JSON, and would overflow.
        if result.val_bpb > 0 and abs(result.scored_tokens) < 2**63:
            implied = result.val_loss / math.log(2) * result.scored_tokens / result.val_bpb
        if abs(submission.val_bytes) >= 2**63 or not math.isclose(implied, submission.val_bytes, rel_tol=1e-6):
            problems.append(
                f"seed {seed}: val_loss and val_bpb imply {implied:.0f} bytes, the split has {submission.val_bytes}"
            )

    known = known_text(submission.val_documents, submission.val_text_sha256)
    if known and not known.has_size(submission.val_documents, submission.val_bytes):
        size = f"{known.bytes} bytes in {known.documents} documents"
        problems.append(f"{known.name} has {size}, not {submission.val_bytes} in {submission.val_documents}")
    text = known.name if known else "a text that records/texts.json does not list"
    if known and known.demonstration:
        text += " (a demonstration, which ranks nowhere)"
    summary = f"the scores were divided by {submission.val_bytes:,} bytes, those of {text}; {submission.bytes_counted}"
    return verdict("implied_bytes", problems[:MAX_PROBLEMS], summary)


def check_data(folder: Path, submission: Submission) -> Check:
    """Whether validation shards in the folder are those that were scored."""
    data = data_path(folder)
    if not data.is_dir():
        return Check("data", True, "the scored text is not in the folder, so --rescore needs --data")
    found: dict[str, Any] = {}
    shards = [path for path in sorted(data.glob("fineweb_val_[0-9]*.bin")) if path.is_file()]
    n_bytes = sum(path.stat().st_size - SHARD_HEADER_BYTES for path in shards)
    found["val_tokens"] = n_bytes / 2 if n_bytes % 2 else n_bytes // 2
    sidecars = [path for path in sorted(data.glob("fineweb_val_bytes_*.bin")) if path.is_file()]
    n_sidecar_bytes = sum(path.stat().st_size - SHARD_HEADER_BYTES for path in sidecars)
    if sidecars:
        found["byte counts"] = n_sidecar_bytes / 2 if n_sidecar_bytes % 2 else n_sidecar_bytes // 2
    claimed = {"val_tokens": submission.val_tokens, "byte counts": submission.val_tokens}
    problems = [fault for path in [*shards, *sidecars] if (fault := size_fault(path, MAX_HASHED_BYTES))]
    # Files of other sizes than the record says are not read.
    if not problems and all(value == claimed[name] for name, value in found.items()):
        found["val_shards_sha256"] = shard_sha256(shards)
        if sidecars:
            found["val_bytes"] = sidecar_bytes(sidecars)
    tokenizer = data / "tokenizer.model"
    found["tokenizer_sha256"] = "missing"
    if tokenizer.is_file():
        model = read_file(tokenizer, MAX_TOKENIZER_BYTES)
        found["tokenizer_sha256"] = sha256(model)
        problems += tokenizer_faults(model, submission)

    for name, value in found.items():
        claim = claimed.get(name, getattr(submission, name, None))
        if value != claim:
            problems.append(f"{name} of data/ is {value}, not {claim}")
    return verdict("data", problems[:MAX_PROBLEMS], "the shards and the tokenizer in data/ are those that were scored")


def tokenizer_faults(model: bytes, submission: Submission) -> list[str]:
    """What is wrong with a tokenizer by its file alone: rules that write text, or a claim to lose nothing that it does.

    Whether it really gives back the text, only --rescore finds out.
    """
    # Imported only here, because few records bring their data.
    from model_file import CHARACTER_MAP, parse_model, rule_faults

    try:
        parsed = parse_model(model)
    except ValueError as error:
        return [f"tokenizer.model is not a SentencePiece model: {error!s:.120}"]
    problems = [f"tokenizer.model: {fault}" for fault in rule_faults(parsed)]
    if submission.tokenizer_lossless is True and any(parsed.normalizer.get(CHARACTER_MAP, [])):
        problems.append(
            "tokenizer.model rewrites characters, and the record says that it loses nothing: export the text with a "
            "tokenizer that was trained with normalization_rule_name=identity"
        )
    return problems


def shard_sha256(shards: Sequence[Path]) -> str:
    """The sha256 of the tokens of shards, one after the other, without their headers."""
    hashed = hashlib.sha256()
    for path in shards:
        with path.open("rb") as file:
            file.seek(SHARD_HEADER_BYTES)
            while piece := file.read(2**20):
                hashed.update(piece)
    return hashed.hexdigest()


def sidecar_bytes(sidecars: Sequence[Path]) -> int:
    """The sum of the byte counts of all targets, which are all tokens but the first."""
    total = 0
    for path in sidecars:
        with path.open("rb") as file:
            file.seek(SHARD_HEADER_BYTES)
            while piece := file.read(2**20):
                total += int(np.frombuffer(piece, "<u2").sum(dtype=np.int64))
    with sidecars[0].open("rb") as file:
        file.seek(SHARD_HEADER_BYTES)
        return total - int.from_bytes(file.read(2), "little")


def check_lineage(folder: Path, submission: Submission) -> Check:
    """What the script and its settings change in those of the record that it builds on."""
    if not submission.base:
        return Check("lineage", True, "it names no record that it builds on")
    # Looked up among those that are there, because not every text can be a path.
    bases = {f"{path.parent.name}/{path.name}": path for path in record_folders(folder.parents[1]) if path != folder}
    base = bases.get(submission.base)
    if base is None or not script_path(base).is_file():
        return Check("lineage", False, f"there is no record {submission.base!r}: name the base as <track>/<folder>")
    try:
        old_settings = load_submission(base).settings
        old_lines = read_text(script_path(base)).splitlines()
        new_lines = read_text(script_path(folder)).splitlines()
    except ValueError as error:
        return Check("lineage", False, f"base {submission.base}: {error}")

    # Lines are counted wherever they stand, which takes no time however the scripts look.
    old = Counter(old_lines)
    new = Counter(new_lines)
    n_added = (new - old).total()
    n_removed = (old - new).total()

    changes = []
    for name in sorted(old_settings.keys() | submission.settings.keys()):
        if old_settings.get(name) != submission.settings.get(name):
            changes.append(f"{name.upper()}={submission.settings.get(name, 'gone')}")
    settings = "and changes no setting"
    if changes:
        more = len(changes) - MAX_CHANGES
        shown = ", ".join(changes[:MAX_CHANGES]) + (f" and {more} more" if more > 0 else "")
        settings = f"and changes {counted(len(changes), 'setting')}: {shown}"
    lines = f"adds {counted(n_added, 'line')} to the script and removes {n_removed}"
    return Check("lineage", True, f"it builds on {submission.base}, {lines}, {settings}")


def check_reviews(folder: Path, submission: Submission) -> Check:
    """Whether those who confirm a record are other people than its author."""
    try:
        reviews = load_reviews(folder)
    except ValueError as error:
        return Check("reviews", False, str(error))
    author_names = {letters_of(submission.author), letters_of(submission.github_id)}
    problems = []
    for review in reviews:
        where = f"{review.kind} on {review.date!r:.40}"
        if not letters_of(review.reviewer):
            problems.append(f"{where} by nobody: {review.reviewer!a:.40}")
        if review.kind != "disputed" and letters_of(review.reviewer) in author_names:
            problems.append(f"{where} by its author")
        if fault := day_fault(review.date):
            problems.append(f"a review has the date {review.date!r:.40}, which {fault}")
        if review.seed and review.seed not in submission.seed_results:
            problems.append(f"{where} of seed {review.seed!r:.40}, which the record does not have")
        if review.kind in ("rescored", "reproduced"):
            problems += [f"{where}: {fault}" for fault in confirmation_faults(review, submission)]
    summary = "nobody has reviewed it yet"
    if reviews:
        summary = f"{counted(len(reviews), 'review')} by people other than the author"
    return verdict("reviews", problems[:MAX_PROBLEMS], summary)


def letters_of(name: str) -> str:
    """A name as people read it, without case, blanks, signs and characters that nobody sees."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum())


def confirmation_faults(review: Review, submission: Submission) -> list[str]:
    """Why a review does not confirm what the record says of its seed; empty if it does, or is of other code."""
    result = submission.seed_results.get(review.seed)
    if result is None or review.code_sha256 != submission.code_sha256:
        return []
    found = []
    if review.val_bpb is None:
        return ["it names no val_bpb"]
    interval = review.val_bpb_interval or 0.0
    tolerance = (SAME_SCORE if review.kind == "rescored" else SAME_TRAINING) + interval
    if not 0 <= interval <= MAX_SIGNED_INTERVAL:
        found.append(f"its score is known to +- {interval:g} only")
    if abs(review.val_bpb - result.val_bpb) > tolerance:
        found.append(f"val_bpb {review.val_bpb:.4f}, the record says {result.val_bpb:.4f}")
    judge_version = review.judge_version or 0
    if not submission.judge_version <= judge_version <= newest_judge_version():
        found.append(f"by judge {review.judge_version}, the record was scored by judge {submission.judge_version}")
    if review.kind == "rescored" and review.artifact_sha256 != result.artifact_sha256:
        found.append("of another artifact than its run wrote")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What tools/verify.py prints."""

    checks: list[Check]
    closing: str  # one sentence that says how far the record is confirmed

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def verify(args: argparse.Namespace) -> Outcome:
    """The static checks, and those of --rescore or --rerun. JudgeError if the arguments do not allow these."""
    folder = args.folder.resolve()
    checks = static_checks(folder)
    if not all(check.ok for check in checks):
        closing = failing_line(checks)
        # Code is not run if its files contradict each other.
        return Outcome(checks, closing + (" Nothing of it was run." if args.rescore or args.rerun else ""))
    submission = load_submission(folder)
    if not (args.rescore or args.rerun):
        return Outcome(checks, passing_line(submission, load_reviews(folder)))

    data = data_to_score(args, folder)
    tokenizer = args.tokenizer or tokenizer_of(data)
    for option, path in (("--tokenizer", tokenizer), ("--documents", args.documents)):
        if path is not None and not path.is_file():
            raise JudgeError(f"{option}={path} is not a file: check the path")
    if args.unseen is not None and not args.unseen.is_dir():
        raise JudgeError(f"--unseen={args.unseen} is not a folder: name one with shards of another text")
    if args.rerun:
        artifact = None
        seed = seed_to_train(args, submission)
    else:
        artifact, seed = artifact_to_score(args, folder, submission)

    # Imported only here, because they import torch, which takes longer than all the static checks together.
    import judge
    import rerun

    options = judge.Options(
        data=data,
        tokenizer=tokenizer,
        data_is_own=data == data_path(folder).resolve(),
        documents=args.documents,
        unseen=args.unseen,
        sample=args.sample,
        seed=args.seed,
        answer_seconds=args.timeout,
        total_seconds=args.total_timeout,
        memory_bytes=int(args.memory * 2**30),
        without_walls=args.without_walls,
    )
    claim = submission.seed_results[seed].val_bpb
    if artifact is None:
        more, scores = rerun.rerun(folder, submission, options, seed, args.train_timeout)
    else:
        more, scores = judge.rescore(script_path(folder), artifact, submission, options)
        if scores is not None:
            more.append(judge.check_score("score", scores, claim, SAME_SCORE))
    checks += more

    # Too small a sample is no fault of the record, unless something else is wrong with it.
    others = [check for check in checks if check.name not in ("score", "rerun")]
    if scores is not None and all(check.ok for check in others) and (fault := judge.sample_fault(scores)):
        raise JudgeError(fault)

    confirmation = Review(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        reviewer=args.sign,
        kind="reproduced" if args.rerun else "rescored",
        code_sha256=submission.code_sha256,
        seed=seed,
        val_bpb=scores.bpb if scores else None,
        val_bpb_interval=scores.interval if scores and not scores.whole else None,
        judge_version=judge.tg.JUDGE_VERSION,
        hardware=f"{os.cpu_count()}x {platform.machine()}",
        artifact_sha256=submission.seed_results[seed].artifact_sha256 if args.rescore else "",
    )
    if args.sign:
        checks.append(sign(folder, confirmation, checks))
    if not all(check.ok for check in checks):
        return Outcome(checks, failing_line(checks))
    reviews = [review for review in load_reviews(folder) if review != confirmation]
    return Outcome(checks, passing_line(submission, reviews, confirmation))


def data_to_score(args: argparse.Namespace, folder: Path) -> Path:
    """The folder of shards with the text to score. JudgeError if there is none."""
    data = args.data or data_path(folder)
    if not data.is_dir():
        if args.data:
            raise JudgeError(f"--data={data} is not a folder: name the one with the shards that were scored")
        raise JudgeError(f"{folder.name} brings no data: name the folder of the shards that were scored with --data")
    if not any(data.glob("fineweb_val_[0-9]*.bin")):
        raise JudgeError(f"--data={data} holds no fineweb_val_*.bin: name the folder of the shards that were scored")
    return data.resolve()


def tokenizer_of(data: Path) -> Path:
    """The tokenizer of a folder of shards: the one in a record's data, or the one that manifest.json names.

    The tools of data/ write it to ../../tokenizers. JudgeError if it is not there, or is another one by its sha256.
    """
    if (data / "tokenizer.model").is_file():
        return data / "tokenizer.model"
    manifest = data / "manifest.json"
    if not manifest.is_file():
        raise JudgeError(f"{data} has no manifest.json that names its tokenizer: give the file with --tokenizer")
    try:
        entry = read_json(manifest, strict=False)["tokenizer"]
        name = Path(entry["file"]).name
        expected = str(entry["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise JudgeError(
            f"{manifest} does not say which tokenizer it is for ({error}): give it with --tokenizer"
        ) from None

    places = [data, data.parent.parent / "tokenizers"]
    files = [place / name for place in places if (place / name).is_file()]
    if not files:
        looked_in = " and ".join(map(str, places))
        raise JudgeError(
            f"{manifest} names the tokenizer {name}, which is not in {looked_in}: give it with --tokenizer"
        )
    for path in files:
        if file_sha256(path) == expected:
            return path
    raise JudgeError(
        f"{files[0]} has sha256 {file_sha256(files[0]):.12}, and {manifest} names one with {expected:.12}: "
        "give that tokenizer with --tokenizer"
    )


def artifact_to_score(args: argparse.Namespace, folder: Path, submission: Submission) -> tuple[Path, str]:
    """The artifact to score, and the seed whose run wrote it. JudgeError if there is none."""
    artifact = args.artifact or artifact_path(folder)
    if artifact is None:
        raise JudgeError(f"{folder.name} brings no artifact: name one that its runs wrote with --artifact")
    if not artifact.is_file():
        raise JudgeError(f"--artifact={artifact} is not a file: check the path")
    seed = seed_of(submission, artifact)
    if not seed:
        raise JudgeError(f"--artifact={artifact} is not what any run of the record wrote, by size and sha256")
    return artifact, seed


def seed_to_train(args: argparse.Namespace, submission: Submission) -> str:
    seeds = list(submission.seed_results)
    if args.run_seed and args.run_seed not in seeds:
        raise JudgeError(f"--run-seed={args.run_seed} is none of the record: choose from {seeds_named(seeds)}")
    return args.run_seed or seeds[0]


def failing_line(checks: Sequence[Check]) -> str:
    names = dict.fromkeys(check.name for check in checks if not check.ok)
    return f"FAILS {len(names)} of {counted(len(checks), 'check')}: {', '.join(names)}."


def passing_line(submission: Submission, reviews: Sequence[Review], just_now: Review | None = None) -> str:
    """How far a record is confirmed that passes every check.

    `reviews` are those of others, `just_now` is what was measured before this line is printed.
    """
    sentences = ["PASSES the static checks: files, logs and figures agree."]
    if just_now is not None:
        sentences = [f"PASSES: {confirmation_text(just_now, submission)}."]

    dispute = open_dispute(submission, reviews)
    if dispute is not None:
        sentences.append(f"{dispute.reviewer} objects: {dispute.note or 'no reason is given'}.")

    earlier = confirmations(submission, reviews)
    for review in earlier:
        text = confirmation_text(review, submission)
        sentences.append(f"{text[0].upper()}{text[1:]} ({review.reviewer}, {review.date}).")

    kinds = {review.kind for review in earlier}
    if just_now is not None:
        kinds.add(just_now.kind)
    open_questions = []
    if "rescored" not in kinds:
        open_questions.append("scored its artifact (add --rescore)")
    if "reproduced" not in kinds:
        open_questions.append("trained it again (add --rerun)")
    if open_questions:
        sentences.append(f"Nobody has yet {' or '.join(open_questions)}.")
    return " ".join(sentences)


def confirmation_text(review: Review, submission: Submission) -> str:
    """the artifact of seed 1 was scored again: val_bpb 2.0960, 2.0960 is claimed"""
    if review.kind == "rescored":
        deed = f"the artifact of seed {review.seed} was scored again"
    else:
        deed = f"seed {review.seed} was trained again"
    if review.val_bpb is None:
        return deed
    found = f"{review.val_bpb:.4f}"
    if review.val_bpb_interval:
        found += f" +- {review.val_bpb_interval:.4f} from a sample"
    claim = f"{submission.seed_results[review.seed].val_bpb:.4f}"
    return f"{deed}: val_bpb {found}, {'as claimed' if found == claim else f'and {claim} is claimed'}"


def sign(folder: Path, review: Review, checks: Sequence[Check]) -> Check:
    """Add the review to the record's reviews.json, if nothing speaks against it."""
    # Imported only here, because it does not exist on Windows, where the static checks work.
    from sandbox import isolation

    if review.val_bpb is None or not all(check.ok for check in checks):
        return Check("signed", False, "no review was added, because a check fails")
    if isolation() != "namespaces":
        return Check("signed", False, "no review was added, because nothing kept its code from the network and files")
    interval = review.val_bpb_interval or 0.0
    if interval > MAX_SIGNED_INTERVAL:
        reason = f"its score is known to +- {interval:.4f}, and a review needs {MAX_SIGNED_INTERVAL}"
        return Check("signed", False, f"no review was added: {reason}. Raise --sample")
    add_review(folder, review)
    return Check("signed", True, f"a review by {review.reviewer} was added to reviews.json: commit it")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--rescore", action="store_true", help="score the artifact again")
    mode.add_argument("--rerun", action="store_true", help="train again, then score")
    parser.add_argument("--data", type=Path, help="folder of shards with the text that was scored")
    parser.add_argument("--tokenizer", type=Path, help="default: the one that manifest.json of --data names")
    parser.add_argument("--artifact", type=Path, help="default: the one in the folder")
    parser.add_argument("--documents", type=Path, help="the text itself, .jsonl, to count its bytes")
    parser.add_argument("--unseen", type=Path, help="folder of shards with another text of the same source")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="documents to score (class B: the first N)")
    parser.add_argument("--seed", type=int, help="of the sample and of the secret places; default: a new one")
    parser.add_argument("--run-seed", default="", help="seed for --rerun; default: the first of the record")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that an answer may take")
    parser.add_argument("--total-timeout", type=float, default=21_600.0, help="seconds that all answers may take")
    parser.add_argument("--train-timeout", type=float, help="seconds for --rerun; default: 1800 + twice its own limit")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of address space for the record's code")
    parser.add_argument(
        "--without-walls",
        action="store_true",
        help="run the record's code where the sandbox has no walls, and trust it",
    )
    parser.add_argument("--sign", default="", metavar="NAME", help="add what was found to reviews.json")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    args = parser.parse_args(argv)
    try:
        if not args.folder.is_dir():
            raise JudgeError(f"{args.folder} is not a folder: name that of a record, records/TRACK/FOLDER")
        refuse_published(args.folder)
        outcome = verify(args)
    except JudgeError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2

    if args.json:
        checks = [check._asdict() for check in outcome.checks]
        print(json.dumps({"ok": outcome.ok, "checks": checks, "closing": outcome.closing}, indent=1))
    else:
        for check in outcome.checks:
            print("ok  " if check.ok else "FAIL", printable(f"{check.name}: {check.reason}"))
        print(printable(outcome.closing))
    return 0 if outcome.ok else 1


def printable(text: str) -> str:
    """One line. It may quote the record, which must neither add lines of its own nor control the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def refuse_published(folder: Path) -> None:
    """JudgeError for a folder of the published challenge, which has another layout."""
    if is_published(folder):
        raise JudgeError(
            f"{folder} is a submission of the published challenge, not a record of this project: "
            f"see what it holds with python tools/submission.py import {folder}"
        )


if __name__ == "__main__":
    sys.exit(main())
