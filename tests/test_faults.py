"""The machine fails while a run trains: disks, folders, shards, shared memory and the clock.

Whatever happens, a run completes or ends with one line that names the file and the remedy, and every file that has its
final name is whole. The faults are real: file systems in memory that are full or read-only, and files that another
hand changes between two steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_shards
import numpy as np
import pytest
from shards import write_shard

import train_gpt as tg

ROOT = Path(tg.__file__).parent

# Runs the script as it is, but for what `fault` does right before a step.
DRIVER = """
import itertools, os, shutil, subprocess, sys, tempfile, time
from contextlib import suppress
from pathlib import Path
import train_gpt as tg

folder = Path(tg.from_env(tg.Hyperparameters, os.environ).run_folder)
# The process that this one was forked from may have asked for the folder of another test.
tempfile.tempdir = None
steps = itertools.count(1)
train_step = tg.train_step

def fill(place):
    # Until nothing more fits.
    with suppress(OSError), open(Path(place) / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))

def fault():
    {fault}

def step_after_fault(*arguments, **options):
    if next(steps) == 10:
        fault()
    return train_step(*arguments, **options)

tg.train_step = step_after_fault
try:
    status = tg.main()
except tg.EXPECTED_ERRORS as error:
    sys.exit(f"error: {{error}}")
sys.exit(status)
"""


@pytest.fixture
def run_with_fault(fork, tiny_settings, tmp_path, tmp_path_factory) -> Callable[..., Any]:
    """A function that runs the script and injects a fault, given as a statement, before its tenth step."""

    def run(fault: str, **settings: str) -> Any:
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER.format(fault=fault))
        return fork(str(driver), tmp_path_factory.mktemp("faulty"), {**tiny_settings, **settings})

    return run


@pytest.fixture
def own_data(data, tmp_path) -> Path:
    """A copy of the data that a test may damage."""
    return shutil.copytree(data.folder, tmp_path / "own_data")


def refuse(name: str) -> None:
    raise AssertionError(f"JSON holds {name}")


def assert_whole(folder: Path) -> None:
    """Every file with a final name can be used, and there is nothing else."""
    for path in folder.rglob("*"):
        assert path.suffix != ".part", path
        if path.suffix == ".ptz":
            tg.load_artifact(path)
        if path.suffix == ".json":
            json.loads(path.read_text(), parse_constant=refuse)


def open_log(folder: Path) -> tg.RunLog:
    return tg.RunLog(folder, tg.World(), tg.Screen())


# -- shards ----------------------------------------------------------------------------------------------------------

CHANGES = {
    "truncated": "os.truncate(path, 1500)",
    "cut to nothing": "os.truncate(path, 0)",
    "overwritten": "path.write_bytes(path.read_bytes()[::-1])",
}
REMOVALS = {
    "deleted": "path.unlink()",
    "replaced": "shutil.copyfile(path, 'copy'); os.truncate('copy', 1500); os.replace('copy', path)",
}


def change_all(pattern: str, statement: str) -> str:
    return f"for path in Path(os.environ['DATA_PATH']).glob('{pattern}'): {statement}"


@pytest.mark.parametrize("change", CHANGES)
def test_shard_that_changes_during_a_run_ends_it_with_one_line(run_with_fault, own_data, change):
    """With a memory map, a shorter file would kill the process with SIGBUS, and another one would train in silence."""
    run = run_with_fault(change_all("fineweb_train_*", CHANGES[change]), DATA_PATH=str(own_data))
    assert run.status == 1
    message = r"error: .*fineweb_train_00000\d\.bin was changed during the run .*: build or fetch it again, .*\n"
    assert re.fullmatch(message, run.err)
    assert run.log == run.out + run.err
    assert len(run.losses) == 9
    assert_whole(run.folder)


@pytest.mark.parametrize("removal", REMOVALS)
def test_run_completes_with_the_shards_it_opened(run_with_fault, own_data, trained, removal):
    """An open file keeps its content when another takes its name, so the model is the same to the bit."""
    run = run_with_fault(change_all("fineweb_train_*", REMOVALS[removal]), DATA_PATH=str(own_data))
    assert (run.status, run.err) == (0, "")
    assert run.results["artifact_sha256"] == trained.results["artifact_sha256"]
    assert_whole(run.folder)


def test_validation_split_is_read_before_training(run_with_fault, own_data, trained):
    run = run_with_fault(change_all("fineweb_val_*", CHANGES["truncated"]), DATA_PATH=str(own_data))
    assert (run.status, run.err) == (0, "")
    assert run.results["val_bpb"] == trained.results["val_bpb"]


@pytest.mark.parametrize("keep_open", [True, False])
def test_shard_is_read_only_as_it_was_opened(tmp_path, keep_open):
    """A split has more shards than a process may open, so that some are opened again for every read."""
    path = tmp_path / "a.bin"
    other = tmp_path / "b.bin"
    write_shard(path, np.arange(1000))
    write_shard(other, np.arange(1000, 0, -1))
    shard = tg.Shard(path, keep_open)
    assert shard.read(3, 2).tolist() == [3, 4]

    os.replace(other, path)
    if keep_open:
        assert shard.read(3, 2).tolist() == [3, 4]
    else:
        with pytest.raises(ValueError, match=r"a\.bin was changed during the run \(3024 bytes at its start, 3024 now"):
            shard.read(3, 2)
    path.unlink()
    if not keep_open:
        with pytest.raises(ValueError, match=r"a\.bin can no longer be read \(No such file .*\): put it back"):
            shard.read(3, 2)


def test_split_with_many_shards_opens_only_some_and_closes_them(tmp_path):
    """Also where a process may open 256 files, as on macOS."""
    n_shards = tg.MAX_OPEN_SHARDS + 20
    for i in range(n_shards):
        write_shard(tmp_path / f"{i:03d}.bin", [i, i])
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("there is no /proc that lists open files")
    n_before = len(list(descriptors.iterdir()))
    stream = tg.TokenStream(str(tmp_path), "*.bin")
    assert stream.read(0, len(stream)).tolist() == [i for i in range(n_shards) for _ in range(2)]
    assert len(list(descriptors.iterdir())) == n_before + tg.MAX_OPEN_SHARDS
    del stream
    assert len(list(descriptors.iterdir())) == n_before


# -- the log ---------------------------------------------------------------------------------------------------------

LOSSES = {
    "removed": "(folder / 'log.txt').unlink()",
    "removed with its folder": "shutil.rmtree(folder)",
    "moved with its folder": "os.rename(folder, 'moved')",
    "replaced": "Path('other').write_text('other'); os.replace('other', folder / 'log.txt')",
}


@pytest.mark.parametrize("loss", LOSSES)
def test_log_that_vanishes_during_a_run_comes_back_whole(run_with_fault, loss):
    run = run_with_fault(LOSSES[loss])
    assert run.status == 0
    assert re.fullmatch(r"warning: log .*log\.txt was removed or replaced: it is written again.*\n", run.err)
    assert run.log == run.out
    assert run.last_line.startswith("final_int8_zlib_roundtrip_exact")
    assert_whole(run.folder)
    if loss == "replaced":
        assert (run.run_folder / "log.other.txt").read_text() == "other"


def test_log_that_cannot_come_back_yet_loses_no_line(tmp_path, capsys):
    log = open_log(tmp_path / "run")
    log("one")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file where the folder was")
    log("two")
    log("three")
    assert capsys.readouterr().err.count("cannot be written") == 1
    (tmp_path / "run").unlink()
    log("four")
    log.close()
    assert (tmp_path / "run" / "log.txt").read_text() == "one\ntwo\nthree\nfour\n"


# -- disks that are full or read-only --------------------------------------------------------------------------------


def test_artifact_that_a_full_disk_does_not_take_is_kept_elsewhere(run_script, full_disk):
    elsewhere = full_disk.with_name("elsewhere")
    elsewhere.mkdir()
    run = run_script(tg.__file__, OUT_DIR=str(full_disk), ITERATIONS="1", TMPDIR=str(elsewhere))
    assert run.status == 1
    kept = elsewhere / "run.final_model.int8.ptz"
    assert run.err.startswith(f"error: {full_disk}/run is full or read-only: the artifact is {kept}. The run is comp")
    assert "warning: the weights are not kept before they are quantized" in run.out
    assert (full_disk / "run" / "log.txt").read_text() == run.out + run.err
    # It is scored, and the results are there.
    results = json.loads((full_disk / "run" / "run.json").read_text())
    assert results["artifact_sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    assert results["val_bpb"] > 0


def test_results_that_a_full_disk_does_not_take_are_kept_elsewhere(full_disk, hp):
    hp = dataclasses.replace(hp, run_id="r1", out_dir=str(full_disk))
    kept = tg.write_somewhere(full_disk / "run.json", hp, bytes(2**16))
    assert (kept.name, kept.parent != full_disk) == ("r1.run.json", True)
    assert kept.read_bytes() == bytes(2**16)
    kept.unlink()


def test_file_that_a_full_disk_does_not_take_leaves_the_older_one(full_disk):
    path = full_disk / "run.json"
    tg.write_file(path, b"old")
    with pytest.raises(OSError, match=r"run\.json cannot be written \(No space left on device\)"):
        tg.write_file(path, bytes(2**16))
    assert [file.read_bytes() for file in full_disk.iterdir()] == [b"old"]


def test_log_on_a_full_disk_goes_on_once_there_is_room(full_disk, capsys):
    """Training is worth more than its log."""
    filler = full_disk / "filler"
    log = open_log(full_disk / "run")
    log("one")
    with contextlib.suppress(OSError):
        filler.write_bytes(bytes(2**16))
    long_line = "two" * 3000
    log(long_line)
    log("three")
    assert capsys.readouterr().err.count("cannot be written") == 1
    filler.unlink()
    log("four")
    log.close()
    assert (full_disk / "run" / "log.txt").read_text() == f"one\n{long_line}\nthree\nfour\n"


def test_log_that_stays_incomplete_is_an_error(full_disk):
    log = open_log(full_disk / "run")
    log("x" * 2**16)
    with pytest.raises(OSError, match=r"log\.txt lacks its last \d+ bytes"):
        log.close()


@pytest.mark.parametrize("place", ["file", "file/folder", "/proc"])
def test_place_that_cannot_be_written_is_found_before_training(run_script, tmp_path, place):
    (tmp_path / "file").write_text("")
    run = run_script(OUT_DIR=str(tmp_path / place))
    assert (run.status, run.out) == (1, "")
    assert re.fullmatch(r"error: OUT_DIR=.*(file|proc).* (is no folder|cannot hold a folder).*\n", run.err)


def test_read_only_disk_is_found_before_training(run_script, mount):
    run = run_script(OUT_DIR=str(mount("ro")))
    assert (run.status, run.out) == (1, "")
    assert re.fullmatch(r"error: OUT_DIR=.* cannot hold a folder RUN_ID=run \(Read-only .*\): name others\n", run.err)


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """The temporary folder of a run that can keep nothing in its own."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def assert_complete_elsewhere(run, elsewhere: Path) -> None:
    """The run ended with a line that names the places of its artifact and its results, and these are whole."""
    assert run.status == 1
    artifact = elsewhere / "run.final_model.int8.ptz"
    results = elsewhere / "run.run.json"
    assert f"the JSON is {results} and the artifact is {artifact}. The run is complete, move them\n" in run.err
    assert "final_int8_zlib_roundtrip_exact" in run.out
    assert json.loads(results.read_text())["artifact_sha256"] == hashlib.sha256(artifact.read_bytes()).hexdigest()
    assert_whole(elsewhere)


def test_disk_that_fills_up_during_a_run(run_with_fault, mount, elsewhere):
    """Log, artifact and JSON find no room any more. The log ends with a whole line or a part of one."""
    disk = mount("size=1m")
    run = run_with_fault("fill(os.environ['OUT_DIR'])", OUT_DIR=str(disk), TMPDIR=str(elsewhere))
    assert_complete_elsewhere(run, elsewhere)
    log = disk / "run" / "log.txt"
    assert run.out.startswith(log.read_text())
    warning, error = run.err.splitlines()
    assert warning.startswith(f"warning: log {log} cannot be written (No space left on device): make room")
    assert error.startswith(f"error: {disk}/run is full or read-only: ")
    assert sorted(path.name for path in disk.rglob("*")) == ["filler", "log.txt", "run"]


def test_disk_that_is_full_only_at_the_end_of_a_run(run_with_fault, mount, elsewhere):
    """The artifact still found room, and its results are kept beside the log of another disk."""
    disk = mount("size=1m")
    at_the_end = "score = tg.score_artifact; tg.score_artifact = lambda *a: (fill(os.environ['OUT_DIR']), score(*a))[1]"
    run = run_with_fault(at_the_end, OUT_DIR=str(disk), TMPDIR=str(elsewhere))
    assert run.status == 1
    assert run.err.splitlines()[-1].endswith(f"the JSON is {elsewhere}/run.run.json. The run is complete, move them")
    assert (disk / "run" / "final_model.int8.ptz").exists()
    assert_whole(disk)
    assert_whole(elsewhere)


def test_folder_that_becomes_read_only_during_a_run(run_with_fault, mount, elsewhere):
    """An empty read-only file system over the folder hides the log and takes nothing."""
    disk = mount("size=1m")
    cover = "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', str(folder)], check=True)"
    run = run_with_fault(cover, OUT_DIR=str(disk), TMPDIR=str(elsewhere))
    assert_complete_elsewhere(run, elsewhere)
    warning, error = run.err.splitlines()
    assert "cannot be written (Read-only file system)" in warning
    assert error.startswith(f"error: {disk}/run is full or read-only: ")
    subprocess.run(["umount", str(disk / "run")], check=True)
    assert run.out.startswith((disk / "run" / "log.txt").read_text())


def test_file_that_no_folder_takes_is_said_to_be_lost(full_disk, monkeypatch, hp):
    monkeypatch.setattr("tempfile.tempdir", str(full_disk))
    monkeypatch.setenv("HOME", str(full_disk))
    path = full_disk / "run.json"
    message = rf"{path} cannot be written \(No space left .* No other folder took it either, run\.json is lost"
    with pytest.raises(OSError, match=message):
        tg.write_somewhere(path, hp, bytes(2**16))
    assert list(full_disk.iterdir()) == []


# -- the tools of data/ ----------------------------------------------------------------------------------------------


def test_export_that_fills_the_disk_leaves_the_earlier_one_whole(mount, tmp_path):
    """There is room to begin, but not for all shards."""
    disk = mount("size=3m")
    source = tmp_path / "text.jsonl"
    command = ["--input", str(source), "--val-docs", "2", "--tokenizer", "byte260", "--name", "toy", "--out", str(disk)]

    source.write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(10)))
    build_shards.main(command)
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}

    source.write_text("".join(json.dumps({"text": f"number {i} " * 20_000}) + "\n" for i in range(10)))
    with pytest.raises(SystemExit) as end:
        build_shards.main([*command, "--overwrite", "--shard-tokens", "200000", "--workers", "1"])
    shard = rf"{disk}/datasets/toy/\.unfinished/fineweb_val_000000\.bin"
    assert re.fullmatch(rf"{shard}: no space is left on the disk, make room or choose another --out", str(end.value))
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
    assert build_shards.check(disk / "datasets" / "toy") == []


# -- shared memory ---------------------------------------------------------------------------------------------------


@pytest.fixture
def without_shared_memory() -> list[str]:
    """The beginning of a command line that runs a command where /dev/shm is full."""
    script = "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full"
    command = ["unshare", "-m", "bash", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*command, script], check=False).returncode != 0:
        pytest.skip("mounting a file system over /dev/shm is not allowed here")
    return [*command, f'{script} && exec "$@"', "bash"]


@pytest.mark.slow
def test_two_ranks_train_without_shared_memory(without_shared_memory, tiny_settings, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*without_shared_memory, *launcher, tg.__file__]
    done = subprocess.run(command, cwd=tmp_path, env=tiny_settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("final_int8_zlib_roundtrip_exact")
    assert_whole(tmp_path)


@pytest.mark.slow
def test_export_without_shared_memory_names_it(without_shared_memory, tmp_path):
    """Processes that work together need some of it. Documents are long here, so that more than one process is asked."""
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": f"number {i} " * 120_000}) + "\n" for i in range(12)))
    options = ["--input", str(source), "--val-docs", "1", "--tokenizer", "byte260", "--name", "toy", "--workers", "2"]
    command = [*without_shared_memory, sys.executable, build_shards.__file__, *options, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    message = "worker processes cannot be started (No space left on device): make room in /dev/shm, or use --workers=1"
    assert done.stderr.splitlines()[-1] == message
    assert not (tmp_path / "out" / "datasets" / "toy").exists()


# -- the clock -------------------------------------------------------------------------------------------------------

# From the tenth step on, the wall clock shows another day, and goes back by an hour whenever somebody looks.
BACKWARDS = (
    "hours = itertools.count(10**9, -3600); gmtime, strftime = time.gmtime, time.strftime; "
    "time.time = lambda: next(hours); "
    "time.strftime = lambda form, when=None: strftime(form, gmtime(next(hours))); "
    "tg.write_results = lambda results, hp, write=tg.write_results: write({**results, 'jumped': next(hours)}, hp)"
)


def test_wall_clock_that_goes_backwards_changes_no_duration(run_with_fault):
    """Seconds are counted by a clock that nobody sets, so the limit ends the run in time."""
    run = run_with_fault(BACKWARDS, MAX_WALLCLOCK_SECONDS="1", ITERATIONS="100000", TRAIN_LOG_EVERY="50")
    assert (run.status, run.err) == (0, "")
    assert run.results["jumped"] <= 10**9
    times = [int(ms) for ms in re.findall(r"train_time:(\d+)ms", run.out)]
    assert times == sorted(times)
    assert 0.5 < run.results["train_seconds"] <= 1.5
    assert all(value >= 0 for key, value in run.results.items() if key.startswith("seconds_"))
    assert_whole(run.folder)


def test_progress_bar_survives_a_clock_that_goes_backwards(monkeypatch, capsys):
    hours = iter(range(10**9, 0, -3600))
    monkeypatch.setattr("tqdm.std.time", lambda: next(hours))
    with tg.Screen(is_on=True).bar("training") as advance:
        for i in range(5):
            advance(i / 4, f"step {i}")
    assert "100 %" in capsys.readouterr().out
