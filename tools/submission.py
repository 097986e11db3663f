"""Make a submission from finished runs, and read those of others. The only file that knows a record's layout.

    python tools/submission.py new --track track_non_record_16mb --name MyIdea --author "Ada" --github-id ada \\
        --blurb "What is new, in one sentence."
    python tools/submission.py import FOLDER     what a folder in the style of the published challenge holds and lacks
    python tools/submission.py review FOLDER --kind disputed --reviewer NAME --note "Why."

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
import dataclasses
import datetime
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from record import (
    PER_RUN,
    RECORDS,
    ROOT,
    SAME_IN_ALL_RUNS,
    Review,
    Submission,
    Track,
    add_review,
    data_path,
    faults,
    load_submission,
    load_tracks,
    log_path,
    parse_log,
    read_json,
    read_run,
    run_faults,
    run_path,
    save_submission,
    script_path,
    script_settings,
    sha256,
    summarize,
)


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
        if why := "; ".join(run_faults(run)):
            print(f"skipped {path}: {why}", file=sys.stderr)
        elif run["steps"]:
            found.append((path, run))
    if not found:
        raise ValueError(f"{logs} has no JSON of a finished training run: train first, or name runs with --runs")
    last, alike = found[-1][1], []
    names = (last.keys() & (settings | {"code_sha256"})) - PER_RUN - {"tokenizer_sha256"}
    for path, run in found:
        if all(run.get(name) == last[name] for name in names):
            if other := next((key for key in SAME_IN_ALL_RUNS if run[key] != last[key]), ""):
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
        entry |= {
            key: int(log.values[key]) for key in ("bytes_code", "bytes_artifact", "bytes_total") if key in log.values
        }
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
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
