"""How fast documents become tokens, how much memory that takes, and how many bytes a token stands for.

    python -m pytest -m slow -s tests/test_export_speed.py

It prints the tables of data/README.md. Speed depends on the machine and is not asserted; the identity of the tokens is.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import build_shards
import documents
import numpy as np
import pytest
import shards
import tokenizer as tk
from tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CORPUS = SHARED / "corpus_train_00.jsonl.zst"
HELD_OUT = ["web-real/fineweb_val_a.jsonl", "web-real/fineweb_docs_200.jsonl", "corpus_val.jsonl"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CORPUS.exists(), reason=f"{CORPUS} is absent")]

WORKER_MEMORY = r"""
import re, resource, sys
sys.path.insert(0, sys.argv[1])
import build_shards
if __name__ == "__main__":
    build_shards.main(sys.argv[2:])
    main = int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peak MiB: {main / 1024:.0f} main, {worker / 1024:.0f} largest worker")
"""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Trained on CORPUS, and the published ones."""
    texts = tk.sample_documents(documents.read_documents([CORPUS]), tk.TOKENIZER_TEXT_CHARS)
    found = {}
    for size in (1024, 8192):
        path = SHARED / "tokenizers" / f"fineweb_{size}_bpe.model"
        models = {
            f"lossless SP{size}": tk.train_tokenizer(texts, size),
            f"lossless SP{size} --caseops": tk.train_tokenizer(texts, size, caseops=True),
            f"--published SP{size}": tk.train_published_tokenizer(texts, size),
            f"published SP{size}": path.read_bytes(),
        }
        found |= {name: Tokenizer(model, Path(f"{name}.model")) for name, model in models.items()}
    return found


def test_bytes_per_token(tokenizers: dict[str, Tokenizer]) -> None:
    for name, tokenizer in tokenizers.items():
        ratios = []
        for file in HELD_OUT:
            texts = list(documents.read_documents([SHARED / file]))
            n_bytes = sum(len(text.encode()) for text in texts)
            ratios.append(n_bytes / sum(tokenizer.encode(text).size for text in texts))
        print(f"| {name} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")


def test_export_speed(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    """The whole export (read, unpack, encode, write, hash) against SentencePiece's encoding of texts in memory."""
    texts = list(documents.read_documents([CORPUS]))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for name, tokenizer in tokenizers.items():
        written = [tokenizer.transform.encode(text) for text in texts]
        speeds = []
        for out_type in (int, "numpy"):  # lists, as by default; arrays, which cost less
            start = time.perf_counter()
            encoded = tokenizer.sp.encode(written, out_type=out_type, num_threads=2)
            speeds.append(megabytes / (time.perf_counter() - start))
        bos = np.array([tokenizer.sp.bos_id()])
        expected = hashlib.sha256(np.concatenate([x for ids in encoded for x in (bos, ids)]).astype("<u2").data)
        for workers in (1, 2):
            start = time.perf_counter()
            encoder = build_shards.Encoder(Tokenizer(tokenizer.model, tokenizer.path), "train", set())
            read = documents.read_documents([CORPUS])
            figures = build_shards.build_split(tmp_path, read, encoder, shards.SHARD_TOKENS, workers)
            speeds.append(megabytes / (time.perf_counter() - start))
            tokens = shards.read_shard(tmp_path / "fineweb_train_000000.bin")
            assert len(figures["files"]) == 1
            assert hashlib.sha256(tokens.data).digest() == expected.digest()
        ratios = [f"{speeds[3] / speed:.1f}x" for speed in speeds[:2]]
        print(f"| {name} | " + " | ".join([f"{speed:.1f}" for speed in speeds] + ratios) + " |", flush=True)


def test_memory_does_not_grow_with_the_input(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    script, model = tmp_path / "main.py", tmp_path / "some.model"
    script.write_text(WORKER_MEMORY)
    model.write_bytes(tokenizers["lossless SP1024"].model)
    arguments = ["--name", "toy", "--tokenizer", model, "--val", SHARED / "corpus_small.jsonl", "--workers", "2"]
    for times in (1, 10):
        command = [sys.executable, script, Path(build_shards.__file__).parent, *arguments, "--out", tmp_path]
        command += ["--shard-tokens", "10000000", "--input", *[CORPUS] * times]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{times} x 67 MB: {run.stdout.splitlines()[-1]}")
