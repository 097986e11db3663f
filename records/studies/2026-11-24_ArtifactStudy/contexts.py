"""How much shorter the codes of an artifact would be if the coder knew more: python contexts.py FILE.trellis.ptz [...]

The coder knows the class of the row and the quantizer. A context adds one thing that the decoder would know too. Two
lengths in bits are printed for each: the entropy given the context, as if its tables cost nothing, and the length with
counts that start at 0.05 and learn as they go, which pays for the tables.

Reads artifacts of the format that the script of study.py writes.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from study import tg

ROLES = ("c_q", "c_k", "c_v", "attn.proj", "mlp.fc", "mlp.proj", "")


def read(path: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], int]:
    """-> by weight: codes, quantizers, classes; states"""
    _, header, payload, words = tg.read_artifact(path)
    offset, rows, columns = 0, {}, {}
    for name, kind, shape in header["tensors"]:
        size = tg.stored_bytes(kind, shape)
        if kind == "codes":
            rows[name] = np.frombuffer(payload[offset : offset + size], np.uint8).reshape(2, shape[0])
            columns[name] = shape[1]
        offset += size
    frequencies = np.frombuffer(payload[offset:], "<u2").reshape(tg.FREQUENCIES).astype(np.int64)
    places = tg.bands_of(header["tensors"])
    shapes = [(part.stop - part.start, columns[name]) for name, part in places]
    bands = tg.decode_words(words, shapes, [rows[n][1, part] for n, part in places], frequencies, header["states"])
    found: dict[str, list[Any]] = {}
    for (name, _), band in zip(places, bands, strict=True):
        found.setdefault(name, []).append(band)
    whole = {n: tuple(np.concatenate(x) for x in zip(*parts, strict=True)) for n, parts in found.items()}
    return {n: (codes, quantizer, rows[n][1]) for n, (codes, quantizer) in whole.items()}, header["states"]


def shifted(codes: np.ndarray, down: int, right: int) -> np.ndarray:
    """At each place the code so many rows above and columns to the left, 0 where there is none."""
    x = np.zeros(codes.shape, np.int64)
    x[down:, right:] = codes[: len(codes) - down, : codes.shape[1] - right]
    return x


def sizes(x: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Magnitudes in five sizes, relative to the mean of the row."""
    mean = np.maximum(2.0 ** ((classes.astype(float) - 28) / 4), 0.05)[:, None]
    return np.digitize(np.abs(x) / mean, [0.25, 0.75, 1.25, 2.0])


def of_columns(codes: np.ndarray) -> np.ndarray:
    """Nine classes of the mean magnitude of a column, relative to the median column."""
    mean = np.abs(codes.astype(np.int64)).mean(0)
    edges = [-1, -0.5, -0.2, -0.07, 0.07, 0.2, 0.5, 1]
    return np.digitize(np.log2((mean + 1e-3) / (np.median(mean) + 1e-9)), edges)[None]


def of_states(codes: np.ndarray, states: int) -> np.ndarray:
    next_state, state = np.array(tg.TRELLISES[states][0]), np.zeros(len(codes), np.int64)
    found = np.empty(codes.shape, np.int64)
    for j in range(codes.shape[1]):
        found[:, j] = state
        state = next_state[state, codes[:, j] & 1]
    return found


def contexts(name: str, codes: np.ndarray, classes: np.ndarray, states: int, tensor: int) -> dict[str, Any]:
    left, above = sizes(shifted(codes, 0, 1), classes), sizes(shifted(codes, 1, 0), classes)
    return {
        "present": 0,
        "magnitude of the code to the left": left,
        "magnitude of the code above": above,
        "both": 5 * left + above,
        "sign of the code to the left": 1 + np.sign(shifted(codes, 0, 1)),
        "sign of the code above": 1 + np.sign(shifted(codes, 1, 0)),
        "mean magnitude of the column": of_columns(codes),
        "state": of_states(codes, states),
        "role": next(i for i, role in enumerate(ROLES) if role in name),
        "tensor": tensor,
    }


def length(counts: np.ndarray) -> tuple[float, float]:
    """Bits, static and adaptive, of (contexts, 256) counts."""
    counts, start = counts[counts.sum(1) > 0].astype(float), 0.05
    total = counts.sum(1, keepdims=True)
    static = -np.where(counts > 0, counts * np.log2(np.maximum(counts, 1) / total), 0).sum()
    log_gamma = lambda x: torch.lgamma(torch.as_tensor(x, dtype=torch.float64)).numpy()  # noqa: E731
    ways = log_gamma(256 * start) - log_gamma(total[:, 0] + 256 * start)
    ways = ways + (log_gamma(counts + start) - log_gamma(start)).sum(1)
    return float(static), float(-ways.sum() / math.log(2))


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        data, states = read(path)
        tables: dict[str, np.ndarray] = {}
        for tensor, (name, (codes, quantizer, classes)) in enumerate(data.items()):
            base = 2 * classes[:, None].astype(np.int64) + quantizer
            for way, more in contexts(name, codes, classes, states, tensor).items():
                index = ((base + 128 * more) << 8) + codes + 128
                counts = np.bincount(index.ravel(), minlength=128 * 128 * 256)
                tables[way] = tables.get(way, 0) + counts
        n, first = sum(codes.size for codes, _, _ in data.values()), (0.0, 0.0)
        for way, table in tables.items():
            found = length(table.reshape(-1, 256))
            first = found if way == "present" else first
            shown = (f"{bits / n:.4f} ({100 * (bits / of - 1):+.2f} %)" for bits, of in zip(found, first, strict=True))
            print(f"| {path.name} | {way} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
