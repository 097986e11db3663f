"""Files that fuzzing found to break a reader, and a few hundred mutations that are the same every time (tests/fuzz.py).

A hostile file is refused with an error that its reader promises, in 2 s and in little more memory than it has bytes.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
import record

import train_gpt as tg

# Records are slower to check than single files to read.
N_MUTATIONS = {
    "artifact": 300,
    "checkpoint": 200,
    "log": 300,
    "manifest": 200,
    "shard": 150,
    "submission": 150,
    "run": 80,
    "reviews": 80,
}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_hostile_files_are_refused_with_the_errors_that_are_promised(name: str, tmp_path: Path):
    assert fuzz.replay(name, tmp_path, N_MUTATIONS[name]) >= N_MUTATIONS[name]


def test_what_is_mutated_is_sound(tmp_path: Path):
    """Otherwise everything would be refused at the first check."""
    path = tmp_path / "sound"
    for packed in fuzz.sound_artifacts():
        path.write_bytes(packed)
        tg.load_artifact(path)

    path.write_bytes(fuzz.build_checkpoint(fuzz.Choices(b"")))
    fuzz.read_checkpoint(path)

    fuzz.write_data(tmp_path / "data", {})
    fuzz.load_split(tmp_path / "data")

    folder = tmp_path / "track_non_record_16mb" / "2026-11-26_Hostile"
    folder.mkdir(parents=True)
    for name, data in fuzz.sound_record().items():
        (folder / name).write_bytes(data)
    assert [check for check in fuzz.verify.static_checks(folder) if not check.ok] == []


@pytest.mark.parametrize("read", [record.read_json, tg.read_json, record.parse_log], ids=["claims", "manifest", "log"])
def test_the_largest_json_and_log_take_64_mib_beyond_their_size(tmp_path: Path, read: Callable[[Any], Any]):
    """Small objects take 35 times their text."""
    path = tmp_path / "large"
    if read is record.parse_log:
        line = "step:1/9 train_loss:1.5 train_time:1ms\n"
        keys = "".join(f"k{i}:{i} " for i in range(300)) + "\n"
        path.write_text(keys + 99_000 * line)
    else:
        path.write_text('{"a": [' + '{"":{}},' * ((record.MAX_JSON_BYTES - 20) // 8) + "0]}")
    tracemalloc.start()
    try:
        read(path.read_text() if read is record.parse_log else path)
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size + fuzz.MEMORY_BYTES
    finally:
        tracemalloc.stop()


def test_a_reader_that_is_slow_or_breaks_is_found(tmp_path: Path):
    def spin(path: Path) -> None:
        while True:
            pass

    def take_memory(path: Path) -> None:
        bytearray(b"x" * 2 * fuzz.MEMORY_BYTES)

    def crash(path: Path) -> None:
        raise IndexError(path)

    path = tmp_path / "any"
    path.write_bytes(b"")
    expected = {spin: fuzz.TooMuch, crash: IndexError}
    if fuzz.peak_bytes(reset=True):
        expected[take_memory] = fuzz.TooMuch
    for read, error in expected.items():
        target = fuzz.Target(fuzz.build_log, read)
        with pytest.raises(error):
            fuzz.try_file(target, path)
