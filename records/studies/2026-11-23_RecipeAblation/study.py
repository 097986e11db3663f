"""What the record recipe is worth, and which of its parts: two studies on one CPU.

    python study.py run duel --data DIR --score DIR [DIR ...] --tokenizer FILE     recipe and baseline, same seconds
    python study.py run ablation --data DIR --tokenizer FILE --jobs 2              recipe less one technique, same steps
    python study.py report                                                         tables and plots from runs.jsonl

Every run is a process of its own, on cores of its own: the script of this study (COMMIT below) with the settings of a
study and a variant. Its run.json becomes a line of runs.jsonl and its log a file of logs/; `run` trains only what
runs.jsonl does not hold yet. Each seed goes through all variants, in a random order, before the next seed starts. So a
machine that changes its speed changes it for all variants alike. DIR holds shards with 1,024 pieces, FILE their
SentencePiece model.

The script comes out of git's history, which needs a full clone. To use a file instead, set STUDY_SCRIPT=FILE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
RUNS = HERE / "runs.jsonl"
LOGS = HERE / "logs"
Run = dict[str, Any]

# The script that ran.
COMMIT = "cf88ff04a50cef2c63fa71c36706084f12e68d66"
SCRIPT_SHA256 = "ce443275fa00d05bd2c1bae2303e7251d4da021fcaf6684dc227375cf2722c12"


class Study(NamedTuple):
    """Settings of all runs, and of each variant on top; the first variant is what the others are compared with."""

    common: str
    variants: dict[str, str]


SMALL = "NUM_LAYERS=4 MLP_MULT=2 NUM_HEADS=4 NUM_KV_HEADS=2 VOCAB_SIZE=1024 NUM_LOOPS=0 VAL_LOSS_EVERY=0 "
# The record recipe, written for 5,000 steps of 786,432 tokens, at the few steps that a CPU does in some minutes.
RECIPE = "TRAIN_BATCH_TOKENS=2048 TRAIN_SEQ_LEN=256 EMA_DECAY=0.97 MUON_MOMENTUM_WARMUP_STEPS=200 "
BASELINE = "PRESET=baseline TRAIN_BATCH_TOKENS=8192 TRAIN_SEQ_LEN=512 WARMDOWN_ITERS=100 "
STUDIES = {
    "duel": Study(
        SMALL + "MODEL_DIM=256 MAX_WALLCLOCK_SECONDS=300 VAL_MAX_TOKENS=50000 TRAIN_LOG_EVERY=10 ",
        {
            "record": RECIPE + "NUM_LAYERS=3 MLP_MULT=3",  # its wide MLP; 2.03 million parameters, the baseline 2.10
            "baseline": BASELINE,
            "baseline, steps as small": BASELINE + "TRAIN_BATCH_TOKENS=2048 TRAIN_SEQ_LEN=256 WARMDOWN_ITERS=400",
            "the same, shuffled": BASELINE + "TRAIN_BATCH_TOKENS=2048 TRAIN_SEQ_LEN=256 WARMDOWN_ITERS=400 SHUFFLE=1",
        },
    ),
    "ablation": Study(
        SMALL
        + RECIPE
        + "MODEL_DIM=128 ITERATIONS=400 MAX_WALLCLOCK_SECONDS=0 VAL_MAX_TOKENS=100000 TRAIN_LOG_EVERY=50 ",
        {
            "record": "",
            "relu^2": "LEAKY_RELU_SLOPE=0",
            "rotary on all channels": "ROPE_DIMS=0",
            "no LN scale": "LN_SCALE=0",
            "QK gain 1.5": "QK_GAIN_INIT=1.5",
            "no XSA": "XSA_LAST_N=0",
            "no attention gate": "SPARSE_ATTN_GATE_ENABLED=0",
            "no SmearGate": "SMEAR_GATE_ENABLED=0",
            "no skip gates": "SKIP_GATES_ENABLED=0",
            "two lanes in the last layer": "PARALLEL_START_LAYER=3",
            "layers 1-2 looped once more": "NUM_LOOPS=1 LOOP_START=1 LOOP_END=2",
            "no document masks": "DOCUMENT_MASKS=0",
            "no shuffling": "SHUFFLE=0",
            "no row normalisation": "MUON_ROW_NORMALIZE=0",
            "no Polar Express": "POLAR_EXPRESS=0",
            "no weight decay": "MUON_WD=0 EMBED_WD=0 ADAM_WD=0",
            "no EMA": "EMA_DECAY=0",
            "warmdown over the last third": "WARMDOWN_FRAC=0.33",
            "learning rate down to 0": "MIN_LR=0",
            "no clipping": "GRAD_CLIP_NORM=0",
            "flat evaluation": "EVAL_METHOD=flat",
        },
    ),
}


def read_runs() -> dict[tuple[str, str, int], Run]:
    """The finished runs by (study, variant, seed)."""
    lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.exists() else []
    return {(run["study"], run["variant"], run["seed"]): run for run in map(json.loads, lines)}


def parse(settings: str) -> dict[str, str]:
    return dict(item.split("=") for item in settings.split())


def find_script(folder: Path) -> Path:
    """The file that STUDY_SCRIPT names or else, written into `folder`, the script as git remembers it."""
    if "STUDY_SCRIPT" in os.environ:
        return Path(os.environ["STUDY_SCRIPT"]).resolve()

    shown = subprocess.run(["git", "show", f"{COMMIT}:train_gpt.py"], cwd=HERE, capture_output=True)
    if shown.returncode != 0:
        sys.exit(f"git does not know commit {COMMIT[:7]}: run `git fetch --unshallow`, or set STUDY_SCRIPT=FILE")
    if hashlib.sha256(shown.stdout).hexdigest() != SCRIPT_SHA256:
        sys.exit(f"train_gpt.py of commit {COMMIT[:7]} is not the script with sha256 {SCRIPT_SHA256}")
    path = folder / "train_gpt.py"
    path.write_bytes(shown.stdout)
    return path


def run_script(script: Path, settings: dict[str, str], cores: list[int]) -> Run:
    """Run `script`. -> its run.json; raises RuntimeError with the end of its output if it fails"""
    command = [sys.executable, str(script)]
    if hasattr(os, "sched_setaffinity"):
        command = ["taskset", "-c", ",".join(map(str, cores)), *command]
    env = {**os.environ, **settings, "OMP_NUM_THREADS": str(len(cores))}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{settings} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return dict(json.loads(Path(settings["OUT_DIR"], f"{settings['RUN_ID']}.json").read_text(encoding="utf-8")))


def train(script: Path, study: str, variant: str, seed: int, cores: list[int], args: argparse.Namespace) -> Run:
    """One line of runs.jsonl; the artifact is scored on the whole validation split of every folder of `args.score`."""
    settings = parse(STUDIES[study].common) | parse(STUDIES[study].variants[variant])
    run_id = "_".join([study, *re.findall(r"[\w.]+", variant), str(seed)])
    with tempfile.TemporaryDirectory() as folder:
        places = {"OUT_DIR": folder, "ARTIFACT_DIR": folder, "TOKENIZER_PATH": str(args.tokenizer)}
        chosen = {**settings, **places, "DATA_PATH": str(args.data), "RUN_ID": run_id, "SEED": str(seed)}
        run = run_script(script, chosen, cores)
        log = Path(folder, f"{run_id}.txt").read_text(encoding="utf-8")
        artifact = {"EVAL_ARTIFACT": str(Path(folder, "final_model.int8.ptz")), "RUN_ID": "score"}
        for data in args.score:
            score = run_script(script, {**places, **artifact, "DATA_PATH": str(data)}, cores)
            run |= {
                f"{key}:{data.name}": score[key] for key in ("val_bpb", "val_nats", "val_text_sha256", "scored_tokens")
            }
    LOGS.mkdir(exist_ok=True)
    for path, name in ((args.data, args.data.name), (args.tokenizer, args.tokenizer.name), (folder, ".")):
        log = log.replace(str(path), name)
    (LOGS / f"{run_id}.txt").write_text(log, encoding="utf-8")
    names = {"data_path": args.data.name, "tokenizer_path": args.tokenizer.name, "out_dir": "", "artifact_dir": ""}
    return {"study": study, "variant": variant, **run, **names}


def run_all(args: argparse.Namespace) -> None:
    """Train what is missing, `args.jobs` runs at a time."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    free_cores: Queue[list[int]] = Queue()
    for job in range(args.jobs):
        free_cores.put(cores[job * len(cores) // args.jobs : (job + 1) * len(cores) // args.jobs])

    finished = read_runs()
    jobs = []
    for seed in args.seeds:
        order = list(args.variants or STUDIES[args.study].variants)
        random.Random(seed).shuffle(order)
        jobs += [(variant, seed) for variant in order if (args.study, variant, seed) not in finished]

    lock = threading.Lock()
    folder = tempfile.TemporaryDirectory()
    script = find_script(Path(folder.name))

    def work(job: tuple[str, int]) -> None:
        own_cores = free_cores.get()
        try:
            run = train(script, args.study, *job, own_cores, args)
        finally:
            free_cores.put(own_cores)
        with lock, RUNS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
            print(f"{job[0]}, seed {job[1]}: {run['steps']} steps, val_bpb {run['val_bpb']:.4f}", flush=True)

    with folder, ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, jobs))


def pooled_std(groups: Iterable[list[float]]) -> float:
    """Standard deviation inside groups, by all of them together: few seeds tell little, many variants enough."""
    groups = [group for group in groups if len(group) > 1]
    squares = sum((x - statistics.fmean(group)) ** 2 for group in groups for x in group)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups)) if groups else math.nan


def summary(study: str, key: str = "val_bpb") -> list[dict[str, Any]]:
    """One row per variant: mean and spread of `key`, and its paired difference to the first variant, seed by seed."""
    runs, variants = read_runs(), list(STUDIES[study].variants)
    values = {v: {seed: run[key] for (s, w, seed), run in runs.items() if (s, w) == (study, v)} for v in variants}
    first = values[variants[0]]
    paired = {v: [x - first[seed] for seed, x in values[v].items() if seed in first] for v in variants}
    spread = pooled_std(paired[v] for v in variants[1:])
    rows = []
    for v in variants:
        mine = list(values[v].values())
        if mine and paired[v]:
            steps = statistics.fmean(runs[study, v, seed]["steps"] for seed in values[v])
            row = {"variant": v, "seeds": len(mine), "steps": round(steps), "mean": statistics.fmean(mine)}
            row |= {"std": statistics.stdev(mine) if len(mine) > 1 else math.nan}
            row |= {"difference": statistics.fmean(paired[v]), "error": spread / math.sqrt(len(paired[v]))}
            rows.append(row)
    return rows


def print_table(study: str, key: str = "val_bpb") -> None:
    print(f"\n{study}, {key}\n\n| variant | seeds | steps | mean | std | to the recipe | standard error |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(summary(study, key), key=lambda row: float(row["difference"])):
        scores = f"{row['mean']:.4f} | {row['std']:.4f} | {row['difference']:+.4f} | {row['error']:.4f}"
        print(f"| {row['variant']} | {row['seeds']} | {row['steps']} | {scores} |".replace("nan", "-"))


def draw() -> None:
    """differences.svg: the ablation; curves.svg: loss of the duel against time."""
    import matplotlib

    matplotlib.use("Agg")
    # With a fixed salt and without a date, the same runs give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "study", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    rows = sorted(summary("ablation")[1:], key=lambda row: float(row["difference"]))
    figure, axes = plt.subplots(figsize=(7.5, 0.28 * len(rows) + 1), layout="constrained")
    axes.barh([row["variant"] for row in rows], [row["difference"] for row in rows], xerr=[r["error"] for r in rows])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of val_bpb against the recipe, with its standard error (right: the recipe is better)")
    figure.savefig(HERE / "differences.svg", metadata={"Date": None})
    draw_curves()


def draw_curves() -> None:
    """curves.svg, which the project's README shows."""
    command = [sys.executable, str(ROOT / "tools" / "plot.py"), "--out", str(HERE / "curves.svg")]
    for variant, name in (("record", "recipe"), ("baseline", "baseline")):
        runs = [run for (study, v, _), run in read_runs().items() if (study, v) == ("duel", variant)]
        score = statistics.fmean(run["val_bpb:corpus_sp1024"] for run in runs)
        logs = [str(LOGS / f"{run['run_id']}.txt") for run in runs]
        command += ["--line", f"{name}|{score:.3f} bits per byte", *logs]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is missing")
    run.add_argument("study", choices=STUDIES)
    run.add_argument("--data", type=Path, required=True, help="shards to train on and to score")
    run.add_argument("--score", type=Path, nargs="+", default=[], help="shards to score the artifacts on, whole")
    run.add_argument("--tokenizer", type=Path, required=True)
    run.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    run.add_argument("--variants", nargs="+", metavar="NAME", help="default: all")
    run.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    commands.add_parser("report", help="print tables, draw plots")
    args = parser.parse_args()
    if args.command == "run":
        run_all(args)
        return
    keys = dict.fromkeys(key for run in read_runs().values() for key in run if key.startswith("val_bpb:"))
    for key in keys:
        print_table("duel", key)
    print_table("ablation")
    draw()


if __name__ == "__main__":
    main()
