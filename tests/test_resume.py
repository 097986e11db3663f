"""A run that is cut short goes on as if it had not been: signals, kills, lost ranks, checkpoints that are damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import JUNK, FinishedRun, memory_below
from hypothesis import given, settings
from hypothesis import strategies as st

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


def keep_from(run: FinishedRun, folder: Path) -> FinishedRun:
    """A copy of what a run left."""
    shutil.copytree(run.folder, folder)
    return run._replace(folder=folder)


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
        again = keep_from(run, tmp_path / name)
        done = go_on(again, run_signalled, resume=f"runs/run/{name}", CHECKPOINT_EVERY="0")
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


def test_run_that_goes_on_from_an_older_checkpoint_leaves_the_newer_ones_behind(run_signalled, trained):
    """What came after it may be what somebody wants to undo. Files that are not of the run stay."""
    run = run_signalled(("SIGUSR1", 5), ("SIGUSR1", 15), ("SIGKILL", 20))
    older, newer = checkpoints(run)
    for name in ("checkpoint_best.ckpt", "checkpoint_notes.txt"):
        shutil.copyfile(run.run_folder / newer, run.run_folder / name)

    # Restoring the state takes a step too.
    run = run_signalled(
        ("SIGTERM", 3), folder=run.folder, **{**dict.fromkeys(tg.SETTINGS), "RESUME": f"runs/run/{older}"}
    )
    kept = "checkpoint_000000000007.ckpt"
    assert f"the state is kept in runs/run/{kept}" in run.err
    assert checkpoints(run) == [older, kept, "checkpoint_best.ckpt", "checkpoint_notes.txt"]
    done = go_on(run, run_signalled)
    assert done.artifact.read_bytes() == trained.artifact.read_bytes()
    assert checkpoints(done) == ["checkpoint_best.ckpt", "checkpoint_notes.txt"]


def test_run_that_is_still_going_on_is_not_resumed(run_signalled, cut_short, tmp_path):
    with (cut_short.run_folder / "log.txt").open("ab") as log:
        assert tg.lock(log)
        refused = go_on(cut_short, run_signalled)
    assert "runs/run is still running: wait for it, or stop it first" in refused.err


@pytest.mark.parametrize("step", [3, 14, 25])
def test_model_of_one_layer_goes_on_before_and_after_it_loops(
    step, run_signalled, tmp_path, run_script, record_settings
):
    """Its skip weights have no gradient before, and so the optimizer keeps nothing of them."""
    changes = {**record_settings, "NUM_LAYERS": "1", "XSA_LAST_N": "1", "LOOP_START": "0", "LOOP_END": "0"}
    whole = run_script(**changes, CODEC="int8_zlib")
    done = go_on(run_signalled(("SIGTERM", step), **changes, CODEC="int8_zlib"), run_signalled)
    assert done.status == 0, done.err
    assert done.artifact.read_bytes() == whole.artifact.read_bytes()


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
    spent = tg.read_checkpoint(path).header["progress"]["seconds"]
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


def test_checkpoint_that_a_full_disk_does_not_take_does_not_end_the_run(run_script, mount, trained):
    """The disk has room for everything but the state of the run, which takes 450 kB."""
    disk = mount("size=256k")
    run = run_script(CHECKPOINT_EVERY="1e-9", OUT_DIR=str(disk))
    assert run.status == 0, run.err
    assert f"warning: {disk}/run/checkpoint_" in run.out
    assert "cannot be written (No space left on device)" in run.out
    assert "; the run goes on, with older checkpoints or none" in run.out
    assert sorted(path.name for path in (disk / "run").iterdir()) == ["final_model.int8.ptz", "log.txt", "run.json"]
    assert (disk / "run" / "final_model.int8.ptz").read_bytes() == trained.artifact.read_bytes()


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
        shutil.copytree(cut_short.run_folder, tmp_path / name)
    refused = go_on(cut_short, run_signalled, OUT_DIR=str(tmp_path))
    assert f"RESUME=1 may mean {tmp_path}/a, {tmp_path}/b: name the one" in refused.err


def test_checkpoint_in_the_folder_of_another_run_is_refused(cut_short, run_signalled, tmp_path):
    """It would go on in that folder, and add to the other's log."""
    shutil.copytree(cut_short.run_folder, tmp_path / "other")
    refused = go_on(cut_short, run_signalled, resume=str(tmp_path / "other"))
    assert "is of the run 'run': move it into a folder of that name" in refused.err


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


# -- ranks -----------------------------------------------------------------------------------------------------------


def test_signal_that_only_one_of_two_ranks_gets_ends_both_at_the_same_step(run_signalled):
    run = run_signalled(("SIGTERM", 6, "1"), size=2)
    assert run.status == 128 + signal.SIGTERM
    assert checkpoints(run) == ["checkpoint_000000000006.ckpt"]
    assert run.err.count("interrupted: ") == 1


@pytest.mark.parametrize("dead", ["0", "1"])
def test_ranks_stop_soon_when_another_dies_and_name_it(dead, run_signalled, trained):
    """And on two ranks again, the run goes on to the result of one rank, up to rounding."""
    began = time.monotonic()
    run = run_signalled(("SIGUSR1", 9), ("SIGKILL", 12, dead), size=2)
    assert time.monotonic() - began < 30
    assert run.status != 0
    kept = "runs/run/checkpoint_000000000009.ckpt"
    expected = f"error: rank {dead} has died, the last step was step:11/30: the state is kept in {kept}, torchrun "
    [line] = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(expected)
    if dead == "1":
        assert run.log.splitlines()[-1] == line
    done = go_on(run, run_signalled, size=2)
    assert done.status == 0, done.err
    assert float(curve(done.log)["30"]) == pytest.approx(float(curve(trained.log)["30"]), abs=2e-3)


def test_ranks_whose_weights_part_are_an_error(tmp_path_factory, tiny_settings, fork):
    """A bit that flips in the memory of one of three ranks is found at the next validation."""
    folder = tmp_path_factory.mktemp("parted")
    driver = folder / "driver.py"
    driver.write_text(
        """
import os, sys, torch, train_gpt as tg

finish_step = tg.Progress.finish_step
models = []
build_optimizers = tg.build_optimizers

def note_model(model, hp, world):
    models.append(model)
    return build_optimizers(model, hp, world)

def finish_and_flip(progress, *rest):
    finish_step(progress, *rest)
    if progress.step == 3 and os.environ["RANK"] == "2":
        models[0].blocks[1].mlp.fc.weight.data.view(torch.int32)[0, 0] ^= 1

tg.build_optimizers = note_model
tg.Progress.finish_step = finish_and_flip
try:
    tg.main()
except ValueError as error:
    sys.exit(f"error: {error}")
"""
    )
    run = fork(str(driver), folder, {**tiny_settings, "VAL_LOSS_EVERY": "3"}, 3)
    assert run.status == 1
    assert run.err.count("error: after step 3 the weights of rank 2 are not those of rank 0") == 3


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_goes_on_by_itself_when_a_rank_is_killed(victim, tiny_settings, tmp_path, trained):
    """One of two ranks is killed twice, at any moment after a checkpoint. The name of the run is left to the script."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3", "--nproc_per_node=2"]
    env = {**tiny_settings, "ITERATIONS": "400", "CHECKPOINT_EVERY": "0.1", "HOME": str(tmp_path)}
    del env["RUN_ID"]
    with (tmp_path / "out").open("w") as out:
        launcher = subprocess.Popen([*command, tg.__file__], cwd=tmp_path, env=env, stdout=out, stderr=out)
        for n_kills in (1, 2):
            while True:
                time.sleep(0.2)
                assert launcher.poll() is None, (tmp_path / "out").read_text()
                logs = [path.read_text() for path in tmp_path.glob("runs/*/log.txt")]
                n_resumes = sum(log.count("resumed:") for log in logs)
                kept = list(tmp_path.glob("runs/*/checkpoint_*.ckpt"))
                ranks = children_of(launcher.pid)
                if n_resumes == n_kills - 1 and len(kept) == 2 and len(ranks) == 2 and "step:" in logs[0]:
                    os.kill(ranks[victim], signal.SIGKILL)
                    break
            while victim < len(ranks) and ranks[victim] in children_of(launcher.pid):
                time.sleep(0.1)
        assert launcher.wait(300) == 0, (tmp_path / "out").read_text()

    [folder] = [path for path in (tmp_path / "runs").iterdir() if path.name != "latest"]
    results = json.loads((folder / "run.json").read_text())
    assert results["steps"] == 400
    assert (folder / "log.txt").read_text().count("resumed:step:") == 2
    assert results["val_bpb"] < trained.results["val_bpb"]
    assert list(folder.glob("checkpoint_*")) == []


# -- numbers ---------------------------------------------------------------------------------------------------------

INJECTED = """
import os, sys, torch, train_gpt as tg

loss = tg.GPT.loss
calls = []

def injected(self, ids, targets, looping=True, compiled=False):
    calls.append(1)
    found = loss(self, ids, targets, looping, compiled)
    if len(calls) == 12:
        found = {expression}
    return found

tg.GPT.loss = injected
try:
    status = tg.main()
except tg.EXPECTED_ERRORS as error:
    sys.exit(f"error: {{error}}")
os._exit(status)
"""


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("found * float('nan')", "train_loss is nan at step 12 (last good train_loss "),
        ("found + float('inf')", "train_loss is inf at step 12"),
        # A finite loss with a gradient that is not.
        ("found + (self.tok_emb.weight[0, 0] * 0).sqrt()", "the length of the gradient is nan at step 12"),
    ],
)
def test_loss_or_gradient_that_is_not_finite_ends_the_run_at_its_step(
    expression, message, tmp_path, fork, tiny_settings, run_signalled, trained
):
    """What it did to the weights is not kept. If a device was at fault and not the settings, the run can go on."""
    driver = tmp_path / "driver.py"
    driver.write_text(INJECTED.format(expression=expression))
    run = fork(str(driver), tmp_path, {**tiny_settings, "CHECKPOINT_EVERY": "1e-9"})
    assert run.status == 1
    [line] = run.err.splitlines()
    assert line.startswith(f"error: {message}")
    assert run.log.splitlines()[-1] == line
    assert checkpoints(run) == ["checkpoint_000000000010.ckpt", "checkpoint_000000000011.ckpt"]
    done = go_on(run, run_signalled)
    assert done.artifact.read_bytes() == trained.artifact.read_bytes()


def test_loss_that_jumps_is_reported_and_training_goes_on(tmp_path, fork, tiny_settings, trained):
    driver = tmp_path / "driver.py"
    driver.write_text(INJECTED.format(expression="found + 2.0"))
    run = fork(str(driver), tmp_path, tiny_settings)
    assert run.status == 0, run.err
    [line] = [line for line in run.log.splitlines() if line.startswith("warning: ")]
    assert re.fullmatch(r"warning: train_loss jumped from \d\.\d+ to \d\.\d+ at step 12", line)
    # A constant that is added to a loss changes no gradient.
    assert run.artifact.read_bytes() == trained.artifact.read_bytes()


@pytest.mark.parametrize(
    ("losses", "loss", "is_spike"),
    [
        ([5.0] * 10, 6.1, True),
        ([5.0] * 10, 5.9, False),
        ([5.0] * 9, 9.0, False),
        ([9.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0], 6.1, True),
        ([4.0, 6.0] * 5, 6.1, True),
    ],
    ids=str,
)
def test_spike_is_a_loss_far_above_the_mean_of_the_ten_before(losses, loss, is_spike):
    progress = tg.Progress()
    for x in losses:
        progress.finish_step(x, 1.0)
    assert progress.is_spike(loss) is is_spike


# -- hostile checkpoints ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class Kept:
    """A checkpoint taken apart, and what is needed to go on from it."""

    header: dict[str, Any]
    tensors: bytes
    env: dict[str, str]
    folder: Path

    def sealed(self, header: Any = None, tensors: bytes | None = None) -> bytes:
        """With a valid checksum, which whoever makes a hostile one can compute too."""
        text = header if isinstance(header, bytes) else json.dumps(self.header if header is None else header).encode()
        body = text + (self.tensors if tensors is None else tensors)
        return tg.CHECKPOINT_PREFIX.pack(b"GOLFRUN\n", zlib.crc32(body), len(text)) + body

    def without(self, key: str) -> bytes:
        return self.sealed({name: value for name, value in self.header.items() if name != key})

    def go_on(self, data: bytes) -> tg.Learner:
        """As main does, with a model that another seed has filled."""
        path = self.folder / "run" / "checkpoint_000000000005.ckpt"
        path.write_bytes(data)
        checkpoint = tg.read_checkpoint(path)
        env = {**self.env, **tg.settings_to_go_on(checkpoint, self.env)}
        config, hp = tg.resolve_settings(env, torch.device("cpu"))
        tg.require_room_for_model(checkpoint, config)
        opened = tg.open_data(config, hp, tg.World())
        assert opened.train
        model = tg.GPT(config)
        tg.init_weights(model, dataclasses.replace(hp, seed=9))
        learner = tg.Learner(model, model.loss, tg.build_optimizers(model, hp, tg.World()))
        ledger = tg.Ledger(torch.device("cpu"))
        tg.restore(checkpoint, learner, opened.train, tg.Run(config, hp, tg.World(), ledger, lambda line: None))
        return learner

    def refused(self, data: bytes) -> str:
        with pytest.raises(ValueError, match=r"checkpoint_000000000005\.ckpt") as caught:
            self.go_on(data)
        return str(caught.value)


@pytest.fixture(scope="module")
def kept(cut_short, tmp_path_factory, tiny_settings) -> Kept:
    data = (cut_short.run_folder / "checkpoint_000000000005.ckpt").read_bytes()
    _, _, text_bytes = tg.CHECKPOINT_PREFIX.unpack(data[: tg.CHECKPOINT_PREFIX.size])
    begin = tg.CHECKPOINT_PREFIX.size + text_bytes
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "run").mkdir()
    env = {name: tiny_settings[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    return Kept(json.loads(data[tg.CHECKPOINT_PREFIX.size : begin]), data[begin:], env, folder)


def test_checkpoint_put_together_again_is_read(kept):
    learner = kept.go_on(kept.sealed())
    stored = np.frombuffer(kept.tensors, "<f4")
    by_name = dict(learner.model.named_parameters())
    weights = torch.cat([by_name[name].detach().flatten() for name in sorted(by_name)])
    assert np.array_equal(weights.numpy(), stored[-weights.numel() :])


def test_cut_lengthened_or_changed_checkpoint_is_refused(kept):
    data = kept.sealed()
    rng = random.Random(0)
    for n_bytes in [0, 1, 15, 16, 17, len(data) - 1, *(rng.randrange(len(data)) for _ in range(30))]:
        kept.refused(data[:n_bytes])
    for place in [0, 8, 12, 15, *(rng.randrange(len(data)) for _ in range(30))]:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        kept.refused(bytes(changed))
    assert "checksum" in kept.refused(data + b"\0")
    assert "other tensors" in kept.refused(kept.sealed(tensors=kept.tensors + bytes(4)))
    assert "other tensors" in kept.refused(kept.sealed(tensors=kept.tensors[:-4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, not 1"),
        ({"progress": {"step": 0}}, "not written by this version"),
        ({"progress": []}, "not written by this version"),
        ({"seconds": {"train\nfinal_x val_bpb:0": 1.0}}, "phases of no run"),
        ({"seconds": {"train": math.nan}}, "seconds of no run"),
        ({"given": {"PRESET": "a\0b"}}, "no environment holds"),
        ({"given": {"LD_PRELOAD": "x.so"}}, "settings that this script does not have"),
        ({"given": {"EVAL_ARTIFACT": "x"}}, "unset one"),
        ({"tensors": []}, "other tensors than this model has"),
    ],
    ids=str,
)
def test_lying_checkpoint_is_refused(kept, change, message):
    assert message in kept.refused(kept.sealed({**kept.header, **change}))


def test_checkpoint_that_lacks_a_key_or_has_values_that_are_not_finite_is_refused(kept):
    for key in kept.header:
        kept.refused(kept.without(key))
    nan = np.array([np.nan], "<f4").tobytes()
    assert "not finite" in kept.refused(kept.sealed(tensors=nan + kept.tensors[4:]))


@pytest.mark.parametrize("change", [{"step": 31}, {"step": 10**400}, {"step": -1}, {"recent_seconds": []}], ids=str)
def test_progress_of_no_run_is_refused(kept, change):
    kept.refused(kept.sealed({**kept.header, "progress": {**kept.header["progress"], **change}}))


def test_checkpoint_of_a_huge_model_is_refused_before_anything_is_allocated(kept):
    """All settings agree with each other, but the file is far too short for them."""
    huge = {"MODEL_DIM": "16384", "NUM_LAYERS": "64"}
    header = {**kept.header, "given": {**kept.header["given"], **huge}}
    begin = time.process_time()
    with memory_below(2**26):
        assert re.search(r"has \d+ bytes for \d{9,} parameters", kept.refused(kept.sealed(header)))
    assert time.process_time() - begin < 4  # 2 without tracemalloc


@pytest.mark.parametrize(
    "text", [b"[" * 2**20, b"[" + b"[]," * 349_000 + b"[]]", b"9" * 2**20, b'"' + b"x" * 2**20, b"\xff" * 100], ids=len
)
def test_json_that_is_no_header_is_refused_soon(kept, text):
    begin = time.process_time()
    with memory_below(2**26):
        kept.refused(kept.sealed(text[: tg.MAX_CHECKPOINT_JSON_BYTES]))
    assert time.process_time() - begin < 4


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_checkpoint_that_is_no_regular_file_is_refused(kind, tmp_path):
    path = tmp_path / "checkpoint_000000000001.ckpt"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(ValueError, match="is no regular file"):
        tg.read_checkpoint(path)


@settings(max_examples=150)
@given(st.data())
def test_mutated_checkpoint_is_refused_or_read(kept, data):
    """Any value, at any place of the header, in place of the right one: never another exception."""
    header = json.loads(json.dumps(kept.header))
    for _ in range(data.draw(st.integers(1, 3))):
        place = header
        if not place:
            break
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place)))
        if data.draw(st.booleans()):
            del place[key]
            continue
        place[key] = data.draw(JUNK | st.integers(-2, 300) | st.integers(-2, 300).map(str))
    with contextlib.suppress(ValueError, FileNotFoundError):
        kept.go_on(kept.sealed(header))


# -- the study of survival -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_survive_kills_and_minutes(tmp_path):
    """The study's own code, shorter: five kills at random moments, and half a minute of a run that keeps its state."""
    study = Path(tg.__file__).with_name("records") / "studies" / "2026-11-27_Survival" / "survive.py"
    corpus = Path(tg.__file__).with_name("data") / "datasets" / "pydoc_sp1024"
    if not corpus.exists():
        pytest.skip("the corpus of the first run is not there: python data/build_shards.py makes it")

    def measure(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, str(study), *arguments, "--out", str(tmp_path)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        return json.loads((tmp_path / f"{arguments[0]}.json").read_text())

    killed = measure("kills", "--kills", "5", "--seed", str(random.randrange(10**6)))
    assert killed["equal"] == killed["kills"] == 5

    soaked = measure("soak", "--seconds", "30", "--every", "1", "--checkpoint-every", "1")
    first, last = soaked["first_fifth"], soaked["last_fifth"]
    # On a busy machine, the first seconds are not yet those of a run that has got going, which takes 20 MiB. Keeping
    # what each of the 30 checkpoints writes would take hundreds.
    assert last["memory_mib"] < first["memory_mib"] + 64
    assert last["open_files"] <= first["open_files"] + 1
    assert last["threads"] <= first["threads"] + 1
