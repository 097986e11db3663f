"""Make a submission from finished runs, read one of the published challenge, or review one.

    python tools/submission.py new --track track_non_record_16mb --name MyIdea --author "Ada" --github-id ada \\
        --blurb "What is new, in one sentence."
    python tools/submission.py import FOLDER
    python tools/submission.py review FOLDER --kind disputed --reviewer NAME --note "Why."

`new` makes a record's folder (tools/record.py says what is in it). It takes the newest run in runs/ and every other run
there with the same script, settings, data and hardware, so that all seeds that were run are counted and none is chosen.
Where a seed was run more than once, --runs has to name the runs. With --artifact the record also gets the artifact
of a run, and the validation shards and tokenizer that it was scored on.
What the track refuses is an error, and nothing is written then, unless --force says so.

`import` judges a folder in the style of the published challenge by its files and logs: sizes and seconds against the
limits, the class, the seeds and their mean, and what is missing. Below that it prints, as JSON, what submission.json
says under our names and what the logs say for each seed. With --json it prints nothing else.

`review` adds an objection to a record, or settles those that were made. tools/verify.py --sign adds what it measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leaderboard import read_board, table_note, text_name
from published import import_published, verdict_on
from record import (
    PER_RUN,
    RECORDS,
    ROOT,
    SAME_IN_ALL_RUNS,
    Review,
    Submission,
    Track,
    add_review,
    artifact_path,
    benchmarks_path,
    data_path,
    day_fault,
    evaluation_faults,
    load_evaluation,
    load_submission,
    load_tracks,
    log_path,
    read_json,
    read_run,
    run_faults,
    run_path,
    save_submission,
    script_path,
    script_settings,
    seeds_named,
    sha256,
    summarize,
)
from verify import printable, refusals

# ----------------------------------------------------------------------------------------------------------------------
# new: what the author says
# ----------------------------------------------------------------------------------------------------------------------


def new(args: argparse.Namespace) -> int:
    rules_version, tracks = load_tracks()
    if args.track not in tracks:
        raise ValueError(f"--track={args.track} must be one of {', '.join(tracks)}")
    slug = folder_slug(args.name)
    texts = author_texts(args)

    script = Path(args.script)
    paths = [Path(path) for path in args.runs]
    if not paths:
        settings = script_settings(script.read_text(encoding="utf-8"))
        paths = runs_like_the_newest(Path(args.out_dir), settings)
    runs = [read_run(path) for path in paths]
    refuse_repeated_seeds(paths, runs)

    about = {
        **texts,
        "date": checked_date(args.date or runs[-1]["date"][:10]),
        "track": args.track,
        "rules_version": rules_version,
        "predictor_class": args.predictor_class,
        "base": args.base,
        "benchmarks": load_benchmarks(args.benchmarks, runs, args.track, tracks[args.track]),
    }
    submission = summarize(runs, script.read_bytes(), about)
    refuse_one_artifact(paths, runs)

    folder = Path(args.records, args.track, f"{submission.date}_{slug}")
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another --name, or remove the folder")
    refused = refusals(submission, tracks[args.track])
    if refused and not args.force:
        raise ValueError(refusal_text(submission, refused, tracks))

    write_record(folder, submission, paths, args)
    here = Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    print(f"{shown}: {seeds_named(submission.seed_results)}, val_bpb {submission.val_bpb:.4f}")
    for line in what_to_expect(folder, tracks):
        print(line)
    print("Next, write into its README.md what is new and why it helps, and run")
    print(f"    python tools/verify.py {shlex.quote(str(shown))}")
    print("    python tools/leaderboard.py")
    print("Then open a pull request with the folder and both tables (CONTRIBUTING.md says how).")
    return 0


def refusal_text(submission: Submission, refused: Sequence[str], tracks: Mapping[str, Track]) -> str:
    """Why a track refuses a record, and which tracks would take it."""
    lines = [f"{submission.track} will refuse this record, so nothing was written:"]
    lines += [f"    {fault}" for fault in refused]

    others = []
    for name, track in tracks.items():
        if not refusals(dataclasses.replace(submission, track=name), track):
            others.append(name)
    if others:
        lines.append(f"These tracks do not: {', '.join(others)}. Or add --force to write it all the same.")
    else:
        lines.append("Nor does any other track take it. Add --force to write it all the same.")
    return "\n".join(lines)


def what_to_expect(folder: Path, tracks: dict[str, Track]) -> list[str]:
    """What tools/verify.py and tools/leaderboard.py will say of a new record, for its author."""
    board = read_board(folder.parents[1], tracks)
    for unlisted, reason in board.unlisted:
        if unlisted == folder:
            return [f"It will not be listed: {reason}"]

    rows = [(table, row) for table in board.tables for row in table.rows if row.entry.folder == folder]
    if not rows:
        return []
    table, row = rows[0]
    lines = [f"tools/verify.py will fail it: {failure}" for failure in row.entry.failures]
    if row.rank is not None:
        lines.append(f"It will be number {row.rank} of {len(table.rows)} on {text_name(table.key.text)}.")
        lines.append(f"A new record: {row.verdict}.")
    elif note := table_note(table):
        lines.append(note)
    if table.key.text.lossless is False:
        lines.append("Its tokenizer is lossy, so it ranks apart from those that are not.")
    if artifact_path(folder) is None:
        lines.append("It has no artifact, so nobody can score it again: add --artifact if the text may be passed on.")
    return lines


def folder_slug(name: str) -> str:
    """The name of a record in the characters that the name of its folder may have: "Ünï 2" gives "Uni-2"."""
    # Letters with accents become letters and accents, of which only the letters stay.
    latin = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", latin).strip("-")
    if not re.search(r"[A-Za-z0-9]", slug):
        raise ValueError(
            f"--name={name} leaves nothing to name the folder by: add Latin letters or digits, the folder keeps those"
        )
    return slug


def author_texts(args: argparse.Namespace) -> dict[str, str]:
    """What the author says about a record in words. ValueError names an option that is blank."""
    texts = {
        "name": args.name,
        "author": args.author or git_user_name(),
        "github_id": args.github_id,
        "blurb": args.blurb,
        "licence": args.licence,
    }
    if not texts["author"]:
        raise ValueError("git has no user.name to take the author from: give one with --author")
    for name, text in texts.items():
        if not text.strip():
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}={text!r} is blank: give it a text")
    return texts


def git_user_name() -> str:
    """Empty where git is not installed or knows no name."""
    try:
        done = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip()


def checked_date(date: str) -> str:
    """The date itself; ValueError if it is no day on which a record can have been made, written YYYY-MM-DD."""
    if fault := day_fault(date):
        raise ValueError(f"the date {date!r} {fault}: give one of the form YYYY-MM-DD with --date")
    return date


def load_benchmarks(path: str, runs: Sequence[Mapping[str, Any]], track_name: str, track: Track) -> dict[str, float]:
    """The benchmark results in a file of tools/evaluate.py; ValueError if they are not what the track asks for."""
    if not track.benchmarks:
        if path:
            raise ValueError(f"--benchmarks={path}: {track_name} asks for no benchmarks, leave the option out")
        return {}
    command = f"python tools/evaluate.py RUN --protocol {track.benchmark_protocol} --out FILE"
    if not path:
        asked = ", ".join(track.benchmarks)
        raise ValueError(f"{track_name} asks for {asked}: give --benchmarks the FILE that this writes: {command}")

    evaluation = load_evaluation(Path(path))
    wrong = evaluation_faults(evaluation, {run["artifact_sha256"] for run in runs}, track)
    if wrong:
        raise ValueError(f"--benchmarks={path}: {'; '.join(wrong)}. This writes the right one: {command}")
    return {name: evaluation.benchmarks[name] for name in track.benchmarks}


# ----------------------------------------------------------------------------------------------------------------------
# new: which runs
# ----------------------------------------------------------------------------------------------------------------------


def runs_like_the_newest(out_dir: Path, settings: set[str]) -> list[Path]:
    """The JSON of the newest training run, and of all with the same script, settings, data and hardware.

    Runs with other settings are another experiment and are passed over. A run that differs only in its data or
    hardware is left out too, but named on stderr, because its author may not expect that.
    """
    runs = training_runs(out_dir)
    if not runs:
        raise ValueError(
            f"{out_dir} has no folder with the run.json of a finished training: train first, name another --out-dir, "
            "or name the files with --runs"
        )
    _, newest = runs[-1]

    # The tokenizer's hash is a setting, but another one means other data.
    compared = (newest.keys() & (settings | {"code_sha256"})) - PER_RUN - {"tokenizer_sha256"}
    alike = []
    for path, run in runs:
        if any(run.get(name) != newest[name] for name in compared):
            continue
        differing = [key for key in SAME_IN_ALL_RUNS if run[key] != newest[key]]
        if differing:
            key = differing[0]
            print(
                f"left out {path}: {key} is {run[key]}, in the newest run {newest[key]} "
                "(--runs names the runs of a record)",
                file=sys.stderr,
            )
            continue
        alike.append(path)
    return alike


def training_runs(out_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The whole training runs in an OUT_DIR, oldest first. Files that are not the JSON of a run are named on stderr."""
    found = []
    # A link, as runs/latest, leads to a folder that is found under its own name.
    files = [path for path in out_dir.glob("*/run.json") if path.is_file() and not path.parent.is_symlink()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        try:
            run = read_json(path)
        except (ValueError, OSError) as error:
            print(f"skipped {path}: {error}", file=sys.stderr)
            continue

        if isinstance(run, dict) and (run.get("eval_artifact") or run.get("partial")):
            continue  # an evaluation, or a score of a part of the split
        wrong = run_faults(run)
        if wrong:
            print(f"skipped {path}: {wrong[0]}", file=sys.stderr)
        elif run["steps"]:
            found.append((path, run))
    return found


def refuse_repeated_seeds(paths: Sequence[Path], runs: Sequence[Mapping[str, Any]]) -> None:
    """ValueError if a seed was run more than once. It suggests a command that takes one run of each seed."""
    runs_of_seed: dict[int, list[tuple[str, str, str]]] = {}
    for path, run in zip(paths, runs, strict=True):
        runs_of_seed.setdefault(run["seed"], []).append((run["date"], str(path), run["run_id"]))

    repeated = []
    for seed, found in sorted(runs_of_seed.items()):
        if len(found) > 1:
            files = ", ".join(f"{path} (run {run_id} of {date})" for date, path, run_id in sorted(found))
            repeated.append(f"seed {seed} was run {len(found)} times: {files}")
    if repeated:
        earliest = [min(found)[1] for found in runs_of_seed.values()]
        raise ValueError(
            f"{'; '.join(repeated)}. A record holds one run of each seed, and which one is not chosen for you: name "
            "the runs, and say in README.md why the others are left out. The earliest of each seed are "
            f"--runs {shlex.join(earliest)}"
        )


def refuse_one_artifact(paths: Sequence[Path], runs: Sequence[Mapping[str, Any]]) -> None:
    """ValueError if two runs name the same artifact, as runs that were started in one folder once did."""
    path_of: dict[str, Path] = {}
    for path, run in zip(paths, runs, strict=True):
        other = path_of.setdefault(run["artifact_sha256"], path)
        if other != path:
            raise ValueError(
                f"{other} and {path} name one and the same artifact, so that one of them did not write it: train that "
                "seed again"
            )


# ----------------------------------------------------------------------------------------------------------------------
# new: the folder
# ----------------------------------------------------------------------------------------------------------------------


def write_record(folder: Path, submission: Submission, paths: Sequence[Path], args: argparse.Namespace) -> None:
    """Make a record's folder, whole or not at all: after an error nothing of it is left."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        fill_record(part, folder.name, submission, paths, args)
        part.rename(folder)
    except BaseException:  # also when interrupted from the keyboard
        shutil.rmtree(part, ignore_errors=True)
        raise


def fill_record(
    folder: Path, name: str, submission: Submission, paths: Sequence[Path], args: argparse.Namespace
) -> None:
    """Write the files of a record called `name` into an empty folder. `paths` lead to the JSON of its runs."""
    runs = [read_json(path) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        log = path.with_name("log.txt")
        if not log.is_file():
            raise ValueError(f"{log} is missing: the log of a run must lie beside its JSON, put it there")
        seed = str(run["seed"])
        shutil.copyfile(path, run_path(folder, seed))
        shutil.copyfile(log, log_path(folder, seed))

    shutil.copyfile(args.script, script_path(folder))
    if args.benchmarks:
        shutil.copyfile(args.benchmarks, benchmarks_path(folder))
    if args.artifact:
        copy_artifact(folder, submission, paths)
    save_submission(folder, submission)
    samples = load_evaluation(benchmarks_path(folder)).samples if args.benchmarks else []
    (folder / "README.md").write_text(readme(name, submission, runs[0], samples), encoding="utf-8")


def copy_artifact(folder: Path, submission: Submission, paths: Sequence[Path]) -> None:
    """Copy the first artifact that lies beside the JSON of these runs, and the validation data of its run."""
    seed_of = {result.artifact_sha256: seed for seed, result in submission.seed_results.items()}
    for path in paths:
        for artifact in sorted(path.parent.glob("final_model.*.ptz")):
            seed = seed_of.get(sha256(artifact.read_bytes()))
            if seed is not None:
                copy_files_of(read_json(path), artifact, folder)
                print(f"{artifact}: the artifact of seed {seed}")
                return
    places = ", ".join(str(path.parent) for path in paths)
    raise ValueError(
        f"{places}: there is no artifact of these runs. Put one back to its run.json, train a seed again, or drop "
        "--artifact"
    )


def copy_files_of(run: Mapping[str, Any], artifact: Path, folder: Path) -> None:
    """Copy an artifact into the folder of a record, and the validation shards and tokenizer of its run."""
    shutil.copyfile(artifact, folder / artifact.name)
    data_path(folder).mkdir()
    for path in [*Path(run["data_path"]).glob("fineweb_val_*.bin"), Path(run["data_path"], "manifest.json")]:
        shutil.copyfile(path, data_path(folder) / path.name)
    shutil.copyfile(run["tokenizer_path"], data_path(folder) / "tokenizer.model")


def quoted_samples(samples: Sequence[str]) -> str:
    """A section with texts that the model wrote, or nothing."""
    if not samples:
        return ""
    # Four blanks make a text one that Markdown shows as it is.
    texts = [textwrap.indent(text, "    ", lambda line: True) for text in samples]
    return "\n## What it says\n\n" + "\n\n---\n\n".join(texts) + "\n"


def readme(name: str, submission: Submission, run: Mapping[str, Any], samples: Sequence[str] = ()) -> str:
    """A first README.md for the record in a folder called `name`. `run` is the JSON of one of its runs."""
    s = submission
    folder = f"records/{s.track}/{name}"

    rows = []
    for seed, result in s.seed_results.items():
        cells = [
            seed,
            str(result.steps),
            f"{result.pre_quant_val_bpb:.4f}",
            f"{result.val_bpb:.4f}",
            f"{result.train_seconds:.1f}",
            f"{result.eval_seconds:.1f}",
            f"{result.bytes_total:,}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    table = "\n".join(rows)

    score = f"**val_bpb {s.val_bpb:.4f}**, one seed."
    if s.val_bpb_std is not None:
        score = f"**val_bpb {s.val_bpb:.4f}** ± {s.val_bpb_std:.4f}, mean and standard deviation of {len(rows)} seeds."
    benchmarks = ", ".join(f"{key} {value:.4f}" for key, value in s.benchmarks.items())
    if benchmarks:
        benchmarks = f"\nBenchmarks: {benchmarks}."
    base = f"It builds on `{s.base}`." if s.base else "It builds on no earlier record."

    return f"""# {s.name}

{s.blurb}

<!-- Write here what is new, and why it helps. -->

{score}
Code and artifact take {s.bytes_total:,} bytes. The model has {s.model_params:,} parameters and a context of
{s.context:,} tokens. It was trained on {s.hardware} with torch {s.torch}, and scored on {s.val_documents:,} documents:
{s.val_tokens:,} tokens, {s.val_bytes:,} bytes ({s.bytes_counted}).{benchmarks}

| seed | steps | before quantizing | val_bpb | train s | eval s | bytes |
|---|---|---|---|---|---|---|
{table}
{quoted_samples(samples)}
## Repeat it

These lines check the record and train one seed again, from the root of the repository. They need the data set
`{s.train_dataset}` ({s.train_tokens:,} training tokens) in `data/`. What the run writes goes to `/tmp/again`.

```bash
python tools/verify.py {folder}
{repeat_command(folder, s, run)}
```

{base} Licence: {s.licence}.
"""


def repeat_command(folder: str, submission: Submission, run: Mapping[str, Any]) -> str:
    """The command that repeats a run from the root of the repository. `folder` is the record's path from there.

    The data are expected where the tools in data/ put them, and nothing is written into the record's folder.
    """
    changed = run.get("settings_changed")
    if changed is None:  # the script does not say which settings were changed, so all of them are given
        changed = {name.upper(): value for name, value in submission.settings.items()}

    settings = {}
    if "preset" in run:
        settings["PRESET"] = run["preset"]
    for name, value in changed.items():
        if name.lower() not in PER_RUN:
            settings[name] = str(int(value)) if isinstance(value, bool) else str(value)

    dataset = submission.train_dataset
    tokenizer = Path(run["tokenizer_path"])
    beside_the_data = tokenizer.parent.name == dataset
    tokenizer_folder = f"./data/datasets/{dataset}" if beside_the_data else "./data/tokenizers"
    settings["DATA_PATH"] = f"./data/datasets/{dataset}"
    settings["TOKENIZER_PATH"] = f"{tokenizer_folder}/{tokenizer.name}"
    settings["SEED"] = str(run["seed"])
    settings["OUT_DIR"] = "/tmp/again"
    if "artifact_dir" in run:  # a setting of earlier scripts, which wrote the artifact to another place than the log
        settings["ARTIFACT_DIR"] = "/tmp/again"

    n = run["world_size"]
    launcher = "python" if n == 1 else f"torchrun --standalone --nproc_per_node={n}"
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    return " ".join([*words, launcher, shlex.quote(f"{folder}/train_gpt.py")])


# ----------------------------------------------------------------------------------------------------------------------
# import, review, and the command line
# ----------------------------------------------------------------------------------------------------------------------


def show_import(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    if not folder.exists():
        raise ValueError(f"{folder} is missing: name the folder of a submission")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: name the folder of a submission")

    found = import_published(folder)
    if not args.json:
        for line in verdict_on(folder, found):
            print(printable(line))
        print()
    print(json.dumps(found._asdict(), indent=1, default=str))
    return 0


def review(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    entry = Review(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        reviewer=args.reviewer,
        kind=args.kind,
        code_sha256=load_submission(folder).code_sha256,
        note=args.note,
    )
    add_review(folder, entry)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("new", help="make a record's folder from finished runs")
    command.set_defaults(run=new)
    command.add_argument("--track", required=True)
    command.add_argument("--name", required=True, help="name of the record and of its folder")
    command.add_argument("--blurb", required=True, help="what is new, in a sentence or two")
    command.add_argument("--author", default="", help="default: git's user.name")
    command.add_argument("--github-id", required=True)
    command.add_argument("--base", default="", help="the record that this one builds on, <track>/<folder>")
    command.add_argument("--class", dest="predictor_class", choices=("A", "B"), default="A")
    command.add_argument("--licence", default="MIT")
    command.add_argument(
        "--benchmarks", default="", metavar="FILE", help="what tools/evaluate.py wrote, where the track asks for it"
    )
    command.add_argument("--date", default="", help="YYYY-MM-DD; default: the day of the last run")
    command.add_argument(
        "--runs", nargs="+", default=[], metavar="JSON", help="default: the newest in --out-dir and all like it"
    )
    command.add_argument("--out-dir", default="runs", metavar="DIR", help="OUT_DIR of the runs; default: runs")
    command.add_argument("--script", default=str(ROOT / "train_gpt.py"))
    command.add_argument("--records", default=str(RECORDS), metavar="DIR")
    command.add_argument("--artifact", action="store_true", help="add artifact, validation shards and tokenizer")
    command.add_argument("--force", action="store_true", help="write the record even if its track will refuse it")

    command = commands.add_parser("import", help="judge a folder of the published challenge")
    command.set_defaults(run=show_import)
    command.add_argument("folder")
    command.add_argument("--json", action="store_true", help="print the JSON only, without the verdict")

    command = commands.add_parser("review", help="object to a record, or settle the objections")
    command.set_defaults(run=review)
    command.add_argument("folder")
    command.add_argument("--kind", choices=("disputed", "settled"), required=True)
    command.add_argument("--reviewer", required=True)
    command.add_argument("--note", required=True, help="why")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
