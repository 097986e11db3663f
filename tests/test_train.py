"""Training: schedule, clock, steps, and whole runs of the script."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import train_gpt as tg

CPU = torch.device("cpu")
BASELINE = tg.from_env(tg.Hyperparameters, {"PRESET": "baseline"})
STEPS = dataclasses.replace(BASELINE, iterations=100, warmdown_iters=40, max_wallclock_seconds=0.0)
CLOCK = dataclasses.replace(STEPS, max_wallclock_seconds=50.0)


# -- schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "scale"), [(0, 1), (59, 1), (60, 1), (70, 0.75), (80, 0.5), (99, 0.025), (100, 0)])
def test_lr_scale_by_steps(step, scale):
    """Without a time limit the clock plays no part."""
    for seconds in (0.0, 1e6):
        assert tg.lr_scale(step, seconds, STEPS) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("step", "seconds", "scale"),
    [(0, 0.0, 1), (10, 5.0, 1), (60, 30.0, 1), (80, 40.0, 0.5), (90, 45.0, 5 / 20), (100, 50.0, 0), (101, 51.0, 0)],
)
def test_lr_scale_by_the_clock(step, seconds, scale):
    """Half a second per step: 40 steps of warmdown are the last 20 of 50 seconds."""
    assert tg.lr_scale(step, seconds, CLOCK) == pytest.approx(scale)


def test_lr_scale_reaches_zero_at_whichever_end_comes_first():
    """A fast machine that runs out of steps before the time is up must not stop at the full rate."""
    assert tg.lr_scale(90, 9.0, CLOCK) == pytest.approx(tg.lr_scale(90, 0.0, STEPS)) == pytest.approx(0.25)
    assert tg.lr_scale(10, 49.0, CLOCK) < 0.01


@pytest.mark.parametrize(
    ("done", "scale"), [(0, 1), (0.6, 1), (0.7, 0.75), (0.8, 0.5), (0.96, 0.1), (0.99, 0.1), (1, 0.1)]
)
def test_lr_scale_falls_over_the_last_part_of_the_run_to_its_floor(done, scale):
    """WARMDOWN_FRAC is a part of the steps or of the time, whichever is further."""
    step = round(100 * done)
    changes = {"warmdown_iters": 0, "warmdown_frac": 0.4, "min_lr": 0.1}
    by_steps = dataclasses.replace(STEPS, **changes)
    by_clock = dataclasses.replace(CLOCK, **changes)
    assert tg.lr_scale(step, 1e9, by_steps) == pytest.approx(scale)
    assert tg.lr_scale(step, 1.0, by_clock) == pytest.approx(scale)
    assert tg.lr_scale(1, 50 * done, by_clock) == pytest.approx(scale)


@given(
    step=st.integers(0, 200),
    seconds=st.floats(0, 100),
    iters=st.integers(0, 300),
    frac=st.floats(0, 1),
    floor=st.floats(0, 1),
    limit=st.sampled_from([0.0, 50.0]),
)
def test_lr_scale_stays_between_its_floor_and_1_and_never_rises(step, seconds, iters, frac, floor, limit):
    """WARMDOWN_ITERS are exempt from the second: they become time by the average step, which can fall."""
    changes = {"warmdown_iters": iters, "warmdown_frac": frac, "min_lr": floor, "max_wallclock_seconds": limit}
    hp = dataclasses.replace(STEPS, **changes)
    scale = tg.lr_scale(step, seconds, hp)
    assert floor <= scale <= 1
    if iters == 0:
        assert tg.lr_scale(step + 1, seconds, hp) <= scale
        assert tg.lr_scale(step, seconds + 1.0, hp) <= scale


def test_lr_scale_without_warmdown_is_one():
    for hp in (STEPS, CLOCK):
        assert tg.lr_scale(99, 49.9, dataclasses.replace(hp, warmdown_iters=0, warmdown_frac=0.0)) == 1


def test_warmdown_iters_replace_the_fraction():
    """The command lines of the published challenge name them, with a preset that has the fraction."""
    both = dataclasses.replace(STEPS, warmdown_frac=0.85)
    for step in range(101):
        assert tg.lr_scale(step, 0.0, both) == tg.lr_scale(step, 0.0, STEPS)


@pytest.mark.parametrize(
    ("step", "seconds", "part"),
    [(0, 0.0, 0), (30, 10.0, 0.3), (30, 20.0, 0.4), (100, 1.0, 1), (5, 50.0, 1), (5, 60.0, 1)],
)
def test_part_done_is_by_steps_or_by_the_clock_whichever_is_further(step, seconds, part):
    assert tg.part_done(step, seconds, CLOCK) == pytest.approx(part)


def test_part_done_without_a_time_limit_or_without_steps():
    assert tg.part_done(30, 1e9, STEPS) == pytest.approx(0.3)
    assert tg.part_done(0, 0.0, dataclasses.replace(CLOCK, iterations=0)) == 0


@pytest.mark.parametrize(
    ("limit", "codec", "expected"),
    [(600.0, "trellis_ans", 596.0), (600.0, "int8_zlib", 600.0), (6.0, "trellis_ans", 3.0), (0.0, "trellis_ans", 0.0)],
)
def test_calibration_gets_its_seconds_of_the_limit_but_at_most_half(limit, codec, expected):
    hp = tg.Hyperparameters(max_wallclock_seconds=limit, codec=codec, gptq_reserve_seconds=4.0)
    assert hp.seconds_for_steps == expected


def test_muon_momentum_rises_linearly_and_stays():
    hp = tg.Hyperparameters(muon_momentum_warmup_start=0.8, muon_momentum=0.9, muon_momentum_warmup_steps=10)
    assert [tg.muon_momentum(step, hp) for step in (0, 5, 10, 1000)] == pytest.approx([0.8, 0.85, 0.9, 0.9])
    assert tg.muon_momentum(0, dataclasses.replace(hp, muon_momentum_warmup_steps=0)) in (0.8, 0.9)


@settings(max_examples=30)
@given(st.floats(0.001, 0.9999), st.integers(1, 40))
def test_average_equals_its_closed_form(decay, n):
    """Weights of step s of n count as decay ** (n - s), and those before the first step not at all."""
    weights = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    average = [torch.full((3,), 1e6, dtype=torch.float64) for _ in range(2)]
    for step in range(1, n + 1):
        tg.update_average(average, list(weights[step - 1]), step, decay)
    counts = decay ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
    expected = (counts[:, None, None] * weights).sum(0) / counts.sum()
    torch.testing.assert_close(torch.stack(average), expected, atol=1e-9, rtol=1e-9)


# -- clock -----------------------------------------------------------------------------------------------------------


def test_ledger_accounts_for_every_second_once():
    """What is not training must not count against the limit, and nothing may be lost between phases."""
    begin = time.perf_counter()
    ledger = tg.Ledger(CPU)
    for phase in ("train", "validate", "train", "report"):
        ledger.switch(phase)
        time.sleep(0.02)
    ledger.switch("end")
    total = time.perf_counter() - begin
    assert ledger.spent.keys() == {"startup", "train", "validate", "report"}
    assert 0.04 <= ledger.spent["train"] == ledger.seconds("train")
    assert 0.02 <= ledger.spent["validate"] <= total - 0.06
    assert total - 0.1 < sum(ledger.spent.values()) <= total


def test_ledger_counts_the_phase_that_runs():
    ledger = tg.Ledger(CPU)
    ledger.switch("train")
    time.sleep(0.01)
    first = ledger.seconds("train")
    assert 0.01 <= first < ledger.seconds("train")
    assert ledger.seconds("validate") == 0


def test_reading_the_clock_does_not_wait_for_a_gpu_but_a_new_phase_does(monkeypatch):
    """Work given to the GPU belongs to the phase that gave it. Reading the clock must not slow the steps down."""
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    gpu = torch.device("cuda", 0)
    ledger = tg.Ledger(gpu)
    ledger.switch("train")
    assert waits == [gpu]
    ledger.seconds("train")
    assert waits == [gpu]
    ledger.switch("validate")
    assert waits == [gpu, gpu]


def progress_after(step_seconds: list[float]) -> tg.Progress:
    progress = tg.Progress()
    for seconds in step_seconds:
        progress.finish_step(train_loss=1.0, seconds=progress.seconds + seconds)
    return progress


@pytest.mark.parametrize(
    ("step_seconds", "expected"),
    [
        ([], False),
        ([1.0] * 9, False),  # the tenth step would end with the time limit
        ([1.0] * 10, True),
        ([4.0, 1.0, 1.0], False),
        ([4.0, 1.0, 1.0, 1.0], True),  # the next step may take 4 seconds, too
        ([4.0] + [0.25] * 9, True),
        ([4.0] + [0.25] * 10, False),  # but a step from long ago is forgotten
    ],
)
def test_run_is_out_of_time_if_a_step_like_the_slowest_of_the_last_ten_would_end_too_late(step_seconds, expected):
    progress = progress_after(step_seconds)
    assert progress.out_of_time(dataclasses.replace(STEPS, max_wallclock_seconds=10.0)) is expected
    assert not progress.out_of_time(STEPS)  # no time limit


# -- steps in this process -------------------------------------------------------------------------------------------


class Setup(NamedTuple):
    learner: tg.Learner
    loader: tg.Loader
    run: tg.Run
    lines: list[str]  # of the log


@pytest.fixture(scope="module")
def make_setup(data, config, hp, record_config, record_hp) -> Callable[..., Setup]:
    """A function that makes what a step of the recipe, baseline or record, needs, on the tiny data."""

    def make(recipe: str = "baseline", model_changes: dict[str, Any] | None = None, **changes: Any) -> Setup:
        base_config, base_hp = (record_config, record_hp) if recipe == "record" else (config, hp)
        changes = {"train_batch_tokens": 256, "train_seq_len": 32, "data_path": str(data.folder), **changes}
        run_hp = dataclasses.replace(base_hp, **changes)
        run_config = dataclasses.replace(
            base_config, vocab_size=320, logit_softcap=30.0, compute_dtype="float32", **(model_changes or {})
        )
        model = tg.GPT(run_config)
        tg.init_weights(model, run_hp)
        learner = tg.Learner(model, model.loss, tg.build_optimizers(model, run_hp, tg.World()))
        stream = tg.TokenStream(run_hp.data_path, "fineweb_train_[0-9]*.bin")
        loader = tg.Loader(stream, run_hp, 320, tg.World())
        lines: list[str] = []
        run = tg.Run(run_config, run_hp, tg.World(), tg.Ledger(CPU), lines.append)
        if run_hp.ema_decay:
            run.progress.average = [p.detach().clone() for p in model.parameters()]
        return Setup(learner, loader, run, lines)

    return make


class Observer(torch.optim.Optimizer):
    """An optimizer that changes nothing. In every step it calls `look` with its learning rate and momentum."""

    def __init__(self, look: Callable[[float, float], None]) -> None:
        super().__init__([nn.Parameter(torch.zeros(()))], {"lr": 1.0, "base_lr": 1.0, "momentum": 0.0})
        self.look = look

    def step(self, closure: None = None) -> None:
        [group] = self.param_groups
        self.look(group["lr"], group["momentum"])


def copy_of(model: tg.GPT) -> dict[str, Tensor]:
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def is_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@dataclasses.dataclass
class TrainedByClock:
    """What train did, step by step and validation by validation."""

    now: float = 0.0
    scales: list[float] = dataclasses.field(default_factory=list)
    momenta: list[float] = dataclasses.field(default_factory=list)
    looped_steps: list[bool] = dataclasses.field(default_factory=list)
    looped_validations: list[bool] = dataclasses.field(default_factory=list)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)


@pytest.fixture
def train_by_clock(monkeypatch) -> Callable[..., TrainedByClock]:
    """A function that trains without learning, while a clock goes on by fixed seconds per step and validation."""

    def train(setup: Setup, step_seconds: float = 1.0, validation_seconds: float = 0.0) -> TrainedByClock:
        seen = TrainedByClock()
        weight = torch.ones((), requires_grad=True)

        def loss_fn(ids: Tensor, targets: Tensor, looping: bool) -> Tensor:
            seen.looped_steps.append(looping)
            return 1.0 * weight

        def look(lr: float, momentum: float) -> None:
            seen.scales.append(lr)
            seen.momenta.append(momentum)
            seen.now += step_seconds

        def validate(looping: bool) -> tg.Score:
            seen.looped_validations.append(looping)
            seen.now += validation_seconds
            return tg.Score(1.0, 1, 1)

        monkeypatch.setattr(tg.time, "perf_counter", lambda: seen.now)
        learner = setup.learner._replace(loss_fn=loss_fn, optimizers=[Observer(look)])
        run = dataclasses.replace(setup.run, ledger=tg.Ledger(CPU))
        seen.results = tg.train(learner, setup.loader, validate, run, tg.CheckpointWriter(learner, {}, run))
        seen.results["seconds_validate"] = run.ledger.spent["validate"]
        return seen

    return train


def test_train_obeys_clock_and_schedule(make_setup, train_by_clock):
    """With 1 second per step and 100 per validation: no step that would end after the limit is begun, validation is
    free, and every step gets the rate and momentum of its time."""
    setup = make_setup(iterations=1000, max_wallclock_seconds=10.5, warmdown_iters=4, val_loss_every=3)
    seen = train_by_clock(setup, validation_seconds=100.0)
    assert (seen.results["steps"], seen.results["train_seconds"]) == (10, 10.0)
    assert seen.results["seconds_validate"] == 500.0  # steps 0, 3, 6, 9 and the last
    assert seen.scales == pytest.approx([1.0] * 7 + [3.5 / 4, 2.5 / 4, 1.5 / 4])
    assert seen.momenta == pytest.approx([0.85 + 0.1 * i / 500 for i in range(10)])
    assert "stopping_early" in setup.lines[-1]


@pytest.mark.parametrize(
    ("changes", "off", "on"),
    [
        ({"iterations": 10, "enable_looping_at": 0.35}, 4, 6),
        ({"iterations": 10, "enable_looping_at": 0.4}, 4, 6),
        ({"iterations": 1000, "enable_looping_at": 0.5, "max_wallclock_seconds": 10.5}, 6, 4),
        ({"iterations": 8, "enable_looping_at": 0.5, "max_wallclock_seconds": 100.0}, 4, 4),
        ({"iterations": 5, "enable_looping_at": 0.0}, 0, 5),
        ({"iterations": 5, "enable_looping_at": 1.0}, 5, 0),
        ({"iterations": 0, "enable_looping_at": 0.35}, 0, 0),
    ],
    ids=str,
)
def test_layers_are_looped_after_their_part_of_the_run_and_in_the_stored_model(
    make_setup, train_by_clock, changes, off, on
):
    """By steps or by the clock. The model that is stored always loops: so the last validation must, too."""
    setup = make_setup("record", val_loss_every=1, ema_decay=0.0, **changes)
    seen = train_by_clock(setup)
    assert seen.looped_steps == [False] * off + [True] * on
    assert seen.looped_validations == [*seen.looped_steps, True]
    lines = [line for line in setup.lines if line.startswith("layer_loop:")]
    assert len(lines) == (off > 0)
    assert all(line.startswith(f"layer_loop:enabled step:{off}/") for line in lines)


def test_run_that_is_stopped_early_loops_its_stored_model(make_setup, train_by_clock):
    """One step of six seconds in a limit of ten: a second one would not end in time."""
    changes = {"iterations": 1000, "enable_looping_at": 0.9, "max_wallclock_seconds": 10.0, "val_loss_every": 0}
    seen = train_by_clock(make_setup("record", **changes), step_seconds=6.0)
    assert (seen.looped_steps, seen.looped_validations) == ([False], [True])


def test_model_without_loops_logs_none(make_setup, train_by_clock):
    setup = make_setup("record", {"num_loops": 0}, iterations=4)
    train_by_clock(setup)
    assert not any(line.startswith("layer_loop:") for line in setup.lines)


def average_of(history: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """In float64, by the definition: weights of step s of n count as decay ** (n - s)."""
    n = len(history)
    counts = [decay ** (n - s) for s in range(1, n + 1)]
    average = {}
    for name in history[0]:
        total = sum(count * weights[name] for count, weights in zip(counts, history, strict=True))
        average[name] = total / sum(counts)
    return average


def test_stored_model_is_the_average_of_the_weights(monkeypatch, make_setup, data, tmp_path):
    """And as such it is scored at the end: recomputed from the weights after every step of a real run."""
    setup = make_setup("record", iterations=6, ema_decay=0.7, val_loss_every=0, codec="int8_zlib")
    history: list[dict[str, Tensor]] = []
    build_optimizers = tg.build_optimizers

    def build_with_observer(model: tg.GPT, hp: tg.Hyperparameters, world: tg.World) -> list[torch.optim.Optimizer]:
        observer = Observer(lambda lr, momentum: history.append(copy_of(model)))
        return [*build_optimizers(model, hp, world), observer]

    monkeypatch.setattr(tg, "build_optimizers", build_with_observer)
    identity = {"partial": False, "val_shards_sha256": "unknown"}
    split = tg.ValSplit(data.val[:200], data.val_bytes[:200], identity)
    run = dataclasses.replace(setup.run, hp=dataclasses.replace(setup.run.hp, out_dir=str(tmp_path), run_id="r"))
    (tmp_path / "r").mkdir()
    results = tg.train_and_store(run, tg.Data(setup.loader, split))
    assert len(history) == 6

    stored = tg.load_artifact(results["artifact_path"])
    average = average_of(history, 0.7)
    for name, p in copy_of(stored).items():
        step_of_int8 = average[name].abs().amax(-1, keepdim=True) / 127
        tolerance = 0.51 * step_of_int8 if name.endswith(".weight") else 0.0
        assert bool(((p - average[name]).abs() <= tolerance + 2e-5).all()), name
    last = history[-1]
    assert max(float((last[name] - average[name]).abs().max()) for name in last) > 0.01
    score = tg.evaluate(stored, split, setup.run.config, setup.run.hp.val_batch_size, tg.World())
    assert results["pre_quant_val_loss"] == pytest.approx(score.val_loss, abs=5e-3)


def test_run_without_an_average_ends_with_the_last_weights_and_trains_the_same(make_setup):
    """An average only looks."""
    histories = []
    for decay in (0.0, 0.9):
        setup = make_setup("record", iterations=3, ema_decay=decay, val_loss_every=0)
        model = setup.learner.model
        history: list[dict[str, Tensor]] = []
        observer = Observer(lambda lr, momentum, h=history, m=model: h.append(copy_of(m)))
        learner = setup.learner._replace(optimizers=[*setup.learner.optimizers, observer])
        writer = tg.CheckpointWriter(learner, {}, setup.run)
        tg.train(learner, setup.loader, lambda looping: tg.Score(1.0, 1, 1), setup.run, writer)
        histories.append(history)
        assert is_equal(copy_of(model), history[-1]) is (decay == 0.0)
    for plain, averaged in zip(*histories, strict=True):
        assert is_equal(plain, averaged)


def train_step(setup: Setup, step: int, scale: float = 1.0) -> float:
    return float(tg.train_step(setup.learner, setup.loader.batch(step), scale, 0.95, setup.run).train_loss)


def losses(setup: Setup, n_steps: int) -> list[float]:
    return [train_step(setup, step) for step in range(n_steps)]


@pytest.mark.parametrize(
    ("recipe", "model_changes"), [("baseline", {}), ("baseline", {"num_layers": 1}), ("record", {})], ids=str
)
def test_loss_falls(make_setup, recipe, model_changes):
    found = losses(make_setup(recipe, model_changes), 20)
    assert found[0] == pytest.approx(math.log(320), abs=0.2)
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("recipe", ["baseline", "record"])
def test_losses_do_not_depend_on_the_micro_batch(make_setup, recipe):
    """Memory decides the micro-batch; it must not decide the result. 96 and 160 cut 8 sequences unevenly."""
    whole = losses(make_setup(recipe), 4)
    for micro in (32, 96, 160):
        parts = losses(make_setup(recipe, micro_batch_tokens=micro), 4)
        assert parts == pytest.approx(whole, abs=2e-3)
        assert parts[0] == pytest.approx(whole[0], abs=1e-5)


def with_sgd(setup: Setup) -> Setup:
    """With the optimizer that shows the gradient: a step subtracts it from the weights."""
    groups = [{"params": list(setup.learner.model.parameters()), "base_lr": 1.0}]
    return setup._replace(learner=setup.learner._replace(optimizers=[torch.optim.SGD(groups, lr=1.0)]))


def test_gradient_is_that_of_the_mean_over_the_step(make_setup):
    """Whatever the micro-batches."""
    setup = with_sgd(make_setup(micro_batch_tokens=96))
    before = copy.deepcopy(setup.learner.model)
    ids, targets = (torch.cat(parts) for parts in zip(*setup.loader.batch(0), strict=True))
    before.loss(ids, targets).backward()
    train_step(setup, 0)
    for p, old in zip(setup.learner.model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(old.detach() - p.detach(), old.grad, atol=1e-5, rtol=1e-4)


def test_gradient_clipping_bounds_the_length_of_the_gradient(make_setup):
    setup = with_sgd(make_setup(grad_clip_norm=0.01))
    before = nn.utils.parameters_to_vector(setup.learner.model.parameters()).detach().clone()
    train_step(setup, 0)
    after = nn.utils.parameters_to_vector(setup.learner.model.parameters()).detach()
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-2)


def test_learning_rate_of_zero_changes_nothing(make_setup):
    setup = make_setup()
    before = copy_of(setup.learner.model)
    train_step(setup, 0, scale=0.0)
    assert is_equal(copy_of(setup.learner.model), before)


@pytest.mark.parametrize("recipe", ["baseline", "record"])
def test_steps_to_compile_on_leave_no_trace(make_setup, recipe):
    """Otherwise machines that compile would train another model than those that do not."""
    plain = make_setup(recipe)
    primed = make_setup(recipe)
    tg.prime(primed.learner, primed.loader, primed.run)
    assert losses(primed, 4) == losses(plain, 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"micro_batch_tokens": 64}, 2),  # as the user says
        ({"train_seq_len": 16, "train_batch_tokens": 8 * 16}, 8),  # all of the step
        ({"train_seq_len": 4096, "train_batch_tokens": 8 * 4096}, 1),  # more than is asked for
    ],
)
def test_micro_batch_on_a_cpu(make_setup, changes, expected):
    setup = make_setup(**changes)
    tg.fit_micro_batch(setup.learner, setup.loader, setup.run)
    assert setup.loader.micro_sequences == expected


def with_memory_for(setup: Setup, n_sequences: int) -> Setup:
    """On a GPU that runs out of memory with more sequences than these."""

    def loss_fn(ids: Tensor, targets: Tensor, looping: bool) -> Tensor:
        if len(ids) > n_sequences:
            raise torch.OutOfMemoryError
        return torch.ones((), requires_grad=True)

    run = dataclasses.replace(setup.run, world=tg.World(device=torch.device("cuda")))
    return setup._replace(learner=setup.learner._replace(loss_fn=loss_fn), run=run)


def test_micro_batch_on_a_gpu_is_halved_until_it_fits_into_the_memory(make_setup):
    setup = with_memory_for(make_setup(), n_sequences=3)
    tg.fit_micro_batch(setup.learner, setup.loader, setup.run)
    assert setup.loader.micro_sequences == 2


def test_sequence_that_does_not_fit_into_a_gpu_is_an_error_that_says_what_to_lower(make_setup):
    setup = with_memory_for(make_setup(), n_sequences=0)
    with pytest.raises(ValueError, match="TRAIN_SEQ_LEN=32 does not fit"):
        tg.fit_micro_batch(setup.learner, setup.loader, setup.run)


# Fields that enter the arithmetic of a step stand together, from the first to the last of these.
FIELD_NAMES = [field.name for field in dataclasses.fields(tg.Hyperparameters)]
OF_STEPS = slice(FIELD_NAMES.index("tied_embed_init_std"), FIELD_NAMES.index("grad_clip_norm") + 1)
EXTREMES = []
for field in dataclasses.fields(tg.Hyperparameters)[OF_STEPS]:
    if type(field.default) is not bool:
        EXTREMES += [(field.name, limit) for limit in (field.metadata.get("low", 0), field.metadata.get("high", 1e15))]


@pytest.mark.parametrize(("name", "value"), EXTREMES)
def test_every_setting_that_is_accepted_trains(make_setup, name, value):
    """The limits of a field keep out what divides by zero, overflows or never ends."""
    kind = type(getattr(tg.Hyperparameters, name))
    setup = make_setup("record", **{"train_batch_tokens": 64, name: kind(value)})
    assert all(math.isfinite(loss) for loss in losses(setup, 3))


# -- runs of the script ----------------------------------------------------------------------------------------------


def strict_json(path: Path) -> dict[str, Any]:
    """NaN is no JSON, and other programs than Python refuse it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path.name} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def open_log(folder: Path) -> tg.RunLog:
    return tg.RunLog(folder, tg.World(), tg.Screen())


def scores(run) -> tuple[float, float]:
    """val_loss and val_bpb of the last line."""
    loss, bpb = re.findall(r"val_(?:loss|bpb):(\S+)", run.last_line)
    return float(loss), float(bpb)


def test_every_line_with_the_accounting_says_whether_the_tokenizer_is_lossless(trained):
    lines = [line for line in trained.out.splitlines() if "val_accounting:" in line]
    assert len(lines) == 4
    assert all("val_accounting:sidecar" in line and "lossless:1" in line for line in lines)


def test_run_ends_with_the_score_of_its_artifact(trained):
    """The last line is the result, in the grammar that the community's parsers read."""
    pattern = r"final_int8_zlib_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}"
    method = " eval_method:flat eval_seq_len:32 eval_stride:32 val_accounting:sidecar lossless:1"
    assert re.fullmatch(pattern + method, trained.last_line)
    assert trained.log == trained.out
    assert trained.err == ""
    files = sorted(str(path.relative_to(trained.folder)) for path in trained.folder.rglob("*"))
    names = ["", "/latest", "/run", "/run/final_model.int8.ptz", "/run/log.txt", "/run/run.json"]
    assert files == [f"runs{name}" for name in names]
    assert (trained.folder / "runs" / "latest").samefile(trained.run_folder)


def test_run_learns(trained):
    assert len(trained.losses) == 30
    assert trained.losses[0] == pytest.approx(math.log(320), abs=0.2)
    assert trained.losses[-1] < 0.8 * trained.losses[0]
    assert trained.results["val_loss"] < 0.8 * math.log(320)


def test_record_run_learns_and_loops_after_a_third(trained_record):
    assert len(trained_record.losses) == 30
    assert trained_record.losses[-1] < 0.8 * trained_record.losses[0]
    assert trained_record.results["val_loss"] < 0.9 * math.log(320)
    enabled = re.findall(r"^layer_loop:enabled (.*)$", trained_record.out, re.MULTILINE)
    assert enabled == ["step:11/30 order:[0,1,2,1,2,1,2,3,4]"]


def windows_of(text_starts: list[int], stop: int) -> list[tuple[int, int]]:
    """Texts that end where the next begins, cut into windows of 32 inputs."""
    windows = []
    for start, end in itertools.pairwise([*text_starts, stop]):
        for window_start in range(start, end, 32):
            windows.append((window_start, min(window_start + 32, end)))
    return windows


def score_by_windows(run, data, windows: list[tuple[int, int]]) -> tuple[float, float]:
    """val_loss and val_bpb recomputed from the artifact, window by window, without the code that scored it."""
    model = tg.load_artifact(run.artifact)
    ids = torch.from_numpy(data.val.astype("int64"))
    nats = 0.0
    with torch.no_grad():
        for start, end in windows:
            targets = ids[start + 1 : end + 1]
            log_p = torch.log_softmax(model(ids[None, start:end])[0].double(), -1)
            nats -= float(log_p.gather(1, targets[:, None]).sum())
    n_bytes = sum(len(text.encode()) for text in data.val_documents)
    return nats / (len(ids) - 1), nats / math.log(2) / n_bytes


def test_score_of_the_run_is_that_of_the_model_it_saved(trained, data):
    """The number is right: the split is one text."""
    windows = windows_of([0], len(data.val) - 1)
    assert scores(trained) == pytest.approx(score_by_windows(trained, data, windows), abs=1e-6)
    assert trained.results["val_bpb"] == pytest.approx(scores(trained)[1], abs=1e-8)


def test_score_of_a_record_is_that_of_its_documents_one_by_one(trained_record, data):
    """The same for all techniques and the evaluation by documents, each of them a text of its own."""
    windows = windows_of(np.flatnonzero(data.val == 1).tolist(), len(data.val) - 1)
    assert scores(trained_record) == pytest.approx(score_by_windows(trained_record, data, windows), abs=2e-6)
    assert " eval_method:document eval_seq_len:32 eval_stride:32 " in trained_record.last_line


def test_run_json_holds_settings_identities_seconds_and_bytes(trained, data):
    results = strict_json(trained.run_folder / "run.json")
    for cls in (tg.GPTConfig, tg.Hyperparameters):
        assert {field.name for field in dataclasses.fields(cls)} <= results.keys()
    assert (results["num_layers"], results["model_dim"], results["matrix_lr"]) == (3, 32, 0.04)
    assert (results["eval_seq_len"], results["steps"], results["world_size"]) == (32, 30, 1)
    assert results["val_tokens"] == len(data.val)
    assert results["val_accounting"] == "sidecar"
    assert results["tokenizer_lossless"] is True
    for key in ("code_sha256", "tokenizer_sha256", "val_shards_sha256"):
        assert re.fullmatch("[0-9a-f]{64}", results[key])
    for key in ("seconds_train", "seconds_evaluate", "seconds_quantize", "train_seconds", "torch", "python", "device"):
        assert key in results
    assert results["bytes_code"] == Path(tg.__file__).stat().st_size
    assert results["bytes_artifact"] == trained.artifact.stat().st_size
    assert results["bytes_total"] == results["bytes_code"] + results["bytes_artifact"]
    assert results["partial"] is False


def test_run_json_is_flat_but_for_the_changed_settings(trained, tiny_settings):
    """Their values are numbers, not texts; what equals the preset's value is not among them."""
    results = trained.results
    changed = results.pop("settings_changed")
    assert all(isinstance(value, str | int | float | bool) for value in results.values())
    assert changed["MODEL_DIM"] == 32
    assert changed.keys() <= tiny_settings.keys() - {"PRESET", "PATH"}
    assert all(results[name.lower()] == value for name, value in changed.items())


@pytest.mark.parametrize("recipe", ["baseline", "record"])
def test_artifact_is_scored_again_to_the_last_digit(trained, trained_record, run_script, recipe):
    """The artifact alone suffices: no setting of the model or codec is given, and nothing but the log is written."""
    first = trained_record if recipe == "record" else trained
    unset = {field.name.upper(): None for field in dataclasses.fields(tg.GPTConfig)}
    settings = {**unset, "TRAIN_SEQ_LEN": "1024", "TRAIN_BATCH_TOKENS": "1024"}
    again = run_script(**settings, EVAL_ARTIFACT=str(first.artifact))
    assert again.status == 0, again.err
    assert again.last_line == first.last_line
    assert again.artifacts == []
    for key in ("val_bpb", "num_layers", "codec"):
        assert again.results[key] == first.results[key]


def test_only_the_way_to_score_an_artifact_may_change():
    """What else its config says is what its weights mean."""
    stored = tg.GPTConfig(eval_seq_len=32, compute_dtype="float32")
    env = {"EVAL_STRIDE": "8", "EVAL_METHOD": "flat", "EVAL_SEQ_LEN": "64", "COMPUTE_DTYPE": "bfloat16"}
    adopted = tg.adopt_config(tg.from_env(tg.GPTConfig, env), stored, env)
    asked = {"eval_stride": 8, "eval_method": "flat", "eval_seq_len": 64, "compute_dtype": "bfloat16"}
    assert adopted == dataclasses.replace(stored, **asked)

    # Set, but to what leaves it open.
    env = {"EVAL_SEQ_LEN": "0", "COMPUTE_DTYPE": "auto"}
    assert tg.adopt_config(tg.from_env(tg.GPTConfig, env), stored, env) == stored

    env = {"ROPE_DIMS": "8"}
    with pytest.raises(ValueError, match="ROPE_DIMS=8 contradicts the artifact's 16: unset it"):
        tg.adopt_config(tg.from_env(tg.GPTConfig, env), stored, env)


def test_artifact_scored_otherwise_gets_that_score_and_a_warning(trained, run_script, data):
    """A sliding window of a trained model, as the same loop in plain torch scores it."""
    unset = {field.name.upper(): None for field in dataclasses.fields(tg.GPTConfig)}
    settings = {**unset, "DATA_PATH": None, "TOKENIZER_PATH": None, "EVAL_STRIDE": "8"}
    again = run_script(**settings, EVAL_ARTIFACT=str(trained.run_folder))
    assert again.status == 0, again.err
    assert re.search("^warning: this is not how .*: EVAL_STRIDE=8 instead of 0$", again.out, re.MULTILINE)

    model = tg.load_artifact(trained.artifact)
    ids = torch.from_numpy(data.val.astype("int64"))
    nats = 0.0
    with torch.no_grad():
        # The first window scores all its 32 targets, each later one the 8 that follow.
        first = 1
        while first < len(ids):
            n_targets = 32 if first == 1 else 8
            stop = min(first + n_targets, len(ids))
            start = max(0, first + n_targets - 1 - 32)
            log_p = torch.log_softmax(model(ids[None, start : stop - 1])[0].double(), -1)
            nats -= float(log_p.gather(1, ids[start + 1 : stop, None])[first - stop :].sum())
            first = stop
    assert scores(again)[0] == pytest.approx(nats / (len(ids) - 1), abs=1e-6)


def test_folder_without_one_artifact_cannot_be_scored(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder without final_model"):
        tg.find_artifact(str(tmp_path))
    for name in ("final_model.int8.ptz", "final_model.float32.ptz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="name one of them"):
        tg.find_artifact(str(tmp_path))


@pytest.mark.slow
def test_same_seed_gives_the_same_artifact_to_the_bit(trained_record, run_script, record_settings):
    """In a process with another seed of Python's hashes."""
    again = run_script(tg.__file__, **record_settings)
    assert again.artifact.read_bytes() == trained_record.artifact.read_bytes()
    assert again.losses == trained_record.losses


def test_clock_stops_training_within_the_limit(run_script, data):
    """Also with validation in between, whose time does not count."""
    run = run_script(MAX_WALLCLOCK_SECONDS="1", ITERATIONS="1000000", VAL_LOSS_EVERY="100", TRAIN_LOG_EVERY="100")
    assert run.status == 0, run.err
    assert 0.5 < run.results["train_seconds"] <= 1.5
    assert 2 < run.results["steps"] < 1_000_000
    assert f"stopping_early: wallclock_cap train_time:{1000 * run.results['train_seconds']:.0f}ms" in run.out
    sequences_per_epoch = (len(data.train) - 1) // 32
    n_epochs = run.results["steps"] * 8 // sequences_per_epoch
    assert len(re.findall(r"^epoch:", run.out, re.MULTILINE)) == n_epochs


# Each step multiplies the weights by -10,000.
DIVERGE = {"MATRIX_LR": "1000", "MUON_WD": "10", "WARMDOWN_ITERS": "0"}


def test_loss_that_is_not_finite_stops_the_run(run_script):
    """Ten minutes on eight GPUs must not end in a file of NaN."""
    run = run_script(**DIVERGE)
    assert run.status == 1
    [line] = run.err.splitlines()
    assert re.match(r"error: train_loss is (nan|inf) at step \d+ .*MATRIX_LR=1", line)
    assert run.log == run.out + run.err
    assert [path.name for path in run.run_folder.iterdir()] == ["log.txt"]
    assert not (run.folder / "runs" / "latest").exists()


def test_score_that_is_not_finite_stops_the_run(run_script):
    """The last update can break the weights without a training loss that shows it."""
    run = run_script(**DIVERGE, ITERATIONS="5")
    assert run.status == 1
    assert re.fullmatch("error: val_loss is not finite.*\n", run.err)
    assert run.artifacts == []


@pytest.mark.parametrize("codec", ["int8_zlib", "trellis_ans"])
def test_run_over_the_limit_saves_everything_and_exits_with_status_3(run_script, codec):
    """The training is paid for: the file stays, the status tells scripts that it does not count."""
    run = run_script(MAX_TOTAL_BYTES="1000", ITERATIONS="1", CODEC=codec)
    assert run.status == 3
    assert run.artifact.exists()
    assert f"bytes_total:{run.results['bytes_total']} exceeds MAX_TOTAL_BYTES=1000" in run.out
    assert run.last_line.startswith(f"final_{codec}_roundtrip_exact ")


def test_every_line_with_a_partial_score_says_so(run_script):
    """Lines are copied one by one."""
    run = run_script(VAL_MAX_TOKENS="100", VAL_LOSS_EVERY="1", ITERATIONS="2")
    assert run.status == 0, run.err
    lines = [line for line in run.out.splitlines() if " val_loss:" in line]
    assert len(lines) == 5
    assert all(" partial:99_targets" in line for line in lines)
    assert run.results["partial"] is True


def test_run_without_steps_scores_the_untrained_model(run_script):
    """The cheapest check of data and evaluation."""
    run = run_script(ITERATIONS="0")
    assert run.status == 0, run.err
    assert scores(run)[0] == pytest.approx(math.log(320), abs=0.1)
    strict_json(run.run_folder / "run.json")


@pytest.mark.parametrize("codec", ["int8_zlib", "trellis_ans"])
def test_model_of_one_layer_is_trained_saved_and_scored(run_script, codec):
    """It has no skip connection, and so a parameter without elements and without a gradient."""
    run = run_script(NUM_LAYERS="1", ITERATIONS="2", CODEC=codec)
    assert run.status == 0, run.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"NUM_LAYER": "12"}, "NUM_LAYER='12' .*NUM_LAYERS"),
        ({"BETA1": "1.5"}, "BETA1=1.5 must be from 0 to"),
        ({"TOKENIZER_PATH": "nowhere"}, "TOKENIZER_PATH='nowhere' .*build_shards.py"),
        ({"EVAL_ARTIFACT": "nowhere"}, "'nowhere' does not exist"),
        ({"RANK": "1"}, "RANK='1' .*unset RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set.*unset WORLD_SIZE"),
        ({"SEQ_LEN": "512"}, "SEQ_LEN='512' .*say TRAIN_SEQ_LEN"),
    ],
    ids=str,
)
def test_mistake_in_the_settings_ends_with_one_line_and_leaves_nothing(run_script, settings, message):
    run = run_script(**settings)
    assert (run.status, run.out) == (1, "")
    assert re.fullmatch(f"error: .*{message}.*\n", run.err)
    assert list(run.folder.iterdir()) == []


def test_run_without_its_data_leaves_nothing(run_script):
    run = run_script(DATA_PATH="nowhere")
    assert (run.status, run.out) == (1, "")
    assert re.fullmatch("error: DATA_PATH='nowhere' .*build_shards.py.*download.py.*\n", run.err)
    assert list(run.folder.iterdir()) == []


def test_help_lists_every_setting_and_does_nothing_else(run_script):
    run = run_script(tg.__file__, "--help")
    assert (run.status, run.err) == (0, "")
    assert list(run.folder.iterdir()) == []
    shown = dict(re.findall(r"^  --(\w+)=(\S*)", run.out, re.M))
    for field in (*dataclasses.fields(tg.GPTConfig), *dataclasses.fields(tg.Hyperparameters)):
        default = int(field.default) if isinstance(field.default, bool) else field.default
        assert shown.pop(field.name) == str(default)
        assert field.metadata["help"] in run.out
    assert shown == {}
    assert all(re.search(rf"^  {name} ", run.out, re.M) for name in tg.PRESETS)
    assert max(map(len, run.out.splitlines())) <= 120


def test_arguments_are_settings_and_win_over_the_environment(run_script):
    run = run_script(tg.__file__, "--iterations=2", "--matrix-lr", "0.01", "--RUN_ID=run", ITERATIONS="3", SEED="7")
    assert run.status == 0, run.err
    assert (run.results["steps"], run.results["matrix_lr"], run.results["seed"]) == (2, 0.01, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n_layer=7"], "say NUM_LAYERS"),
        (["--lr=1"], "say MATRIX_LR, SCALAR_LR and TIED_EMBED_LR"),
        (["--muon_momentun_start=1"], "say --muon_momentum_warmup_start="),
        (["--num_layer=7"], "say NUM_LAYERS"),
        (["config/train.py"], "--help lists them all"),
        (["--seed"], "has no value: say --seed=..."),
        (["--iterations=x"], "ITERATIONS='x' must be of type int"),
        (["--dropout=0.1"], "which this one does not have"),
    ],
)
def test_argument_that_is_no_setting_is_refused_and_leaves_nothing(run_script, arguments, message):
    run = run_script(tg.__file__, *arguments)
    assert (run.status, run.out) == (1, "")
    assert message in run.err
    assert run.err.count("\n") == 1
    assert list(run.folder.iterdir()) == []


# -- several runs ------------------------------------------------------------------------------------------------------


def test_run_id_that_has_been_used_is_refused(run_script, tmp_path):
    """Three seeds under one name would leave one log, and nobody would see that two are missing."""
    earlier = tmp_path / "run" / "log.txt"
    earlier.parent.mkdir()
    earlier.write_text("earlier")
    run = run_script(OUT_DIR=str(tmp_path))
    assert (run.status, run.out) == (1, "")
    assert re.fullmatch(rf"error: RUN_ID=run .*{tmp_path}/run: choose another RUN_ID.*\n", run.err)
    assert earlier.read_text() == "earlier"
    assert list(earlier.parent.iterdir()) == [earlier]


@pytest.mark.parametrize("run_id", ["..", "a/b", "latest"])
def test_run_id_names_a_folder_of_its_own(run_id):
    with pytest.raises(ValueError, match="must name a folder in OUT_DIR"):
        tg.Hyperparameters(run_id=run_id)


def test_two_logs_cannot_be_opened_under_one_name(tmp_path):
    log = open_log(tmp_path / "v1.2")
    with pytest.raises(ValueError, match=r"^RUN_ID=v1\.2 "):
        open_log(tmp_path / "v1.2")
    tg.RunLog(tmp_path / "v1.2", tg.World(rank=1, size=2), tg.Screen())("other ranks write nothing")
    log("one")
    log.close()
    assert (tmp_path / "v1.2" / "log.txt").read_text() == "one\n"


def test_latest_leads_to_the_last_run_that_finished(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert tg.point_to_latest(tmp_path / name)
        assert (tmp_path / "latest").resolve() == (tmp_path / name).resolve()
    # Where something else has that name, it stays.
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    assert not tg.point_to_latest(tmp_path / "a")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "b", "latest"]


def test_run_without_a_run_id_is_named_after_time_preset_and_seed(data):
    env = {"DATA_PATH": str(data.folder), "TOKENIZER_PATH": str(data.tokenizer), "VOCAB_SIZE": "320", "SEED": "5"}
    _, hp = tg.resolve_settings(env, CPU)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d_\d{6}_record_seed5", hp.run_id)


def test_tokenizer_and_vocabulary_are_those_of_the_data(text, run_script, tmp_path):
    """DATA_PATH alone is enough. What is set wins, and a preset does not."""
    unset = dict.fromkeys(("TOKENIZER_PATH", "VOCAB_SIZE"))
    tokenizer = (
        text.parent.parent / "tokenizers" / json.loads((text / "manifest.json").read_text())["tokenizer"]["file"]
    )
    run = run_script(**unset, DATA_PATH=str(text), ITERATIONS="1")
    assert run.status == 0, run.err
    assert run.results["tokenizer_path"] == str(tokenizer)
    assert run.results["vocab_size"] == tg.load_artifact(run.artifact).config.vocab_size
    assert run.results["settings_changed"]["VOCAB_SIZE"] == run.results["vocab_size"]

    run = run_script(DATA_PATH=str(text), TOKENIZER_PATH=None, VOCAB_SIZE="77", ITERATIONS="1")
    assert re.match("error: TOKENIZER_PATH=.* pieces, not VOCAB_SIZE=77", run.err)


def test_log_and_json_describe_the_bytes_that_were_scored(trained):
    packed = trained.artifact.read_bytes()
    sha256 = hashlib.sha256(packed).hexdigest()
    assert (trained.results["artifact_sha256"], trained.results["bytes_artifact"]) == (sha256, len(packed))
    assert f"{len(packed)} bytes (artifact_sha256:{sha256})" in trained.log


def test_artifact_that_another_run_replaced_is_not_scored(fork, tiny_settings, trained, tmp_path):
    """The file of another run takes the place of this one's before it is scored."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import shutil, sys
import train_gpt as tg
write_file = tg.write_file

def write_and_lose(path, data):
    write_file(path, data)
    shutil.copyfile({str(trained.artifact)!r}, path)

tg.write_file = write_and_lose
try:
    tg.main()
except ValueError as error:
    sys.exit(str(error))
"""
    )
    folder = tmp_path / "run"
    folder.mkdir()
    run = fork(str(script), folder, {**tiny_settings, "ITERATIONS": "1"})
    assert run.status == 1
    assert "final_model.int8.ptz is not what this run wrote, something else replaced it" in run.err
    assert not (folder / "runs" / "run" / "run.json").exists()


# -- screens that fail, and code that changes --------------------------------------------------------------------------


def test_size_and_hash_are_those_of_the_script_that_started(monkeypatch, tmp_path):
    """People edit the script while it runs."""
    script = tmp_path / "train_gpt.py"
    script.write_bytes(b"before")
    monkeypatch.setattr(tg, "__file__", str(script))
    tg.own_code.cache_clear()
    assert tg.own_code() == b"before"
    script.write_bytes(b"after it started")
    assert tg.own_code() == b"before"
    tg.own_code.cache_clear()


def test_settings_that_only_other_scripts_have_are_named(run_script):
    """Without a word, a run with the defaults would be taken for one with them."""
    names = ["EMBED_BITS", "GATED_ATTENTION", "VALUE_RESIDUAL", "VE_ENABLED"]
    assert tg.unread_variables({**dict.fromkeys(names, "1"), "NUM_LAYERS": "2", "PATH": "/bin", "HOME": "/"}) == names
    run = run_script(ITERATIONS="1", **dict.fromkeys(names, "1"))
    assert f"warning: these variables are not read, this script has no such settings: {', '.join(names)}\n" in run.out


def test_ranks_that_do_not_come_are_missed_aloud(run_script):
    """A launcher's variables that are left over, complete, must not leave a run waiting in silence."""
    launcher = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
    code = """
import os, threading, time, train_gpt as tg
started = threading.Timer
threading.Timer = lambda seconds, *rest: started(seconds / 15, *rest)
threading.Thread(target=tg.start_world, args=(os.environ,), daemon=True).start()
time.sleep(3)
os._exit(0)
"""
    run = run_script("-c", code, **launcher)
    assert "still waiting at MASTER_ADDR=127.0.0.1 MASTER_PORT=29871 for 2 ranks" in run.err


def test_line_that_a_screen_cannot_show_is_shown_with_escapes():
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    tg.show("dätä \udcff \u6771", screen)
    assert screen.buffer.getvalue() == rb"d\xe4t\xe4 \udcff \u6771" + b"\n"
    tg.show("no screen at all", None)


def test_screen_that_is_gone_is_given_up():
    """Also when it is closed, as the interpreter does at its end."""
    for path in ("/dev/full", None):
        reader, writer = os.pipe()
        os.close(reader)
        with open(path or writer, "w", encoding="utf-8") as screen:
            tg.show("one", screen)
            tg.show("two", screen)
        if path:
            os.close(writer)


SCREENS = {
    "closed pipe": "{run} | head -1",
    "closed pipe for errors too": "{run} 2>&1 | head -1",
    "full disk": "{run} > /dev/full",
    "no screen": "{run} >&-",
    "ASCII": "LC_ALL=C PYTHONIOENCODING=ascii {run} > screen",
}


@pytest.mark.slow
@pytest.mark.parametrize("screen", SCREENS)
def test_screen_that_fails_does_not_end_the_run(run_script, tmp_path, data, screen):
    """Its lines are in the log, nothing is said of it, and the status is that of the run."""
    place = tmp_path / "d\u00e4t\u00e4"
    place.symlink_to(data.folder)
    run = f"{shlex.quote(sys.executable)} {shlex.quote(tg.__file__)}"
    command = f"{SCREENS[screen].format(run=run)}; exit ${{PIPESTATUS[0]}}"
    code = f"import subprocess, sys; sys.exit(subprocess.run(['bash', '-c', {command!r}]).returncode)"
    done = run_script("-c", code, DATA_PATH=str(place), ITERATIONS="2")
    assert (done.status, done.err) == (0, "")
    assert "DATA_PATH=" + str(place) in done.log
    assert done.log.splitlines()[-1].startswith("final_int8_zlib_roundtrip_exact")


def test_path_that_is_not_utf8_is_logged(tmp_path):
    log = open_log(tmp_path / "run")
    log("DATA_PATH=\udcff")
    log.close()
    assert (tmp_path / "run" / "log.txt").read_text() == "DATA_PATH=\\udcff\n"


# -- people at a terminal --------------------------------------------------------------------------------------------


def run_on_terminal(folder: Path, env: dict[str, str]) -> tuple[int, str]:
    """Run the script with a pseudo terminal for its output. -> status, and what a person saw"""
    reader, writer = pty.openpty()
    command = [sys.executable, tg.__file__]
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=writer, stderr=writer, stdin=subprocess.DEVNULL)
    os.close(writer)
    seen = b""
    # Linux says with an error that nobody writes to the terminal any more.
    with contextlib.suppress(OSError):
        while piece := os.read(reader, 2**16):
            seen += piece
    os.close(reader)
    return process.wait(60), seen.decode()


def test_person_at_a_terminal_sees_no_log(tiny_settings, record_settings, tmp_path):
    """But a short header, a bar for every long phase, the scores and the files; the log has its lines as ever."""
    env = {name: value for name, value in {**tiny_settings, **record_settings}.items() if value is not None}
    env["VAL_LOSS_EVERY"] = "10"
    status, seen = run_on_terminal(tmp_path, env)
    assert status == 0, seen
    log = (tmp_path / "runs" / "run" / "log.txt").read_text()
    results = strict_json(tmp_path / "runs" / "run" / "run.json")
    assert not {line for line in log.splitlines() if line and line in seen}
    assert log.count("train_loss:") == 30
    for phase in ("training", "calibrating", "quantizing", "scoring"):
        assert re.search(rf"\r{phase} +100 %", seen), phase
    header = seen[: seen.index("\rtraining")].strip().splitlines()
    assert 1 < len(header) <= 8
    assert max(map(len, header)) <= 120
    for key in ("untrained_val_bpb", "pre_quant_val_bpb", "val_bpb"):
        assert f"{results[key]:.4f}" in seen
    for name in ("final_model.trellis.ptz", "log.txt", "run.json"):
        assert f"runs/run/{name}" in seen


def test_limit_and_warnings_are_seen_at_a_terminal(tiny_settings, tmp_path):
    env = {**tiny_settings, "MAX_TOTAL_BYTES": "1000", "ITERATIONS": "1", "GATED_ATTENTION": "1"}
    status, seen = run_on_terminal(tmp_path, env)
    assert status == 3
    assert "OVER THE LIMIT of 1,000" in seen
    assert "warning: these variables are not read" in seen


# -- interrupted -----------------------------------------------------------------------------------------------------


def test_weights_survive_when_their_quantizing_is_interrupted(run_script, record_settings):
    """What was trained is paid for. It can be scored as it is, to the last digit of its own validation."""
    code = """
import os, signal, sys, train_gpt as tg
tg.fit_artifact = lambda *rest: os.kill(os.getpid(), signal.SIGINT)
sys.exit(tg.main())
"""
    run = run_script("-c", code, **{**record_settings, "ITERATIONS": "5"})
    assert run.status == 130
    kept = "runs/run/final_model.float32.ptz"
    assert run.err == f"interrupted: the trained model is {kept}, --eval_artifact={kept} scores it\n"
    assert run.log.endswith(run.err)

    losses = re.findall(r"step:5/5 val_loss:(\S+)", run.out)
    again = run_script(**record_settings, EVAL_ARTIFACT=str(run.artifact))
    assert again.last_line.startswith("final_float32_roundtrip_exact")
    assert [f"{again.results['val_loss']:.4f}"] == losses


def test_interrupted_training_says_that_nothing_was_stored(run_script):
    code = """
import os, signal, sys, train_gpt as tg
tg.train_step = lambda *rest: os.kill(os.getpid(), signal.SIGINT)
sys.exit(tg.main())
"""
    run = run_script("-c", code)
    assert run.status == 130
    assert run.err == "interrupted: the log is runs/run/log.txt, no model was stored\n"


# -- the device ------------------------------------------------------------------------------------------------------


def test_preset_that_is_far_too_large_is_refused_and_another_named(monkeypatch, make_setup):
    """A step of P parameters takes 6 P operations per token: closed form, with the speed of the device given."""
    operations = 6 * 1_000_000 * 256
    setup = make_setup(max_wallclock_seconds=10.0, iterations=1000)

    def steps_fit(n_steps: float) -> None:
        monkeypatch.setattr(tg, "operations_per_second", lambda *rest: n_steps * operations / 10)
        tg.require_fast_device(1_000_000, setup.run)

    with pytest.raises(ValueError, match=r"^at most 4 steps of PRESET=baseline fit .* take PRESET=small"):
        steps_fit(4.5)
    steps_fit(50.5)
    [line] = setup.lines
    assert line.startswith("warning: at most 50 steps")
    steps_fit(101)
    assert len(setup.lines) == 1


def test_few_steps_that_were_asked_for_are_not_too_few(monkeypatch, make_setup):
    monkeypatch.setattr(tg, "operations_per_second", lambda *rest: 1e12)
    tg.require_fast_device(10**9, make_setup(max_wallclock_seconds=10.0, iterations=1).run)
    tg.require_fast_device(10**9, make_setup(max_wallclock_seconds=0.0, iterations=1000).run)


def test_speed_of_the_device_is_that_of_its_matrix_products():
    """Within a factor of ten: other work may go on beside."""
    a = torch.ones(512, 512)
    began = time.perf_counter()
    for _ in range(8):
        a @ a
    measured = 8 * 2 * 512**3 / (time.perf_counter() - began)
    assert measured / 10 < tg.operations_per_second(CPU, torch.float32) < 10 * measured


# -- compilation -----------------------------------------------------------------------------------------------------

BROKEN_COMPILER = """#!/bin/sh
echo "g++ (GCC) 12"
case "$*" in *--version*) exit 0;; esac
echo "main.cpp:1:10: fatal error: omp.h: No such file or directory" >&2
exit 1
"""


@pytest.fixture
def broken_compiler(tmp_path) -> str:
    path = tmp_path / "c++"
    path.write_text(BROKEN_COMPILER)
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_compiling_that_does_not_work_is_left_out_with_a_reason(run_script, broken_compiler, tmp_path):
    where = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": broken_compiler}
    run = run_script(tg.__file__, **where, COMPILE="auto", ITERATIONS="1")
    assert run.status == 0, run.err
    [line] = re.findall("^warning: torch.compile does not work here .*$", run.log, re.MULTILINE)
    assert "fatal error: omp.h" in line
    assert " compiled:0" in run.log


@pytest.mark.slow
def test_compiling_that_is_asked_for_and_does_not_work_is_an_error(run_script, broken_compiler, tmp_path):
    where = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": broken_compiler}
    run = run_script(tg.__file__, **where, COMPILE="1", ITERATIONS="1")
    assert run.status == 1
    assert re.fullmatch("error: COMPILE=1, .*fatal error: omp.h.*set COMPILE=0\n", run.err)


@pytest.mark.slow
def test_temporary_folder_with_a_space_does_not_end_the_run(run_script, tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    run = run_script(tg.__file__, COMPILE="auto", ITERATIONS="1", TMPDIR=str(folder))
    assert run.status == 0, run.err


def test_nothing_is_tried_with_compile_0(monkeypatch, make_setup):
    """It would cost seconds."""

    def fail(device: torch.device) -> str:
        raise AssertionError("it was tried")

    monkeypatch.setattr(tg, "why_not_compile", fail)
    assert not tg.wants_compile(make_setup("record", compile="0").run)


def test_compiler_that_fails_is_told_in_one_line(monkeypatch, make_setup):
    """And COMPILE=0 is named, with which the run would start."""
    monkeypatch.setattr(tg, "has_compiler", lambda device: True)
    monkeypatch.setattr(tg, "why_not_compile", lambda device: "fatal error: omp.h")
    setup = make_setup("record", compile="auto")
    assert not tg.wants_compile(setup.run)
    [line] = setup.lines
    assert re.match(r"warning: torch.compile .*\(fatal error: omp\.h\).*COMPILE=0", line)
    with pytest.raises(ValueError, match=r"^COMPILE=1, .*\(fatal error: omp\.h\).*set COMPILE=0$"):
        tg.wants_compile(make_setup("record", compile="1").run)
