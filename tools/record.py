"""A record on disk: the files in its folder, what its submission.json says, and how its logs are written.

    from record import load_submission, record_folders

    for folder in record_folders():
        print(folder.name, load_submission(folder).val_bpb)

This is the only file that knows how a record is laid out. It imports no other tool and no torch. A record is a folder
records/<track>/<YYYY-MM-DD>_<Name>/ with

    submission.json          what its author claims (class Submission)
    README.md                the same in words
    train_gpt.py             the script that ran, byte for byte
    train_seed<SEED>.log     the log of each run
    train_seed<SEED>.json    the settings and results that each run wrote
    final_model.*.ptz        optional: the artifact of one of the runs
    data/                    optional: the validation shards, their byte counts, manifest.json and tokenizer.model that
                             are needed to score the artifact again; only where the text may be passed on
    benchmarks.json          only in tracks that ask for benchmarks: what tools/evaluate.py wrote for one of the runs
    reviews.json             optional: what reviewers found (a list of class Review)
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import re
import stat
import statistics
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "records"
FOLDER_NAME = re.compile(r"\d{4}-\d\d-\d\d_[A-Za-z0-9._+-]+")

T = TypeVar("T")
NonBlank = Annotated[str, "not blank"]

# ----------------------------------------------------------------------------------------------------------------------
# What the files say
# ----------------------------------------------------------------------------------------------------------------------


class ScoredText(NamedTuple):
    """The text that a score belongs to. Results for the same text are comparable, whatever their tokenizer.

    A lossy tokenizer is scored on fewer bytes of the text, those that it gives back, so that its results stand apart.
    """

    accounting: str
    lossless: bool | None  # whether tokens decode to the text; None where bytes are those of the tokenizer's pieces
    sha256: str
    documents: int
    bytes: int


@dataclass(frozen=True)
class SeedResult:
    """The result of one run. Losses are nats per token; val_bpb is bits per byte of the source text."""

    val_loss: float
    val_bpb: float
    pre_quant_val_loss: float  # of the trained weights, before they were quantized
    pre_quant_val_bpb: float
    steps: int
    train_seconds: float  # training and everything else that counts against its limit
    eval_seconds: float
    bytes_artifact: int
    bytes_total: int
    artifact_sha256: str
    scored_tokens: int
    scored_bytes: int
    ledger_seconds: dict[str, float]  # every phase of the run


@dataclass(frozen=True)
class Submission:
    """The contents of submission.json. Scores are means over all seeds; sizes are those of the largest run."""

    schema_version: int
    name: NonBlank
    author: NonBlank
    github_id: NonBlank
    date: str  # YYYY-MM-DD
    track: str
    rules_version: int
    predictor_class: Literal["A", "B"]  # A is a fixed predictor, B adapts to the tokens that were already scored
    base: str  # the record that this one builds on, <track>/<folder>, or empty
    blurb: NonBlank
    licence: NonBlank
    hardware: str  # 8x cuda:NVIDIA_H100_80GB_HBM3
    python: str
    torch: str
    code_sha256: str
    bytes_code: int
    bytes_artifact: int
    bytes_total: int
    model_params: int
    val_loss: float
    val_loss_std: float | None  # None for a single seed
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
    tokenizer_lossless: bool | None  # None where nobody knows
    train_dataset: str
    train_tokens: int
    settings: dict[str, Any]
    seed_results: dict[str, SeedResult]
    benchmarks: dict[str, float] = field(default_factory=dict)  # only in tracks that ask for them

    @property
    def context(self) -> int:
        """Tokens that the model sees at once when it is scored; 0 if the settings do not tell."""
        context = self.settings.get("eval_seq_len") or self.settings.get("train_seq_len")
        return context if isinstance(context, int) else 0

    @property
    def scored_text(self) -> ScoredText:
        """The text that was scored, with its true number of bytes if it is a known one.

        Where bytes are counted by a tokenizer's pieces, two tokenizers may count differently in one and the same text.
        """
        n_bytes = self.val_bytes
        text_sha256 = self.val_text_sha256
        known = known_text(self.val_documents, text_sha256)
        track = track_of(self)
        if known is None and track is not None and track.text:
            # Nobody has hashed the documents of some texts. A hash of one's own must not open a table of one's own.
            known = text_named(track.text)
            text_sha256 = known.text_sha256 or "unknown"
        if known is not None and known.has_size(self.val_documents, self.val_bytes):
            n_bytes = known.bytes
        lossless = None if self.val_accounting == "pieces" else self.tokenizer_lossless is True
        return ScoredText(self.val_accounting, lossless, text_sha256, self.val_documents, n_bytes)

    @property
    def bytes_counted(self) -> str:
        """How the bytes of the score were counted, in words."""
        if self.val_accounting == "pieces":
            return "they are counted from the tokenizer's pieces"
        return "its tokenizer is lossless" if self.tokenizer_lossless is True else "its tokenizer is lossy"

    @property
    def about(self) -> dict[str, Any]:
        """What only the author can say; everything else follows from the runs."""
        return {name: getattr(self, name) for name in STATED_BY_AUTHOR}

    def values(self, key: str) -> list[float]:
        """One number per seed, in the order of the seeds."""
        return [float(getattr(result, key)) for _, result in sorted(self.seed_results.items())]


STATED_BY_AUTHOR = (
    "name",
    "author",
    "github_id",
    "date",
    "track",
    "rules_version",
    "predictor_class",
    "base",
    "blurb",
    "licence",
    "benchmarks",
)


@dataclass(frozen=True)
class Review:
    """One entry of reviews.json: what a reviewer found."""

    date: str  # YYYY-MM-DD
    reviewer: str
    kind: Literal["rescored", "reproduced", "disputed", "settled"]  # "settled" answers all disputes before it
    code_sha256: str
    seed: str = ""  # of the run that was scored again, or trained again
    val_bpb: float | None = None
    val_bpb_interval: float | None = None  # half width at 95 %, where only a sample of the documents was scored
    judge_version: int | None = None
    hardware: str = ""
    note: str = ""
    artifact_sha256: str = ""  # of what was scored


@dataclass(frozen=True)
class Track:
    """The rules of one track, from records/tracks.json. None means that there is no such limit."""

    title: str
    rules: str
    rank_by: Literal["val_bpb", "train_seconds"]
    min_gain: float  # by which a new record has to beat the best one, in units of rank_by
    p_value: float  # at which it has to show that, one-sided
    min_seeds: int = 1
    by_device: bool = False  # whether each kind of machine has a table of its own
    max_total_bytes: int | None = None
    max_train_seconds: float | None = None
    max_eval_seconds: float | None = None
    device: str = ""  # must be part of the device's name
    text: str = ""  # the name of a text in records/texts.json that must be scored
    world_size: int | None = None
    target_val_bpb: float | None = None
    max_train_tokens: int | None = None
    max_parameters: int | None = None
    min_context_tokens: int | None = None
    licences: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()  # keys of BENCHMARK_FIGURES
    benchmark_protocol: str = ""  # of tools/evaluate.py


@dataclass(frozen=True)
class Text:
    """A known validation text, from records/texts.json."""

    name: str
    documents: int
    bytes: int
    tolerance: float  # relative, of the bytes: tokenizers normalise text, and some scores drop its tail
    text_sha256: str = ""  # empty for a text whose documents nobody has hashed
    demonstration: bool = False  # it lies in every Python, so that results on it rank nowhere

    def has_size(self, documents: int, n_bytes: int) -> bool:
        return documents == self.documents and abs(n_bytes - self.bytes) <= self.tolerance * self.bytes


# Bits per byte by which the scores of two machines may differ: a quarter of what a record has to gain.
SAME_SCORE = 0.0005
# What no two runs share to the last digit.
UNIQUE_RESULTS = ("artifact_sha256", "pre_quant_val_loss")


class JudgeError(Exception):
    """What the judge asked for, or has installed, does not allow to judge. It says nothing about the record."""


class Check(NamedTuple):
    """The outcome of one check of a record, a line of tools/verify.py."""

    name: str
    ok: bool
    reason: str  # a sentence that people read


def verdict(name: str, problems: Sequence[str], summary: str) -> Check:
    """A check that fails if there are any problems, and otherwise passes with `summary` as its reason."""
    return Check(name, not problems, "; ".join(problems) or summary)


def counted(n: int, what: str) -> str:
    """1 run, 2 runs, 1,000 runs"""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def seeds_named(seeds: Iterable[str]) -> str:
    """seed 1, or seeds 1, 2 and 3"""
    names = list(seeds)
    if len(names) < 2:
        return f"seed {', '.join(names)}"
    return f"seeds {', '.join(names[:-1])} and {names[-1]}"


# ----------------------------------------------------------------------------------------------------------------------
# Dataclasses from JSON
# ----------------------------------------------------------------------------------------------------------------------

TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    types.NoneType: "null",
}


MAX_FAULTS = 12  # that a message lists


def from_json(cls: type[T], value: Any, where: str) -> T:
    """An instance of a dataclass from a JSON value named `where`. A ValueError lists what is wrong first."""
    found = faults(value, cls, where)
    if found:
        raise ValueError("; ".join(fault[:200] for fault in found[:MAX_FAULTS]))
    return converted(value, cls)


def faults(value: Any, kind: Any, where: str) -> list[str]:
    """Why a JSON value is not of a type: the first reasons, each with the name of the value, which starts with `where`.

    A type is made of dataclasses, dicts with keys of text, tuples of one type, literals, unions, NonBlank and scalars.
    """
    origin = typing.get_origin(kind)
    parts = typing.get_args(kind)

    if kind is Any:
        return []
    if dataclasses.is_dataclass(kind):
        return object_faults(value, kind, where)
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{where} is {value!r:.60}, not an object"]
        return first_faults(faults(item, parts[1], f"{where}.{key}") for key, item in value.items())
    if origin is tuple:
        if not isinstance(value, list):
            return [f"{where} is {value!r:.60}, not a list"]
        return first_faults(faults(item, parts[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        if value not in parts:
            return [f"{where} is {value!r:.60}, not one of {', '.join(map(str, parts))}"]
        return []
    if origin is types.UnionType:
        if all(faults(value, part, where) for part in parts):
            return [f"{where} is {value!r:.60}, not {' or '.join(TYPE_NAMES[part] for part in parts)}"]
        return []
    if kind is NonBlank:
        if isinstance(value, str) and not value.strip():
            return [f"{where} is {value!r:.60}, blank: fill it in"]
        return faults(value, str, where)
    if not is_scalar(value, kind):
        return [f"{where} is {value!r:.60}, not {TYPE_NAMES[kind]}"]
    return []


def first_faults(of_items: Iterable[list[str]]) -> list[str]:
    """The faults of the items of a value, up to the first items that have as many as a message lists."""
    found: list[str] = []
    for faults_of_item in of_items:
        found += faults_of_item
        if len(found) >= MAX_FAULTS:
            break
    return found


def object_faults(value: Any, cls: Any, where: str) -> list[str]:
    """Why a JSON value does not describe an instance of a dataclass."""
    if not isinstance(value, dict):
        return [f"{where} is {value!r:.60}, not an object"]

    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(value.keys() - fields.keys())[:MAX_FAULTS]
    found = [f"{where}.{name} is an unknown key: remove it, or move it to README.md" for name in unknown]

    hints = types_of(cls)
    for name, f in fields.items():
        has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if name in value:
            found += faults(value[name], hints[name], f"{where}.{name}")
        elif not has_default:
            found.append(f"{where}.{name} is missing")
    return found


@functools.cache
def types_of(cls: Any) -> dict[str, Any]:
    """The type of each field of a dataclass. To find them takes longer than to check a value, hence the cache."""
    return typing.get_type_hints(cls, include_extras=True)


def is_scalar(value: Any, kind: type) -> bool:
    if isinstance(value, bool):  # Python counts it among the integers, JSON does not
        return kind is bool
    if kind is float:
        # False for NaN and infinity, and for integers that are too large to become a float.
        return isinstance(value, int | float) and abs(value) < 1e300
    return isinstance(value, kind)


def converted(value: Any, kind: Any) -> Any:
    """The Python object for a JSON value in which `faults` found nothing wrong."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        hints = types_of(typing.cast(Any, kind))
        arguments = {name: converted(item, hints[name]) for name, item in value.items()}
        return typing.cast(Any, kind)(**arguments)
    if origin is dict:
        item_kind = typing.get_args(kind)[1]
        return {key: converted(item, item_kind) for key, item in value.items()}
    if origin is tuple:
        return tuple(value)
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing the files
# ----------------------------------------------------------------------------------------------------------------------


# Bytes of a file of each kind. Files of other kinds have limits of their own. Parsed, some JSON takes 35 times as much.
MAX_JSON_BYTES = 2**20
MAX_TEXT_BYTES = 2**22  # of a log, a script or a README
MAX_RUN_BYTES = 2**17
# The JSON and the log of every seed are kept, and all reviews are looked through for each.
MAX_SEEDS = 100
MAX_REVIEWS = 500

# No record is older than the published challenge, nor from the future. A day is allowed for other time zones.
FIRST_DAY = datetime.date(2026, 1, 1)
ONE_DAY = datetime.timedelta(days=1)


def read_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file. ValueError if it is missing, something else (a link, a pipe), or larger."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be opened ({error.strerror}): it has to be an ordinary file") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not an ordinary file")
        if status.st_size > max_bytes:
            raise ValueError(f"{path.name} has {status.st_size} bytes, and at most {max_bytes} are read")
        return file.read(max_bytes)


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a file in UTF-8; a byte order mark is left out. ValueError as for read_file, and for UTF-16."""
    data = read_file(path, max_bytes)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(
            f"{path.name} is UTF-16, as > writes it in PowerShell: convert it, or log with `| Out-File -Encoding utf8`"
        )
    return data.decode("utf-8-sig", errors="replace")


def read_json(path: Path, strict: bool = True, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The contents of a JSON file; ValueError if it is missing, is not JSON, or is JSON that two readers take apart.

    That is: a key twice in one object, NaN and infinity, and whole numbers beyond 64 bits. Files of others may hold
    these, and are read without `strict`.
    """
    text = read_text(path, max_bytes)
    try:
        if not strict:
            return json.loads(text)
        return json.loads(
            text, object_pairs_hook=unique_keys, parse_constant=refuse, parse_float=finite, parse_int=short_number
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error!s:.120})") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key[:40]!r} occurs twice in one object")
        values[key] = value
    return values


def refuse(constant: str) -> Any:
    raise ValueError(f"it holds {constant}, which is no number of JSON")


def finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def short_number(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a whole number has {len(digits)} digits, and at most 19 have a meaning here")
    return int(digits)


def day_fault(text: str) -> str:
    """Why a text is not a day on which a record can have been made, YYYY-MM-DD; empty if it is."""
    try:
        day = datetime.date.fromisoformat(text)
    except ValueError:
        return "is not a day, YYYY-MM-DD"
    if day.isoformat() != text:  # fromisoformat also reads 20261124
        return "is not a day, YYYY-MM-DD"
    if day < FIRST_DAY:
        return f"is before {FIRST_DAY}, when there were no records"
    if day > datetime.datetime.now(datetime.UTC).date() + ONE_DAY:
        return "is in the future"
    return ""


# What editors, Python and systems leave in folders, and .gitignore lists: no part of a record.
IGNORED_NAMES = {"__pycache__", ".DS_Store", "Thumbs.db", "desktop.ini", ".idea", ".vscode", ".ipynb_checkpoints"}
IGNORED_SUFFIXES = (".pyc", ".swp", ".swo", "~", ".part")
MAX_FILES = 500


def files_of(folder: Path) -> list[Path]:
    """Everything in a record's folder but folders, in order, without what git ignores. ValueError if it is too much."""
    found: list[Path] = []
    n_seen = 0
    for parent, folders, names in os.walk(folder):
        # os.walk goes where this list says, and does not follow links.
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        n_seen += len(names) + len(folders)
        if n_seen > MAX_FILES:
            raise ValueError(f"the folder has more than {MAX_FILES} files: a record has a few dozen")
        found += [Path(parent, name) for name in [*names, *links] if not is_ignored(name)]
    return sorted(found)


def is_ignored(name: str) -> bool:
    return name in IGNORED_NAMES or name.endswith(IGNORED_SUFFIXES)


def record_folders(records: Path = RECORDS) -> list[Path]:
    """The folders of all tracks, oldest first."""
    # A link would be the same record a second time.
    folders = [path for path in records.glob("track_*/*") if path.is_dir() and not path.is_symlink()]
    return sorted(folders, key=lambda path: (path.name, path.parent.name))


def script_path(folder: Path) -> Path:
    return folder / "train_gpt.py"


def log_path(folder: Path, seed: str) -> Path:
    return folder / f"train_seed{seed}.log"


def run_path(folder: Path, seed: str) -> Path:
    return folder / f"train_seed{seed}.json"


def artifact_path(folder: Path) -> Path | None:
    """The artifact in the folder, if there is one. Of several, which no record may have, the first."""
    return min(folder.glob("final_model.*.ptz"), default=None)


def benchmarks_path(folder: Path) -> Path:
    return folder / "benchmarks.json"


def data_path(folder: Path) -> Path:
    """Where a record keeps validation shards and their tokenizer.model, if it has any."""
    return folder / "data"


def load_submission(folder: Path) -> Submission:
    """ValueError if submission.json is missing, is not JSON, does not fit class Submission, or has too many seeds."""
    submission = from_json(Submission, read_json(folder / "submission.json"), "submission.json")
    if len(submission.seed_results) > MAX_SEEDS:
        raise ValueError(f"submission.json has {len(submission.seed_results)} seeds, and at most {MAX_SEEDS} are read")
    return submission


class Evaluation(NamedTuple):
    """What tools/evaluate.py wrote about an artifact, as far as records need it."""

    protocol: str
    partial: bool
    artifact_sha256: str
    tasks: dict[str, dict[str, Any]]

    def figure(self, task: str, key: str) -> float | None:
        """A number among its results; None if it has none of that name."""
        value = self.tasks.get(task, {}).get(key)
        return float(value) if value is not None and is_scalar(value, float) else None

    @property
    def benchmarks(self) -> dict[str, float]:
        """The figures that it has of BENCHMARK_FIGURES."""
        found = {name: self.figure(task, key) for name, (task, key) in BENCHMARK_FIGURES.items()}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def samples(self) -> list[str]:
        """Texts that the model wrote."""
        samples = self.tasks.get("samples", {}).get("samples")
        if not isinstance(samples, list):
            return []
        texts = [sample.get("text") for sample in samples if isinstance(sample, dict)]
        return [text for text in texts if isinstance(text, str) and text.strip()]


# What a record claims under these names, by task and key of tools/evaluate.py.
BENCHMARK_FIGURES = {
    "wikitext2_bits_per_byte": ("wikitext2", "bpb"),
    "blimp_accuracy": ("blimp", "acc"),
    "arc_easy_accuracy": ("arc_easy", "acc"),
}


def load_evaluation(path: Path) -> Evaluation:
    """ValueError if the file is missing or is not one that tools/evaluate.py --out writes."""
    value = read_json(path, strict=False)
    kinds = types_of(Evaluation)
    found = faults(value, dict[str, Any], path.name)
    if not found:
        found = first_faults(faults(value.get(name), kind, f"{path.name}: {name}") for name, kind in kinds.items())
    if found:
        raise ValueError(f"{'; '.join(found[:MAX_FAULTS])}: let tools/evaluate.py --out write it")
    return Evaluation(**{name: value[name] for name in kinds})


def evaluation_faults(evaluation: Evaluation, artifacts: Iterable[str], track: Track) -> list[str]:
    """Why a track does not take an evaluation. `artifacts` are the sha256 of the artifacts of a record's runs."""
    problems = []
    if evaluation.protocol != track.benchmark_protocol:
        problems.append(f"protocol {evaluation.protocol!r:.40}, the track asks for {track.benchmark_protocol}")
    if evaluation.partial:
        problems.append("it is of a part of the benchmarks only")
    if evaluation.artifact_sha256 not in artifacts:
        problems.append(f"it is of another artifact, with sha256 {evaluation.artifact_sha256!r:.70}")
    problems += [f"it has no {name}" for name in track.benchmarks if name not in evaluation.benchmarks]

    claimed = evaluation.figure("context", "claimed")
    holds = evaluation.tasks.get("context", {}).get("holds")
    if track.min_context_tokens and not (claimed and claimed >= track.min_context_tokens and holds is True):
        problems.append(f"it does not show that a context of {track.min_context_tokens} tokens or more is of use")
    if not evaluation.samples:
        problems.append("it has no samples")
    return problems


# Keys of submission.json that our records have and the published challenge does not, and some that both have.
OUR_OWN_KEYS = {"schema_version", "rules_version", "judge_version"}
SHARED_KEYS = {"author", "github_id", "name", "blurb", "val_bpb"}


def is_published(folder: Path) -> bool:
    """Whether a folder is a submission of the published challenge, by the keys of its submission.json."""
    files = [folder / "submission.json", *sorted(folder.glob("submission_*.json"))]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        return False
    try:
        claims = read_json(path, strict=False)
    except ValueError:
        return False
    return isinstance(claims, dict) and bool(SHARED_KEYS & claims.keys()) and not OUR_OWN_KEYS & claims.keys()


def save_submission(folder: Path, submission: Submission) -> None:
    text = json.dumps(dataclasses.asdict(submission), indent=1, allow_nan=False) + "\n"
    (folder / "submission.json").write_text(text, encoding="utf-8")


def load_reviews(folder: Path) -> list[Review]:
    """All reviews, oldest first; ValueError if reviews.json is there but is damaged, or has too many."""
    path = folder / "reviews.json"
    if not path.exists():
        return []
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError("reviews.json holds no list")
    if len(entries) > MAX_REVIEWS:
        raise ValueError(f"reviews.json has {len(entries)} reviews, and at most {MAX_REVIEWS} are read")
    return [from_json(Review, entry, f"reviews.json[{i}]") for i, entry in enumerate(entries)]


def add_review(folder: Path, review: Review) -> None:
    entries = [dataclasses.asdict(entry) for entry in [*load_reviews(folder), review]]
    text = json.dumps(entries, indent=1, allow_nan=False) + "\n"
    (folder / "reviews.json").write_text(text, encoding="utf-8")


def load_tracks() -> tuple[int, dict[str, Track]]:
    """The version of the rules, and the tracks by name."""
    rules = read_json(RECORDS / "tracks.json")
    tracks = {name: from_json(Track, track, name) for name, track in rules["tracks"].items()}
    return rules["rules_version"], tracks


def track_of(submission: Submission) -> Track | None:
    """None for a track that records/tracks.json does not have."""
    _, tracks = load_tracks()
    return tracks.get(submission.track)


def load_texts() -> list[Text]:
    return [from_json(Text, entry, "texts.json") for entry in read_json(RECORDS / "texts.json")]


def text_named(name: str) -> Text:
    for text in load_texts():
        if text.name == name:
            return text
    raise ValueError(f"texts.json has no text named {name!r}")


def known_text(documents: int, text_sha256: str) -> Text | None:
    """The known text with this sha256, or None.

    Published shards do not say which documents they hold, and a run on them reports the sha256 as "unknown". Such a
    text is recognised by its number of documents, if nobody has hashed it.
    """
    for text in load_texts():
        if text.text_sha256:
            if text.text_sha256 == text_sha256:
                return text
        elif text_sha256 == "unknown" and text.documents == documents:
            return text
    return None


def place_of_text(documents: int, text_sha256: str) -> int:
    """The place of a text in texts.json, which has the most important one first. Unlisted texts come last."""
    texts = load_texts()
    known = known_text(documents, text_sha256)
    return len(texts) if known is None else texts.index(known)


def newest_judge_version() -> int:
    """JUDGE_VERSION of the root's train_gpt.py, which is not imported here because it imports torch."""
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    found = re.search(r"^JUDGE_VERSION = (\d+)", source, re.MULTILINE)
    if found is None:
        raise ValueError("train_gpt.py has no line JUDGE_VERSION = <number>")
    return int(found[1])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path, skip: int = 0) -> str:
    """The sha256 of a file from byte `skip` on, read in pieces."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(skip)
        while piece := file.read(2**20):
            hashed.update(piece)
    return hashed.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# What others confirmed
# ----------------------------------------------------------------------------------------------------------------------

SeedState = Literal["disputed", "reproduced", "rescored", "unconfirmed"]


def seed_states(submission: Submission, reviews: Sequence[Review]) -> dict[str, SeedState]:
    """What somebody else found of each seed: a confirmation holds for the seed that it names, and for its code.

    Reviews come oldest first. A dispute that nobody settled holds for its seed, or for all if it names none of them.
    """
    states: dict[str, SeedState] = dict.fromkeys(submission.seed_results, "unconfirmed")
    for review in confirmations(submission, reviews):
        if review.kind == "reproduced":
            states[review.seed] = "reproduced"
        elif states[review.seed] != "reproduced":
            states[review.seed] = "rescored"
    for seed in states:
        if open_dispute(submission, reviews, seed) is not None:
            states[seed] = "disputed"
    return states


def confirmations(submission: Submission, reviews: Sequence[Review]) -> list[Review]:
    """The reviews that confirm a seed of the record, with the code that it has now."""
    found = []
    for review in reviews:
        result = submission.seed_results.get(review.seed)
        if result is None or review.code_sha256 != submission.code_sha256:
            continue
        same_artifact = review.artifact_sha256 == result.artifact_sha256
        if review.kind == "reproduced" or (review.kind == "rescored" and same_artifact):
            found.append(review)
    return found


def open_dispute(submission: Submission, reviews: Sequence[Review], seed: str = "") -> Review | None:
    """The last objection that nobody settled, to one seed or, without `seed`, to any of them."""
    for name in [seed] if seed else submission.seed_results:
        of_seed = [review for review in reviews if review.seed == name or review.seed not in submission.seed_results]
        objections = [review for review in of_seed if review.kind in ("disputed", "settled")]
        if objections and objections[-1].kind == "disputed":
            return objections[-1]
    return None


# ----------------------------------------------------------------------------------------------------------------------
# From the JSON of runs to a submission
# ----------------------------------------------------------------------------------------------------------------------

# Settings that may differ between the runs of one record.
PER_RUN = {
    "seed",
    "run_id",
    "out_dir",
    "artifact_dir",
    "eval_artifact",
    "data_path",
    "tokenizer_path",
    "checkpoint_every",
    "resume",
    "track",
}

# Phases of a run that do not count against the limit of the training time. All others do, whatever their name.
FREE_PHASES = {"startup", "compile", "validate", "checkpoint", "quantize", "serialize", "load", "evaluate", "report"}

# Keys that submission.json takes from the JSON of the first run.
COPIED_TO_SUBMISSION = (
    "python",
    "torch",
    "code_sha256",
    "bytes_code",
    "model_params",
    "judge_version",
    "val_accounting",
    "val_text_sha256",
    "val_shards_sha256",
    "val_tokens",
    "val_documents",
    "val_bytes",
    "tokenizer_sha256",
    "train_dataset",
    "train_tokens",
)

# Keys that each entry of seed_results takes from the JSON of its run.
COPIED_TO_SEED_RESULT = (
    "val_loss",
    "val_bpb",
    "pre_quant_val_loss",
    "pre_quant_val_bpb",
    "steps",
    "bytes_artifact",
    "bytes_total",
    "artifact_sha256",
    "scored_tokens",
    "scored_bytes",
)

# Besides its settings, what all runs of a record must share.
SAME_IN_ALL_RUNS = (
    "code_sha256",
    "judge_version",
    "device",
    "world_size",
    "val_shards_sha256",
    "tokenizer_sha256",
    "train_dataset",
    "train_tokens",
)


def run_types() -> dict[str, Any]:
    """The keys that the JSON of a training run must have for a record, with the type of each."""
    submission_hints = typing.get_type_hints(Submission)
    result_hints = typing.get_type_hints(SeedResult)
    return {
        "run_id": str,
        "seed": int,
        "date": str,
        "partial": bool,
        "device": str,
        "world_size": int,
        "data_path": str,
        "tokenizer_path": str,
        "seconds_train": float,
        "seconds_evaluate": float,
        "tokenizer_lossless": Any,  # true, false or "unknown"
        **{name: submission_hints[name] for name in COPIED_TO_SUBMISSION},
        **{name: result_hints[name] for name in COPIED_TO_SEED_RESULT},
    }


def read_run(path: Path) -> dict[str, Any]:
    """The JSON of a training run; ValueError if it is anything else."""
    run = read_json(path, max_bytes=MAX_RUN_BYTES)
    if found := run_faults(run):
        raise ValueError(f"{path} is not the JSON of a training run: {'; '.join(found[:6])}")
    return run


def run_faults(run: Any) -> list[str]:
    """Why a JSON value is not what a training run writes when it ends; empty if it is."""
    if not isinstance(run, dict):
        return ["it holds no JSON object"]

    kinds = run_types()
    missing = sorted(kinds.keys() - run.keys())
    if missing:
        shown = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
        return [f"it lacks {shown}, which a training run writes"]

    kinds |= {key: float for key in run if key.startswith("seconds_")}
    if "settings_changed" in run:
        kinds["settings_changed"] = dict[str, Any]
    return first_faults(faults(run[name], kind, name) for name, kind in kinds.items())


def script_settings(source: str) -> set[str]:
    """The settings of a script: the names of the fields of its dataclasses GPTConfig and Hyperparameters.

    The script is parsed, not run. ValueError if it is not Python.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"the script is not Python: {error.msg} in line {error.lineno}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, or brackets nested without end
        raise ValueError(f"the script is not Python: {error!s:.80}") from None

    names = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in ("GPTConfig", "Hyperparameters"):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    names.add(statement.target.id)
    return names


def seed_result(run: Mapping[str, Any]) -> SeedResult:
    """The result of one run, from its JSON."""
    ledger = {key.removeprefix("seconds_"): seconds for key, seconds in run.items() if key.startswith("seconds_")}
    return SeedResult(
        **{name: run[name] for name in COPIED_TO_SEED_RESULT},
        train_seconds=round(sum(seconds for phase, seconds in ledger.items() if phase not in FREE_PHASES), 2),
        eval_seconds=ledger["evaluate"],
        ledger_seconds=ledger,
    )


def summarize(runs: Sequence[Mapping[str, Any]], source: bytes, about: Mapping[str, Any]) -> Submission:
    """The submission that follows from the JSON of its runs, their script, and what the author says about it.

    ValueError if these runs do not belong in one record.
    """
    if not runs:
        raise ValueError("there are no runs: a record has one or more")
    first = runs[0]
    for run in runs:
        if run["partial"] or run.get("eval_artifact"):
            raise ValueError(f"run {run['run_id']} scored a part of the split or did not train: leave it out of --runs")
    require_equal(runs, SAME_IN_ALL_RUNS)

    if sha256(source) != first["code_sha256"]:
        raise ValueError(
            f"the script has sha256 {sha256(source)}, but the run was made with {first['code_sha256']}: "
            "give --script the one that ran"
        )
    settings = sorted(name for name in script_settings(source.decode()) - PER_RUN if name in first)
    require_equal(runs, settings)

    by_seed = sorted(runs, key=lambda run: run["seed"])
    results = {str(run["seed"]): seed_result(run) for run in by_seed}
    if len(results) < len(runs):
        seeds = ", ".join(str(run["seed"]) for run in by_seed)
        raise ValueError(f"the runs have the seeds {seeds}: a record holds one run of each seed")

    def values(key: str) -> list[float]:
        return [getattr(result, key) for result in results.values()]

    def deviation(key: str) -> float | None:
        return statistics.stdev(values(key)) if len(results) > 1 else None

    lossless = first["tokenizer_lossless"]
    return Submission(
        **about,
        **{name: first[name] for name in COPIED_TO_SUBMISSION},
        schema_version=1,
        hardware=f"{first['world_size']}x {first['device']}",
        bytes_artifact=max(result.bytes_artifact for result in results.values()),
        bytes_total=max(result.bytes_total for result in results.values()),
        val_loss=statistics.fmean(values("val_loss")),
        val_loss_std=deviation("val_loss"),
        val_bpb=statistics.fmean(values("val_bpb")),
        val_bpb_std=deviation("val_bpb"),
        pre_quant_val_bpb=statistics.fmean(values("pre_quant_val_bpb")),
        train_seconds=statistics.fmean(values("train_seconds")),
        tokenizer_lossless=lossless if isinstance(lossless, bool) else None,
        settings={name: first[name] for name in settings},
        seed_results=results,
    )


def require_equal(runs: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> None:
    """ValueError if runs differ in one of these keys."""
    first = runs[0]
    for run in runs[1:]:
        for key in keys:
            if run.get(key) != first[key]:
                raise ValueError(
                    f"{key} is {first[key]} in run {first['run_id']} and {run.get(key)} in run {run['run_id']}: "
                    "a record holds runs of one kind, name those with --runs"
                )


# ----------------------------------------------------------------------------------------------------------------------
# Logs, in the grammar of the published challenge
# ----------------------------------------------------------------------------------------------------------------------

NUMBER = r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf)(?![\w.])"
STEP_LINE = re.compile(rf"(?:step:)?(\d{{1,12}})/\d+ (train|val)_loss: ?{NUMBER}(?: val_bpb: ?{NUMBER})?(.*)")
RESUMED_LINE = re.compile(r"resumed:step:(\d{1,12})/")
TRAIN_TIME = re.compile(r"train_time: ?(\d+(?:\.\d+)?) ?(ms|m|s)?")
SECONDS_PER_UNIT = {"ms": 1e-3, "s": 1.0, "m": 60.0, None: 1.0}
SCORE_LINE = re.compile(rf"([A-Za-z]\w*) val_loss: ?{NUMBER} val_bpb: ?{NUMBER}(.*)")
KEY_VALUE = re.compile(r"\b([a-z]\w*):([^\s,]+)")

# Values that stand in a line of another form than key:value.
NAMED_VALUES = {
    "settings": re.compile(r"^preset:\S+ .*settings:(\S*)"),
    "dataset": re.compile(r"\bdataset:(\S+)"),
    "bytes_code": re.compile(r"Code size: (\d+) bytes"),
    "bytes_artifact": re.compile(r"Serialized model \S+: (\d+) bytes"),
    "bytes_total": re.compile(r"Total submission size \S+: (\d+) bytes"),
}
# No real log comes near these, and reading stays fast.
MAX_LINE = 4000  # characters
MAX_LINES = 100_000
MAX_VALUES = 20_000
# Where str.splitlines ends a line.
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


class CurvePoint(NamedTuple):
    step: int
    seconds: float  # NaN where the line has no time
    loss: float  # nats per token
    bpb: float | None = None  # bits per byte, where the line has them


class FinalScore(NamedTuple):
    line: str  # the name that the line begins with
    val_loss: float
    val_bpb: float


class RunLog(NamedTuple):
    """What a log says."""

    train_curve: list[CurvePoint]
    val_curve: list[CurvePoint]
    scores: dict[str, FinalScore]  # by the name of their line, in the order of the log
    values: dict[str, str]  # the last value of every key:value, and the values in NAMED_VALUES

    @property
    def final(self) -> FinalScore | None:
        """The result of the run: its last `_exact` line or, if there is none, its last score."""
        exact = [score for name, score in self.scores.items() if name.endswith("_exact")]
        candidates = exact or list(self.scores.values())
        return candidates[-1] if candidates else None


def parse_log(text: str) -> RunLog:
    """Read a log of this project or of the published challenge. Lines of any other form are skipped.

    ValueError for one with more lines, or more keys, than a run prints.
    """
    if sum(text.count(end) for end in LINE_ENDS) > MAX_LINES:
        raise ValueError(f"a log has more than {MAX_LINES} lines")
    log = RunLog([], [], {}, {})
    for line in text.splitlines():
        if len(line) > MAX_LINE or ":" not in line:
            continue

        step = STEP_LINE.match(line)
        if step:
            time = TRAIN_TIME.search(step[5])
            seconds = float(time[1]) * SECONDS_PER_UNIT[time[2]] if time else math.nan
            curve = log.train_curve if step[2] == "train" else log.val_curve
            bpb = float(step[4]) if step[4] else None
            curve.append(CurvePoint(int(step[1]), seconds, float(step[3]), bpb))
            continue

        # What a run did after the checkpoint that it went on from, it did again.
        resumed = RESUMED_LINE.match(line)
        if resumed:
            last_step = int(resumed[1])
            while log.train_curve and log.train_curve[-1].step > last_step:
                log.train_curve.pop()
            # The validation of that step comes again.
            while log.val_curve and log.val_curve[-1].step >= last_step:
                log.val_curve.pop()

        # A score of a part of the split is not a result.
        score = SCORE_LINE.match(line)
        if score and not re.search(r"(^|\s)partial:", score[4]):
            log.scores[score[1]] = FinalScore(score[1], float(score[2]), float(score[3]))

        for key, value in KEY_VALUE.findall(line):
            in_brackets = value.endswith(")") and value.count(")") > value.count("(")
            log.values[key] = value[:-1] if in_brackets else value
        for key, pattern in NAMED_VALUES.items():
            if found := pattern.search(line):
                log.values[key] = found[1]
        if len(log.values) + len(log.scores) > MAX_VALUES:
            raise ValueError(f"a log has more than {MAX_VALUES} keys")
    return log
