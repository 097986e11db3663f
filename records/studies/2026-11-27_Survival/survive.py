"""How runs survive: a soak of an hour, and kills at random moments.

    python survive.py soak --seconds 3600        a run with a checkpoint every 20 s, looked at every 10 s
    python survive.py kills --kills 100          runs that SIGKILL ends at random moments and that go on

The corpus of the README's first run is used: `python data/build_shards.py` makes it. Figures go to soak.json and
kills.json beside this file, or into the folder that --out names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The runs inherit the number of threads. Two of the small models fit beside each other on two cores.
os.environ["OMP_NUM_THREADS"] = "1"

import torch._dynamo  # noqa: F401
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SCRIPT = ROOT / "train_gpt.py"

# Small steps, so that an hour has many of them.
SMALL = {
    "PRESET": "smoke",
    "DATA_PATH": str(ROOT / "data/datasets/pydoc_sp1024"),
    "NUM_LAYERS": "3",
    "MODEL_DIM": "128",
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "256",
    "VAL_LOSS_EVERY": "0",
    "VAL_MAX_TOKENS": "2000",
    "RUN_ID": "run",
}
# The state of the model, weights, average and optimizers together, is written again and again.
KILLED = {
    **SMALL,
    "ITERATIONS": "40",
    "MAX_WALLCLOCK_SECONDS": "0",
    "CHECKPOINT_EVERY": "1e-9",
    "TRAIN_LOG_EVERY": "1",
    "CODEC": "int8_zlib",
}


def start(folder: Path, settings: dict[str, str]) -> int:
    """The script in a folder, with nothing of what the environment sets, in a process of its own. -> its number

    The process is forked from this one, which has imported torch already. That saves seconds for each of hundreds.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(folder)
        out = os.open("out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.clear()
        os.environ.update(settings)
        sys.argv = [str(SCRIPT)]
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(process: int, wait: bool = True) -> int | None:
    """How a process ended: its exit status, or a signal's number below 0. None if it still runs."""
    found, status = os.waitpid(process, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


# -- Soak ------------------------------------------------------------------------------------------------------------


def look(process: int, folder: Path) -> dict[str, Any]:
    """Memory in MiB, open files, threads and steps of a running process; speed in ms per step since it began."""
    status = Path(f"/proc/{process}/status").read_text()
    log = (folder / "runs/run/log.txt").read_text()
    steps = re.findall(r"^step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms", log, re.MULTILINE)
    step, milliseconds = steps[-1] if steps else (0, 0)
    resident = re.search(r"VmRSS:\s+(\d+)", status)
    threads = re.search(r"Threads:\s+(\d+)", status)
    assert resident
    assert threads
    return {
        "memory_mib": int(resident[1]) / 1024,
        "open_files": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(threads[1]),
        "step": int(step),
        "train_ms": int(milliseconds),
        "checkpoints": len(list((folder / "runs/run").glob("checkpoint_*.ckpt"))),
    }


def soak(seconds: float, folder: Path, every: float, checkpoint_every: float) -> dict[str, Any]:
    """Run for so long and look at the process. -> figures of the first and the last fifth, and all points"""
    limits = {"ITERATIONS": "100000000", "MAX_WALLCLOCK_SECONDS": str(seconds)}
    settings = {**SMALL, **limits, "CHECKPOINT_EVERY": str(checkpoint_every), "TRAIN_LOG_EVERY": "50"}
    process = start(folder, settings)
    points = []
    with tqdm(total=seconds, unit="s") as bar:
        while (status := status_of(process, wait=False)) is None:
            if (folder / "runs/run/log.txt").exists():
                points.append({"seconds": bar.n, **look(process, folder)})
            time.sleep(every)
            bar.update(min(every, seconds - bar.n))
    if status:
        raise SystemExit(f"the run ended with status {status}: {(folder / 'out').read_text()[-2000:]}")

    # Points of training; what quantizes behind it has memory of its own.
    trained = [point for point in points if point["checkpoints"]]
    fifth = max(2, len(trained) // 5)
    figures: dict[str, Any] = {"seconds": seconds, "steps": trained[-1]["step"]}
    for name, part in (("first_fifth", trained[:fifth]), ("last_fifth", trained[-fifth:])):
        steps = part[-1]["step"] - part[0]["step"]
        figures[name] = {
            "memory_mib": statistics.median(point["memory_mib"] for point in part),
            "open_files": statistics.median(point["open_files"] for point in part),
            "threads": statistics.median(point["threads"] for point in part),
            "step_ms": (part[-1]["train_ms"] - part[0]["train_ms"]) / max(steps, 1),
        }
    return {**figures, "points": points}


# -- Kills -----------------------------------------------------------------------------------------------------------


def artifact_sha256(folder: Path) -> str:
    [path] = (folder / "runs/run").glob("final_model.*.ptz")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_to_end(folder: Path, settings: dict[str, str]) -> float:
    """-> seconds from the first step to the end of the training"""
    status = status_of(start(folder, settings))
    if status:
        raise SystemExit(f"a run ended with status {status}: {(folder / 'out').read_text()[-2000:]}")
    return json.loads((folder / "runs/run/run.json").read_text())["train_seconds"]


def kill_once(folder: Path, delay: float) -> bool:
    """Start a run and kill it so many seconds after its first checkpoint. -> whether a checkpoint was being written"""
    process = start(folder, KILLED)
    while not list(folder.glob("runs/run/checkpoint_*.ckpt")):
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    status_of(process)
    return any((folder / "runs/run").glob("*.part"))


def kills(n_kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Kill runs at random moments and let each go on to its end. -> how many ended as the run that was never killed"""
    rng = random.Random(seed)
    reference = folder / "reference"
    reference.mkdir()
    seconds = run_to_end(reference, KILLED)
    expected = artifact_sha256(reference)

    figures = {"kills": 0, "inside_a_write": 0, "equal": 0}
    with tqdm(total=n_kills) as bar:
        while figures["kills"] < n_kills:
            place = folder / "killed"
            place.mkdir()
            inside_a_write = kill_once(place, rng.uniform(0, seconds))
            # A run that was over before it was killed proves nothing.
            if not (place / "runs/run/run.json").exists():
                run_to_end(place, {**KILLED, "RESUME": "1"})
                figures["kills"] += 1
                figures["inside_a_write"] += inside_a_write
                figures["equal"] += artifact_sha256(place) == expected
                bar.update()
            shutil.rmtree(place)
    return figures


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("soak", "kills"))
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between looks at the soaking run")
    parser.add_argument("--checkpoint-every", type=float, default=20.0, help="its CHECKPOINT_EVERY")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.what == "soak":
            figures = soak(args.seconds, folder, args.every, args.checkpoint_every)
        else:
            figures = kills(args.kills, folder, args.seed)
    (args.out / f"{args.what}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if name != "points"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
