"""A run that is cut short goes on as if it had not been: signals, kills, lost ranks, checkpoints that are damaged."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FinishedRun

import train_gpt as tg

# Sends signals to its own process in the middle of the given steps.
SIGNALLED = """
import json, os, signal, sys, torch, train_gpt as tg

steps = []
during = json.loads(os.environ.pop("SIGNALS"))
update = torch.optim.AdamW.step

def signal_and_update(optimizer, *rest):
    steps.append(optimizer)
    for name, step, rank in during:
        if len(steps) == step and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), getattr(signal, name))
    return update(optimizer, *rest)

torch.optim.AdamW.step = signal_and_update
try:
    status = tg.main()
except tg.EXPECTED_ERRORS as error:
    sys.exit(f"error: {error}")
sys.stdout.flush()
os._exit(status)
"""


@pytest.fixture(scope="module")
def run_signalled(tmp_path_factory, tiny_settings, fork) -> Callable[..., FinishedRun]:
    """A function that runs the script and sends it signals in some steps. A rank that is not named is rank 0."""
    driver = tmp_path_factory.mktemp("driver") / "driver.py"
    driver.write_text(SIGNALLED)

    def run(*signals: tuple[str, int] | tuple[str, int, str], size: int = 1, folder: Path | None = None, **changes):
        env = {name: value for name, value in {**tiny_settings, **changes}.items() if value is not None}
        env["SIGNALS"] = json.dumps([[*s, "0"][:3] for s in signals])
        return fork(str(driver), folder or tmp_path_factory.mktemp("run"), env, size)

    return run


def go_on(run: FinishedRun, run_signalled: Callable, resume: str = "1", **changes: Any) -> FinishedRun:
    """Go on with a run that was cut short, with the settings that its checkpoint knows and nothing else."""
    return run_signalled(folder=run.folder, **{**dict.fromkeys(tg.SETTINGS), "RESUME": resume, **changes})


def checkpoints(run: FinishedRun) -> list[str]:
    return sorted(path.name for path in run.run_folder.glob("checkpoint_*"))


def curve(log: str) -> dict[int, str]:
    """The loss of every step, that of the last time if a step was done twice."""
    return dict(re.findall(r"^step:(\d+)/\d+ train_loss:(\S+)", log, re.MULTILINE))


# -- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_run_that_a_signal_ended_goes_on_to_the_same_bits(name, run_signalled, trained_record, record_settings):
    """With all techniques, an average and looped layers: same losses, same score, same artifact."""
    run = run_signalled((name, 12), **record_settings)
    assert run.status == 128 + getattr(signal, name)
    [kept] = checkpoints(run)
    assert kept == "checkpoint_000000000012.ckpt"
    last_line = run.err.splitlines()[-1]
    assert last_line.startswith(f"interrupted: the state is kept in runs/run/{kept}, python ")
    assert last_line.endswith(" --resume=runs/run goes on")
    assert run.log.splitlines()[-1] == last_line

    done = go_on(run, run_signalled)
    assert done.status == 0, done.err
    assert "resumed:step:12/30 train_time:" in done.log
    assert curve(done.log) == curve(trained_record.log)
    assert done.artifact.read_bytes() == trained_record.artifact.read_bytes()
    assert done.results["val_bpb"] == trained_record.results["val_bpb"]
    assert done.results["resumes"] == 1
    assert checkpoints(done) == []


def test_last_two_checkpoints_are_kept_and_either_leads_to_the_same_bits(run_signalled, trained, tmp_path):
    """A run that SIGKILL ended has no last word. It may even leave a file half written."""
    run = run_signalled(("SIGKILL", 20), CHECKPOINT_EVERY="1e-9")
    assert run.status == -signal.SIGKILL
    older, newer = checkpoints(run)[:2]
    (run.run_folder / "checkpoint_000000000099.ckpt.part").write_bytes(b"half")
    for name in (older, newer):
        again = tmp_path / name
        subprocess.run(["cp", "-r", run.folder, again], check=True)
        done = go_on(run._replace(folder=again), run_signalled, resume=f"runs/run/{name}", CHECKPOINT_EVERY="0")
        assert done.status == 0, done.err
        assert done.artifact.read_bytes() == trained.artifact.read_bytes()
        assert sorted(path.name for path in done.run_folder.iterdir()) == [done.artifact.name, "log.txt", "run.json"]


def test_damaged_checkpoint_is_passed_over_for_the_older_one(run_signalled, trained):
    run = run_signalled(("SIGKILL", 20), CHECKPOINT_EVERY="1e-9")
    newest = run.run_folder / checkpoints(run)[1]
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    done = go_on(run, run_signalled)
    assert done.status == 0, done.err
    assert f"warning: passed over: checkpoint runs/run/{newest.name} is damaged (checksum)" in done.err
    assert f"resumed:step:{int(newest.stem[-12:]) - 1}/30" in done.log
    assert done.artifact.read_bytes() == trained.artifact.read_bytes()


def test_signal_that_asks_to_keep_the_state_does_not_end_the_run(run_signalled, trained):
    run = run_signalled(("SIGUSR1", 7), ("SIGKILL", 15))
    assert checkpoints(run) == ["checkpoint_000000000007.ckpt"]
    done = go_on(run, run_signalled)
    assert done.artifact.read_bytes() == trained.artifact.read_bytes()


def test_second_ctrl_c_ends_at_once(run_signalled):
    run = run_signalled(("SIGINT", 3), ("SIGINT", 3))
    assert run.status == -signal.SIGINT
    assert "Ctrl-C again stops at once" in run.err
    assert checkpoints(run) == []


def test_signal_that_the_parent_has_ignored_stays_ignored(tiny_settings, tmp_path):
    """As nohup does."""
    code = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
import train_gpt as tg
signals = tg.Signals()
signals.catch()
os.kill(os.getpid(), signal.SIGHUP)
assert signals.stop == 0
signals.deferred = True
os.kill(os.getpid(), signal.SIGTERM)
assert signals.stop == signal.SIGTERM
"""
    subprocess.run([sys.executable, "-c", code], env=tiny_settings, cwd=tmp_path, check=True)


def test_clock_goes_on_with_the_seconds_already_spent(run_signalled):
    """Within the limit for both parts together."""
    limits = {"MAX_WALLCLOCK_SECONDS": "4", "ITERATIONS": "1000000", "TRAIN_LOG_EVERY": "1000"}
    run = run_signalled(("SIGTERM", 20), **limits)
    [path] = run.run_folder.glob("checkpoint_*")
    spent = tg.read_checkpoint(path).progress.seconds
    assert 0 < spent < 4
    done = go_on(run, run_signalled)
    assert done.status == 0, done.err
    assert done.results["steps"] > 20
    assert spent < done.results["train_seconds"] <= 4.5
    assert done.results["seconds_train"] == pytest.approx(done.results["train_seconds"], abs=0.3)


def test_training_that_is_over_is_not_done_again(run_script, record_settings, run_signalled, trained_record):
    """Killed while it quantizes, a run with checkpoints goes on behind its last step."""
    code = """
import os, signal, sys, train_gpt as tg
tg.fit_artifact = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(tg.main())
"""
    run = run_script("-c", code, **record_settings, CHECKPOINT_EVERY="1000")
    assert run.status == -signal.SIGKILL
    assert checkpoints(run) == ["checkpoint_000000000030.ckpt"]
    done = go_on(run, run_signalled)
    assert done.status == 0, done.err
    assert done.log.count("train_loss:") == 30
    assert done.artifact.read_bytes() == trained_record.artifact.read_bytes()


def test_checkpoint_that_a_full_disk_does_not_take_does_not_end_the_run(run_script, trained):
    code = """
import sys, train_gpt as tg
write_file = tg.write_file
def refuse(path, *pieces):
    if path.suffix == ".ckpt":
        raise OSError(f"{path} cannot be written (No space left on device): make room there, or name another folder")
    write_file(path, *pieces)
tg.write_file = refuse
sys.exit(tg.main())
"""
    run = run_script("-c", code, CHECKPOINT_EVERY="1e-9")
    assert run.status == 0, run.err
    assert "warning: runs/run/checkpoint_" in run.log
    assert "cannot be written (No space left on device)" in run.log
    assert run.artifact.read_bytes() == trained.artifact.read_bytes()


# -- what may differ -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_short(run_signalled) -> FinishedRun:
    run = run_signalled(("SIGTERM", 5))
    assert checkpoints(run) == ["checkpoint_000000000005.ckpt"]
    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MATRIX_LR": "0.5"}, "MATRIX_LR=0.5 instead of 0.04"),
        ({"NUM_LAYERS": "4", "SEED": "2"}, "NUM_LAYERS=4 instead of 3, SEED=2 instead of 1337"),
        ({"PRESET": "record"}, "PRESET=record, but RESUME=runs/run/checkpoint_000000000005.ckpt is of PRESET=baseline"),
        ({"EVAL_ARTIFACT": "x"}, "unset one"),
        ({"RESUME": "nowhere"}, "nowhere holds no checkpoint to go on from"),
        ({"OUT_DIR": "elsewhere"}, "elsewhere holds no checkpoint"),
        ({"RESUME": "runs/run", "RUN_ID": "other"}, "goes on in its own folder, not in runs/other"),
        ({"RESUME": "runs/run/log.txt"}, "runs/run/log.txt is no checkpoint of train_gpt.py"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_checkpoint_is_refused_by_name(changes, message, cut_short, run_signalled):
    before = cut_short.log
    refused = go_on(cut_short, run_signalled, **changes)
    assert refused.status == 1
    [line] = refused.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert cut_short.log == before


def test_other_data_is_refused(cut_short, run_signalled, text):
    other = text.with_name("unseen")
    changes = {"DATA_PATH": str(other), "TOKENIZER_PATH": str(other / "tokenizer.model")}
    refused = go_on(cut_short, run_signalled, **changes)
    assert "is not the data of RESUME=runs/run/checkpoint_000000000005.ckpt" in refused.err


def test_runs_between_which_resume_cannot_choose_are_named(cut_short, run_signalled, tmp_path):
    for name in ("a", "b"):
        subprocess.run(["cp", "-r", cut_short.run_folder, tmp_path / name], check=True)
    refused = go_on(cut_short, run_signalled, OUT_DIR=str(tmp_path))
    assert f"RESUME=1 may mean {tmp_path}/a, {tmp_path}/b: name the one" in refused.err


def test_micro_batch_logging_and_number_of_ranks_may_differ(run_signalled, trained):
    """Up to rounding, the losses are the same."""
    run = run_signalled(("SIGTERM", 5))
    changes = {"MICRO_BATCH_TOKENS": "64", "VAL_LOSS_EVERY": "7"}
    done = go_on(run, run_signalled, size=2, **changes)
    assert done.status == 0, done.err
    here, there = curve(done.log), curve(trained.log)
    assert here.keys() == there.keys()
    assert [float(x) for x in here.values()] == pytest.approx([float(x) for x in there.values()], abs=2e-3)
    assert done.results["world_size"] == 2
