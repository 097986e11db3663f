"""Shards and batches: a step holds the same tokens on any machine, and damaged data never trains silently."""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shards import write_shard

import train_gpt as tg

EDGES = [101, 110, 240, 241]


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.arange(100))
    return path


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Five shards of distinct tokens, one shorter than a sequence. -> (stream, all tokens)"""
    folder = tmp_path_factory.mktemp("split")
    parts = np.split(np.arange(500, dtype=np.uint16), EDGES)
    for i, part in enumerate(parts):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", part)
    return tg.TokenStream(str(folder), "fineweb_train_[0-9]*.bin"), np.concatenate(parts)


@pytest.mark.parametrize("keep_open", [True, False])
def test_shard_gives_what_was_written(shard, tmp_path, keep_open):
    assert tg.Shard(shard, keep_open).read(0, 100).tolist() == list(range(100))
    assert tg.Shard(shard, keep_open).read(7, 2).tolist() == [7, 8]
    write_shard(tmp_path / "top.bin", [0, 65_535])
    assert tg.Shard(tmp_path / "top.bin", keep_open).read(0, 2).tolist() == [0, 65_535]


def test_empty_shard_is_refused(tmp_path):
    """A shard without tokens is a mistake of who made it."""
    write_shard(tmp_path / "empty.bin", [])
    with pytest.raises(ValueError, match=r"empty\.bin is empty"):
        tg.Shard(tmp_path / "empty.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:1023], "not a token shard"),
        (lambda b: b"\0" + b[1:], "not a token shard"),
        (lambda b: b[:4] + b"\2" + b[5:], "version 2"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b[:1024], "truncated.* 100 .* 0:"),
        (lambda b: b + b"\0\0", "too long.* 100 .*101"),
        (lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:], "too long"),
    ],
)
def test_damaged_shard_is_refused_by_name(shard, damage, message):
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        tg.Shard(shard)
    assert str(shard) in str(caught.value)


@given(start=st.integers(0, 520), count=st.integers(0, 520))
def test_read_crosses_edges_of_shards_as_if_there_were_none(split, start, count):
    stream, tokens = split
    assert len(stream) == len(tokens)
    assert np.array_equal(stream.read(start, count), tokens[start : start + count])


def test_missing_data_message_holds_commands_that_make_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        tg.TokenStream(str(tmp_path), "fineweb_train_[0-9]*.bin")
    assert str(tmp_path) in str(caught.value)
    assert len(re.findall(r"python data/\w+\.py", str(caught.value))) >= 2


def batches_of_all_ranks(split, hp, size: int, step: int) -> tg.Batch:
    """The micro-batches of a step, rank after rank."""
    pairs = []
    for rank in range(size):
        pairs += tg.Loader(split[0], hp, 500, tg.World(rank, size)).batch(step)
    return pairs


@pytest.mark.parametrize("micro", [0, 1, 31, 48, 1024])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_step_holds_the_same_tokens_for_any_ranks_and_micro_batches(split, hp, size, micro):
    """31 sequences per epoch and 8 per step: sequences cross shards, step 3 crosses into the next epoch."""
    hp = dataclasses.replace(hp, micro_batch_tokens=micro)
    tokens = split[1].astype(np.int64)
    most_rows = max(1, micro // 16) if micro else 8
    for step in range(9):
        pairs = batches_of_all_ranks(split, hp, size, step)
        starts = [(step * 8 + i) % 31 * 16 for i in range(8)]
        assert torch.cat([ids for ids, _ in pairs]).tolist() == [tokens[s : s + 16].tolist() for s in starts]
        assert torch.cat([t for _, t in pairs]).tolist() == [tokens[s + 1 : s + 17].tolist() for s in starts]
        assert all(len(ids) <= most_rows for ids, _ in pairs)


def sequences(split, hp, size: int, step: int) -> list[int]:
    """The sequences of a step by their first tokens, which tell them apart, because all tokens of the split differ."""
    starts = []
    for ids, _ in batches_of_all_ranks(split, hp, size, step):
        starts += ids[:, 0].tolist()
    return starts


def test_shuffled_epoch_reads_every_sequence_once_in_an_order_of_its_own(split, hp):
    """62 steps of 8 are 16 epochs of 31 sequences; another seed or epoch is another order."""
    as_they_lie = list(range(0, 31 * 16, 16))
    orders = {tuple(as_they_lie)}
    for seed in (1, 2):
        shuffled = dataclasses.replace(hp, shuffle=True, seed=seed)
        starts = []
        for step in range(62):
            starts += sequences(split, shuffled, 1, step)
        for begin in range(0, 62 * 8, 31):
            epoch = starts[begin : begin + 31]
            assert sorted(epoch) == as_they_lie
            orders.add(tuple(epoch))
    assert len(orders) == 1 + 2 * 16


@pytest.mark.parametrize("size", [2, 3, 8])
def test_shuffled_step_holds_the_same_sequences_for_any_ranks(split, hp, size):
    """In the same order too: step 3 crosses into the next epoch."""
    hp = dataclasses.replace(hp, shuffle=True)
    for step in range(9):
        assert sequences(split, hp, size, step) == sequences(split, hp, 1, step)


def test_micro_batches_of_a_rank_are_of_almost_equal_size(split, hp):
    """A last micro-batch of one row would compile another shape and idle the device."""
    hp = dataclasses.replace(hp, train_batch_tokens=16 * 11, micro_batch_tokens=16 * 4)
    n_rows = [len(ids) for ids, _ in batches_of_all_ranks(split, hp, 1, 0)]
    assert sorted(n_rows) == [3, 4, 4]


def test_epoch_counts_readings_of_the_split(split, hp):
    loader = tg.Loader(split[0], hp, 500, tg.World())
    assert [loader.epoch(step) for step in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


@given(n=st.integers(0, 300), n_parts=st.integers(1, 40))
def test_shares_hold_everything_once_in_order_and_differ_by_at_most_one(n, n_parts):
    """The last one is as large as any: evaluate relies on it."""
    shares = [tg.share(n, part, n_parts) for part in range(n_parts)]
    assert list(itertools.chain(*shares)) == list(range(n))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == max(sizes)
    assert [tg.World(rank, n_parts).share(n) for rank in range(n_parts)] == shares


@pytest.mark.parametrize(
    ("bad_at", "name", "offset"), [(0, 0, 0), (100, 0, 100), (101, 1, 0), (239, 2, 129), (240, 3, 0)]
)
def test_train_token_outside_the_vocabulary_is_named_with_file_and_offset(split, hp, tmp_path, bad_at, name, offset):
    """Data of another tokenizer crashes a GPU in ways that name neither the data nor the token."""
    tokens = split[1] % 64
    tokens[bad_at] = 64
    for i, part in enumerate(np.split(tokens, EDGES)):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    loader = tg.Loader(tg.TokenStream(str(tmp_path), "fineweb_train_[0-9]*.bin"), hp, 64, tg.World())
    with pytest.raises(ValueError, match=rf"fineweb_train_00000{name}\.bin .*\b64\b.* {offset}\b.*VOCAB_SIZE=64"):
        [loader.batch(step) for step in range(3)]


def test_too_few_tokens_for_a_step_are_refused(split, hp):
    """500 tokens make 31 sequences of 16 with their last targets."""
    tg.Loader(split[0], dataclasses.replace(hp, train_batch_tokens=31 * 16), 500, tg.World())
    with pytest.raises(ValueError, match=r"500 .*TRAIN_BATCH_TOKENS=512"):
        tg.Loader(split[0], dataclasses.replace(hp, train_batch_tokens=32 * 16), 500, tg.World())


def test_more_ranks_than_sequences_are_refused(split, hp):
    tg.Loader(split[0], hp, 500, tg.World(7, 8))
    with pytest.raises(ValueError, match=r"WORLD_SIZE=9 .*TRAIN_BATCH_TOKENS=128"):
        tg.Loader(split[0], hp, 500, tg.World(8, 9))
