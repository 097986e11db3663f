"""Fixtures shared by the tests: tiny settings, a tiny tokenizer with data made of it, and runs of the real script."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentencepiece as spm
import torch
from hypothesis import settings
from shards import write_shard

import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
WORDS = re.findall(
    r"\w+", "the a cat dog bird sat ran flew on under over mat tree house and then it was seen again by every other one"
)

SMALL_MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "logit_softcap": 5.0,
    "eval_seq_len": 16,
}
SMALL_RUN: dict[str, Any] = {
    "train_batch_tokens": 128,
    "train_seq_len": 16,
    "val_batch_size": 256,
    "max_wallclock_seconds": 0.0,
    "gptq_reserve_seconds": 0.0,
    "compile": "0",
}

settings.register_profile("no_deadline", deadline=None)  # of an example; machines of CI stall
settings.load_profile("no_deadline")


class Data(NamedTuple):
    """A data directory with what was written into it."""

    folder: Path
    tokenizer: Path
    train: np.ndarray
    val: np.ndarray
    val_bytes: np.ndarray
    val_documents: list[str]


class Run(NamedTuple):
    """A finished process."""

    status: int
    out: str
    err: str
    folder: Path

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "logs" / "run.json").read_text())

    @property
    def artifact(self) -> Path:
        found = sorted(self.folder.glob("final_model.*.ptz"))
        return found[0] if found else self.folder / tg.ARTIFACT_NAMES["int8_zlib"]

    @property
    def last_line(self) -> str:
        return self.out.splitlines()[-1]

    @property
    def losses(self) -> list[float]:
        return [float(x) for x in re.findall(r"train_loss:(\S+)", self.out)]


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    """Tiny tensors gain nothing from threads, and subprocesses run beside this process."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def config() -> tg.GPTConfig:
    """The published baseline, small."""
    return dataclasses.replace(tg.from_env(tg.GPTConfig, {"PRESET": "baseline"}), num_layers=5, **SMALL_MODEL)


@pytest.fixture(scope="session")
def record_config() -> tg.GPTConfig:
    """All techniques of the record, small: 7 layers, run as 0 1 2 1 2 1 2 3 4 5 6, layer 0 without XSA."""
    parts = {"rope_dims": 4, "xsa_last_n": 6, "loop_start": 1, "loop_end": 2}
    return dataclasses.replace(tg.GPTConfig(), num_layers=7, **parts, **SMALL_MODEL)


@pytest.fixture(scope="session")
def hp() -> tg.Hyperparameters:
    """Of the published baseline, small."""
    baseline = tg.from_env(tg.Hyperparameters, {"PRESET": "baseline"})
    return dataclasses.replace(baseline, **SMALL_RUN)


@pytest.fixture(scope="session")
def record_hp() -> tg.Hyperparameters:
    """Of the record, small."""
    return dataclasses.replace(tg.Hyperparameters(), **SMALL_RUN)


@pytest.fixture(scope="session")
def random_model() -> Callable[..., tg.GPT]:
    """A function that makes a model whose every parameter is random, so that each one matters to the result."""

    def make(config: tg.GPTConfig, seed: int = 0) -> tg.GPT:
        generator = torch.Generator().manual_seed(seed)
        model = tg.GPT(config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(0.0, p.size(-1) ** -0.5 if name.endswith(".weight") else 1.0, generator=generator)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def train_tokenizer() -> Callable[..., bytes]:
    """A function that trains a SentencePiece model: BPE with byte fallback, as all tokenizers of the project."""

    def train(documents: list[str], **options: Any) -> bytes:
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=320,
            byte_fallback=True,
            hard_vocab_limit=True,
            minloglevel=2,
            **options,
        )
        return model.getvalue()

    return train


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Text that a small model learns something about, with a few characters that only byte pieces can spell."""
    rng = np.random.default_rng(0)
    plain = [" ".join(rng.choice(WORDS, rng.integers(20, 80))) + "." for _ in range(400)]
    return [text if i % 20 else f"  {text}\n\u6771\u4eac \U0001f642" for i, text in enumerate(plain)]


@pytest.fixture(scope="session")
def lossless_tokenizer(train_tokenizer, documents) -> bytes:
    return train_tokenizer(
        documents, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory, lossless_tokenizer, documents) -> Data:
    """Train split in two shards whose edge cuts a sequence and a document; val split with a byte sidecar."""
    folder = tmp_path_factory.mktemp("data")
    sp = spm.SentencePieceProcessor(model_proto=lossless_tokenizer)

    def tokens(texts: list[str]) -> np.ndarray:
        return np.array([i for text in texts for i in [sp.bos_id(), *sp.encode(text)]], np.uint16)

    def n_bytes(i: int) -> int:
        if sp.is_control(i):
            return 0
        return 1 if sp.is_byte(i) else len(sp.id_to_piece(i).replace("\u2581", " ").encode())

    train, val = tokens(documents[20:]), tokens(documents[:20])
    val_bytes = np.array([n_bytes(int(i)) for i in val], np.uint16)
    assert int(val_bytes.sum()) == sum(len(text.encode()) for text in documents[:20])
    write_shard(folder / "fineweb_train_000000.bin", train[:1001])
    write_shard(folder / "fineweb_train_000001.bin", train[1001:])
    write_shard(folder / "fineweb_val_000000.bin", val)
    write_shard(folder / "fineweb_val_bytes_000000.bin", val_bytes)
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(lossless_tokenizer)
    return Data(folder, tokenizer, train, val, val_bytes, documents[:20])


@pytest.fixture(scope="session")
def tiny_settings(data) -> dict[str, str]:
    """Environment of a run of the baseline of a few seconds, reproducible to the bit."""
    return {
        "PRESET": "baseline",
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "DATA_PATH": str(data.folder),
        "TOKENIZER_PATH": str(data.tokenizer),
        "RUN_ID": "run",
        "VOCAB_SIZE": "320",
        "NUM_LAYERS": "3",
        "MODEL_DIM": "32",
        "NUM_HEADS": "4",
        "NUM_KV_HEADS": "2",
        "TRAIN_SEQ_LEN": "32",
        "TRAIN_BATCH_TOKENS": "256",
        "ITERATIONS": "30",
        "WARMDOWN_ITERS": "10",
        "MAX_WALLCLOCK_SECONDS": "0",
        "VAL_LOSS_EVERY": "0",
        "VAL_BATCH_SIZE": "1024",
        "TRAIN_LOG_EVERY": "1",
        "COMPUTE_DTYPE": "float32",
        "COMPILE": "0",
    }


@pytest.fixture(scope="session")
def record_settings() -> dict[str, str | None]:
    """Changes to the tiny settings for a run with all techniques: 5 layers, run as 0 1 2 1 2 1 2 3 4, looped from step
    11 on."""
    return {
        "PRESET": "record",
        "NUM_LAYERS": "5",
        "MLP_MULT": "2",
        "ROPE_DIMS": "4",
        "XSA_LAST_N": "4",
        "LOOP_START": "1",
        "LOOP_END": "2",
        "WARMDOWN_ITERS": None,
    }


FORK_SERVER = """
import json, os, runpy, signal, sys
import numpy, sentencepiece, torch, torch.distributed  # the seconds that every run would spend again

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        for fd, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), fd)
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        signal.alarm(120)
        sys.argv = [job["script"]]
        runpy.run_path(job["script"], run_name="__main__")
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory, tiny_settings) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """A process that has imported torch, and forks for every run of the script: status, output and errors of it."""
    folder = tmp_path_factory.mktemp("fork_server")
    server = subprocess.Popen(
        [sys.executable, "-c", FORK_SERVER], env=tiny_settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(cwd: Path, env: dict[str, str]) -> tuple[int, str, str]:
        out, err = folder / f"{cwd.name}.out", folder / f"{cwd.name}.err"
        job = {"cwd": str(cwd), "env": env, "out": str(out), "err": str(err), "script": str(ROOT / "train_gpt.py")}
        print(json.dumps(job), file=server.stdin, flush=True)
        return int(server.stdout.readline()), out.read_text(), err.read_text()

    yield run
    server.stdin.close()
    server.wait(10)


@pytest.fixture(scope="session")
def run_script(tmp_path_factory, tiny_settings, fork_server) -> Callable[..., Run]:
    """A function that runs train_gpt.py, or another command, in an empty directory with the tiny settings.

    A setting of None is taken out of the environment. Only a command is a process from the start on.
    """

    def run(*command: str, **settings: str | None) -> Run:
        folder = tmp_path_factory.mktemp("run")
        env = {name: value for name, value in {**tiny_settings, **settings}.items() if value is not None}
        if not command:
            return Run(*fork_server(folder, env), folder)
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=120
        )
        return Run(done.returncode, done.stdout, done.stderr, folder)

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory, documents, lossless_tokenizer) -> Path:
    """Shards of the small text as data/build_shards.py makes them, manifest and all, with its tokenizer beside."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "given.model").write_bytes(lossless_tokenizer)
    for name, texts in (("text", documents), ("unseen", documents[::-1])):  # the first 20 are the validation split
        (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        options = ["--input", "docs.jsonl", "--val-docs", "20", "--tokenizer", "given.model", "--out", "."]
        command = [sys.executable, str(ROOT / "data" / "build_shards.py"), *options, "--workers", "1", "--name", name]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        shutil.copyfile(folder / "given.model", folder / "datasets" / name / "tokenizer.model")
    return folder / "datasets" / "text"


@pytest.fixture(scope="session")
def trained(run_script) -> Run:
    """One whole run of the script, looked at by many tests."""
    run = run_script()
    assert run.status == 0, run.err
    return run


@pytest.fixture(scope="session")
def trained_record(run_script, record_settings) -> Run:
    """One whole run of the script with all techniques."""
    run = run_script(**record_settings)
    assert run.status == 0, run.err
    return run
