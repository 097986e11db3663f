"""The .bin format: what is written is read back, and a damaged file is refused by name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shards
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_gpt

TOKENS = [1, 0, 65535, 258]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    shards.write_shard(tmp_path / "a.bin", TOKENS)
    return tmp_path / "a.bin"


def test_bytes_on_disk_are_those_of_the_published_layout(shard: Path) -> None:
    """llm.c: 256 int32, then uint16, both little-endian; spelt here without numpy."""
    expected = struct.pack("<256i", 20240520, 1, 4, *[0] * 253) + struct.pack("<4H", *TOKENS)
    assert shard.read_bytes() == expected


@settings(max_examples=50, deadline=None)
@given(tokens=st.lists(st.integers(0, 65535)), dtype=st.sampled_from(["uint16", "int32", "int64", ">u2"]))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, tokens: list[int], dtype: str) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    shards.write_shard(path, np.array(tokens, dtype=dtype))
    read = shards.read_shard(path)
    assert read.dtype == np.uint16
    assert read.tolist() == tokens


def test_reading_maps_the_file_and_cannot_change_it(shard: Path) -> None:
    tokens = shards.read_shard(shard)
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 7


@pytest.mark.parametrize("tokens", [[-1], [65536], [3, 2**40], [0.5], [[1, 2]], ["a"]])
def test_only_uint16_values_in_one_dimension_are_written(tmp_path: Path, tokens: list) -> None:
    with pytest.raises(ValueError, match=r"a\.bin"):
        shards.write_shard(tmp_path / "a.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_shard_and_no_litter(shard: Path) -> None:
    with pytest.raises(ValueError, match="65536"):
        shards.write_shard(shard, [65536])
    assert shards.read_shard(shard).tolist() == TOKENS
    assert list(shard.parent.iterdir()) == [shard]


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, 20240521, "is not a token shard: its magic is 20240521, not 20240520"),
        (4, 2, "is a version 2 shard, not version 1"),
        (8, 5, r"is truncated: its header promises 5 tokens \(1034 bytes\), the file holds 1032 bytes"),
        (8, 3, r"is over-long: its header promises 3 tokens \(1030 bytes\), the file holds 1032 bytes"),
        (8, -1, "promises -1 tokens"),
    ],
)
def test_header_faults_name_the_file_the_fault_and_the_remedy(
    shard: Path, offset: int, value: int, message: str
) -> None:
    data = bytearray(shard.read_bytes())
    struct.pack_into("<i", data, offset, value)
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.bin {message}.*; fetch it again with data/download\.py or rebuild"):
        shards.read_shard(shard)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(0, 1040).filter(lambda n: n != 1032))
def test_any_other_length_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.bin"
    shards.write_shard(path, TOKENS)
    path.write_bytes((path.read_bytes() + bytes(8))[:length])
    with pytest.raises(ValueError, match=r"a\.bin"):
        shards.read_shard(path)


def read_by_script(path: Path) -> np.ndarray:
    shard = train_gpt.Shard(path)
    return shard.read(0, len(shard))


def outcome(read: Callable[[Path], np.ndarray], path: Path) -> list[int] | str:
    """The tokens, or that the file is refused."""
    try:
        return read(path).tolist()
    except ValueError:
        return "refused"


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 65535), min_size=1, max_size=3),
    changes=st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0, 1, 2, 3, 255])), max_size=2),
    length_change=st.sampled_from([0, 0, 0, 1, 2, -1, -2, -1000]),
)
def test_both_readers_read_and_refuse_the_same_files(
    tmp_path_factory: pytest.TempPathFactory,
    tokens: list[int],
    changes: list[tuple[int, int]],
    length_change: int,
) -> None:
    """train_gpt.py has a reader of its own. Only the one of data/ accepts a shard without tokens."""
    path = tmp_path_factory.mktemp("both") / "a.bin"
    shards.write_shard(path, tokens)
    data = bytearray(path.read_bytes())
    for offset, value in changes:
        data[offset] = value
    path.write_bytes((data + bytes(8))[: len(data) + length_change])
    assume(path.stat().st_size != shards.HEADER_BYTES)
    assert outcome(read_by_script, path) == outcome(shards.read_shard, path)


@pytest.mark.parametrize("read", [shards.read_shard, train_gpt.Shard])
def test_a_missing_shard_is_a_file_not_found_error(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.bin"):
        read(tmp_path / "a.bin")
