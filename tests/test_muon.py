"""The optimizer against singular value decompositions and a plain reference of its update."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import train_gpt as tg

SHAPES = [(16, 16), (16, 40), (40, 16), (1, 8), (8, 1)]


def matrix(rows: int, columns: int, condition: float, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall geometrically from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64)).Q
    return (u * torch.logspace(0, -1, n, base=condition, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("condition", [1.0, 3.0, 10.0, 50.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_orthogonalize_keeps_singular_vectors_and_moves_values_near_one(rows, columns, condition, scale):
    g = matrix(rows, columns, condition) * scale
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    x = tg.orthogonalize(g.float()[None], 5, torch.float32)[0].double()
    values = u.T @ x @ vt.T  # diagonal if the singular vectors were kept
    assert x.shape == g.shape
    assert 0.6 <= float(values.diagonal().min()) <= float(values.diagonal().max()) <= 1.3
    torch.testing.assert_close(u @ values.diagonal().diag() @ vt, x, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("rows", "columns"), SHAPES[:3])
def test_orthogonalize_in_bfloat16_has_singular_values_near_one(rows, columns):
    x = tg.orthogonalize(matrix(rows, columns, 10.0).float()[None], 5)
    assert x.dtype == torch.bfloat16
    values = torch.linalg.svdvals(x[0].double())
    assert 0.6 <= float(values.min()) <= float(values.max()) <= 1.3


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_orthogonalize_of_a_batch_equals_one_by_one(rows, columns):
    """Ranks orthogonalize parts of a stack of any size: a matrix must not depend on its neighbours."""
    batch = torch.stack([matrix(rows, columns, 1.0 + i, seed=i).float() * 10**i for i in range(4)])
    single = torch.cat([tg.orthogonalize(g[None], 5, torch.float32) for g in batch])
    torch.testing.assert_close(tg.orthogonalize(batch, 5, torch.float32), single, atol=1e-4, rtol=0)


def test_orthogonalize_of_zero_is_zero():
    """Gradients of unused weights are zero: the step must not turn them into NaN."""
    assert not tg.orthogonalize(torch.zeros(2, 8, 4), 5, torch.float32).any()


def test_step_equals_a_plain_reference():
    """Momentum, Nesterov, orthogonal step, scale by shape: matrix by matrix, without stacks."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    weights, momenta = [p.detach().clone() for p in params], [torch.zeros(shape) for shape in shapes]
    muon = tg.Muon(params, lr=0.1, momentum=0.9, steps=5, world=tg.World())
    dtype = torch.bfloat16 if tg.pick_dtype(torch.device("cpu")) == torch.bfloat16 else torch.float32
    for step, momentum in enumerate((0.8, 0.9, 0.95)):
        for group in muon.param_groups:
            group["momentum"] = momentum
        for i, (p, shape) in enumerate(zip(params, shapes, strict=True)):
            g = torch.randn(shape, generator=generator) * 10.0**step
            momenta[i] = momentum * momenta[i] + g
            update = tg.orthogonalize((g + momentum * momenta[i])[None], 5, dtype)[0].float()
            weights[i] = weights[i] - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * update
            p.grad = g.clone()
        muon.step()
        for p, weight in zip(params, weights, strict=True):
            torch.testing.assert_close(p.detach(), weight, atol=5e-3 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_first_step_of_any_gradient_has_the_length_of_the_learning_rate():
    """lr is in units of spectral norm, times sqrt(rows / columns) for tall matrices."""
    for shape, expected in (((16, 16), 0.5), ((8, 32), 0.5), ((32, 8), 1.0)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = matrix(*shape, condition=2.0).float() * 100
        tg.Muon([p], lr=0.5, momentum=0.95, steps=5, world=tg.World()).step()
        values = torch.linalg.svdvals(p.detach().double())
        assert 0.6 * expected <= float(values.min()) <= float(values.max()) <= 1.3 * expected


@pytest.mark.parametrize("size", [2, 3, 8])
def test_shares_of_the_ranks_make_up_the_whole_step(monkeypatch, size):
    """Every rank orthogonalizes a part of each stack; together they do each matrix once."""
    grads = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]

    def updates(world: tg.World) -> torch.Tensor:
        params = [nn.Parameter(torch.zeros(6, 4)) for _ in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        tg.Muon(params, lr=1.0, momentum=0.9, steps=5, world=world).step()
        return torch.stack([p.detach() for p in params])

    whole = updates(tg.World())
    monkeypatch.setattr(tg.World, "sum_all", lambda self, tensors: None)
    parts = torch.stack([updates(tg.World(rank, size)) for rank in range(size)])
    assert (parts.flatten(2).any(2).sum(0) == 1).all()
    torch.testing.assert_close(parts.sum(0), whole, atol=2e-2, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_group(config, hp, tied):
    """A parameter in no group never learns, and nothing else would show it."""
    model = tg.GPT(dataclasses.replace(config, tie_embeddings=tied))
    tg.init_weights(model, hp)
    optimizers = tg.build_optimizers(model, hp, tg.World())
    owned = [id(p) for opt in optimizers for group in opt.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_learning_rates_reach_the_parameters_they_are_named_for(config, hp, tied):
    hp = dataclasses.replace(hp, embed_lr=1.0, head_lr=2.0, tied_embed_lr=3.0, matrix_lr=4.0, scalar_lr=5.0)
    model = tg.GPT(dataclasses.replace(config, tie_embeddings=tied))
    tg.init_weights(model, hp)
    groups = [group for opt in tg.build_optimizers(model, hp, tg.World()) for group in opt.param_groups]
    rate = {id(p): (group["lr"], group["base_lr"]) for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        expected = 4.0 if name.startswith("blocks.") and p.ndim == 2 and not name.endswith("resid_mix") else 5.0
        expected = {"tok_emb.weight": 3.0 if tied else 1.0, "lm_head.weight": 2.0}.get(name, expected)
        assert rate[id(p)] == (expected, expected), name
