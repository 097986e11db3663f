"""Training: schedule, clock, steps, and whole runs of the script."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
BASELINE = tg.from_env(tg.Hyperparameters, {"PRESET": "baseline"})
STEPS = dataclasses.replace(BASELINE, iterations=100, warmdown_iters=40, max_wallclock_seconds=0.0)
CLOCK = dataclasses.replace(STEPS, max_wallclock_seconds=50.0)


def strict_json(path: Path) -> dict:
    """NaN is no JSON, and other programs than Python refuse it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path.name} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(("step", "scale"), [(0, 1), (59, 1), (60, 1), (70, 0.75), (80, 0.5), (99, 0.025), (100, 0)])
def test_lr_scale_by_steps(step, scale):
    """Without a limit of time the clock plays no part."""
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


@given(st.integers(0, 200), st.floats(0, 100), st.integers(0, 300), st.sampled_from([0.0, 50.0]))
def test_lr_scale_is_a_fraction(step, seconds, warmdown, cap):
    hp = dataclasses.replace(STEPS, warmdown_iters=warmdown, max_wallclock_seconds=cap)
    assert 0 <= tg.lr_scale(step, seconds, hp) <= 1


def test_lr_scale_without_warmdown_is_one():
    for hp in (STEPS, CLOCK):
        assert tg.lr_scale(99, 49.9, dataclasses.replace(hp, warmdown_iters=0, warmdown_frac=0.0)) == 1


def test_a_run_is_done_by_steps_or_by_the_clock_whichever_is_further():
    hp = dataclasses.replace(STEPS, max_wallclock_seconds=50.0)
    for step, seconds, part in (
        (0, 0.0, 0),
        (30, 10.0, 0.3),
        (30, 20.0, 0.4),
        (100, 1.0, 1),
        (5, 50.0, 1),
        (5, 60.0, 1),
    ):
        assert tg.part_done(step, seconds, hp) == pytest.approx(part)
    assert tg.part_done(30, 1e9, STEPS) == pytest.approx(0.3)  # no limit of time
    assert tg.part_done(0, 0.0, dataclasses.replace(hp, iterations=0)) == 0
    assert tg.part_done(7, 10.0, dataclasses.replace(hp, iterations=1_000_000)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("done", "scale"), [(0, 1), (0.6, 1), (0.7, 0.75), (0.8, 0.5), (0.96, 0.1), (0.99, 0.1), (1, 0.1)]
)
def test_lr_scale_falls_over_the_last_part_of_the_run_to_its_floor(done, scale):
    """WARMDOWN_FRAC is a part of the steps or of the time, whichever is further."""
    part = {"warmdown_iters": 0, "warmdown_frac": 0.4, "min_lr": 0.1}
    steps, clock = dataclasses.replace(STEPS, **part), dataclasses.replace(CLOCK, **part)
    assert tg.lr_scale(round(100 * done), 1e9, steps) == pytest.approx(scale)
    assert tg.lr_scale(round(100 * done), 1.0, clock) == pytest.approx(scale)
    assert tg.lr_scale(1, 50 * done, clock) == pytest.approx(scale)
    iters = dataclasses.replace(STEPS, min_lr=0.1)
    assert tg.lr_scale(round(100 * done), 0.0, iters) == pytest.approx(scale)  # 40 of 100 steps


@given(st.integers(0, 100), st.floats(0, 60), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.0, 50.0]))
def test_lr_scale_never_rises_and_stays_above_its_floor(step, seconds, frac, floor, cap):
    changes = {"warmdown_iters": 0, "warmdown_frac": frac, "min_lr": floor, "max_wallclock_seconds": cap}
    hp = dataclasses.replace(STEPS, **changes)
    scale = tg.lr_scale(step, seconds, hp)
    assert floor <= scale <= 1
    assert tg.lr_scale(step + 1, seconds, hp) <= scale
    assert tg.lr_scale(step, seconds + 1.0, hp) <= scale


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


def test_muon_momentum_rises_linearly_and_stays():
    hp = tg.Hyperparameters(muon_momentum_warmup_start=0.8, muon_momentum=0.9, muon_momentum_warmup_steps=10)
    assert [tg.muon_momentum(step, hp) for step in (0, 5, 10, 1000)] == pytest.approx([0.8, 0.85, 0.9, 0.9])
    assert tg.muon_momentum(0, dataclasses.replace(hp, muon_momentum_warmup_steps=0)) in (0.8, 0.9)


def test_ledger_accounts_for_every_second_once():
    """What is not train must not count against the cap, and nothing may be lost between phases."""
    begin = time.perf_counter()
    ledger = tg.Ledger(torch.device("cpu"))
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
    ledger = tg.Ledger(torch.device("cpu"))
    ledger.switch("train")
    time.sleep(0.01)
    first = ledger.seconds("train")
    assert 0.01 <= first < ledger.seconds("train")
    assert ledger.seconds("validate") == 0


def test_only_the_end_of_a_phase_waits_for_the_device(monkeypatch):
    """Reading a clock must not stop a GPU, but a phase has to pay for all the work that it gave to one."""
    waits = []
    monkeypatch.setattr(tg, "synchronize", waits.append)
    ledger = tg.Ledger(torch.device("cpu"))
    ledger.seconds("startup")
    assert waits == []
    ledger.switch("train")
    assert waits == [torch.device("cpu")]


def test_no_step_begins_that_would_end_too_late():
    """By the slowest of the last ten steps; older ones, such as a first one that compiles, are forgotten."""
    progress = tg.Progress(average=[])
    assert not progress.out_of_time(CLOCK)
    progress.finish_step(train_loss=1.0, seconds=30.0)
    assert progress.out_of_time(CLOCK)
    assert not progress.out_of_time(STEPS)
    for i in range(10):
        progress.finish_step(train_loss=1.0, seconds=31.0 + i)
    assert (progress.step, progress.seconds) == (11, 40.0)
    assert not progress.out_of_time(CLOCK)


# ----------------------------------------------- steps in this process -----------------------------------------------


class Setup(NamedTuple):
    """What the functions of section 7 need to train the tiny data."""

    learner: tg.Learner
    loader: tg.Loader
    run: tg.Run
    lines: list[str]  # of the log

    @property
    def model(self) -> tg.GPT:
        return self.learner.model

    @property
    def weights(self) -> torch.Tensor:
        """A copy of all weights, one behind the other."""
        return torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])

    def step(self, step: int, scale: float = 1.0, momentum: float = 0.95, looping: bool = True) -> float:
        """Take a step on its batch. -> the loss"""
        return float(tg.train_step(self.learner, self.loader.batch(step), scale, momentum, self.run, looping))

    def losses(self, n_steps: int) -> list[float]:
        return [self.step(step) for step in range(n_steps)]

    def train(self, validate: Callable[[bool], tg.Score]) -> dict[str, Any]:
        return tg.train(self.learner, self.loader, validate, self.run)


def no_score(looping: bool) -> tg.Score:
    return tg.Score(1.0, 1, 1)


@pytest.fixture(scope="module")
def setup(data, config, hp, record_config, record_hp):
    """A function that makes what a step of the recipe, baseline or record, needs."""

    def make(model_changes: dict[str, Any] | None = None, recipe: str = "baseline", **changes: Any) -> Setup:
        base = record_config if recipe == "record" else config
        run_config = dataclasses.replace(base, vocab_size=320, logit_softcap=30.0, **(model_changes or {}))
        run_hp = record_hp if recipe == "record" else hp
        run_hp = dataclasses.replace(run_hp, **{"train_batch_tokens": 256, "train_seq_len": 32, **changes})

        world = tg.World()
        lines: list[str] = []
        run = tg.Run(run_config, run_hp, world, tg.Ledger(world.device), lines.append)
        model = tg.GPT(run_config)
        tg.init_weights(model, run_hp)
        learner = tg.Learner(model, model.loss, tg.build_optimizers(model, run_hp, world))
        stream = tg.TokenStream(str(data.folder), "fineweb_train_[0-9]*.bin")
        return Setup(learner, tg.Loader(stream, run_hp, 320, world), run, lines)

    return make


class FakeSteps:
    """Stands in for train_step: takes no step, but moves the clock and remembers what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 1.0) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.scales: list[float] = []
        self.momenta: list[float] = []
        self.looped: list[bool] = []
        monkeypatch.setattr(tg.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(tg, "train_step", self.step)

    def step(
        self, learner: tg.Learner, batch: tg.Batch, scale: float, momentum: float, run: tg.Run, looping: bool
    ) -> torch.Tensor:
        self.scales.append(scale)
        self.momenta.append(momentum)
        self.looped.append(looping)
        self.now += self.seconds
        return torch.tensor(1.0)


def test_train_obeys_clock_and_schedule(monkeypatch, setup):
    """With a clock of 1 second per step and 100 per validation: no step that would end after the cap is begun,
    validation is free, and every step gets the rate and momentum of its time."""
    steps = FakeSteps(monkeypatch)
    training = setup(iterations=1000, max_wallclock_seconds=10.5, warmdown_iters=4, val_loss_every=3)

    def validate(looping: bool) -> tg.Score:
        steps.now += 100.0
        return tg.Score(1.0, 1, 1)

    results = training.train(validate)
    assert results["steps"] == len(steps.scales) == 10
    assert results["train_seconds"] == 10.0
    assert training.run.ledger.spent["validate"] == 500.0  # at steps 0, 3, 6, 9 and the last
    assert steps.scales == pytest.approx([1.0] * 7 + [3.5 / 4, 2.5 / 4, 1.5 / 4])
    assert steps.momenta == pytest.approx([0.85 + 0.1 * i / 500 for i in range(10)])
    assert "stopping_early" in training.lines[-1]


def looping_by_step(steps: FakeSteps, training: Setup) -> tuple[list[bool], list[bool], list[str]]:
    """Train. -> whether layers are looped in each step and in each validation, and what the log says of it"""
    validations: list[bool] = []

    def validate(looping: bool) -> tg.Score:
        validations.append(looping)
        return tg.Score(1.0, 1, 1)

    training.train(validate)
    return steps.looped, validations, [line for line in training.lines if line.startswith("layer_loop:")]


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
def test_layers_are_looped_after_their_part_of_the_run_and_in_the_stored_model(monkeypatch, setup, changes, off, on):
    """By steps or by the clock. The model that is stored always loops: so the last validation must, too."""
    training = setup(recipe="record", val_loss_every=1, ema_decay=0.0, **changes)
    steps, validations, lines = looping_by_step(FakeSteps(monkeypatch), training)
    assert steps == [False] * off + [True] * on
    assert validations == [*steps, True]
    assert len(lines) == (off > 0)
    assert all(line.startswith(f"layer_loop:enabled step:{off}/") for line in lines)


def test_run_that_is_stopped_early_loops_its_stored_model(monkeypatch, setup):
    """One step of six seconds in a limit of ten: a second one would not end in time."""
    steps = FakeSteps(monkeypatch, seconds=6.0)
    training = setup(
        recipe="record", iterations=1000, enable_looping_at=0.9, max_wallclock_seconds=10.0, val_loss_every=0
    )
    assert looping_by_step(steps, training)[:2] == ([False], [True])


def test_model_without_loops_has_one_order_of_layers_all_the_time(monkeypatch, setup):
    """A second one would be the same, but a GPU would compile it for a minute in the middle of the run."""
    for recipe, changes in (("baseline", {}), ("record", {"num_loops": 0})):
        training = setup(changes, recipe, iterations=4, val_loss_every=1)
        steps, validations, lines = looping_by_step(FakeSteps(monkeypatch), training)
        assert set(steps) | set(validations) == {True}
        assert lines == []


def average_of(history: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """In float64, by the definition: weights of step s of n count as decay ** (n - s)."""
    counts = [decay ** (len(history) - s) for s in range(1, len(history) + 1)]
    weighted = {name: sum(c * w[name] for c, w in zip(counts, history, strict=True)) for name in history[0]}
    return {name: total / sum(counts) for name, total in weighted.items()}


def test_stored_model_is_the_average_of_the_weights(monkeypatch, setup, data, tmp_path):
    """As it is scored at the end: recomputed from the weights after every step of a real run."""
    training = setup(
        recipe="record",
        model_changes={"compute_dtype": "float32"},
        iterations=6,
        ema_decay=0.7,
        val_loss_every=0,
        codec="int8_zlib",
        data_path=str(data.folder),
    )
    history = []
    train_step = tg.train_step

    def step_and_look(learner: tg.Learner, *args: Any) -> torch.Tensor:
        loss = train_step(learner, *args)
        history.append({name: p.detach().double().clone() for name, p in learner.model.named_parameters()})
        return loss

    monkeypatch.setattr(tg, "train_step", step_and_look)
    split = tg.ValSplit(data.val[:200], data.val_bytes[:200], {"partial": False})
    path = tmp_path / "a.ptz"
    results = tg.train_and_store(training.run, split, path)

    stored = tg.load_artifact(path)
    average = average_of(history, 0.7)
    assert len(history) == 6
    for name, p in stored.named_parameters():
        error = (p.detach().double() - average[name]).abs()
        step = torch.tensor(1e-5)
        if name.endswith(".weight"):
            step = average[name].abs().amax(-1, keepdim=True) / 127
        assert bool((error <= 0.51 * step + 1e-5).all()), name
    changes = [
        float((p.detach() - history[-1][name]).abs().max()) for name, p in stored.named_parameters() if p.numel()
    ]
    assert max(changes) > 0.01  # the last weights are something else
    score = tg.evaluate(stored, split, training.run.config, training.run.hp.val_batch_size, tg.World())
    assert results["pre_quant_val_loss"] == pytest.approx(score.val_loss, abs=5e-3)


def test_run_without_an_average_stores_the_last_weights(setup):
    """And one that averages trains the same weights: the average only looks."""
    final_weights = []
    final_losses = []
    for decay in (0.0, 0.9):
        training = setup(recipe="record", iterations=3, ema_decay=decay, val_loss_every=0)
        final_losses.append(training.train(no_score)["train_loss"])
        final_weights.append(training.weights)

    plain = setup(recipe="record", iterations=3)
    for step in range(3):
        scale = tg.lr_scale(step, 0.0, plain.run.hp)
        momentum = tg.muon_momentum(step, plain.run.hp)
        plain.step(step, scale, momentum, looping=step >= 2)  # of 3 steps, from 35 % on
    assert torch.equal(final_weights[0], plain.weights)
    assert final_losses[0] == final_losses[1]
    assert not torch.equal(final_weights[1], plain.weights)


@pytest.mark.parametrize("changes", [{}, {"model_changes": {"num_layers": 1}}, {"recipe": "record"}], ids=str)
def test_loss_falls(setup, changes):
    losses = setup(**changes).losses(30)
    assert losses[0] == pytest.approx(math.log(320), abs=0.2)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("recipe", ["baseline", "record"])
@pytest.mark.parametrize("micro", [1, 96, 160])
def test_losses_do_not_depend_on_the_micro_batch(setup, micro, recipe):
    """Memory decides the micro-batch; it must not decide the result. 96 and 160 cut 8 sequences unevenly."""
    whole = setup(recipe=recipe).losses(5)
    parts = setup(recipe=recipe, micro_batch_tokens=micro).losses(5)
    assert parts == pytest.approx(whole, abs=2e-3)
    assert parts[0] == pytest.approx(whole[0], abs=1e-5)


def with_sgd(training: Setup) -> Setup:
    """SGD with a rate of 1 stands in for the optimizers: a step then shows the gradient."""
    sgd = torch.optim.SGD([{"params": list(training.model.parameters()), "base_lr": 1.0}], lr=1.0)
    return training._replace(learner=training.learner._replace(optimizers=[sgd]))


def test_gradient_is_that_of_the_mean_over_the_step(setup):
    """Whatever the micro-batches."""
    training = with_sgd(setup(micro_batch_tokens=96))
    before = copy.deepcopy(training.model)
    ids, targets = (torch.cat(parts) for parts in zip(*training.loader.batch(0), strict=True))
    before.loss(ids, targets).backward()
    training.step(0)
    for p, old in zip(training.model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(old.detach() - p.detach(), old.grad, atol=1e-5, rtol=1e-4)


def test_gradient_clipping_bounds_the_length_of_the_gradient(setup):
    training = with_sgd(setup(grad_clip_norm=0.01))
    before = training.weights
    training.step(0)
    assert float((training.weights - before).norm()) == pytest.approx(0.01, rel=1e-2)


def test_learning_rate_of_zero_changes_nothing(setup):
    training = setup()
    before = training.weights
    training.step(0, scale=0.0)
    assert torch.equal(training.weights, before)


@pytest.mark.parametrize("recipe", ["baseline", "record"])
def test_steps_to_compile_on_leave_no_trace(setup, recipe):
    """Otherwise machines that compile would train another model than those that do not."""
    plain = setup(recipe=recipe)
    primed = setup(recipe=recipe)
    tg.prime(primed.learner, primed.loader, 3, primed.run)
    assert primed.losses(4) == plain.losses(4)


@pytest.mark.parametrize(
    ("device", "changes", "num_loops", "expected"),
    [
        ("cuda", {}, 1, [False, True]),  # the graph as a whole, in the order that the run begins with and the other
        ("cuda", {"enable_looping_at": 0.0}, 1, [True]),
        ("cuda", {}, 0, [True]),
        ("cpu", {}, 1, [True]),  # blocks, which know no order
    ],
)
def test_every_order_of_the_layers_is_compiled_before_the_clock_starts(
    monkeypatch, setup, device, changes, num_loops, expected
):
    """Compiling takes a minute on a GPU: of ten, were the clock running."""
    steps = FakeSteps(monkeypatch)
    training = setup({"num_loops": num_loops}, recipe="record", **changes)
    run = dataclasses.replace(training.run, world=tg.World(device=torch.device(device)))
    tg.prime(training.learner, training.loader, 1, run)
    assert steps.looped == expected


def test_warmdown_iters_replace_the_fraction():
    """The command lines of the published challenge name them, with a preset that has the fraction."""
    both = dataclasses.replace(STEPS, warmdown_frac=0.85)
    for step in range(101):
        assert tg.lr_scale(step, 0.0, both) == tg.lr_scale(step, 0.0, STEPS)


def test_micro_batch_given_by_the_user_is_kept_and_one_found_is_at_least_a_sequence(setup):
    training = setup(micro_batch_tokens=64)
    tg.fit_micro_batch(training.learner, training.loader, training.run)
    assert training.loader.micro_sequences == 2
    for seq_len, expected in ((16, 8), (4096, 1)):  # all of the step, and more than is asked for
        training = setup(train_seq_len=seq_len, train_batch_tokens=8 * seq_len)
        tg.fit_micro_batch(training.learner, training.loader, training.run)
        assert training.loader.micro_sequences == expected


# ------------------------------------------------- runs of the script -------------------------------------------------


def test_run_ends_with_the_score_of_its_artifact(trained):
    """The last line is the result, in the grammar that the community's parsers read."""
    pattern = r"final_int8_zlib_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}"
    method = " eval_method:flat eval_seq_len:32 eval_stride:32"
    assert re.fullmatch(pattern + method, trained.last_line)
    assert trained.artifact.exists()
    assert (trained.folder / "logs" / "run.txt").read_text() == trained.out
    assert trained.err == ""
    assert sorted(p.name for p in trained.folder.iterdir()) == ["final_model.int8.ptz", "logs"]


def test_run_learns(trained):
    assert len(trained.losses) == 30
    assert trained.losses[0] == pytest.approx(math.log(320), abs=0.2)
    assert trained.losses[-1] < 0.8 * trained.losses[0]
    assert trained.results["val_loss"] < 0.8 * math.log(320)


def scores(run) -> tuple[float, float]:
    """val_loss and val_bpb of the last line."""
    loss, bpb = re.findall(r"val_(?:loss|bpb):(\S+)", run.last_line)
    return float(loss), float(bpb)


def test_score_of_the_run_is_that_of_the_model_it_saved(trained, data):
    """The number is right: recomputed from the artifact, window by window, without the code that scored it."""
    model = tg.load_artifact(trained.artifact)
    ids = torch.from_numpy(data.val.astype("int64"))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            targets = ids[start + 1 : start + 33]
            log_p = torch.log_softmax(model(ids[None, start : start + len(targets)])[0].double(), -1)
            nats -= float(log_p.gather(1, targets[:, None]).sum())
    n_bytes = sum(len(text.encode()) for text in data.val_documents)
    loss, bpb = scores(trained)
    assert loss == pytest.approx(nats / (len(ids) - 1), abs=1e-6)
    assert bpb == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-6)
    assert trained.results["val_bpb"] == pytest.approx(bpb, abs=1e-8)


def test_score_of_a_record_is_that_of_its_documents_one_by_one(trained_record, data):
    """The same for all techniques and the evaluation by documents, whose windows of 32 tokens start with each one."""
    model = tg.load_artifact(trained_record.artifact)
    ids = torch.from_numpy(data.val.astype("int64"))
    nats = 0.0
    begins = [*(data.val == 1).nonzero()[0].tolist(), len(data.val) - 1]
    with torch.no_grad():
        for begin, end in itertools.pairwise(begins):
            for start in range(begin, end, 32):
                targets = ids[start + 1 : min(start + 32, end) + 1]
                log_p = torch.log_softmax(model(ids[None, start : start + len(targets)])[0].double(), -1)
                nats -= float(log_p.gather(1, targets[:, None]).sum())
    n_bytes = sum(len(text.encode()) for text in data.val_documents)
    expected = nats / (len(ids) - 1), nats / math.log(2) / n_bytes
    assert scores(trained_record) == pytest.approx(expected, abs=2e-6)
    assert trained_record.last_line.endswith(" eval_method:document eval_seq_len:32 eval_stride:32")


def test_artifact_of_codes_is_scored_the_same_again(trained_record, run_script, record_settings):
    """The codec comes from the file, whatever CODEC says."""
    again = run_script(**record_settings, CODEC="int8_zlib", EVAL_ARTIFACT=str(trained_record.artifact))
    assert again.status == 0, again.err
    assert again.last_line == trained_record.last_line
    assert again.last_line.startswith("final_trellis_ans_roundtrip_exact ")
    assert again.results["codec"] == "trellis_ans"
    assert trained_record.artifact.name == "final_model.trellis.ptz"


def test_record_run_learns_and_loops_after_a_third(trained_record):
    assert len(trained_record.losses) == 30
    assert trained_record.losses[-1] < 0.8 * trained_record.losses[0]
    assert trained_record.results["val_loss"] < 0.9 * math.log(320)
    enabled = re.findall(r"^layer_loop:enabled (.*)$", trained_record.out, re.MULTILINE)
    assert enabled == ["step:11/30 order:[0,1,2,1,2,1,2,3,4]"]


def test_run_json_is_flat_and_holds_settings_identities_seconds_and_bytes(trained, data):
    results = strict_json(trained.folder / "logs" / "run.json")
    changed = results.pop("settings_changed")
    assert all(isinstance(v, str | int | float | bool) or v is None for v in results.values())
    assert changed["NUM_LAYERS"] == results["num_layers"] == 3
    assert changed["TRAIN_LOG_EVERY"] == results["train_log_every"] == 1
    assert "MUON_MOMENTUM" not in changed  # as the preset has it
    for cls in (tg.GPTConfig, tg.Hyperparameters):
        assert {f.name for f in dataclasses.fields(cls)} <= results.keys()
    assert (results["num_layers"], results["model_dim"], results["matrix_lr"]) == (3, 32, 0.04)
    assert (results["eval_seq_len"], results["steps"], results["world_size"]) == (32, 30, 1)
    assert results["val_tokens"] == len(data.val)
    assert results["val_accounting"] == "sidecar"
    for key in ("code_sha256", "tokenizer_sha256", "val_shards_sha256"):
        assert re.fullmatch("[0-9a-f]{64}", results[key])
    for key in ("seconds_train", "seconds_evaluate", "seconds_quantize", "train_seconds", "torch", "python", "device"):
        assert key in results
    assert results["bytes_code"] == Path(tg.__file__).stat().st_size
    assert results["bytes_artifact"] == trained.artifact.stat().st_size
    assert results["bytes_total"] == results["bytes_code"] + results["bytes_artifact"]
    assert results["partial"] is False


def test_artifact_is_scored_again_to_the_last_digit(trained, run_script):
    """The artifact alone suffices: no setting of the model is given, and nothing but the log is written."""
    unset = {field.name.upper(): None for field in dataclasses.fields(tg.GPTConfig)}
    again = run_script(**unset, TRAIN_SEQ_LEN="1024", TRAIN_BATCH_TOKENS="1024", EVAL_ARTIFACT=str(trained.artifact))
    assert again.status == 0, again.err
    assert again.last_line == trained.last_line
    assert not again.artifact.exists()
    assert again.results["val_bpb"] == trained.results["val_bpb"]
    assert again.results["num_layers"] == 3


def test_setting_that_contradicts_the_artifact_is_refused(trained, run_script):
    """Else the log would name a context that was not used."""
    run = run_script(EVAL_ARTIFACT=str(trained.artifact), EVAL_STRIDE="8")
    assert (run.status, run.out) == (1, "")
    assert re.fullmatch("error: EVAL_STRIDE=8 contradicts the artifact's 0: unset it\n", run.err)


def test_same_seed_gives_the_same_artifact_to_the_bit(trained, trained_record, run_script, record_settings):
    """In a process with another seed of Python's hashes."""
    script = str(ROOT / "train_gpt.py")
    for first, again in ((trained, run_script(script)), (trained_record, run_script(script, **record_settings))):
        assert again.artifact.read_bytes() == first.artifact.read_bytes()
        assert again.losses == first.losses


def test_clock_stops_training_within_the_limit(run_script, data):
    """Also with validation in between, whose time does not count."""
    run = run_script(MAX_WALLCLOCK_SECONDS="2", ITERATIONS="1000000", VAL_LOSS_EVERY="100", TRAIN_LOG_EVERY="100")
    assert run.status == 0, run.err
    assert 1.0 < run.results["train_seconds"] <= 2.5
    assert 10 < run.results["steps"] < 1_000_000
    assert f"stopping_early: wallclock_cap train_time:{1000 * run.results['train_seconds']:.0f}ms" in run.out
    per_epoch = (len(data.train) - 1) // 32
    assert len(re.findall(r"^epoch:", run.out, re.MULTILINE)) == run.results["steps"] * 8 // per_epoch


def test_loss_that_is_not_finite_stops_the_run_without_an_artifact(run_script):
    """Ten minutes on eight GPUs must not end in a file of NaN."""
    run = run_script(MATRIX_LR="1e15", TIED_EMBED_LR="1e15", SCALAR_LR="1e15")
    assert run.status == 1
    assert re.search(r"error: train_loss is (nan|inf) at step \d+ .*MATRIX_LR=1", run.err)
    assert "Traceback" not in run.err
    assert not run.artifact.exists()


def test_score_that_is_not_finite_stops_the_run(run_script):
    """The last update can break the weights without a training loss that shows it."""
    rates = {"MATRIX_LR": "1e6", "SCALAR_LR": "1e6", "TIED_EMBED_LR": "1e6", "WARMDOWN_ITERS": "0"}
    run = run_script(**rates, NUM_LAYERS="6", ITERATIONS="1")
    assert run.status == 1
    assert re.fullmatch("error: val_loss is not finite.*\n", run.err)
    assert not run.artifact.exists()


def test_artifact_of_an_earlier_run_does_not_survive_a_failed_one(run_script, tmp_path):
    """It would pass for the result."""
    old = tmp_path / "final_model.int8.ptz"
    old.write_bytes(b"old")
    assert run_script(MATRIX_LR="1e15", TIED_EMBED_LR="1e15", ARTIFACT_DIR=str(tmp_path)).status == 1
    assert not old.exists()
    assert run_script(VOCAB_SIZE="321", ARTIFACT_DIR=str(tmp_path)).status == 1


def test_place_that_cannot_be_written_is_found_before_training(run_script, tmp_path):
    (tmp_path / "file").write_text("")
    run = run_script(ARTIFACT_DIR=str(tmp_path / "file"))
    assert run.status == 1
    assert "train_loss" not in run.out
    assert re.search(r"^error: .*file", run.err)
    assert "Traceback" not in run.err


@pytest.mark.parametrize("codec", ["int8_zlib", "trellis_ans"])
def test_run_over_the_limit_saves_everything_and_exits_with_status_3(run_script, codec):
    """The training is paid for: the file stays, the status tells scripts that it does not count."""
    run = run_script(MAX_TOTAL_BYTES="1000", ITERATIONS="1", CODEC=codec)
    assert run.status == 3
    assert run.artifact.exists()
    assert f"bytes_total:{run.results['bytes_total']} exceeds MAX_TOTAL_BYTES=1000" in run.out
    assert run.last_line.startswith(f"final_{codec}_roundtrip_exact ")


def test_partial_score_is_called_partial(trained, run_script):
    run = run_script(EVAL_ARTIFACT=str(trained.artifact), VAL_MAX_TOKENS="100")
    assert run.status == 0, run.err
    assert re.search(r"val_bpb:\d\.\d{8} partial:\S+ eval_", run.last_line)
    assert run.results["partial"] is True
    assert "partial:" not in trained.out.replace("partial:0", "")


def test_every_line_with_a_partial_score_says_so(run_script):
    """Lines are copied one by one."""
    run = run_script(VAL_MAX_TOKENS="100", VAL_LOSS_EVERY="1", ITERATIONS="2")
    assert run.status == 0, run.err
    lines = [line for line in run.out.splitlines() if " val_loss:" in line]
    assert len(lines) == 5
    assert all("partial" in line for line in lines)


def test_run_without_steps_scores_the_untrained_model(run_script):
    """The cheapest check of data and evaluation."""
    run = run_script(ITERATIONS="0")
    assert run.status == 0, run.err
    assert scores(run)[0] == pytest.approx(math.log(320), abs=0.1)
    strict_json(run.folder / "logs" / "run.json")


def test_model_of_one_layer_is_trained_saved_and_scored(run_script):
    """It has no skip connection, and so a parameter without elements and without a gradient."""
    run = run_script(NUM_LAYERS="1", ITERATIONS="2")
    assert run.status == 0, run.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"NUM_LAYER": "12"}, "NUM_LAYER='12' .*NUM_LAYERS"),
        ({"TOKENIZER_PATH": "nowhere"}, "TOKENIZER_PATH='nowhere' .*build_shards.py.*download.py"),
        ({"BETA1": "1.5"}, "BETA1=1.5 must be from 0 to"),
        ({"EVAL_ARTIFACT": "nowhere"}, "'nowhere' does not exist"),
    ],
    ids=str,
)
def test_mistake_of_the_user_ends_with_one_line(run_script, settings, message):
    run = run_script(**settings)
    assert (run.status, run.out) == (1, "")
    assert re.fullmatch(f"error: .*{message}.*\n", run.err)


def test_missing_data_end_the_run_with_one_line_and_a_log(run_script):
    run = run_script(DATA_PATH="nowhere")
    assert run.status == 1
    assert re.fullmatch("error: DATA_PATH='nowhere' .*build_shards.py.*download.py.*\n", run.err)
    assert (run.folder / "logs" / "run.txt").read_text() == run.out
    assert not run.artifact.exists()
