"""Codes: the quantizer against brute force and a second GPTQ, the coder against the ideal length, the size search."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import train_gpt as tg

STATES = sorted(tg.TRELLISES)


# -- quantizer -----------------------------------------------------------------------------------------------------


def random_moments(n: int, seed: int) -> torch.Tensor:
    """Positive definite, eigenvalues from 1 to 0.001 in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return ((basis * torch.logspace(0, -3, n, dtype=torch.float64)) @ basis.T).float()


def random_weights(n_rows: int, n_columns: int, seed: int) -> torch.Tensor:
    return torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed))


def damped(moments: torch.Tensor) -> torch.Tensor:
    """(C, C) -> (C, C) float64"""
    exact = moments.double()
    return exact + tg.GPTQ_DAMPING * exact.diagonal().mean() * torch.eye(len(exact), dtype=torch.float64)


def stacked(factors: list[tg.Factor]) -> tg.Factor:
    return tg.Factor(torch.stack([f.feedback for f in factors]), torch.stack([f.cost for f in factors]))


def quantize(w: torch.Tensor, moments: torch.Tensor, step: float, states: int) -> np.ndarray:
    """A single matrix, all rows with the same step. -> codes (R, C) int8"""
    steps = torch.full((1, len(w), 1), step)
    return tg.quantize_codes(w[None], stacked([tg.factorize(moments)]), steps, states)[0].numpy()


def quantizers_of(codes: np.ndarray, states: int) -> list[int]:
    """The definition, code by code: the quantizers along one row."""
    trellis = tg.TRELLISES[states]
    state = 0
    quantizers = []
    for code in codes:
        quantizers.append(trellis.quantizer[state])
        state = trellis.next_state[state][int(code) % 2]
    return quantizers


def values_of(codes: np.ndarray, step: float, states: int) -> np.ndarray:
    """What the codes of one row stand for. (C,) -> (C,) float64"""
    halves = np.array(quantizers_of(codes, states)) / 2
    return (codes - np.sign(codes) * halves) * step


def weighted_error(w: torch.Tensor, codes: np.ndarray, moments: torch.Tensor, step: float, states: int) -> np.ndarray:
    """e M e^T of each row, M as damped. -> (R,) float64"""
    e = w.double().numpy() - np.stack([values_of(row, step, states) for row in codes])
    return np.einsum("ri,ij,rj->r", e, damped(moments).numpy(), e)


def gptq(w: np.ndarray, moments: np.ndarray, step: float) -> np.ndarray:
    """The published form: the inverse's upper Cholesky factor, the error of a column pushed on before the next one."""
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T
    w = w.copy()
    codes = np.zeros(w.shape)
    for j in range(w.shape[1]):
        codes[:, j] = np.rint(w[:, j] / step)
        error = (w[:, j] - codes[:, j] * step) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    return codes


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_factor_gives_the_error_column_by_column(n, seed):
    moments = random_moments(n, seed)
    feedback, cost = (x.double() for x in tg.factorize(moments))
    assert torch.equal(feedback.tril(), torch.eye(n, dtype=torch.float64))
    e = random_weights(5, n, seed).double()
    by_column = ((e @ feedback).square() * cost).sum(1)
    torch.testing.assert_close(by_column, (e @ damped(moments) * e).sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("n", [5, 64, 65, 200], ids="{} columns".format)
def test_one_state_is_plain_gptq(n):
    """Except where a weight lies on the edge between two codes: there float32 and float64 may choose otherwise."""
    w = random_weights(30, n, seed=n)
    moments = random_moments(n, n)
    expected = gptq(w.double().numpy(), damped(moments).numpy(), 0.4)
    same_rows = (quantize(w, moments, 0.4, 1) == expected).all(axis=1)
    assert same_rows.mean() > 0.9  # another code changes all behind it in its row


def test_diagonal_moments_make_rounding_to_nearest():
    w = random_weights(20, 100, seed=0)
    codes = quantize(w, torch.linspace(0.1, 2, 100).diag(), 0.3, 1)
    assert np.array_equal(codes, (w / 0.3).round().numpy())


def test_gptq_beats_rounding_and_the_trellis_beats_gptq():
    """In the sum over many rows. A single one may do worse, because the search is greedy in the feedback."""
    w = random_weights(120, 128, seed=0)
    moments = random_moments(128, 0)
    rounded = (w / 0.4).round().to(torch.int8).numpy()
    of_rounding = weighted_error(w, rounded, moments, 0.4, 1).sum()
    of_one, of_four, of_eight = (
        weighted_error(w, quantize(w, moments, 0.4, states), moments, 0.4, states).sum() for states in STATES
    )
    assert of_one < 0.5 * of_rounding
    assert of_four < 0.8 * of_one
    assert of_eight < 0.99 * of_four


@pytest.mark.parametrize("states", STATES)
def test_search_is_optimal_without_feedback(states):
    """Of all paths of codes from -3 to 3, for a step of 0.5, the one found costs least."""
    w = random_weights(300, 4, seed=0).clamp(-1.5, 1.5)
    moments = torch.tensor([0.3, 2.0, 0.2, 1.0]).diag()
    paths = np.array(list(itertools.product(range(-3, 4), repeat=4)))
    values = np.stack([values_of(path, 0.5, states) for path in paths])
    errors = (w.double().numpy()[:, None] - values) ** 2
    best = (errors @ damped(moments).diagonal().numpy()).min(1)
    found = weighted_error(w, quantize(w, moments, 0.5, states), moments, 0.5, states)
    assert (found <= best * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("states", STATES)
def test_codes_stand_for_values_near_the_weights(states):
    """Over three blocks: where one of them began in another state than the decoder's, values would be far off."""
    w = random_weights(10, 150, seed=2)
    values = np.stack([values_of(row, 0.3, states) for row in quantize(w, random_moments(150, 2), 0.3, states)])
    assert (np.abs(values - w.numpy()) < 1).all()


@pytest.mark.parametrize("w", [torch.zeros(2, 20), torch.full((2, 20), 1e4), torch.tensor([[1e-20] * 20, [-1e4] * 20])])
def test_weights_far_from_the_grid_are_clipped_to_it(w):
    codes = quantize(w, torch.eye(20), 0.1, 8).astype(int)
    assert np.abs(codes).max() <= tg.MAX_CODE
    assert (np.sign(codes) * np.sign(w.numpy()) >= 0).all()


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([1, 7, 64, 65, 100]), st.sampled_from(STATES), st.data())
def test_matrices_side_by_side_get_the_codes_that_each_gets_alone(n_matrices, n_rows, n_columns, states, data):
    """To the bit, and whichever rows a rank takes: how many GPUs there are must not change what is stored."""
    n_first = data.draw(st.integers(0, n_rows))
    generator = torch.Generator().manual_seed(n_rows)
    w = torch.randn(n_matrices, n_rows, n_columns, generator=generator)
    steps = 0.1 + torch.rand(n_matrices, n_rows, 1, generator=generator)
    factors = [tg.factorize(random_moments(n_columns, seed)) for seed in range(n_matrices)]
    together = tg.quantize_codes(w, stacked(factors), steps, states)

    for i, factor in enumerate(factors):
        rows = (slice(0, n_first), slice(n_first, n_rows))
        alone = [tg.quantize_codes(w[i : i + 1, r], stacked([factor]), steps[i : i + 1, r], states) for r in rows]
        assert torch.equal(together[i], torch.cat(alone, dim=1)[0])


@settings(max_examples=50)
@given(st.data(), st.sampled_from(STATES))
def test_quantizers_equal_a_plain_loop(data, states):
    codes = data.draw(code_arrays())
    found = tg.quantizers_along(codes, tg.TRELLISES[states])
    assert found.tolist() == [quantizers_of(row, states) for row in codes]


# -- coder ---------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    words: bytes
    classes: list[np.ndarray]
    frequencies: np.ndarray


def code_arrays() -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(1, 40), st.integers(1, 30))
    extremes = st.sampled_from([-127, -1, 0, 1, 126, 127])
    return shapes.flatmap(lambda shape: hnp.arrays(np.int8, shape, elements=st.integers(-127, 127) | extremes))


def encode(bands: list[np.ndarray]) -> Encoded:
    symbols = [tg.to_symbols(codes) for codes in bands]
    classes = [tg.row_classes(codes) for codes in bands]
    pairs = list(zip(symbols, classes, strict=True))
    frequencies = tg.scale_counts(sum(tg.count_symbols(*pair) for pair in pairs))
    return Encoded(tg.encode_words(pairs, frequencies), classes, frequencies)


def decode(encoded: Encoded, like: list[np.ndarray]) -> list[list[list[int]]]:
    """The codes of bands with the shapes of `like`."""
    bands = []
    for codes, classes in zip(like, encoded.classes, strict=True):
        bands.append(tg.CodedRows(np.arange(len(codes)), classes.astype(np.int64), codes.shape[1]))
    n_lanes = max(len(codes) for codes in like)
    columns = list(tg.decode_words(encoded.words, n_lanes, bands, encoded.frequencies))
    decoded = []
    for codes in like:
        symbols = np.stack(columns[: codes.shape[1]], axis=1)
        del columns[: codes.shape[1]]
        decoded.append(tg.from_symbols(symbols).tolist())
    return decoded


@settings(max_examples=60)
@given(st.lists(code_arrays(), min_size=1, max_size=3))
def test_words_give_the_codes_back(bands):
    assert decode(encode(bands), like=bands) == [codes.tolist() for codes in bands]


@settings(max_examples=60)
@given(st.lists(code_arrays(), min_size=1, max_size=2), st.data())
def test_damaged_words_are_refused_or_give_other_codes(bands, data):
    encoded = encode(bands)
    words = encoded.words
    n_kept = data.draw(st.integers(0, len(words) - 1))
    for damaged in (words + b"\0\0", words[:n_kept]):
        with pytest.raises(ValueError, match="words"):
            decode(encoded._replace(words=damaged), like=bands)

    place = data.draw(st.integers(0, len(words) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != words[place]))
    changed = words[:place] + bytes([value]) + words[place + 1 :]
    with contextlib.suppress(ValueError):
        assert decode(encoded._replace(words=changed), like=bands) != [codes.tolist() for codes in bands]


@given(hnp.arrays(np.int64, (3, 256), elements=st.sampled_from([0, 0, 0, 1, 2, 50, 10**6])))
def test_frequencies_fill_the_range_and_leave_nothing_out(counts):
    frequencies = tg.scale_counts(counts)
    assert ((frequencies > 0) == (counts > 0)).all()
    assert (frequencies.sum(1) == np.where(counts.any(1), 2**tg.ANS_BITS, 0)).all()


def test_words_are_as_short_as_their_model_allows():
    """Against the ideal code length, and that against the entropy of the source: Gaussians of many widths."""
    rng = np.random.default_rng(0)
    widths = np.exp(rng.normal(1, 0.5, (512, 1)))
    codes = np.rint(rng.normal(0, 1, (512, 4096)) * widths).clip(-127, 127).astype(np.int8)
    words, classes, frequencies = encode([codes])
    bits = -np.log2(np.maximum(frequencies, 1) / 2**tg.ANS_BITS)
    ideal = bits[classes[0][:, None].astype(int), codes.astype(int) + 128].sum() / 8
    lanes = 4 * len(codes)
    assert ideal < len(words) < 1.001 * ideal + lanes
    entropy = (np.log2(widths) + 0.5 * np.log2(2 * math.pi * math.e)).mean() * codes.size / 8
    assert ideal < 1.005 * entropy


# -- moments -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(record_config, record_hp) -> tg.Run:
    """A small model with all techniques. Of its three layers, layer 1 runs three times."""
    changes = {"num_layers": 3, "loop_start": 1, "loop_end": 1, "vocab_size": 320, "compute_dtype": "float32"}
    config = dataclasses.replace(record_config, tokenizer_sha256="a" * 64, **changes)
    hp = dataclasses.replace(record_hp, micro_batch_tokens=48, gptq_calibration_batches=3, max_weight_bits=5.0)
    world = tg.World()
    return tg.Run(config, hp, world, tg.Ledger(world.device), log0=lambda line: None)


@pytest.fixture(scope="module")
def model(run, random_model) -> tg.GPT:
    return random_model(run.config)


@pytest.fixture(scope="module")
def loader(run, data) -> tg.Loader:
    stream = tg.TokenStream(str(data.folder), "fineweb_train_[0-9]*.bin")
    return tg.Loader(stream, run.hp, run.config.vocab_size, run.world)


@pytest.fixture(scope="module")
def moments(model, loader, run) -> tg.Moments:
    return tg.calibrate(model, loader, 5, run)


class Head(NamedTuple):
    """What the output matrix saw in the calibration, in float64."""

    inputs: torch.Tensor  # (N, D)
    before_cap: torch.Tensor  # (N, V)
    targets: torch.Tensor  # (N,)
    slope: torch.Tensor  # (N, V), of the cap


@pytest.fixture(scope="module")
def head(model, loader) -> Head:
    batches = [pair for step in (5, 6, 7) for pair in loader.batch(step)]
    with torch.no_grad():
        inputs = torch.cat([tg.norm(model.hidden(ids)).flatten(0, 1) for ids, _ in batches]).double()
        before_cap = inputs @ model.tok_emb.weight.double().T
    targets = torch.cat([targets.flatten() for _, targets in batches])
    slope = 1 - torch.tanh(before_cap / model.config.logit_softcap) ** 2
    return Head(inputs, before_cap, targets, slope)


def log_probabilities(before_cap: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.log_softmax(cap * torch.tanh(before_cap / cap), -1)


def test_moments_of_the_output_layer_have_a_closed_form(model, moments, head):
    inputs, gradients = moments["tok_emb.weight"]
    expected_inputs = head.inputs.T @ head.inputs / len(head.inputs)
    torch.testing.assert_close(inputs.double(), expected_inputs, rtol=1e-4, atol=1e-5)
    error = log_probabilities(head.before_cap, model.config.logit_softcap).exp()
    error[torch.arange(len(error)), head.targets] -= 1.0
    expected_gradients = (error * head.slope).square().mean(0)
    torch.testing.assert_close(gradients.double(), expected_gradients, rtol=1e-3, atol=1e-8)


def test_looped_layers_add_up_all_passes(moments):
    """A normalised input has length sqrt(D / (layer + 1)): the trace of its moments counts the passes."""
    for layer, n_passes in enumerate((1, 3, 1)):
        for matrix in ("attn.c_q", "attn.c_k", "attn.c_v", "mlp.fc"):
            trace = float(moments[f"blocks.{layer}.{matrix}.weight"].inputs.trace())
            assert trace == pytest.approx(n_passes * 32 / (layer + 1), rel=1e-3), (layer, matrix)


def test_moments_predict_what_noise_in_the_weights_costs(model, moments, head):
    """Half of gradients * e M e^T, summed over rows: what such errors add to the loss.

    It is the curvature where the labels come from the model itself, so the gradients here are those of such labels:
    the variance p (1 - p) of a label.
    """
    cap = model.config.logit_softcap
    inputs = moments["tok_emb.weight"].inputs.double()
    log_p = log_probabilities(head.before_cap, cap)
    p = log_p.exp()
    gradients = (p * (1 - p) * head.slope**2).mean(0)

    costs = []
    predictions = []
    for seed in range(20):
        e = 0.02 * random_weights(*model.tok_emb.weight.shape, seed).double()
        noisy_log_p = log_probabilities(head.before_cap + head.inputs @ e.T, cap)
        costs.append(float((p * (log_p - noisy_log_p)).sum(-1).mean()))
        predictions.append(float(0.5 * (gradients * (e @ inputs * e).sum(1)).sum()))
    assert np.mean(costs) == pytest.approx(np.mean(predictions), rel=0.3)


def test_steps_make_an_error_in_every_weight_cost_the_same(moments):
    """So that no bit could do more good elsewhere. The coarsest row sets the scale."""
    factors = {name: tg.factorize(inputs) for name, (inputs, _) in moments.items()}
    finer = tg.finer_rows(moments, factors)
    costs = []
    for name, (_, gradients) in moments.items():
        steps = 2.0 ** -finer[name]
        of_outputs = gradients + tg.GRADIENT_FLOOR * gradients.mean()
        costs.append(steps.square() * of_outputs * factors[name].cost.mean())
    costs = torch.cat(costs)
    torch.testing.assert_close(costs, costs[:1].expand_as(costs), rtol=1e-4, atol=0)
    assert min(float(octaves.min()) for octaves in finer.values()) == 0.0


@pytest.mark.parametrize(("part", "value"), [("inputs", math.inf), ("gradients", math.nan)])
def test_moments_that_are_not_finite_are_refused_by_name(model, moments, run, part, value):
    name = "blocks.2.mlp.fc.weight"
    broken = getattr(moments[name], part).clone()
    broken.view(-1)[3] = value
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp\.fc\.weight.*lower the learning rates"):
        tg.fit_artifact(model, {**moments, name: moments[name]._replace(**{part: broken})}, run)


# -- size ----------------------------------------------------------------------------------------------------------


def fit(model: tg.GPT, moments: tg.Moments, run: tg.Run, **changes: Any) -> bytes:
    """fit_artifact with changes to the hyperparameters. By default with one state, which is fast."""
    hp = dataclasses.replace(run.hp, **{"trellis_states": 1, **changes})
    return tg.fit_artifact(model, moments, dataclasses.replace(run, hp=hp))


def load(packed: bytes, folder: Path) -> tg.GPT:
    path = folder / "a.ptz"
    path.write_bytes(packed)
    return tg.load_artifact(path)


def loss_of(model: tg.GPT, loader: tg.Loader) -> float:
    with torch.no_grad():
        return float(np.mean([float(model.loss(ids, targets)) for ids, targets in loader.batch(9)]))


def bytes_by_weight_bits(model: tg.GPT, bits: float) -> int:
    """What MAX_WEIGHT_BITS allows: so much per coded weight, and the other weights, lanes and header on top."""
    layers = tg.coded_layers(model)
    n_codes = sum(layer.weight.numel() for layer in layers.values())
    n_lanes = max(len(layer.weight) for layer in layers.values())
    others = [p for name, p in model.named_parameters() if name not in layers]
    besides = sum(p.numel() + 2 * (p.numel() // p.size(-1)) for p in others)
    return int(bits / 8 * n_codes) + besides + 4 * n_lanes + 1024


@pytest.fixture(scope="module")
def packed(model, moments, run) -> bytes:
    """With the trellis of 8 states."""
    return fit(model, moments, run, trellis_states=8)


def test_file_is_as_large_as_allowed(model, moments, run, packed):
    """Below the limit by half a percent at most; a limit above MAX_WEIGHT_BITS is not used up."""
    limit = bytes_by_weight_bits(model, run.hp.max_weight_bits)
    assert 0.995 * limit < len(packed) <= limit
    limit = bytes_by_weight_bits(model, 4.0)
    bytes_code = Path(tg.__file__).stat().st_size
    file = fit(model, moments, run, trellis_states=4, max_total_bytes=bytes_code + limit, max_weight_bits=8.0)
    assert 0.995 * limit < len(file) <= limit


def test_size_is_found_where_rows_are_almost_zero(model, moments, run):
    """Their codes are zeros at any step, so that half a step takes much less than a bit per code."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in tg.coded_layers(model).values():
            layer.weight[::2] *= 1e-3
    limit = bytes_by_weight_bits(model, 4.0)
    assert 0.995 * limit < len(fit(model, moments, run, trellis_states=4, max_weight_bits=4.0)) <= limit


def test_best_attempt_is_within_the_limit_then_has_more_bytes():
    """A run must not end over the limit while a file within it is at hand."""
    contents = tg.Contents(b"", b"", [], np.zeros((tg.N_CLASSES, tg.N_SYMBOLS), np.int64))
    ascending = [
        tg.Attempt(contents, b"", n_bytes=130, within_limit=False),
        tg.Attempt(contents, b"", n_bytes=110, within_limit=False),
        tg.Attempt(contents, b"", n_bytes=90, within_limit=True),
        tg.Attempt(contents, b"", n_bytes=98, within_limit=True),
    ]
    ranks = [attempt.rank for attempt in ascending]
    assert all(low < high for low, high in itertools.pairwise(ranks))


@pytest.mark.parametrize("dead", ["a layer", "everything"])
def test_weights_that_count_for_nothing_are_stored_with_the_others(model, loader, run, tmp_path, dead):
    """Without gradients all steps are equally good. Any will do, as long as the loader takes the file."""
    model = copy.deepcopy(model)
    parameters = [model.blocks[2].attn_scale] if dead == "a layer" else model.parameters()
    with torch.no_grad():
        for p in parameters:
            p.zero_()
    loaded = load(fit(model, tg.calibrate(model, loader, 5, run), run), tmp_path)
    assert loss_of(loaded, loader) == pytest.approx(loss_of(model, loader), abs=0.01)


def test_room_for_more_bits_than_codes_have_clips_no_weight(model, loader, run, tmp_path):
    """The search asks for ever finer steps there; that of a row's largest weight / 127 is the finest it gets."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in tg.coded_layers(model).values():
            layer.weight[:, 0] *= 30
    loaded = load(fit(model, tg.calibrate(model, loader, 5, run), run, max_weight_bits=8.0), tmp_path)
    assert loss_of(loaded, loader) == pytest.approx(loss_of(model, loader), abs=0.05)


def test_more_bytes_bring_the_outputs_closer(model, moments, run, packed, tmp_path):
    """Half a bit more with eight states instead of one brings about what a whole bit brings."""
    ids = torch.arange(48).view(3, 16) * 5 % 320
    errors = []
    for file in (fit(model, moments, run, max_weight_bits=4.5), packed, fit(model, moments, run, max_weight_bits=7.0)):
        with torch.no_grad():
            errors.append(float((load(file, tmp_path)(ids) - model(ids)).square().mean()))
    of_4_5_bits, of_5_bits_in_a_trellis, of_7_bits = errors
    assert of_5_bits_in_a_trellis < 0.6 * of_4_5_bits
    assert of_7_bits < 0.24 * of_4_5_bits


# -- loading -------------------------------------------------------------------------------------------------------


def test_loaded_weights_are_what_the_codes_stand_for(model, tmp_path):
    """By the definition of the quantizers, for every row with its own step; all else as int8 has it."""
    rng = np.random.default_rng(0)
    coded = tg.CodedModel(states=4, step=0.3, layers={})
    for name, layer in tg.coded_layers(model).items():
        exponents = rng.integers(0, 40, len(layer.weight)).astype(np.uint8)
        codes = rng.normal(0, 5, layer.weight.shape).round().astype(np.int8)
        coded.layers[name] = tg.CodedLayer(exponents, codes)
    loaded = load(tg.pack_artifact(model, "trellis_ans", coded), tmp_path)
    assert loaded.config == model.config

    for name, p in loaded.state_dict().items():
        if name in coded.layers:
            rows = zip(coded.layers[name].codes, coded.layers[name].exponents, strict=True)
            expected = [values_of(codes, 0.3 * 2 ** (-int(exponent) / 8), 4) for codes, exponent in rows]
            np.testing.assert_allclose(p.numpy(), np.stack(expected), rtol=1e-6)
        else:
            w = model.state_dict()[name]
            q, scale = tg.quantize_rows(w.reshape(-1, w.shape[-1]))
            assert torch.equal(p, (q.float() * scale.float()).view(w.shape)), name


def test_weights_are_the_same_to_the_bit_on_any_machine(packed, tmp_path):
    """Another process, another number of threads, another default dtype: the same sha256 of all weights."""
    state = load(packed, tmp_path).state_dict()
    code = """
import hashlib, torch, train_gpt as tg
torch.set_num_threads(3)
torch.set_default_dtype(torch.float64)
state = tg.load_artifact("a.ptz").state_dict()
assert all(p.dtype == torch.float32 for p in state.values())
print(hashlib.sha256(b"".join(p.numpy().tobytes() for p in state.values())).hexdigest())
"""
    env = {"PYTHONPATH": str(Path(tg.__file__).parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(b"".join(p.numpy().tobytes() for p in state.values())).hexdigest()
