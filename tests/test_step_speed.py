"""How long a training step takes, against the same model trained the plain way.

    python -m pytest -m slow -s tests/test_step_speed.py

It prints the rows of README.md: medians of steps that alternate in one process, with the range.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch

import train_gpt as tg

BASELINE = {"PRESET": "baseline", "NUM_LAYERS": "4", "MODEL_DIM": "256", "NUM_HEADS": "4", "NUM_KV_HEADS": "2"}
SETTINGS = {**BASELINE, "TRAIN_SEQ_LEN": "512", "TRAIN_BATCH_TOKENS": "8192", "EVAL_SEQ_LEN": "512"}
CONFIG, HP = tg.from_env(tg.GPTConfig, SETTINGS), tg.from_env(tg.Hyperparameters, SETTINGS)
WORLD = tg.World()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not tg.wants_compile("auto", WORLD.device), reason="there is no C++ compiler to compile with"),
]


def new_model() -> tg.GPT:
    model = tg.GPT(CONFIG)
    tg.init_weights(model, HP)
    model.compute_dtype = tg.pick_dtype(WORLD.device)
    return model


def batch(n_micro: int) -> tg.Batch:
    ids = torch.randint(0, CONFIG.vocab_size, (16, 513), generator=torch.Generator().manual_seed(0))
    return [(part[:, :-1], part[:, 1:]) for part in ids.chunk(n_micro)]


def our_step() -> Callable[[], None]:
    model = new_model()
    loss_fn, _ = tg.compile_model(model, True)
    run = tg.Trainer(loss_fn, model, tg.build_optimizers(model, HP, WORLD), None, HP, WORLD)  # type: ignore[arg-type]
    return lambda: tg.train_step(run, batch(1), 1.0, 0.95)


@torch.compile
def orthogonalize_one(g: torch.Tensor) -> torch.Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    x = x.T if g.size(0) > g.size(1) else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.size(0) > g.size(1) else x


def plain_step() -> Callable[[], None]:
    """As the published script does it: the graph as a whole, 8 micro-batches, one Newton-Schulz chain per matrix."""
    model = new_model()
    loss_fn = torch.compile(model.loss, dynamic=False, fullgraph=True)
    matrices = [p for name, p in model.blocks.named_parameters() if name.endswith(".weight")]
    momenta = [torch.zeros_like(p) for p in matrices]
    owned = {id(p) for p in matrices}
    adam = torch.optim.Adam([p for p in model.parameters() if id(p) not in owned], lr=0.04, fused=True)

    def step() -> None:
        for ids, targets in batch(8):
            (loss_fn(ids, targets) / 8).backward()
        with torch.no_grad():
            for p, momentum in zip(matrices, momenta, strict=True):
                momentum.mul_(0.95).add_(p.grad)
                update = orthogonalize_one(p.grad.add(momentum, alpha=0.95))
                p.add_(update.to(p.dtype), alpha=-0.04 * max(1, p.size(0) / p.size(1)) ** 0.5)
        adam.step()
        model.zero_grad(set_to_none=True)

    return step


def test_step_is_not_slower_than_the_plain_one():
    torch.set_num_threads(os.cpu_count() or 1)  # conftest.py leaves one
    steps = {"plain": plain_step(), "train_step": our_step()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(25):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    medians = {}
    for name, all_seconds in seconds.items():
        ms = sorted(1000 * s for s in all_seconds[4:])  # without those that compile
        medians[name] = statistics.median(ms)
        print(f"{name}: {medians[name]:.0f} ms [{ms[0]:.0f}-{ms[-1]:.0f}], {8192 / medians[name]:.1f} k tokens/s")
    assert medians["train_step"] < 1.05 * medians["plain"]
