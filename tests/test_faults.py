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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards import write_shard

import train_gpt as tg

ROOT = Path(tg.__file__).parent

# Runs the script as it is, but for what `fault` does right before a step.
DRIVER = """
import itertools, os, shutil, subprocess, sys, tempfile
from pathlib import Path
import train_gpt as tg

folder = Path(tg.from_env(tg.Hyperparameters, os.environ).run_folder)
# The process that this one was forked from may have asked for the folder of another test.
tempfile.tempdir = None
steps = itertools.count(1)
train_step = tg.train_step

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
    assert run.err == f"error: a disk is full: the artifact is {kept}. The run is complete, move them\n"
    assert "warning: the weights are not kept before they are quantized" in run.out
    assert (full_disk / "run" / "log.txt").read_text() == run.out + run.err
    # It is scored, and the results are there.
    results = json.loads((full_disk / "run" / "run.json").read_text())
    assert results["artifact_sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    assert results["val_bpb"] > 0


def test_results_that_a_full_disk_does_not_take_are_kept_elsewhere(full_disk, hp):
    hp = dataclasses.replace(hp, run_id="r1", out_dir=str(full_disk))
    kept = tg.write_somewhere(full_disk / "run.json", bytes(2**16), hp)
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
