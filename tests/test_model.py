"""The model against a second implementation, written from its description in float64, and against what it promises."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

import train_gpt as tg

RECORD_ORDER = [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
BOS = 1


@pytest.fixture
def ids(config) -> Tensor:
    """Rows with BOS at the first, the last and adjacent positions, without any, and late in a document's middle."""
    rows = torch.randint(2, config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    rows[0, [0, 5, 6, 15]] = BOS
    rows[2, 9] = BOS
    return rows


class Case(NamedTuple):
    config: tg.GPTConfig
    looping: bool


@pytest.fixture(params=["baseline", "record", "record, not looped yet"])
def case(request, config, record_config) -> Case:
    if request.param == "baseline":
        return Case(config, looping=True)
    return Case(record_config, looping=request.param == "record")


# -- the second implementation ---------------------------------------------------------------------------------------

Weights = dict[str, Tensor]  # by name, float64


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def first_visible(ids: Tensor, config: tg.GPTConfig) -> list[int]:
    """The first position that each position may attend to."""
    positions = []
    start = 0
    for t, token in enumerate(ids.tolist()):
        if config.document_masks and token == config.bos_id:
            start = t
        positions.append(start)
    return positions


def reference_rope(head: Tensor, config: tg.GPTConfig) -> Tensor:
    """Pairs of channels as complex numbers, turned by an angle that grows with the position. (T, E) -> (T, E)"""
    turning = config.rope_dims or config.head_dim
    half = turning // 2
    angles = [[t * config.rope_base ** (-2 * i / turning) for i in range(half)] for t in range(len(head))]
    angle = torch.tensor(angles, dtype=torch.float64)
    z = torch.complex(head[:, :half], head[:, half:turning]) * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat((z.real, z.imag, head[:, turning:]), dim=1)


def reference_attention(x: Tensor, w: Weights, config: tg.GPTConfig, layer: int, first: list[int]) -> Tensor:
    """One head and one query at a time."""
    prefix = f"blocks.{layer}.attn"
    size = config.head_dim
    q = x @ w[f"{prefix}.c_q.weight"].T
    k = x @ w[f"{prefix}.c_k.weight"].T
    v = x @ w[f"{prefix}.c_v.weight"].T

    out = torch.zeros(len(x), config.model_dim, dtype=torch.float64)
    for h in range(config.num_heads):
        group = h // (config.num_heads // config.num_kv_heads)
        of_head = slice(h * size, (h + 1) * size)
        of_group = slice(group * size, (group + 1) * size)
        query = reference_rope(rms(q[:, of_head]), config) * w[f"{prefix}.q_gain"][h]
        key = reference_rope(rms(k[:, of_group]), config)
        value = v[:, of_group]
        for t in range(len(x)):
            visible = slice(first[t], t + 1)
            y = torch.softmax(key[visible] @ query[t] / math.sqrt(size), 0) @ value[visible]
            if layer >= config.num_layers - config.xsa_last_n:
                direction = value[t] / value[t].square().sum().sqrt()
                y = y - (y @ direction) * direction
            if config.sparse_attn_gate_enabled:
                y = y * sigmoid(w[f"{prefix}.gate.weight"][h] @ x[t, :12])
            out[t, of_head] = y
    return out @ w[f"{prefix}.proj.weight"].T


def reference_mlp(x: Tensor, w: Weights, config: tg.GPTConfig, layer: int) -> Tensor:
    hidden = x @ w[f"blocks.{layer}.mlp.fc.weight"].T
    squared = torch.where(hidden > 0, hidden**2, config.leaky_relu_slope**2 * hidden**2)
    return squared @ w[f"blocks.{layer}.mlp.proj.weight"].T


def reference_block(x: Tensor, x0: Tensor, w: Weights, config: tg.GPTConfig, layer: int, first: list[int]) -> Tensor:
    prefix = f"blocks.{layer}"
    scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1
    x = w[f"{prefix}.resid_mix"][0] * x + w[f"{prefix}.resid_mix"][1] * x0
    x = x + w[f"{prefix}.attn_scale"] * reference_attention(scale * rms(x), w, config, layer, first)
    return x + w[f"{prefix}.mlp_scale"] * reference_mlp(scale * rms(x), w, config, layer)


def reference_embedding(ids: Tensor, w: Weights, config: tg.GPTConfig) -> Tensor:
    e = w["tok_emb.weight"][ids]
    smeared = e.clone()
    if config.smear_gate_enabled:
        for t in range(1, len(ids)):
            if ids[t] != config.bos_id:
                smeared[t] = e[t] + w["smear_scale"] * sigmoid(w["smear_gate.weight"][0] @ e[t, :12]) * e[t - 1]
    return rms(smeared)


def reference_logits(model: tg.GPT, ids: Tensor, looping: bool) -> Tensor:
    """(T,) int64 -> (T, V) float64, from the description: U-net of blocks over a normalised embedding."""
    config = model.config
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    order = list(range(config.num_layers))
    if looping and config.num_loops:
        loop = list(range(config.loop_start, config.loop_end + 1))
        order = order[: loop[0]] + (1 + config.num_loops) * loop + order[loop[-1] + 1 :]

    first = first_visible(ids, config)
    x0 = reference_embedding(ids, w, config)
    x = x0
    half = len(order) // 2
    skips: list[Tensor] = []
    for i, layer in enumerate(order):
        if i >= half and skips:
            skip = w["skip_weights"][i - half] * skips.pop()
            if config.skip_gates_enabled:
                gate = sigmoid(w["skip_gates"][i - half])
                x = gate * x + (1 - gate) * skip
            else:
                x = x + skip
        x = reference_block(x, x0, w, config, layer, first)
        if i < half:
            skips.append(x)
    return config.logit_softcap * torch.tanh(rms(x) @ w["tok_emb.weight"].T / config.logit_softcap)


def assert_equals_reference(model: tg.GPT, ids: Tensor, looping: bool = True) -> None:
    expected = torch.stack([reference_logits(model, row, looping) for row in ids])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, looping).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 1},
        {"num_layers": 4, "mlp_mult": 3},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1, "rope_base": 100.0},
        {"leaky_relu_slope": 0.5},
        {"rope_dims": 4},
        {"rope_dims": 8},
        {"ln_scale": True},
        {"xsa_last_n": 2},
        {"xsa_last_n": 200, "num_kv_heads": 1},
        {"sparse_attn_gate_enabled": True},
        {"smear_gate_enabled": True},
        {"smear_gate_enabled": True, "sparse_attn_gate_enabled": True, "model_dim": 8},  # fewer than 12 channels
        {"skip_gates_enabled": True},
        {"document_masks": True},
        {"num_loops": 1, "loop_start": 2, "loop_end": 2},
        {"num_loops": 3, "loop_start": 0, "loop_end": 4, "ln_scale": True, "skip_gates_enabled": True},
        {"num_loops": 2, "loop_start": 3, "loop_end": 4, "xsa_last_n": 1},
    ],
    ids=str,
)
def test_logits_equal_those_of_an_independent_implementation(config, random_model, ids, changes):
    """Every technique alone on top of the baseline; the tolerance is the rounding of float32."""
    assert_equals_reference(random_model(dataclasses.replace(config, **changes)), ids)


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1}, {"document_masks": False}], ids=str)
def test_logits_with_all_techniques_equal_those_of_the_independent_implementation(
    record_config, random_model, ids, looping, changes
):
    assert_equals_reference(random_model(dataclasses.replace(record_config, **changes)), ids, looping)


def test_logits_of_a_long_row_equal_those_of_the_independent_implementation(record_config, random_model):
    """Long enough for several blocks of queries, with documents that end inside of them and at their edges."""
    row = torch.randint(2, 64, (1, 290), generator=torch.Generator().manual_seed(2))
    row[0, [3, 120, 128, 129, 250]] = BOS
    config = dataclasses.replace(record_config, num_layers=3, num_loops=0, xsa_last_n=2)
    assert_equals_reference(random_model(config), row)


# -- what no token may look at ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_logit_sees_a_later_token(case, random_model, ids, dtype):
    """A model that sees its target scores a perfect and worthless bpb; equality is exact."""
    model = random_model(dataclasses.replace(case.config, compute_dtype=dtype))
    with torch.no_grad():
        before = model(ids, case.looping)
        for t in range(1, ids.size(1)):
            changed = ids.clone()
            changed[:, t:] = (changed[:, t:] + 1 + t) % model.config.vocab_size
            after = model(changed, case.looping)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t:], before[:, t:])


def test_gradient_of_a_loss_reaches_no_later_token(record_config, random_model):
    """The same for training, over several blocks of queries.

    Token t of the row is t + 2, so that rows of the embedding are positions. The target is none of these tokens.
    """
    target = 399
    model = random_model(dataclasses.replace(record_config, vocab_size=400))
    ids = torch.arange(2, 302)[None]
    for t in (0, 127, 128, 200, 299):
        model.zero_grad()
        model(ids)[0, t, target].backward()
        reached = model.tok_emb.weight.grad.any(1)
        assert bool(reached[2 : t + 3].all())
        assert not bool(reached[t + 3 : target].any())


def test_rows_of_a_batch_do_not_see_each_other(case, random_model, ids):
    model = random_model(case.config)
    changed = ids.clone()
    changed[1] = (changed[1] + 1) % 64
    with torch.no_grad():
        before = model(ids, case.looping)
        after = model(changed, case.looping)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def packed(lengths: tuple[int, ...], seed: int = 0) -> tuple[Tensor, list[slice]]:
    """A row of documents of these lengths, each of them beginning with a BOS. -> (1, T) ids, where the documents are"""
    ids = torch.randint(2, 64, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    documents = []
    start = 0
    for length in lengths:
        ids[0, start] = BOS
        documents.append(slice(start, start + length))
        start += length
    return ids, documents


@pytest.mark.parametrize("lengths", [(7, 1, 9, 1, 1, 12), (100, 60, 130, 3, 140)])
def test_document_of_a_packed_row_gets_the_logits_it_gets_alone(record_config, random_model, lengths):
    """Only then is the score of a packed evaluation that of one document after the other."""
    model = random_model(record_config)
    ids, documents = packed(lengths)
    with torch.no_grad():
        together = model(ids)
        for document in documents:
            torch.testing.assert_close(together[:, document], model(ids[:, document]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("lengths", [(7, 1, 9, 1, 1, 12), (100, 60, 130, 3, 140)])
def test_logits_of_a_document_do_not_change_with_its_neighbours(record_config, random_model, lengths):
    """Not by a bit: what is masked is absent, and every technique that looks back stops at the BOS."""
    model = random_model(record_config)
    ids, documents = packed(lengths)
    others, _ = packed(lengths, seed=1)
    with torch.no_grad():
        before = model(ids)
        for document in documents:
            changed = others.clone()
            changed[:, document] = ids[:, document]
            assert torch.equal(model(changed)[:, document], before[:, document])


def test_baseline_looks_across_documents(config, random_model):
    """As the published one does; the tests above would pass on a model that looks nowhere."""
    ids, documents = packed((8, 8))
    changed = ids.clone()
    changed[0, 3] = 2 + (changed[0, 3] - 1) % 62
    model = random_model(config)
    with torch.no_grad():
        assert not torch.equal(model(ids)[:, documents[1]], model(changed)[:, documents[1]])


def test_smear_gate_never_mixes_across_a_bos(record_config, random_model):
    """The token before a BOS belongs to another document; any other token is mixed into the next one."""
    model = random_model(record_config)
    ids, _ = packed((5, 1, 1, 4))
    with torch.no_grad():
        before = model.embed(ids)
        for t in range(ids.size(1) - 1):
            changed = ids.clone()
            changed[0, t] = 2 + (changed[0, t] + 1) % 60
            moved = (model.embed(changed) != before).any(-1)[0].nonzero().flatten().tolist()
            assert moved == ([t] if ids[0, t + 1] == BOS else [t, t + 1])


# -- the techniques --------------------------------------------------------------------------------------------------


class AttentionOutput(NamedTuple):
    by_heads: Tensor  # (B, T, H, E), before the output matrix
    own_values: Tensor  # (B, T, H, E)


def attention_outputs(model: tg.GPT, ids: Tensor) -> list[AttentionOutput]:
    """Of every attention that runs, in the order of execution."""
    config = model.config
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    hooks = []
    for block in model.blocks:
        hooks.append(block.attn.c_v.register_forward_hook(lambda module, args, out: values.append(out)))
        hooks.append(block.attn.proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0])))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()

    found = []
    for y, v in zip(outputs, values, strict=True):
        v = v.unflatten(-1, (-1, config.head_dim)).repeat_interleave(config.num_heads // config.num_kv_heads, dim=2)
        found.append(AttentionOutput(y.unflatten(-1, (-1, config.head_dim)), v))
    return found


def test_output_of_a_head_is_orthogonal_to_its_own_value_in_the_last_layers(record_config, random_model, ids):
    """Exclusive self attention: a token learns from others only. A document's first one has no others."""
    order = record_config.layer_order(looping=True)
    is_first = (ids == BOS) | (torch.arange(16) == 0)
    layers = attention_outputs(random_model(record_config), ids)
    assert len(layers) == len(order)
    for layer, (y, v) in zip(order, layers, strict=True):
        along = (y * v).sum(-1) / v.norm(dim=-1)
        if layer == 0:  # of 7 layers the last 6 are exclusive
            assert float(along[is_first].abs().min()) > 1e-3
            continue
        assert float(along.abs().max()) < 1e-5
        assert float(y[is_first].abs().max()) < 1e-5
        assert float(y[~is_first].abs().amax(-1).min()) > 1e-4


def test_layers_run_in_the_order_of_the_description():
    """First pass and extra passes through layers 3 to 5 of 11; the first half feeds the second, last to first."""
    config = tg.GPTConfig()
    assert config.layer_order(looping=True) == RECORD_ORDER
    assert config.layer_order(looping=False) == list(range(11))
    assert tg.GPT(dataclasses.replace(config, model_dim=32, rope_dims=4, vocab_size=8)).skip_weights.shape == (8, 32)


def unrolled(model: tg.GPT, order: list[int]) -> tg.GPT:
    """A model without loops whose blocks are copies of those of `model`, in this order.

    The scale of a layer's normalised inputs goes by the number of the layer it is a copy of, which the new model does
    not know: it goes into the matrices that read them.
    """
    n_layers = len(order)
    config = dataclasses.replace(model.config, num_layers=n_layers, xsa_last_n=n_layers, num_loops=0, ln_scale=False)
    other = tg.GPT(config)
    outside_blocks = {name: p for name, p in model.state_dict().items() if not name.startswith(("blocks.", "skip_"))}
    other.load_state_dict(outside_blocks, strict=False)
    n_skips = n_layers // 2
    other.skip_weights = nn.Parameter(model.skip_weights.detach()[:n_skips].clone())
    other.skip_gates = nn.Parameter(model.skip_gates.detach()[:n_skips].clone())
    other.blocks = nn.ModuleList(copy.deepcopy(model.blocks[layer]) for layer in order)
    with torch.no_grad():
        for layer, block in zip(order, other.blocks, strict=True):
            for reader in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.attn.gate, block.mlp.fc):
                reader.weight *= (layer + 1) ** -0.5
    return other


@pytest.fixture
def eleven_layers(record_config, random_model) -> tg.GPT:
    """PRESET=record but for its width."""
    changes = {"num_layers": 11, "xsa_last_n": 11, "loop_start": 3, "loop_end": 5}
    return random_model(dataclasses.replace(record_config, **changes))


@pytest.mark.parametrize(("looping", "order"), [(True, RECORD_ORDER), (False, list(range(11)))], ids=["on", "off"])
def test_looped_layers_equal_copies_that_share_their_weights(eleven_layers, ids, looping, order):
    """Logits, and gradients too: that of a shared matrix is the sum of those of its copies."""
    other = unrolled(eleven_layers, order)
    torch.testing.assert_close(eleven_layers(ids, looping), other(ids), atol=2e-5, rtol=0)

    eleven_layers.loss(ids, ids.flip(1), looping).backward()
    other.loss(ids, ids.flip(1)).backward()
    for layer, block in enumerate(eleven_layers.blocks):
        copies = [other.blocks[i] for i, source in enumerate(order) if source == layer]
        for name, p in block.named_parameters():
            if name.endswith("proj.weight") or p.ndim == 1:  # the others are scaled in the copies
                total = sum(dict(c.named_parameters())[name].grad for c in copies)
                torch.testing.assert_close(p.grad, total, atol=2e-5, rtol=2e-3)
    n_skips = len(order) // 2
    torch.testing.assert_close(eleven_layers.skip_gates.grad[:n_skips], other.skip_gates.grad, atol=2e-5, rtol=2e-3)
    assert not eleven_layers.skip_gates.grad[n_skips:].any()


def test_model_without_loops_is_the_looped_one_before_it_loops(eleven_layers, ids):
    """To the bit: switching the loop off at first must change nothing else."""
    other = tg.GPT(dataclasses.replace(eleven_layers.config, num_loops=0))
    state = eleven_layers.state_dict()
    cut = {name: p[:5] for name, p in state.items() if name.startswith("skip_")}
    other.load_state_dict({**state, **cut})
    with torch.no_grad():
        assert torch.equal(eleven_layers(ids, looping=False), other(ids))


# -- initial values --------------------------------------------------------------------------------------------------


def initialised(config: tg.GPTConfig, hp: tg.Hyperparameters) -> tg.GPT:
    model = tg.GPT(config)
    tg.init_weights(model, hp)
    return model


def test_gates_start_half_open_and_nothing_is_smeared(record_config, record_hp, ids):
    """Half the stream and half the skip; half of what a head reads; the embedding of a token alone."""
    model = initialised(record_config, record_hp)
    plain = initialised(dataclasses.replace(record_config, smear_gate_enabled=False), record_hp)
    x, skip = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        for index in range(len(model.skip_weights)):
            merged = tg.merge_skip(x, skip, model.skip_weights[index], model.skip_gates[index])
            torch.testing.assert_close(merged, (x + skip) / 2, atol=1e-6, rtol=0)
        for block in model.blocks:
            assert torch.equal(block.attn.gate(x), torch.full((3, 16, 4), 0.5))
        assert torch.equal(model.embed(ids), plain.embed(ids))


def test_scalars_start_at_the_values_of_the_description(record_config, record_hp):
    """The stream passes unchanged; all of the skips, of attention and of the MLP is added."""
    model = initialised(record_config, dataclasses.replace(record_hp, qk_gain_init=5.25))
    ones = torch.ones(32)
    assert torch.equal(model.skip_weights, torch.ones(5, 32))
    for block in model.blocks:
        assert torch.equal(block.resid_mix, torch.stack((ones, torch.zeros(32))))
        assert torch.equal(block.attn_scale, ones)
        assert torch.equal(block.mlp_scale, ones)
        assert torch.equal(block.attn.q_gain, torch.full((4,), 5.25))


def test_new_model_predicts_as_if_it_had_no_layers(record_config, record_hp, ids):
    """Whatever the skips and loops: every block starts as the identity, up to a factor."""
    model = initialised(record_config, record_hp)
    e = model.tok_emb.weight.detach().double()
    expected = 5 * torch.tanh(rms(rms(e[ids])) @ e.T / 5)
    for looping in (False, True):
        torch.testing.assert_close(model(ids, looping).detach().double(), expected, atol=1e-5, rtol=0)


def test_every_parameter_is_initialised_and_the_same_for_the_same_seed(case, hp):
    """A parameter left as it was allocated makes runs differ in ways that no seed repeats."""

    def parameters(seed: int) -> dict[str, Tensor]:
        model = tg.GPT(case.config)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(math.nan)
        tg.init_weights(model, dataclasses.replace(hp, seed=seed))
        return dict(model.named_parameters())

    first = parameters(seed=1)
    again = parameters(seed=1)
    other = parameters(seed=2)
    assert all(bool(p.isfinite().all()) for p in first.values())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tok_emb.weight"], other["tok_emb.weight"])


# -- kinds of attention ----------------------------------------------------------------------------------------------


class AttentionInputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor  # (B, T), 1 where a document begins
    config: tg.GPTConfig


@st.composite
def attention_inputs(draw) -> AttentionInputs:
    """With as many heads for queries as for keys or more, and documents of any length, or none."""
    B = draw(st.integers(1, 2))
    T = draw(st.integers(1, 400))
    K = draw(st.integers(1, 2))
    H = K * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    q = torch.randn(B, H, T, 8, generator=generator)
    k, v = torch.randn(2, B, K, T, 8, generator=generator).unbind()
    is_bos = torch.rand(B, T, generator=generator) < draw(st.sampled_from([0.0, 0.01, 0.1, 1.0]))
    config = tg.GPTConfig(document_masks=draw(st.booleans()))
    return AttentionInputs(q, k, v, torch.where(is_bos, config.bos_id, 5), config)


def output_and_gradients(attention, inputs: AttentionInputs) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    y = attention(*leaves)
    (y * torch.arange(8.0)).sum().backward()
    return [y.detach(), *(x.grad for x in leaves)]


@settings(max_examples=25)
@given(attention_inputs(), st.sampled_from(["blocks", "sdpa"]))
def test_every_kind_of_attention_sees_a_document_up_to_the_token(inputs, kind):
    """Outputs and gradients against float64 with a mask made pair by pair. FlexAttention: tests/test_cuda.py."""
    mask = tg.attention_mask(inputs.ids, inputs.config, torch.float32, kind)
    found = output_and_gradients(lambda q, k, v: tg.attend(q, k, v, mask), inputs)

    document = (inputs.ids == 1).cumsum(1) * inputs.config.document_masks
    position = torch.arange(inputs.ids.size(1))
    visible = (document[:, None, :, None] == document[:, None, None, :]) & (position[:, None] >= position)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n_groups = q.size(1) // k.size(1)
        k = k.double().repeat_interleave(n_groups, 1)
        v = v.double().repeat_interleave(n_groups, 1)
        scores = q.double() @ k.mT / math.sqrt(8)
        return scores.masked_fill(~visible, -math.inf).softmax(-1) @ v

    for one, expected in zip(found, output_and_gradients(reference, inputs), strict=True):
        torch.testing.assert_close(one.double(), expected.double(), atol=1e-4, rtol=1e-4)


@settings(max_examples=15)
@given(st.integers(1, 2), st.sampled_from([1, 100, 128, 256, 300, 512]), st.sampled_from([0.0, 0.004, 0.03, 1.0]))
def test_mask_of_blocks_is_what_torch_makes_of_all_pairs(n_rows, seq_len, share_of_bos):
    """Which blocks FlexAttention looks at, and which of them in detail, forward and backward."""
    config = tg.GPTConfig()
    generator = torch.Generator().manual_seed(seq_len)
    ids = torch.where(torch.rand(n_rows, seq_len, generator=generator) < share_of_bos, config.bos_id, 5)
    found = tg.attention_mask(ids, config, torch.float32, "flex")

    document = (ids == 1).cumsum(1)
    expected = create_block_mask(
        lambda b, h, i, j: (i >= j) & (document[b, i] == document[b, j]), n_rows, None, seq_len, seq_len, device="cpu"
    )
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        for part in (name, name.replace("kv", "q")):
            one, other = getattr(found, part), getattr(expected, part)
            assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
            assert torch.equal(one, other), part
    assert (found.seq_lengths, found.BLOCK_SIZE) == (expected.seq_lengths, expected.BLOCK_SIZE)
    i, j = torch.randint(seq_len, (2, 50), generator=generator)
    row, head = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(found.mask_mod(row, head, i, j), expected.mask_mod(row, head, i, j))


@pytest.mark.parametrize(
    ("device", "compiled", "changes", "expected"),
    [
        ("cpu", True, {}, "blocks"),
        ("cpu", False, {"document_masks": False}, "blocks"),
        ("cuda", True, {}, "flex"),
        ("cuda", False, {}, "sdpa"),  # FlexAttention that is not compiled computes all scores
        ("cuda", True, {"document_masks": False}, "sdpa"),
        ("cuda", True, {"num_heads": 64, "num_kv_heads": 64, "rope_dims": 8}, "sdpa"),  # heads of 8 channels
        ("mps", True, {}, "sdpa"),
    ],
)
def test_kind_of_attention_is_what_works_there(device, compiled, changes, expected):
    config = dataclasses.replace(tg.GPTConfig(), **changes)
    assert tg.attention_kind(config, torch.device(device), compiled) == expected


# -- logits, loss and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1, 40)])
def test_logits_are_float32_of_every_position_and_within_the_softcap(case, random_model, shape):
    model = random_model(dataclasses.replace(case.config, logit_softcap=0.5, compute_dtype="bfloat16"))
    with torch.no_grad():
        logits = model(torch.zeros(shape, dtype=torch.int64), case.looping)
    assert (logits.shape, logits.dtype) == ((*shape, model.config.vocab_size), torch.float32)
    assert 0.4 < float(logits.abs().max()) <= 0.5


def test_loss_is_the_mean_cross_entropy_of_the_logits(case, random_model, ids):
    """Training and evaluation take different ways through the model and must mean the same."""
    model = random_model(case.config)
    inputs = ids[:, :-1]
    targets = ids[:, 1:]
    with torch.no_grad():
        log_p = torch.log_softmax(model(inputs, case.looping).double(), dim=-1)
        expected = -log_p.gather(-1, targets[..., None]).mean()
        assert float(model.loss(inputs, targets, case.looping)) == pytest.approx(float(expected), rel=1e-5)


def test_every_parameter_gets_a_gradient(case, random_model, ids):
    model = random_model(case.config)
    model.loss(ids, ids.flip(0), case.looping).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == []


def test_model_in_bfloat16_is_close_to_that_in_float32(case, random_model, ids):
    logits = {}
    for dtype in ("float32", "bfloat16"):
        model = random_model(dataclasses.replace(case.config, compute_dtype=dtype))
        with torch.no_grad():
            logits[dtype] = model(ids, case.looping)
    assert 0 < float((logits["bfloat16"] - logits["float32"]).abs().mean()) < 0.1


# -- reading in parts ------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=25)
@pytest.mark.parametrize("recipe", ["config", "record_config"])
def test_text_read_in_parts_gives_the_logits_of_the_whole(request, random_model, recipe, data):
    """Whatever the parts, the documents and the length: 150 tokens are more than a block of queries, and than the
    context of the evaluation."""
    config = request.getfixturevalue(recipe)
    model = random_model(config)
    length = data.draw(st.sampled_from([1, 2, 17, 150]))
    ids = torch.randint(0, data.draw(st.sampled_from([4, 64])), (2, length), generator=torch.Generator().manual_seed(1))
    cuts = data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=6))
    bounds = sorted({0, length, *(cut for cut in cuts if cut < length)})

    cache = tg.Cache(model, n_rows=2)
    with torch.no_grad():
        whole = model(ids)
        parts = [model(ids[:, begin:end], cache=cache) for begin, end in itertools.pairwise(bounds)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("recipe", ["config", "record_config"])
def test_text_read_token_by_token_gives_the_logits_of_the_whole(request, random_model, ids, recipe):
    model = random_model(request.getfixturevalue(recipe))
    cache = tg.Cache(model, n_rows=len(ids))
    with torch.no_grad():
        parts = [model(column[:, None], cache=cache) for column in ids.unbind(1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=2e-5, rtol=0)


# -- compiled models -------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch) -> Iterator[list[torch.fx.GraphModule]]:
    """torch.compile without its code generator, which takes a minute. -> the graphs, as they are traced"""
    graphs: list[torch.fx.GraphModule] = []

    def run_as_it_is(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=run_as_it_is))
    torch.compiler.reset()
    tg.piece.cache_clear()
    yield graphs
    tg.piece.cache_clear()


@pytest.mark.parametrize("num_loops", [0, 1])
def test_pieces_are_traced_once_for_all_layers_and_both_orders(record_config, random_model, ids, traced, num_loops):
    """Embedding, loss, skip connections, and blocks with and without exclusive attention. A piece that is compiled
    after training has begun costs seconds of ten minutes, and one that cannot be traced ends the run."""
    config = dataclasses.replace(record_config, num_layers=4, xsa_last_n=2, num_loops=num_loops, loop_end=1)
    model = random_model(config)
    for looping in (True, False, True):
        plain = model.loss(ids, ids, looping).item()
        assert model.loss(ids, ids, looping, compiled=True).item() == pytest.approx(plain, abs=1e-5)
        assert len(traced) == 5


def test_compiled_model_takes_every_shape_of_a_run(record_config, random_model, traced):
    """Two sizes of micro-batches, with and without loops, validation, and the loaded model: the compiler gives up, and
    with it the run, after so many versions of one function."""
    config = dataclasses.replace(record_config, num_layers=4, xsa_last_n=3)
    model = random_model(config)
    for looping in (False, True):
        for rows in (3, 2):
            ids, targets = torch.randint(64, (2, rows, 16)).unbind()
            model.loss(ids, targets, looping, compiled=True).backward()
        with torch.no_grad():
            model(torch.randint(64, (4, 16)), looping, compiled=True)

    loaded = random_model(config)
    ids = torch.randint(64, (4, 16))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, compiled=True), model(ids), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["config", "record_config"])
def test_compiled_functions_agree_with_the_plain_ones(request, random_model, ids, recipe):
    model = random_model(request.getfixturevalue(recipe))
    loss = model.loss(ids, ids).item()
    logits = model(ids).detach()
    assert model.loss(ids, ids, compiled=True).item() == pytest.approx(loss, abs=1e-4)
    torch.testing.assert_close(model(ids, compiled=True).detach(), logits, atol=1e-4, rtol=0)
