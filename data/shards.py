"""The .bin token shard, which data/download.py fetches, data/build_shards.py writes and train_gpt.py reads.

    256 little-endian int32   magic 20240520, version 1, number of tokens N, then zeros
    N little-endian uint16    token ids

The layout is that of llm.c (github.com/karpathy/llm.c) and of the published FineWeb shards. A byte sidecar
`fineweb_val_bytes_*.bin` has the same layout, but its entry i is a number of bytes instead of a token id.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_TOKENS = 2**31 - 1  # the count is an int32

# A full shard of the published data sets; the last shard of a split holds fewer tokens.
SHARD_TOKENS = 100_000_000


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write the file whole or not at all: even a killed run never leaves a part of it under its name.

    Raises OSError, naming the file, if it cannot be written.
    """
    # The temporary file is in the same directory because os.replace cannot move a file to another disk.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
        os.replace(temporary, path)
    except OSError as error:
        # A full disk does not say which file it was.
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, tokens: npt.ArrayLike) -> None:
    """Write the 1-D integers `tokens` as one shard, whole or not at all.

    Raises ValueError for anything but a 1-D array of at most 2**31 - 1 integers in 0..65535.
    """
    array = np.asarray(tokens)
    if array.size == 0:
        # numpy gives an empty list the type float64, which the next check would refuse.
        array = array.astype(np.uint16)

    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path} needs a 1-D array of integers, not shape {array.shape} of {array.dtype}")
    if array.size > MAX_TOKENS:
        raise ValueError(f"{path} would hold {array.size} tokens, more than {MAX_TOKENS}; cut them into several shards")
    if array.size and (array.min() < 0 or array.max() > 0xFFFF):
        raise ValueError(f"{path} would hold values {array.min()}..{array.max()}, but a shard stores 0..65535 (uint16)")

    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = (SHARD_MAGIC, SHARD_VERSION, array.size)
    # A memoryview is written as it is; tobytes() would copy the 200 MB of a full shard.
    write_whole(path, header.tobytes(), np.ascontiguousarray(array, dtype="<u2").data)


def read_shard(path: Path) -> npt.NDArray[np.uint16]:
    """Tokens of one shard, memory-mapped and read-only. -> (N,) uint16

    Raises FileNotFoundError if there is no such file, and ValueError if it is not a complete shard of this version.

    train_gpt.py has a reader of its own, Shard, because a record's copy of that script must run without this folder.
    tests/test_shards.py keeps the two in step: they read the same tokens and refuse the same files, except that only
    this one accepts a shard without tokens.
    """
    remedy = "fetch it again with data/download.py or rebuild it with data/build_shards.py"
    n_bytes = path.stat().st_size
    if n_bytes < HEADER_BYTES:
        raise ValueError(f"{path} holds {n_bytes} bytes, less than the {HEADER_BYTES} of a shard's header; {remedy}")

    magic, version, n_tokens = np.fromfile(path, dtype="<i4", count=3).tolist()
    if magic != SHARD_MAGIC:
        raise ValueError(f"{path} is not a token shard: its magic is {magic}, not {SHARD_MAGIC}; {remedy}")
    if version != SHARD_VERSION:
        raise ValueError(f"{path} is a version {version} shard, not version {SHARD_VERSION}; {remedy}")
    if n_tokens < 0:
        raise ValueError(f"{path} promises {n_tokens} tokens in its header; {remedy}")

    promised_bytes = HEADER_BYTES + 2 * n_tokens
    if n_bytes != promised_bytes:
        fault = "truncated" if n_bytes < promised_bytes else "over-long"
        raise ValueError(
            f"{path} is {fault}: its header promises {n_tokens} tokens ({promised_bytes} bytes), "
            f"the file holds {n_bytes} bytes; {remedy}"
        )

    if n_tokens == 0:
        # An empty range of a file cannot be mapped.
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
