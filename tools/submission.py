"""Make a submission from finished runs, and read those of others. The only file that knows a record's layout.

    python tools/submission.py new --track track_non_record_16mb --name MyIdea --author "Ada" --github-id ada \\
        --blurb "What is new, in one sentence."
    python tools/submission.py import FOLDER     what a folder in the style of the published challenge holds and lacks
    python tools/submission.py review FOLDER --kind disputed --reviewer NAME --note "Why."
    python tools/submission.py schema            the JSON Schema of submission.json (tools/submission.schema.json)

`new` takes the last run of logs/ and every other run there with the same script, settings, data and hardware: all seeds
that were run, not a choice. Where a seed was run more than once, --runs must name the runs. A record is a folder
records/<track>/<YYYY-MM-DD>_<Name>/ with

    submission.json          what is claimed (class Submission below)
    README.md                the same in words
    train_gpt.py             the script that ran, byte for byte
    train_seed<SEED>.log     the log of each run
    train_seed<SEED>.json    the settings and results that the run wrote
    final_model.*.ptz        with --artifact: one that still lies in the ARTIFACT_DIR of its run; that of the last run
                             if all runs wrote to the same folder
    data/                    with the artifact: validation shards, their bytes and manifest, and the tokenizer; only
                             for text that may be passed on
    reviews.json             what reviewers found (tools/verify.py --sign)
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import hashlib
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "records"
SCHEMA_FILE = Path(__file__).with_name("submission.schema.json")
FOLDER_NAME = re.compile(r"\d{4}-\d\d-\d\d_[A-Za-z0-9._+-]+")
PER_RUN = {"seed", "run_id", "out_dir", "artifact_dir", "eval_artifact", "data_path", "tokenizer_path"}  # may differ
ABOUT: tuple[str, ...] = ("name", "author", "github_id", "date", "track", "rules_version", "predictor_class", "base")
ABOUT += ("blurb", "licence", "benchmarks")
Words = Annotated[str, r"\S"]  # a text that is not blank
COUNTED = ("train", "average", "calibrate")  # phases inside the limit of the training time


@dataclass(frozen=True)
class SeedResult:
    """One run. Nats per token, bits per byte of the source text, bytes, seconds."""

    val_loss: float
    val_bpb: float
    pre_quant_val_loss: float  # of the trained weights, before they were quantized
    pre_quant_val_bpb: float
    steps: int
    train_seconds: float  # training and what else counts against its limit
    eval_seconds: float
    bytes_artifact: int
    bytes_total: int
    artifact_sha256: str
    scored_tokens: int
    scored_bytes: int
    ledger_seconds: dict[str, float]  # every phase of the run


@dataclass(frozen=True)
class Submission:
    """The contents of submission.json. Means are over all seeds, sizes in bytes are those of the largest run."""

    schema_version: int
    name: Words
    author: Words
    github_id: Words
    date: str  # YYYY-MM-DD
    track: str
    rules_version: int
    predictor_class: Literal["A", "B"]  # A: a fixed predictor; B: adapts to tokens that were scored
    base: str  # the record it builds on, <track>/<folder>, or empty
    blurb: Words
    licence: Words
    hardware: str  # 8x cuda:NVIDIA_H100_80GB_HBM3
    python: str
    torch: str
    code_sha256: str
    bytes_code: int
    bytes_artifact: int
    bytes_total: int
    model_params: int
    val_loss: float
    val_loss_std: float | None  # None: one seed has none
    val_bpb: float
    val_bpb_std: float | None
    pre_quant_val_bpb: float
    train_seconds: float
    judge_version: int
    val_accounting: Literal["sidecar", "pieces"]
    val_text_sha256: str
    val_shards_sha256: str
    val_tokens: int
    val_documents: int
    val_bytes: int
    tokenizer_sha256: str
    tokenizer_lossless: bool | None  # None: unknown
    train_dataset: str
    train_tokens: int
    settings: dict[str, Any]
    seed_results: dict[str, SeedResult]
    benchmarks: dict[str, float] = field(default_factory=dict)  # by name, where the track asks for them

    @property
    def text(self) -> tuple[str, str, int, int]:
        """What was scored: results with the same text are comparable, whatever the tokenizer.

        Counted by their pieces, tokenizers that normalise find different numbers of bytes in one text. A known text
        therefore goes by its true number of bytes.
        """
        known = known_split(self.val_documents, self.val_text_sha256)
        fits = known is not None and known.fits(self.val_documents, self.val_bytes)
        n_bytes = known.bytes if known and fits else self.val_bytes
        return self.val_accounting, self.val_text_sha256, self.val_documents, n_bytes

    @property
    def about(self) -> dict[str, Any]:
        """What the author states, and no run records."""
        return {name: getattr(self, name) for name in ABOUT}

    def values(self, key: str) -> list[float]:
        """One number per seed, in the order of the seeds."""
        return [float(getattr(result, key)) for _, result in sorted(self.seed_results.items())]


@dataclass(frozen=True)
class Review:
    """One entry of reviews.json: what a reviewer found."""

    date: str  # YYYY-MM-DD
    reviewer: str
    kind: Literal["rescored", "reproduced", "disputed", "settled"]  # settled: the disputes before it are answered
    code_sha256: str
    seed: str = ""  # of the run that was scored again, or trained
    val_bpb: float | None = None
    val_bpb_interval: float | None = None  # half width at 95 %, where a sample of the documents was scored
    judge_version: int | None = None
    hardware: str = ""
    note: str = ""


class Check(NamedTuple):
    """One line of tools/verify.py."""

    name: str
    ok: bool
    reason: str


@dataclass(frozen=True)
class Track:
    """The limits of a track, from records/tracks.json. None: no limit."""

    title: str
    rules: str
    rank_by: Literal["val_bpb", "train_seconds"]
    min_gain: float  # by which the best is to be beaten, in units of rank_by
    p_value: float  # of that gain, one-sided
    min_seeds: int = 1
    by_device: bool = False  # each kind of machine has a table of its own
    max_total_bytes: int | None = None
    max_train_seconds: float | None = None
    max_eval_seconds: float | None = None
    device: str = ""  # is part of the name of the device
    text: str = ""  # name of the validation text, in records/splits.json
    world_size: int | None = None
    target_val_bpb: float | None = None
    max_train_tokens: int | None = None
    max_parameters: int | None = None
    min_context_tokens: int | None = None
    licences: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()


def load_tracks() -> tuple[int, dict[str, Track]]:
    """The version of the rules, and the tracks by name."""
    rules = load_rules()
    return rules["rules_version"], {name: from_json(Track, track, name) for name, track in rules["tracks"].items()}


def track_of(submission: Submission) -> Track | None:
    """None for a track that records/tracks.json does not have."""
    return load_tracks()[1].get(submission.track)


def load_rules() -> Any:
    """records/tracks.json: the tracks, and the packages and modules that a script may import, which count no bytes."""
    return json.loads((RECORDS / "tracks.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Split:
    """A known validation text, from records/splits.json. One without a sha256 is recognised by its size alone."""

    name: str
    documents: int
    bytes: int
    tolerance: float  # relative, of the bytes: tokenizers normalise, and some scores drop a tail
    text_sha256: str = ""

    def fits(self, documents: int, n_bytes: int) -> bool:
        return documents == self.documents and abs(n_bytes - self.bytes) <= self.tolerance * self.bytes


def load_splits() -> list[Split]:
    rows = json.loads((RECORDS / "splits.json").read_text(encoding="utf-8"))
    return [from_json(Split, row, "splits.json") for row in rows]


def split_named(name: str) -> Split:
    return next(split for split in load_splits() if split.name == name)


def known_split(documents: int, text_sha256: str) -> Split | None:
    """The known text with this sha256 or, if no sha256 is on file for it, with this number of documents."""
    wanted = (text_sha256, (text_sha256, documents))
    fits = (split for split in load_splits() if (split.text_sha256 or ("unknown", split.documents)) in wanted)
    return next(fits, None)


# ----------------------------------------------------------------------------------------------------------------------
# Dataclasses from and to JSON
# ----------------------------------------------------------------------------------------------------------------------


def faults(value: Any, kind: Any, where: str) -> Iterable[str]:
    """Every reason why a JSON value does not fit a type, with `where` as its name.

    Types are made of dataclasses, dicts, tuples, literals, unions, annotated texts and scalars.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            yield f"{where} is {value!r:.60}, not an object"
            return
        hints = typing.get_type_hints(kind, include_extras=True)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        for name in sorted(value.keys() - fields.keys()):
            yield f"{where}.{name} is an unknown key: remove it, or move it to README.md"
        for name, f in fields.items():
            optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
            if name in value:
                yield from faults(value[name], hints[name], f"{where}.{name}")
            elif not optional:
                yield f"{where}.{name} is missing"
    elif origin is Annotated:
        yield from faults(value, parts[0], where)
        if isinstance(value, str) and not re.search(parts[1], value):
            yield f"{where} is {value!r:.60}, blank: fill it in"
    elif origin is types.UnionType:
        if all(any(True for _ in faults(value, part, where)) for part in parts):
            yield f"{where} is {value!r:.60}, not {' or '.join(map(kind_name, parts))}"
    elif origin is Literal:
        if value not in parts:
            yield f"{where} is {value!r:.60}, not one of {', '.join(map(str, parts))}"
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{where} is {value!r:.60}, not an object"
            return
        for key, item in value.items():
            yield from faults(item, parts[1], f"{where}.{key}")
    elif origin is tuple:
        if not isinstance(value, list):
            yield f"{where} is {value!r:.60}, not a list"
            return
        for i, item in enumerate(value):
            yield from faults(item, parts[0], f"{where}[{i}]")
    else:
        accepted = (int, float) if kind is float else kind
        fine = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        if not fine or (kind is float and not abs(value) < 1e300):  # false for NaN, and float() may not overflow
            yield f"{where} is {value!r:.60}, not {kind_name(kind)}"


def kind_name(kind: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null"}
    return names.get(kind, str(kind))


def from_json(cls: Any, value: Any, where: str) -> Any:
    """An instance of a dataclass from a JSON value; ValueError lists everything that is wrong with the value."""
    wrong = list(faults(value, cls, where))
    if wrong:
        raise ValueError("; ".join(wrong))
    hints = typing.get_type_hints(cls)
    return cls(**{name: rebuilt(item, hints[name]) for name, item in value.items()})


def rebuilt(value: Any, kind: Any) -> Any:
    """The Python value for a JSON value that has passed `faults`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, "")
    if origin is dict:
        return {key: rebuilt(item, parts[1]) for key, item in value.items()}
    return tuple(value) if origin is tuple else value


def json_schema(kind: Any = Submission) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `faults` accepts."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    scalars = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    if kind is Any:
        return {}
    if dataclasses.is_dataclass(kind):
        hints, missing = typing.get_type_hints(kind, include_extras=True), dataclasses.MISSING
        fields = dataclasses.fields(kind)
        return {
            "type": "object",
            "description": " ".join((kind.__doc__ or "").split()),
            "properties": {f.name: json_schema(hints[f.name]) for f in fields},
            "required": [f.name for f in fields if f.default is missing and f.default_factory is missing],
            "additionalProperties": False,
        }
    if origin is Annotated:
        return json_schema(parts[0]) | {"pattern": parts[1]}
    if origin is types.UnionType:
        return {"anyOf": [json_schema(part) for part in parts]}
    if origin is Literal:
        return {"enum": list(parts)}
    if origin is dict:
        return {"type": "object", "additionalProperties": json_schema(parts[1])}
    return {"type": scalars[kind]}


def schema_text() -> str:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "submission.json"}
    return json.dumps(head | json_schema(), indent=1) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# A record's folder
# ----------------------------------------------------------------------------------------------------------------------


def load_submission(folder: Path) -> Submission:
    """ValueError if submission.json is missing, is not JSON or does not fit the schema."""
    return from_json(Submission, read_json(folder / "submission.json"), "submission.json")


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error!s:.80})") from None


def record_folders(records: Path = RECORDS) -> list[Path]:
    """Every folder of every track, oldest first."""
    return sorted((p for p in records.glob("track_*/*") if p.is_dir()), key=lambda p: (p.name, p.parent.name))


def script_path(folder: Path) -> Path:
    return folder / "train_gpt.py"


def log_path(folder: Path, seed: str) -> Path:
    return folder / f"train_seed{seed}.log"


def run_path(folder: Path, seed: str) -> Path:
    return folder / f"train_seed{seed}.json"


def artifact_path(folder: Path) -> Path | None:
    """The artifact in the folder, if there is one."""
    return next(iter(sorted(folder.glob("final_model.*.ptz"))), None)


def data_path(folder: Path) -> Path:
    """The folder for validation shards and tokenizer.model, which a record may bring along."""
    return folder / "data"


def load_reviews(folder: Path) -> list[Review]:
    """Oldest first; ValueError if reviews.json does not fit the schema."""
    path = folder / "reviews.json"
    entries = read_json(path) if path.exists() else []
    if not isinstance(entries, list):
        raise ValueError("reviews.json holds no list")
    return [from_json(Review, entry, f"reviews.json[{i}]") for i, entry in enumerate(entries)]


def add_review(folder: Path, review: Review) -> None:
    entries = [dataclasses.asdict(entry) for entry in [*load_reviews(folder), review]]
    (folder / "reviews.json").write_text(json.dumps(entries, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def script_settings(source: str) -> set[str]:
    """Names of the settings of a script: the fields of its dataclasses GPTConfig and Hyperparameters. Runs no code.

    ValueError if the source does not parse.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"the script is not Python: {error.msg} in line {error.lineno}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, or nested beyond reason
        raise ValueError(f"the script is not Python: {error!s:.80}") from None
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    fields = [n for c in classes if c.name in ("GPTConfig", "Hyperparameters") for n in c.body]
    return {n.target.id for n in fields if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


# ----------------------------------------------------------------------------------------------------------------------
# Logs, in the grammar of the published challenge
# ----------------------------------------------------------------------------------------------------------------------

NUMBER = r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf)(?![\w.])"
STEP_LINE = re.compile(rf"(?:step:)?(\d+)/\d+ (train|val)_loss: ?{NUMBER}(?: val_bpb: ?{NUMBER})?(.*)")
TIME = re.compile(r"train_time: ?(\d+(?:\.\d+)?) ?(ms|m|s)?")
FINAL_LINE = re.compile(rf"([A-Za-z]\w*) val_loss: ?{NUMBER} val_bpb: ?{NUMBER}(.*)")
BYTES = ("bytes_code", "bytes_artifact", "bytes_total")
NAMED = {  # what stands in a line of another form than key:value
    "settings": re.compile(r"^preset:\S+ .*settings:(\S*)"),
    "dataset": re.compile(r"\bdataset:(\S+)"),
    "bytes_code": re.compile(r"Code size: (\d+) bytes"),
    "bytes_artifact": re.compile(r"Serialized model \S+: (\d+) bytes"),
    "bytes_total": re.compile(r"Total submission size \S+: (\d+) bytes"),
}
PAIR = re.compile(r"\b([a-z]\w*):([^\s,]+)")


class RunLog(NamedTuple):
    """The figures in a log. Curves are lists of (step, seconds, nats per token)."""

    train_curve: list[tuple[int, float, float]]
    val_curve: list[tuple[int, float, float]]
    finals: dict[str, tuple[float, float]]  # val_loss and val_bpb by the name of the line, in the order of the log
    values: dict[str, str]  # the last value of every key:value, and bytes_code, bytes_artifact, bytes_total

    @property
    def final(self) -> tuple[str, float, float] | None:
        """Name, val_loss and val_bpb of the result: the last `_exact` line or, if there is none, the last score."""
        names = [name for name in self.finals if name.endswith("_exact")] or list(self.finals)
        return (names[-1], *self.finals[names[-1]]) if names else None


def parse_log(text: str) -> RunLog:
    """Read a log of this project or of the published challenge, skipping unknown lines."""
    log = RunLog([], [], {}, {})
    for line in text.splitlines():
        if len(line) > 4000:  # a line of a log is short
            continue
        step = STEP_LINE.match(line)
        if step:
            time = TIME.search(step[5])
            unit = {"ms": 1e-3, "s": 1.0, "m": 60.0, None: 1.0}[time[2]] if time else 1.0
            seconds = float(time[1]) * unit if time else math.nan
            curve = log.train_curve if step[2] == "train" else log.val_curve
            curve.append((int(step[1]), seconds, float(step[3])))
            continue
        final = FINAL_LINE.match(line)
        if final and " partial:" not in f" {final[4]}":
            log.finals[final[1]] = float(final[2]), float(final[3])
        log.values.update(PAIR.findall(line))
        for key, pattern in NAMED.items():
            if found := pattern.search(line):
                log.values[key] = found[1]
    return log


# ----------------------------------------------------------------------------------------------------------------------
# new
# ----------------------------------------------------------------------------------------------------------------------


COPIED: tuple[str, ...] = ("python", "torch", "code_sha256", "bytes_code", "model_params", "judge_version")
COPIED += ("val_accounting", "val_text_sha256", "val_shards_sha256", "val_tokens", "val_documents", "val_bytes")
COPIED += ("tokenizer_sha256", "train_dataset", "train_tokens")  # from the first run to the submission


ONE_KIND: tuple[str, ...] = ("code_sha256", "judge_version", "device", "world_size", "val_shards_sha256")
ONE_KIND += ("tokenizer_sha256", "train_dataset", "train_tokens")  # like the settings, the same in all runs of a record


def run_types() -> dict[str, Any]:
    """The keys that the JSON of a training run must have for a record, and the type of each."""
    result, submission = typing.get_type_hints(SeedResult), typing.get_type_hints(Submission)
    types = {"run_id": str, "seed": int, "date": str, "partial": bool, "device": str, "world_size": int}
    types |= {"data_path": str, "tokenizer_path": str, "artifact_dir": str, "seconds_evaluate": float}
    types |= {name: submission[name] for name in COPIED} | {"tokenizer_lossless": Any}
    return types | {name: result[name] for name in result.keys() - {"train_seconds", "eval_seconds", "ledger_seconds"}}


def not_a_run(value: Any) -> str:
    """Why a JSON value is not what a training run writes when it ends; empty if it is."""
    if not isinstance(value, dict):
        return "it holds no JSON object"
    missing = sorted(run_types().keys() - value.keys())
    named = ", ".join(missing[:4]) + " ..." * (len(missing) > 4)
    return f"it lacks {named}, which a training run writes" if missing else ""


def read_run(path: Path) -> dict[str, Any]:
    """The JSON of a training run; ValueError that names the file and what is wrong with it."""
    run = read_json(path)
    if why := not_a_run(run):
        raise ValueError(f"{path} is not the JSON of a training run: {why}")
    types = run_types() | {key: float for key in run if key.startswith("seconds_")}
    wrong = [fault for name, kind in types.items() for fault in faults(run[name], kind, f"{name} of {path}")]
    if wrong:
        raise ValueError("; ".join(wrong[:6]))
    return run


def seed_result(run: Mapping[str, Any]) -> SeedResult:
    """The result of one run, from its JSON."""
    ledger = {key.removeprefix("seconds_"): seconds for key, seconds in run.items() if key.startswith("seconds_")}
    derived = {
        "train_seconds": round(sum(ledger.get(phase, 0.0) for phase in COUNTED), 2),
        "eval_seconds": ledger["evaluate"],
        "ledger_seconds": ledger,
    }
    names = {f.name for f in dataclasses.fields(SeedResult)}
    return SeedResult(**{name: run[name] for name in names - derived.keys()}, **derived)


def same_settings(runs: Sequence[Mapping[str, Any]], names: set[str]) -> dict[str, Any]:
    """The settings that all runs share; ValueError if one differs that may not differ between the runs of a record."""
    shared = {name: runs[0][name] for name in sorted(names - PER_RUN) if name in runs[0]}
    for run in runs[1:]:
        for name, value in shared.items():
            if run.get(name) != value:
                raise ValueError(unlike(name.upper(), value, run.get(name), runs[0], run))
    return shared


def unlike(name: str, value: Any, other: Any, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    return (
        f"{name} is {value} in run {first['run_id']} and {other} in run {second['run_id']}: "
        "a record holds runs of one kind, name those with --runs"
    )


def summarize(runs: Sequence[Mapping[str, Any]], source: bytes, about: Mapping[str, Any]) -> Submission:
    """The submission that follows from the JSON of its runs. `about`: what the author states."""
    first, results = runs[0], {str(run["seed"]): seed_result(run) for run in runs}
    if len(results) < len(runs):
        seeds = ", ".join(sorted(str(run["seed"]) for run in runs))
        raise ValueError(f"the runs have the seeds {seeds}: a record holds one run of each seed")
    for run in runs:
        if run["partial"] or run.get("eval_artifact"):
            raise ValueError(f"run {run['run_id']} scored a part of the split or did not train: leave it out of --runs")
        for key in ONE_KIND:
            if run[key] != first[key]:
                raise ValueError(unlike(key, first[key], run[key], first, run))
    if sha256(source) != first["code_sha256"]:
        raise ValueError(
            f"the script has sha256 {sha256(source)}, but the run was made with {first['code_sha256']}: give --script "
            "the one that ran"
        )

    def mean(key: str) -> float:
        return statistics.fmean(getattr(result, key) for result in results.values())

    def deviation(key: str) -> float | None:
        return statistics.stdev(getattr(r, key) for r in results.values()) if len(results) > 1 else None

    lossless = first["tokenizer_lossless"]
    derived: dict[str, Any] = {
        "schema_version": 1,
        "hardware": f"{first['world_size']}x {first['device']}",
        "bytes_artifact": max(result.bytes_artifact for result in results.values()),
        "bytes_total": max(result.bytes_total for result in results.values()),
        "tokenizer_lossless": lossless if isinstance(lossless, bool) else None,
        "settings": same_settings(runs, script_settings(source.decode())),
        "seed_results": dict(sorted(results.items(), key=lambda item: int(item[0]))),
        "val_loss_std": deviation("val_loss"),
        "val_bpb_std": deviation("val_bpb"),
        **{key: mean(key) for key in ("val_loss", "val_bpb", "pre_quant_val_bpb", "train_seconds")},
    }
    return Submission(**{name: first[name] for name in COPIED}, **derived, **about)


def runs_like_the_last(logs: Path, settings: set[str]) -> list[Path]:
    """The newest run of a folder, and all with the same code, settings, data and hardware: every seed that was run.

    Evaluations, partial scores and runs with other settings are passed over. Named on stderr are runs left out because
    of their data or hardware alone, and files that no training run wrote.
    """
    found = []
    for path in sorted((p for p in logs.glob("*.json") if p.is_file()), key=lambda p: p.stat().st_mtime):
        try:
            run = read_json(path)
        except (ValueError, OSError) as error:
            print(f"skipped {path}: {error}", file=sys.stderr)
            continue
        if isinstance(run, dict) and (run.get("eval_artifact") or run.get("partial")):
            continue
        if why := not_a_run(run):
            print(f"skipped {path}: {why}", file=sys.stderr)
        elif run["steps"]:
            found.append((path, run))
    if not found:
        raise ValueError(f"{logs} has no JSON of a finished training run: train first, or name runs with --runs")
    last, alike = found[-1][1], []
    names = (last.keys() & (settings | {"code_sha256"})) - PER_RUN - {"tokenizer_sha256"}
    for path, run in found:
        if all(run.get(name) == last[name] for name in names):
            if other := next((key for key in ONE_KIND if run[key] != last[key]), ""):
                told = f"{other} is {run[other]}, in the last run {last[other]}"
                print(f"left out {path}: {told} (--runs names the runs of a record)", file=sys.stderr)
            else:
                alike.append(path)
    return alike


def refuse_repeats(paths: Sequence[Path], runs: Sequence[Mapping[str, Any]]) -> None:
    """ValueError if a seed was run more than once; it names the files and a command that takes one run of each seed."""
    by_seed: dict[int, list[tuple[str, str, str]]] = {}
    for path, run in zip(paths, runs, strict=True):
        by_seed.setdefault(run["seed"], []).append((run["date"], str(path), run["run_id"]))
    told = []
    for seed, found in sorted(by_seed.items()):
        files = ", ".join(f"{path} (run {name} of {date})" for date, path, name in sorted(found))
        told += [f"seed {seed} was run {len(found)} times: {files}"] if len(found) > 1 else []
    if told:
        earliest = " ".join(shlex.quote(min(found)[1]) for found in by_seed.values())
        raise ValueError(
            f"{'; '.join(told)}. A record holds one run of each seed, and which one is not chosen for you: name the "
            f"runs, and say in README.md why the others are left out. The earliest of each seed are --runs {earliest}"
        )


def write_record(folder: Path, submission: Submission, runs: Sequence[Path], script: Path, artifact: bool) -> None:
    """Lay out a record's folder, whole or not at all: what is written before an error is removed again."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        fill_record(part, submission, runs, script, artifact)
        part.rename(folder)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(part, ignore_errors=True)
        raise


def fill_record(folder: Path, submission: Submission, paths: Sequence[Path], script: Path, artifact: bool) -> None:
    """Write the files of a record into an empty folder. `paths` are those of the JSON of its runs."""
    runs = [read_json(path) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        seed, log = str(run["seed"]), path.with_suffix(".txt")
        if not log.is_file():
            raise ValueError(f"{log} is missing: the log of a run must lie beside its JSON, put it there")
        shutil.copyfile(path, run_path(folder, seed))
        shutil.copyfile(log, log_path(folder, seed))
    shutil.copyfile(script, script_path(folder))
    if artifact:
        copy_artifact(folder, submission, runs)
    save_submission(folder, submission)
    log_text = paths[0].with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
    text = readme(folder.name.removesuffix(".part"), submission, runs[0], log_text)
    (folder / "README.md").write_text(text, encoding="utf-8")


def save_submission(folder: Path, submission: Submission) -> None:
    text = json.dumps(dataclasses.asdict(submission), indent=1, allow_nan=False) + "\n"
    (folder / "submission.json").write_text(text, encoding="utf-8")


def copy_artifact(folder: Path, submission: Submission, runs: Sequence[Mapping[str, Any]]) -> None:
    """The first artifact of these runs that is still there, with the validation shards and tokenizer of its score."""
    seeds = {result.artifact_sha256: seed for seed, result in submission.seed_results.items()}
    places = dict.fromkeys(run["artifact_dir"] for run in runs)
    files = [path for place in places for path in sorted(Path(place).glob("final_model.*.ptz"))]
    made = {path: seeds[digest] for path in files if (digest := sha256(path.read_bytes())) in seeds}
    if not made:
        left = f"{', '.join(map(str, files))}: of none of these runs" if files else "nothing"
        raise ValueError(
            f"ARTIFACT_DIR={', '.join(places)} holds {left}. A run replaces the artifact of an earlier one: train one "
            "of the seeds again, or drop --artifact"
        )
    artifact, seed = next(iter(made.items()))
    run = next(run for run in runs if str(run["seed"]) == seed)
    shutil.copyfile(artifact, folder / artifact.name)
    data_path(folder).mkdir()
    for path in [*Path(run["data_path"]).glob("fineweb_val_*.bin"), Path(run["data_path"], "manifest.json")]:
        shutil.copyfile(path, data_path(folder) / path.name)
    shutil.copyfile(run["tokenizer_path"], data_path(folder) / "tokenizer.model")
    print(f"{artifact}: the artifact of seed {seed}")


def command_line(folder: str, s: Submission, run: Mapping[str, Any], log: str) -> str:
    """The command that repeats a run from the root of the repository. `folder` is the record's path from there.

    The first line of the log lists the settings that differ from the preset's. The data are expected where the tools
    in data/ put them, and nothing is written to the record's folder.
    """
    line = re.search(r"^preset:(\S+) .*?settings:(.*)$", log, re.MULTILINE)
    if not line:
        raise ValueError(f"the log of run {run['run_id']} lacks the line preset:... settings:... with which runs begin")
    changed = [item.partition("=") for item in re.split(r",(?=[A-Z][A-Z0-9_]*=)", line[2]) if item]
    settings = {"PRESET": line[1]}
    settings |= {n: {"True": "1", "False": "0"}.get(v, v) for n, _, v in changed if n.lower() not in PER_RUN}
    data, tokenizer = f"./data/datasets/{s.train_dataset}", Path(run["tokenizer_path"])
    shelf = data if tokenizer.parent.name == s.train_dataset else "./data/tokenizers"
    settings |= {"DATA_PATH": data, "TOKENIZER_PATH": f"{shelf}/{tokenizer.name}", "SEED": str(run["seed"])}
    settings |= {"OUT_DIR": "/tmp/again", "ARTIFACT_DIR": "/tmp/again"}
    n = run["world_size"]
    launcher = "python" if n == 1 else f"torchrun --standalone --nproc_per_node={n}"
    words = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
    return f"{words} {launcher} {shlex.quote(f'{folder}/train_gpt.py')}"


def readme(name: str, submission: Submission, run: Mapping[str, Any], log: str) -> str:
    """A first README.md for a record. `name` is the name of its folder, `log` the log of `run`, one of its runs."""
    s, rows = submission, []
    folder = f"records/{s.track}/{name}"
    for seed, r in s.seed_results.items():
        bpb = f"{r.pre_quant_val_bpb:.4f} | {r.val_bpb:.4f}"
        rows.append(
            f"| {seed} | {r.steps} | {bpb} | {r.train_seconds:.1f} | {r.eval_seconds:.1f} | {r.bytes_total:,} |"
        )
    spread = f" +- {s.val_bpb_std:.4f} over {len(rows)} seeds" if s.val_bpb_std is not None else ", one seed"
    benchmarks = ", ".join(f"{key} {value:.4f}" for key, value in s.benchmarks.items())
    return f"""# {s.name}

{s.blurb}

**val_bpb {s.val_bpb:.4f}**{spread}; {s.bytes_total:,} bytes of code and artifact; {s.model_params:,} parameters;
{s.hardware}, torch {s.torch}. Scored: {s.val_tokens:,} tokens, {s.val_documents:,} documents, {s.val_bytes:,} bytes
({s.val_accounting}).{" Benchmarks: " * bool(benchmarks)}{benchmarks}

| seed | steps | before quantizing | val_bpb | train s | eval s | bytes |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

## Repeat it

From the root of the repository, with the data set `{s.train_dataset}` ({s.train_tokens:,} training tokens) in
`data/`; what the run writes goes to `/tmp/again`:

```bash
python tools/verify.py {folder}
{command_line(folder, s, run, log)}
```

Builds on: {s.base or "nothing before it"}. Licence: {s.licence}.
"""


def git_setting(name: str) -> str:
    try:
        found = subprocess.run(["git", "config", name], capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return ""
    return found.stdout.strip()


def slug_of(name: str) -> str:
    """The name of a record as its folder spells it; ValueError if nothing is left of it."""
    slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-")
    if not re.search(r"[A-Za-z0-9]", slug):
        raise ValueError(
            f"--name={name} leaves nothing to name the folder by: add Latin letters or digits, the folder keeps those"
        )
    return slug


def checked_texts(args: argparse.Namespace) -> dict[str, str]:
    """What the author says of a record in words; ValueError that names the option which is blank."""
    texts = {name: getattr(args, name) for name in ("name", "author", "github_id", "blurb", "licence")}
    if not texts["author"]:
        texts["author"] = git_setting("user.name")
        if not texts["author"].strip():
            raise ValueError("git has no user.name to take the author from: give one with --author")
    for name, text in texts.items():
        if not text.strip():
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}={text!r} is blank: give it a text")
    return texts


def load_benchmarks(path: str, track_name: str, track: Track) -> dict[str, float]:
    """The results in a JSON object of name and number, which must be those that the track asks for. Or ValueError."""
    if not track.benchmarks:
        if path:
            raise ValueError(f"--benchmarks={path}: {track_name} asks for no benchmarks, leave the option out")
        return {}
    asked = ", ".join(track.benchmarks)
    if not path:
        raise ValueError(f"{track_name} asks for {asked}: give --benchmarks a file that holds them as a JSON object")
    results = read_json(Path(path))
    wrong = list(faults(results, dict[str, float], path))
    if not wrong:
        wrong += [f"{path} lacks {name}" for name in track.benchmarks if name not in results]
        wrong += [f"{path} has {name!r:.60}" for name in results if name not in track.benchmarks]
    if wrong:
        raise ValueError(f"{'; '.join(wrong[:6])} ({track_name} asks for {asked})")
    return results


def checked_date(date: str) -> str:
    """The date itself; ValueError if it is not a day written YYYY-MM-DD."""
    try:
        day = datetime.date.fromisoformat(date).isoformat()
    except ValueError:
        day = ""
    if day != date:  # fromisoformat also reads 20261124 and 2026-W48-2
        raise ValueError(f"the date {date!r} is not a day of the form YYYY-MM-DD: give one with --date")
    return date


def new(args: argparse.Namespace) -> int:
    version, tracks = load_tracks()
    slug, texts = slug_of(args.name), checked_texts(args)
    if args.track not in tracks:
        raise ValueError(f"--track={args.track} must be one of {', '.join(tracks)}")
    script = Path(args.script)
    settings = script_settings(script.read_text(encoding="utf-8"))
    runs = [Path(p) for p in args.runs] or runs_like_the_last(Path(args.logs), settings)
    records = [read_run(path) for path in runs]
    refuse_repeats(runs, records)
    about: dict[str, Any] = {
        **texts,
        "date": checked_date(args.date or records[-1]["date"][:10]),
        "track": args.track,
        "rules_version": version,
        "predictor_class": args.predictor_class,
        "base": args.base,
        "benchmarks": load_benchmarks(args.benchmarks, args.track, tracks[args.track]),
    }
    submission = summarize(records, script.read_bytes(), about)
    folder = Path(args.records, args.track, f"{submission.date}_{slug}")
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another --name, or remove the folder")
    write_record(folder, submission, runs, script, args.artifact)
    print(f"{folder}: {len(runs)} seeds, val_bpb {submission.val_bpb:.4f}; now: python tools/verify.py {folder}")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# import
# ----------------------------------------------------------------------------------------------------------------------

ALIASES = {  # by our name, what folders of the published challenge call it
    "val_bpb": ("val_bpb", "mean_val_bpb", "mean_bpb"),
    "val_loss": ("val_loss", "mean_val_loss"),
    "val_bpb_std": ("val_bpb_std", "std_bpb"),
    "bytes_total": (
        "bytes_total",
        "artifact_bytes_max",
        "artifact_bytes",
        "artifact_size_bytes",
        "artifact_bytes_mean",
    ),
    "bytes_code": ("bytes_code", "code_bytes"),
    "bytes_artifact": ("bytes_artifact", "bytes_model_int8_zlib", "bytes_model_int6_zstd", "bytes_model_compressed"),
    "pre_quant_val_bpb": ("pre_quant_val_bpb",),
    "train_seconds": ("train_seconds", "train_time_s_mean", "wallclock_seconds"),
    "hardware": ("hardware", "gpu", "platform"),
    "torch": ("torch", "pytorch_version"),
    "model_params": ("model_params",),
    "base": ("base", "based_on", "base_submission", "base_pr"),
    "blurb": ("blurb", "technique_summary", "notes"),
}


class Imported(NamedTuple):
    """A folder in the style of the published challenge: what is known of it, under our names, and what is missing.

    `implied_bytes` of a seed is the number of bytes by which its score was divided, computed from the loss, the bpb and
    the tokens in its log.
    """

    known: dict[str, Any]
    seeds: dict[str, dict[str, Any]]
    missing: list[str]


def import_published(folder: Path) -> Imported:
    """Read a submission.json of any shape, and the logs beside it. Nothing is guessed; whatever is missing is named."""
    files = [folder / "submission.json", *sorted(folder.glob("submission*.json"))]
    path = next((p for p in files if p.is_file()), None)
    theirs = read_json(path) if path else {}
    theirs, missing = (theirs, []) if isinstance(theirs, dict) else ({}, ["an object in submission.json"])
    if path is None:
        missing.append("submission.json")
    elif path.name != "submission.json":
        missing.append(f"submission.json (it has {path.name})")
    ours = [f.name for f in dataclasses.fields(Submission)]
    known = {n: theirs[key] for n in ours for key in reversed(ALIASES.get(n, (n,))) if theirs.get(key) is not None}
    results = known.get("seed_results")
    if not isinstance(results, dict):
        results = {}
        known.pop("seed_results", None)
    seeds = {str(k): dict(v) for k, v in results.items() if isinstance(v, dict)}
    logs = sorted([*folder.glob("train*.log"), *folder.glob("train*.txt")])
    for log_file in logs:
        log = parse_log(log_file.read_text(encoding="utf-8", errors="replace"))
        named = re.search(r"seed_?(\d+)", log_file.name)
        seed = named[1] if named else log.values.get("seed", "unknown")
        entry = seeds.setdefault(seed, {})
        entry["log"] = log_file.name
        if log.final:
            entry["log_line"], entry["log_val_loss"], entry["log_val_bpb"] = log.final
        else:
            missing.append(f"a final val_bpb in {log_file.name}")
        entry |= {key: int(log.values[key]) for key in BYTES if key in log.values}
        tokens = log.values.get("tokens", log.values.get("val_tokens", ""))
        if log.final and tokens.isdigit() and log.final[2] > 0:
            entry["implied_bytes"] = round(log.final[1] / math.log(2) * int(tokens) / log.final[2])
    if "val_bpb" not in known and seeds:
        scores = [s.get("val_bpb", s.get("log_val_bpb")) for s in seeds.values()]
        numbers = [x for x in scores if isinstance(x, float)]
        known |= {"val_bpb": statistics.fmean(numbers)} if len(numbers) == len(scores) else {}
    promised = theirs.get("seeds") or list(seeds)
    promised = promised if isinstance(promised, list) else []
    missing += [f"the log of seed {seed}" for seed in map(str, promised) if "log" not in seeds.get(seed, {})]
    if not logs:
        missing.append("any training log")
    missing += [name for name in ("README.md", "train_gpt.py") if not (folder / name).is_file()]
    if not list(folder.glob("*.ptz")):
        missing.append("the artifact, so that the score cannot be computed again without training")
    missing += [f"submission.json: {name}" for name in ours if name not in known and name != "benchmarks"]
    known.pop("seed_results", None)  # they are in `seeds`, with what the logs say
    read = {"seeds", *ours, *(key for keys in ALIASES.values() for key in keys)}
    missing += [f"submission.json: a known meaning of its key {key!r}" for key in theirs if key not in read]
    return Imported(known, seeds, missing)


def show_import(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "is missing"
        raise ValueError(f"{folder} {fault}: name the folder of a submission")
    found = import_published(folder)
    print(json.dumps({"known": found.known, "seeds": found.seeds, "missing": found.missing}, indent=1, default=str))
    return 0


def review(args: argparse.Namespace) -> int:
    code = load_submission(Path(args.folder)).code_sha256
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    add_review(Path(args.folder), Review(today, args.reviewer, args.kind, code, note=args.note))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make = commands.add_parser("new", help="make a record's folder from finished runs")
    make.add_argument("--track", required=True)
    make.add_argument("--name", required=True, help="name of the record and of its folder")
    make.add_argument("--blurb", required=True, help="what is new, in a sentence or two")
    make.add_argument("--author", default="", help="default: git's user.name")
    make.add_argument("--github-id", required=True)
    make.add_argument("--base", default="", help="the record it builds on, <track>/<folder>")
    make.add_argument("--class", dest="predictor_class", choices=("A", "B"), default="A")
    make.add_argument("--licence", default="MIT")
    make.add_argument(
        "--benchmarks", default="", metavar="FILE", help="results by name, a JSON object, where the track asks for them"
    )
    make.add_argument("--date", default="", help="YYYY-MM-DD; default: the day of the last run")
    make.add_argument("--runs", nargs="+", default=[], help="JSON files; default: the last in --logs and all like it")
    make.add_argument("--logs", default="logs")
    make.add_argument("--script", default=str(ROOT / "train_gpt.py"))
    make.add_argument("--records", default=str(RECORDS))
    make.add_argument("--artifact", action="store_true", help="add artifact, validation shards and tokenizer")
    make.set_defaults(run=new)
    read = commands.add_parser("import", help="show what a folder in the published style holds and lacks")
    read.add_argument("folder")
    read.set_defaults(run=show_import)
    say = commands.add_parser("review", help="object to a record, or settle the objections")
    say.add_argument("folder")
    say.add_argument("--kind", choices=("disputed", "settled"), required=True)
    say.add_argument("--reviewer", required=True)
    say.add_argument("--note", required=True, help="why")
    say.set_defaults(run=review)
    schema = commands.add_parser("schema", help="the JSON Schema of submission.json")
    schema.set_defaults(run=lambda args: print(schema_text(), end="") or 0)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
