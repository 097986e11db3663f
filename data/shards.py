"""The .bin token shard: what data/download.py fetches, data/build_shards.py writes and train_gpt.py reads.

    256 little-endian int32   magic 20240520, version 1, number of tokens N, then zeros
    N little-endian uint16    token ids

The layout is that of llm.c (github.com/karpathy/llm.c) and of the published FineWeb shards. A byte sidecar
`fineweb_val_bytes_*.bin` has the same layout; its entry i is a number of bytes instead of a token id.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
SHARD_TOKENS = 100_000_000  # tokens of a full shard, as published; the last shard of a split holds fewer

HEADER_BYTES = 4 * HEADER_INTS
MAX_TOKENS = 2**31 - 1  # the count is an int32


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write the file whole or not at all: under its name there is never a part of it, even if the run is killed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same directory: os.replace cannot cross disks
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, tokens: npt.ArrayLike) -> None:
    """Write the 1-D integers `tokens` as one shard, whole or not at all.

    Raises ValueError for anything but a 1-D array of integers in 0..65535, and above 2**31 - 1 tokens.
    """
    array = np.asarray(tokens)
    if array.size == 0:
        array = array.astype(np.uint16)  # numpy reads an empty list as float64
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path} needs a 1-D array of integers, not shape {array.shape} of {array.dtype}")
    if array.size > MAX_TOKENS:
        raise ValueError(f"{path} would hold {array.size} tokens, more than {MAX_TOKENS}; cut them into several shards")
    if array.size and (array.min() < 0 or array.max() > 0xFFFF):
        raise ValueError(f"{path} would hold values {array.min()}..{array.max()}, but a shard stores 0..65535 (uint16)")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, array.size
    write_whole(path, header.tobytes(), np.ascontiguousarray(array, dtype="<u2").data)  # no copy of a full shard


def read_shard(path: Path) -> npt.NDArray[np.uint16]:
    """Tokens of one shard, memory-mapped and read-only. -> (N,) uint16

    Raises ValueError for a file that is not a complete shard of this version, FileNotFoundError for none.
    """
    remedy = "fetch it again with data/download.py or rebuild it with data/build_shards.py"
    n_bytes = path.stat().st_size
    if n_bytes < HEADER_BYTES:
        raise ValueError(f"{path} holds {n_bytes} bytes, less than the {HEADER_BYTES} of a shard's header; {remedy}")
    magic, version, n_tokens = (int(x) for x in np.fromfile(path, dtype="<i4", count=3))
    if magic != SHARD_MAGIC:
        raise ValueError(f"{path} is not a token shard: its magic is {magic}, not {SHARD_MAGIC}; {remedy}")
    if version != SHARD_VERSION:
        raise ValueError(f"{path} is a version {version} shard, not version {SHARD_VERSION}; {remedy}")
    if n_tokens < 0:
        raise ValueError(f"{path} promises {n_tokens} tokens in its header; {remedy}")
    promised = HEADER_BYTES + 2 * n_tokens
    if n_bytes != promised:
        fault = "truncated" if n_bytes < promised else "over-long"
        raise ValueError(
            f"{path} is {fault}: its header promises {n_tokens} tokens ({promised} bytes), "
            f"the file holds {n_bytes} bytes; {remedy}"
        )
    if n_tokens == 0:
        return np.zeros(0, dtype="<u2")  # an empty range cannot be mapped
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
