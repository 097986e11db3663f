"""Hostile files for everything that reads what somebody else wrote.

    python tests/fuzz.py artifact --seconds 600     mutates a sound file, guided by coverage
    python tests/fuzz.py --replay                   the found cases and some mutations again, as tests/test_hostile.py

A target says how bytes become a hostile file (`build`) and how that file is read (`read`). A file may be refused with
the errors that its reader promises, within SECONDS and MEMORY_BYTES beyond its own size. Anything else is a case, which
--seconds writes to tests/hostile/<target>/ as the file that was read. Checksums and hashes are made to fit, so that the
checks behind them are reached. A further target is one entry of TARGETS.

--seconds needs atheris (pip install atheris, on Linux). No test imports it, so that requirements-dev.txt does without.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import random
import shutil
import signal
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm
import torch

ROOT = Path(__file__).resolve().parents[1]
FOUND = Path(__file__).resolve().parent / "hostile"
INSTRUMENTED = ["train_gpt", "record", "verify", "shards", "download", "plot", "page"]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "data")]

if __name__ == "__main__" and "--seconds" in sys.argv:
    import atheris

    instrumented: contextlib.AbstractContextManager[Any] = atheris.instrument_imports(include=INSTRUMENTED)
else:
    instrumented = contextlib.nullcontext()

# What is imported here guides the fuzzer.
with instrumented:
    import page
    import plot
    import record
    import shards
    import verify
    from download import read_manifest

    import train_gpt as tg

# Its runs and its validation text are what most targets mutate.
RECORD = next(path for path in record.record_folders() if record.data_path(path).is_dir())
SECONDS = 2.0  # of one core, for one file
MEMORY_BYTES = 2**26


class Choices:
    """Decisions that are read from bytes, so that a fuzzer can change each of them. All are 0 when the bytes end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, n_bytes: int) -> bytes:
        taken = self.data[self.at : self.at + n_bytes]
        self.at += n_bytes
        return taken

    def number(self, below: int) -> int:
        n_bytes = 1 if below <= 256 else 4
        return int.from_bytes(self.take(n_bytes), "little") % max(below, 1)

    def one_of(self, options: Any) -> Any:
        return options[self.number(len(options))]

    def yes(self, one_in: int) -> bool:
        return self.number(one_in) == 1

    @property
    def more(self) -> bool:
        return self.at < len(self.data)


# -- Mutations -------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 2, 7, 127, 128, 255, 256, 65_535, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, 10**30]
FLOATS = [0.0, -0.0, 0.5, 1.0, -1e-9, 5e-324, 1e-300, 1e300, 1e308, float("inf"), float("-inf"), float("nan")]
TEXTS = ["", " ", "x", "1", "01", "-1", "nan", "unknown", "\ud800", "\0", "\n", "a\u2028b", "../x", "A", "9" * 300]
TEXTS += ["2026-02-30", "2026-11-26", "%s", "{}", "x" * 5000, "\u0660", "track_x/y", "0" * 64, "true", "null"]
JUNK: list[Any] = [None, True, False, *NUMBERS, *FLOATS, *TEXTS]
JUNK += [10**400, -(10**18), [], {}, [[]], [{}], {"": 0}, [0] * 99]
# Pieces of JSON, of logs, and of what Python's parsers read otherwise than people.
SNIPPETS = [b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"NaN", b"-Infinity", b"1e999", b"\xff", b"\xef\xbb\xbf", b"\0"]
SNIPPETS += [b"\r", b"\n", b"\x0c", b"\xe2\x80\xa8", b'"', b"\\ud800", b"{}", b"[]", b",", b":", b"-", b".", b"e"]
SNIPPETS += [b"(", b")"]
SNIPPETS += [b"step:1/2 val_loss:1 val_bpb:1 train_time:9s\n", b"x_exact val_loss:1.0 val_bpb:1.0\n", b" partial:1 "]
SNIPPETS += [b"9" * 400, b"1e400", b"nan", b"-inf", b" a:b", b"ms", b"settings:", b"=", b"SEED=1", b"\xd9\xa0"]


def changed_bytes(data: bytes, choices: Choices, most: int = 6) -> bytes:
    """A few bytes set, cut out, put in or repeated."""
    changed = bytearray(data)
    for _ in range(choices.number(most) + 1):
        if not choices.more:
            break
        at = choices.number(len(changed) + 1)
        kind = choices.number(8)
        if kind <= 1:
            changed[at : at + 1] = choices.take(1)
        elif kind == 2:
            value = choices.one_of(NUMBERS) % 2**32
            changed[at : at + 4] = struct.pack("<I", value)
        elif kind == 3:
            del changed[at : at + choices.number(300)]
        elif kind == 4:
            del changed[at:]
        elif kind == 5:
            changed[at:at] = choices.take(choices.number(16))
        elif kind == 6:
            changed[at:at] = choices.one_of(SNIPPETS)
        else:
            n_bytes = choices.number(60)
            changed[at:at] = changed[at : at + n_bytes] * choices.one_of([1, 2, 50, 500])
    return bytes(changed)


def keys_of(container: Any) -> Any:
    return list(container) if isinstance(container, dict) else range(len(container))


def place_in(value: Any, choices: Choices) -> tuple[Any, Any]:
    """A container inside a JSON value, and one of its keys. What lies high up is as likely as what lies deep."""
    while True:
        key = choices.one_of(keys_of(value))
        if not isinstance(value[key], (dict, list)) or not value[key] or choices.yes(4):
            return value, key
        value = value[key]


def changed_json(value: Any, choices: Choices, most: int = 4) -> Any:
    """A JSON object with a few values replaced, left out, renamed, moved or repeated."""
    value = copy.deepcopy(value)
    for _ in range(choices.number(most) + 1):
        if not value or not choices.more:
            break
        container, key = place_in(value, choices)
        kind = choices.number(8)
        if kind <= 2:
            container[key] = copy.deepcopy(choices.one_of(JUNK))
        elif kind == 3:
            del container[key]
        elif kind == 4:
            other, other_key = place_in(value, choices)
            container[key] = copy.deepcopy(other[other_key])
        elif kind == 5 and isinstance(container, dict):
            new_key = choices.one_of([*TEXTS, "1", "2", "01"])
            container[new_key] = container[key] if choices.yes(2) else container.pop(key)
        elif kind == 6 and isinstance(container[key], (int, float)):
            container[key] = container[key] * choices.one_of([-1, 0, 2, 0.5, 1e-9, 10**9, 1 + 1e-9])
        else:
            n_copies = choices.one_of([1, 2, 30, 300])
            if n_copies * len(json.dumps(container[key])) > 100_000:
                break
            if isinstance(container, dict):
                container |= {f"{key}{i}": container[key] for i in range(n_copies)}
            else:
                container[key:key] = [container[key]] * n_copies
    return value


def json_file(value: Any, choices: Choices) -> bytes:
    """A JSON value, changed, as bytes; some of these are changed too."""
    if choices.yes(8):
        return choices.take(10_000)
    data = json.dumps(changed_json(value, choices)).encode()
    return changed_bytes(data, choices) if choices.yes(3) else data


# -- Artifact --------------------------------------------------------------------------------------------------------


@functools.cache
def sound_artifacts() -> list[bytes]:
    """A tiny model in each codec."""
    shape = {"vocab_size": 8, "num_layers": 2, "model_dim": 4, "num_heads": 2, "num_kv_heads": 1, "mlp_mult": 1}
    config = tg.GPTConfig(**shape, rope_dims=2, num_loops=1, loop_start=0, loop_end=0, eval_seq_len=6)
    rng = np.random.default_rng(0)
    model = tg.GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(rng.normal(size=tuple(p.shape))))
    coded = tg.CodedModel(states=8, step=0.3, layers={})
    for name, layer in tg.coded_layers(model).items():
        exponents = rng.integers(0, 40, len(layer.weight)).astype(np.uint8)
        coded.layers[name] = tg.CodedLayer(exponents, rng.integers(-9, 10, layer.weight.shape).astype(np.int8))
    return [tg.pack_artifact(model, codec, coded if codec == "trellis_ans" else None) for codec in tg.ARTIFACT_NAMES]


def build_artifact(choices: Choices) -> bytes:
    packed = choices.one_of(sound_artifacts())
    header_bytes = tg.ARTIFACT_PREFIX.unpack_from(packed)[2]
    header_end = tg.ARTIFACT_PREFIX.size + header_bytes
    unpacker = zlib.decompressobj()
    payload = unpacker.decompress(packed[header_end:])
    words = unpacker.unused_data
    header = json.loads(zlib.decompress(packed[tg.ARTIFACT_PREFIX.size : header_end]))

    text = json.dumps(header).encode()
    part = choices.number(6)
    if part <= 1:
        text = json_file(header, choices)
        payload, words = fitting_weights(text, choices) or (payload, words)
    if part in (1, 2):
        payload = changed_bytes(payload, choices)
    if part in (1, 3):
        words = changed_bytes(words, choices)
    if part == 4:
        payload = other_frequencies(payload, choices)
    level = choices.number(10)
    body = zlib.compress(text, 9) + zlib.compress(payload, level) + words
    header_bytes = len(zlib.compress(text, 9))
    if choices.yes(10):
        body = changed_bytes(body, choices)
    data = tg.ARTIFACT_PREFIX.pack(tg.ARTIFACT_MAGIC, zlib.crc32(body), header_bytes) + body
    return changed_bytes(data, choices) if part == 5 and choices.yes(2) else data


def fitting_weights(text: bytes, choices: Choices) -> tuple[bytes, bytes] | None:
    """Payload and words of the size that a header asks for, if it describes a model that is not too large to make."""
    try:
        header = tg.parse_header(zlib.compress(text))
        with torch.device("meta"):
            table = tg.tensor_table(tg.GPT(header.config), header.codec)
    except Exception:
        return None
    # A model that is accepted takes as much time and memory as it needs.
    if sum(math.prod(tensor.shape) for tensor in table) > 2**20 or choices.yes(2):
        return None
    n_bytes = sum(tensor.n_bytes for tensor in table)
    payload = choices.one_of([b"\0", b"\1", b"\2"]) * n_bytes
    if header.codec != "trellis_ans":
        return payload, b""
    first = choices.number(2**tg.ANS_BITS)
    frequencies = np.zeros((tg.N_CLASSES, tg.N_SYMBOLS), "<u2")
    frequencies[:, 128] = 2**tg.ANS_BITS - first
    frequencies[:, choices.number(128)] = first
    n_lanes = max(rows.stop - rows.start for _, rows in tg.bands_of(table))
    lane = choices.one_of([tg.LANE_LOW, 0, 1, 2**32 - 1])
    return payload + frequencies.tobytes(), np.full(n_lanes, lane, "<u4").tobytes() + choices.take(64)


def other_frequencies(payload: bytes, choices: Choices) -> bytes:
    """A payload in which symbols got some of the frequency of others, so that the sums remain."""
    changed = bytearray(payload)
    if len(changed) < tg.FREQUENCY_BYTES:
        return payload
    table = np.frombuffer(changed, "<u2", offset=len(changed) - tg.FREQUENCY_BYTES)
    table = table.reshape(tg.N_CLASSES, tg.N_SYMBOLS)
    for _ in range(choices.number(4) + 1):
        row = table[choices.number(tg.N_CLASSES)]
        giver = int(row.argmax()) if choices.yes(2) else choices.number(tg.N_SYMBOLS)
        moved = min(int(row[giver]), choices.one_of([1, 2, 100, 2**14, 2**16 - 1]))
        row[giver] -= moved
        row[choices.number(tg.N_SYMBOLS)] += moved
    return bytes(changed)


def read_artifact(path: Path) -> None:
    """ValueError, or a model with finite weights."""
    model = tg.load_artifact(path)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# -- Shards and their manifest ---------------------------------------------------------------------------------------

N_TOKENS = 300


@functools.cache
def sound_data() -> dict[str, bytes]:
    """A validation split of few tokens: two shards, their byte counts, tokenizer and manifest, by name."""
    source = record.data_path(RECORD)
    files = {"tokenizer.model": (source / "tokenizer.model").read_bytes()}
    header = struct.pack("<256i", tg.SHARD_MAGIC, tg.SHARD_VERSION, N_TOKENS, *[0] * 253)
    for i in range(2):
        for kind in ("val", "val_bytes"):
            tokens = (source / f"fineweb_{kind}_000000.bin").read_bytes()[1024:][: 2 * N_TOKENS]
            files[f"fineweb_{kind}_{i:06d}.bin"] = header + tokens
    manifest = json.loads((source / "manifest.json").read_bytes())
    manifest["splits"]["val"]["files"] = {name: sha256(data) for name, data in files.items() if name.endswith(".bin")}
    manifest["splits"]["val"].update(tokens=2 * N_TOKENS)
    return {**files, "manifest.json": json.dumps(manifest).encode()}


@functools.cache
def tokenizer() -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=sound_data()["tokenizer.model"])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_data(folder: Path, changed: dict[str, bytes]) -> None:
    """The sound split with some of its files changed."""
    folder.mkdir(exist_ok=True)
    for name, data in {**sound_data(), **changed}.items():
        (folder / name).write_bytes(data)


def load_split(folder: Path) -> None:
    split = tg.load_val_split(str(folder), tokenizer(), sha256(sound_data()["tokenizer.model"]))
    assert len(split.ids) == len(split.bytes) > 0
    json.dumps(split.identity, allow_nan=False)


def build_shard(choices: Choices) -> bytes:
    data = bytearray(sound_data()["fineweb_val_000000.bin"])
    for _ in range(choices.number(3)):
        struct.pack_into("<I", data, 4 * choices.one_of([0, 1, 2, 3, 255]), choices.one_of(NUMBERS) % 2**32)
    changed = changed_bytes(bytes(data), choices)
    if choices.yes(2) and len(changed) >= 12:
        n_tokens = (len(changed) - 1024) // 2
        changed = changed[:8] + struct.pack("<i", n_tokens) + changed[12:]
    return changed


def read_by_script(path: Path) -> np.ndarray:
    shard = tg.Shard(path)
    return shard.read(0, len(shard))


def read_shard(path: Path) -> None:
    """Both readers agree; then the split with this shard, or with these byte counts, is loaded."""
    outcomes = []
    for read in (read_by_script, shards.read_shard):
        try:
            outcomes.append(read(path).tolist())
        except ValueError:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1] or outcomes == [None, []]

    data = path.read_bytes()
    for name in ("fineweb_val_000000.bin", "fineweb_val_bytes_000001.bin"):
        manifest = json.loads(sound_data()["manifest.json"])
        manifest["splits"]["val"]["files"][name] = sha256(data)
        write_data(path.parent / "split", {name: data, "manifest.json": json.dumps(manifest).encode()})
        with contextlib.suppress(ValueError):
            load_split(path.parent / "split")


def build_manifest(choices: Choices) -> bytes:
    return json_file(json.loads(sound_data()["manifest.json"]), choices)


def read_both_manifests(path: Path) -> None:
    with contextlib.suppress(ValueError):
        read_manifest(path)
    write_data(path.parent / "split", {"manifest.json": path.read_bytes()})
    with contextlib.suppress(ValueError):
        tg.settings_from_files({"DATA_PATH": str(path.parent / "split"), "PRESET": "smoke"})
    load_split(path.parent / "split")


# -- A record's claims -----------------------------------------------------------------------------------------------

SCRIPT = b"""class GPTConfig:
    vocab_size: int = 1
    num_layers: int = 1
    eval_seq_len: int = 0

class Hyperparameters:
    seed: int = 1
    matrix_lr: float = 0.1
"""


@functools.cache
def sound_record() -> dict[str, bytes]:
    """The files of a record with a short script, by name; all of it agrees."""
    source = sorted(RECORD.glob("train_seed*.json"))
    files = {"train_gpt.py": SCRIPT, "README.md": b"# A record\n"}
    runs = []
    for path in source:
        run = json.loads(path.read_bytes())
        log = path.with_suffix(".log").read_text()
        changes = {"code_sha256": sha256(SCRIPT), "bytes_code": len(SCRIPT)}
        changes["bytes_total"] = run["bytes_artifact"] + len(SCRIPT)
        for key, value in changes.items():
            log = log.replace(str(run[key]), str(value))
        run |= changes
        runs.append(run)
        files[path.name] = json.dumps(run).encode()
        files[path.with_suffix(".log").name] = log.encode()
    about = record.load_submission(RECORD).about
    submission = record.summarize(runs, SCRIPT, about)
    files["submission.json"] = json.dumps(dataclasses.asdict(submission)).encode()

    reviews = []
    for seed, kind in (("1", "reproduced"), ("2", "rescored")):
        result = submission.seed_results[seed]
        review = record.Review(
            "2026-11-27", f"reviewer {seed}", kind, submission.code_sha256, seed, result.val_bpb, 0.0
        )
        reviews.append(
            dataclasses.replace(
                review, judge_version=record.newest_judge_version(), artifact_sha256=result.artifact_sha256
            )
        )
    entries = [dataclasses.asdict(review) for review in reviews]
    files["reviews.json"] = json.dumps(entries).encode()
    return files


def build_claims(name: str, choices: Choices) -> bytes:
    return json_file(json.loads(sound_record()[name]), choices)


def read_claims(name: str, path: Path) -> None:
    """The static checks of a record with this file in it: each has an outcome of its own."""
    folder = path.parent / "track_non_record_16mb" / "2026-11-26_Hostile"
    if not folder.exists():
        folder.mkdir(parents=True)
        for other, data in sound_record().items():
            (folder / other).write_bytes(data)
    (folder / name).write_bytes(path.read_bytes())
    try:
        check_record(folder)
    finally:
        (folder / name).write_bytes(sound_record()[name])


def check_record(folder: Path) -> None:
    checks = verify.static_checks(folder)
    for check in checks:
        # A check that breaks is reported as a failure, but its reason helps nobody.
        assert "cannot be judged" not in check.reason, check
        check.reason.encode("utf-8", "backslashreplace")
    submission = record.load_submission(folder)
    reviews = record.load_reviews(folder)
    record.seed_states(submission, reviews)
    verify.passing_line(submission, reviews)


def build_log(choices: Choices) -> bytes:
    lines = sound_record()["train_seed1.log"].splitlines(keepends=True)
    for _ in range(choices.number(4)):
        at = choices.number(len(lines))
        kind = choices.number(4)
        if kind == 0:
            lines[at] = changed_bytes(lines[at], choices, 3)
        elif kind == 1:
            lines[at:at] = [choices.one_of(lines)] * choices.one_of([1, 20, 500])
        elif kind == 2:
            lines[at:at] = [choices.take(80)]
        else:
            del lines[at]
            lines = lines or [b""]
    data = b"".join(lines)
    return changed_bytes(data, choices) if choices.yes(2) else data


def read_log(path: Path) -> None:
    """What verify, the page and the plot do with a log."""
    log = record.parse_log(record.read_text(path))
    files = sound_record()
    submission = record.from_json(record.Submission, json.loads(files["submission.json"]), "submission.json")
    run = json.loads(files["train_seed1.json"])
    first = dataclasses.replace(submission, seed_results={"1": submission.seed_results["1"]})
    verify.check_logs(first, {"1": log}, {"1": run})
    verify.check_clock(first, {"1": log})

    for curve in (log.train_curve, log.val_curve):
        json.dumps(page.thinned(curve, page.TRAIN_SMOOTHING), allow_nan=False)
    for x, y in itertools.product(("seconds", "steps", "tokens"), ("loss", "bpb")):
        with contextlib.suppress(ValueError):
            line = plot.Line("a", [plot.read_curve(path, x, y, 0.02)])
            plot.in_text([line], x, y, 80, plot.BLOCKS)


# -- Running them ----------------------------------------------------------------------------------------------------


# -- Checkpoint ------------------------------------------------------------------------------------------------------

CHECKPOINT_SETTINGS = {
    "PRESET": "smoke",
    "VOCAB_SIZE": "1024",
    "NUM_LAYERS": "2",
    "MODEL_DIM": "8",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "ROPE_DIMS": "2",
    "TRAIN_SEQ_LEN": "16",
    "TRAIN_BATCH_TOKENS": "32",
}


def new_run(env: dict[str, str], folder: Path) -> tuple[tg.Learner, tg.Loader, tg.Run]:
    """A run at its start, on the first validation shard as if it were text to train on."""
    config = tg.from_env(tg.GPTConfig, env)
    hp = dataclasses.replace(tg.from_env(tg.Hyperparameters, env), out_dir=str(folder), run_id="run")
    world = tg.World()
    model = tg.GPT(config)
    tg.init_weights(model, hp)
    run = tg.Run(config, hp, world, tg.Ledger(world.device), log0=lambda line: None)
    run.progress.average = [p.detach().clone() for p in model.parameters()] if hp.ema_decay else []
    stream = tg.TokenStream(str(train_folder()), "fineweb_train_*.bin")
    loader = tg.Loader(stream, hp, config.vocab_size, world)
    return tg.Learner(model, model.loss, tg.build_optimizers(model, hp, world)), loader, run


@functools.cache
def train_folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    write_data(folder, {"fineweb_train_000000.bin": sound_data()["fineweb_val_000000.bin"]})
    return folder


@functools.cache
def sound_checkpoint() -> tuple[dict[str, Any], bytes]:
    """Header and tensors after two steps."""
    folder = Path(tempfile.mkdtemp())
    learner, loader, run = new_run(CHECKPOINT_SETTINGS, folder)
    for step in range(2):
        loss = tg.train_step(learner, loader.batch(step), 1.0, 0.9, run).train_loss
        run.progress.finish_step(float(loss), step + 1.0)
    writer = tg.CheckpointWriter(learner, {"train_tokens": N_TOKENS}, run)
    writer.start()
    writer.finish()
    data = (folder / "run" / "checkpoint_000000000002.ckpt").read_bytes()
    begin = tg.CHECKPOINT_PREFIX.size
    tensors_begin = begin + tg.CHECKPOINT_PREFIX.unpack_from(data)[2]
    header = json.loads(data[begin:tensors_begin])
    return {**header, "given": CHECKPOINT_SETTINGS}, data[tensors_begin:]


def build_checkpoint(choices: Choices) -> bytes:
    header, tensors = sound_checkpoint()
    part = choices.number(4)
    text = json_file(header, choices) if part <= 1 else json.dumps(header).encode()
    if part in (1, 2):
        tensors = changed_bytes(tensors, choices)
    body = text + tensors
    data = tg.CHECKPOINT_PREFIX.pack(tg.CHECKPOINT_MAGIC, zlib.crc32(body), len(text)) + body
    return changed_bytes(data, choices) if part == 3 else data


def read_checkpoint(path: Path) -> None:
    """ValueError, or a run that goes on as far as its tensors."""
    run_folder = path.parent / "run"
    run_folder.mkdir(exist_ok=True)
    shutil.copyfile(path, run_folder / "checkpoint_000000000002.ckpt")
    checkpoint = tg.read_checkpoint(run_folder / "checkpoint_000000000002.ckpt")
    found = tg.settings_to_go_on(checkpoint, {})
    tg.require_room_for_model(checkpoint, tg.from_env(tg.GPTConfig, found))
    learner, loader, run = new_run(found, path.parent)
    tg.restore(checkpoint, learner, loader, run)
    json.dumps(run.progress.as_json(), allow_nan=False)


class Target(NamedTuple):
    build: Callable[[Choices], bytes]
    read: Callable[[Path], None]
    errors: tuple[type[Exception], ...] = (ValueError,)  # that its reader promises


def claims_target(name: str) -> Target:
    return Target(functools.partial(build_claims, name), functools.partial(read_claims, name))


TARGETS = {
    "artifact": Target(build_artifact, read_artifact),
    "checkpoint": Target(build_checkpoint, read_checkpoint),
    "shard": Target(build_shard, read_shard),
    "manifest": Target(build_manifest, read_both_manifests),
    "submission": claims_target("submission.json"),
    "run": claims_target("train_seed1.json"),
    "reviews": claims_target("reviews.json"),
    "log": Target(build_log, read_log),
}


class TooMuch(Exception):
    """A file took more time or memory to read than it may."""


def peak_bytes(reset: bool = False) -> int:
    """The most memory that this process has held since it was last asked to reset; 0 where only Linux knows."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        return 0


@contextlib.contextmanager
def watchdog(path: Path) -> Iterator[None]:
    """TooMuch if what is done inside takes too long, or more memory than the file explains."""

    def stop(signal_number: int, frame: Any) -> None:
        raise TooMuch(f"more than {SECONDS} s")

    before = peak_bytes(reset=True)
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = peak_bytes() - before
    if grown > MEMORY_BYTES + path.stat().st_size:
        raise TooMuch(f"{grown} bytes of memory for a file of {path.stat().st_size}")


def try_file(target: Target, path: Path) -> None:
    """Read a hostile file. Raises whatever its reader does not promise."""
    with watchdog(path), contextlib.suppress(*target.errors):
        target.read(path)


def replay(name: str, folder: Path, n_mutations: int) -> int:
    """Read the found cases of a target, and mutations that are the same every time. -> how many"""
    target = TARGETS[name]
    path = folder / "hostile"
    cases = sorted(FOUND.glob(f"{name}/*"))
    for case in cases:
        shutil.copyfile(case, path)
        try_file(target, path)

    rng = random.Random(0)
    for _ in range(n_mutations):
        path.write_bytes(target.build(Choices(rng.randbytes(rng.choice([8, 16, 32, 64])))))
        try_file(target, path)
    return len(cases) + n_mutations


def fuzz(name: str, seconds: int, corpus: Path) -> None:
    """Mutate until the time is over. A case is written down once for every kind of error, and does not end the run.

    How many files were read is printed at the end.
    """
    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp())
    path = folder / "hostile"
    seen = set[str]()

    def one(data: bytes) -> None:
        path.write_bytes(target.build(Choices(data)))
        try:
            try_file(target, path)
        except Exception as error:
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            line = 0 if frame is None or isinstance(error, TooMuch) else frame.tb_lineno
            kind = f"{type(error).__name__}-{line}"
            if kind not in seen:
                seen.add(kind)
                case = FOUND / name / f"{kind}-{sha256(path.read_bytes())[:8]}"
                case.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, case)
                print(f"{case}: {error!r:.300}", flush=True)

    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=4096", "-max_len=512", "-len_control=0"]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={corpus}/", *options], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=TARGETS, help="what to fuzz; without it, --replay does all")
    parser.add_argument("--seconds", type=int, help="how long to fuzz")
    parser.add_argument(
        "--corpus", type=Path, default=Path(tempfile.gettempdir(), "fuzz"), help="what is kept between runs"
    )
    parser.add_argument("--replay", action="store_true", help="read the found cases and 300 mutations of each target")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.seconds:
        if not args.target:
            parser.error("name a target")
        fuzz(args.target, args.seconds, args.corpus / args.target)
    for name in [args.target] if args.target else TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {replay(name, Path(folder), 300)} files")


if __name__ == "__main__":
    main()
