"""The optimizer against singular value decompositions and a plain reference of its update."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import train_gpt as tg

DTYPE = tg.pick_dtype(torch.device("cpu"))  # of Muon's products
ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 1e-4}[DTYPE]
SHAPES = [(16, 16), (16, 40), (40, 16), (1, 8), (8, 1)]

any_polynomials = pytest.mark.parametrize("polar_express", [False, True])


def matrix(rows: int, columns: int, condition: float, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall geometrically from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64)).Q
    return (u * torch.logspace(0, -1, n, base=condition, dtype=torch.float64)) @ v.T


def are_near_one(values: Tensor, polar_express: bool) -> bool:
    low, high = (0.85, 1.15) if polar_express else (0.6, 1.3)
    return low <= float(values.min()) <= float(values.max()) <= high


# -- orthogonalize ---------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.sampled_from(SHAPES), st.floats(1, 300), st.floats(1e-6, 1e6), st.booleans())
def test_orthogonalize_keeps_singular_vectors_and_moves_values_near_one(shape, condition, scale, polar_express):
    g = matrix(*shape, condition) * scale
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    x = tg.orthogonalize(g.float()[None], 5, polar_express, torch.float32)[0].double()
    assert x.shape == g.shape
    values = (u.T @ x @ vt.T).diagonal()
    assert are_near_one(values, polar_express)
    torch.testing.assert_close(u @ values.diag() @ vt, x, atol=2e-3, rtol=0)


@any_polynomials
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_orthogonalize_in_bfloat16_has_singular_values_near_one(shape, polar_express):
    x = tg.orthogonalize(matrix(*shape, condition=10.0).float()[None], 5, polar_express, torch.bfloat16)
    assert x.dtype == torch.bfloat16
    assert are_near_one(torch.linalg.svdvals(x[0].double()), polar_express)


def test_polar_express_lifts_a_thousandth_of_the_gradient_to_one():
    """What it is for: the classic polynomial leaves directions this weak at a fifth of the step. Weaker ones are
    raised by a factor of about a thousand."""
    values = torch.logspace(-5, -0.01, 400, dtype=torch.float64)
    # Beside its value each matrix has a companion that makes its norm 1, so that `values` are not scaled.
    companions = (1 - values**2).sqrt()
    g = torch.diag_embed(torch.stack((values, companions), dim=1))
    classic = tg.orthogonalize(g, 5, False, torch.float64)[:, 0, 0]
    polar = tg.orthogonalize(g, 5, True, torch.float64)[:, 0, 0]
    assert are_near_one(polar[values >= 1e-3], True)
    assert 800 < float(polar[0] / values[0]) < 1100
    assert float(classic[values >= 1e-3].min()) < 0.5


@any_polynomials
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_of_a_batch_equals_one_by_one(shape, polar_express):
    """Ranks orthogonalize parts of a stack of any size: a matrix must not depend on its neighbours."""
    batch = torch.stack([matrix(*shape, condition=1.0 + i, seed=i).float() * 10**i for i in range(4)])
    single = torch.cat([tg.orthogonalize(g[None], 5, polar_express, torch.float32) for g in batch])
    torch.testing.assert_close(tg.orthogonalize(batch, 5, polar_express, torch.float32), single, atol=1e-3, rtol=0)


@any_polynomials
@pytest.mark.parametrize("steps", [5, 8])
def test_orthogonalize_of_zero_is_zero(steps, polar_express):
    """Gradients of unused weights are zero: the step must not turn them into NaN."""
    assert not tg.orthogonalize(torch.zeros(2, 8, 4), steps, polar_express, torch.float32).any()


# -- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["baseline", "record"])
def test_step_equals_a_plain_reference(hp, record_hp, recipe):
    """Momentum, Nesterov, rows to length 1, orthogonal step, scale by shape, decay: matrix by matrix, no stacks."""
    is_record = recipe == "record"
    hp = record_hp if is_record else hp
    weight_decay = 0.095 if is_record else 0.0
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    weights = [p.detach().clone() for p in params]
    momenta = [torch.zeros(shape) for shape in shapes]
    muon = tg.Muon(params, hp, tg.World())

    for step, (momentum, lr) in enumerate([(0.8, 0.1), (0.9, 0.2), (0.95, 0.05)]):
        for group in muon.param_groups:
            group["momentum"] = momentum
            group["lr"] = lr
        for i, shape in enumerate(shapes):
            g = torch.randn(shape, generator=generator) * 10.0**step
            params[i].grad = g.clone()

            momenta[i] = momentum * momenta[i] + g
            update = g + momentum * momenta[i]
            if is_record:
                update = torch.stack([row / row.norm() for row in update])
            update = tg.orthogonalize(update[None], 5, is_record, DTYPE)[0].float()
            rows_per_column = shape[0] / shape[1]
            weights[i] = (1 - lr * weight_decay) * weights[i] - lr * max(1, rows_per_column) ** 0.5 * update
        muon.step()
        for p, weight in zip(params, weights, strict=True):
            torch.testing.assert_close(p.detach(), weight, atol=ROUNDING, rtol=0)


def first_step(grads: list[Tensor], hp: tg.Hyperparameters, world: tg.World | None = None) -> Tensor:
    """What the first step, at a learning rate of 1, adds to matrices of zeros of one shape. -> (N, R, C)"""
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    tg.Muon(params, dataclasses.replace(hp, matrix_lr=1.0), world or tg.World()).step()
    return torch.stack([p.detach() for p in params])


@pytest.mark.parametrize(("shape", "expected"), [((16, 16), 1.0), ((8, 32), 1.0), ((32, 8), 2.0)])
def test_first_step_of_any_gradient_has_the_length_of_the_learning_rate(hp, shape, expected):
    """It is in units of spectral norm, times sqrt(rows / columns) for tall matrices."""
    [step] = first_step([matrix(*shape, condition=2.0).float() * 100], hp)
    assert are_near_one(torch.linalg.svdvals(step.double()) / expected, polar_express=False)


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)])
def test_length_of_a_row_of_the_gradient_does_not_matter_where_rows_are_normalised(hp, record_hp, shape):
    """MuonEq-R: a neuron with a gradient a million times as large as another's moves as far in the first step."""
    g = matrix(*shape, condition=5.0).float()
    # Powers of two round nothing.
    scaled = g * 2.0 ** torch.linspace(-10, 10, shape[0]).round()[:, None]
    with_normalised_rows = first_step([scaled], record_hp) - first_step([g], record_hp)
    without = first_step([scaled], hp) - first_step([g], hp)
    assert float(with_normalised_rows.abs().max()) < 1e-2 < float(without.abs().max())


def test_row_without_a_gradient_does_not_move(record_hp):
    """Its length is zero, and zero by zero is not a number."""
    g = matrix(16, 32, condition=5.0).float()
    g[3] = 0.0
    step = first_step([g, torch.zeros_like(g)], record_hp)
    assert bool(step.isfinite().all())
    assert not step[0, 3].any()
    assert not step[1].any()
    assert bool(step[0, :3].any())


@pytest.mark.parametrize("size", [2, 3, 8])
def test_shares_of_the_ranks_make_up_the_whole_step(monkeypatch, record_hp, size):
    """Every rank orthogonalizes a part of each stack; together they do each matrix once."""
    grads = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    whole = first_step(grads, record_hp)
    monkeypatch.setattr(tg.World, "sum_all", lambda self, tensors: None)
    shares = torch.stack([first_step(grads, record_hp, tg.World(rank, size)) for rank in range(size)])
    ranks_per_matrix = shares.flatten(2).any(2).sum(0)
    assert (ranks_per_matrix == 1).all()
    torch.testing.assert_close(shares.sum(0), whole, atol=2e-2, rtol=0)


def test_decay_follows_the_learning_rate_of_the_step(hp):
    """At the end of the warmdown nothing decays any more."""
    p = nn.Parameter(torch.ones(4, 4))
    muon = tg.Muon([p], dataclasses.replace(hp, muon_wd=0.5), tg.World())
    for lr, expected in ((0.0, 1.0), (0.2, 0.9)):
        muon.param_groups[0]["lr"] = lr
        p.grad = torch.zeros(4, 4)
        muon.step()
        assert torch.equal(p.detach(), torch.full((4, 4), expected))


# -- which optimizer moves what --------------------------------------------------------------------------------------


def kind(name: str) -> str:
    """What a parameter is to the optimizers, by its name alone."""
    if name == "tok_emb.weight":
        return "embedding"
    matrices = ("c_q.weight", "c_k.weight", "c_v.weight", "attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight")
    return "matrix" if name.endswith(matrices) else "scalar"


@pytest.fixture(params=["baseline", "record"])
def model(request, config, record_config, hp) -> tg.GPT:
    model = tg.GPT(record_config if request.param == "record" else config)
    tg.init_weights(model, hp)
    return model


def test_every_parameter_is_in_exactly_one_group(model, hp):
    """A parameter in no group never learns, and nothing else would show it."""
    owned = []
    for optimizer in tg.build_optimizers(model, hp, tg.World()):
        for group in optimizer.param_groups:
            owned += [id(p) for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


def test_settings_of_the_optimizers_reach_the_parameters_they_are_named_for(model, hp):
    """Gates, though matrices of the blocks, are small and saturate: they belong to AdamW."""
    hp = dataclasses.replace(hp, tied_embed_lr=3.0, matrix_lr=4.0, scalar_lr=5.0, embed_wd=0.1, adam_wd=0.2)
    expected = {
        "matrix": (tg.Muon, 4.0, None),
        "scalar": (torch.optim.AdamW, 5.0, 0.2),
        "embedding": (torch.optim.AdamW, 3.0, 0.1),
    }
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in tg.build_optimizers(model, hp, tg.World()):
        for group in optimizer.param_groups:
            assert group["lr"] == group["base_lr"]
            for p in group["params"]:
                found = (type(optimizer), group["lr"], group.get("weight_decay"))
                assert found == expected[kind(names[p])], names[p]


def test_weights_decay_by_their_rate_times_the_learning_rate_and_by_nothing_else(model, record_hp):
    """Decoupled: after n steps without a gradient, weights are (1 - lr * decay) ** n of what they were."""
    rates = {"matrix_lr": 0.1, "muon_wd": 0.2, "tied_embed_lr": 0.3, "embed_wd": 0.4, "scalar_lr": 0.5, "adam_wd": 0.6}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = tg.build_optimizers(model, dataclasses.replace(record_hp, **rates), tg.World())
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for optimizer in optimizers:
            optimizer.step()
    lost = {"matrix": 0.1 * 0.2, "embedding": 0.3 * 0.4, "scalar": 0.5 * 0.6}
    for name, p in model.named_parameters():
        expected = (1 - lost[kind(name)]) ** 3 * before[name]
        torch.testing.assert_close(p.detach(), expected, atol=0, rtol=1e-5)
