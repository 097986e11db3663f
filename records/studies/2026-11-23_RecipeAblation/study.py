"""What the record recipe is worth, and which of its parts: two studies on one CPU.

    python study.py run duel --data DIR --score DIR [DIR ...] --tokenizer FILE     recipe and baseline, same seconds
    python study.py run ablation --data DIR --tokenizer FILE --jobs 2              recipe less one technique, same steps
    python study.py report                                                         tables and plots from runs.jsonl

A run is train_gpt.py beside this file with the settings of its study and variant, in a process of its own on cores of
its own. Its run.json becomes a line of runs.jsonl, its log a file of logs/; `run` trains what runs.jsonl does not hold
yet. Every seed goes through all variants, in an order of its own, before the next seed starts: a machine that changes
its speed changes it for all of them alike. DIR holds shards with 1,024 pieces, FILE their SentencePiece model.
"""

from __future__ import annotations

import argparse
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
RUNS, LOGS = HERE / "runs.jsonl", HERE / "logs"
Run = dict[str, Any]


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


def run_script(settings: dict[str, str], cores: list[int]) -> Run:
    """Run train_gpt.py. -> its run.json; raises RuntimeError with the end of its output if it fails"""
    command = [sys.executable, str(HERE / "train_gpt.py")]
    if hasattr(os, "sched_setaffinity"):
        command = ["taskset", "-c", ",".join(map(str, cores)), *command]
    env = {**os.environ, **settings, "OMP_NUM_THREADS": str(len(cores))}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{settings} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return dict(json.loads(Path(settings["OUT_DIR"], f"{settings['RUN_ID']}.json").read_text(encoding="utf-8")))


def train(study: str, variant: str, seed: int, cores: list[int], args: argparse.Namespace) -> Run:
    """One line of runs.jsonl; the artifact is scored on the whole validation split of every folder of `args.score`."""
    settings = parse(STUDIES[study].common) | parse(STUDIES[study].variants[variant])
    run_id = "_".join([study, *re.findall(r"[\w.]+", variant), str(seed)])
    with tempfile.TemporaryDirectory() as folder:
        places = {"OUT_DIR": folder, "ARTIFACT_DIR": folder, "TOKENIZER_PATH": str(args.tokenizer)}
        run = run_script(
            {**settings, **places, "DATA_PATH": str(args.data), "RUN_ID": run_id, "SEED": str(seed)}, cores
        )
        log = Path(folder, f"{run_id}.txt").read_text(encoding="utf-8")
        artifact = {"EVAL_ARTIFACT": str(Path(folder, "final_model.int8.ptz")), "RUN_ID": "score"}
        for data in args.score:
            score = run_script({**places, **artifact, "DATA_PATH": str(data)}, cores)
            run |= {f"{key}:{data.name}": score[key] for key in ("val_bpb", "val_nats", "val_text_sha256", "scored_tokens")}
    LOGS.mkdir(exist_ok=True)
    for path, name in ((args.data, args.data.name), (args.tokenizer, args.tokenizer.name), (folder, ".")):
        log = log.replace(str(path), name)
    (LOGS / f"{run_id}.txt").write_text(log, encoding="utf-8")
    names = {"data_path": args.data.name, "tokenizer_path": args.tokenizer.name, "out_dir": "", "artifact_dir": ""}
    return {"study": study, "variant": variant, **run, **names}


def run_all(args: argparse.Namespace) -> None:
    """Train what is missing, `args.jobs` runs at a time."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    free: Queue[list[int]] = Queue()
    for job in range(args.jobs):
        free.put(cores[job * len(cores) // args.jobs : (job + 1) * len(cores) // args.jobs])
    finished, lock, jobs = read_runs(), threading.Lock(), []
    for seed in args.seeds:
        order = list(args.variants or STUDIES[args.study].variants)
        random.Random(seed).shuffle(order)
        jobs += [(variant, seed) for variant in order if (args.study, variant, seed) not in finished]

    def work(job: tuple[str, int]) -> None:
        mine = free.get()
        try:
            run = train(args.study, *job, mine, args)
        finally:
            free.put(mine)
        with lock, RUNS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
            print(f"{job[0]}, seed {job[1]}: {run['steps']} steps, val_bpb {run['val_bpb']:.4f}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
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
    """differences.svg: the ablation; curves.svg: training loss of the duel against time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(summary("ablation")[1:], key=lambda row: float(row["difference"]))
    figure, axes = plt.subplots(figsize=(7.5, 0.28 * len(rows) + 1), layout="constrained")
    axes.barh([row["variant"] for row in rows], [row["difference"] for row in rows], xerr=[r["error"] for r in rows])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of val_bpb against the recipe, with its standard error (right: the recipe is better)")
    figure.savefig(HERE / "differences.svg", metadata={"Date": None})

    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for number, variant in enumerate(STUDIES["duel"].variants):
        for path in sorted(LOGS.glob("duel_" + "_".join(re.findall(r"[\w.]+", variant)) + "_[0-9]*.txt")):
            points = re.findall(r"train_loss:(\S+) train_time:(\d+)ms", path.read_text(encoding="utf-8"))
            seconds, losses = [int(ms) / 1000 for _, ms in points], [float(loss) for loss, _ in points]
            label = variant if path.stem.endswith("_1") else None
            axes.plot(seconds, losses, color=f"C{number}", linewidth=0.6, label=label)
    axes.set(xlabel="seconds of training", ylabel="training loss, nats per token", ylim=(3, 6))
    axes.legend()
    figure.savefig(HERE / "curves.svg", metadata={"Date": None})


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
