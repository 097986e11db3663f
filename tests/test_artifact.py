"""The artifact: what is scored is what was written, and no file, damaged or hostile, does worse than a ValueError."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import re
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

PREFIX = struct.Struct("<8sII")
IDS = torch.arange(12).view(2, 6) % 8


@pytest.fixture(scope="module")
def small_config() -> tg.GPTConfig:
    """All techniques, so that every kind of tensor is stored: 2 layers, run as 0 0 1."""
    parts = {"rope_dims": 2, "num_loops": 1, "loop_start": 0, "loop_end": 0}
    shape = {"vocab_size": 8, "num_layers": 2, "model_dim": 4, "num_heads": 2, "num_kv_heads": 1, "mlp_mult": 1}
    return tg.GPTConfig(**shape, **parts, eval_seq_len=6)


@pytest.fixture(scope="module")
def packed(small_config, random_model) -> bytes:
    return tg.pack_artifact(random_model(small_config))


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> Callable[[bytes], str]:
    """A function that expects a file of these bytes to be refused, by name. -> the message"""
    path = tmp_path_factory.mktemp("artifact") / "hostile.ptz"

    def check(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            tg.load_artifact(path)
        return str(caught.value)

    return check


def take_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    """-> header, payload"""
    length = PREFIX.unpack_from(data)[2]
    return json.loads(zlib.decompress(data[16 : 16 + length])), zlib.decompress(data[16 + length :])


def entry(header: dict[str, Any], tensor: str) -> list[Any]:
    """Of the tensor table: [name, kind, shape]."""
    return next(row for row in header["tensors"] if row[0] == tensor)


def put_together(header: Any, payload: bytes, compress: Callable[[bytes], bytes] = zlib.compress) -> bytes:
    """A file with a valid checksum, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = text + compress(payload)
    return PREFIX.pack(b"GOLFGPT\n", zlib.crc32(body), len(text)) + body


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0, 1e5])
def test_quantization_error_is_at_most_half_a_step(scale):
    """Nothing is clipped: the bound holds for the largest weight of a row too."""
    w = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)) * scale
    w[0], w[1, 1:] = 0.0, 0.0
    q, s = tg.quantize_rows(w)
    assert (q.dtype, q.shape, s.dtype, s.shape) == (torch.int8, w.shape, torch.float16, (50, 1))
    error = (q.double() * s.double() - w.double()).abs()
    assert bool((error <= s.double() * 0.5001).all())
    largest = w.abs().amax(1, keepdim=True)
    assert bool((s.float() <= (largest / 127 * 1.001).clamp_min(2.0**-14)).all())


def test_bytes_describe_themselves_and_load_in_another_module(packed, small_config, tmp_path):
    """Tools load a script by path: the file must not depend on the name of the module that wrote it."""
    spec = importlib.util.spec_from_file_location("other", Path(tg.__file__))
    other = importlib.util.module_from_spec(spec)
    sys.modules["other"] = other  # dataclasses look their module up
    spec.loader.exec_module(other)
    (tmp_path / "a.ptz").write_bytes(packed)
    theirs, ours = other.load_artifact(tmp_path / "a.ptz"), tg.load_artifact(tmp_path / "a.ptz")
    del sys.modules["other"]
    assert type(theirs).__module__ == "other"
    assert dataclasses.asdict(theirs.config) == dataclasses.asdict(ours.config) == dataclasses.asdict(small_config)
    assert torch.equal(theirs(IDS), ours(IDS))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"num_layers": 1},
        {"num_loops": 0},
        {"eval_stride": 3, "tokenizer_sha256": "a" * 64},
    ],
    ids=str,
)
def test_loaded_model_has_the_weights_dequantized(small_config, random_model, tmp_path, changes):
    """Matrices come back as q * scale, everything else to the bit, and the config whole."""
    config = dataclasses.replace(small_config, **changes)
    model = random_model(config)
    (tmp_path / "a.ptz").write_bytes(tg.pack_artifact(model))
    loaded = tg.load_artifact(tmp_path / "a.ptz")
    assert loaded.config == config
    assert not loaded.training
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".weight"):
                q, scale = tg.quantize_rows(p)
                p.copy_(q.float() * scale.float())
    for name, p in loaded.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, dict(model.named_parameters())[name]), name
    model.compute_dtype = loaded.compute_dtype
    assert torch.equal(model(IDS), loaded(IDS))


def test_packing_is_deterministic_and_repeats_after_loading(packed, tmp_path):
    """Quantizing what was quantized changes nothing: an artifact can be packed again."""
    (tmp_path / "a.ptz").write_bytes(packed)
    header, payload = take_apart(tg.pack_artifact(tg.load_artifact(tmp_path / "a.ptz")))
    first, first_payload = take_apart(packed)
    assert header == first
    assert np.abs(np.frombuffer(payload, np.uint8) != np.frombuffer(first_payload, np.uint8)).mean() < 0.02


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_weights_that_cannot_be_stored_are_refused_by_name(small_config, random_model, value):
    model = random_model(small_config)
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc\.weight"):
        tg.pack_artifact(model)


def test_missing_artifact_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ptz"):
        tg.load_artifact(tmp_path / "none.ptz")
    with pytest.raises(FileNotFoundError):
        tg.load_artifact(tmp_path)


def test_file_cut_anywhere_is_refused(packed, refused):
    for n in range(len(packed)):
        refused(packed[:n])


def test_file_with_bytes_added_is_refused(packed, refused):
    refused(packed + b"\0")
    refused(b"\0" + packed)
    refused(packed + packed)


def test_file_with_a_bit_flipped_anywhere_is_refused(packed, refused):
    for i in range(len(packed)):
        for bit in range(8) if i < 24 else (i % 8,):  # every bit of the prefix, one of every other byte
            refused(packed[:i] + bytes([packed[i] ^ 1 << bit]) + packed[i + 1 :])


@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused(refused, data, with_magic):
    refused(b"GOLFGPT\n" + data if with_magic else data)


@given(st.binary(max_size=100))
def test_random_header_with_a_valid_checksum_is_refused(refused, text):
    refused(put_together(text, b""))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format=1), "format"),
        (lambda h: h.update(format="1"), "format"),
        (lambda h: h.pop("format"), "format"),
        (lambda h: h.update(codec="int6_zstd"), "int6_zstd"),
        (lambda h: h.pop("config"), "config"),
        (lambda h: h.update(config=None), ""),
        (lambda h: h.update(config=[]), ""),
        (lambda h: h["config"].update(num_layers=10**9), "NUM_LAYERS"),
        (lambda h: h["config"].update(num_layers=200), "tensor table"),
        (lambda h: h["config"].update(num_layers=-1), "NUM_LAYERS"),
        (lambda h: h["config"].update(num_layers=True), "NUM_LAYERS"),
        (lambda h: h["config"].update(num_layers=2.0), "NUM_LAYERS"),
        (lambda h: h["config"].update(model_dim=10**12), "MODEL_DIM"),
        (lambda h: h["config"].update(model_dim=16_384, num_layers=256, mlp_mult=64), ""),
        (lambda h: h["config"].update(num_heads=0), "NUM_HEADS"),
        (lambda h: h["config"].update(num_heads=10**400), "NUM_HEADS"),
        (lambda h: h["config"].update(vocab_size=16), "tensor table"),
        (lambda h: h["config"].update(rope_base=math.nan), "ROPE_BASE"),
        (lambda h: h["config"].update(rope_base=None), "ROPE_BASE"),
        (lambda h: h["config"].update(eval_seq_len=0), "EVAL_SEQ_LEN"),
        (lambda h: h["config"].update(eval_method="best"), "EVAL_METHOD"),
        (lambda h: h["config"].update(rope_dims=1), "ROPE_DIMS"),
        (lambda h: h["config"].update(rope_dims=4), "ROPE_DIMS"),
        (lambda h: h["config"].update(loop_end=2), "LOOP_END"),
        (lambda h: h["config"].update(num_loops=10**9), "NUM_LOOPS"),
        (lambda h: h["config"].update(num_loops=9), "tensor table"),
        (lambda h: h["config"].update(num_loops=256), "NUM_LOOPS=256 makes 258 passes"),
        (lambda h: h["config"].update(num_loops=-1), "NUM_LOOPS"),
        (lambda h: h["config"].update(document_masks=1), "DOCUMENT_MASKS"),
        (lambda h: h["config"].update(leaky_relu_slope=math.inf), "LEAKY_RELU_SLOPE"),
        (lambda h: h["config"].update(skip_gates_enabled=False), "tensor table"),
        (lambda h: h["config"].pop("smear_gate_enabled"), "config"),
        (lambda h: h["config"].update(surprise=1), "surprise"),
        (lambda h: h["config"].update({"": 1}), ""),
        (lambda h: h["config"].update(__class__=1), "__class__"),
        (lambda h: h.pop("tensors"), "tensor table"),
        (lambda h: h["tensors"].pop(), "tensor table"),
        (lambda h: h["tensors"].reverse(), "tensor table"),
        (lambda h: entry(h, "tok_emb.weight")[2].reverse(), "tensor table"),
        (lambda h: entry(h, "tok_emb.weight").__setitem__(1, "float32"), "tensor table"),
        (lambda h: h["tensors"].append(h["tensors"][0]), "tensor table"),
        (lambda h: h.update(tensors={}), "tensor table"),
        (lambda h: h.update(payload_bytes=0), ""),
        (lambda h: h.update(payload_bytes=-1), ""),
        (lambda h: h.update(payload_bytes=10**18), ""),
    ],
)
def test_lying_header_is_refused(packed, refused, change, message):
    """The checksum is valid: whoever writes a hostile file writes that too."""
    header, payload = take_apart(packed)
    change(header)
    assert message in refused(put_together(header, payload))


def test_lone_surrogate_in_the_header_is_no_crash(packed, tmp_path):
    header, payload = take_apart(packed)
    header["config"]["tokenizer_sha256"] = "\ud800"
    (tmp_path / "a.ptz").write_bytes(put_together(header, payload))
    assert tg.load_artifact(tmp_path / "a.ptz").config.tokenizer_sha256 == "\ud800"


@pytest.mark.parametrize(
    "text", [b"", b"null", b"3", b"[]", b'"x"', b"{}", b"[" * 100_000, b"9" * 5000, b"\xff", b"NaN"]
)
def test_header_that_is_no_header_is_refused(refused, text):
    refused(put_together(text, b""))


def test_payload_of_another_size_is_refused(packed, refused):
    header, payload = take_apart(packed)
    refused(put_together(header, payload[:-1]))
    refused(put_together(header, payload + b"\0"))
    refused(put_together(header, b""))
    refused(put_together(header, payload, lambda raw: raw))
    refused(put_together(header, payload, lambda raw: zlib.compress(raw) + b"\0"))
    refused(put_together(header, payload, lambda raw: zlib.compress(raw)[:-1]))
    refused(put_together(header, payload, lambda raw: b""))


def test_both_sizes_lying_alike_are_refused(packed, refused):
    header, payload = take_apart(packed)
    for longer in (payload + b"\0", payload[:-1]):
        refused(put_together({**header, "payload_bytes": len(longer)}, longer))


def test_decompression_bomb_is_not_inflated(packed, refused):
    """64 KiB that inflate to 64 MiB: reading stops one byte after what the tensors need."""
    header, _ = take_apart(packed)
    for lie in (header, {**header, "payload_bytes": 2**26}):
        bomb = put_together(lie, bytes(2**26))
        assert len(bomb) < 2**17
        tracemalloc.start()
        refused(bomb)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20


def test_header_that_inflates_without_end_is_not_inflated(refused):
    """64 KiB of header that stand for 64 MiB of blanks: no more than the limit of headers is looked at."""
    text = zlib.compress(b" " * 2**26, 9)
    assert len(text) < 2**17
    hostile = put_together(text, b"")
    tracemalloc.start()
    assert "header that describes no model" in refused(hostile)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * tg.MAX_HEADER_BYTES


def test_header_is_read_raw_or_compressed(packed, refused, tmp_path):
    """Older formats had it raw: what is refused is their number."""
    header, payload = take_apart(packed)
    text, outputs = json.dumps(header).encode(), []
    for file in (packed, put_together(text, payload), put_together(zlib.compress(text), payload)):
        (tmp_path / "a.ptz").write_bytes(file)
        outputs.append(tg.load_artifact(tmp_path / "a.ptz")(IDS))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert "its format (3, 'int8_zlib')" in refused(put_together({**header, "format": 3}, payload))
    for form in (zlib.compress(text)[:-9], b"\x78\xda" + text, zlib.compress(zlib.compress(text))):
        assert "header that describes no model" in refused(put_together(form, payload))


@pytest.mark.parametrize(
    ("shape", "held"),
    [({"model_dim": 16_384, "num_layers": 4, "mlp_mult": 64}, 2**24), ({"model_dim": 4096}, 2**10)],
    ids=["2**34 parameters", "2**27 parameters"],
)
def test_header_of_a_huge_model_is_refused_before_anything_is_allocated(packed, refused, small_config, shape, held):
    """A true table around a payload of nothing: of more parameters than any artifact holds, and of some less."""
    config = dataclasses.replace(small_config, **shape)
    with torch.device("meta"):
        model = tg.GPT(config)
    header, _ = take_apart(packed)
    state = model.state_dict().items()
    table = [[n, "int8_rows" if n.endswith(".weight") else "float32", list(p.shape)] for n, p in state]
    size = sum(2 * s[0] + math.prod(s) if kind == "int8_rows" else 4 * math.prod(s) for _, kind, s in table)
    header.update(config=dataclasses.asdict(config), tensors=table, payload_bytes=size)
    hostile = put_together(header, bytes(held))
    tracemalloc.start()
    refused(hostile)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


@pytest.mark.filterwarnings("error")  # no noise of numpy either
@pytest.mark.parametrize(
    "value", [b"\x00\x7e", b"\x01\x7d", b"\x00\x7c", b"\x00\xfc"], ids=["nan", "snan", "inf", "-inf"]
)
def test_scale_that_is_not_finite_is_refused(packed, refused, value):
    """NaN weights score NaN, which compares false with every record."""
    header, payload = take_apart(packed)
    offset = 0
    for _, kind, shape in header["tensors"]:
        if kind == "int8_rows":
            break
        offset += 4 * math.prod(shape)
    assert "not finite" in refused(put_together(header, payload[:offset] + value + payload[offset + 2 :]))


def test_float_that_is_not_finite_is_refused(packed, refused):
    header, payload = take_apart(packed)
    offset = 0
    for _, kind, shape in header["tensors"]:
        if kind == "float32" and math.prod(shape):
            break
        offset += 2 * shape[0] + math.prod(shape) if kind == "int8_rows" else 4 * math.prod(shape)
    nan = np.array([np.nan], "<f4").tobytes()
    assert "not finite" in refused(put_together(header, payload[:offset] + nan + payload[offset + 4 :]))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.data())
def test_mutated_header_is_refused_or_loads_a_model(packed, tmp_path_factory, data):
    """Any value, at any place of the header, in place of the right one: never another exception."""
    header, payload = take_apart(packed)
    for _ in range(data.draw(st.integers(1, 3))):
        node: Any = header
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and data.draw(st.booleans()):
                node = node[key]
                continue
            node[key] = data.draw(st.one_of(JUNK, st.integers(-2, 300), st.just(copy.deepcopy(node[key]))))
            break
    path = tmp_path_factory.getbasetemp() / "mutated.ptz"
    path.write_bytes(put_together(header, payload))
    with contextlib.suppress(ValueError):
        model = tg.load_artifact(path)
        assert model(IDS[:, :2] % model.config.vocab_size).isfinite().all()
