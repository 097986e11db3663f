"""Says whether a record can be trusted, one line per check, and exits with 0 if all of them pass.

    python tools/verify.py records/TRACK/FOLDER              from its files alone, in a second
    python tools/verify.py FOLDER --rescore                  scores its artifact again; no network, none of its own sums
    python tools/verify.py FOLDER --rescore --sample 200     the same for 200 documents, with an interval
    python tools/verify.py FOLDER --rerun --data DATA        trains again from its script, and scores what comes out

The text is that of the record's own data/, or of --data with --tokenizer. --documents names the source of a text whose
tokenizer is not lossless; --unseen another text of the same source: what was trained on one is better there than here.
--json prints the checks as JSON. --sign NAME adds what --rescore or --rerun found to the record's reviews.json.

Run it as an ordinary user, whom the kernel's limits hold. The causal checks ask again at places at random and at those
where the record knew more than a bigram model: a leak of the whole target at one place in 1,000 is found nearly always,
at one in 10,000 in two cases of three.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import datetime
import difflib
import functools
import io
import json
import math
import os
import platform
import re
import sys
import tempfile
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import record as sub
from record import ROOT, Check, verdict
from significance import below

sys.path.append(str(ROOT / "data"))
from shards import read_shard

if TYPE_CHECKING:  # it imports torch, which takes longer than all static checks together
    import judge

SAME_SCORE = 0.001  # bits per byte between machines; half of what a record has to gain
RERUN_SCORE = 0.01  # between two trainings on machines of one kind, or five deviations of the seeds, but at most
MOST_RERUN_SCORE = 0.02
WIDEST_INTERVAL, WIDEST_SIGNED = 0.1, 0.01  # half width at 95 % of a sample: to be compared, to be a review
DATA_FILE = re.compile(r"fineweb_val_(bytes_)?\d{6}\.bin|manifest\.json|tokenizer\.model")
MAX_TEXT_BYTES = 2**24
UNSEEN_GAP = 0.02  # bits per byte that a text may be easier than another of its source, beyond chance

# ----------------------------------------------------------------------------------------------------------------------
# Checks of the files alone
# ----------------------------------------------------------------------------------------------------------------------


def static_checks(folder: Path) -> list[Check]:
    """Everything that the files of a record tell by themselves."""
    folder = folder.resolve()
    checks = [check_files(folder)]
    try:
        submission = sub.load_submission(folder)
    except ValueError as error:
        return [*checks, Check("schema", False, f"{error}")]
    checks.append(Check("schema", True, f"submission.json is of version {submission.schema_version}"))
    checks += [check_track(folder, submission), *check_source(folder, submission)]
    try:
        runs = {seed: sub.read_json(sub.run_path(folder, seed)) for seed in submission.seed_results}
        logs = {seed: sub.parse_log(read_text(sub.log_path(folder, seed))) for seed in submission.seed_results}
    except (ValueError, OSError) as error:
        return [*checks, Check("logs", False, f"{error}")]
    checks += [check_summary(folder, submission, runs), check_logs(submission, logs, runs)]
    checks += [check_seeds(folder, submission), check_bytes(folder, submission), check_clock(submission, logs)]
    checks.append(check_targets(submission))
    checks += [check_implied_bytes(submission), check_data(folder, submission), check_lineage(folder, submission)]
    return [*checks, check_reviews(folder, submission)]


def read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, more than a log or a script: cut it")
    return path.read_text(encoding="utf-8", errors="replace")


def check_files(folder: Path) -> Check:
    wanted = ("README.md", "submission.json", sub.script_path(folder).name)
    wrong = [f"{name} is missing" for name in wanted if not (folder / name).is_file()]
    if not sub.FOLDER_NAME.fullmatch(folder.name):
        wrong.append(f"the folder's name {folder.name!r} is not YYYY-MM-DD_Name")
    data = sub.data_path(folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_symlink() or p.is_file()):
        ours = path in (sub.script_path(folder), sub.artifact_path(folder))
        known = ours or (path.parent == folder and path.suffix in (".md", ".json", ".log", ".svg", ".png"))
        if path.is_symlink():
            wrong.append(f"{path.relative_to(folder)} is a link")
        elif not known and not (path.parent == data and DATA_FILE.fullmatch(path.name)):
            wrong.append(f"{path.relative_to(folder)} does not belong in a record: all code is in its script")
    more = [f"and {len(wrong) - 6} more"] if len(wrong) > 6 else []
    return verdict("files", wrong[:6] + more, "all there, and nothing else")


def check_track(folder: Path, s: sub.Submission) -> Check:
    """Track, rules, date, hardware, and what only some tracks ask for."""
    version, tracks = sub.load_tracks()
    track = tracks.get(s.track)
    if track is None:
        return Check("track", False, f"{s.track!r} is none of {', '.join(tracks)}")
    wrong = [] if folder.parent.name == s.track else [f"it lies in {folder.parent.name} and says {s.track}"]
    if not 1 <= s.rules_version <= version:
        wrong.append(f"rules_version {s.rules_version} is none of 1 to {version}")
    if not folder.name.startswith(s.date):
        wrong.append(f"the folder's date is not {s.date}")
    if track.device not in s.hardware:
        wrong.append(f"the hardware is {s.hardware}, the track wants {track.device}")
    if track.world_size and not s.hardware.startswith(f"{track.world_size}x "):
        wrong.append(f"the hardware is {s.hardware}, the track wants {track.world_size} of them")
    if track.max_parameters and s.model_params > track.max_parameters:
        wrong.append(f"{s.model_params} parameters, more than {track.max_parameters}")
    context = s.settings.get("eval_seq_len") or s.settings.get("train_seq_len") or 0
    if track.min_context_tokens and not (isinstance(context, int) and context >= track.min_context_tokens):
        wrong.append(f"a context of {context} tokens, fewer than {track.min_context_tokens}")
    if track.licences and s.licence not in track.licences:
        wrong.append(f"licence {s.licence!r} is none of {', '.join(track.licences)}")
    wrong += [f"benchmark {name} is missing" for name in track.benchmarks if name not in s.benchmarks]
    if track.text and not sub.text_named(track.text).has_size(s.val_documents, s.val_bytes):
        wrong.append(f"it was scored on {s.val_documents} documents of {s.val_bytes} bytes, not on {track.text}")
    if track.target_val_bpb:
        p = below(track.target_val_bpb, s.values("val_bpb"))
        if p >= track.p_value:
            wrong.append(
                f"val_bpb {s.val_bpb:.4f} is below {track.target_val_bpb} at p = {p:.2g}: p < {track.p_value} is wanted"
            )
    if track.max_train_tokens and s.train_tokens > track.max_train_tokens:
        wrong.append(f"{s.train_tokens} training tokens, more than {track.max_train_tokens}")
    return verdict("track", wrong, f"{s.track}, rules {s.rules_version}, class {s.predictor_class}, {s.hardware}")


# What a script may import: these packages and modules count no bytes.
PACKAGES = {"numpy", "torch", "sentencepiece", "triton", "flash_attn", "flash_attn_interface", "brotli"}
PACKAGES |= {"zstandard"}
MODULES = {"__future__", "abc", "argparse", "bisect", "bz2", "collections", "contextlib", "copy"}
MODULES |= {"dataclasses", "datetime", "enum", "functools", "gc", "glob", "gzip", "hashlib", "heapq"}
MODULES |= {"io", "itertools", "json", "lzma", "math", "operator", "os", "pathlib", "platform", "queue"}
MODULES |= {"random", "re", "shutil", "statistics", "string", "struct", "sys", "sysconfig", "textwrap"}
MODULES |= {"threading", "time", "typing", "uuid", "warnings", "zlib"}
NETWORK_MODULES = {"socket", "socketserver", "ssl", "urllib", "http", "ftplib", "smtplib", "poplib", "imaplib"}
NETWORK_MODULES |= {"asyncio", "xmlrpc", "requests", "httpx", "aiohttp", "huggingface_hub", "datasets", "wandb"}
HIDING_NAMES = {"exec", "eval", "compile", "__import__", "globals", "locals", "breakpoint"}  # data run as code
HIDING_NAMES |= {"__builtins__", "__loader__", "__spec__"}
HIDING_ATTRIBUTES = {"ctypeslib", "hub", "cpp_extension", "package", "serialization", "jit", "load_library"}
HIDING_ATTRIBUTES |= {"multiprocessing", "TCPStore", "rpc", "_C", "popen", "fork", "forkpty", "fromhex"}
HIDING_ATTRIBUTES |= {"__dict__", "__builtins__", "__globals__", "__subclasses__", "__code__", "__loader__", "__spec__"}
PROGRAMS = re.compile(r"(posix_)?(exec|spawn)[lv]?p?e?")  # functions of os that start one
OWNED = {("sys", "modules"), ("os", "system"), *((module, "load") for module in ("torch", "numpy", "np"))}
LONG_LITERAL, LONG_DOCSTRING, ALL_LITERALS = 1500, 4000, 40_000  # characters; data belong in the artifact
LONG_LINE = 300


def check_source(folder: Path, s: sub.Submission) -> list[Check]:
    """Whether people can read the script: it runs what it shows, and nothing that arrives in another way."""
    path = sub.script_path(folder)
    try:
        data = path.read_bytes()
        source = data.decode()
        coding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        if coding != "utf-8":
            raise ValueError(f"it declares the coding {coding!r}, in which a comment may be code: use UTF-8")
        tree = ast.parse(data)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        return [Check("source", False, f"{path.name} is no Python source: {error!s:.200}")]
    hidden, network = [], []
    if sub.sha256(data) != s.code_sha256:
        hidden.append(f"{path.name} is not the script that ran: its sha256 is not code_sha256")
    for line, name in imported(tree):
        if name in NETWORK_MODULES:
            network.append(f"line {line} imports {name}")
        elif name not in PACKAGES | MODULES:
            hidden.append(f"line {line} imports {name}, which a record may not")
    hidden += [f"line {line} {fault}" for line, fault in sorted({*hiding(tree), *literals(tree)})]
    long = [i for i, text in enumerate(source.splitlines(), 1) if len(text) > LONG_LINE]
    hidden += [f"line {long[0]} has more than {LONG_LINE} characters"] if long else []
    lines = source.count("\n")
    return [
        verdict("source", hidden[:6], f"{lines} lines that people can read, sha256 as it ran"),
        verdict("no_network", network[:6], "the script imports nothing that speaks to a network"),
    ]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level module of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "a relative name").split(".")[0]


def hiding(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that run code which is not on the page, or could. A help to readers; the walls are those of the sandbox."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    modules = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    owners = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named: list[tuple[int, str, str]] = []  # line, owner, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named += [(node.lineno, "", alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named += [(node.lineno, (node.module or "").split(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute):
            named.append((node.lineno, root_name(node), node.attr))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            if not all(isinstance(name, ast.Constant | ast.Name | ast.Attribute) for name in node.args[1:2]):
                yield node.lineno, "makes up the name of an attribute"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            if node.id in HIDING_NAMES:
                yield node.lineno, f"uses {node.id}"
            if node.id in modules and id(node) not in owners:
                yield node.lineno, f"uses the module {node.id} as a value, so that nobody sees what is taken from it"
    for line, owner, name in named:
        hides = PROGRAMS.fullmatch(name) or (owner, name) in OWNED
        if hides or not HIDING_ATTRIBUTES.isdisjoint(name.split(".")):
            yield line, f"uses {owner}{'.' * bool(owner)}{name}"


def root_name(node: ast.AST) -> str:
    """torch of torch.nn.functional"""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings and bytes that are too long to be words."""
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings, or as good
    total = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
            size, words = len(node.value), id(node) in documented
            total += 0 if words else size
            if size > (LONG_DOCSTRING if words else LONG_LITERAL):
                yield node.lineno, f"has a literal of {size} characters: data belong in the artifact"
    if total > ALL_LITERALS:
        yield 1, f"and others have literals of {total} characters: data belong in the artifact"


def check_summary(folder: Path, s: sub.Submission, runs: Mapping[str, Any]) -> Check:
    """Whether submission.json says what follows from the JSON of its runs."""
    try:
        made = sub.summarize(list(runs.values()), sub.script_path(folder).read_bytes(), s.about)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return Check("summary", False, f"no submission follows from the JSON of its runs: {error!r:.300}")
    ours, theirs = dataclasses.asdict(made), dataclasses.asdict(s)
    wrong = [key for key in ours if key != "benchmarks" and not same(ours[key], theirs[key])]
    told = [f"{key} is {theirs[key]!r:.60}, its runs say {ours[key]!r:.60}" for key in wrong]
    return verdict("summary", told[:6], f"means, bytes and settings follow from {len(runs)} runs")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


PRINTED = {"seed", "code_sha256", "artifact_sha256", "bytes_code", "bytes_artifact", "bytes_total", "val_bytes"}
PRINTED |= {"val_tokens", "val_documents", "val_accounting", "val_shards_sha256", "val_text_sha256", "train_tokens"}
PRINTED |= {"model_params", "device", "world_size", "compute_dtype", "python", "torch", "date", "judge_version"}


def check_logs(s: sub.Submission, logs: Mapping[str, sub.RunLog], runs: Mapping[str, Any]) -> Check:
    """Whether the log of every seed tells what the JSON of its run tells, to the digits it prints: the score, every
    value and every phase's seconds that stand in both, and the settings it was given."""
    wrong = []
    for seed, log in logs.items():
        result, run = s.seed_results[seed], runs[seed]
        if log.final is None:
            wrong.append(f"the log of seed {seed} has no final score")
            continue
        name, loss, bpb = log.final
        if abs(loss - result.val_loss) > 1e-8 or abs(bpb - result.val_bpb) > 1e-8:
            wrong.append(f"seed {seed}: {name} says {loss} and {bpb}, the JSON {result.val_loss} and {result.val_bpb}")
        given = dict(item.split("=", 1) for item in log.values.get("settings", "").split(",") if "=" in item)
        told = {name.lower(): text for name, text in given.items() if name.lower() not in sub.PER_RUN}
        told = {**log.values, **told}
        expected = PRINTED | {key for key in run if key.startswith("seconds_")}
        for key in sorted(expected | (run.keys() & told.keys()) - {"val_loss", "val_bpb", "eval_stride"}):
            found = told.get(key, "nothing").rstrip(")")
            if not as_printed(run.get(key), found):
                wrong.append(f"seed {seed}: the log says {key} {found:.60}, the JSON {run.get(key)!s:.60}")
    return verdict("logs", wrong[:6], f"{len(logs)} logs agree with the JSON")


def as_printed(value: Any, text: str) -> bool:
    """Whether a log may print a value of the JSON so: a number to the digits it has, true and false as 1 and 0."""
    if isinstance(value, bool):
        return text in (str(value), str(int(value)))
    if isinstance(value, float) and re.fullmatch(r"-?\d+\.\d+", text):
        return abs(float(text) - value) <= 0.51 * 10.0 ** -len(text.partition(".")[2])
    return text == str(value)


def check_seeds(folder: Path, s: sub.Submission) -> Check:
    track = sub.track_of(s)
    least = track.min_seeds if track else 1
    wrong = [] if len(s.seed_results) >= least else [f"{len(s.seed_results)} seeds, the track wants {least}"]
    lying = {path.stem.removeprefix("train_seed") for path in folder.glob("train_seed*.*")}
    wrong += [
        f"there is a run of seed {seed} that submission.json leaves out"
        for seed in sorted(lying - s.seed_results.keys())
    ]
    return verdict("seeds", wrong, f"{', '.join(s.seed_results)}: every run in the folder is counted")


def check_bytes(folder: Path, s: sub.Submission) -> Check:
    """Recounts the sizes from the files."""
    track = sub.track_of(s)
    cap = track.max_total_bytes if track else None
    script, artifact = sub.script_path(folder), sub.artifact_path(folder)
    wrong = []
    if script.is_file() and script.stat().st_size != s.bytes_code:
        wrong.append(f"{script.name} has {script.stat().st_size} bytes, not {s.bytes_code}")
    for seed, result in s.seed_results.items():
        if result.bytes_total != result.bytes_artifact + s.bytes_code:
            wrong.append(
                f"seed {seed}: {result.bytes_total} bytes in all, not {result.bytes_artifact} + {s.bytes_code}"
            )
        if cap and result.bytes_total > cap:
            wrong.append(f"seed {seed}: {result.bytes_total} bytes in all, more than {cap}")
    held = "no artifact is in the folder"
    if artifact is not None:
        size, digest = artifact.stat().st_size, sub.sha256(artifact.read_bytes())
        owners = [seed for seed, r in s.seed_results.items() if (r.artifact_sha256, r.bytes_artifact) == (digest, size)]
        held = f"{artifact.name} is that of seed {', '.join(owners)}"
        if not owners:
            wrong.append(f"{artifact.name} ({size} bytes, sha256 {digest[:12]}...) is of none of its seeds")
    return verdict("bytes", wrong[:6], f"at most {s.bytes_total} of {cap or 'any number of'} bytes; {held}")


def check_clock(s: sub.Submission, logs: Mapping[str, sub.RunLog]) -> Check:
    """Whether the ledger respects the track's limits, and has the time that the log trains for."""
    track = sub.track_of(s)
    wrong = []
    for seed, result in s.seed_results.items():
        ledger = result.ledger_seconds
        for what, seconds, cap in (
            ("training", result.train_seconds, track.max_train_seconds if track else None),
            ("evaluation", result.eval_seconds, track.max_eval_seconds if track else None),
        ):
            if cap and seconds > cap:
                wrong.append(f"seed {seed}: {seconds:.2f} s of {what}, more than {cap:g}")
        times = [seconds for _, seconds, _ in logs[seed].train_curve + logs[seed].val_curve if not math.isnan(seconds)]
        if times and max(times) > ledger.get("train", 0.0) + 0.5:
            wrong.append(f"seed {seed}: the log trains for {max(times):.1f} s, the ledger for {ledger.get('train')}")
        if min(ledger.values(), default=0.0) < 0:
            wrong.append(f"seed {seed}: the ledger has a phase below 0 s")
    longest = max((r.train_seconds for r in s.seed_results.values()), default=0.0)
    return verdict("clock", wrong[:6], f"at most {longest:.1f} s of training, calibration included")


def check_targets(s: sub.Submission) -> Check:
    """Every token of the split but the first is a target, once."""
    wrong = [
        f"seed {seed}: {r.scored_tokens} targets and {r.scored_bytes} bytes scored"
        for seed, r in s.seed_results.items()
        if (r.scored_tokens, r.scored_bytes) != (s.val_tokens - 1, s.val_bytes)
    ]
    split = f"{s.val_tokens} tokens of {s.val_bytes} bytes"
    return verdict("targets", [f"{text}, the split has {split}" for text in wrong[:6]], f"each of {split}, once")


def check_implied_bytes(s: sub.Submission) -> Check:
    """val_loss / ln 2 * targets / val_bpb are the bytes that the score was divided by."""
    wrong = []
    for seed, r in s.seed_results.items():
        real = r.val_bpb > 0 and max(abs(r.scored_tokens), abs(s.val_bytes)) < 2**63  # else it may overflow
        implied = r.val_loss / math.log(2) * r.scored_tokens / r.val_bpb if real else math.inf
        if not real or not math.isclose(implied, s.val_bytes, rel_tol=1e-6):
            wrong.append(f"seed {seed}: val_loss and val_bpb imply {implied:.0f} bytes, the split has {s.val_bytes}")
    known = sub.known_text(s.val_documents, s.val_text_sha256)
    if known and not known.has_size(s.val_documents, s.val_bytes):
        wrong.append(f"{known.name} has {known.bytes} bytes in {known.documents} documents, not {s.val_bytes}")
    return verdict("implied_bytes", wrong[:6], f"{s.val_bytes} bytes, {known.name if known else 'a text not listed'}")


def check_data(folder: Path, s: sub.Submission) -> Check:
    """Whether validation shards that lie in the folder are those that were scored."""
    data = sub.data_path(folder)
    if not data.is_dir():
        return Check("data", True, "the text is not in the folder: --rescore needs --data")
    import numpy as np

    def tokens(pattern: str) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.uint16), *(read_shard(path) for path in sorted(data.glob(pattern)))])

    try:
        ids, sidecar = tokens("fineweb_val_[0-9]*.bin"), tokens("fineweb_val_bytes_*.bin")
    except (ValueError, OSError) as error:
        return Check("data", False, f"{error}")
    tokenizer = data / "tokenizer.model"
    facts = {
        "val_tokens": (len(ids), s.val_tokens),
        "val_shards_sha256": (sub.sha256(ids.tobytes()), s.val_shards_sha256),
        "val_bytes": (int(sidecar[1:].sum(dtype=np.int64)) if len(sidecar) else s.val_bytes, s.val_bytes),
        "tokenizer_sha256": (sub.sha256(tokenizer.read_bytes()) if tokenizer.is_file() else "none", s.tokenizer_sha256),
    }
    wrong = [f"{name} of data/ is {found}, not {told}" for name, (found, told) in facts.items() if found != told]
    return verdict("data", wrong, "the shards and the tokenizer in data/ are those that were scored")


def check_lineage(folder: Path, s: sub.Submission) -> Check:
    """What the script changes in that of the record it builds on."""
    if not s.base:
        return Check("lineage", True, "it names no base")
    base = folder.parents[1] / s.base
    if not re.fullmatch(r"track_\w+/[^/]+", s.base) or not sub.script_path(base).is_file():
        return Check("lineage", False, f"base {s.base!r} is no record: name it <track>/<folder>")
    old, new = (read_text(sub.script_path(path)).splitlines() for path in (base, folder))
    lines = [line[:1] for line in difflib.unified_diff(old, new, n=0, lineterm="") if line[:3] not in ("---", "+++")]
    found = f"{lines.count('+')} lines more and {lines.count('-')} less than {s.base}"
    try:
        before = sub.load_submission(base).settings
    except ValueError as error:
        return Check("lineage", False, f"base {s.base}: {error}")
    names = sorted(name for name in before.keys() | s.settings.keys() if before.get(name) != s.settings.get(name))
    changed = [f"{name.upper()}={s.settings.get(name, 'gone')}" for name in names]
    return Check("lineage", True, f"{found}; settings: {', '.join(changed) or 'the same'}")


def check_reviews(folder: Path, s: sub.Submission) -> Check:
    """Whether those who confirm a record are others than its author."""
    try:
        reviews = sub.load_reviews(folder)
    except ValueError as error:
        return Check("reviews", False, f"{error}")
    own = {s.author.casefold(), s.github_id.casefold()}
    wrong = [
        f"{r.date}: {r.kind} by its author" for r in reviews if r.kind != "disputed" and r.reviewer.casefold() in own
    ]
    return verdict("reviews", wrong[:6], f"{len(reviews)}, none of them by the author")


# ----------------------------------------------------------------------------------------------------------------------
# Scoring the artifact again
# ----------------------------------------------------------------------------------------------------------------------


def rescore(
    script: Path, artifact: Path, s: sub.Submission, args: argparse.Namespace
) -> tuple[list[Check], judge.Scored | None]:
    """Score an artifact with the record's script in a process of its own."""
    import judge
    import numpy as np
    from sandbox import Limits, isolation

    data, tokenizer = args.data, args.tokenizer
    rng = np.random.default_rng(args.seed)
    limits = Limits(memory_bytes=int(args.memory * 2**30))
    checks = [Check("isolation", True, isolation())]
    violations: dict[str, str] = {}
    fresh = functools.partial(judge.Record, script, artifact, s.predictor_class, limits, args.timeout, violations)
    scored = None
    try:
        with fresh() as record:
            config = record.config
            checks.append(check_config(config, s))
            split = judge.load_split(data, tokenizer, config.vocab_size, config.bos_id)
            own = data == sub.data_path(args.folder.resolve())
            checks += [check_identity(split.identity, s), judge.check_tokenizer(tokenizer)]
            checks.append(judge.recount(split, tokenizer, args.documents, config.bos_id, own))
            rounding = judge.ROUNDING.get(str(s.settings.get("compute_dtype")), judge.ROUNDING["bfloat16"])
            if s.predictor_class == "A":
                scored, done = judge.score_fixed(record, split, args.sample, rng)
                if args.unseen:
                    checks.append(check_unseen(record, scored, tokenizer, args, rng))
            else:
                with fresh() as twin:
                    scored, more = judge.score_adaptive(record, twin, split, args.sample, rng, rounding)
                checks += more
        if s.predictor_class == "A":
            with fresh() as record, fresh() if config.document_masks else contextlib.nullcontext() as other:
                checks += judge.probe_fixed(record, other, done, rounding)
    except judge.RecordError as error:
        checks.append(Check(error.check, False, str(error)))
    except (ValueError, OSError) as error:
        checks.append(Check("text", False, f"{error}"))
    checks += [Check(name, False, f"the script tried {detail}") for name, detail in sorted(violations.items())]
    return checks, scored


def seed_of(s: sub.Submission, artifact: Path) -> str:
    """The seed whose run wrote the artifact, or an empty name."""
    digest = sub.sha256(artifact.read_bytes())
    return next((seed for seed, result in s.seed_results.items() if result.artifact_sha256 == digest), "")


def check_config(config: Any, s: sub.Submission) -> Check:
    """Whether the windows that the artifact asks for are those of the settings."""
    from serve import JUDGED

    told = {name: s.settings[name] for name in JUDGED if name in s.settings}
    wrong = [
        f"{name} is {getattr(config, name)}, its settings say {v}"
        for name, v in told.items()
        if getattr(config, name) != v
    ]
    return verdict("load", wrong, f"context {config.eval_seq_len}, windows by {config.eval_method}")


def check_identity(found: Mapping[str, Any], s: sub.Submission) -> Check:
    keys = ("val_text_sha256", "val_documents", "val_bytes", "val_accounting", "val_tokens", "val_shards_sha256")
    wrong = [
        f"{key} is {found[key]}, the record was scored on {getattr(s, key)}"
        for key in keys
        if found[key] != getattr(s, key)
    ]
    return verdict("text", wrong, "the text and its tokens are those of the record")


def check_score(name: str, scored: judge.Scored, claim: float, margin: float) -> Check:
    """Whether a score is what was claimed; one that was trained again (rerun) may be better."""
    if scored.prefix and not scored.whole:
        first = f"val_bpb {scored.bpb:.6f} of the first {len(scored.nats)} documents (partial:{scored.targets}_targets)"
        return Check(
            name, True, f"{first}; the claim is not compared, an adaptive predictor gets better along the text"
        )
    if scored.interval > WIDEST_INTERVAL:
        return Check(name, False, f"+- {scored.interval:.3f} from {len(scored.nats)} units says little: --sample more")
    wide = margin + 1.5 * scored.interval  # 3 deviations
    part = f"{scored.targets} targets" if scored.whole else f"partial:{len(scored.nats)}_of_{scored.n_units}_units"
    spread = "" if scored.whole else f" +- {scored.interval:.4f}"
    worse = scored.bpb - claim
    reason = f"val_bpb {scored.bpb:.6f}{spread} ({part}), the record says {claim:.6f}; at most {wide:.4f} apart"
    return Check(name, worse <= wide and (name == "rerun" or -worse <= wide), reason)


def check_unseen(
    record: judge.Record, seen: judge.Scored, tokenizer: Path, args: argparse.Namespace, rng: Any
) -> Check:
    """Whether the validation text is easier than another one of its source, as it is for who trained on it."""
    import judge

    split = judge.load_split(args.unseen, tokenizer, record.config.vocab_size, record.config.bos_id)
    other, _ = judge.score_fixed(record, split, args.sample, rng)
    gap, chance = other.bpb - seen.bpb, 1.5 * math.hypot(other.interval_of_source, seen.interval_of_source)
    reason = (
        f"{other.bpb:.4f} on {args.unseen.name}, {gap:+.4f} from the text that was scored; chance makes {chance:.4f}"
    )
    return Check("unseen", gap <= chance + UNSEEN_GAP, reason)


# ----------------------------------------------------------------------------------------------------------------------
# Training again
# ----------------------------------------------------------------------------------------------------------------------


def rerun(folder: Path, s: sub.Submission, args: argparse.Namespace) -> tuple[list[Check], judge.Scored | None]:
    """Train from the script on a machine that has never seen the validation text, then score what it wrote."""
    import judge
    from sandbox import Limits, isolation

    if isolation() != "namespaces":
        reason = f"the validation text cannot be hidden from the script ({isolation()})"
        return [Check("isolation", False, reason)], None
    if " cpu:" not in s.hardware:
        reason = f"the run was made on {s.hardware}; here it would train on the CPU, and say nothing about the claim"
        return [Check("hardware", False, reason)], None
    track = sub.track_of(s)
    with tempfile.TemporaryDirectory(prefix="rerun") as name:
        out = Path(name, "out")
        out.mkdir()
        training = judge.Training(sub.script_path(folder), s.settings, args.run_seed, args.data, args.tokenizer)
        limits = Limits(memory_bytes=int(args.memory * 2**30), file_bytes=2**28, open_files=512)
        try:
            most = args.train_timeout or 1800 + 2 * float(s.settings.get("max_wallclock_seconds") or 0)
            judge.train_again(training, out, limits, most)
            if any(path.is_symlink() for path in out.iterdir()):
                raise ValueError("it left links, which would be followed out of the sandbox")
            artifact = next(path for path in sorted(out.glob("final_model.*.ptz")) if path.is_file())
            again = sub.seed_result(sub.read_json(out / "rerun.json"))
        except judge.RecordError as error:
            return [Check(error.check, False, str(error))], None
        except (ValueError, KeyError, TypeError, OSError, StopIteration) as error:
            return [Check("train", False, f"it cannot be trained again, or left no artifact: {error!r:.300}")], None
        size, cap = artifact.stat().st_size + s.bytes_code, track.max_total_bytes if track else None
        allowed = track.max_train_seconds if track else None
        late = allowed is not None and again.train_seconds > allowed
        spent = f"{size} bytes in all, {again.train_seconds:.1f} s of training"
        fits = not late and (cap is None or size <= cap)
        trained = Check("train", fits, f"seed {args.run_seed}, validation text hidden: {spent}")
        checks, scored = rescore(sub.script_path(folder), artifact, s, args)
        if scored is not None:
            margin = min(max(RERUN_SCORE, 5 * (s.val_bpb_std or 0.0)), MOST_RERUN_SCORE)
            checks.append(check_score("rerun", scored, s.val_bpb, margin))
        return [trained, *checks], scored


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def sign(
    folder: Path, s: sub.Submission, checks: Sequence[Check], scored: judge.Scored | None, args: argparse.Namespace
) -> Check:
    """Add what was found to the record's reviews, if it is worth it."""
    import judge

    if scored is None or not all(check.ok for check in checks):
        return Check("signed", False, "no review was added: a check fails")
    if Check("isolation", True, "namespaces") not in checks:
        return Check("signed", False, "no review was added: the record's code was not behind walls")
    if scored.interval > WIDEST_SIGNED:
        why = f"its score is known to +- {scored.interval:.4f}, a review wants {WIDEST_SIGNED}: --sample more"
        return Check("signed", False, f"no review was added: {why}")
    review = sub.Review(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        reviewer=args.sign,
        kind="reproduced" if args.rerun else "rescored",
        code_sha256=s.code_sha256,
        seed=args.run_seed,
        val_bpb=scored.bpb,
        val_bpb_interval=None if scored.whole else scored.interval,
        judge_version=judge.tg.JUDGE_VERSION,
        hardware=f"{os.cpu_count()}x {platform.machine()}",
    )
    sub.add_review(folder, review)
    return Check("signed", True, f"a review by {args.sign} was added to reviews.json")


def verify(args: argparse.Namespace) -> list[Check]:
    folder: Path = args.folder.resolve()
    checks = static_checks(folder)
    if not (args.rescore or args.rerun) or not all(check.ok for check in checks):
        return checks  # code whose files do not hold together is not run
    s, artifact = sub.load_submission(folder), args.artifact or sub.artifact_path(folder)
    if artifact is not None and not artifact.is_file():
        return [*checks, Check("artifact", False, f"{artifact} does not exist")]
    if args.run_seed and not args.run_seed.isdecimal():
        return [*checks, Check("train", False, f"--run-seed {args.run_seed} is no number")]
    args.data = args.data or sub.data_path(folder)
    args.tokenizer = args.tokenizer or args.data / "tokenizer.model"
    if args.rerun:
        args.run_seed = args.run_seed or next(iter(s.seed_results))
        more, scored = rerun(folder, s, args)
    elif artifact is None:
        return [*checks, Check("artifact", False, "there is none in the folder: name it with --artifact")]
    else:
        args.run_seed = seed_of(s, artifact)
        if not args.run_seed:
            return [*checks, Check("artifact", False, f"{artifact.name} is of none of its seeds, by its sha256")]
        more, scored = rescore(sub.script_path(folder), artifact, s, args)
        if scored is not None:
            more.append(check_score("score", scored, s.seed_results[args.run_seed].val_bpb, SAME_SCORE))
    checks += more
    return [*checks, *([sign(folder, s, checks, scored, args)] if args.sign else [])]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rescore", action="store_true", help="score the artifact again")
    how.add_argument("--rerun", action="store_true", help="train again, then score")
    parser.add_argument("--data", type=Path, help="folder of shards with the text that was scored")
    parser.add_argument("--tokenizer", type=Path, help="default: tokenizer.model of --data")
    parser.add_argument("--artifact", type=Path, help="default: the one in the folder")
    parser.add_argument("--documents", type=Path, help="the text itself, .jsonl, to count its bytes")
    parser.add_argument("--unseen", type=Path, help="shards of another text of the same source")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="documents to score (class B: the first N)")
    parser.add_argument("--seed", type=int, help="of the sample and of the secret places; default: none can know")
    parser.add_argument("--run-seed", default="", help="for --rerun, of the record or a new one; default: its first")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for an answer")
    parser.add_argument("--train-timeout", type=float, help="seconds for a training; default: 1800 + twice its limit")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of address space for the record's code")
    parser.add_argument("--sign", default="", metavar="NAME", help="add what was found to reviews.json")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        print(f"error: {args.folder} is no folder", file=sys.stderr)
        return 1
    checks = verify(args)
    good = all(check.ok for check in checks)
    if args.json:
        print(json.dumps({"ok": good, "checks": [check._asdict() for check in checks]}, indent=1))
    else:
        for check in checks:
            line = f"{check.name}: {check.reason}"  # in the record's words: no line breaks, no codes for the terminal
            print("ok  " if check.ok else "FAIL", "".join(c if c.isprintable() else "?" for c in line))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
