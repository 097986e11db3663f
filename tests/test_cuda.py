"""What only a GPU can show. Runs with `python -m pytest -m cuda` on a machine that has one; CI has none."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shards import write_shard
from torch import Tensor

import train_gpt as tg

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch supports"),
]
CUDA = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def smoke_config() -> tg.GPTConfig:
    """PRESET=smoke, which uses all techniques but loops, with loops."""
    config = tg.from_env(tg.GPTConfig, {"PRESET": "smoke", "NUM_LOOPS": "1", "LOOP_START": "1", "LOOP_END": "2"})
    return dataclasses.replace(config, eval_seq_len=256, tokenizer_sha256="a" * 64, compute_dtype="float32")


def token_rows(config: tg.GPTConfig, n_rows: int, seq_len: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, config.vocab_size, (n_rows, seq_len), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.01] = config.bos_id
    return ids


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected.cpu().double()).norm() / expected.double().norm())


# -- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 8, 4, 2048, 64), (3, 4, 2, 256, 64), (1, 4, 4, 300, 32), (2, 6, 2, 130, 48)])
@pytest.mark.parametrize(
    ("kind", "document_masks"), [("flex", True), ("sdpa", True), ("sdpa", False)], ids=["flex", "masked", "causal"]
)
def test_attention_agrees_with_float64(kind, document_masks, shape):
    """Outputs and gradients in bfloat16, for documents of all lengths, and for lengths that fill no block."""
    B, H, K, T, E = shape
    config = dataclasses.replace(tg.GPTConfig(), document_masks=document_masks)
    ids = token_rows(config, B, T).to(CUDA)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(B, H, T, E, generator=generator)
    k, v = torch.randn(2, B, K, T, E, generator=generator).unbind()
    weight = torch.randn(B, H, T, E, generator=generator)

    leaves = [x.to(CUDA, torch.bfloat16).requires_grad_() for x in (q, k, v)]
    mask = tg.attention_mask(ids, config, torch.bfloat16, kind)
    attend = tg.piece(tg.attend, compiled=kind == "flex")
    y = attend(*leaves, mask)
    (y * weight.to(y)).sum().backward()

    exact = [x.detach().double().requires_grad_() for x in leaves]
    keys = exact[1].repeat_interleave(H // K, 1)
    values = exact[2].repeat_interleave(H // K, 1)
    document = (ids == config.bos_id).cumsum(1) * document_masks
    visible = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    scores = (exact[0] @ keys.mT / math.sqrt(E)).masked_fill(~visible, -math.inf)
    expected = scores.softmax(-1) @ values
    (expected * weight.to(expected)).sum().backward()

    assert relative(y, expected) < 0.01
    for leaf, reference in zip(leaves, exact, strict=True):
        assert relative(leaf.grad, reference.grad) < 0.02


# -- model and training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("looping", [False, True])
def test_compiled_model_agrees_with_the_plain_one(smoke_config, random_model, looping):
    """Loss, logits and gradients; FlexAttention on one side, torch's own on the other."""
    model = random_model(smoke_config).to(CUDA)
    ids = token_rows(smoke_config, 4, 256).to(CUDA)
    losses = []
    gradients = []
    for compiled in (False, True):
        model.zero_grad()
        loss = model.loss(ids, ids.flip(1), looping, compiled)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert relative(gradients[1], gradients[0]) < 0.02
    with torch.no_grad():
        assert relative(model(ids, looping, compiled=True), model(ids, looping)) < 0.01


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Tokens of which each follows from the one before it in one of four ways, so that something can be learnt."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    ids = [1]
    for choice in rng.integers(0, 4, 400_000):
        ids.append(1 if rng.random() < 0.003 else 2 + (7 * ids[-1] + 13 * choice) % 1000)
    write_shard(folder / "fineweb_train_000000.bin", np.array(ids, np.uint16))
    return folder


def train_losses(device: torch.device, shards: Path, compiled: bool, steps: int = 20) -> list[float]:
    """Of PRESET=smoke, in float32."""
    env = {"PRESET": "smoke", "COMPUTE_DTYPE": "float32", "DATA_PATH": str(shards)}
    config = dataclasses.replace(tg.from_env(tg.GPTConfig, env), eval_seq_len=256)
    hp = tg.from_env(tg.Hyperparameters, env)
    world = tg.World(device=device)
    run = tg.Run(config, hp, world, tg.Ledger(device), log0=lambda line: None, compiled=compiled)
    model = tg.GPT(config)
    tg.init_weights(model, hp)
    model.to(device)
    loss_fn = functools.partial(model.loss, compiled=compiled)
    learner = tg.Learner(model, loss_fn, tg.build_optimizers(model, hp, world))
    loader = tg.Loader(tg.TokenStream(str(shards), "fineweb_train_*.bin"), hp, config.vocab_size, world)
    return [float(tg.train_step(learner, loader.batch(i), 1.0, 0.95, run).train_loss) for i in range(steps)]


def test_losses_of_20_steps_are_those_of_a_cpu(shards):
    """The orthogonalization is in bfloat16 on the GPU, which moves the losses a little."""
    on_cpu = train_losses(torch.device("cpu"), shards, compiled=False)
    for compiled in (False, True):
        assert train_losses(CUDA, shards, compiled) == pytest.approx(on_cpu, abs=0.02)
    assert on_cpu[-1] < on_cpu[0] - 0.5


def test_micro_batch_is_halved_until_it_fits_into_the_memory(shards):
    """A real lack of memory, at a fiftieth of the card's."""
    env = {"PRESET": "smoke", "TRAIN_BATCH_TOKENS": "65536", "DATA_PATH": str(shards), "VOCAB_SIZE": "8192"}
    config = dataclasses.replace(tg.from_env(tg.GPTConfig, env), compute_dtype="bfloat16")
    hp = tg.from_env(tg.Hyperparameters, env)
    world = tg.World(device=CUDA)
    run = tg.Run(config, hp, world, tg.Ledger(CUDA), log0=lambda line: None)
    model = tg.GPT(config)
    tg.init_weights(model, hp)
    model.to(CUDA)
    learner = tg.Learner(model, functools.partial(model.loss), tg.build_optimizers(model, hp, world))
    loader = tg.Loader(tg.TokenStream(str(shards), "fineweb_train_*.bin"), hp, config.vocab_size, world)
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(0.03)
        tg.fit_micro_batch(learner, loader, run)
        assert 1 <= loader.micro_sequences <= 128
        tg.train_step(learner, loader.batch(0), 1.0, 0.9, run)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


# -- artifact --------------------------------------------------------------------------------------------------------


def test_codes_are_those_of_a_cpu():
    """But where a weight lies on the edge between two codes, and in what follows in its row."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 64, 300, generator=generator)
    x = torch.randn(3, 1000, 300, generator=generator) @ torch.randn(3, 300, 300, generator=generator) / 17
    factors = [tg.factorize(one.mT @ one / 1000) for one in x]
    factor = tg.Factor(torch.stack([f.feedback for f in factors]), torch.stack([f.cost for f in factors]))
    step = torch.full((3, 64, 1), 0.2)
    on_cpu = tg.quantize_codes(w, factor, step, 8)
    on_gpu = tg.quantize_codes(w.to(CUDA), tg.Factor(*(t.to(CUDA) for t in factor)), step.to(CUDA), 8).cpu()
    assert float((on_cpu == on_gpu).all(2).float().mean()) > 0.8
    assert float((on_cpu == on_gpu).float().mean()) > 0.97


def test_moments_are_those_of_a_cpu(smoke_config, random_model, shards):
    model = random_model(smoke_config)
    hp = tg.from_env(tg.Hyperparameters, {"PRESET": "smoke", "DATA_PATH": str(shards)})
    hp = dataclasses.replace(hp, gptq_calibration_batches=2, max_wallclock_seconds=0.0)
    moments = []
    for device in (torch.device("cpu"), CUDA):
        world = tg.World(device=device)
        run = tg.Run(smoke_config, hp, world, tg.Ledger(device), log0=lambda line: None)
        loader = tg.Loader(tg.TokenStream(str(shards), "fineweb_train_*.bin"), hp, smoke_config.vocab_size, world)
        moments.append(tg.calibrate(model.to(device), loader, 0, run))
    for name, (inputs, gradients) in moments[0].items():
        assert relative(moments[1][name].inputs, inputs) < 0.01, name
        assert relative(moments[1][name].gradients, gradients) < 0.05, name


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, lossless_tokenizer, documents) -> dict[str, str]:
    """Settings of a short PRESET=smoke on the small text."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "given.model").write_bytes(lossless_tokenizer)
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents * 3))
    options = ["--input", "docs.jsonl", "--val-docs", "20", "--tokenizer", "given.model", "--out", ".", "--name", "t"]
    subprocess.run([sys.executable, str(ROOT / "data" / "build_shards.py"), *options], cwd=folder, check=True)
    return {
        "PRESET": "smoke",
        "DATA_PATH": str(folder / "datasets" / "t"),
        "TOKENIZER_PATH": str(folder / "given.model"),
        "VOCAB_SIZE": "320",
        "ITERATIONS": "60",
        "VAL_LOSS_EVERY": "1000",
        "COMPUTE_DTYPE": "float32",
    }


def run_in(folder: Path, settings: dict[str, str], *launcher: str) -> dict[str, Any]:
    """Run the script. -> what it writes about the run"""
    env = {**os.environ, **settings, "RUN_ID": hashlib.sha256(str(settings).encode()).hexdigest()[:8]}
    command = [sys.executable, *launcher, tg.__file__]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return dict(json.loads((folder / "runs" / env["RUN_ID"] / "run.json").read_text()))


@pytest.fixture(scope="module")
def smoke_run(corpus, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("smoke")
    return folder, run_in(folder, corpus)


def test_whole_run_learns(smoke_run):
    _, results = smoke_run
    assert results["device"].startswith("cuda")
    assert results["val_bpb"] < 0.6 * results["untrained_val_bpb"]
    assert results["val_bpb"] == pytest.approx(results["pre_quant_val_bpb"], abs=0.02)


def test_artifact_of_a_gpu_has_the_same_score_on_a_cpu(smoke_run, corpus):
    folder, results = smoke_run
    settings = {**corpus, "EVAL_ARTIFACT": str(folder / "final_model.trellis.ptz"), "CUDA_VISIBLE_DEVICES": ""}
    assert run_in(folder, settings)["val_bpb"] == pytest.approx(results["val_bpb"], abs=5e-4)


def test_artifact_of_a_cpu_has_the_same_score_on_a_gpu(corpus, tmp_path):
    on_cpu = run_in(tmp_path, {**corpus, "CUDA_VISIBLE_DEVICES": "", "ITERATIONS": "20", "COMPILE": "0"})
    settings = {**corpus, "EVAL_ARTIFACT": str(tmp_path / "final_model.trellis.ptz")}
    assert run_in(tmp_path, settings)["val_bpb"] == pytest.approx(on_cpu["val_bpb"], abs=5e-4)
