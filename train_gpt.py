"""Train a small GPT under a hard size limit and score it in bits per byte (bpb), all in this one file.

    PRESET=smoke python train_gpt.py                            a laptop, two minutes (README: its data is one command)
    python train_gpt.py                                         one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py       eight GPUs, the published limits
    EVAL_ARTIFACT=final_model.trellis.ptz python train_gpt.py   score an artifact again, without training

The run trains for MAX_WALLCLOCK_SECONDS, quantizes and compresses the weights, as finely as MAX_TOTAL_BYTES for code
and artifact allow, loads the file it wrote and scores that: the last line, `final_trellis_ans_roundtrip_exact
val_loss:... val_bpb:...`, is the result. A run over the limit saves everything, says so and exits with status 3 (of
which torchrun makes 1). Settings are the upper-cased fields of GPTConfig and Hyperparameters, as environment variables;
PRESET picks their defaults.

Writes   ARTIFACT_DIR/final_model.*.ptz   the scored model: a JSON header and compressed weights, never code
         OUT_DIR/<RUN_ID>.txt             the log, as on the screen
         OUT_DIR/<RUN_ID>.json            settings, identities, seconds, bytes and results of the run

Interface for tools (all that they may use; everything else is free to change):
         load_artifact(path, device) -> module     rebuilt from the artifact alone, in eval mode
         module(ids) -> logits                     (B, T) int64 -> (B, T, V) float32, causal
         module.config                             GPTConfig
         load_predictor(path, device)              only in records that adapt to the text they score (tools/judge.py)
To import the script by path, enter the module into sys.modules before it is executed: dataclasses look it up there.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import struct
import sys
import sysconfig
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Settings = TypeVar("Settings", "GPTConfig", "Hyperparameters")
Batch = list[tuple[Tensor, Tensor]]  # micro-batches of one step: ids and targets, each (b, T) int64 on the device
LossFn = Callable[[Tensor, Tensor], Tensor]
LogitsFn = Callable[[Tensor], Tensor]
Log = Callable[[str], None]
Pair = tuple[Tensor, Tensor]
Moments = dict[str, Pair]  # by weight (R, C), of inputs (C, C) and of gradients by outputs (R,)
Coded = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # exponents (R,), codes (R, C), quantizers (R, C)

# -- 1. Configuration --------------------------------------------------------------------------------------------------

PRESETS = {
    # The recipe of this project, for 8 GPUs: the defaults below.
    "record": "",
    # The published baseline of the challenge: 17,059,912 parameters, about 15.9 MB as int8 + zlib.
    "baseline": "DATA_PATH=./data/datasets/fineweb10B_sp1024 TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model "
    "VOCAB_SIZE=1024 NUM_LAYERS=9 MLP_MULT=2 LEAKY_RELU_SLOPE=0 ROPE_DIMS=0 LN_SCALE=0 XSA_LAST_N=0 "
    "SPARSE_ATTN_GATE_ENABLED=0 SMEAR_GATE_ENABLED=0 SKIP_GATES_ENABLED=0 NUM_LOOPS=0 "
    "DOCUMENT_MASKS=0 EVAL_METHOD=flat TRAIN_BATCH_TOKENS=524288 TRAIN_SEQ_LEN=1024 WARMDOWN_ITERS=1200 "
    "WARMDOWN_FRAC=0 SHUFFLE=0 MIN_LR=0 EMA_DECAY=0 GRAD_CLIP_NORM=0 QK_GAIN_INIT=1.5 MATRIX_LR=0.04 SCALAR_LR=0.04 "
    "TIED_EMBED_LR=0.05 MUON_WD=0 EMBED_WD=0 ADAM_WD=0 BETA2=0.95 MUON_ROW_NORMALIZE=0 POLAR_EXPRESS=0 "
    "MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=500 CODEC=int8_zlib",
    # A first run on any machine, on text that `python data/build_shards.py` makes without a download.
    "smoke": "DATA_PATH=./data/datasets/pydoc_sp1024 TOKENIZER_PATH=./data/tokenizers/pydoc_1024_bpe.model "
    "VOCAB_SIZE=1024 NUM_LAYERS=4 MODEL_DIM=256 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2 NUM_LOOPS=0 TRAIN_SEQ_LEN=256 "
    "TRAIN_BATCH_TOKENS=2048 ITERATIONS=600 MAX_WALLCLOCK_SECONDS=90 EMA_DECAY=0.97 MUON_MOMENTUM_WARMUP_STEPS=100 "
    "VAL_LOSS_EVERY=200 TRAIN_LOG_EVERY=20",
}


@dataclass(frozen=True)
class GPTConfig:
    """What the weights mean. Stored in the artifact: it suffices to rebuild the model and to score it."""

    vocab_size: int = 8192
    num_layers: int = 11
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4  # below num_heads: grouped-query attention
    mlp_mult: int = 4  # hidden width of the MLP / model_dim
    leaky_relu_slope: float = 0.5  # of the MLP below 0, before squaring; 0: relu
    tie_embeddings: bool = True  # the output matrix is the embedding
    rope_base: float = 10_000.0
    rope_dims: int = 16  # channels of a head that carry its position; 0: all
    logit_softcap: float = 30.0  # logits stay within +-logit_softcap
    ln_scale: bool = True  # layer i reads its normalised inputs times 1 / sqrt(i + 1)
    xsa_last_n: int = 11  # last layers with exclusive self attention (drop_own_value)
    sparse_attn_gate_enabled: bool = True  # a gate per head and token on the output of attention
    smear_gate_enabled: bool = True  # a gate blends the previous token's embedding in
    skip_gates_enabled: bool = True  # a gate per channel between stream and skip connection
    num_loops: int = 2  # extra passes through layers loop_start .. loop_end
    loop_start: int = 3
    loop_end: int = 5
    document_masks: bool = True  # attention stays inside a document

    bos_id: int = 1  # starts every document
    eval_method: str = "document"  # windows start with every document, or cut the split as one text: flat
    eval_seq_len: int = 0  # context of the evaluation in tokens; 0 means TRAIN_SEQ_LEN
    eval_stride: int = 0  # targets per window of a longer text; 0 means eval_seq_len, that is windows without overlap
    compute_dtype: str = "auto"  # of activations: bfloat16, float32, or what the hardware is good at; set by the run
    tokenizer_sha256: str = ""  # set by the run

    def __post_init__(self) -> None:
        check_fields(self)
        heads, kv_heads, stride, layers = self.num_heads, self.num_kv_heads, self.eval_stride, self.num_layers
        require(heads % kv_heads == 0, f"NUM_HEADS={heads} must be a multiple of NUM_KV_HEADS={kv_heads}")
        even = f"MODEL_DIM={self.model_dim} must be a multiple of 2 * NUM_HEADS={2 * heads}: RoPE rotates channel pairs"
        require(self.model_dim % (2 * heads) == 0, even)
        pairs = self.rope_dims % 2 == 0 and self.rope_dims <= self.head_dim
        require(pairs, f"ROPE_DIMS={self.rope_dims} must be even and at most MODEL_DIM / NUM_HEADS = {self.head_dim}")
        looped = f"LOOP_START={self.loop_start} LOOP_END={self.loop_end} must name layers in order"
        fits = self.num_loops == 0 or self.loop_start <= self.loop_end < layers
        require(fits, f"{looped} below NUM_LAYERS={layers}: set them, or NUM_LOOPS=0")
        passes = len(self.layer_order(looping=True))
        require(passes <= 256, f"NUM_LOOPS={self.num_loops} makes {passes} passes through layers: at most 256")
        require(self.bos_id < self.vocab_size, f"BOS_ID={self.bos_id} must be below VOCAB_SIZE={self.vocab_size}")
        fits = stride <= self.eval_seq_len or self.eval_seq_len == 0
        require(fits, f"EVAL_STRIDE={stride} must be at most EVAL_SEQ_LEN={self.eval_seq_len}")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    def layer_order(self, looping: bool) -> list[int]:
        """The layers in the order of execution."""
        order, loop = list(range(self.num_layers)), list(range(self.loop_start, self.loop_end + 1))
        if self.num_loops and looping:
            return order[: self.loop_start] + loop * self.num_loops + order[self.loop_start :]
        return order


@dataclass(frozen=True)
class Hyperparameters:
    """How the weights are found and where files lie. Logged, not stored in the artifact."""

    preset: str = "record"
    run_id: str = ""  # empty: a new uuid4
    seed: int = 1337
    data_path: str = "./data/datasets/fineweb10B_sp8192"  # holds fineweb_{train,val}_*.bin
    tokenizer_path: str = "./data/tokenizers/fineweb_8192_bpe.model"
    out_dir: str = "logs"
    artifact_dir: str = "."
    eval_artifact: str = ""  # score this file and stop
    max_total_bytes: int = 16_000_000  # code + artifact
    compile: str = "auto"  # 1, 0, or auto: on where CUDA or a C++ compiler is found

    # one step: train_batch_tokens / train_seq_len sequences, dealt to the ranks, each rank's in micro-batches
    train_batch_tokens: int = 786_432
    train_seq_len: int = 2048
    shuffle: bool = True  # sequences of the train split in random order; 0: as they lie
    micro_batch_tokens: int = 0  # per rank and forward pass; 0: found
    iterations: int = 20_000
    warmdown_frac: float = 0.85  # part of the run, at its end, over which the learning rate falls linearly
    warmdown_iters: int = 0  # the same in steps; above 0 it replaces warmdown_frac
    min_lr: float = 0.1  # where it ends, as a part of the base rate
    warmup_steps: int = 20  # steps to compile on before the clock starts, undone afterwards; a CPU takes one
    max_wallclock_seconds: float = 600.0  # of training; 0: no limit
    enable_looping_at: float = 0.35  # part of the run after which layers are looped
    ema_decay: float = 0.9965  # per step, of the average of the weights that is stored; 0: the last weights are

    val_batch_size: int = 524_288  # tokens per evaluation step over all ranks, at most
    val_loss_every: int = 1000  # steps; 0: only at the end
    val_max_tokens: int = 0  # score only the first tokens, for a quick look; 0: all
    train_log_every: int = 200

    tied_embed_init_std: float = 0.005
    qk_gain_init: float = 5.0
    embed_lr: float = 0.6  # untied embedding
    head_lr: float = 0.008  # untied output matrix
    tied_embed_lr: float = 0.03
    matrix_lr: float = 0.028
    scalar_lr: float = 0.02
    muon_momentum: float = 0.97
    muon_momentum_warmup_start: float = 0.92
    muon_momentum_warmup_steps: int = 1500
    muon_backend_steps: int = 5  # Newton-Schulz iterations
    muon_row_normalize: bool = True  # rows of the momentum to length 1 before they are orthogonalized (MuonEq-R)
    polar_express: bool = True  # a polynomial of its own for each Newton-Schulz iteration
    muon_wd: float = 0.095  # decay of matrices per step, times the learning rate; so are the next two
    embed_wd: float = 0.085  # of embedding and output matrix
    adam_wd: float = 0.02  # of gains, scales and gates
    beta1: float = 0.9
    beta2: float = 0.99
    adam_eps: float = 1e-8
    grad_clip_norm: float = 0.3  # 0: no clipping

    codec: str = "trellis_ans"  # of the artifact: GPTQ codes of a trellis, entropy coded; or int8_zlib, as the baseline
    trellis_states: int = 8  # 1, 4 or 8; one is a uniform quantizer
    max_weight_bits: float = 6.0  # per coded weight, where MAX_TOTAL_BYTES leaves room for more
    gptq_calibration_batches: int = 16  # steps' worth of training tokens
    gptq_reserve_seconds: float = 4.0  # of MAX_WALLCLOCK_SECONDS, for the calibration

    def __post_init__(self) -> None:
        check_fields(self)
        batch, seq_len = self.train_batch_tokens, self.train_seq_len
        require(batch % seq_len == 0, f"TRAIN_BATCH_TOKENS={batch} must be a multiple of TRAIN_SEQ_LEN={seq_len}")
        plain = Path(self.run_id).name == self.run_id
        require(plain, f"RUN_ID={self.run_id!r} names files in OUT_DIR and must not hold a path")

    @property
    def step_seconds(self) -> float:
        """Time limit of all steps; 0: none. The calibration has the rest, at most half."""
        limit = self.max_wallclock_seconds
        return limit - min(self.gptq_reserve_seconds, limit / 2) * (self.codec == "trellis_ans")


RANGES: dict[str, tuple[float, float]] = {  # of numbers that may not be everything from 0 to 1e15
    **dict.fromkeys(("num_layers", "num_heads", "num_kv_heads", "mlp_mult"), (1, 256)),
    **dict.fromkeys(("train_batch_tokens", "train_log_every", "val_batch_size", "max_total_bytes"), (1, 1e15)),
    **dict.fromkeys(("eval_seq_len", "eval_stride"), (0, 2**15)),
    **dict.fromkeys(("beta1", "beta2", "ema_decay", "muon_momentum", "muon_momentum_warmup_start"), (0, 0.999999)),
    **dict.fromkeys(("leaky_relu_slope", "warmdown_frac", "min_lr", "enable_looping_at"), (0, 1)),
    **dict.fromkeys(("xsa_last_n", "num_loops", "loop_start", "loop_end"), (0, 256)),
    "train_seq_len": (1, 2**15),
    "max_weight_bits": (1, 8),
    "gptq_calibration_batches": (1, 1e6),
    "vocab_size": (1, 65_536),
    "model_dim": (2, 16_384),
    "rope_base": (1, 1e12),
    "logit_softcap": (1e-3, 1e6),
}
CHOICES = {
    "compute_dtype": ("auto", "bfloat16", "float32"),
    "compile": ("auto", "0", "1"),
    "codec": ("trellis_ans", "int8_zlib"),
    "trellis_states": (1, 4, 8),
    "eval_method": ("document", "flat"),
}


def require(ok: bool, message: str) -> None:
    """For what a user can cause; `message` names the variable or file, its value and the remedy."""
    if not ok:
        raise ValueError(message)


def check_fields(settings: GPTConfig | Hyperparameters) -> None:
    """Raise ValueError unless every field has exactly the type of its default and a value that can be meant."""
    for field in dataclasses.fields(settings):
        value, kind, name = getattr(settings, field.name), type(field.default), field.name.upper()
        require(type(value) is kind, f"{name}={value!r} must be of type {kind.__name__}")
        if kind in (int, float):
            low, high = RANGES.get(field.name, (0, 1e15))
            require(low <= value <= high, f"{name}={value} must be from {low:g} to {high:g}")
        choices = CHOICES.get(field.name, (value,))
        require(value in choices, f"{name}={value!r} must be one of {', '.join(map(str, choices))}")


def from_env(cls: type[Settings], env: Mapping[str, str]) -> Settings:
    """Build `cls`: field `num_layers` is NUM_LAYERS if set, else what PRESET says, else its default. Or ValueError."""
    preset, values = env.get("PRESET", "record"), dict[str, Any]()
    require(preset in PRESETS, f"PRESET={preset!r} must be one of {', '.join(PRESETS)}")
    reject_misspelt(env)
    merged = {**dict(item.split("=") for item in PRESETS[preset].split()), **env}
    for field in dataclasses.fields(cls):
        name, kind = field.name.upper(), cast(Any, type(field.default))
        if name in merged:
            try:
                values[field.name] = {"0": False, "1": True}[merged[name]] if kind is bool else kind(merged[name])
            except (ValueError, KeyError):
                expected = "0 or 1" if kind is bool else f"of type {kind.__name__}"
                raise ValueError(f"{name}={merged[name]!r} must be {expected}") from None
    return cls(**values)


SETTINGS = {field.name.upper() for cls in (GPTConfig, Hyperparameters) for field in dataclasses.fields(cls)}


def reject_misspelt(env: Mapping[str, str]) -> None:
    """Raise ValueError for a variable that is one edit away from a setting: the shell would ignore it silently."""
    launchers = "ROLE_ LOCAL_ GROUP_ MASTER_ TORCH PYTORCH NCCL_ GLOO_ OMP_ MKL_ CUDA COMPILER"
    exempt = tuple(launchers.split())  # prefixes of the variables of launchers, libraries and CI systems
    for name in sorted(env.keys() - SETTINGS):
        meant = [] if name.startswith(exempt) else [right for right in sorted(SETTINGS) if one_edit_apart(name, right)]
        require(not meant, f"{name}={env[name]!r} is not a setting: say {' or '.join(meant)}, or unset it")


def one_edit_apart(a: str, b: str) -> bool:
    """Whether one insertion, deletion, substitution or swap of neighbours turns `a` into `b`."""
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return max(len(a), len(b)) == 1 or (len(a) == len(b) == 2 and a == b[::-1])


# -- 2. Model ----------------------------------------------------------------------------------------------------------
# Shapes: B sequences, T positions, D model_dim, H num_heads, K num_kv_heads, E head_dim, V vocab_size

NORM_EPS = 2.0**-23  # of float32; left to torch, its versions and dtypes differ
GATE_INPUTS = 12  # channels that a gate looks at


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


class Linear(nn.Module):
    """A matrix product without bias: float32 weight, product in the dtype of the input."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotary_table(seq_len: int, n_dims: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021), each (T, n_dims / 2), with dtype and device of `like`.

    The angles are float32: bfloat16, as published, merges positions beyond 256 and costs 0.03 nats at 512 (README).
    """
    frequency = base ** -(torch.arange(0, n_dims, 2, device=like.device, dtype=torch.float32) / n_dims)
    angle = torch.outer(torch.arange(seq_len, device=like.device, dtype=torch.float32), frequency)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channels i and i + R / 2 of the first R of each head by the angle of the position. (B, H, T, E) -> same"""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def attention_mask(document: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of documents (B, T) -> (B, 1, T, T), added to scores: 0 for earlier tokens of the same one, else -inf"""
    seen = (document[:, :, None] == document[:, None, :]).tril_()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention, without a mask causal. (B, H, T, E), (B, K, T, E), (B, K, T, E), (B, 1, T, T) -> (B, H, T, E)"""
    n_groups = q.size(1) // k.size(1)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=n_groups > 1)
    if q.device.type == "cpu":
        return attend_in_blocks(q, k, v, mask)
    k, v = (x.repeat_interleave(n_groups, dim=1) for x in (k, v))  # grouped and masked, only a slow kernel would do
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention on a CPU, a block of queries at a time to the keys up to its end: up to twice as fast (README)."""
    (B, H, T, E), K = q.shape, k.size(1)
    size, outputs = max(128, T // 8), []
    for start in range(0, T, size):
        end = min(start + size, T)
        block = q[:, :, start:end].reshape(B, K, -1, E) * E**-0.5  # heads that share keys one below the other
        scores = (block @ k[:, :, :end].mT).float().view(B, H, -1, end) + mask[:, :, start:end, :end]
        weights = scores.softmax(-1).to(v.dtype).view(B, K, -1, end)
        outputs.append((weights @ v[:, :, :end]).view(B, H, -1, E))
    return torch.cat(outputs, dim=2)


def drop_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self attention: outputs (B, H, T, E) less their part along the token's own value (B, K, T, E)."""
    u = F.normalize(v, dim=-1)[:, :, None]
    y = y.unflatten(1, (v.size(1), -1))  # (B, K, H / K, T, E)
    return (y - (y * u).sum(-1, keepdim=True) * u).flatten(1, 2)


class Gate(Linear):
    """Gates in (0, 1) from the first channels of their input, which suffice and cost almost nothing. 1/2 at init."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(min(GATE_INPUTS, n_in), n_out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x[..., : self.weight.size(1)]))


class Context(NamedTuple):
    """What all layers share in a forward pass."""

    x0: Tensor  # (B, T, D) normalised embeddings
    cos: Tensor  # (T, R / 2)
    sin: Tensor  # (T, R / 2)
    mask: Tensor | None  # (B, 1, T, T); None: causal


class Attention(nn.Module):
    """Causal grouped-query attention; queries and keys are normalised, a learned gain per head sets the sharpness."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.c_q = Linear(config.model_dim, config.model_dim)
        self.c_k = Linear(config.model_dim, kv_dim)
        self.c_v = Linear(config.model_dim, kv_dim)
        self.proj = Linear(config.model_dim, config.model_dim)
        self.q_gain = nn.Parameter(torch.empty(config.num_heads))
        self.exclusive = layer >= config.num_layers - config.xsa_last_n
        self.gate = Gate(config.model_dim, config.num_heads) if config.sparse_attn_gate_enabled else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, D = x.shape
        q = self.c_q(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, E)
        k = self.c_k(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        v = self.c_v(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        q = rotate(norm(q), context.cos, context.sin) * self.q_gain.to(q.dtype)[:, None, None]
        k = rotate(norm(k), context.cos, context.sin)
        y = attend(q, k, v, context.mask)
        y = drop_own_value(y, v) if self.exclusive else y
        y = y.transpose(1, 2)  # (B, T, H, E)
        y = y * self.gate(x)[..., None] if self.gate is not None else y
        return self.proj(y.reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = Linear(config.model_dim, config.mlp_mult * config.model_dim)
        self.proj = Linear(config.mlp_mult * config.model_dim, config.model_dim)
        self.slope = config.leaky_relu_slope

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square())  # relu^2: So et al. 2021 (Primer)


class Block(nn.Module):
    """Attention and MLP on a residual stream that can blend the embedding `x0` back in."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)
        self.attn_scale = nn.Parameter(torch.empty(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.empty(config.model_dim))
        self.resid_mix = nn.Parameter(torch.empty(2, config.model_dim))

    def forward(self, x: Tensor, depth_scale: Tensor, context: Context) -> Tensor:
        mix, depth_scale = self.resid_mix.to(x.dtype), depth_scale.to(x.dtype)
        x = mix[0] * x + mix[1] * context.x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(norm(x) * depth_scale, context)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x) * depth_scale)


def output_logits(x: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """(B, T, D), (V, D) -> (B, T, V) float32 within +-softcap (Gemma 2, 2024)."""
    return softcap * torch.tanh(F.linear(norm(x), weight.to(x.dtype)).float() / softcap)


def output_loss(x: Tensor, weight: Tensor, softcap: float, targets: Tensor) -> Tensor:
    """Mean nats per target. (B, T, D), (V, D), (B, T) int64 -> ()"""
    return F.cross_entropy(output_logits(x, weight, softcap).flatten(0, 1), targets.flatten())


class GPT(nn.Module):
    """A decoder whose first half feeds its second half through skip connections, last to first (U-net).
    While `looping`, some layers run several times; each pass counts as a layer of either half."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, self.looping = config, True
        self.codec, self.compute_dtype = "", torch.float32  # of the artifact it came from; of activations (pick_dtype)
        self.output_loss = output_loss  # an attribute, so that a CPU can compile it by itself (compile_model)
        self.tok_emb = Linear(config.model_dim, config.vocab_size)  # rows are looked up; tied, also the output matrix
        self.smear_gate = Gate(config.model_dim, 1) if config.smear_gate_enabled else None
        self.smear_scale = nn.Parameter(torch.empty(1)) if config.smear_gate_enabled else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        skips_shape = len(config.layer_order(looping=True)) // 2, config.model_dim
        self.skip_weights = nn.Parameter(torch.empty(skips_shape))
        self.skip_gates = nn.Parameter(torch.empty(skips_shape)) if config.skip_gates_enabled else None
        self.lm_head = None if config.tie_embeddings else Linear(config.model_dim, config.vocab_size)

    @property
    def output(self) -> Linear:
        return self.tok_emb if self.lm_head is None else self.lm_head

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D), normalised; a document's first token gets nothing of the token before it."""
        x = F.embedding(ids, self.tok_emb.weight).to(self.compute_dtype)
        if self.smear_gate is not None and self.smear_scale is not None:
            gate = self.smear_scale.to(x.dtype) * self.smear_gate(x) * (ids != self.config.bos_id)[..., None]
            x = x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))
        return norm(x)

    def merge_skip(self, x: Tensor, skip: Tensor, index: int) -> Tensor:
        skip = self.skip_weights[index].to(x.dtype) * skip
        return x + skip if self.skip_gates is None else skip.lerp(x, torch.sigmoid(self.skip_gates[index]).to(x.dtype))

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D), before the last normalisation."""
        config, x0 = self.config, self.embed(ids)
        cos, sin = rotary_table(ids.size(1), config.rope_dims or config.head_dim, config.rope_base, like=x0)
        document = (ids == config.bos_id).cumsum(1, dtype=torch.int32) if config.document_masks else ids[:1] * 0
        needed = config.document_masks or ids.device.type == "cpu"
        mask = attention_mask(document, x0.dtype) if needed else None
        # A tensor: with numbers, every layer would be compiled on its own.
        depth = torch.arange(1, config.num_layers + 1, device=ids.device, dtype=torch.float32)
        depth_scale = depth.rsqrt() if config.ln_scale else torch.ones_like(depth)
        context, order = Context(x0, cos, sin, mask), config.layer_order(self.looping)
        x = x0.clone()  # were x the same tensor as x0, the first block would be compiled a second time
        n_encoder = len(order) // 2
        skips: list[Tensor] = []
        for i, layer in enumerate(order):
            if i >= n_encoder and skips:
                x = self.merge_skip(x, skips.pop(), i - n_encoder)
            x = self.blocks[layer](x, depth_scale[layer], context)
            if i < n_encoder:
                skips.append(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        """Next-token logits. (B, T) int64 -> (B, T, V) float32"""
        return output_logits(self.hidden(ids), self.output.weight, self.config.logit_softcap)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per target. (B, T) int64, (B, T) int64 -> ()"""
        return self.output_loss(self.hidden(ids), self.output.weight, self.config.logit_softcap, targets)


@torch.no_grad()
def init_weights(model: GPT, hp: Hyperparameters) -> None:
    """Set every parameter; the same values on every device and rank for one SEED.

    tok_emb                 N(0, TIED_EMBED_INIT_STD) if tied, else N(0, 1)
    c_q, c_k, c_v, fc       U(-1, 1) / sqrt(fan in), as nn.Linear does
    proj, lm_head           0: blocks start as the identity, untied logits as uniform
    the others              constants of the table below: gates half open, nothing smeared
    """
    zeros = ("proj", "lm_head", "gate", "smear_gate", "smear_scale", "skip_gates")
    constants: dict[str, Any] = dict.fromkeys(zeros, 0.0) | {"attn_scale": 1.0, "mlp_scale": 1.0, "skip_weights": 1.0}
    constants |= {"q_gain": hp.qk_gain_init, "resid_mix": [[1.0], [0.0]]}  # all of the stream, none of the embedding
    generator = torch.Generator().manual_seed(hp.seed)
    for name, p in model.named_parameters():
        value, kind = torch.empty(p.shape), name.removesuffix(".weight").split(".")[-1]
        if kind == "tok_emb":
            value.normal_(0.0, hp.tied_embed_init_std if model.config.tie_embeddings else 1.0, generator=generator)
        elif kind in ("c_q", "c_k", "c_v", "fc"):
            value.uniform_(-1.0, 1.0, generator=generator).mul_(p.size(1) ** -0.5)
        else:
            value.copy_(torch.tensor(constants[kind]))  # a KeyError here: a parameter without an initial value
        p.copy_(value)


def pick_dtype(device: torch.device, setting: str = "auto") -> torch.dtype:
    """bfloat16 where matrix products are faster in it (CUDA, CPUs with the instructions), else float32."""
    if setting != "auto":
        return torch.bfloat16 if setting == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_bf16 = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if has_bf16 else torch.float32


def wants_compile(setting: str, device: torch.device) -> bool:
    """COMPILE=auto: always on CUDA, on a CPU if there is a C++ compiler and the headers it needs."""
    if setting != "auto" or device.type != "cpu":
        return setting == "1" or (setting == "auto" and device.type == "cuda")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return shutil.which(compiler) is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def compile_model(model: GPT, enabled: bool) -> tuple[LossFn, LogitsFn]:
    """Functions to train and to evaluate with. CUDA compiles the whole graph, a CPU block and loss (sooner done)."""
    options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
    if enabled and next(model.parameters()).is_cuda:
        return torch.compile(model.loss, **options), torch.compile(model.forward, **options)
    if enabled:
        torch._dynamo.config.recompile_limit = 64  # blocks of a few kinds times batches of a few shapes; 8 end the run
        for block in model.blocks:
            block.compile(**options)
        model.output_loss = torch.compile(output_loss, **options)
    return model.loss, model.forward


# -- 3. Optimizer ------------------------------------------------------------------------------------------------------

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # one polynomial for every iteration (kellerjordan.github.io/posts/muon)
POLAR_EXPRESS = (  # the best polynomial for what the iterations before leave (Amsel et al. 2025); the last one repeats
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: Tensor, steps: int, polar_express: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Replace the singular values of every matrix by values near 1. (N, R, C) -> (N, R, C) in `dtype`

    The quintic Newton-Schulz iteration of Muon, zeropower_via_newtonschulz5 in other codebases. Singular values land in
    about [0.7, 1.2] ([0.85, 1.15] with POLAR_EXPRESS): accuracy at 1 is traded for slope at 0, for weak directions.
    """
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # convergence needs a spectral norm of at most 1
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # so that the Gram matrix is the small one
    for i in range(steps):
        a, b, c = POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)] if polar_express else NEWTON_SCHULZ
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalized step (Jordan et al. 2024), for the matrices inside the blocks only.

    MATRIX_LR is the spectral norm of a step, times sqrt(rows / columns) for tall matrices, for an equal RMS change.
    Matrices of one shape are stacked and orthogonalized together; every rank takes a share of each stack, and one
    all-reduce hands the results round. Momentum is kept on every rank, so that any rank can save the run.
    """

    def __init__(self, params: list[nn.Parameter], hp: Hyperparameters, world: World) -> None:
        self.hp, self.world = hp, world
        shapes = dict.fromkeys(p.shape for p in params)  # a set that keeps the order
        groups = [{"params": [p for p in params if p.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": hp.matrix_lr, "base_lr": hp.matrix_lr, "momentum": hp.muon_momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        updates = []
        for group in self.param_groups:
            params: list[nn.Parameter] = group["params"]
            grads = torch.stack([p.grad for p in params if p.grad is not None])  # (N, R, C)
            state = self.state[params[0]]
            buffer = state["momentum"] = state.get("momentum", torch.zeros_like(grads))
            buffer.mul_(group["momentum"]).add_(grads)
            mine = self.world.share(len(params))
            nesterov = grads.add_(buffer, alpha=group["momentum"])[mine.start : mine.stop]
            if self.hp.muon_row_normalize:  # MuonEq-R
                nesterov = nesterov / nesterov.norm(dim=-1, keepdim=True).clamp_min(1e-7)
            update, steps = torch.zeros_like(grads, dtype=pick_dtype(grads.device)), self.hp.muon_backend_steps
            update[mine.start : mine.stop] = orthogonalize(nesterov, steps, self.hp.polar_express, update.dtype)
            updates.append(update)
        self.world.sum_all(updates)
        for group, update in zip(self.param_groups, updates, strict=True):
            lr = group["lr"] * max(1.0, update.size(1) / update.size(2)) ** 0.5
            torch._foreach_mul_(group["params"], 1.0 - group["lr"] * self.hp.muon_wd)
            torch._foreach_add_(group["params"], list(update.float().unbind()), alpha=-lr)


def build_optimizers(model: GPT, hp: Hyperparameters, world: World) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embedding, output matrix, gains, scales and gates."""
    embed_lr = hp.tied_embed_lr if model.config.tie_embeddings else hp.embed_lr
    rates = {"tok_emb.weight": (embed_lr, hp.embed_wd), "lm_head.weight": (hp.head_lr, hp.embed_wd)}
    rates["scalars"] = hp.scalar_lr, hp.adam_wd
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in ("matrices", *rates)}
    for name, p in model.named_parameters():
        is_matrix = name.startswith("blocks.") and name.endswith(".weight") and "gate" not in name
        members["matrices" if is_matrix else name if name in rates else "scalars"].append(p)
    groups = [{"params": members[k], "lr": lr, "base_lr": lr, "weight_decay": wd} for k, (lr, wd) in rates.items()]
    fused = world.device.type in ("cpu", "cuda")
    adam = torch.optim.AdamW(groups, betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, fused=fused)
    return [Muon(members["matrices"], hp, world), adam]


# -- 4. Data -----------------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256  # the .bin format of llm.c; data/shards.py writes it


class World(NamedTuple):
    """Who am I among the processes of this run."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def share(self, n: int) -> range:
        """This rank's contiguous share of n things; shares differ by at most one, the last rank has a largest."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum_all(self, tensors: Sequence[Tensor]) -> None:
        """Sum each of the tensors, all of one dtype, over the ranks: in place, in one collective."""
        if self.size == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view_as(t))

    def agree(self, x: float) -> float:
        """Rank 0's `x` on every rank, for what the ranks must not decide differently. Also a barrier."""
        shared = torch.tensor(x, dtype=torch.float64)  # on the CPU, through gloo: the device need not stop for it
        if self.size > 1:
            dist.broadcast(shared, src=0)
        return float(shared)


def read_shard(path: Path) -> np.ndarray:
    """Tokens of one .bin shard, memory-mapped. -> (N,) uint16, or a ValueError that names the file

    llm.c layout: 256 little-endian int32 (magic, version, N, zeros), then N little-endian uint16.
    """
    header, remedy = np.fromfile(path, dtype="<i4", count=HEADER_INTS), "build it again with data/build_shards.py"
    is_shard = header.size == HEADER_INTS and header[0] == SHARD_MAGIC
    require(is_shard, f"{path} is not a token shard (its first bytes are not magic {SHARD_MAGIC}): {remedy}")
    require(header[1] == SHARD_VERSION, f"{path} has shard version {header[1]}, not {SHARD_VERSION}: {remedy}")
    held, promised = (path.stat().st_size - 4 * HEADER_INTS) / 2, int(header[2])
    state = "truncated" if held < promised else "too long" if held > promised else "empty"
    require(held == promised > 0, f"{path} is {state}: its header says {promised} tokens, it holds {held:g}: {remedy}")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(promised,))


class TokenStream:
    """The shards of one split as one long sequence of tokens."""

    def __init__(self, folder: str, pattern: str) -> None:
        self.files = sorted(Path(folder).glob(pattern))
        if not self.files:
            raise FileNotFoundError(
                f"DATA_PATH={folder!r} holds no {pattern}: make shards with `python data/build_shards.py` (without "
                "arguments: of PRESET=smoke), or get published ones with `python data/download.py` (of PRESET=baseline)"
            )
        self.shards = [read_shard(file) for file in self.files]
        self.ends = np.cumsum([len(shard) for shard in self.shards]).tolist()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1, across the edges of shards. -> (count,) uint16"""
        parts = [np.zeros(0, "<u2")]
        for shard, end in zip(self.shards, self.ends, strict=True):
            begin = end - len(shard)
            if begin < start + count and start < end:
                parts.append(shard[max(start - begin, 0) : start + count - begin])
        return np.concatenate(parts)

    def require_below(self, vocab_size: int, tokens: np.ndarray, start: int) -> None:
        """Raise ValueError with file and offset if one of `tokens`, read at `start`, is not below `vocab_size`."""
        if int(tokens.max()) >= vocab_size:
            at = start + int(np.argmax(tokens >= vocab_size))
            shard = bisect.bisect_right(self.ends, at)
            offset = at - (self.ends[shard] - len(self.shards[shard]))
            found = f"{self.files[shard]} holds token {tokens[at - start]} at offset {offset}"
            raise ValueError(f"{found}, not below VOCAB_SIZE={vocab_size}: name the tokenizer of these shards")


@functools.lru_cache(maxsize=2)
def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """0 .. n - 1 in an order for each seed and epoch, that of this version of numpy. -> (n,) int64"""
    return np.random.default_rng((seed, epoch)).permutation(n)


class Loader:
    """Batches of the train split as a pure function of the step.

    The split is cut into sequences of seq_len + 1 tokens that overlap by one. Step s takes the next n_sequences of
    them, as they lie or shuffled, starting over at the end (a new epoch); a rank takes a contiguous share, in
    micro-batches of almost equal size. Thus ranks and micro-batches do not change the tokens of a step.
    """

    def __init__(self, stream: TokenStream, hp: Hyperparameters, vocab_size: int, world: World) -> None:
        self.stream, self.vocab_size, self.world, self.seq_len = stream, vocab_size, world, hp.train_seq_len
        self.n_sequences, self.seed, self.shuffle = hp.train_batch_tokens // hp.train_seq_len, hp.seed, hp.shuffle
        self.epoch_sequences = (len(stream) - 1) // hp.train_seq_len
        self.micro_sequences = max(int(hp.micro_batch_tokens > 0), hp.micro_batch_tokens // hp.train_seq_len)  # 0: open
        data, batch = f"DATA_PATH={hp.data_path!r}", f"TRAIN_BATCH_TOKENS={hp.train_batch_tokens}"
        short = f"{data} holds {len(stream)} train tokens, too few for one step of {batch}: lower it"
        require(self.epoch_sequences >= self.n_sequences, short)
        few = f"WORLD_SIZE={world.size} exceeds the {self.n_sequences} sequences of a step: lower it or raise {batch}"
        require(self.n_sequences >= world.size, few)

    def epoch(self, step: int) -> int:
        return step * self.n_sequences // self.epoch_sequences

    def sequence(self, index: int) -> np.ndarray:
        """Sequence `index` of the run. -> (T + 1,) uint16"""
        epoch, place = divmod(index, self.epoch_sequences)
        place = int(shuffled(self.epoch_sequences, self.seed, epoch)[place]) if self.shuffle else place
        start = place * self.seq_len
        tokens = self.stream.read(start, self.seq_len + 1)
        self.stream.require_below(self.vocab_size, tokens, start)
        return tokens

    def batch(self, step: int) -> Batch:
        """This rank's micro-batches of a step. -> [(ids, targets)], each (b, T) int64 on the device"""
        mine = self.world.share(self.n_sequences)
        n_micro = math.ceil(len(mine) / (self.micro_sequences or len(mine)))
        pairs = []
        for part in (World(i, n_micro).share(len(mine)) for i in range(n_micro)):
            rows = [self.sequence(step * self.n_sequences + mine[j]) for j in part]
            tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
            if self.world.device.type == "cuda":
                tokens = tokens.pin_memory()  # without it the copy would wait for the device
            tokens = tokens.to(self.world.device, non_blocking=tokens.is_pinned())
            pairs.append((tokens[:, :-1], tokens[:, 1:]))
        return pairs


# -- 5. Evaluation: bits per byte --------------------------------------------------------------------------------------

JUDGE_VERSION = 2  # changes whenever a function of this section could give another score
EVAL_LOGITS = 2**25  # logits per rank and forward pass, at most (float32: 128 MiB); fixed, so that scores repeat


class Score(NamedTuple):
    """Three exact sums over the targets of a split; nats per token, and bits per byte, which no tokenizer changes."""

    nats: float
    tokens: int
    bytes: int
    partial: bool = False  # only a part of the split was scored

    @property
    def val_loss(self) -> float:
        return self.nats / self.tokens

    @property
    def val_bpb(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def __format__(self, spec: str) -> str:
        text = f"val_loss:{self.val_loss:{spec}} val_bpb:{self.val_bpb:{spec}}"
        return f"{text} partial:{self.tokens}_targets" if self.partial else text


class ValSplit(NamedTuple):
    ids: np.ndarray  # (N,) uint16
    bytes: np.ndarray  # (N,) uint16, of text that each token stands for as a target
    identity: dict[str, Any]  # what was loaded and how its bytes are counted; goes into the log


def piece_bytes(sp: spm.SentencePieceProcessor, ids: np.ndarray) -> np.ndarray:
    """Bytes of each token of normalised text, as the published challenge counts them. (N,) -> (N,) uint16

    A piece counts its UTF-8 bytes, a byte piece 1, a control, unknown or unused piece 0. The mark U+2581 at the start
    of a piece is one space, except after a control piece, where the tokenizer put it and the text has none. Text
    that the tokenizer's normaliser folded is counted as folded, which is not the source text.
    Raises ValueError for a tokenizer with the mark inside a piece, whose pieces do not tell the bytes.
    """
    mark, n = "\u2581", sp.get_piece_size()
    pieces = [sp.id_to_piece(i) for i in range(n)]
    special = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(n)])
    for i, piece in enumerate(pieces):
        fine = bool(special[i]) or mark not in piece[1:]
        require(fine, f"TOKENIZER_PATH has piece {i} {piece!a}, which tells no bytes: use data with a byte sidecar")
    lengths = [1 if sp.is_byte(i) else len(piece.removeprefix(mark).encode()) for i, piece in enumerate(pieces)]
    base = np.where(special, 0, lengths).astype(np.uint16)
    space = np.array([piece.startswith(mark) for piece in pieces]) & ~special
    after_special = np.concatenate(([True], special[ids[:-1]]))
    return base[ids] + (space[ids] & ~after_special)


def load_tokenizer(path: str, config: GPTConfig) -> tuple[spm.SentencePieceProcessor, str]:
    """The tokenizer and the sha256 of its file. Raises if it is missing, no SentencePiece model, or another one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"TOKENIZER_PATH={path!r} does not exist: data/build_shards.py makes one with the data")
    data = Path(path).read_bytes()
    sha256, name = hashlib.sha256(data).hexdigest(), f"TOKENIZER_PATH={path!r}"
    try:
        sp = spm.SentencePieceProcessor(model_proto=data)
        size = sp.get_piece_size()
    except (RuntimeError, OSError):
        size = 0
    require(size > 0, f"{name} is not a SentencePiece model: name the .model file the shards were made with")
    require(size == config.vocab_size, f"{name} has {size} pieces, not VOCAB_SIZE={config.vocab_size}: set it so")
    require(sp.bos_id() == config.bos_id, f"{name} has BOS id {sp.bos_id()}, not BOS_ID={config.bos_id}: set it so")
    known = config.tokenizer_sha256 in ("", sha256)
    require(known, f"{name} has sha256 {sha256}, not the artifact's {config.tokenizer_sha256}: name that tokenizer")
    return sp, sha256


def load_val_split(hp: Hyperparameters, config: GPTConfig, sp: spm.SentencePieceProcessor, sha256: str) -> ValSplit:
    """The split to score, with the bytes of every token from the sidecar where the data has one, else from the pieces.
    ValueError for ids outside the vocabulary, and for files that contradict their manifest or each other."""
    stream, sidecar = TokenStream(hp.data_path, "fineweb_val_[0-9]*.bin"), None
    ids = stream.read(0, len(stream))
    stream.require_below(config.vocab_size, ids, 0)
    if any(Path(hp.data_path).glob("fineweb_val_bytes_*.bin")):
        sidecar = TokenStream(hp.data_path, "fineweb_val_bytes_*.bin")
        counts = f"DATA_PATH={hp.data_path!r} has {len(ids)} validation tokens but {len(sidecar)} byte counts"
        require(len(sidecar) == len(ids), f"{counts}: export it again with data/build_shards.py")
    n_bytes = sidecar.read(0, len(sidecar)) if sidecar else piece_bytes(sp, ids)
    keep = min(len(ids), hp.val_max_tokens or len(ids))
    has_text = bool(n_bytes[1:keep].any())
    require(has_text, f"DATA_PATH={hp.data_path!r} has no text in its first {keep} validation tokens: score more")
    identity = {
        "val_tokens": len(ids),
        "val_documents": int((ids == config.bos_id).sum()),
        "val_bytes": int(n_bytes[1:].sum(dtype=np.int64)),
        "val_accounting": "sidecar" if sidecar else "pieces",
        "val_shards_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        **check_manifest(Path(hp.data_path), stream.files + (sidecar.files if sidecar else []), sha256),
        "partial": keep < len(ids),
    }
    return ValSplit(ids[:keep], n_bytes[:keep], identity)


def check_manifest(folder: Path, files: list[Path], tokenizer_sha256: str) -> dict[str, Any]:
    """What manifest.json adds to the identity of the validation split; raises ValueError if the files contradict it."""
    path = folder / "manifest.json"
    if not path.exists():
        return {"val_text_sha256": "unknown", "tokenizer_lossless": "unknown"}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        val, tokenizer = manifest["splits"]["val"], manifest["tokenizer"]
        promised, sha256 = dict(val["files"]), str(tokenizer["sha256"])
        identity = {"val_text_sha256": val["text_sha256"], "tokenizer_lossless": tokenizer["lossless"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a manifest of data/build_shards.py: export the data again") from None
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    for name in sorted({*found, *promised}):
        same = found.get(name) == promised.get(name)
        require(same, f"{folder / name} contradicts {path}: fetch or export the data again")
    mine = f"TOKENIZER_PATH has sha256 {tokenizer_sha256}"
    require(sha256 == tokenizer_sha256, f"{mine}, but {path} says {sha256}: name the tokenizer the data was made with")
    return identity


class Window(NamedTuple):
    """Feeds ids[start : last - 1] and scores positions first .. last - 1."""

    start: int
    first: int
    last: int


def scoring_windows(ids: np.ndarray, config: GPTConfig) -> Iterator[Window]:
    """Windows that score every position but 0 of `ids` (N,) exactly once, the tail included.

    EVAL_METHOD=flat goes through the split as one text; `document` starts anew with every document, whose last window
    scores the BOS of the next. A text longer than EVAL_SEQ_LEN is cut: its first window scores all that fits, each
    further one the next EVAL_STRIDE targets. At EVAL_STRIDE = EVAL_SEQ_LEN windows do not overlap; a smaller one gives
    each target more context.
    """
    seq_len, end = config.eval_seq_len, len(ids) - 1
    stride = config.eval_stride or seq_len
    begins = np.flatnonzero(ids[1:] == config.bos_id) + 1 if config.eval_method == "document" else ()
    for begin, stop in itertools.pairwise([0, *map(int, begins), end]):
        firsts = [begin + 1, *range(begin + 1 + seq_len, stop + 1, stride)] if stop > begin else []
        for first, last in itertools.pairwise([*firsts, stop + 1]):
            yield Window(max(begin, first - 1 + stride - seq_len), first, last)


def pack_rows(windows: Iterable[Window], ids: np.ndarray, config: GPTConfig) -> list[list[Window]]:
    """Windows by row of EVAL_SEQ_LEN tokens, in order; with document masks, one that starts with a BOS may follow."""
    rows, room = list[list[Window]](), 0
    for window in windows:
        length = window.last - 1 - window.start
        if not (config.document_masks and ids[window.start] == config.bos_id and length <= room):
            rows.append([])
            room = config.eval_seq_len
        rows[-1].append(window)
        room -= length
    return rows


def target_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target]. (B, T, V) float32, (B, T) int64 -> (B, T) float32"""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


@torch.no_grad()
def evaluate(logits_fn: LogitsFn, split: ValSplit, config: GPTConfig, hp: Hyperparameters, world: World) -> Score:
    """Score a split: every token but the first is a target, once. A BOS costs nats and stands for 0 bytes.

    Every forward pass has one shape (short rows and the last batch are padded, which a causal model cannot see). Sums
    are float64 or integers; ranks meet in one collective at the end.
    """
    seq_len, sums = config.eval_seq_len, torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    rows = pack_rows(scoring_windows(split.ids, config), split.ids, config)
    n_rows = max(1, min(hp.val_batch_size // world.size, EVAL_LOGITS // config.vocab_size) // seq_len)
    n_rows = min(n_rows, math.ceil(len(rows) / world.size))
    mine = world.share(len(rows))
    for begin in range(mine.start, mine.stop, n_rows):
        inputs, targets = torch.zeros(2, n_rows, seq_len, dtype=torch.int64)
        scored = torch.zeros(n_rows, seq_len, dtype=torch.bool)
        for i, row in enumerate(rows[begin : min(begin + n_rows, mine.stop)]):
            column = 0
            for start, first, last in row:
                tokens, end = torch.from_numpy(split.ids[start:last].astype(np.int64)), column + last - 1 - start
                inputs[i, column:end], targets[i, column:end] = tokens[:-1], tokens[1:]
                scored[i, column + first - 1 - start : end] = True
                sums[2] += int(split.bytes[first:last].sum(dtype=np.int64))
                column = end
        losses = target_nats(logits_fn(inputs.to(world.device)), targets.to(world.device)).cpu()
        sums[:2] += torch.stack((losses[scored].double().sum(), scored.sum().double()))
    world.sum_all([sums])
    if not bool(sums.isfinite().all()):
        raise FloatingPointError("val_loss is not finite: the weights are useless, train with lower learning rates")
    return Score(float(sums[0]), int(sums[1]), int(sums[2]), split.identity["partial"])


# -- 6. Artifact -------------------------------------------------------------------------------------------------------
# File: magic (8 bytes), crc32 of all that follows (uint32), header length (uint32), header, zlib stream, words.
# Header, JSON in zlib: format, codec, config, tensors as [name, kind, shape], payload_bytes; of codes, states and step.
# The zlib stream holds the tensors one after another, and for trellis_ans at its end the frequencies of the codes:
#   float32     any shape, little-endian
#   int8_rows   (R, C): R little-endian float16 scales, then R * C int8; the weight is q * scale. A vector is one row.
#   codes       (R, C): R uint8 exponents of the steps, R uint8 classes of the rows; the codes are in the words

ARTIFACT_MAGIC, ARTIFACT_FORMAT = b"GOLFGPT\n", 4
ARTIFACT_PREFIX = struct.Struct("<8sII")
ARTIFACT_NAMES = {"int8_zlib": "final_model.int8.ptz", "trellis_ans": "final_model.trellis.ptz"}  # by codec
MAX_PARAMETERS, MAX_HEADER_BYTES = 2**28, 2**20  # of an artifact that is read: bound what a hostile one can ask for


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per row, its largest weight / 127. (R, C) float32 -> (R, C) int8, (R, 1) float16"""
    scale = (w.abs().amax(dim=1, keepdim=True) / 127).clamp_min(2**-14).half()  # 2**-14: least normal float16
    return (w / scale.float()).round().clamp(-127, 127).to(torch.int8), scale  # by the scale as it is stored


# Dependent quantization (Fischer and Wang 1992; Schwarz et al. 2019): two quantizers take turns, code k of quantizer 0
# stands for k steps, of quantizer 1 for k - sign(k) / 2. A path sees a grid twice as fine for about the same bits.
TRELLISES = {  # by number of states: the next state by state and parity of k, the quantizer by state
    1: ([(0, 0)], [0]),  # the uniform quantizer
    4: ([(0, 2), (2, 0), (1, 3), (3, 1)], [0, 0, 1, 1]),
    8: ([(0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)], [0, 1, 0, 1, 0, 1, 0, 1]),
}
MAX_CODE, GPTQ_DAMPING, GRADIENT_FLOOR = 127, 0.01, 0.3  # the last two in parts of the mean second moment
BLOCK, LOOKAHEAD = 64, 16  # columns decided together, and further ones that the decision takes into account


def dequantize(codes: Tensor, quantizer: Tensor, step: Tensor) -> Tensor:
    """(R, C) int8, (R, C) 0 or 1, (R, 1) float32 -> (R, C) float32"""
    return (codes.float() - codes.sign() * quantizer / 2) * step


def factorize(moments: Tensor) -> Pair:
    """Second moments M of the inputs of a layer, for GPTQ. (C, C) -> feedback (C, C), cost (C,) float32

    Errors e (C,) in a row of weights cost e M e^T, the sum over j of cost[j] * (e @ feedback[:, j])**2: Cholesky, last
    column first. M is damped, so that inputs which hardly occur need not mend the errors of others.
    """
    exact = (moments.cpu() if moments.is_mps else moments).double()  # MPS has no float64
    exact = exact + (GPTQ_DAMPING * exact.diagonal().mean() + 1e-30) * torch.eye(len(exact)).to(exact)
    upper = torch.linalg.cholesky(exact.flip(0, 1)).flip(0, 1)  # exact = upper @ upper.T
    feedback, cost = upper / upper.diagonal(), upper.diagonal().square()
    return feedback.float().to(moments.device), cost.float().to(moments.device)


@torch.no_grad()
def quantize_codes(w: Tensor, factor: Pair, step: Tensor, states: int, rate: float = 0.0) -> Pair:
    """GPTQ (Frantar et al. 2022) with a trellis. -> codes (R, C) int8 and the quantizer of each, uint8

    w (R, C) float32, factorized moments of the inputs, step (R, 1). A Viterbi search goes along the columns, for all
    rows at once; errors are mended in later columns, so that each survivor has targets of its own. `rate` 1 weighs the
    bits of a code, as a Gaussian of the row's variance counts them, by what a bit is worth: less error for the bytes,
    but shrunken weights and a higher loss (records/). A block is decided together, then its errors are pushed on.
    """
    (feedback, cost), (next_state, quantizers), (n_rows, n_columns) = factor, TRELLISES[states], w.shape
    ways = [[(s, p) for s, n in enumerate(next_state) for p in (0, 1) if n[p] == t] for t in range(states)]
    (s0, p0), (s1, p1) = torch.tensor(ways, device=w.device).permute(1, 2, 0)  # the two ways into each state
    quantizer_of, parity = torch.tensor(quantizers, device=w.device), torch.tensor([0.0, 1.0], device=w.device)
    half, parity, size = quantizer_of[:, None] / 2, parity[:, None, None], step[:, 0]
    penalty = rate * cost.mean() * size.square() / (12 * w.square().mean(1) + 1e-30)  # of a squared weight
    codes, quantizer = torch.empty_like(w, dtype=torch.int8), torch.empty_like(w, dtype=torch.uint8)
    pushed, rows = torch.zeros_like(w), torch.arange(n_rows, device=w.device)
    state = torch.zeros_like(rows)
    for begin in range(0, n_columns, BLOCK):
        end = min(begin + BLOCK, n_columns)
        stop = min(end + LOOKAHEAD, n_columns) if states > 1 else end
        total = w.new_full((states, n_rows), math.inf)
        total[state, rows] = 0.0
        errors = w.new_zeros(stop - begin, states, n_rows)  # of the survivor that ends in a state
        last_code, second = errors.to(torch.int8), errors.bool()  # and whether it came the second way
        for i, j in enumerate(range(begin, stop)):
            target = w[:, j] + pushed[:, j] + (feedback[begin:j, j] @ errors[:i].flatten(1)).view(states, n_rows)
            shrink = penalty / cost[j]
            wanted = target / ((1.0 + shrink) * size)  # least (target - x * size)**2 + shrink * (x * size)**2
            k = ((wanted.abs() + half - parity) / 2).round() * 2 + parity  # (2, S, R), the nearest of either parity
            k = torch.where((k == 2) & (half > 0) & (wanted.abs() < 0.75), 0.0, k).clamp_max(MAX_CODE - 1 + parity)
            value = (k - half * (k > 0)).copysign(wanted) * size
            sums = total + cost[j] * ((target - value).square() + shrink * value.square())
            second[i] = sums[p1, s1] < sums[p0, s0]
            total = torch.minimum(sums[p0, s0], sums[p1, s1])
            errors[:i] = torch.where(second[i], errors[:i, s1], errors[:i, s0])
            errors[i] = w[:, j] - torch.where(second[i], value[p1, s1], value[p0, s0])
            k = k.copysign(wanted).to(torch.int8)
            last_code[i] = torch.where(second[i], k[p1, s1], k[p0, s0])
        state = at = total.argmin(0)
        for j in reversed(range(begin, stop)):
            codes[:, j], came = last_code[j - begin, at, rows], second[j - begin, at, rows]
            at = torch.where(came, s1[at], s0[at])  # the state before column j
            quantizer[:, j], state = quantizer_of[at], at if j == end else state
        done = slice(begin, end)
        pushed[:, end:] += (w[:, done] - dequantize(codes[:, done], quantizer[:, done], step)) @ feedback[done, end:]
    return codes, quantizer


# Words: all codes, entropy coded by interleaved range ANS (Duda 2013; Giesen 2014). Rows go side by side, each in a
# lane, one code per column; a lane that runs low takes the next 16 bits of the common stream. How frequent a code is
# depends on its context: the class of its row, which tells how large its codes are, and the quantizer.
ANS_BITS, ANS_LANES, N_CLASSES = 14, 2048, 64
FREQUENCIES = 2 * N_CLASSES, 256  # by context, 2 * class + quantizer, and symbol, code + 128


def row_classes(codes: np.ndarray) -> np.ndarray:
    """Four classes per octave of the mean absolute code. (R, C) int8 -> (R,) uint8"""
    mean = np.abs(codes.astype(np.int16)).mean(axis=1)
    return np.clip(np.rint(4 * np.log2(mean + 2.0**-7)) + 28, 0, N_CLASSES - 1).astype(np.uint8)


def scale_counts(counts: np.ndarray) -> np.ndarray:
    """Frequencies that sum to 2**ANS_BITS in contexts that occur, 0 for codes that do not. (N, 256) int64 -> same"""
    occurs, total = counts > 0, counts.sum(axis=1, keepdims=True).clip(1)
    scaled = occurs + counts * (2**ANS_BITS - occurs.sum(axis=1, keepdims=True)) // total
    rest = np.where(occurs.any(axis=1), 2**ANS_BITS - scaled.sum(axis=1), 0)
    scaled[np.arange(len(scaled)), scaled.argmax(axis=1)] += rest
    return scaled


def encode_words(bands: list[np.ndarray], frequencies: np.ndarray) -> bytes:
    """Bands of symbols and contexts, (2, R, C), and frequencies -> a uint32 for each lane, then uint16 words"""
    starts, lanes, words = frequencies.cumsum(axis=1) - frequencies, np.full(ANS_LANES, 2**16, np.uint64), [b""]
    for symbols, contexts in reversed(bands):  # ANS is last in, first out
        x = lanes[: len(symbols)]
        for context, symbol in zip(contexts.T[::-1], symbols.T[::-1], strict=True):
            frequency, start = (table[context, symbol].astype(np.uint64) for table in (frequencies, starts))
            full = x >= frequency << np.uint64(32 - ANS_BITS)
            words.append(x[full].astype("<u2").tobytes())  # the low 16 bits
            x[full] >>= np.uint64(16)
            high, low = np.divmod(x, frequency)
            x[:] = (high << np.uint64(ANS_BITS)) + low + start
    used = max(len(symbols) for symbols, _ in bands)
    return lanes[:used].astype("<u4").tobytes() + b"".join(reversed(words))


def decode_words(
    data: bytes, shapes: list[tuple[int, int]], classes: list[np.ndarray], frequencies: np.ndarray, states: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Codes and quantizers (R, C) of each band. Raises ValueError for words that encode_words did not make."""
    used, at = max(rows for rows, _ in shapes), 0
    require(len(data) >= 4 * used and len(data) % 2 == 0, "its words are cut short")
    fine = max(int(of_row.max()) for of_row in classes) < N_CLASSES
    fine = fine and bool(np.isin(frequencies.sum(axis=1), (0, 2**ANS_BITS)).all())
    require(fine, "its classes or frequencies are none that this script writes")
    lanes, words = np.frombuffer(data, "<u4", used).astype(np.uint64), np.frombuffer(data, "<u2", offset=4 * used)
    frequency, start = (table.astype(np.uint64).ravel() for table in (frequencies, frequencies.cumsum(1) - frequencies))
    symbol_at = np.zeros((len(frequencies), 2**ANS_BITS), np.uint8)  # by context and low bits of a lane
    for row, counts in zip(symbol_at, frequencies, strict=True):
        row[: counts.sum()] = np.repeat(np.arange(256, dtype=np.uint8), counts)
    (next_state, quantizer_of), bands = map(np.array, TRELLISES[states]), []
    for (rows, columns), of_row in zip(shapes, classes, strict=True):
        x, state, codes, quantizer = lanes[:rows], np.zeros(rows, np.int64), *np.empty((2, columns, rows), np.uint8)
        for j in range(columns):
            quantizer[j] = quantizer_of[state]
            context, slot = 2 * of_row.astype(np.int64) + quantizer[j], x & np.uint64(2**ANS_BITS - 1)
            codes[j] = symbol_at.take((context << ANS_BITS) + slot.astype(np.int64))
            place = (context << 8) + codes[j]
            x[:] = frequency[place] * (x >> np.uint64(ANS_BITS)) + slot - start[place]
            low = np.flatnonzero(x < 2**16)
            require(at + len(low) <= len(words), "its words are cut short")
            x[low] = x[low] << np.uint64(16) | words[at : at + len(low)]
            at, state = at + len(low), next_state[state, codes[j] & 1]
        bands.append(((codes ^ 128).view(np.int8).T, quantizer.T))  # subtracts 128
    require(at == len(words) and bool((lanes == 2**16).all()), "its words do not end where they should")
    return bands


def row_steps(step: float, exponents: np.ndarray) -> Tensor:
    """step * 2**(-exponent / 8), the same on every machine. (R,) uint8 -> (R, 1) float32"""
    octaves, eighths = np.divmod(exponents.astype(np.int32), 8)
    roots = (2.0 ** (-np.arange(8) / 8)).astype(np.float32)
    return torch.from_numpy(np.ldexp(np.float32(step) * roots[eighths], -octaves))[:, None]


def coded_layers(model: GPT) -> dict[str, Linear]:
    """By name, the layers whose weights become codes: all but gates and an embedding that is only looked up."""
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if type(layer) is Linear}
    return {name: layer for name, layer in layers.items() if layer is model.output or layer is not model.tok_emb}


def tensor_table(model: GPT, codec: str) -> list[list[Any]]:
    """[name, kind, shape] of every tensor; the published int8 + zlib keeps all but the matrices exact."""
    coded, small = (coded_layers(model), "int8_rows") if codec == "trellis_ans" else ({}, "float32")
    kinds = {n: "codes" if n in coded else "int8_rows" if n.endswith(".weight") else small for n in model.state_dict()}
    return [[name, kinds[name], list(p.shape)] for name, p in model.state_dict().items()]


def stored_bytes(kind: str, shape: list[int]) -> int:
    """In the zlib stream."""
    rows, size = math.prod(shape[:-1]), math.prod(shape)
    return {"float32": 4 * size, "int8_rows": 2 * rows + size, "codes": 2 * rows}[kind]


def bands_of(table: list[list[Any]]) -> list[tuple[str, slice]]:
    """Which rows of which tensor go through the coder side by side."""
    coded = [(name, shape[0]) for name, kind, shape in table if kind == "codes"]
    return [(name, slice(i, min(i + ANS_LANES, rows))) for name, rows in coded for i in range(0, rows, ANS_LANES)]


def pack_artifact(model: GPT, states: int = 0, step: float = 0.0, coded: Coded | None = None) -> bytes:
    """The whole file for a model: its config and its weights, in int8 or, where they are `coded`, as codes."""
    codec, words, counts = "trellis_ans" if coded else "int8_zlib", b"", np.zeros(math.prod(FREQUENCIES), np.int64)
    state, table, payload, bands = model.state_dict(), tensor_table(model, codec), bytearray(), dict[str, np.ndarray]()
    header = {"format": ARTIFACT_FORMAT, "codec": codec, "config": dataclasses.asdict(model.config), "tensors": table}
    for name, kind, shape in table:
        w = state[name].detach().float().cpu().reshape(-1, shape[-1])
        fine = bool((w.abs() < 127 * 65_000).all())  # also false for NaN; the scale must fit a float16
        require(fine, f"parameter {name} is not finite or too large to quantize: train with lower learning rates")
        if kind == "int8_rows":
            q, scale = quantize_rows(w)
            payload += scale.numpy().astype("<f2").tobytes() + q.numpy().tobytes()
        elif kind == "float32":
            payload += w.numpy().astype("<f4").tobytes()
        elif coded:
            exponents, codes, quantizer = coded[name]
            classes, symbols = row_classes(codes), codes.view(np.uint8) ^ 128  # adds 128
            contexts = 2 * classes[:, None] + quantizer
            counts += np.bincount((contexts.astype(np.int32) << 8 | symbols).ravel(), minlength=len(counts))
            payload += exponents.tobytes() + classes.tobytes()
            bands[name] = np.stack((symbols, contexts))
    if coded:
        header |= {"states": states, "step": step}
        frequencies = scale_counts(counts.reshape(FREQUENCIES))
        payload += frequencies.astype("<u2").tobytes()
        words = encode_words([bands[name][:, rows] for name, rows in bands_of(table)], frequencies)
    text = zlib.compress(json.dumps({**header, "payload_bytes": len(payload)}, separators=(",", ":")).encode(), 9)
    body = text + zlib.compress(payload, 9) + words
    return ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, zlib.crc32(body), len(text)) + body


def parse_header(text: bytes) -> tuple[GPT, dict[str, Any]]:
    """The empty model (on the meta device) that the JSON header of an artifact describes, and the header, checked."""
    header = json.loads(text if text.startswith(b"{") else zlib.decompressobj().decompress(text, MAX_HEADER_BYTES))
    version, codec = header["format"], header["codec"]
    ours = version == ARTIFACT_FORMAT and codec in ARTIFACT_NAMES
    require(ours, f"its format {(version, codec)!r:.200} is not {ARTIFACT_FORMAT}: use the script that wrote it")
    known = header["config"].keys() == {field.name for field in dataclasses.fields(GPTConfig)}
    require(known, f"a config of {sorted(header['config'])!r:.400} is not this script's")
    with torch.device("meta"):
        model = GPT(GPTConfig(**header["config"]))
    require(model.config.eval_seq_len > 0, "its config has no EVAL_SEQ_LEN")
    tail, table = 0, tensor_table(model, codec)
    if codec == "trellis_ans":
        states, step, tail = header["states"], header["step"], 2 * math.prod(FREQUENCIES)
        fine = type(states) is int and states in TRELLISES and type(step) is float and 0 < step < 2**16
        require(fine, f"states={states!r:.100} or step={step!r:.100} is none that this script writes")
    size = sum(stored_bytes(kind, shape) for _, kind, shape in table) + tail
    count = sum(math.prod(shape) for _, _, shape in table)
    fits = header.get("tensors") == table and header.get("payload_bytes") == size
    require(fits, "its tensor table does not fit its config")
    require(count <= MAX_PARAMETERS, f"it describes {count} parameters, more than any artifact holds")
    return model, header | {"tensors": table, "payload_bytes": size}  # not its 1.0 or true that equal 1


def read_artifact(path: Path) -> tuple[GPT, dict[str, Any], bytes, bytes]:
    """The empty model (on the meta device) of an artifact, its header, payload and words, bounded and checked."""
    if not path.is_file():
        raise FileNotFoundError(f"artifact {str(path)!r} does not exist: train first, or name another file")
    damaged = f"{path} is damaged: copy or make it again"
    with path.open("rb") as file:
        prefix = file.read(ARTIFACT_PREFIX.size)
        is_artifact = len(prefix) == ARTIFACT_PREFIX.size and prefix.startswith(ARTIFACT_MAGIC)
        require(is_artifact, f"{path} is not an artifact of train_gpt.py: it does not start with {ARTIFACT_MAGIC!r}")
        _, crc32, length = ARTIFACT_PREFIX.unpack(prefix)
        require(length <= MAX_HEADER_BYTES, f"{damaged} (header of {length} bytes)")
        text = file.read(length)
        try:
            model, header = parse_header(text)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
            raise ValueError(f"{path} has a header that describes no model ({error!s:.600}): make it again") from None
        size, codes = header["payload_bytes"], sum(math.prod(s) for _, kind, s in header["tensors"] if kind == "codes")
        # zlib never makes more of `size` bytes, and a code takes at most one word
        most = file.tell() + size + size // 1000 + 1024 + 2 * codes + 4 * ANS_LANES * (codes > 0)
        require(path.stat().st_size <= most, f"{path} has more bytes than its header describes: make it again")
        body = file.read()
    require(zlib.crc32(body, zlib.crc32(text)) == crc32, f"{damaged} (checksum)")
    unpacker = zlib.decompressobj()
    try:
        payload = unpacker.decompress(body, size + 1)
    except zlib.error as error:
        raise ValueError(f"{damaged} ({error})") from None
    whole = len(payload) == size and unpacker.eof and (codes > 0 or not unpacker.unused_data)
    require(whole, f"{path} has a payload of another size than its header says: make it again")
    return model, header, payload, unpacker.unused_data


@np.errstate(all="ignore")  # numpy would warn of hostile values, which are refused below
def load_artifact(path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """Rebuild the model that is scored: dequantized, float32 weights, in eval mode.

    Raises FileNotFoundError, or ValueError for a file that is damaged, of another format, or lies about its content.
    Reads data only, runs no code, and takes no more memory than the header declares, which is bounded.
    """
    (model, header, payload, words), offset = read_artifact(Path(path)), 0
    values, rows = dict[str, Tensor](), dict[str, np.ndarray]()
    for name, kind, shape in header["tensors"]:
        chunk = memoryview(payload)[offset : offset + stored_bytes(kind, shape)]
        offset, n_rows = offset + len(chunk), math.prod(shape[:-1])
        if kind == "codes":
            rows[name] = np.frombuffer(chunk, np.uint8).reshape(2, n_rows)
            values[name] = torch.empty(shape, dtype=torch.float32)
        elif kind == "int8_rows":
            scale = np.frombuffer(chunk, "<f2", n_rows).astype(np.float32)
            q = np.frombuffer(chunk, np.int8, offset=2 * n_rows).reshape(n_rows, shape[-1])
            values[name] = torch.from_numpy(q * scale[:, None]).view(shape)
        else:
            values[name] = torch.from_numpy(np.frombuffer(chunk, "<f4").astype(np.float32)).view(shape)
    if rows:
        frequencies, places = np.frombuffer(payload[offset:], "<u2").reshape(FREQUENCIES), bands_of(header["tensors"])
        classes = [rows[name][1, part] for name, part in places]
        shapes = [(part.stop - part.start, values[name].size(1)) for name, part in places]
        try:
            bands = decode_words(words, shapes, classes, frequencies.astype(np.int64), header["states"])
        except ValueError as error:
            raise ValueError(f"{path} is damaged, {error}: copy or make it again") from None
        for (name, part), (codes, quantizer) in zip(places, bands, strict=True):
            step = row_steps(header["step"], rows[name][0, part])
            values[name][part] = dequantize(torch.from_numpy(codes), torch.from_numpy(quantizer), step)
    for name, value in values.items():
        require(bool(value.isfinite().all()), f"{path} has a value in {name} that is not finite: make it again")
    model.load_state_dict(values, assign=True)
    model.codec, model.compute_dtype = header["codec"], pick_dtype(torch.device(device), model.config.compute_dtype)
    return model.to(device).eval()


def fit_artifact(model: GPT, moments: Moments, hp: Hyperparameters, log0: Log) -> bytes:
    """The file with weights as exact as MAX_TOTAL_BYTES and MAX_WEIGHT_BITS allow, where possible to 0.5 %.

    Independent errors of variance step**2 / 12 in a row of weights cost, to second order, half of the mean square of
    the loss's gradient by its output, times the inputs' mean e M e^T (factorize). Steps make that cost the same for
    every weight of the model: then a bit is worth the same everywhere and none can be moved to gain. A floor keeps rows
    usable whose outputs hardly count, such as those of tokens that the batches do not hold.
    """
    layers = {n: m.weight.detach().float() for n, m in coded_layers(model).items()}
    for n, (m, g) in moments.items():
        require(math.isfinite(float(m.sum() + g.sum())), f"moments of {n} are not finite: lower the learning rates")
    factors = {n: factorize(m) for n, (m, _) in moments.items()}
    worth = {n: (g + GRADIENT_FLOOR * g.mean() + 1e-30) * factors[n][1].mean() for n, (_, g) in moments.items()}
    most = max(1e-20, *(float(w.max()) for w in worth.values()))
    octaves = {
        n: (w / most).log2().clamp_min(-32.0) / 2 for n, w in worth.items()
    }  # a layer may be dead: worth nothing
    least = min(float(o.min()) for o in octaves.values())
    finer = {n: 8 * (o - least) for n, o in octaves.items()}  # exponents
    n_codes = sum(w.numel() for w in layers.values())
    vectors = [stored_bytes(kind, shape) for _, kind, shape in tensor_table(model, hp.codec) if kind != "codes"]
    rest = sum(vectors) + 4 * min(ANS_LANES, max(len(w) for w in layers.values())) + 1024  # lanes, header
    limit = min(hp.max_total_bytes - Path(__file__).stat().st_size, int(hp.max_weight_bits * n_codes / 8) + rest)
    limit = max(limit, rest + n_codes // 16)  # below half a bit there is no choice: the run will be over the limit
    bits = 8 * (limit - rest) / n_codes
    spread = {n: w.std(1).clamp_min(1e-9).log2() + finer[n] / 8 for n, w in layers.items()}  # octaves above the step
    mean = sum(float(spread[n].sum()) * w.size(1) for n, w in layers.items()) / n_codes
    step = 2 ** (mean + 2.05 - bits)  # of the coarsest row; a Gaussian takes 2.05 bits more
    slope, moved, last = n_codes / 8, 0.0, (0, 0)  # bytes that half a step takes: a bit per code, less among zeros
    best: tuple[Any, bytes] = (False, 0, -math.inf), b""  # one that fits, with TRELLIS_STATES, large; else a small one
    for states in (1, 1, *[hp.trellis_states] * 3):  # first the fast one, to find the step; a trellis wants more bytes
        coded, wanted = Coded(), dict[str, Tensor]()
        for n, w in layers.items():
            finest = 8 * (math.log2(step * MAX_CODE) - w.abs().amax(1).clamp_min(1e-30).log2()).clamp_max(32.0)
            wanted[n] = torch.minimum(finer[n].round(), finest.floor())
        coarsest = min(0, *(int(e.min()) for e in wanted.values()))  # below 0 where `step` would clip weights of a row
        base = step * 2 ** (-coarsest / 8)
        for n, w in layers.items():
            exponents = (wanted[n] - coarsest).clamp_max(255).byte().cpu().numpy()
            codes, quantizer = quantize_codes(w, factors[n], row_steps(base, exponents).to(w.device), states)
            coded[n] = exponents, codes.cpu().numpy(), quantizer.cpu().numpy()
        packed = pack_artifact(model, states, base, coded)
        log0(f"quantize: states:{states} step:{step:.6g} bytes:{len(packed)} limit:{limit}")
        fits = len(packed) <= limit
        best = max(best, ((fits, states * fits, len(packed) if fits else -len(packed)), packed))
        if states == hp.trellis_states and 0.995 * limit < len(packed) <= limit:
            break
        slope = max((last[1] - len(packed)) / moved, n_codes / 24) if moved and states == last[0] else slope
        aim = 0.9975 * limit - (states < hp.trellis_states) * 0.165 * n_codes * 2**-bits
        last, moved = (states, len(packed)), (len(packed) - aim) / slope
        step *= 2**moved
    return best[1]


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that its name never stands for half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# -- 7. Training -------------------------------------------------------------------------------------------------------


class Ledger:
    """Where the wall-clock time goes: one phase runs at a time, in seconds. The cap holds for train and calibrate."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.phase, self.since = device, "startup", time.perf_counter()
        self.spent: dict[str, float] = {}

    def switch(self, phase: str) -> None:
        self.spent[self.phase], self.phase = self.seconds(self.phase), phase
        self.since = time.perf_counter()

    def seconds(self, phase: str) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # calibrate looks at the clock without waiting for a result
        running = time.perf_counter() - self.since if phase == self.phase else 0.0
        return self.spent.get(phase, 0.0) + running


def progress(step: int, seconds: float, hp: Hyperparameters) -> float:
    """Part of the run that is done, 0 to 1, by ITERATIONS or by the time limit, whichever is further."""
    return min(1.0, max(step / max(hp.iterations, 1), seconds / (hp.step_seconds or math.inf)))


def lr_scale(step: int, seconds: float, hp: Hyperparameters) -> float:
    """Learning rate / its base value: 1, then linear to MIN_LR. WARMDOWN_ITERS become time by the average step."""
    left = (1.0 - progress(step, seconds, hp)) / max(hp.warmdown_frac, 1e-9)
    if hp.warmdown_iters:
        left = (hp.iterations - step) / hp.warmdown_iters
        seconds_left = hp.step_seconds - seconds if hp.step_seconds else math.inf
        left = min(left, seconds_left * max(step, 1) / max(hp.warmdown_iters * seconds, 1e-9))
    return min(1.0, max(left, hp.min_lr))


def muon_momentum(step: int, hp: Hyperparameters) -> float:
    """Rises linearly from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."""
    done = min(1.0, step / max(1, hp.muon_momentum_warmup_steps))
    return hp.muon_momentum_warmup_start + done * (hp.muon_momentum - hp.muon_momentum_warmup_start)


def update_average(average: list[Tensor], weights: list[Tensor], step: int, decay: float) -> None:
    """Exponential moving average after `step` steps, 1 for the first: those of step s count as decay ** (step - s),
    over the sum of these. Short runs still want a smaller decay."""
    torch._foreach_lerp_(average, weights, (1.0 - decay) / (1.0 - decay**step))


def fit_micro_batch(loss_fn: LossFn, model: GPT, loader: Loader, world: World) -> None:
    """Set the loader's micro-batch; on CUDA halve it until a forward and backward pass fits on every rank.
    65,536 tokens fill any GPU; a CPU is faster with few, whose activations stay in its caches (and in its memory)."""
    if loader.micro_sequences:
        return
    largest, seq_len = math.ceil(loader.n_sequences / world.size), loader.seq_len
    tokens = 65_536 if world.device.type == "cuda" else 2_048
    loader.micro_sequences = max(1, min(largest, tokens // seq_len))
    while world.device.type == "cuda":
        failed = torch.zeros(())
        try:
            for ids, targets in loader.batch(0)[-2:]:  # the second one beside the gradients of the first
                loss_fn(ids, targets).backward()
        except torch.OutOfMemoryError:
            failed += 1
        model.zero_grad(set_to_none=True)
        world.sum_all([failed])
        if not failed:
            return
        require(loader.micro_sequences > 1, f"TRAIN_SEQ_LEN={loader.seq_len} does not fit into the GPU: lower it")
        loader.micro_sequences //= 2
        torch.compiler.reset()  # drops the graphs of the larger shape, whose number is limited
        torch.cuda.empty_cache()


CALIBRATION_TOKENS = 8192  # per forward and backward pass, which keep more than those of a compiled graph


class Trainer(NamedTuple):  # what a step needs
    loss_fn: LossFn
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    loader: Loader
    hp: Hyperparameters
    world: World


def train_step(run: Trainer, batch: Batch, scale: float, momentum: float) -> Tensor:
    """One step on this rank's micro-batches, weighted by their share of its tokens. -> () mean nats per token"""
    total = torch.zeros((), device=run.world.device)
    for ids, targets in batch:
        loss = run.loss_fn(ids, targets) * (targets.numel() / run.hp.train_batch_tokens)
        loss.backward()
        total += loss.detach()
    run.world.sum_all([*(p.grad for p in run.model.parameters() if p.grad is not None), total])
    if run.hp.grad_clip_norm:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.hp.grad_clip_norm)
    for opt in run.optimizers:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * scale
            if "momentum" in group:
                group["momentum"] = momentum
        opt.step()
        opt.zero_grad(set_to_none=True)
    return total


def prime(run: Trainer, steps: int, log0: Log) -> None:
    """Compile on real steps before the clock starts, on CUDA for each order of the layers, then undo them."""
    weights = [p.detach().clone() for p in run.model.parameters()]
    both = run.world.device.type == "cuda" and run.model.config.num_loops > 0 and run.hp.enable_looping_at > 0
    for looping in (False, True) if both else (True,):
        run.model.looping = looping
        for step in range(steps):
            train_step(run, run.loader.batch(step), 1.0, run.hp.muon_momentum)
            log0(f"warmup_step:{step + 1}/{steps}")
    with torch.no_grad():
        torch._foreach_copy_(list(run.model.parameters()), weights)
    for opt in run.optimizers:
        opt.state.clear()


def train(run: Trainer, validate: Callable[[], Score], ledger: Ledger, log0: Log) -> dict[str, Any]:
    """Run to ITERATIONS or the time limit, whichever comes first, average and validate. -> results by log key
    A step starts if the slowest of the last ten would end in time. FloatingPointError for a loss that is not finite."""
    hp, loader, results = run.hp, run.loader, dict[str, Any]()
    step, seconds, train_loss, recent = 0, 0.0, math.nan, deque([0.0], maxlen=10)
    weights = [p.detach() for p in run.model.parameters()]
    average = [w.clone() for w in weights] if hp.ema_decay else []
    batch = loader.batch(0)
    ledger.switch("train")
    while True:
        position, capped = f"step:{step}/{hp.iterations}", 0 < hp.step_seconds < seconds + max(recent)
        last = capped or step == hp.iterations
        looping = last or progress(step, seconds, hp) >= hp.enable_looping_at
        if looping > run.model.looping and run.model.config.num_loops:
            log0(f"layer_loop:enabled {position} order:{run.model.config.layer_order(looping)}".replace(", ", ","))
        run.model.looping = looping
        timing = f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"
        if 0 < step <= 10 or (step and step % hp.train_log_every == 0):
            log0(f"{position} train_loss:{train_loss:.4f} {timing}")
        if last and average:
            torch._foreach_copy_(weights, average)
        if last or (hp.val_loss_every and step % hp.val_loss_every == 0):
            ledger.switch("validate")
            score = validate()
            log0(f"{position} {score:.4f} {timing}")
            results |= {"untrained_val_bpb": score.val_bpb} if step == 0 else {}
            ledger.switch("train")
        if last:
            break
        loss = train_step(run, batch, lr_scale(step, seconds, hp), muon_momentum(step, hp))
        step += 1
        if average:
            update_average(average, weights, step, hp.ema_decay)
        batch = loader.batch(step)  # while the device is busy with the step
        last_loss, train_loss = train_loss, float(loss)
        if not math.isfinite(train_loss):
            lower = f"lower the learning rates (MATRIX_LR={hp.matrix_lr} ...) or set GRAD_CLIP_NORM=1"
            message = f"train_loss is {train_loss} at step {step} (last good {last_loss:.4f}): {lower}"
            log0(message)
            raise FloatingPointError(message)
        # One clock for all: with their own, ranks would use different learning rates and stop at different steps.
        before, seconds = seconds, run.world.agree(ledger.seconds("train"))
        recent.append(seconds - before)
        if loader.epoch(step) > loader.epoch(step - 1):
            log0(f"epoch:{loader.epoch(step) + 1} starts at step:{step}: the train split has been read to its end")
    if capped:
        log0(f"stopping_early: wallclock_cap train_time:{1000 * seconds:.0f}ms {position}")
    if step:
        speed = round(step * hp.train_batch_tokens / seconds)
        results |= {"train_loss": train_loss, "train_seconds": seconds, "tokens_per_second": speed}
    return results | {"steps": step, "pre_quant_val_loss": score.val_loss, "pre_quant_val_bpb": score.val_bpb}


def calibrate(run: Trainer, step: int, ledger: Ledger) -> Moments:
    """Second moments per token of all coded layers, on the train batches from `step` on.

    Takes GPTQ_CALIBRATION_BATCHES, less where MAX_WALLCLOCK_SECONDS end before, but a few sequences at least. Hooks see
    the layers without torch.compile; for a looped layer, all its passes add up.
    """
    model, hp, cap = run.model, run.hp, run.model.config.logit_softcap
    started = ledger.seconds("train") + ledger.seconds("calibrate")
    spent = run.world.agree(started)  # by the clock of rank 0, which each rank goes on with by itself
    ahead, n_tokens = spent - started, torch.zeros((), device=run.world.device)
    layers, zeros = coded_layers(model), functools.partial(torch.zeros, device=run.world.device)
    moments = {n: (zeros(m.weight.size(1), m.weight.size(1)), zeros(m.weight.size(0))) for n, m in layers.items()}

    def pieces() -> Iterator[Pair]:
        for batch in range(hp.gptq_calibration_batches):
            for ids, targets in run.loader.batch(step + batch):
                n_rows = max(1, CALIBRATION_TOKENS // ids.size(1))
                yield from zip(ids.split(n_rows), targets.split(n_rows), strict=True)

    def watch(name: str, layer: Linear) -> Any:
        def add_gradient(g: Tensor) -> None:
            moments[name][1].add_(g.flatten(0, -2).float().square().sum(0))

        def add_input(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2).float()
            moments[name][0].addmm_(x.mT, x)
            output.register_hook(add_gradient)

        return layer.register_forward_hook(add_input)

    hooks = [watch(name, layer) for name, layer in layers.items()]
    with torch.compiler.set_stance("force_eager"):
        for ids, targets in pieces():
            logits = cap * torch.tanh(model.output(norm(model.hidden(ids))).float() / cap)  # as output_logits
            F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
            model.zero_grad(set_to_none=True)
            n_tokens += targets.numel()
            before, spent = spent, ahead + ledger.seconds("train") + ledger.seconds("calibrate")
            if hp.max_wallclock_seconds and 2 * spent - before > hp.max_wallclock_seconds:
                break
    for hook in hooks:
        hook.remove()
    flat = [x for m in moments.values() for x in m]
    run.world.sum_all([*flat, n_tokens])
    torch._foreach_div_(flat, n_tokens)
    return moments


# -- 8. Main -----------------------------------------------------------------------------------------------------------


def start_world() -> World:
    """Join the process group of torchrun, if there is one. Gloo carries CPU tensors, NCCL those on GPUs."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("mps" if torch.backends.mps.is_available() and size == 1 else "cpu")
    if torch.cuda.is_available():
        local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        require(local_rank < count, f"LOCAL_RANK={local_rank}, but there are {count} GPUs: lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


def open_log(path: Path, world: World) -> Log:
    """The only function that writes lines: to the screen and to a file, on rank 0."""
    if world.rank != 0:
        return lambda line: None
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w", encoding="utf-8")

    def log0(line: str) -> None:
        print(line, flush=True)  # noqa: T201
        print(line, file=file, flush=True)

    return log0


def key_values(record: Mapping[str, Any]) -> str:
    """{"a": 1, "b": True} -> "a:1 b:1", the grammar of the log lines."""
    return " ".join(f"{k}:{int(v) if isinstance(v, bool) else v}" for k, v in record.items())


def describe_machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = " ".join(models[0].split()[3:]) if models else name
    versions = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "python": platform.python_version()}
    versions |= {"torch": torch.__version__, "device": f"{device.type}:{name}".replace(" ", "_")}
    return {**versions, "threads": torch.get_num_threads()}


def peak_memory_mib(device: torch.device) -> tuple[int, int]:
    """Most memory allocated and reserved: of the GPU for tensors, else by this process (0 where no one tells)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20, torch.cuda.max_memory_reserved() // 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = sum(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))
    return peak, peak


def train_artifact(
    path: Path, config: GPTConfig, loader: Loader, split: ValSplit, hp: Hyperparameters, ledger: Ledger, log0: Log
) -> dict[str, Any]:
    """Train a model and write its artifact. -> results by log key"""
    world, dataset, shards = loader.world, Path(hp.data_path).name, len(loader.stream.files)
    if world.rank == 0:
        write_file(path, b"")  # now, not after training, is the time to learn that the place cannot be written;
        path.unlink()  # and what an earlier run left there is not this one's
    log0(f"train_loader:dataset:{dataset} train_shards:{shards} train_tokens:{len(loader.stream)}")
    model = GPT(config)
    init_weights(model, hp)
    model.to(world.device).compute_dtype = pick_dtype(world.device, config.compute_dtype)
    compiled = wants_compile(hp.compile, world.device)
    loss_fn, logits_fn = compile_model(model, compiled)
    ledger.switch("compile")
    fit_micro_batch(loss_fn, model, loader, world)
    run = Trainer(loss_fn, model, build_optimizers(model, hp, world), loader, hp, world)
    sizes = {"model_params": sum(p.numel() for p in model.parameters()), "world_size": world.size}
    sizes |= {"grad_accum_steps": len(loader.batch(0)), "micro_batch_sequences": loader.micro_sequences}
    log0(key_values(sizes | {"compiled": compiled}))
    shown = ("train_batch_tokens", "train_seq_len", "iterations", "warmup_steps", "max_wallclock_seconds")
    log0(key_values({name: getattr(hp, name) for name in shown}))
    if compiled:
        prime(run, hp.warmup_steps if world.device.type == "cuda" else min(1, hp.warmup_steps), log0)
    results = train(run, lambda: evaluate(logits_fn, split, config, hp, world), ledger, log0)
    moments = {}
    if hp.codec == "trellis_ans":
        ledger.switch("calibrate")
        moments = calibrate(run, results["steps"], ledger)
    ledger.switch("quantize")
    if world.rank == 0:
        write_file(path, fit_artifact(model, moments, hp, log0) if moments else pack_artifact(model))
    world.agree(0.0)  # the other ranks wait for the file
    return {**results, **sizes, "train_dataset": dataset, "train_tokens": len(loader.stream)}


def report(
    record: dict[str, Any], path: Path, bytes_code: int, hp: Hyperparameters, world: World, ledger: Ledger, log0: Log
) -> bool:
    """Log memory, seconds and bytes, and write the run's JSON. -> whether the bytes are within the limit"""
    (memory, reserved), bytes_artifact = peak_memory_mib(world.device), path.stat().st_size
    bytes_total, codec = bytes_code + bytes_artifact, hp.codec.replace("_", "+")
    record |= {"bytes_code": bytes_code, "bytes_artifact": bytes_artifact, "bytes_total": bytes_total}
    record["artifact_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    seconds = {f"seconds_{phase}": round(spent, 2) for phase, spent in ledger.spent.items()}
    if world.rank == 0:
        text = json.dumps(record | seconds | {"peak_memory_mib": memory}, indent=1, allow_nan=False)
        write_file(Path(hp.out_dir, f"{hp.run_id}.json"), text.encode())
    log0(f"peak memory allocated: {memory} MiB reserved: {reserved} MiB")
    log0(f"ledger {key_values(seconds)} counted:seconds_train,seconds_calibrate")
    shown = ("tokens_per_second", "untrained_val_bpb", "pre_quant_val_bpb", "val_bpb", "partial")
    log0(key_values({key: round(record[key], 4) for key in shown if key in record}))
    log0(f"Serialized model {codec}: {bytes_artifact} bytes (artifact_sha256:{record['artifact_sha256']})")
    log0(f"Code size: {bytes_code} bytes")
    log0(f"Total submission size {codec}: {bytes_total} bytes")
    if bytes_total > hp.max_total_bytes:
        log0(f"OVER THE LIMIT: bytes_total:{bytes_total} exceeds MAX_TOTAL_BYTES={hp.max_total_bytes}")
    return bytes_total <= hp.max_total_bytes


def adopt_config(asked: GPTConfig, stored: GPTConfig) -> GPTConfig:
    """The config of an artifact; COMPUTE_DTYPE may differ, other settings that contradict it are errors."""
    for name, value in vars(stored).items():
        same = name == "compute_dtype" or name.upper() not in os.environ or getattr(asked, name) == value
        require(same, f"{name.upper()}={getattr(asked, name)} contradicts the artifact's {value}: unset it")
    return stored if asked.compute_dtype == "auto" else dataclasses.replace(stored, compute_dtype=asked.compute_dtype)


def main() -> int:
    """One run, from settings to score. -> exit status: 0, or 3 if code and artifact do not fit MAX_TOTAL_BYTES"""
    config, hp = from_env(GPTConfig, os.environ), from_env(Hyperparameters, os.environ)
    usual = {"PRESET": hp.preset}
    defaults = vars(from_env(GPTConfig, usual)) | vars(from_env(Hyperparameters, usual))
    changed = [f"{n.upper()}={v}" for n, v in {**vars(config), **vars(hp)}.items() if v != defaults[n]]
    world, code, path = start_world(), Path(__file__).read_bytes(), Path(hp.artifact_dir, ARTIFACT_NAMES[hp.codec])
    ledger = Ledger(world.device)
    hp = dataclasses.replace(hp, run_id=hp.run_id or str(uuid.uuid4()))
    config = dataclasses.replace(config, eval_seq_len=config.eval_seq_len or hp.train_seq_len)
    if hp.eval_artifact:
        ledger.switch("load")
        path, model = Path(hp.eval_artifact), load_artifact(hp.eval_artifact, world.device)
        config, hp = adopt_config(config, model.config), dataclasses.replace(hp, codec=model.codec)
        ledger.switch("startup")
    else:
        loader = Loader(TokenStream(hp.data_path, "fineweb_train_[0-9]*.bin"), hp, config.vocab_size, world)
    dtype = pick_dtype(world.device, config.compute_dtype)
    sp, sha256 = load_tokenizer(hp.tokenizer_path, config)
    config = dataclasses.replace(config, tokenizer_sha256=sha256, compute_dtype=str(dtype).removeprefix("torch."))
    split = load_val_split(hp, config, sp, sha256)

    log0 = open_log(Path(hp.out_dir, f"{hp.run_id}.txt"), world)
    machine = {**describe_machine(world.device), "world_size": world.size, "compute_dtype": config.compute_dtype}
    identity = {"code_sha256": hashlib.sha256(code).hexdigest(), "judge_version": JUDGE_VERSION, **split.identity}
    method = {"eval_method": config.eval_method, "eval_seq_len": config.eval_seq_len}
    method["eval_stride"] = config.eval_stride or config.eval_seq_len
    log0(f"preset:{hp.preset} seed:{hp.seed} settings:{','.join(changed)}")
    log0(key_values(machine))
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={hp.tokenizer_path}")
    log0(f"val_loader:shards pattern={hp.data_path}/fineweb_val_*.bin tokens:{len(split.ids)} {key_values(method)}")
    log0(key_values(identity))
    record = {**vars(config), **vars(hp), **machine, **identity}
    if not hp.eval_artifact:
        record |= train_artifact(path, config, loader, split, hp, ledger, log0)
        ledger.switch("load")
        model = load_artifact(path, world.device)  # what is scored is rebuilt from the disk
    model.compute_dtype = dtype
    logits_fn = compile_model(model, wants_compile(hp.compile, world.device))[1]
    ledger.switch("evaluate")
    score = evaluate(logits_fn, split, model.config, hp, world)
    ledger.switch("report")
    record |= {"val_loss": score.val_loss, "val_bpb": score.val_bpb}
    record |= {"val_nats": score.nats, "scored_tokens": score.tokens, "scored_bytes": score.bytes}
    fits = report(record, path, len(code), hp, world, ledger, log0)
    log0(f"final_{hp.codec}_roundtrip {score:.4f} eval_time:{1000 * ledger.spent['evaluate']:.0f}ms")
    log0(f"final_{hp.codec}_roundtrip_exact {score:.8f} {key_values(method)}")
    if world.size > 1:
        dist.destroy_process_group()
    return 0 if fits else 3


if __name__ == "__main__":
    try:
        status = main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(status)  # skips the interpreter's shutdown, in which a thread of gloo now and then aborts
    sys.exit(status)
