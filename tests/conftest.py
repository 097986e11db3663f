"""Fixtures shared by the tests: tiny settings, a tiny tokenizer with data made of it, and runs of the real script."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentencepiece as spm
import submission
import torch
from chromium import open_browser
from hypothesis import settings
from hypothesis import strategies as st
from shards import write_shard

import train_gpt as tg
from records import TRACK

ROOT = Path(__file__).resolve().parents[1]
SENTENCE = "the a cat dog bird sat ran flew on under over mat tree house and then it was seen again by every other one"
WORDS = SENTENCE.split()

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

# A machine that others use too may stall in the middle of an example.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@contextlib.contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Fail if what Python and numpy allocate inside comes to more than `limit` bytes at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


# Any JSON in place of the right one, in files of strangers.
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


class Data(NamedTuple):
    """A data directory with what was written into it."""

    folder: Path
    tokenizer: Path
    train: np.ndarray
    val: np.ndarray
    val_bytes: np.ndarray
    val_documents: list[str]


class FinishedRun(NamedTuple):
    """What a process left: status, output, errors and files."""

    status: int
    out: str
    err: str
    folder: Path

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / "run"

    @property
    def log(self) -> str:
        return (self.run_folder / "log.txt").read_text()

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.run_folder / "run.json").read_text())

    @property
    def artifacts(self) -> list[Path]:
        return sorted(self.run_folder.glob("final_model.*.ptz"))

    @property
    def artifact(self) -> Path:
        [path] = self.artifacts
        return path

    @property
    def last_line(self) -> str:
        return self.out.splitlines()[-1]

    @property
    def losses(self) -> list[float]:
        return [float(x) for x in re.findall(r"train_loss:(\S+)", self.out)]


# Shells ignore Ctrl-C for what they start in the background, and nohup a closed terminal. Runs inherit that and would
# leave such signals alone, which tests send to them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


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
    """PRESET=record with all its techniques, small: 7 layers, run as 0 1 2 1 2 1 2 3 4 5 6, layer 0 without XSA."""
    changes = {"num_layers": 7, "rope_dims": 4, "xsa_last_n": 6, "loop_start": 1, "loop_end": 2}
    return dataclasses.replace(tg.GPTConfig(), **changes, **SMALL_MODEL)


@pytest.fixture(scope="session")
def hp() -> tg.Hyperparameters:
    """Those of the published baseline, for small steps."""
    baseline = tg.from_env(tg.Hyperparameters, {"PRESET": "baseline"})
    return dataclasses.replace(baseline, **SMALL_RUN)


@pytest.fixture(scope="session")
def record_hp() -> tg.Hyperparameters:
    """Those of PRESET=record, for small steps."""
    return dataclasses.replace(tg.Hyperparameters(), **SMALL_RUN)


@pytest.fixture(scope="session")
def random_model() -> Callable[..., tg.GPT]:
    """A function that makes a model whose every parameter is random, so that each one matters to the result."""

    def make(config: tg.GPTConfig, seed: int = 0) -> tg.GPT:
        generator = torch.Generator().manual_seed(seed)
        model = tg.GPT(config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                std = p.size(-1) ** -0.5 if name.endswith(".weight") else 1.0
                p.normal_(0.0, std, generator=generator)
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
    texts = []
    for i in range(400):
        text = " ".join(rng.choice(WORDS, rng.integers(20, 80))) + "."
        if i % 20 == 0:
            text = f"  {text}\n\u6771\u4eac \U0001f642"
        texts.append(text)
    return texts


@pytest.fixture(scope="session")
def lossless_tokenizer(train_tokenizer, documents) -> bytes:
    return train_tokenizer(
        documents, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False
    )


@pytest.fixture(scope="session")
def val_manifest() -> Callable[[Path, Path], dict[str, Any]]:
    """A function that returns what train_gpt.py reads in the manifest of the shards in a folder."""

    def describe(folder: Path, tokenizer: Path) -> dict[str, Any]:
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("fineweb_val_*.bin")}
        return {
            "tool": "data/build_shards.py",
            "bytes_rule": "decoded",
            "splits": {"val": {"files": files, "text_sha256": "a" * 64}},
            "tokenizer": {"sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest(), "lossless": True},
        }

    return describe


@pytest.fixture(scope="session")
def data(tmp_path_factory, lossless_tokenizer, documents, val_manifest) -> Data:
    """Train split in two shards whose edge cuts a sequence and a document; val split with a byte sidecar."""
    folder = tmp_path_factory.mktemp("data")
    sp = spm.SentencePieceProcessor(model_proto=lossless_tokenizer)

    def tokens(texts: list[str]) -> np.ndarray:
        ids = []
        for text in texts:
            ids += [sp.bos_id(), *sp.encode(text)]
        return np.array(ids, np.uint16)

    def n_bytes(i: int) -> int:
        if sp.is_control(i):
            return 0
        if sp.is_byte(i):
            return 1
        return len(sp.id_to_piece(i).replace("\u2581", " ").encode())

    train = tokens(documents[20:])
    val = tokens(documents[:20])
    val_bytes = np.array([n_bytes(int(i)) for i in val], np.uint16)
    assert int(val_bytes.sum()) == sum(len(text.encode()) for text in documents[:20])

    write_shard(folder / "fineweb_train_000000.bin", train[:1001])
    write_shard(folder / "fineweb_train_000001.bin", train[1001:])
    write_shard(folder / "fineweb_val_000000.bin", val)
    write_shard(folder / "fineweb_val_bytes_000000.bin", val_bytes)

    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(lossless_tokenizer)
    (folder / "manifest.json").write_text(json.dumps(val_manifest(folder, tokenizer)))
    return Data(folder, tokenizer, train, val, val_bytes, documents[:20])


@pytest.fixture(scope="session")
def tiny_settings(data) -> dict[str, str]:
    """The environment of a baseline run that takes a second or two and can be repeated to the bit."""
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
    """Changes to the tiny settings for a run with all techniques.

    It has 5 layers, run as 0 1 2 1 2 1 2 3 4 from step 11 on.
    """
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


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """A function that mounts an empty file system in memory, and returns its folder. It skips where that is denied."""
    folders: list[Path] = []

    def make(options: str, name: str = "disk") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a file system is not allowed here")
        folders.append(folder)
        return folder

    yield make
    for folder in folders:
        subprocess.run(["umount", "--recursive", str(folder)], check=True)


@pytest.fixture
def full_disk(mount) -> Path:
    """A file system with room for 16 KiB."""
    return mount("size=16k", "full")


FORK_SERVER = """
import json, os, runpy, signal, sys
# What every run would spend seconds on again; torch imports _dynamo with its first optimizer.
import numpy, sentencepiece, torch, torch.distributed, torch._dynamo

def start(job, rank):
    for descriptor, name in ((0, os.devnull), (1, rank["out"]), (2, rank["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(rank["env"])
    signal.alarm(120)
    sys.argv = [job["script"]]
    status = 0
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as end:
        status = end.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)  # the interpreter would spend most of a second on taking torch down

for line in sys.stdin:
    job = json.loads(line)
    children = []
    for rank in job["ranks"]:
        child = os.fork()
        if child == 0:
            start(job, rank)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(next((status for status in statuses if status != 0), 0), flush=True)
"""


def rank_variables(size: int) -> list[dict[str, str]]:
    """What torchrun puts into the environment of each rank."""
    if size == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


@pytest.fixture(scope="session")
def fork(tmp_path_factory, tiny_settings) -> Iterator[Callable[..., FinishedRun]]:
    """A function that runs a script on some ranks, in processes forked from one that has imported torch.

    Output and errors are those of all ranks, one after another. The status is 0 if all ranks say so.
    """
    server = subprocess.Popen(
        [sys.executable, "-c", FORK_SERVER], env=tiny_settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    outputs = tmp_path_factory.mktemp("outputs")

    def run(script: str, folder: Path, env: dict[str, str], size: int = 1) -> FinishedRun:
        ranks = []
        for rank, variables in enumerate(rank_variables(size)):
            name = f"{folder.name}.{rank}"
            out = str(outputs / f"{name}.out")
            err = str(outputs / f"{name}.err")
            ranks.append({"env": {**env, **variables}, "out": out, "err": err})
        job = {"script": script, "cwd": str(folder), "ranks": ranks}
        print(json.dumps(job), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        out = "".join(Path(rank["out"]).read_text() for rank in ranks)
        err = "".join(Path(rank["err"]).read_text() for rank in ranks)
        return FinishedRun(status, out, err, folder)

    yield run
    server.stdin.close()
    server.wait(10)


@pytest.fixture(scope="session")
def run_script(tmp_path_factory, tiny_settings, fork) -> Callable[..., FinishedRun]:
    """A function that runs train_gpt.py, or another command, in an empty directory with the tiny settings.

    A setting of None is taken out of the environment. A command gets a Python of its own; the script alone is forked,
    which is seconds faster.
    """

    def run(*command: str, **settings: str | None) -> FinishedRun:
        folder = tmp_path_factory.mktemp("run")
        env = {name: value for name, value in {**tiny_settings, **settings}.items() if value is not None}
        if not command:
            return fork(tg.__file__, folder, env)
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=120
        )
        return FinishedRun(done.returncode, done.stdout, done.stderr, folder)

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory, documents, lossless_tokenizer) -> Path:
    """Shards of the small text as data/build_shards.py makes them, manifest and all, with its tokenizer beside."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "given.model").write_bytes(lossless_tokenizer)
    # The first 20 documents are the validation split, so that the two sets of shards are scored on different text.
    for name, texts in (("text", documents), ("unseen", documents[::-1])):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / "docs.jsonl").write_text("".join(lines))
        options = ["--input", "docs.jsonl", "--val-docs", "20", "--tokenizer", "given.model", "--out", "."]
        command = [sys.executable, str(ROOT / "data" / "build_shards.py"), *options, "--workers", "1", "--name", name]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        shutil.copyfile(folder / "given.model", folder / "datasets" / name / "tokenizer.model")
    return folder / "datasets" / "text"


@pytest.fixture(scope="session")
def trained(run_script) -> FinishedRun:
    """One whole run of the script, looked at by many tests."""
    run = run_script()
    assert run.status == 0, run.err
    return run


@pytest.fixture(scope="session")
def trained_record(run_script, record_settings) -> FinishedRun:
    """One whole run of the script with all techniques."""
    run = run_script(**record_settings)
    assert run.status == 0, run.err
    return run


@pytest.fixture(scope="session")
def honest(tmp_path_factory, run_script, record_settings, text) -> Path:
    """A record that tools/submission.py made of two real runs."""
    records = tmp_path_factory.mktemp("records")
    settings = {**record_settings, "DATA_PATH": str(text), "TOKENIZER_PATH": str(text / "tokenizer.model")}
    settings |= {"TRAIN_SEQ_LEN": "256", "TRAIN_BATCH_TOKENS": "1024"}  # so that a row holds several documents
    settings |= {"ITERATIONS": "15", "GPTQ_CALIBRATION_BATCHES": "4"}
    runs = []
    for seed in ("1", "2"):
        run = run_script(**settings, SEED=seed, MAX_WEIGHT_BITS="4")
        assert run.status == 0, run.err
        runs.append(str(run.run_folder / "run.json"))
    about = ["--track", TRACK, "--name", "Honest", "--author", "x", "--github-id", "y", "--blurb", "z"]
    assert submission.main(["new", *about, "--records", str(records), "--artifact", "--runs", *runs]) == 0
    return next((records / TRACK).iterdir())


@pytest.fixture
def browser(tmp_path) -> Iterator[Any]:
    """Headless Chromium, driven by selenium."""
    with open_browser(tmp_path / "profile") as found:
        yield found
