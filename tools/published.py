"""Reads and judges a folder in the style of the published challenge, openai/parameter-golf.

    from published import import_published, verdict_on

    found = import_published(folder)
    print("\n".join(verdict_on(folder, found)))

Nothing is guessed, and nothing of the folder is run. Sizes are those of its files, where it has them, and scores and
seconds are those of its logs; what only submission.json says is called a claim. The command is
`python tools/submission.py import FOLDER`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from record import (
    SECONDS_PER_UNIT,
    TRAIN_TIME,
    FinalScore,
    RunLog,
    Submission,
    Track,
    counted,
    is_scalar,
    load_texts,
    load_tracks,
    parse_log,
    read_json,
    read_text,
    seeds_named,
)

# What folders of the published challenge call our keys; the first that is there counts.
ALIASES = {
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
    "train_seconds": ("train_seconds", "train_time_s_mean", "wallclock_seconds"),
    "hardware": ("hardware", "gpu", "platform"),
    "torch": ("torch", "pytorch_version"),
    "base": ("base", "based_on", "base_submission", "base_pr"),
    "blurb": ("blurb", "technique_summary", "notes"),
}
OUR_KEYS = [field.name for field in dataclasses.fields(Submission)]
KEY_MISSING = "submission.json: "
KEY_UNKNOWN = "submission.json: a known meaning of its key "

# Names of scores whose model learned at test time, or mixed in what it had just read.
ADAPTIVE = re.compile(r"ttt|slot|n_?gram|ppm", re.IGNORECASE)
ROUNDED = 5.1e-5  # bits per byte: scores are published with four digits
MAX_NAMES = 6  # of files, in one line


class Imported(NamedTuple):
    """What a folder in the style of the published challenge holds. Nothing in it is guessed."""

    known: dict[str, Any]  # what its submission.json says, under our names
    seeds: dict[str, dict[str, Any]]  # what submission.json and the logs say about each seed
    missing: list[str]  # what it lacks to be a record here


def import_published(folder: Path) -> Imported:
    """Read a submission.json of any shape, and the logs beside it."""
    claims, missing = read_claims(folder)
    known = under_our_names(claims)

    # What is known of the seeds goes to `seeds`, together with what the logs say.
    seed_results = known.pop("seed_results", None)
    has_seed_results = isinstance(seed_results, dict)
    seeds = {}
    if has_seed_results:
        seeds = {seed: dict(result) for seed, result in seed_results.items() if isinstance(result, dict)}

    logs, is_named_so = training_logs(folder)
    for log_file in logs:
        # The score of the record is that of its only run.
        claim = known.get("val_bpb") if len(logs) == 1 else None
        seed, values = read_seed_log(log_file, seeds, claim)
        seeds.setdefault(seed, {}).update(values)
        if "log_val_bpb" not in values:
            missing.append(f"a final val_bpb in {log_file.name}")

    promised = claims.get("seeds") or list(seeds)
    if isinstance(promised, list):
        missing += [f"the log of seed {seed}" for seed in map(str, promised) if "log" not in seeds.get(seed, {})]
    if not logs:
        missing.append("any training log")
    elif not is_named_so:
        names = ", ".join(path.name for path in logs)
        missing.append(f"a log whose name begins with train ({names} is read in its place)")
    if not (folder / "README.md").is_file():
        missing.append("README.md" + beside(folder, "*.md"))
    if not (folder / "train_gpt.py").is_file():
        missing.append("train_gpt.py" + beside(folder, "*.py"))
    if not list(folder.glob("*.ptz")):
        missing.append("the artifact, so that the score cannot be computed again without training")

    for name in OUR_KEYS:
        is_there = has_seed_results if name == "seed_results" else name in known
        is_logged = bool(seeds) and all(name in values for values in seeds.values())
        if not is_there and not is_logged and name != "benchmarks":
            missing.append(f"{KEY_MISSING}{name}")
    understood = {"seeds", *OUR_KEYS, *(key for aliases in ALIASES.values() for key in aliases)}
    missing += [f"{KEY_UNKNOWN}{key!r}" for key in claims if key not in understood]
    return Imported(known, seeds, missing)


def beside(folder: Path, pattern: str) -> str:
    """The files that may be meant by a missing one, in brackets; empty if there are none."""
    names = sorted(path.name for path in folder.glob(pattern) if path.is_file())
    return f" (beside it: {', '.join(names[:MAX_NAMES])})" if names else ""


def training_logs(folder: Path) -> tuple[list[Path], bool]:
    """The logs of a folder, and whether they are named as the challenge names them, train*.log or train*.txt.

    Otherwise they are the files of another name that hold a final score.
    """
    files = sorted(path for pattern in ("*.log", "*.txt") for path in folder.glob(pattern) if path.is_file())
    named = [path for path in files if path.name.startswith("train")]
    if named:
        return named, True
    others = []
    for path in files:
        try:
            has_score = parse_log(read_text(path)).final is not None
        except ValueError:  # too large, or in another encoding
            continue
        if has_score:
            others.append(path)
    return others, False


def read_claims(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The object in submission.json, or in a file with a similar name, and what is missing of it."""
    files = [folder / "submission.json", *sorted(folder.glob("submission*.json"))]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        return {}, ["submission.json"]

    missing = []
    if path.name != "submission.json":
        missing.append(f"submission.json (it has {path.name})")
    claims = read_json(path, strict=False)
    if not isinstance(claims, dict):
        missing.append("an object in submission.json")
        claims = {}
    return claims, missing


def under_our_names(claims: Mapping[str, Any]) -> dict[str, Any]:
    known = {}
    for name in OUR_KEYS:
        for alias in ALIASES.get(name, (name,)):
            if claims.get(alias) is not None:
                known[name] = claims[alias]
                break
    return known


def read_seed_log(path: Path, seeds: Mapping[str, Mapping[str, Any]], claim: Any) -> tuple[str, dict[str, Any]]:
    """The seed of a log, and what the log says.

    seeds   what submission.json says of each seed
    claim   the score of the record if this is its only log

    `implied_bytes` is the number of bytes by which the score was divided. It follows from the loss, the bits per byte
    and the tokens, and shows at once when two submissions counted the same text differently.
    """
    text = read_text(path)
    log = parse_log(text)
    named = re.search(r"seed_?(\d+)", path.name)
    seed = named[1] if named else log.values.get("seed", "unknown")

    values: dict[str, Any] = {"log": path.name}
    for key in ("bytes_code", "bytes_artifact", "bytes_total"):
        if log.values.get(key, "").isdecimal():
            values[key] = int(log.values[key])
    for key in ("model_params", "world_size"):
        if found := re.search(rf"^(?:.*\s)?{key}: ?(\d+)\b", text, re.MULTILINE):
            values[key] = int(found[1])
    seconds = training_seconds(text)
    if seconds is not None:
        values["train_seconds"] = seconds

    score = score_of_run(log, seeds.get(seed, {}).get("val_bpb", claim))
    if score:
        values["log_line"] = score.line
        values["log_val_loss"] = score.val_loss
        values["log_val_bpb"] = score.val_bpb
        values["log_scores"] = {name: other.val_bpb for name, other in log.scores.items()}
        # The time stands in the line with four digits, not in the exact one below it.
        name = re.escape(score.line.removesuffix("_exact"))
        if found := re.search(rf"^{name}(?:_exact)? .*\beval_time:(\d+)ms", text, re.MULTILINE):
            values["eval_seconds"] = int(found[1]) / 1000

        tokens = log.values.get("tokens", log.values.get("val_tokens", ""))
        if tokens.isdecimal() and score.val_bpb > 0:
            implied = score.val_loss / math.log(2) * float(tokens) / score.val_bpb
            if math.isfinite(implied):
                values["implied_bytes"] = round(implied)
    return seed, values


def training_seconds(text: str) -> float | None:
    """The time at which the training stopped or, if the log does not say that, the latest time of a step."""
    stops = [line for line in text.splitlines() if line.startswith("stopping_early")]
    times = TRAIN_TIME.findall("\n".join(stops)) or TRAIN_TIME.findall(text)
    return max((float(time) * SECONDS_PER_UNIT[unit or None] for time, unit in times), default=None)


def score_of_run(log: RunLog, claim: Any) -> FinalScore | None:
    """The score of a log that is claimed or, if none of them is, its final one."""
    final = log.final
    if final is None or not is_scalar(claim, float):
        return final
    candidates = [final, *reversed(log.scores.values())]
    return next((score for score in candidates if abs(score.val_bpb - claim) <= ROUNDED), final)


# ----------------------------------------------------------------------------------------------------------------------
# The verdict
# ----------------------------------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """What became of one limit of the track. `ok` is None where nothing says it."""

    name: str
    ok: bool | None
    text: str


def verdict_on(folder: Path, found: Imported) -> list[str]:
    """Lines that say whether a published submission keeps the limits, what it is and what it lacks."""
    name, track = track_of_folder(folder)
    limits = [
        size_limit(folder, found, track),
        seconds_limit(found, "training", "train_seconds", track.max_train_seconds),
        seconds_limit(found, "evaluation", "eval_seconds", track.max_eval_seconds),
        hardware_limit(found, track),
    ]
    marks = {True: "ok  ", False: "FAIL", None: "?   "}
    lines = [f"{folder.name}, by the limits of {name} ({track.title}):"]
    lines += [f"{marks[limit.ok]} {limit.name}: {limit.text}" for limit in limits]

    lines += [class_line(found), seeds_line(found, track), score_line(found), text_line(found, track)]
    lines += missing_lines(found)

    lines.append(closing_line(limits))
    return [line for line in lines if line]


def closing_line(limits: Sequence[Limit]) -> str:
    failing = [limit.name for limit in limits if limit.ok is False]
    kept = [limit.name for limit in limits if limit.ok]
    unknown = [limit.name for limit in limits if limit.ok is None]
    sentences = []
    if failing:
        sentences.append(f"FAILS {len(failing)} of {len(limits)} limits: {', '.join(failing)}.")
    elif kept:
        sentences.append(f"KEEPS {len(kept)} of {len(limits)} limits: {', '.join(kept)}.")
    if unknown:
        sentences.append(f"Its files do not tell: {', '.join(unknown)}.")
    return " ".join([*sentences, "Whether its score is right, only a new training can show."])


def track_of_folder(folder: Path) -> tuple[str, Track]:
    """The track that the folder lies in, or the first of records/tracks.json, the published challenge."""
    _, tracks = load_tracks()
    name = folder.resolve().parent.name
    if name not in tracks:
        name = next(iter(tracks))
    return name, tracks[name]


def size_limit(folder: Path, found: Imported, track: Track) -> Limit:
    """The bytes of the script, from its file, and of the largest artifact, from the logs."""
    script = script_of(folder)
    n_code = whole(found.known.get("bytes_code"))
    code = "code (submission.json)"
    if script is not None:
        n_code = script.stat().st_size
        code = script.name

    n_artifact = whole(found.known.get("bytes_artifact"))
    artifact = "artifact (submission.json)"
    logged = {
        seed: values["bytes_artifact"] for seed, values in found.seeds.items() if whole(values.get("bytes_artifact"))
    }
    if logged:
        largest = max(logged, key=lambda seed: logged[seed])
        n_artifact = logged[largest]
        artifact = f"artifact (log of seed {largest})"
    if n_code is None or n_artifact is None:
        lacking = "the code" if n_code is None else "the artifact"
        return Limit("size", None, f"nothing says how many bytes {lacking} takes")

    total = n_code + n_artifact
    text = f"{n_code:,} bytes of {code} and {n_artifact:,} of {artifact} make {total:,}"
    limit = track.max_total_bytes
    if limit is not None:
        text += f", {total - limit:,} more than the {limit:,} allowed" if total > limit else f" of {limit:,} allowed"
    claimed = whole(found.known.get("bytes_total"))
    if claimed is not None and claimed != total:
        text += f"; submission.json says {claimed:,}"
    others = sorted(path.name for path in folder.glob("*.py") if path != script)
    if others and script is not None:
        text += f"; not counted: {', '.join(others[:MAX_NAMES])}"
    return Limit("size", limit is None or total <= limit, text)


def script_of(folder: Path) -> Path | None:
    """train_gpt.py or, where that is missing, the only script whose name begins with train."""
    script = folder / "train_gpt.py"
    if script.is_file():
        return script
    others = [path for path in folder.glob("train*.py") if path.is_file()]
    return others[0] if len(others) == 1 else None


def whole(value: Any) -> int | None:
    """A number of bytes, or None for anything else that a JSON may hold."""
    return value if is_scalar(value, int) and 0 < value < 2**63 else None


def real(value: Any) -> float | None:
    """A number, or None for anything else that a JSON may hold."""
    return float(value) if is_scalar(value, float) else None


def seconds_limit(found: Imported, name: str, key: str, limit: float | None) -> Limit:
    """The longest time of all seeds, by their logs."""
    seconds = {seed: values[key] for seed, values in found.seeds.items() if is_scalar(values.get(key), float)}
    if not seconds:
        claim = real(found.known.get(key))
        if claim is None:
            return Limit(name, None if limit is not None else True, "no log says how long it took")
        text = f"{claim:.1f} s, as submission.json says; no log does"
        return Limit(name, None if limit is None or claim <= limit else False, text)

    longest = max(seconds, key=lambda seed: seconds[seed])
    text = f"{seconds[longest]:.1f} s at most (seed {longest})"
    if limit is None:
        return Limit(name, True, text)
    over = seconds[longest] - limit
    text += f", {over:.2f} s more than the {limit:g} allowed" if over > 0 else f" of {limit:g} allowed"
    return Limit(name, over <= 0, text)


def hardware_limit(found: Imported, track: Track) -> Limit:
    """The number of processes, by the logs. They rarely name the device, so that it stays a claim."""
    numbers = {values["world_size"] for values in found.seeds.values() if "world_size" in values}
    claim = found.known.get("hardware")
    told = f"submission.json says {claim}" if claim else "submission.json does not name it"
    if not numbers:
        return Limit("hardware", None if track.world_size else True, f"no log has a world_size; {told}")
    shown = " or ".join(str(number) for number in sorted(numbers))
    text = f"world_size {shown} in the logs; {told}"
    return Limit("hardware", track.world_size is None or numbers == {track.world_size}, text)


def class_line(found: Imported) -> str:
    """Whether the score is that of a model which learned from the tokens that it was scored on."""
    lines = {str(values["log_line"]) for values in found.seeds.values() if "log_line" in values}
    others = {name for values in found.seeds.values() for name in values.get("log_scores", {})}
    adaptive = sorted(name for name in lines if ADAPTIVE.search(name))
    if adaptive:
        return f"Class B: it learns while it is scored, as the name of its score says ({', '.join(adaptive)})."
    if not lines:
        return "Class: unknown, because no log has a final score."
    shown = f"Class A, as far as the name of its score says ({', '.join(sorted(lines))})."
    also = sorted(name for name in others if ADAPTIVE.search(name))
    return f"{shown} It also reports {', '.join(also)}, which is class B." if also else shown


def seeds_line(found: Imported, track: Track) -> str:
    seeds = list(found.seeds)
    if not seeds:
        return "Seeds: none that a log or submission.json names."
    line = f"Seeds: {', '.join(seeds)}"
    without = [seed for seed, values in found.seeds.items() if "log" not in values]
    if without:
        line += f"; there is no log of {seeds_named(without)}"
    if len(seeds) < track.min_seeds:
        line += f"; the track asks for {track.min_seeds}"
    params = {values["model_params"] for values in found.seeds.values() if "model_params" in values}
    return line + (f". Parameters: {' or '.join(f'{n:,}' for n in sorted(params))}." if params else ".")


def score_line(found: Imported) -> str:
    """The mean and deviation over the logs, and whether submission.json says the same."""
    scores = [values["log_val_bpb"] for values in found.seeds.values() if "log_val_bpb" in values]
    if not scores:
        return "Score: no log has one."
    line = f"Score: val_bpb {statistics.fmean(scores):.5f}"
    if len(scores) > 1:
        line += f", standard deviation {statistics.stdev(scores):.5f}"
    line += f" over {counted(len(scores), 'log')}"

    claim = real(found.known.get("val_bpb"))
    if claim is None:
        return f"{line}; submission.json has none."
    if abs(claim - statistics.fmean(scores)) <= ROUNDED:
        return f"{line}, as submission.json says."
    return f"{line}; submission.json says {claim:.5f}, which is another score."


def text_line(found: Imported, track: Track) -> str:
    """Whether the bytes that follow from the scores are those of the track's text."""
    implied = sorted({values["implied_bytes"] for values in found.seeds.values() if "implied_bytes" in values})
    if not implied:
        return ""
    shown = " or ".join(f"{n:,}" for n in implied)
    texts = [text for text in load_texts() if text.name == track.text or not track.text]
    for text in texts:
        # Scores with eight digits, of which some leave out the first token, give the bytes to a few in a million.
        tolerance = max(text.tolerance, 1e-5) * text.bytes
        if all(abs(n - text.bytes) <= tolerance for n in implied):
            return f"Text: the scores were divided by {shown} bytes, which fits {text.name}."
    wanted = track.text or "any text in records/texts.json"
    return f"Text: the scores were divided by {shown} bytes, which does not fit {wanted}."


def missing_lines(found: Imported) -> list[str]:
    """What is missing: files and logs one by one, keys of submission.json in one line."""
    lines = []
    keys = []
    unknown = []
    for text in found.missing:
        if text.startswith(KEY_UNKNOWN):  # begins with KEY_MISSING, too
            unknown.append(text.removeprefix(KEY_UNKNOWN))
        elif text.startswith(KEY_MISSING):
            keys.append(text.removeprefix(KEY_MISSING))
        else:
            lines.append(f"Missing: {text}.")
    if keys:
        lines.append(f"Missing in submission.json, {counted(len(keys), 'key')} of a record: {', '.join(keys)}.")
    if unknown:
        lines.append(
            f"Without a meaning here, {counted(len(unknown), 'key')} of submission.json: {', '.join(unknown)}."
        )
    return lines
