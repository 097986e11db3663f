"""Codes: the quantizer against brute force and a second GPTQ, the coder against the ideal length, both to the bit."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import train_gpt as tg

STATES = sorted(tg.TRELLISES)


def random_moments(n: int, seed: int) -> torch.Tensor:
    """Positive definite, eigenvalues from 1 to 0.001 in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return ((basis * torch.logspace(0, -3, n, dtype=torch.float64)) @ basis.T).float()


def damped(moments: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(len(moments), dtype=torch.float64)
    return moments.double() + tg.GPTQ_DAMPING * moments.double().diagonal().mean() * eye


def values_along(codes: np.ndarray, step: float, states: int) -> np.ndarray:
    """The decoder's definition, code by code. (C,) -> (C,) float64"""
    (next_state, quantizer), state, values = tg.TRELLISES[states], 0, []
    for k in map(int, codes):
        values.append((k - quantizer[state] * ((k > 0) - (k < 0)) / 2) * step)
        state = next_state[state][k % 2]
    return np.array(values)


def weighted_error(w: torch.Tensor, codes: torch.Tensor, moments: torch.Tensor, step: float, states: int) -> np.ndarray:
    """e M e^T of each row, M as damped. -> (R,) float64"""
    values = np.stack([values_along(row, step, states) for row in codes.numpy()])
    e = w.double().numpy() - values
    return np.einsum("ri,ij,rj->r", e, damped(moments).numpy(), e)


def gptq(w: np.ndarray, moments: np.ndarray, step: float) -> np.ndarray:
    """The published form: the inverse's upper Cholesky factor, the error of a column pushed on before the next one."""
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T
    w, codes = w.copy(), np.zeros(w.shape)
    for j in range(w.shape[1]):
        codes[:, j] = np.rint(w[:, j] / step)
        error = (w[:, j] - codes[:, j] * step) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    return codes


def steps(n_rows: int, step: float) -> torch.Tensor:
    return torch.full((n_rows, 1), step)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_factor_gives_the_error_column_by_column(n, seed):
    moments = random_moments(n, seed)
    feedback, cost = (x.double() for x in tg.factorize(moments))
    e = torch.randn(5, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(feedback.tril(), torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(
        ((e @ feedback).square() * cost).sum(1), (e @ damped(moments) * e).sum(1), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("n", [5, 64, 65, 200], ids="{} columns".format)
def test_one_state_is_plain_gptq(n):
    """But for codes on the edge between two steps, of which float32 sees some otherwise than float64."""
    w = torch.randn(30, n, generator=torch.Generator().manual_seed(n))
    moments = random_moments(n, n)
    codes, quantizer = tg.quantize_codes(w, tg.factorize(moments), steps(30, 0.4), 1, rate=0.0)
    expected = gptq(w.double().numpy(), damped(moments).numpy(), 0.4)
    rows_alike = (codes.numpy() == expected).all(axis=1)
    assert rows_alike.mean() > 0.9  # one code otherwise changes all behind it in its row
    assert not quantizer.any()


def test_diagonal_moments_make_rounding_to_nearest():
    w = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    codes, _ = tg.quantize_codes(w, tg.factorize(torch.linspace(0.1, 2, 100).diag()), steps(20, 0.3), 1, rate=0.0)
    assert torch.equal(codes, (w / 0.3).round().to(torch.int8))


@pytest.mark.parametrize("seed", range(3))
def test_gptq_beats_rounding_and_the_trellis_beats_gptq(seed):
    """In the sum over many rows: a single one may do worse, since the search is greedy in the feedback."""
    w, moments = torch.randn(60, 128, generator=torch.Generator().manual_seed(seed)), random_moments(128, seed)
    rounded = (w / 0.4).round().to(torch.int8)
    errors = [weighted_error(w, rounded, moments, 0.4, 1).sum()]
    for states in STATES:
        codes, _ = tg.quantize_codes(w, tg.factorize(moments), steps(60, 0.4), states, rate=0.0)
        errors.append(weighted_error(w, codes, moments, 0.4, states).sum())
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.8 * errors[1]
    assert errors[3] < 0.99 * errors[2]


@settings(max_examples=60)
@given(
    hnp.arrays(np.float32, (3, 4), elements=st.floats(-1.5, 1.5, width=32)),
    hnp.arrays(np.float32, (4,), elements=st.floats(0.125, 2, width=32)),
    st.sampled_from(STATES),
)
def test_search_is_optimal_without_feedback(w, weights, states):
    """Of all paths of codes from -3 to 3, for a step of 0.5, the one found costs least."""
    moments = torch.from_numpy(weights).diag()
    codes, _ = tg.quantize_codes(torch.from_numpy(w), tg.factorize(moments), steps(3, 0.5), states, rate=0.0)
    cost = damped(moments).diagonal().numpy()
    paths = np.array(list(itertools.product(range(-3, 4), repeat=4)))
    values = np.stack([values_along(path, 0.5, states) for path in paths])
    best = ((w[:, None].astype(float) - values) ** 2 * cost).sum(-1).min(1)
    found = weighted_error(torch.from_numpy(w), codes, moments, 0.5, states)
    assert (found <= best * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("states", STATES)
def test_rate_buys_bits_for_error_at_a_fair_price(states):
    """With the rate term both are moved along the curve D ~ 2**(-2 bits), to a better one."""
    w, moments = torch.randn(200, 128, generator=torch.Generator().manual_seed(1)), random_moments(128, 1)
    entropy, error = [], []
    for rate in (0.0, 1.0):
        codes, _ = tg.quantize_codes(w, tg.factorize(moments), steps(200, 0.5), states, rate)
        p = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
        entropy.append(float(-(p * np.log2(p)).sum()))
        error.append(weighted_error(w, codes, moments, 0.5, states).sum())
    assert entropy[1] < entropy[0]
    assert error[1] * 4 ** entropy[1] < error[0] * 4 ** entropy[0]


@pytest.mark.parametrize("states", STATES)
def test_quantizers_are_those_that_the_path_goes_through(states):
    w = torch.randn(10, 150, generator=torch.Generator().manual_seed(2))
    codes, quantizer = tg.quantize_codes(w, tg.factorize(random_moments(150, 2)), steps(10, 0.3), states)
    values = tg.dequantize(codes, quantizer, steps(10, 0.3)).numpy()
    np.testing.assert_allclose(values, np.stack([values_along(row, 0.3, states) for row in codes.numpy()]), rtol=1e-6)
    assert (np.abs(values - w.numpy()) < 1).all()


@pytest.mark.parametrize("w", [torch.zeros(2, 20), torch.full((2, 20), 1e4), torch.tensor([[1e-20] * 20, [-1e4] * 20])])
def test_weights_far_from_the_grid_are_clipped_to_it(w):
    codes, _ = tg.quantize_codes(w, tg.factorize(torch.eye(20)), steps(2, 0.1), 8)
    assert int(codes.abs().max()) <= tg.MAX_CODE
    assert bool((codes.sign() * w.sign() >= 0).all())


def code_arrays() -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(1, 40), st.integers(1, 30))
    extremes = st.sampled_from([-127, -1, 0, 1, 126, 127])
    return shapes.flatmap(lambda shape: hnp.arrays(np.int8, shape, elements=st.integers(-127, 127) | extremes))


def encode(codes: list[np.ndarray], states: int) -> tuple[bytes, list[np.ndarray], np.ndarray]:
    """-> words, classes, frequencies"""
    (next_state, quantizer_of), bands, all_classes = tg.TRELLISES[states], [], []
    counts = np.zeros(tg.FREQUENCIES, np.int64)
    for band in codes:
        classes, quantizer = tg.row_classes(band), np.zeros(band.shape, np.uint8)
        for r, row in enumerate(band):
            state = 0
            for c, k in enumerate(map(int, row)):
                quantizer[r, c], state = quantizer_of[state], next_state[state][k % 2]
        contexts, symbols = 2 * classes[:, None] + quantizer, (band.astype(np.int16) + 128).astype(np.uint8)
        np.add.at(counts, (contexts, symbols), 1)
        bands.append((symbols, contexts))
        all_classes.append(classes)
    frequencies = tg.scale_counts(counts)
    return tg.encode_words(bands, frequencies), all_classes, frequencies


@given(st.lists(code_arrays(), min_size=1, max_size=3), st.sampled_from(STATES))
def test_words_give_the_codes_back(codes, states):
    words, classes, frequencies = encode(codes, states)
    back = tg.decode_words(words, [c.shape for c in codes], classes, frequencies, states)
    for (decoded, _), original in zip(back, codes, strict=True):
        assert np.array_equal(decoded, original)


@given(st.lists(code_arrays(), min_size=1, max_size=2), st.data())
def test_damaged_words_are_refused_or_give_other_codes(codes, data):
    words, classes, frequencies = encode(codes, 8)
    shapes = [c.shape for c in codes]
    with pytest.raises(ValueError, match="words"):
        tg.decode_words(words + b"\0\0", shapes, classes, frequencies, 8)
    cut = data.draw(st.integers(0, len(words) - 1))
    with pytest.raises(ValueError, match="words"):
        tg.decode_words(words[:cut], shapes, classes, frequencies, 8)
    at, value = data.draw(st.integers(0, len(words) - 1)), data.draw(st.integers(0, 255))
    changed = words[:at] + bytes([value]) + words[at + 1 :]
    try:
        back = tg.decode_words(changed, shapes, classes, frequencies, 8)
    except ValueError:
        return
    assert changed == words or any((b != c).any() for (b, _), c in zip(back, codes, strict=True))


@given(hnp.arrays(np.int64, (3, 256), elements=st.sampled_from([0, 0, 0, 1, 2, 50, 10**6])))
def test_frequencies_fill_the_range_and_leave_nothing_out(counts):
    frequencies = tg.scale_counts(counts)
    assert ((frequencies > 0) == (counts > 0)).all()
    assert (frequencies.sum(1) == np.where(counts.any(1), 2**tg.ANS_BITS, 0)).all()


def test_words_are_as_short_as_their_model_allows():
    """Against the ideal code length, and that against the entropy of the source: Gaussians of many widths."""
    rng = np.random.default_rng(0)
    widths = np.exp(rng.normal(1, 0.5, (2048, 1)))
    codes = np.rint(rng.normal(0, 1, (2048, 4096)) * widths).clip(-127, 127).astype(np.int8)
    words, classes, frequencies = encode([codes], 1)
    bits = -np.log2(np.maximum(frequencies, 1) / 2**tg.ANS_BITS)
    ideal = bits[2 * classes[0][:, None].astype(int), codes.astype(int) + 128].sum() / 8
    assert ideal < len(words) < 1.003 * ideal  # lanes and all, for 8 million codes
    entropy = (np.log2(widths) + 0.5 * np.log2(2 * math.pi * math.e)).mean() * codes.size / 8
    assert ideal < 1.005 * entropy


# calibration and the whole artifact


@pytest.fixture(scope="module")
def run(record_config, record_hp, random_model, data) -> tg.Trainer:
    """A random model with all techniques, ready to be calibrated; layers 1 and 2 run three times."""
    model = random_model(dataclasses.replace(record_config, num_layers=4, vocab_size=320, tokenizer_sha256="a" * 64))
    model.compute_dtype = torch.float32
    hp = dataclasses.replace(record_hp, micro_batch_tokens=48, gptq_calibration_batches=3, max_weight_bits=5.0)
    loader = tg.Loader(tg.TokenStream(str(data.folder), "fineweb_train_[0-9]*.bin"), hp, 320, tg.World())
    return tg.Trainer(model.loss, model, [], loader, hp, tg.World())


@pytest.fixture(scope="module")
def moments(run) -> tg.Moments:
    return tg.calibrate(run, 5, tg.Ledger(run.world.device))


def logits_and_targets(run: tg.Trainer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the three batches from step 5 on: hidden states (N, D), logits before the cap (N, V), targets (N,)."""
    batches = [pair for step in (5, 6, 7) for pair in run.loader.batch(step)]
    hidden = torch.cat([tg.norm(run.model.hidden(ids)).flatten(0, 1) for ids, _ in batches]).detach()
    return hidden, hidden @ run.model.output.weight.detach().T, torch.cat([t.flatten() for _, t in batches])


def test_moments_of_the_output_layer_have_a_closed_form(run, moments):
    hidden, logits, targets = (x.double() if x.is_floating_point() else x for x in logits_and_targets(run))
    inputs, gradients = moments["tok_emb.weight"]
    torch.testing.assert_close(inputs.double(), hidden.T @ hidden / len(hidden), rtol=1e-4, atol=1e-5)
    cap = run.model.config.logit_softcap
    p = torch.softmax(cap * torch.tanh(logits / cap), -1)
    p[torch.arange(len(p)), targets] -= 1.0
    expected = (p * (1 - torch.tanh(logits / cap) ** 2)).square().mean(0)
    torch.testing.assert_close(gradients.double(), expected, rtol=1e-3, atol=1e-8)


def test_looped_layers_add_up_all_passes(moments):
    """A normalised input has length sqrt(D / (layer + 1)): the trace of its moments counts the passes."""
    for layer, passes in enumerate((1, 3, 3, 1)):
        for matrix in ("attn.c_q", "attn.c_k", "attn.c_v", "mlp.fc"):
            trace = float(moments[f"blocks.{layer}.{matrix}.weight"][0].trace())
            assert trace == pytest.approx(passes * 32 / (layer + 1), rel=1e-3), (layer, matrix)


def test_moments_predict_what_noise_in_the_weights_costs(run, moments):
    """Half of gradients * e M e^T, summed over rows: within a factor of two of the loss of a model with such errors.

    It is the curvature where the labels come from the model itself. So that they do, labels are drawn from it here."""
    model, generator = run.model, torch.Generator().manual_seed(0)
    name = "tok_emb.weight"
    inputs, _ = moments[name]
    hidden, logits, _ = logits_and_targets(run)
    cap = model.config.logit_softcap

    def log_p(w: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(cap * torch.tanh((hidden @ w.T).double() / cap), -1)

    before = log_p(model.output.weight.detach())
    slope = 1 - torch.tanh(logits.double() / cap) ** 2
    gradients = ((before.exp() - before.exp() ** 2) * slope**2).mean(0)  # labels of the model: p (1 - p)
    costs, predictions = [], []
    for _ in range(20):
        error = 0.02 * torch.randn(model.output.weight.shape, generator=generator)
        after = log_p(model.output.weight.detach() + error)
        costs.append(float((before.exp() * (before - after)).sum(-1).mean()))
        e = error.double()
        predictions.append(float(0.5 * (gradients * (e @ inputs.double() * e).sum(1)).sum()))
    assert np.mean(costs) == pytest.approx(np.mean(predictions), rel=0.3)


def most_bytes(model: tg.GPT, bits: float) -> int:
    """What MAX_WEIGHT_BITS allows: so many per coded weight, vectors as int8 rows, a word for each lane, a header."""
    layers = tg.coded_layers(model)
    vectors = [p for n, p in model.named_parameters() if n not in layers]
    rest = sum(p.numel() + 2 * (p.numel() // p.shape[-1]) for p in vectors)
    lanes = max(layer.weight.shape[0] for layer in layers.values())
    return int(bits / 8 * sum(layer.weight.numel() for layer in layers.values())) + rest + 4 * lanes + 1024


@pytest.fixture(scope="module")
def packed(run, moments) -> bytes:
    return tg.fit_artifact(run.model, moments, run.hp, lambda line: None)


def test_file_is_as_large_as_allowed(run, moments, packed):
    """Below the limit by half a percent at most; a limit above MAX_WEIGHT_BITS is not used up."""
    n = sum(layer.weight.numel() for layer in tg.coded_layers(run.model).values())
    code = Path(tg.__file__).stat().st_size
    limit = int(0.7 * n)
    hp = dataclasses.replace(run.hp, max_total_bytes=code + limit, max_weight_bits=8.0)
    assert 0.995 * limit < len(tg.fit_artifact(run.model, moments, hp, lambda line: None)) <= limit
    limit = most_bytes(run.model, run.hp.max_weight_bits)
    assert 0.995 * limit < len(packed) <= limit


def test_size_is_found_where_rows_are_almost_zero(run, moments):
    """Their codes are zeros at any step, so that half a step takes much less than a bit per code."""
    model, lines = copy.deepcopy(run.model), []
    with torch.no_grad():
        for layer in tg.coded_layers(model).values():
            layer.weight[::2] *= 1e-3
    limit = most_bytes(model, 4.0)
    hp = dataclasses.replace(run.hp, max_weight_bits=4.0, trellis_states=4)
    assert 0.995 * limit < len(tg.fit_artifact(model, moments, hp, lines.append)) <= limit, lines


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ((2.0, 1.2, 0.996), 2),  # as intended: it stops there
        ((2.0, 1.2, 0.9, 0.98, 1.1), 3),
        ((2.0, 0.999, 0.97, 1.1, 0.9), 2),  # the wanted trellis before more bytes
        ((0.9, 0.95, 1.2, 1.1, 1.01), 1),
        ((1.3, 1.2, 1.1, 1.05, 1.4), 3),  # none fits: the least too large
    ],
    ids=str,
)
def test_best_of_the_files_tried_is_kept(run, moments, monkeypatch, sizes, kept):
    """Whatever came last: the run must not end over the limit with a file that fits at hand."""
    tried = iter([bytes([i]) * int(size * most_bytes(run.model, 5.0)) for i, size in enumerate(sizes)])
    monkeypatch.setattr(tg, "pack_artifact", lambda *args: next(tried))
    monkeypatch.setattr(tg, "quantize_codes", lambda w, *args: (w.to(torch.int8), w.to(torch.uint8)))
    packed = tg.fit_artifact(run.model, moments, run.hp, lambda line: None)
    assert packed[0] == kept


def loss_of(model: tg.GPT, run: tg.Trainer) -> float:
    model.compute_dtype = torch.float32
    with torch.no_grad():
        return float(np.mean([float(model.loss(ids, targets)) for ids, targets in run.loader.batch(9)]))


@pytest.mark.parametrize("dead", ["one head", "one layer", "everything"])
def test_weights_that_count_for_nothing_are_stored_with_the_others(run, tmp_path, dead):
    """Where no gradient comes by, all steps are equally good: any will do, if only the loader takes the file."""
    trained = run._replace(model=copy.deepcopy(run.model))
    block = trained.model.blocks[2]
    with torch.no_grad():
        if dead == "everything":
            for p in trained.model.parameters():
                p.zero_()
        elif dead == "one layer":
            block.attn_scale.zero_()
        else:
            block.attn.proj.weight[:, : block.attn.head_dim] = 0.0
    moments = tg.calibrate(trained, 5, tg.Ledger(run.world.device))
    (tmp_path / "a.ptz").write_bytes(tg.fit_artifact(trained.model, moments, run.hp, lambda line: None))
    loaded = tg.load_artifact(tmp_path / "a.ptz")
    assert loss_of(loaded, run) == pytest.approx(loss_of(trained.model, run), abs=0.01)


def test_room_for_more_bits_than_codes_have_clips_no_weight(run, tmp_path):
    """The search asks for ever finer steps there; that of a row's largest weight / 127 is the finest it gets."""
    wide = run._replace(model=copy.deepcopy(run.model))
    with torch.no_grad():
        for layer in tg.coded_layers(wide.model).values():
            layer.weight[:, 0] *= 30
    moments = tg.calibrate(wide, 5, tg.Ledger(run.world.device))
    hp = dataclasses.replace(run.hp, max_weight_bits=8.0)
    (tmp_path / "a.ptz").write_bytes(tg.fit_artifact(wide.model, moments, hp, lambda line: None))
    loaded = tg.load_artifact(tmp_path / "a.ptz")
    assert loss_of(loaded, run) == pytest.approx(loss_of(wide.model, run), abs=0.05)


@pytest.mark.parametrize("part", [0, 1], ids=["inputs", "gradients"])
def test_moments_that_are_not_finite_are_refused_by_name(run, moments, part):
    name = "blocks.2.mlp.fc.weight"
    pair = [x.clone() for x in moments[name]]
    pair[part].view(-1)[3] = math.nan if part else math.inf
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp\.fc\.weight.*lower the learning rates"):
        tg.fit_artifact(run.model, {**moments, name: tuple(pair)}, run.hp, lambda line: None)


def test_more_bytes_bring_the_outputs_closer(run, moments, packed, tmp_path):
    """Of one state, and as much as half a bit of a trellis of eight."""
    ids, errors = torch.arange(48).view(3, 16) * 5 % 320, []
    hps = [dataclasses.replace(run.hp, max_weight_bits=bits, trellis_states=1) for bits in (4.5, 7.0)]
    files = [tg.fit_artifact(run.model, moments, hp, lambda line: None) for hp in hps]
    for file in (*files, packed):
        (tmp_path / "a.ptz").write_bytes(file)
        loaded = tg.load_artifact(tmp_path / "a.ptz")
        loaded.compute_dtype = torch.float32
        with torch.no_grad():
            errors.append(float((loaded(ids) - run.model(ids)).square().mean()))
    assert errors[1] < 0.24 * errors[0]
    assert errors[2] < 0.6 * errors[0]  # 5 bits


def test_weights_are_the_same_to_the_bit_on_any_machine(packed, tmp_path):
    """Another process, another number of threads, another default dtype: the same sha256 of all weights."""
    (tmp_path / "a.ptz").write_bytes(packed)
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
    state = tg.load_artifact(tmp_path / "a.ptz").state_dict()
    assert done.stdout.strip() == hashlib.sha256(b"".join(p.numpy().tobytes() for p in state.values())).hexdigest()


def test_loaded_weights_are_what_the_codes_stand_for(run, moments, tmp_path):
    """By the definition of the quantizers, for every row with its own step; all else as int8 has it."""
    layers = tg.coded_layers(run.model)
    generator, coded = np.random.default_rng(0), tg.Coded()
    for name, layer in layers.items():
        exponents = generator.integers(0, 40, layer.weight.size(0)).astype(np.uint8)
        factor, step = tg.factorize(moments[name][0]), tg.row_steps(0.3, exponents)
        codes, quantizer = tg.quantize_codes(layer.weight.detach(), factor, step, 4)
        coded[name] = exponents, codes.numpy(), quantizer.numpy()
    (tmp_path / "a.ptz").write_bytes(tg.pack_artifact(run.model, 4, 0.3, coded))
    loaded = tg.load_artifact(tmp_path / "a.ptz")
    assert loaded.config == run.model.config
    for name, p in loaded.state_dict().items():
        if name in layers:
            exponents, codes, _ = coded[name]
            rows = zip(codes, exponents, strict=True)
            expected = np.stack([values_along(row, 0.3 * 2 ** (-int(e) / 8), 4) for row, e in rows])
            np.testing.assert_allclose(p.numpy(), expected, rtol=1e-6)
        else:
            w = run.model.state_dict()[name]
            q, scale = tg.quantize_rows(w.reshape(-1, w.shape[-1]))
            assert torch.equal(p, (q.float() * scale.float()).view(w.shape)), name


# damaged and hostile files


class Parts:
    """An artifact taken apart, to be put together with a valid checksum whatever it says."""

    def __init__(self, packed: bytes) -> None:
        length = tg.ARTIFACT_PREFIX.unpack_from(packed)[2]
        self.header = json.loads(zlib.decompress(packed[16 : 16 + length]))
        unpacker = zlib.decompressobj()
        self.payload = bytearray(unpacker.decompress(packed[16 + length :]))
        self.words = unpacker.unused_data

    def bytes(self) -> bytes:
        text = json.dumps(self.header).encode()
        body = text + zlib.compress(bytes(self.payload)) + self.words
        return tg.ARTIFACT_PREFIX.pack(b"GOLFGPT\n", zlib.crc32(body), len(text)) + body

    def place(self, wanted: str) -> int:
        """Where a tensor begins in the payload."""
        offset = 0
        for name, kind, shape in self.header["tensors"]:
            if name == wanted:
                return offset
            offset += tg.stored_bytes(kind, shape)
        raise KeyError(wanted)


@pytest.fixture
def refused(tmp_path) -> Callable[[bytes], str]:
    def check(data: bytes) -> str:
        (tmp_path / "hostile.ptz").write_bytes(data)
        with pytest.raises(ValueError, match=r"hostile\.ptz") as caught:
            tg.load_artifact(tmp_path / "hostile.ptz")
        return str(caught.value)

    return check


def test_parts_put_together_are_the_file(packed, tmp_path):
    (tmp_path / "a.ptz").write_bytes(Parts(packed).bytes())
    (tmp_path / "b.ptz").write_bytes(packed)
    a, b = (tg.load_artifact(tmp_path / name).state_dict() for name in ("a.ptz", "b.ptz"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_cut_lengthened_or_flipped_file_is_refused(packed, refused):
    for n in [*range(40), *range(40, len(packed), 211)]:
        refused(packed[:n])
        refused(packed[:n] + bytes([packed[n] ^ 1 << n % 8]) + packed[n + 1 :])
    refused(packed + b"\0\0")


@pytest.mark.parametrize(
    "change",
    [{"states": 2}, {"states": True}, {"states": "8"}, {"states": [8]}, {"states": None}]
    + [{"step": step} for step in (0.0, -1.0, 1e9, math.nan, math.inf, 1, "1", None)]
    + [{"codec": "int8_zlib"}, {"format": 2}],
    ids=str,
)
def test_lying_header_is_refused(packed, refused, change):
    parts = Parts(packed)
    parts.header |= change
    assert "header that describes no model" in refused(parts.bytes())
    parts.header.pop(next(iter(change)))
    assert "header that describes no model" in refused(parts.bytes())


def test_values_of_another_type_that_are_equal_do_no_harm(packed, tmp_path):
    """JSON's 16.0 and true equal 16 and 1, but are no shape: those that count are the loader's own."""
    parts = Parts(packed)
    parts.header["payload_bytes"] = float(parts.header["payload_bytes"])
    table = [
        [name, kind, [float(n) if n > 1 else True for n in shape]] for name, kind, shape in parts.header["tensors"]
    ]
    parts.header["tensors"] = table
    (tmp_path / "a.ptz").write_bytes(parts.bytes())
    (tmp_path / "b.ptz").write_bytes(packed)
    a, b = (tg.load_artifact(tmp_path / name).state_dict() for name in ("a.ptz", "b.ptz"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_classes_and_frequencies_out_of_range_are_refused(packed, refused):
    parts = Parts(packed)
    rows = 320
    parts.payload[parts.place("tok_emb.weight") + rows] = 64
    assert "classes or frequencies" in refused(parts.bytes())
    for bit in range(8):
        parts = Parts(packed)
        at = max(range(len(parts.payload) - 65536, len(parts.payload)), key=lambda i: parts.payload[i])
        parts.payload[at] ^= 1 << bit
        assert "classes or frequencies" in refused(parts.bytes())


def test_words_too_few_or_too_many_are_refused(packed, refused):
    for change in (lambda w: w[:-2], lambda w: w[:-1], lambda w: w + b"\1\2", lambda w: b"", lambda w: w[2:]):
        parts = Parts(packed)
        parts.words = change(parts.words)
        assert "damaged" in refused(parts.bytes())


@settings(max_examples=60)
@given(st.data())
def test_any_change_with_a_valid_checksum_is_refused_or_loads_finite_weights(packed, tmp_path_factory, data):
    parts = Parts(packed)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.sampled_from(["payload", "words"]))
        block = bytearray(getattr(parts, where))
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
        setattr(parts, where, block)
    path = tmp_path_factory.getbasetemp() / "changed.ptz"
    parts.words = bytes(parts.words)
    path.write_bytes(parts.bytes())
    with contextlib.suppress(ValueError):
        assert all(bool(p.isfinite().all()) for p in tg.load_artifact(path).state_dict().values())
