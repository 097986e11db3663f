"""The model against a second implementation, written from its description in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import train_gpt as tg


@pytest.fixture
def ids(config):
    return torch.randint(config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def reference_attention(x, w, config, prefix):
    """One query at a time and one head at a time, rotary positions as complex numbers."""
    n_heads, n_kv, size = config.num_heads, config.num_kv_heads, config.model_dim // config.num_heads
    T = x.size(0)
    turn = torch.tensor(
        [[t * config.rope_base ** (-2 * i / size) for i in range(size // 2)] for t in range(T)], dtype=torch.float64
    )

    def rope(head: torch.Tensor) -> torch.Tensor:
        z = torch.complex(head[:, : size // 2], head[:, size // 2 :]) * torch.polar(torch.ones_like(turn), -turn)
        return torch.cat((z.real, z.imag), dim=1)

    q, k, v = (x @ w[f"{prefix}.{name}.weight"].T for name in ("c_q", "c_k", "c_v"))
    heads = []
    for h in range(n_heads):
        group = h // (n_heads // n_kv)
        mine, theirs = slice(h * size, (h + 1) * size), slice(group * size, (group + 1) * size)
        query = rope(rms(q[:, mine])) * w[f"{prefix}.q_gain"][h]
        key, value = rope(rms(k[:, theirs])), v[:, theirs]
        rows = [torch.softmax(key[: t + 1] @ query[t] / math.sqrt(size), 0) @ value[: t + 1] for t in range(T)]
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ w[f"{prefix}.proj.weight"].T


def reference_logits(model: tg.GPT, ids: torch.Tensor) -> torch.Tensor:
    """(T,) int64 -> (T, V) float64, from the description: U-net of blocks over a normalised embedding."""
    config, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    x0 = rms(w["tok_emb.weight"][ids])
    x, stack, half = x0, [], config.num_layers // 2
    for i in range(config.num_layers):
        if i >= half and stack:
            x = x + w["skip_weights"][i - half] * stack.pop()
        b = f"blocks.{i}"
        x = w[f"{b}.resid_mix"][0] * x + w[f"{b}.resid_mix"][1] * x0
        x = x + w[f"{b}.attn_scale"] * reference_attention(rms(x), w, config, f"{b}.attn")
        hidden = torch.clamp(rms(x) @ w[f"{b}.mlp.fc.weight"].T, min=0) ** 2
        x = x + w[f"{b}.mlp_scale"] * (hidden @ w[f"{b}.mlp.proj.weight"].T)
        if i < half:
            stack.append(x)
    out = w["tok_emb.weight"] if config.tie_embeddings else w["lm_head.weight"]
    return config.logit_softcap * torch.tanh(rms(x) @ out.T / config.logit_softcap)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 1},
        {"num_layers": 4, "mlp_mult": 3},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1, "rope_base": 100.0},
        {"tie_embeddings": False},
    ],
    ids=str,
)
def test_logits_equal_those_of_an_independent_implementation(config, random_model, ids, changes):
    model = random_model(dataclasses.replace(config, **changes))
    expected = torch.stack([reference_logits(model, row) for row in ids])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_no_logit_sees_a_later_token(config, random_model, ids, dtype, tied):
    """A model that sees its target scores a perfect and worthless bpb; equality is exact."""
    model = random_model(dataclasses.replace(config, tie_embeddings=tied))
    model.compute_dtype = dtype
    with torch.no_grad():
        before = model(ids)
        for t in range(1, ids.size(1)):
            changed = ids.clone()
            changed[:, t:] = (changed[:, t:] + 1 + t) % config.vocab_size
            after = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t:], before[:, t:])


def test_rows_of_a_batch_do_not_see_each_other(config, random_model, ids):
    model = random_model(config)
    changed = ids.clone()
    changed[1] = (changed[1] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 16), (1, 40)])
def test_logits_are_float32_of_every_position_and_within_the_softcap(config, random_model, shape):
    model = random_model(dataclasses.replace(config, logit_softcap=0.5))
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        logits = model(torch.zeros(shape, dtype=torch.int64))
    assert (logits.shape, logits.dtype) == ((*shape, config.vocab_size), torch.float32)
    assert 0.4 < float(logits.abs().max()) <= 0.5


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_mean_cross_entropy_of_the_logits(config, random_model, ids, tied):
    """Training and evaluation take different ways through the model and must mean the same."""
    model = random_model(dataclasses.replace(config, tie_embeddings=tied))
    with torch.no_grad():
        log_p = F.log_softmax(model(ids[:, :-1]).double(), dim=-1)
        expected = -log_p.gather(-1, ids[:, 1:, None]).mean()
        assert float(model.loss(ids[:, :-1], ids[:, 1:])) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_initialised_and_the_same_for_the_same_seed(config, hp, tied):
    """A parameter left as it was allocated makes runs differ in ways that no seed repeats."""
    config = dataclasses.replace(config, tie_embeddings=tied)

    def initialised(seed: int) -> tg.GPT:
        model = tg.GPT(config)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(math.nan)
        tg.init_weights(model, dataclasses.replace(hp, seed=seed))
        return model

    first, again, other = (dict(initialised(seed).named_parameters()) for seed in (1, 1, 2))
    assert all(bool(p.isfinite().all()) for p in first.values())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tok_emb.weight"], other["tok_emb.weight"])


def test_new_untied_model_is_uniform(config, hp, ids):
    """The output matrix starts at zero: the first loss is log(V), a check that anyone can make in a log."""
    model = tg.GPT(dataclasses.replace(config, tie_embeddings=False))
    tg.init_weights(model, hp)
    assert float(model.loss(ids, ids).detach()) == pytest.approx(math.log(config.vocab_size), rel=1e-6)


def test_every_parameter_gets_a_gradient(config, random_model, ids):
    model = random_model(config)
    model.loss(ids, ids.flip(0)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def test_model_in_bfloat16_is_close_to_that_in_float32(config, random_model, ids):
    model = random_model(config)
    with torch.no_grad():
        exact = model(ids)
        model.compute_dtype = torch.bfloat16
        assert float((model(ids) - exact).abs().mean()) < 0.1


@pytest.mark.slow
def test_compiled_functions_agree_with_the_plain_ones(config, random_model, ids):
    model = random_model(config)
    plain = model.loss(ids, ids).item(), model(ids).detach()
    loss_fn, logits_fn = tg.compile_model(model, True)
    assert loss_fn(ids, ids).item() == pytest.approx(plain[0], abs=1e-4)
    torch.testing.assert_close(logits_fn(ids).detach(), plain[1], atol=1e-4, rtol=0)
