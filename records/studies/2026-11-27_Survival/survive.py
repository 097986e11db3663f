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
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    "OMP_NUM_THREADS": "1",
}
# The state of these models, weights, average and optimizers together, is 9 MB. It is written again and again.
KILLED = {**SMALL, "ITERATIONS": "60", "MAX_WALLCLOCK_SECONDS": "0", "CHECKPOINT_EVERY": "1e-9", "TRAIN_LOG_EVERY": "1"}


def start(folder: Path, settings: dict[str, str]) -> subprocess.Popen[bytes]:
    """The script in a folder, with nothing of what the environment sets."""
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | settings
    with (folder / "out").open("ab") as out:
        return subprocess.Popen([sys.executable, str(SCRIPT)], cwd=folder, env=env, stdout=out, stderr=out)


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


def soak(seconds: float, folder: Path, every: float = 10.0) -> dict[str, Any]:
    """Run for so long and look at the process. -> figures of the first and the last fifth, and all points"""
    settings = {**SMALL, "ITERATIONS": "100000000", "MAX_WALLCLOCK_SECONDS": str(seconds), "CHECKPOINT_EVERY": "20"}
    process = start(folder, {**settings, "TRAIN_LOG_EVERY": "50"})
    points = []
    with tqdm(total=seconds, unit="s") as bar:
        while process.poll() is None:
            time.sleep(every)
            if (folder / "runs/run/log.txt").exists() and process.poll() is None:
                points.append({"seconds": bar.n, **look(process.pid, folder)})
            bar.update(min(every, seconds - bar.n))
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}: {(folder / 'out').read_text()[-2000:]}")

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
    process = start(folder, settings)
    if process.wait() != 0:
        raise SystemExit(f"a run ended with status {process.returncode}: {(folder / 'out').read_text()[-2000:]}")
    return json.loads((folder / "runs/run/run.json").read_text())["train_seconds"]


def kill_once(folder: Path, delay: float) -> bool:
    """Start a run and kill it so many seconds after its first checkpoint. -> whether a checkpoint was being written"""
    process = start(folder, KILLED)
    while not list(folder.glob("runs/run/checkpoint_*.ckpt")) and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return any((folder / "runs/run").glob("*.part"))


def kills(n_kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Kill runs at random moments and let each go on to its end. -> how many ended as the run that was never killed"""
    rng = random.Random(seed)
    reference = folder / "reference"
    reference.mkdir()
    seconds = run_to_end(reference, KILLED)
    expected = artifact_sha256(reference)

    figures = {"kills": 0, "inside_a_write": 0, "equal": 0, "after_the_end": 0}
    for i in tqdm(range(n_kills)):
        place = folder / str(i)
        place.mkdir()
        figures["inside_a_write"] += kill_once(place, rng.uniform(0, seconds))
        figures["kills"] += 1
        if list(place.glob("runs/run/run.json")):
            figures["after_the_end"] += 1
        else:
            run_to_end(place, {**KILLED, "RESUME": "1"})
        figures["equal"] += artifact_sha256(place) == expected
        shutil.rmtree(place)
    return figures


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("soak", "kills"))
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = soak(args.seconds, folder) if args.what == "soak" else kills(args.kills, folder, args.seed)
    (args.out / f"{args.what}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if name != "points"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
