"""Train a small GPT under a hard size limit and score it in bits per byte (bpb), all in this one file.

    PRESET=smoke python train_gpt.py                            a laptop, a few minutes (data: see README)
    python train_gpt.py                                         one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py       eight GPUs, the published limits
    EVAL_ARTIFACT=runs/latest python train_gpt.py               score the last model again, without training
    RESUME=1 python train_gpt.py                                go on with the run that was cut short

A run trains for MAX_WALLCLOCK_SECONDS. Then it quantizes and compresses the weights, as finely as MAX_TOTAL_BYTES
allows for code and artifact together, loads the file it wrote and scores that. The last line of the log,
`final_trellis_ans_roundtrip_exact val_loss:... val_bpb:...`, is the result. A run over the limit saves everything, says
so and exits with status 3, which torchrun turns into 1.

Settings are environment variables or arguments, as in NUM_LAYERS=7 python train_gpt.py or python train_gpt.py
--num_layers=7: the fields of GPTConfig and Hyperparameters. PRESET picks their defaults, --help lists them.

A run writes to a folder of its own, OUT_DIR/RUN_ID:
         final_model.*.ptz                the scored model: a JSON header and compressed weights, never code
         log.txt                          the log, a line per event
         run.json                         settings, identities, seconds, bytes and results
         checkpoint_*.ckpt                the state of the run, until it ends: the last two
Once training ends, the weights are there uncompressed, as final_model.float32.ptz, until the scored model replaces
them. OUT_DIR/latest leads to the folder of the last run that finished. What a full disk does not take goes to the
temporary folder, and the last line says so.

Interface for tools (all that they may use; everything else is free to change):
         load_artifact(path, device) -> module     rebuilt from the artifact alone, in eval mode
         module(ids) -> logits                     (B, T) int64 -> (B, T, V) float32, causal
         module.config                             GPTConfig
         load_predictor(path, device)              only in records that adapt to the text they score (tools/judge.py)
         Cache(module, n_rows=1)                   only in scripts that can generate without reading the text again for
                                                   each token: module(ids, cache=cache) goes on behind the last call
To import the script by path, enter the module into sys.modules before it is executed: dataclasses look it up there.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import struct
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple, TextIO, TypeVar, cast

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

if __name__ == "__main__":
    # OpenMP reads this when torch is loaded. Threads that wait should sleep: by default they keep their core busy, and
    # beside two other jobs a run on two cores then takes 4.7 s per step instead of 2.0. Alone, it makes no difference.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm  # type: ignore[import-untyped]

# ----------------------------------------------------------------------------------------------------------------------
# 1. Configuration
# ----------------------------------------------------------------------------------------------------------------------

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
    # The recipe at up to 100 million parameters, by the rules of Tiny Model Golf: no limit in bytes, and a context of
    # more than 1,028 tokens. 10.5 billion tokens.
    "tiny": "NUM_LAYERS=13 MODEL_DIM=768 NUM_HEADS=12 NUM_KV_HEADS=6 MAX_TOTAL_BYTES=1000000000 ITERATIONS=20000 "
    "MAX_WALLCLOCK_SECONDS=0 TRAIN_BATCH_TOKENS=524288 CHECKPOINT_EVERY=600",
    # A first run on any machine, on text that `python data/build_shards.py` makes without a download.
    "smoke": "DATA_PATH=./data/datasets/pydoc_sp1024 TOKENIZER_PATH=./data/tokenizers/pydoc_1024_bpe.model "
    "VOCAB_SIZE=1024 NUM_LAYERS=4 MODEL_DIM=256 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2 NUM_LOOPS=0 TRAIN_SEQ_LEN=256 "
    "TRAIN_BATCH_TOKENS=2048 ITERATIONS=600 MAX_WALLCLOCK_SECONDS=90 EMA_DECAY=0.97 MUON_MOMENTUM_WARMUP_STEPS=100 "
    "VAL_LOSS_EVERY=600 TRAIN_LOG_EVERY=20 COMPILE=0 CHECKPOINT_EVERY=30",
    # For one's own text, if DATA_PATH names it: an hour on a CPU, or ITERATIONS on a GPU, whichever ends first.
    "small": "DATA_PATH=./data/datasets/fineweb10B_sp1024 TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model "
    "VOCAB_SIZE=1024 NUM_LAYERS=8 MODEL_DIM=384 NUM_HEADS=6 NUM_KV_HEADS=3 NUM_LOOPS=0 TRAIN_SEQ_LEN=1024 "
    "TRAIN_BATCH_TOKENS=16384 ITERATIONS=5000 MAX_WALLCLOCK_SECONDS=3600 WARMUP_STEPS=1 EMA_DECAY=0.99 "
    "MUON_MOMENTUM_WARMUP_STEPS=300 VAL_MAX_TOKENS=131072 VAL_LOSS_EVERY=5000 TRAIN_LOG_EVERY=50 "
    "CHECKPOINT_EVERY=300",
}

# For --help.
PRESET_NOTES = {
    "smoke": "2.1 million parameters: any machine; 160 s in all and 1.3 GiB on two slow CPU cores",
    "small": "13.4 million parameters, scored on 131,072 tokens: an hour on a laptop, 2.3 GiB, or 5,000 steps on a GPU",
    "baseline": "17.1 million parameters, as published: eight H100 for 10 minutes",
    "tiny": "90.7 million parameters, the recipe without a limit in bytes: 20,000 steps on GPUs",
    "record": "35.9 million parameters, our full recipe: eight H100 for 10 minutes, 23 GiB each, or one for longer",
}


def setting(default: Any, help: str, low: float = 0, high: float = 1e15, choices: Sequence[Any] = ()) -> Any:
    """A dataclass field with a line for --help and with limits: a number from `low` to `high`, or one of `choices`."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class GPTConfig:
    """What the weights mean. Stored in the artifact, and enough to rebuild the model and to score it."""

    vocab_size: int = setting(8192, "pieces of the tokenizer", low=1, high=65_536)
    num_layers: int = setting(11, "layers of the transformer", low=1, high=256)
    model_dim: int = setting(512, "width of the residual stream", low=2, high=16_384)
    num_heads: int = setting(8, "heads of attention", low=1, high=256)
    num_kv_heads: int = setting(
        4, "heads of keys and values; fewer than NUM_HEADS make grouped-query attention", low=1, high=256
    )
    mlp_mult: int = setting(4, "hidden width of the MLP / MODEL_DIM", low=1, high=256)
    leaky_relu_slope: float = setting(0.5, "slope below 0 of the MLP's activation; 0 means relu", high=1)
    rope_base: float = setting(
        10_000.0, "base of the rotary frequencies; larger ones turn more slowly", low=1, high=1e12
    )
    rope_dims: int = setting(16, "channels of a head that carry its position; 0 means all")
    logit_softcap: float = setting(30.0, "logits stay within +- this", low=1e-3, high=1e6)
    ln_scale: bool = setting(True, "layer i reads its normalised inputs times 1 / sqrt(i + 1)")
    xsa_last_n: int = setting(11, "how many of the last layers use exclusive self attention", high=256)
    sparse_attn_gate_enabled: bool = setting(True, "a gate per head and token on the output of attention")
    smear_gate_enabled: bool = setting(True, "a gate adds the previous token's embedding")
    skip_gates_enabled: bool = setting(True, "a gate per channel between the stream and a skip connection")
    num_loops: int = setting(2, "extra passes through layers LOOP_START .. LOOP_END", high=256)
    loop_start: int = setting(3, "first looped layer, counted from 0", high=256)
    loop_end: int = setting(5, "last looped layer", high=256)
    document_masks: bool = setting(True, "attention stays inside a document")

    bos_id: int = setting(1, "the token that starts every document")
    eval_method: str = setting(
        "document",
        "windows of the evaluation: document by document, or through the whole split",
        choices=("document", "flat"),
    )
    eval_seq_len: int = setting(0, "context of the evaluation in tokens; 0 means TRAIN_SEQ_LEN", high=2**15)
    eval_stride: int = setting(0, "targets per further window of a text; 0 means EVAL_SEQ_LEN", high=2**15)
    compute_dtype: str = setting(
        "auto", "dtype of activations; auto takes what the hardware is good at", choices=("auto", "bfloat16", "float32")
    )
    tokenizer_sha256: str = setting("", "set by the run")

    def __post_init__(self) -> None:
        check_fields(self)

        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"NUM_HEADS={self.num_heads} must be a multiple of NUM_KV_HEADS={self.num_kv_heads}")
        if self.model_dim % (2 * self.num_heads):
            raise ValueError(
                f"MODEL_DIM={self.model_dim} must be a multiple of 2 * NUM_HEADS={2 * self.num_heads}: "
                "RoPE rotates pairs of channels within a head"
            )
        if self.rope_dims % 2 or self.rope_dims > self.head_dim:
            raise ValueError(
                f"ROPE_DIMS={self.rope_dims} must be even and at most MODEL_DIM / NUM_HEADS = {self.head_dim}"
            )

        if self.num_loops and not self.loop_start <= self.loop_end < self.num_layers:
            raise ValueError(
                f"LOOP_START={self.loop_start} LOOP_END={self.loop_end} must name layers in order below "
                f"NUM_LAYERS={self.num_layers}: set them, or NUM_LOOPS=0"
            )
        n_passes = len(self.layer_order(looping=True))
        if n_passes > 256:
            raise ValueError(f"NUM_LOOPS={self.num_loops} makes {n_passes} passes through layers: at most 256")

        if self.bos_id >= self.vocab_size:
            raise ValueError(f"BOS_ID={self.bos_id} must be below VOCAB_SIZE={self.vocab_size}")
        if self.eval_seq_len and self.eval_stride > self.eval_seq_len:
            raise ValueError(f"EVAL_STRIDE={self.eval_stride} must be at most EVAL_SEQ_LEN={self.eval_seq_len}")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    def layer_order(self, looping: bool) -> list[int]:
        """The layers in the order of execution."""
        order = list(range(self.num_layers))
        # In this order, torch.compile does not take a model without loops for two models, looping and not.
        if not (self.num_loops and looping):
            return order
        loop = order[self.loop_start : self.loop_end + 1]
        return order[: self.loop_start] + loop * self.num_loops + order[self.loop_start :]


# What leads to the folder of the last run, in OUT_DIR.
LATEST = "latest"


@dataclass(frozen=True)
class Hyperparameters:
    """How the weights are found and where files lie. Logged, but not stored in the artifact."""

    # The run and its files
    preset: str = setting("record", "which set of defaults to use")
    run_id: str = setting("", "name of the run and of its folder; empty means date, time, preset and seed")
    seed: int = setting(1337, "of initial values and of the order of the data")
    data_path: str = setting(
        "./data/datasets/fineweb10B_sp8192", "folder with fineweb_train_*.bin and fineweb_val_*.bin"
    )
    tokenizer_path: str = setting(
        "./data/tokenizers/fineweb_8192_bpe.model", "the SentencePiece model that the shards were made with"
    )
    out_dir: str = setting("runs", "folder that gets a folder for each run")
    eval_artifact: str = setting("", "score this model, a file or the folder of a run, and stop")
    max_total_bytes: int = setting(16_000_000, "limit for code and artifact together", low=1)
    checkpoint_every: float = setting(
        0.0, "seconds of training between checkpoints; 0 means only when a signal asks for one"
    )
    resume: str = setting("", "go on from a checkpoint, or from a run's folder; 1 means the run that was cut short")
    compile: str = setting(
        "auto", "use torch.compile; auto: if there is CUDA or a C++ compiler", choices=("auto", "0", "1")
    )
    track: str = setting(
        "", "also send the numbers of the run to this package; empty: none", choices=("trackio", "wandb", "tensorboard")
    )

    # Batches. A step takes train_batch_tokens / train_seq_len sequences. They are dealt to the ranks, and each rank
    # works through its share in micro-batches.
    train_batch_tokens: int = setting(786_432, "tokens of a training step, over all processes", low=1)
    train_seq_len: int = setting(2048, "tokens of a training sequence", low=1, high=2**15)
    shuffle: bool = setting(True, "sequences of the train split in random order; 0 takes them as they lie")
    micro_batch_tokens: int = setting(0, "tokens per process and forward pass; 0 lets the run choose")

    # Schedule
    iterations: int = setting(20_000, "training steps, at most")
    max_wallclock_seconds: float = setting(600.0, "seconds of training; 0 means no limit")
    warmup_steps: int = setting(2, "steps that compile the model before the clock starts and are undone")
    warmdown_frac: float = setting(0.85, "last part of the run, over which the learning rate falls linearly", high=1)
    warmdown_iters: int = setting(0, "the same in steps; above 0 it replaces WARMDOWN_FRAC")
    min_lr: float = setting(0.1, "the learning rate never falls below this part of its base value", high=1)
    enable_looping_at: float = setting(0.35, "part of the run after which layers are looped", high=1)
    ema_decay: float = setting(
        0.9965, "of the averaged weights, which are stored, per step; 0 means no average", high=0.999999
    )

    # Evaluation and log
    val_batch_size: int = setting(524_288, "tokens per forward pass of the evaluation, over all processes", low=1)
    val_loss_every: int = setting(1000, "steps between validations; 0 means only at the end")
    val_max_tokens: int = setting(0, "score only so many tokens, for a quick look; 0 means all")
    train_log_every: int = setting(200, "steps between lines of the log", low=1)

    # Initial values and optimizers
    tied_embed_init_std: float = setting(0.005, "standard deviation of the embedding at the start", high=1000)
    qk_gain_init: float = setting(5.0, "gain of the queries at the start", high=1000)
    tied_embed_lr: float = setting(0.03, "learning rate of the embedding", high=1000)
    matrix_lr: float = setting(0.028, "learning rate of the matrices in the layers (Muon)", high=1000)
    scalar_lr: float = setting(0.02, "learning rate of gains, scales and gates", high=100)
    muon_momentum: float = setting(0.97, "momentum of Muon", high=0.999999)
    muon_momentum_warmup_start: float = setting(0.92, "momentum of Muon at the first step", high=0.999999)
    muon_momentum_warmup_steps: int = setting(1500, "steps until MUON_MOMENTUM is reached")
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", high=100)
    muon_row_normalize: bool = setting(True, "scale the rows of a step to length 1 before orthogonalizing (MuonEq-R)")
    polar_express: bool = setting(True, "each Newton-Schulz iteration has a polynomial of its own")
    muon_wd: float = setting(0.095, "weight decay of the matrices, per step and learning rate", high=10)
    embed_wd: float = setting(0.085, "weight decay of the embedding", high=10)
    adam_wd: float = setting(0.02, "weight decay of gains, scales and gates", high=10)
    beta1: float = setting(0.9, "of AdamW, for the mean of the gradients", high=0.999999)
    beta2: float = setting(0.99, "of AdamW, for the mean of their squares", high=0.999999)
    adam_eps: float = setting(1e-8, "of AdamW; 0 would divide by 0 where a gradient is 0", low=1e-30, high=1)
    grad_clip_norm: float = setting(0.3, "longest gradient; 0 means no clipping")

    # Artifact
    codec: str = setting(
        "trellis_ans",
        "how weights are stored: as entropy-coded GPTQ codes, as int8 + zlib, or as they are",
        choices=("trellis_ans", "int8_zlib", "float32"),
    )
    trellis_states: int = setting(8, "of the quantizer; one state is a uniform quantizer", choices=(1, 4, 8))
    max_weight_bits: float = setting(6.0, "per coded weight, even if MAX_TOTAL_BYTES has room for more", low=1, high=8)
    gptq_calibration_batches: int = setting(
        16, "steps' worth of training tokens to calibrate the quantizer on", low=1, high=1e6
    )
    gptq_reserve_seconds: float = setting(4.0, "of MAX_WALLCLOCK_SECONDS, for the calibration")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.train_batch_tokens % self.train_seq_len:
            raise ValueError(
                f"TRAIN_BATCH_TOKENS={self.train_batch_tokens} must be a multiple of TRAIN_SEQ_LEN={self.train_seq_len}"
            )
        if self.resume and self.eval_artifact:
            raise ValueError(f"RESUME={self.resume} trains and EVAL_ARTIFACT={self.eval_artifact} does not: unset one")
        if Path(self.run_id).name != self.run_id or self.run_id in ("..", LATEST):
            raise ValueError(f"RUN_ID={self.run_id!r} must name a folder in OUT_DIR, and no path or {LATEST!r}")
        if not self.run_id.isprintable():
            raise ValueError(f"RUN_ID={self.run_id!r} names a folder in OUT_DIR and must be printable")

    @property
    def run_folder(self) -> Path:
        return Path(self.out_dir, self.run_id)

    @property
    def seconds_for_steps(self) -> float:
        """What MAX_WALLCLOCK_SECONDS leaves for training steps; 0 means no limit. The calibration gets at most half."""
        limit = self.max_wallclock_seconds
        if self.codec == "trellis_ans":
            return limit - min(self.gptq_reserve_seconds, limit / 2)
        return limit


SETTINGS = {field.name.upper() for cls in (GPTConfig, Hyperparameters) for field in dataclasses.fields(cls)}

# Variables of launchers and libraries start like this, and may look like a misspelt setting. So do CMake's COMPILER and
# the TRACE of many programs.
FOREIGN = (
    "COMPILER",
    "TRACE",
    "ROLE_",
    "LOCAL_",
    "GROUP_",
    "MASTER_",
    "TORCH",
    "PYTORCH",
    "NCCL",
    "GLOO",
    "OMP_",
    "MKL",
    "CUDA",
)

# What nanoGPT, nanochat, modded-nanogpt, Hugging Face and scripts of the challenge call our settings.
NAMES_ELSEWHERE = {
    "NUM_LAYERS": "N_LAYER N_LAYERS DEPTH NUM_HIDDEN_LAYERS",
    "MODEL_DIM": "N_EMBD N_EMBED D_MODEL DIM EMBED_DIM EMBEDDING_DIM HIDDEN_DIM HIDDEN_SIZE N_DIM",
    "NUM_HEADS": "N_HEAD N_HEADS NUM_ATTENTION_HEADS HEAD_DIM",
    "NUM_KV_HEADS": "N_KV_HEAD N_KV_HEADS NUM_KEY_VALUE_HEADS",
    "MLP_MULT": "MLP_RATIO MLP_EXPANSION FFN_MULT FFN_DIM INTERMEDIATE_SIZE",
    "ROPE_BASE": "ROPE_THETA",
    "LOGIT_SOFTCAP": "SOFTCAP FINAL_LOGIT_SOFTCAPPING",
    "VOCAB_SIZE": "N_VOCAB PADDED_VOCAB_SIZE",
    "TRAIN_SEQ_LEN": "SEQ_LEN SEQ_LENGTH SEQUENCE_LENGTH BLOCK_SIZE CONTEXT_LENGTH CONTEXT_LEN CTX_LEN N_CTX "
    "MAX_SEQ_LEN MAX_LENGTH TRAIN_MAX_SEQ_LEN",
    "EVAL_SEQ_LEN": "VAL_SEQ_LEN",
    "EVAL_STRIDE": "STRIDE SLIDING_STRIDE",
    "TRAIN_BATCH_TOKENS": "BATCH_SIZE TOTAL_BATCH_SIZE GLOBAL_BATCH_SIZE TRAIN_BATCH_SIZE BATCH_TOKENS",
    "MICRO_BATCH_TOKENS": "DEVICE_BATCH_SIZE MICRO_BATCH_SIZE PER_DEVICE_BATCH_SIZE PER_DEVICE_TRAIN_BATCH_SIZE "
    "GRADIENT_ACCUMULATION_STEPS GRAD_ACCUM_STEPS",
    "VAL_BATCH_SIZE": "EVAL_BATCH_SIZE PER_DEVICE_EVAL_BATCH_SIZE VAL_BATCH_TOKENS VAL_TOKENS_PER_BATCH",
    "ITERATIONS": "MAX_STEPS MAX_ITERS NUM_STEPS N_STEPS TRAIN_STEPS TOTAL_STEPS NUM_ITERATIONS NUM_ITERS N_ITERS "
    "NUM_SCHEDULED_ITERATIONS EPOCHS NUM_EPOCHS MAX_EPOCHS NUM_TRAIN_EPOCHS",
    "MAX_WALLCLOCK_SECONDS": "WALLCLOCK_SECONDS MAX_SECONDS MAX_TIME TIME_LIMIT TIME_BUDGET",
    "WARMDOWN_ITERS": "WARMDOWN_STEPS COOLDOWN_STEPS COOLDOWN_ITERS LR_DECAY_ITERS",
    "WARMDOWN_FRAC": "COOLDOWN_FRAC WARMDOWN_RATIO",
    "MIN_LR": "FINAL_LR_FRAC MIN_LR_RATIO",
    "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR": "LEARNING_RATE LR MAX_LR BASE_LR PEAK_LR",
    "MATRIX_LR": "MUON_LR HIDDEN_LR",
    "SCALAR_LR": "ADAM_LR ADAMW_LR",
    "TIED_EMBED_LR": "EMBED_LR EMBEDDING_LR HEAD_LR UNEMBEDDING_LR",
    "MUON_WD, EMBED_WD and ADAM_WD": "WEIGHT_DECAY",
    "MUON_MOMENTUM": "MOMENTUM",
    "MUON_BACKEND_STEPS": "NS_STEPS MUON_NS_STEPS",
    "BETA1": "ADAM_BETA1",
    "BETA2": "ADAM_BETA2",
    "ADAM_EPS": "ADAM_EPSILON EPSILON",
    "GRAD_CLIP_NORM": "GRAD_CLIP CLIP_GRAD GRADIENT_CLIPPING MAX_GRAD_NORM",
    "EMA_DECAY": "EMA EMA_ENABLED",
    "VAL_LOSS_EVERY": "EVAL_INTERVAL EVAL_EVERY EVAL_STEPS EVAL_ITERS VAL_EVERY VAL_INTERVAL",
    "VAL_MAX_TOKENS": "MAX_VAL_TOKENS EVAL_TOKENS VAL_TOKENS",
    "TRAIN_LOG_EVERY": "LOG_INTERVAL LOG_EVERY LOGGING_STEPS",
    "CHECKPOINT_EVERY": "SAVE_EVERY SAVE_STEPS SAVE_INTERVAL SAVE_CHECKPOINT CHECKPOINT_INTERVAL",
    "RESUME": "RESUME_FROM RESUME_FROM_CHECKPOINT LOAD_CHECKPOINT",
    "COMPUTE_DTYPE": "DTYPE AMP_DTYPE PRECISION",
    "COMPILE": "TORCH_COMPILE USE_COMPILE",
    "SEED": "RANDOM_SEED MANUAL_SEED",
    "DATA_PATH": "DATASET DATASET_PATH DATA_DIR",
    "TOKENIZER_PATH": "TOKENIZER TOKENIZER_FILE TOKENIZER_DIR",
    "OUT_DIR": "OUTPUT_DIR ARTIFACT_DIR",
    "TRACK": "REPORT_TO LOG_WITH TRACKER USE_WANDB WANDB_LOG ENABLE_WANDB",
    "RUN_ID": "RUN_NAME",
    "MAX_TOTAL_BYTES": "MAX_BYTES SIZE_LIMIT SIZE_LIMIT_BYTES",
    "MAX_WEIGHT_BITS": "WEIGHT_BITS QUANT_BITS MATRIX_BITS",
    "CODEC": "COMPRESSOR",
    "CUDA_VISIBLE_DEVICES": "DEVICE",
}

# What those scripts can do and this one cannot, by name or by how the names start.
ABSENT = "DROPOUT BIAS LABEL_SMOOTHING WARMUP_ITERS WARMUP_RATIO WARMUP_FRAC LR_WARMUP_STEPS INIT_FROM WINDOW_SIZE"
ABSENT_PREFIXES = ("TTT_", "SWA_", "QAT_", "MTP_", "LORA_", "BIGRAM_", "NGRAM_", "SLOT_")

Settings = TypeVar("Settings", GPTConfig, Hyperparameters)


def check_fields(settings: GPTConfig | Hyperparameters) -> None:
    """Raise ValueError unless every field has exactly the type of its default and a value within its limits."""
    for field in dataclasses.fields(settings):
        name = field.name.upper()
        value = getattr(settings, field.name)
        kind = type(field.default)
        if type(value) is not kind:
            raise ValueError(f"{name}={value!r} must be of type {kind.__name__}")

        if kind in (int, float):
            low = field.metadata.get("low", 0)
            high = field.metadata.get("high", 1e15)
            if not low <= value <= high:
                raise ValueError(f"{name}={value} must be from {low:g} to {high:g}")

        choices = field.metadata.get("choices")
        if choices and value not in choices and value != field.default:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}")


def from_env(cls: type[Settings], env: Mapping[str, str]) -> Settings:
    """Build `cls`: field `num_layers` is NUM_LAYERS if that is set, else what PRESET says, else its default.

    Raises ValueError, naming the variable, for an unknown preset, an invalid value, or a variable that looks like a
    setting and is none.
    """
    preset = env.get("PRESET", "record")
    if preset not in PRESETS:
        raise ValueError(f"PRESET={preset!r} must be one of {', '.join(PRESETS)}")
    for name in sorted(env.keys() - SETTINGS):
        reject_lookalike(name, env[name])
    if env.get("TIE_EMBEDDINGS", "1") != "1":
        raise ValueError("TIE_EMBEDDINGS=0 is not supported, the embedding is always the output matrix too: unset it")

    preset_values = dict(item.split("=") for item in PRESETS[preset].split())
    texts = {**preset_values, **env}
    values = dict[str, Any]()
    for field in dataclasses.fields(cls):
        name = field.name.upper()
        if name in texts:
            values[field.name] = parse_setting(name, texts[name], type(field.default))
    return cls(**values)


def all_settings(env: Mapping[str, str]) -> dict[str, Any]:
    """Every setting by name of the variable, as `env` and its PRESET say."""
    fields = {**vars(from_env(GPTConfig, env)), **vars(from_env(Hyperparameters, env))}
    return {name.upper(): value for name, value in fields.items()}


def parse_setting(name: str, text: str, kind: Any) -> Any:
    """The value of variable `name` as a bool, int, float or str."""
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError(f"{name}={text!r} must be 0 or 1")
        return text == "1"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} must be of type {kind.__name__}") from None


def reject_lookalike(name: str, value: str) -> None:
    """Raise ValueError if variable `name` was meant as a setting: it would be ignored without a word.

    It may be one edit away from a setting, in another case, without underscores, or be what other scripts call it.
    """
    upper = name.upper().replace("-", "_")
    for ours, theirs in NAMES_ELSEWHERE.items():
        if upper in theirs.split():
            raise ValueError(f"{name}={value!r:.100} is a setting of other scripts: say {ours}, or unset it")
    if upper in ABSENT.split() or upper.startswith(ABSENT_PREFIXES):
        raise ValueError(f"{name}={value!r:.100} is a setting of other scripts, which this one does not have: unset it")

    if name == "TIE_EMBEDDINGS" or upper.startswith(FOREIGN):
        return
    letters = upper.replace("_", "")
    similar = []
    for known in sorted({*SETTINGS, "TIE_EMBEDDINGS"}):
        if letters == known.replace("_", "") or one_edit_apart(upper, known):
            similar.append(known)
    if similar:
        raise ValueError(f"{name}={value!r:.100} is not a setting: say {' or '.join(similar)}, or unset it")


def read_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """The settings that are given as --name=value or --name value, by name of the variable.

    Raises ValueError for anything else, and names the setting that may have been meant.
    """
    values = {}
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        name, equals, value = argument.removeprefix("--").partition("=")
        variable = name.upper().replace("-", "_")
        if not argument.startswith("--") or variable not in SETTINGS:
            reject_lookalike(variable, value)
            similar = difflib.get_close_matches(variable, SETTINGS, n=1)
            meant = f": say --{similar[0].lower()}=..." if similar else ""
            raise ValueError(f"argument {argument[:100]!r} is no setting{meant}; --help lists them all")
        if not equals and not rest:
            raise ValueError(f"argument {argument!r} has no value: say {argument}=...")
        values[variable] = value if equals else rest.popleft()
    return values


def help_text() -> str:
    """What --help prints: what the script is, the presets, and every setting with its default in PRESET=record."""
    description, _, _ = (__doc__ or "").partition("Interface for tools")
    lines = [description.rstrip(), "", "Presets (PRESET=name or --preset=name):"]
    lines += [f"  {name:<10} {note}" for name, note in PRESET_NOTES.items()]
    for cls, title in ((GPTConfig, "Settings that are stored with the model"), (Hyperparameters, "Other settings")):
        lines += ["", f"{title} (NAME=value before the command, or --name=value behind it, which wins):"]
        for field in dataclasses.fields(cls):
            default = int(field.default) if isinstance(field.default, bool) else field.default
            setting_and_default = f"  --{field.name}={default}"
            # Behind a long default the note goes to a line of its own.
            if len(setting_and_default) > 34:
                lines.append(setting_and_default)
                setting_and_default = ""
            lines.append(f"{setting_and_default:<36}{field.metadata['help']}")
            if choices := ", ".join(map(str, field.metadata["choices"])):
                lines.append(f"{'':<36}one of {choices}")
    return "\n".join(lines)


# How settings of training scripts end. A variable of that form that is none of ours may have been meant for us.
FORMS_OF_SETTINGS = re.compile(
    r"\w+_(ENABLED|LR|WD|LAYERS?|HEADS?|STEPS|ITERS|BITS|DIMS?|MULT|DECAY|MOMENTUM|GATE|RESIDUAL|TOKENS|EXPERTS)"
    r"|LAYERS|HEADS|KV_HEADS|STEPS|QAT|GATED_ATTENTION|TRAIN_FILES|VAL_FILES|EVAL_ONLY|MAX_WALLCLOCK|MLP_HIDDEN"
)


def unread_variables(env: Mapping[str, str]) -> list[str]:
    """Variables that look like settings of other scripts, and of which this one knows nothing."""
    known = SETTINGS | {"PRESET", "TIE_EMBEDDINGS"}
    return sorted(name for name in env if name not in known and FORMS_OF_SETTINGS.fullmatch(name))


def one_edit_apart(a: str, b: str) -> bool:
    """Whether one insertion, deletion, substitution or swap of neighbours turns `a` into `b`."""
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]

    one_letter = max(len(a), len(b)) == 1
    swapped = len(a) == len(b) == 2 and a == b[::-1]
    return one_letter or swapped


# ----------------------------------------------------------------------------------------------------------------------
# 2. Runtime: ranks, device, dtype, compilation, clock, log, files
# ----------------------------------------------------------------------------------------------------------------------

Log = Callable[[str], None]


def share(n: int, part: int, n_parts: int) -> range:
    """Part number `part` of n things cut into contiguous parts whose sizes differ by at most one."""
    return range(n * part // n_parts, n * (part + 1) // n_parts)


# Under this name the launcher's store keeps the folder of the run.
FOLDER_KEY = "folder of the run"

# A rank that does not answer for so long ends the others. They wait for rank 0 while it encodes, which takes seconds.
LONGEST_SILENCE = timedelta(minutes=10)


class World(NamedTuple):
    """This process among the processes of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    processes: tuple[tuple[int, int], ...] = ()  # of each rank: a number for its machine, and its process id
    store: dist.Store | None = None  # the launcher's, which outlives the ranks under torchrun

    def share(self, n: int) -> range:
        """This rank's share of n things. The last rank's is among the largest."""
        return share(n, self.rank, self.size)

    def sum_all(self, tensors: Sequence[Tensor]) -> None:
        """Sum each of the tensors, all of one dtype, over the ranks: in place, in one collective."""
        if self.size == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        totals = flat.split([t.numel() for t in tensors])
        for t, total in zip(tensors, totals, strict=True):
            t.copy_(total.view_as(t))

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Each number summed over the ranks."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.sum_all([sums])
        return sums.tolist()

    def agree(self, x: float) -> float:
        """Rank 0's `x` on every rank, for what the ranks must not decide differently. The others wait for rank 0."""
        # The tensor lies on the CPU and goes through gloo, so that a GPU need not stop for it.
        shared = torch.tensor(x, dtype=torch.float64)
        if self.size > 1:
            dist.broadcast(shared, src=0)
        return float(shared)

    def agree_on_text(self, text: str) -> str:
        """Rank 0's `text` on every rank. The others wait for rank 0."""
        shared = [text]
        if self.size > 1:
            dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
        return shared[0]

    def folder_of_last_attempt(self) -> str:
        """The folder that the ranks wrote to before torchrun started them again; empty if there is none."""
        known = self.rank == 0 and self.store is not None and self.store.check([FOLDER_KEY])
        return self.agree_on_text(self.store.get(FOLDER_KEY).decode() if known and self.store else "")

    def note_folder(self, folder: Path) -> None:
        """Tell the next attempt where this one writes."""
        if self.rank == 0 and self.store is not None:
            self.store.set(FOLDER_KEY, str(folder))

    def dead_ranks(self) -> list[int]:
        """Ranks of this machine whose processes have ended. Waits for up to ten seconds until there is one."""
        machine, _ = self.processes[self.rank]
        dead: list[int] = []
        for _ in range(100):
            dead = [
                rank for rank, (where, process) in enumerate(self.processes) if where == machine and has_ended(process)
            ]
            if dead:
                break
            time.sleep(0.1)
        return dead


def has_ended(process: int) -> bool:
    """Whether a process of this machine is gone, or only waits for its parent to notice that it ended."""
    if sys.platform == "win32":
        return False  # where signal 0 is no question but Ctrl-C
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return proc_value(f"/proc/{process}/status", "State").startswith("Z")


# torchrun sets these, and so do other launchers. Those of a cluster's shell may be left over from something else.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """Where a launcher put this process."""

    rank: int
    size: int
    local_rank: int  # among the processes of this machine


def read_launcher(env: Mapping[str, str]) -> Place:
    """This process's place among the ranks. Without a launcher it is alone.

    Raises ValueError, naming the variable, its value and the remedy, for variables that contradict each other, or of
    which others are missing.
    """
    found = [name for name in LAUNCHER_VARIABLES if name in env]
    remedy = f"start with torchrun, or unset {' '.join(found)}"

    def number(name: str, default: int, low: int, high: float, limits: str) -> int:
        text = env.get(name, str(default))
        is_number = text.isascii() and text.isdigit() and len(text) < 10
        if not is_number or not low <= int(text) <= high:
            raise ValueError(f"{name}={text!r:.100} must be a whole number {limits}: {remedy}")
        return int(text)

    size = number("WORLD_SIZE", 1, low=1, high=math.inf, limits="above 0")
    rank = number("RANK", 0, low=0, high=size - 1, limits=f"below WORLD_SIZE={size}")
    local_size = number("LOCAL_WORLD_SIZE", size, low=1, high=size, limits=f"from 1 to WORLD_SIZE={size}")
    local_rank = number("LOCAL_RANK", 0, low=0, high=local_size - 1, limits=f"below the {local_size} of this machine")
    number("MASTER_PORT", 29500, low=1, high=65_535, limits="from 1 to 65535")
    if not env.get("MASTER_ADDR", "localhost").strip():
        raise ValueError(f"MASTER_ADDR={env['MASTER_ADDR']!r} names no machine: {remedy}")

    if size > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise ValueError(f"WORLD_SIZE={size}, but {name} is not set: {remedy}")
    return Place(rank, size, local_rank)


def start_world(env: Mapping[str, str]) -> World:
    """Join the process group of the launcher, if there is one. Gloo carries CPU tensors, NCCL those on GPUs.

    Raises ValueError, naming the variable, where the launcher's variables make no sense or the ranks do not meet.
    """
    rank, size, local_rank = read_launcher(env)

    if torch.cuda.is_available():
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise ValueError(f"LOCAL_RANK={local_rank}, but there are {n_gpus} GPUs: lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available() and size == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")

    if size == 1 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return World(rank, size, device)
    store = join_process_group(env, rank, size, device)

    # Later they can tell which of them has died.
    own_process = (zlib.crc32(platform.node().encode()), os.getpid())
    processes = torch.zeros(size, 2, dtype=torch.int64)
    processes[rank] = torch.tensor(own_process)
    World(rank, size).sum_all([processes])
    places = tuple((machine, process) for machine, process in processes.tolist())
    return World(rank, size, device, places, store)


def join_process_group(env: Mapping[str, str], rank: int, size: int, device: torch.device) -> dist.Store:
    """Meet the other ranks, if there are any. -> the launcher's store. Raises ValueError if they do not meet."""
    address = f"MASTER_ADDR={env['MASTER_ADDR']} MASTER_PORT={env['MASTER_PORT']}"
    # Variables of a launcher that are left over from something else would leave this process waiting in silence.
    message = f"still waiting at {address} for {size} ranks, of which this is RANK={rank}: did they all start?"
    reminder = threading.Timer(15.0, show, [message, sys.stderr])
    reminder.daemon = True
    reminder.start()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=LONGEST_SILENCE))
        if size > 1:
            # torchrun keeps its store for the next attempt, which must not find there where the ranks of this one met.
            # Only on a single machine are attempts certain to have the same number everywhere.
            attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
            is_one_machine = env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                timeout=LONGEST_SILENCE,
                world_size=size,
                rank=rank,
                store=dist.PrefixStore(f"attempt {attempt}", store) if is_one_machine else store,
            )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{address} is not where the {size} ranks meet ({reason:.200}): start with torchrun") from None
    finally:
        reminder.cancel()
    return cast(dist.Store, store)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given, so that a clock read afterwards counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pick_dtype(device: torch.device, compute_dtype: str = "auto") -> torch.dtype:
    """The dtype COMPUTE_DTYPE names. auto: bfloat16 where the hardware multiplies matrices faster in it, or float32."""
    if compute_dtype == "bfloat16":
        return torch.bfloat16
    if compute_dtype == "float32":
        return torch.float32

    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    else:
        has_bfloat16 = False
    return torch.bfloat16 if has_bfloat16 else torch.float32


def wants_compile(run: Run) -> bool:
    """Whether to compile. COMPILE=auto: where it works, on CUDA, and on a CPU with a C++ compiler and its headers.

    Raises ValueError if it is asked for and does not work.
    """
    wish = run.hp.compile
    if wish == "0":
        return False
    if wish == "auto" and not has_compiler(run.world.device):
        return False

    reason = why_not_compile(run.world.device)
    n_failures = torch.tensor(float(bool(reason)))
    run.world.sum_all([n_failures])
    if not n_failures:
        return True
    # All ranks decide alike, because they compile on common steps.
    reason = reason or "on another rank"
    if wish == "1":
        raise ValueError(f"COMPILE=1, but torch.compile does not work here ({reason}): mend that, or set COMPILE=0")
    run.warn(f"torch.compile does not work here ({reason}): slower without it; COMPILE=0 skips this test")
    return False


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile could work: with CUDA, or a C++ compiler and the headers it needs."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
        return shutil.which(compiler) is not None and has_headers
    return device.type == "cuda"


def why_not_compile(device: torch.device) -> str:
    """Try to compile something tiny. -> what went wrong, in one line; empty if it works"""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # a compiler fails in more ways than can be listed
        torch.compiler.reset()
        lines = [type(error).__name__, *str(error).splitlines()]
        # What the compiler itself says stands below torch's own words.
        of_compiler = [line for line in lines[2:] if "error:" in line]
        return (of_compiler or lines[1:] or lines)[0].strip()[:200]
    return ""


class Ledger:
    """Where the wall-clock time goes. One phase runs at a time. Only train and calibrate count against the limit."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phase = "startup"
        self.phase_began = time.perf_counter()
        self.spent = dict[str, float]()  # seconds of the phases that are over

    def switch(self, phase: str) -> None:
        """End the phase that runs, once the device has finished its work, and begin another."""
        synchronize(self.device)
        self.spent[self.phase] = self.seconds(self.phase)
        self.phase = phase
        self.phase_began = time.perf_counter()

    def seconds(self, phase: str) -> float:
        """Seconds spent in a phase so far. Does not wait for the device."""
        seconds = self.spent.get(phase, 0.0)
        if phase == self.phase:
            seconds += time.perf_counter() - self.phase_began
        return seconds


class Signals:
    """What Ctrl-C (SIGINT), clusters and rented machines (SIGTERM, SIGUSR1) and a closed terminal (SIGHUP) ask for.

    SIGUSR1 asks to keep the state of the run, the others to end it. They raise KeyboardInterrupt, except while they are
    `deferred`: then the training loop looks for them between two steps. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.stop = 0  # number of the signal that asked for the end
        self.keep = False

    def catch(self) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)
            # One that is ignored, as SIGHUP is under nohup, stays ignored.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self.keep = True
            return
        self.stop = number
        if not self.deferred:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # On a line of its own, below a progress bar.
            show("\nstopping after this step, Ctrl-C again stops at once and keeps nothing of it", sys.stderr)


# Takes the part of a phase that is done, 0 to 1, and a few words about it.
Advance = Callable[[float, str], None]


def no_progress(done: float, words: str) -> None:
    """For phases that nobody watches."""


class Screen:
    """What a person at a terminal sees: short lines, and a progress bar for every phase that takes long.

    It is off where the output goes to a file or another program, which get the lines of the log instead.
    """

    BAR = "{percentage:3.0f} % {bar:12} {remaining} left{postfix}"

    def __init__(self, is_on: bool = False) -> None:
        self.is_on = is_on

    def tell(self, line: str) -> None:
        if self.is_on:
            # Above a bar, if there is one.
            with tqdm.external_write_mode(sys.stdout):
                show(line, sys.stdout)

    @contextlib.contextmanager
    def bar(self, phase: str, leave: bool = True) -> Iterator[Advance]:
        """A progress bar, which stays on the screen at its end or not."""
        # Unlike tqdm, this takes a terminal that does not know its size to have 80 columns and 24 lines.
        size = shutil.get_terminal_size()
        with tqdm(
            total=1.0,
            bar_format=f"{phase:<12}{self.BAR}",
            miniters=0,
            leave=leave,
            ncols=size.columns,
            nrows=size.lines,
            file=sys.stdout,
            disable=not self.is_on,
        ) as bar:

            def advance(done: float, words: str) -> None:
                if done == 0:
                    # What came before does not count when the time left is estimated.
                    bar.reset()
                bar.set_postfix_str(words, refresh=False)
                bar.update(min(done, 1.0) - bar.n)

            yield advance


class RunLog:
    """The only place that writes lines of the log: to its file, then to the screen, unless a person looks at that.

    Ranks other than 0 write nothing. Neither file nor screen can end the run. A file that cannot be written, because
    the disk is full, is tried again with every further line. One that somebody removes comes back, whole.
    """

    def __init__(self, folder: Path, world: World, screen: Screen, goes_on: bool = False) -> None:
        """Make the folder of a run and its log, or go on with them.

        Raises ValueError if another run has used the folder before, or if no folder can be made.
        """
        self.path = folder / "log.txt"
        self.is_on = world.rank == 0
        self.is_shown = self.is_on and not screen.is_on
        self.unwritten = b""
        self.has_warned = False
        if not self.is_on:
            return

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=goes_on)
        except FileExistsError:
            if not folder.parent.is_dir():
                raise ValueError(f"OUT_DIR={folder.parent} is no folder: name one") from None
            raise ValueError(
                f"RUN_ID={folder.name} names a run whose files are in {folder}: choose another RUN_ID, unset it for a "
                "new one, or move that folder away"
            ) from None
        except OSError as error:
            raise ValueError(
                f"OUT_DIR={folder.parent} cannot hold a folder RUN_ID={folder.name} ({error.strerror}): name others"
            ) from None
        try:
            self.file = self.path.open("a+b" if goes_on else "x+b", buffering=0)
        except OSError as error:
            if not goes_on:
                folder.rmdir()
            raise ValueError(
                f"OUT_DIR={folder.parent} cannot be written ({error.strerror}): make room there, or name another"
            ) from None
        if not lock(self.file):
            raise ValueError(f"RUN_ID={folder.name} in {folder} is still running: wait for it, or stop it first")

    def __call__(self, line: str) -> None:
        self.to_file(line)
        if self.is_shown:
            show(line, sys.stdout)

    def to_file(self, line: str) -> None:
        if not self.is_on:
            return
        self.unwritten += f"{line}\n".encode(errors="backslashreplace")
        try:
            self.come_back()
            while self.unwritten:
                n_written = self.file.write(self.unwritten)
                self.unwritten = self.unwritten[n_written:]
        except OSError as error:
            if not self.has_warned:
                show(
                    f"warning: log {self.path} cannot be written ({error.strerror}): make room, or make it writable",
                    sys.stderr,
                )
            self.has_warned = True

    def come_back(self) -> None:
        """If the file was removed, or another has its name, begin it again with all that it held. Raises OSError."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(self.path.stat(), os.fstat(self.file.fileno())):
                return
            # What somebody else has written is not ours to delete.
            self.path.replace(self.path.with_name("log.other.txt"))

        # The open file holds its lines even without a name.
        self.file.seek(0)
        written = self.file.readall()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new_file = self.path.open("x+b", buffering=0)
        self.file.close()
        self.file = new_file
        self.unwritten = written + self.unwritten
        show(f"warning: log {self.path} was removed or replaced: it is written again, leave it there", sys.stderr)

    def close(self) -> None:
        """Raises OSError if the end of the log could not be written."""
        if not self.is_on:
            return
        self.file.close()
        if self.unwritten:
            raise OSError(f"log {self.path} lacks its last {len(self.unwritten)} bytes: copy them from the screen")


def lock(file: IO[bytes]) -> bool:
    """Whether no other process has the file now, nor will until this one ends. Taken for granted where locks fail."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def show(line: str, stream: TextIO | None) -> None:
    """Print a line as well as the screen can show it. One that is gone, as after `| head`, is given up quietly."""
    if stream is None:
        return
    text = line.encode(stream.encoding, "backslashreplace").decode(stream.encoding)
    try:
        print(text, file=stream, flush=True)
    except OSError:
        # What the stream still holds would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Tracker:
    """Sends numbers of the run to the package that TRACK names, where people watch it live.

    Whatever fails there is one warning, and the run goes on without it. If the package hangs, the run waits for it.
    """

    def __init__(self, name: str = "") -> None:
        """Raises ValueError if the package is missing. An empty name stands for no tracker."""
        self.name = name
        self.warn: Log
        self.send: Callable[[dict[str, Any], int], None]
        self.end: Callable[[int], None]

        spec = importlib.util.find_spec(name) if name else None
        # A folder of that name, as wandb leaves one behind, counts as a module too, but it has no file.
        if name and (spec is None or spec.origin is None):
            raise ValueError(f"TRACK={name} needs its package: python -m pip install {name}, or go without: --track=")

    def start(self, hp: Hyperparameters, config: dict[str, Any], first_step: int, warn: Log) -> None:
        """Begin the run there, or go on with it."""
        self.warn = warn
        with self.harmless():
            if self.name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                # What is there of later steps, the run is about to do again.
                writer = SummaryWriter(str(hp.run_folder / "tensorboard"), purge_step=first_step)
                writer.add_text("settings", f"```\n{json.dumps(config, indent=1)}\n```", first_step)

                def add_scalars(values: dict[str, Any], step: int) -> None:
                    for name, value in values.items():
                        writer.add_scalar(name, value, step)
                    writer.flush()

                self.send = add_scalars
                self.end = lambda status: writer.close()
            elif self.name == "trackio":
                import trackio

                trackio.init(project="parameter-golf", name=hp.run_id, resume="allow", config=config)
                self.send = trackio.log
                self.end = lambda status: trackio.finish()
            elif self.name == "wandb":
                import wandb

                # At a terminal and without an account, wandb would ask for one and wait.
                mode = os.environ.get("WANDB_MODE")
                if mode in (None, "online") and not wandb.login(prompt=False, verify=False):
                    mode = "offline"
                wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "parameter-golf"),
                    id=hp.run_id,
                    name=hp.run_id,
                    resume="allow",
                    config=config,
                    dir=str(hp.run_folder),
                    mode=mode,
                    settings=wandb.Settings(console="off"),  # it would put itself between the run and its screen
                )
                self.send = wandb.log
                self.end = wandb.finish

    def log(self, values: dict[str, Any], step: int) -> None:
        with self.harmless():
            if self.name:
                self.send(values, step)

    def finish(self, status: int) -> None:
        """End the run there, with the exit status of this process."""
        with self.harmless():
            if self.name:
                self.end(status)

    @contextlib.contextmanager
    def harmless(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.warn(f"TRACK={self.name} failed, the run goes on without it: {reason:.300}")
            self.name = ""


def key_values(values: Mapping[str, Any]) -> str:
    """{"a": 1, "b": True} -> "a:1 b:1", the grammar of the log lines."""
    items = []
    for key, value in values.items():
        items.append(f"{key}:{int(value) if isinstance(value, bool) else value}")
    return " ".join(items)


@functools.cache
def own_code() -> bytes:
    """This script as it was when it was first asked for: people edit it while a run is going on."""
    return Path(__file__).read_bytes()


def write_file(path: Path, *pieces: bytes | memoryview) -> None:
    """Write a file atomically: under its name stands all of it, or what was there before. Raises OSError."""
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            # Without this, a machine that loses its power may keep the new name and lose the content.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"{path} cannot be written ({error.strerror}): make room there, or name another folder") from None


def write_somewhere(path: Path, hp: Hyperparameters, *pieces: bytes | memoryview) -> Path:
    """Write a file, or in another folder under the name of the run if a disk is full. -> where it is

    Raises OSError if no folder took it.
    """
    try:
        write_file(path, *pieces)
    except OSError as error:
        first_error = error
    else:
        return path

    for find_folder in (tempfile.gettempdir, Path.home):
        # Even to ask for these folders may fail, on a machine without room or without a home.
        with contextlib.suppress(OSError, RuntimeError):
            place = Path(find_folder()).resolve() / f"{hp.run_id}.{path.name}"
            write_file(place, *pieces)
            return place
    raise OSError(f"{first_error}. No other folder took it either, {path.name} is lost")


def point_to_latest(folder: Path) -> bool:
    """Let LATEST, beside the folder of a run, lead to it. -> whether it does: some systems have no links"""
    temporary = folder / "latest.part"
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
        os.replace(temporary, folder.with_name(LATEST))
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True


def proc_value(file: str, key: str) -> str:
    """The value of `key` in a file of /proc; empty if there is no such file or key."""
    if Path(file).exists():
        for line in Path(file).read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


def describe_machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = proc_value("/proc/cpuinfo", "model name") or platform.machine()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type}:{'_'.join(name.split())}",
        "threads": torch.get_num_threads(),
    }


def peak_memory_mib(device: torch.device) -> tuple[int, int]:
    """The most memory that was allocated and reserved: for tensors on a GPU, else by this process (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20, torch.cuda.max_memory_reserved() // 2**20
    peak_kib = proc_value("/proc/self/status", "VmHWM").removesuffix(" kB")
    peak = int(peak_kib or 0) // 1024
    return peak, peak


# ----------------------------------------------------------------------------------------------------------------------
# 3. Model
# Shapes: B sequences, T positions, D model_dim, H num_heads, K num_kv_heads, E head_dim, V vocab_size
# ----------------------------------------------------------------------------------------------------------------------

NORM_EPS = 2.0**-23  # the machine epsilon of float32; torch's own default depends on its version and on the dtype
GATE_INPUTS = 12  # channels that a gate looks at

LossFn = Callable[[Tensor, Tensor, bool], Tensor]  # ids, targets and whether layers are looped -> mean nats
LogitsFn = Callable[[Tensor], Tensor]
# What a query may look at, in the form that a kind of attention wants: see attention_mask.
Mask = BlockMask | Tensor | None


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


class Linear(nn.Module):
    """A matrix product without bias: float32 weight, product in the dtype of the input."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Output channels times `scale` (n_out,), if there is one.

        The rows of the matrix are scaled, which are fewer than the tokens. So the gradient of the scale is a sum over
        columns, and not over tokens.
        """
        weight = self.weight if scale is None else scale[:, None] * self.weight
        return F.linear(x, weight.to(x.dtype))


class Gate(nn.Module):
    """Gates in (0, 1), 1/2 at first. They look at a few channels of their input only, which suffices and is cheap."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, min(GATE_INPUTS, n_in)))

    def forward(self, x: Tensor) -> Tensor:
        n_in = self.weight.size(1)
        return torch.sigmoid(F.linear(x[..., :n_in], self.weight.to(x.dtype)))


def rotary_table(seq_len: int, n_dims: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021), each (T, n_dims / 2), with dtype and device of `like`.

    The angles are float32. In bfloat16, as in the published script, positions beyond 256 coincide, which costs 0.03
    nats at a context of 512.
    """
    channel = torch.arange(0, n_dims, 2, device=like.device, dtype=torch.float32)
    frequency = base ** -(channel / n_dims)
    position = torch.arange(seq_len, device=like.device, dtype=torch.float32)
    angle = torch.outer(position, frequency)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channels i and i + R / 2 of the first R of each head by the angle of the position. (B, H, T, E) -> same"""
    half = cos.size(-1)
    a = x[..., :half]
    b = x[..., half : 2 * half]
    rest = x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def document_numbers(ids: Tensor, config: GPTConfig) -> Tensor:
    """Which document of its row each token belongs to, or 0 for all without DOCUMENT_MASKS.

    (B, T) int64 -> (B, T) int32, or (1, T) where all rows are alike.
    """
    if config.document_masks:
        return (ids == config.bos_id).cumsum(1, dtype=torch.int32)
    return torch.zeros_like(ids[:1], dtype=torch.int32)


def attention_kind(config: GPTConfig, device: torch.device, compiled: bool) -> str:
    """The fastest way of `attend` that works here.

    blocks  query blocks, on a CPU
    flex    FlexAttention, which skips what a document mask hides; without a compiler it is slow
    sdpa    torch's own attention: with document masks a dense mask, else causal, where it is the fastest
    """
    if device.type == "cpu":
        return "blocks"
    # FlexAttention has no kernel for heads of fewer than 16 channels.
    if device.type == "cuda" and compiled and config.document_masks and config.head_dim >= 16:
        return "flex"
    return "sdpa"


def attention_mask(ids: Tensor, config: GPTConfig, dtype: torch.dtype, kind: str) -> Mask:
    """What a kind of attention has to know of a batch (B, T): a token sees its document up to itself. Once per batch.

    blocks  numbers of documents, (B, T) or (1, T) int32
    flex    a BlockMask, which lists the blocks of 128 keys that each block of 128 queries sees
    sdpa    (B, 1, T, T), 0 where a query sees a key, else -inf; None if all rows are plainly causal
    """
    if kind == "sdpa" and not config.document_masks:
        return None
    document = document_numbers(ids, config)
    if kind == "blocks":
        return document
    if kind == "flex":
        return block_mask(document)

    visible = (document[:, :, None] == document[:, None, :]).tril_()
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, -math.inf)[:, None]


FLEX_BLOCK = 128  # queries and keys of a block, the size that FlexAttention is fastest with


def block_mask(document: Tensor) -> BlockMask:
    """(B, T) numbers of documents, which never fall along a row -> mask for FlexAttention

    The same as create_block_mask makes of `is_visible`. That one looks at all pairs of tokens and so must be compiled,
    which took 25 s on a new machine. Here the first and the last document of a block tell enough.
    """
    T = document.size(1)
    starts = torch.arange(0, T, FLEX_BLOCK, device=document.device)
    ends = (starts + FLEX_BLOCK - 1).clamp_max(T - 1)
    first = document[:, starts]  # (B, n) documents at the edges of each block
    last = document[:, ends]

    # By block of queries and block of keys, (B, 1, n, n): whether any of its pairs is visible, and whether all are.
    any_visible = (last[:, None, :] >= first[:, :, None]).tril()
    all_visible = (first[:, None, :] == last[:, :, None]).tril(-1)
    is_whole = starts + FLEX_BLOCK <= T
    all_visible = all_visible & is_whole[:, None]
    some_hidden = (any_visible & ~all_visible)[:, None]
    none_hidden = all_visible[:, None]

    def is_visible(b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (document[b, i] == document[b, j])

    return BlockMask.from_kv_blocks(
        some_hidden.sum(-1, dtype=torch.int32),
        in_front(some_hidden),
        none_hidden.sum(-1, dtype=torch.int32),
        in_front(none_hidden),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=is_visible,
        seq_lengths=(T, T),
    )


def in_front(chosen: Tensor) -> Tensor:
    """The places along the last dimension, those that are chosen first. bool -> int32, same shape"""
    return chosen.int().argsort(dim=-1, descending=True, stable=True).int()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention with a mask of attention_mask. (B, H, T, E), (B, K, T, E), (B, K, T, E) -> (B, H, T, E)"""
    n_groups = q.size(1) // k.size(1)
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=n_groups > 1)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=n_groups > 1)
    if mask.dim() == 2:
        return attend_in_blocks(q, k, v, mask)

    # SDPA's fast kernels do not support grouped heads together with a mask.
    k = k.repeat_interleave(n_groups, dim=1)
    v = v.repeat_interleave(n_groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    """Attention for a CPU: block by block of queries, each on the keys up to its end. Up to twice as fast as SDPA.

    The queries are those of the last tokens that have keys: all of them, unless a Cache holds keys of earlier tokens.
    `document`: (B, T) or (1, T) numbers of documents, T the number of keys
    """
    B, H, n_queries, E = q.shape
    K, T = k.shape[1:3]
    n_before = T - n_queries
    block_size = max(128, T // 8)
    position = torch.arange(T, device=q.device)
    outputs = []
    for start in range(n_before, T, block_size):
        end = min(start + block_size, T)
        # Heads that share keys are stacked, so that one product serves them all.
        queries = q[:, :, start - n_before : end - n_before].reshape(B, K, -1, E) * E**-0.5
        scores = (queries @ k[:, :, :end].mT).float().view(B, H, -1, end)
        visible = document[:, start:end, None] == document[:, None, :end]
        visible = visible & (position[start:end, None] >= position[:end])
        scores = scores.masked_fill(~visible[:, None], -math.inf)
        weights = scores.softmax(-1).to(v.dtype).view(B, K, -1, end)
        outputs.append((weights @ v[:, :, :end]).view(B, H, -1, E))
    return torch.cat(outputs, dim=2)


def drop_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self attention: outputs (B, H, T, E) less their part along the token's own value (B, K, T, E)."""
    direction = F.normalize(v, dim=-1)[:, :, None]
    y = y.unflatten(1, (v.size(1), -1))  # (B, K, H / K, T, E)
    along = (y * direction).sum(-1, keepdim=True)
    return (y - along * direction).flatten(1, 2)


class Past:
    """Keys and values of the tokens that one pass through a layer has read, each (B, K, T, E)."""

    def __init__(self, empty: Tensor) -> None:
        self.k = empty
        self.v = empty

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of new tokens. -> those of all tokens so far"""
        self.k = torch.cat((self.k, k), dim=2)
        self.v = torch.cat((self.v, v), dim=2)
        return self.k, self.v


class Cache:
    """What a model remembers of the rows that it has read, so that each further token costs one position only.

    model(a, cache=cache) and then model(b, cache=cache) give the logits of model(a followed by b), in two parts.
    """

    def __init__(self, model: GPT, n_rows: int = 1) -> None:
        config = model.config
        weight = model.tok_emb.weight
        shape = (n_rows, config.num_kv_heads, 0, config.head_dim)
        empty = torch.empty(shape, dtype=model.compute_dtype, device=weight.device)
        self.ids = torch.empty((n_rows, 0), dtype=torch.int64, device=weight.device)
        # A layer that is looped sees another stream in each pass.
        self.passes = [Past(empty) for _ in config.layer_order(looping=True)]

    def extend(self, ids: Tensor) -> Tensor:
        """Keep new tokens (B, T). -> all tokens so far"""
        self.ids = torch.cat((self.ids, ids), dim=1)
        return self.ids


class Context(NamedTuple):
    """What all layers share in a forward pass."""

    x0: Tensor  # (B, T, D) normalised embeddings
    cos: Tensor  # (T, R / 2)
    sin: Tensor  # (T, R / 2)
    mask: Mask
    past: Past | None = None  # what this pass through a layer remembers, while text is generated


class Attention(nn.Module):
    """Causal grouped-query attention. Queries and keys are normalised, a learned gain per head sets the sharpness."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim

        self.c_q = Linear(config.model_dim, config.model_dim)
        self.c_k = Linear(config.model_dim, kv_dim)
        self.c_v = Linear(config.model_dim, kv_dim)
        self.proj = Linear(config.model_dim, config.model_dim)
        self.q_gain = nn.Parameter(torch.empty(config.num_heads))
        self.gate = Gate(config.model_dim, config.num_heads) if config.sparse_attn_gate_enabled else None
        self.exclusive = layer >= config.num_layers - config.xsa_last_n

    def forward(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), whose channels are multiplied by `scale` (D,)"""
        B, T, D = x.shape
        q = self.c_q(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, E)
        k = self.c_k(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        v = self.c_v(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        q = rotate(norm(q), context.cos, context.sin) * self.q_gain.to(q.dtype)[:, None, None]
        k = rotate(norm(k), context.cos, context.sin)

        if context.past is None:
            y = attend(q, k, v, context.mask)
        else:
            y = attend(q, *context.past.extend(k, v), context.mask)
        if self.exclusive:
            y = drop_own_value(y, v)
        y = y.transpose(1, 2)  # (B, T, H, E)
        if self.gate is not None:
            y = y * self.gate(x)[..., None]
        return cast(Tensor, self.proj(y.reshape(B, T, D), scale))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = Linear(config.model_dim, config.mlp_mult * config.model_dim)
        self.proj = Linear(config.mlp_mult * config.model_dim, config.model_dim)
        self.slope = config.leaky_relu_slope

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), whose channels are multiplied by `scale` (D,)"""
        hidden = F.leaky_relu(self.fc(x), self.slope).square()  # relu^2: So et al. 2021 (Primer)
        return cast(Tensor, self.proj(hidden, scale))


class Block(nn.Module):
    """Attention and MLP on a residual stream that can blend the embedding `x0` back in."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.empty(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.empty(config.model_dim))
        self.resid_mix = nn.Parameter(torch.empty(2, config.model_dim))

    def forward(self, x: Tensor, depth_scale: Tensor, context: Context) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        depth_scale = depth_scale.to(x.dtype)
        x = mix[0] * x + mix[1] * context.x0
        x = x + self.attn(norm(x) * depth_scale, context, self.attn_scale)
        x = x + self.mlp(norm(x) * depth_scale, self.mlp_scale)
        return x


def merge_skip(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """The stream of the second half with a skip connection added, or blended in by a gate.

    (B, T, D), (B, T, D), (D,), (D,) -> (B, T, D)
    """
    skip = weight.to(x.dtype) * skip
    if gate is None:
        return x + skip
    return skip.lerp(x, torch.sigmoid(gate).to(x.dtype))


Piece = TypeVar("Piece", bound=Callable[..., Any])


@functools.cache
def piece(function: Piece, compiled: bool) -> Piece:
    """A piece of the model: the function as it is, or compiled for every shape that it meets.

    Piece by piece the model is as fast as compiled as a whole, and it starts much sooner, because layers share theirs.
    """
    if not compiled:
        return function
    # Blocks of two kinds, training and evaluation, micro-batches of two sizes: torch's default of 8 would end the run.
    torch._dynamo.config.recompile_limit = 64
    return cast(Piece, torch.compile(function, dynamic=False, fullgraph=True))


class GPT(nn.Module):
    """A decoder whose first half feeds its second half through skip connections, last to first (U-net).

    While `looping`, layers loop_start .. loop_end run several times, and each pass counts as a layer of either half.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.bfloat16 if config.compute_dtype == "bfloat16" else torch.float32

        # The embedding is also the output matrix: its rows are looked up at the start and multiplied at the end.
        self.tok_emb = Linear(config.model_dim, config.vocab_size)
        self.smear_gate = Gate(config.model_dim, 1) if config.smear_gate_enabled else None
        self.smear_scale = nn.Parameter(torch.empty(1)) if config.smear_gate_enabled else None

        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        n_skips = len(config.layer_order(looping=True)) // 2
        self.skip_weights = nn.Parameter(torch.empty(n_skips, config.model_dim))
        self.skip_gates = nn.Parameter(torch.empty(n_skips, config.model_dim)) if config.skip_gates_enabled else None

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D), normalised."""
        x = F.embedding(ids, self.tok_emb.weight).to(self.compute_dtype)
        if self.smear_gate is not None and self.smear_scale is not None:
            gate = self.smear_scale.to(x.dtype) * self.smear_gate(x)
            # A document's first token gets nothing of the token before it, which belongs to another document.
            gate = gate * (ids != self.config.bos_id)[..., None]
            x = x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))
        return norm(x)

    def context(self, ids: Tensor, compiled: bool) -> Context:
        """What the layers need to read rows (B, T) from their start."""
        config = self.config
        x0 = piece(GPT.embed, compiled)(self, ids)
        cos, sin = rotary_table(ids.size(1), config.rope_dims or config.head_dim, config.rope_base, like=x0)
        mask = attention_mask(ids, config, x0.dtype, attention_kind(config, ids.device, compiled))
        return Context(x0, cos, sin, mask)

    def context_behind(self, cache: Cache, ids: Tensor) -> Context:
        """What the layers need to read tokens (B, T) that follow those of the cache, which takes them in."""
        config = self.config
        n_new = ids.size(1)
        ids = cache.extend(ids)
        # The token before the new ones is embedded again, because a token gets something of its predecessor.
        x0 = self.embed(ids[:, -n_new - 1 :])[:, -n_new:]
        cos, sin = rotary_table(ids.size(1), config.rope_dims or config.head_dim, config.rope_base, like=x0)
        mask = attention_mask(ids, config, x0.dtype, "blocks")
        return Context(x0, cos[-n_new:], sin[-n_new:], mask)

    def hidden(self, ids: Tensor, looping: bool = True, compiled: bool = False, cache: Cache | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, D), before the last normalisation."""
        config = self.config
        run_block = piece(Block.forward, compiled)
        merge = piece(merge_skip, compiled)
        context = self.context(ids, compiled) if cache is None else self.context_behind(cache, ids)

        # A tensor, because torch.compile would compile every layer on its own for a number that differs by layer.
        depth = torch.arange(1, config.num_layers + 1, device=ids.device, dtype=torch.float32)
        depth_scale = depth.rsqrt() if config.ln_scale else torch.ones_like(depth)

        # Views, here and of the skips, because a piece that gets one tensor twice would be compiled for that as well.
        x = context.x0.view_as(context.x0)
        order = config.layer_order(looping)
        n_encoder = len(order) // 2
        skips: list[Tensor] = []
        for i, layer in enumerate(order):
            if i >= n_encoder and skips:
                index = i - n_encoder
                gate = self.skip_gates[index] if self.skip_gates is not None else None
                x = merge(x, skips.pop(), self.skip_weights[index], gate)
            if cache is not None:
                context = context._replace(past=cache.passes[i])
            x = run_block(self.blocks[layer], x, depth_scale[layer], context)
            if i < n_encoder:
                skips.append(x.view_as(x))
        return x

    def logits(self, x: Tensor) -> Tensor:
        """What `hidden` returned -> (B, T, V) float32 within +-logit_softcap (Gemma 2, 2024)."""
        cap = self.config.logit_softcap
        return cap * torch.tanh(self.tok_emb(norm(x)).float() / cap)

    def hidden_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per target of what `hidden` returned. (B, T, D), (B, T) int64 -> ()"""
        return F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten())

    def forward(self, ids: Tensor, looping: bool = True, compiled: bool = False, cache: Cache | None = None) -> Tensor:
        """Next-token logits. (B, T) int64 -> (B, T, V) float32

        With a cache, `ids` follow those of the calls before, and compiled is False.
        """
        x = self.hidden(ids, looping, compiled, cache)
        return piece(GPT.logits, compiled)(self, x)

    def loss(self, ids: Tensor, targets: Tensor, looping: bool = True, compiled: bool = False) -> Tensor:
        """Mean nats per target. (B, T) int64, (B, T) int64 -> ()"""
        x = self.hidden(ids, looping, compiled)
        return piece(GPT.hidden_loss, compiled)(self, x, targets)


@torch.no_grad()
def init_weights(model: GPT, hp: Hyperparameters) -> None:
    """Set every parameter; the same values on every device and rank for one SEED.

    tok_emb                 N(0, TIED_EMBED_INIT_STD)
    c_q, c_k, c_v, fc       U(-1, 1) / sqrt(fan in), as nn.Linear does
    proj                    0: blocks start as the identity
    the others              constants of the table below: gates half open, nothing smeared
    """
    constants: dict[str, Any] = {
        "proj": 0.0,
        "gate": 0.0,
        "smear_gate": 0.0,
        "smear_scale": 0.0,
        "skip_gates": 0.0,
        "skip_weights": 1.0,
        "attn_scale": 1.0,
        "mlp_scale": 1.0,
        "q_gain": hp.qk_gain_init,
        "resid_mix": [[1.0], [0.0]],  # all of the stream, nothing of the embedding
    }
    generator = torch.Generator().manual_seed(hp.seed)
    for name, p in model.named_parameters():
        kind = name.removesuffix(".weight").split(".")[-1]
        value = torch.empty(p.shape)
        if kind == "tok_emb":
            value.normal_(0.0, hp.tied_embed_init_std, generator=generator)
        elif kind in ("c_q", "c_k", "c_v", "fc"):
            value.uniform_(-1.0, 1.0, generator=generator).mul_(p.size(1) ** -0.5)
        else:
            # A KeyError here means that a new parameter has no initial value yet.
            value.copy_(torch.tensor(constants[kind]))
        p.copy_(value)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Optimizer
# ----------------------------------------------------------------------------------------------------------------------

# The polynomial a x + b x^3 + c x^5 of every Newton-Schulz iteration (kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Each is the best polynomial for the interval that the ones before it map singular values to (Amsel et al. 2025). The
# last one repeats.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: Tensor, steps: int, polar_express: bool, dtype: torch.dtype) -> Tensor:
    """Replace the singular values of every matrix by values near 1. (N, R, C) -> (N, R, C) in `dtype`

    This is the quintic Newton-Schulz iteration of Muon, zeropower_via_newtonschulz5 in other codebases. N matrices have
    one shape. After five iterations, singular values above 0.003 of the largest land in about [0.7, 1.2]; with
    POLAR_EXPRESS those above 0.001 in [0.85, 1.15]. The polynomials give up accuracy at 1 for a steep slope at 0, which
    lifts weak directions.
    """
    x = g.to(dtype)
    # The iteration needs a spectral norm of at most 1. The Frobenius norm is never smaller.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT  # so that the Gram matrix is the small one

    for i in range(steps):
        a, b, c = POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)] if polar_express else NEWTON_SCHULZ
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalized step (Jordan et al. 2024), for the matrices inside the blocks only.

    A step has a spectral norm of about MATRIX_LR, times sqrt(rows / columns) for tall matrices. So entries change by
    about MATRIX_LR / sqrt(columns) (RMS), whatever the shape.

    Matrices of one shape form a group: they are stacked and orthogonalized together. Every rank orthogonalizes a share
    of each stack, and one all-reduce hands the results round. The momentum is kept whole on every rank, since each of
    them has all gradients anyway.
    """

    def __init__(self, params: list[nn.Parameter], hp: Hyperparameters, world: World) -> None:
        self.hp = hp
        self.world = world
        shapes = dict.fromkeys(p.shape for p in params)  # a set that keeps the order
        groups = [{"params": [p for p in params if p.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": hp.matrix_lr, "base_lr": hp.matrix_lr, "momentum": hp.muon_momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        updates = [self.partial_update(group) for group in self.param_groups]
        self.world.sum_all(updates)

        for group, update in zip(self.param_groups, updates, strict=True):
            aspect_ratio = update.size(1) / update.size(2)
            lr = group["lr"] * max(1.0, aspect_ratio) ** 0.5
            torch._foreach_mul_(group["params"], 1.0 - group["lr"] * self.hp.muon_wd)
            torch._foreach_add_(group["params"], list(update.float().unbind()), alpha=-lr)

    def partial_update(self, group: dict[str, Any]) -> Tensor:
        """The orthogonalized directions of a group, 0 outside the share of this rank. -> (N, R, C)"""
        params: list[nn.Parameter] = group["params"]
        grads = torch.stack([cast(Tensor, p.grad) for p in params])

        state = self.state[params[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grads)
        momentum = state["momentum"]
        momentum.mul_(group["momentum"]).add_(grads)

        part = self.world.share(len(params))
        nesterov = grads.add_(momentum, alpha=group["momentum"])[part.start : part.stop]
        if self.hp.muon_row_normalize:
            nesterov = nesterov / nesterov.norm(dim=-1, keepdim=True).clamp_min(1e-7)

        update = torch.zeros_like(grads, dtype=pick_dtype(grads.device))
        update[part.start : part.stop] = orthogonalize(
            nesterov, self.hp.muon_backend_steps, self.hp.polar_express, update.dtype
        )
        return update


def build_optimizers(model: GPT, hp: Hyperparameters, world: World) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks; AdamW for the embedding, and for gains, scales and gates."""
    embedding = [model.tok_emb.weight]
    matrices = []
    scalars = []
    for name, p in model.named_parameters():
        if p is model.tok_emb.weight:
            continue
        if name.startswith("blocks.") and name.endswith(".weight") and "gate" not in name:
            matrices.append(p)
        else:
            scalars.append(p)

    groups = [
        {"params": embedding, "lr": hp.tied_embed_lr, "base_lr": hp.tied_embed_lr, "weight_decay": hp.embed_wd},
        {"params": scalars, "lr": hp.scalar_lr, "base_lr": hp.scalar_lr, "weight_decay": hp.adam_wd},
    ]
    fused = world.device.type in ("cpu", "cuda")
    adam = torch.optim.AdamW(groups, betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, fused=fused)
    return [Muon(matrices, hp, world), adam]


# ----------------------------------------------------------------------------------------------------------------------
# 5. Data
# ----------------------------------------------------------------------------------------------------------------------

# The .bin format of llm.c, which data/shards.py writes.
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
# Systems limit the open files of a process, macOS to 256. Of more shards than this, the rest is opened to be read.
MAX_OPEN_SHARDS = 128
# Windows would change the bytes without its O_BINARY, which other systems do not have.
READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0)

HOW_TO_GET_DATA = (
    "`python data/build_shards.py` makes the data of PRESET=smoke, or with --input shards of your own text; "
    "`python data/download.py --variant sp1024` gets those of PRESET=baseline and small, "
    "--variant sp8192 those of record and tiny"
)

Batch = list[tuple[Tensor, Tensor]]  # micro-batches of one step: ids and targets, each (b, T) int64 on the device


class Shard:
    """One .bin shard of a split, whose tokens are read from the file whenever they are asked for.

    llm.c layout: 256 little-endian int32 (magic, version, N, zeros), then N little-endian uint16. data/shards.py has
    a reader of its own, because the data tools do without torch; tests/test_shards.py holds the two together.

    The file is not mapped into memory: if it then became shorter, the system would kill the process without a word.
    """

    def __init__(self, path: Path, keep_open: bool = True) -> None:
        """Raises FileNotFoundError if there is no such file, and ValueError if it is not a whole shard."""
        remedy = "build it again with data/build_shards.py"
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a regular file: {remedy}")
        self.path = path
        self.file = os.open(path, READ_ONLY)
        close = weakref.finalize(self, os.close, self.file)
        header = np.frombuffer(os.read(self.file, HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
        status = os.fstat(self.file)
        if status.st_size < HEADER_BYTES or header[0] != SHARD_MAGIC:
            raise ValueError(f"{path} is not a token shard (its first bytes are not magic {SHARD_MAGIC}): {remedy}")
        if header[1] != SHARD_VERSION:
            raise ValueError(f"{path} has shard version {header[1]}, not {SHARD_VERSION}: {remedy}")

        declared = int(header[2])
        stored = (status.st_size - HEADER_BYTES) / 2
        if stored != declared:
            state = "truncated" if stored < declared else "too long"
            raise ValueError(f"{path} is {state}: its header says {declared} tokens, it holds {stored:g}: {remedy}")
        if declared <= 0:
            raise ValueError(f"{path} is empty: {remedy}")

        self.n_tokens = declared
        # Without the inode, which some network file systems change from time to time.
        self.size_and_time = (status.st_size, status.st_mtime_ns)
        if not keep_open:
            close()
            self.file = -1

    def __len__(self) -> int:
        return self.n_tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1, all of which the shard must hold. -> (count,) uint16

        Raises ValueError if the file was truncated or overwritten since the shard was opened. One that was removed or
        replaced does not matter while it is kept open, because the old content is still read.
        """
        n_bytes = 2 * count
        data = b""
        try:
            file = os.open(self.path, READ_ONLY) if self.file < 0 else self.file
            try:
                os.lseek(file, HEADER_BYTES + 2 * start, os.SEEK_SET)
                # The system gives at most 2 GiB at once.
                while len(data) < n_bytes and (piece := os.read(file, n_bytes - len(data))):
                    data += piece
                # After the reading, so that no change can slip in between.
                status = os.fstat(file)
            finally:
                if self.file < 0:
                    os.close(file)
        except OSError as error:
            raise ValueError(
                f"{self.path} can no longer be read ({error.strerror}): put it back, leave it there until the run "
                "ends, and run again"
            ) from None

        if len(data) < n_bytes or (status.st_size, status.st_mtime_ns) != self.size_and_time:
            raise ValueError(
                f"{self.path} was changed during the run ({self.size_and_time[0]} bytes at its start, {status.st_size} "
                "now): build or fetch it again, leave it alone until the run ends, and run again"
            )
        return np.frombuffer(data, "<u2")


class TokenStream:
    """The shards of one split as one long sequence of tokens."""

    def __init__(self, folder: str, pattern: str) -> None:
        self.files = sorted(Path(folder).glob(pattern))
        if not self.files:
            raise FileNotFoundError(f"DATA_PATH={folder!r} holds no {pattern}: {HOW_TO_GET_DATA}")
        self.shards = [Shard(file, keep_open=i < MAX_OPEN_SHARDS) for i, file in enumerate(self.files)]
        self.ends = np.cumsum([len(shard) for shard in self.shards]).tolist()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1, as far as there are any, across the edges of shards. -> (n,) uint16"""
        parts = list[np.ndarray]()
        stop = min(start + count, len(self))
        while start < stop:
            # The shard that holds token `start`.
            i = bisect.bisect_right(self.ends, start)
            shard = self.shards[i]
            n_read = min(stop, self.ends[i]) - start
            parts.append(shard.read(start - self.ends[i] + shard.n_tokens, n_read))
            start += n_read
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.zeros(0, "<u2"), *parts])

    def require_below(self, vocab_size: int, tokens: np.ndarray, start: int) -> None:
        """Raise ValueError with file and offset if one of `tokens`, read at `start`, is not below `vocab_size`."""
        if int(tokens.max()) < vocab_size:
            return
        first_bad = int(np.argmax(tokens >= vocab_size))
        position = start + first_bad
        shard = bisect.bisect_right(self.ends, position)
        offset = position - (self.ends[shard] - len(self.shards[shard]))
        raise ValueError(
            f"{self.files[shard]} holds token {tokens[first_bad]} at offset {offset}, not below "
            f"VOCAB_SIZE={vocab_size}: name the tokenizer of these shards"
        )


@functools.lru_cache(maxsize=2)
def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """0 .. n - 1 in an order that seed and epoch decide, together with the version of numpy. -> (n,) int64"""
    return np.random.default_rng((seed, epoch)).permutation(n)


class Loader:
    """Batches of the train split as a pure function of the step.

    The split is cut into sequences of seq_len + 1 tokens that overlap by one. Step s takes the next n_sequences of
    them, as they lie or shuffled, and starts over at the end (a new epoch). A rank takes a contiguous share, in
    micro-batches of almost equal size. So neither ranks nor micro-batches change the tokens of a step.
    """

    def __init__(self, stream: TokenStream, hp: Hyperparameters, vocab_size: int, world: World) -> None:
        self.stream = stream
        self.vocab_size = vocab_size
        self.world = world
        self.seq_len = hp.train_seq_len
        self.seed = hp.seed
        self.shuffle = hp.shuffle
        self.n_sequences = hp.train_batch_tokens // hp.train_seq_len  # of a step, over all ranks
        self.epoch_sequences = (len(stream) - 1) // hp.train_seq_len
        # Sequences of a micro-batch. By default a rank takes its share at once, until fit_micro_batch sets a number.
        self.micro_sequences = math.ceil(self.n_sequences / world.size)
        if hp.micro_batch_tokens:
            self.micro_sequences = max(1, hp.micro_batch_tokens // hp.train_seq_len)

        if self.epoch_sequences < self.n_sequences:
            raise ValueError(
                f"DATA_PATH={hp.data_path!r} holds {len(stream)} train tokens, too few for one step of "
                f"TRAIN_BATCH_TOKENS={hp.train_batch_tokens}: lower it, or take PRESET=smoke, whose steps are short"
            )
        if self.n_sequences < world.size:
            raise ValueError(
                f"WORLD_SIZE={world.size} exceeds the {self.n_sequences} sequences of a step: lower it or raise "
                f"TRAIN_BATCH_TOKENS={hp.train_batch_tokens}"
            )

    def epoch(self, step: int) -> int:
        return step * self.n_sequences // self.epoch_sequences

    def sequence(self, index: int) -> np.ndarray:
        """Sequence `index` of the run. -> (T + 1,) uint16"""
        epoch, place = divmod(index, self.epoch_sequences)
        if self.shuffle:
            place = int(shuffled(self.epoch_sequences, self.seed, epoch)[place])
        start = place * self.seq_len
        tokens = self.stream.read(start, self.seq_len + 1)
        self.stream.require_below(self.vocab_size, tokens, start)
        return tokens

    def batch(self, step: int) -> Batch:
        """This rank's micro-batches of a step. -> [(ids, targets)], each (b, T) int64 on the device"""
        rank_share = self.world.share(self.n_sequences)
        n_micro = math.ceil(len(rank_share) / self.micro_sequences)
        pairs = []
        for i in range(n_micro):
            part = share(len(rank_share), i, n_micro)
            places = rank_share[part.start : part.stop]
            rows = [self.sequence(step * self.n_sequences + place) for place in places]
            tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
            if self.world.device.type == "cuda":
                tokens = tokens.pin_memory()  # without it the copy would wait for the device
            tokens = tokens.to(self.world.device, non_blocking=tokens.is_pinned())
            pairs.append((tokens[:, :-1], tokens[:, 1:]))
        return pairs


# ----------------------------------------------------------------------------------------------------------------------
# 6. Score: bits per byte
# ----------------------------------------------------------------------------------------------------------------------

# Rises whenever a function of this section, or the judge, could give another score. What changed with 3: a target
# counts for source bytes only as far as decoding gives them back, and the judge asks for shortened contexts before any
# process of the record has seen what follows, not afterwards.
JUDGE_VERSION = 3
# Logits per rank and forward pass, at most: 128 MiB in float32. A constant, not fitted to the memory at hand, because
# the shape of a batch changes how sums are rounded.
EVAL_LOGITS = 2**25


class Score(NamedTuple):
    """Sums over the targets of a split, nats in float64, tokens and bytes exactly, and what follows from them."""

    nats: float
    tokens: int
    bytes: int
    partial: bool = False  # only a part of the split was scored

    @property
    def val_loss(self) -> float:
        """Nats per token, which depend on the tokenizer."""
        return self.nats / self.tokens

    @property
    def val_bpb(self) -> float:
        """Bits per byte, which can be compared across tokenizers."""
        return self.nats / math.log(2) / self.bytes

    def line(self, digits: int) -> str:
        """The score as it stands in the log."""
        text = f"val_loss:{self.val_loss:.{digits}f} val_bpb:{self.val_bpb:.{digits}f}"
        return f"{text} partial:{self.tokens}_targets" if self.partial else text


class ValSplit(NamedTuple):
    """The text to score."""

    ids: np.ndarray  # (N,) uint16
    bytes: np.ndarray  # (N,) uint16: bytes of text that each token stands for as a target
    identity: dict[str, Any]  # what was loaded and how its bytes are counted; goes into the log


def piece_bytes(sp: spm.SentencePieceProcessor, ids: np.ndarray) -> np.ndarray:
    """Bytes of each token of normalised text, as the published challenge counts them. (N,) -> (N,) uint16

    A piece counts its UTF-8 bytes, a byte piece 1, a control, unknown or unused piece 0. The mark U+2581 at the start
    of a piece is one space, except after a control piece, where the tokenizer put it and the text has none. Text
    that the tokenizer's normaliser folded is counted as folded, which is not the source text.
    Raises ValueError for a tokenizer with the mark inside a piece, whose pieces do not tell the bytes.
    """
    mark = "\u2581"
    n_pieces = sp.get_piece_size()
    lengths = np.zeros(n_pieces, np.uint16)
    is_special = np.zeros(n_pieces, bool)
    has_space = np.zeros(n_pieces, bool)
    for i in range(n_pieces):
        piece = sp.id_to_piece(i)
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            is_special[i] = True
        elif mark in piece[1:]:
            raise ValueError(
                f"TOKENIZER_PATH has piece {i} {piece!a}, whose bytes are ambiguous: use data with a byte sidecar"
            )
        else:
            lengths[i] = 1 if sp.is_byte(i) else len(piece.removeprefix(mark).encode())
            has_space[i] = piece.startswith(mark)

    after_special = np.concatenate(([True], is_special[ids[:-1]]))
    return lengths[ids] + (has_space[ids] & ~after_special)


def load_tokenizer(
    path: str, vocab_size: int, bos_id: int, known_sha256: str = ""
) -> tuple[spm.SentencePieceProcessor, str]:
    """The tokenizer and the sha256 of its file. Raises if it is missing, not a SentencePiece model, or another one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"TOKENIZER_PATH={path!r} does not exist: {HOW_TO_GET_DATA}")
    data = Path(path).read_bytes()
    try:
        sp = spm.SentencePieceProcessor(model_proto=data)
        n_pieces = sp.get_piece_size()
    except (RuntimeError, OSError):
        n_pieces = 0
    if n_pieces == 0:
        raise ValueError(
            f"TOKENIZER_PATH={path!r} is not a SentencePiece model: name the .model file the shards were made with"
        )

    if n_pieces != vocab_size:
        raise ValueError(
            f"TOKENIZER_PATH={path!r} has {n_pieces} pieces, not VOCAB_SIZE={vocab_size}: set VOCAB_SIZE={n_pieces}"
        )
    if sp.bos_id() != bos_id:
        raise ValueError(
            f"TOKENIZER_PATH={path!r} has BOS id {sp.bos_id()}, not BOS_ID={bos_id}: set BOS_ID={sp.bos_id()}"
        )
    sha256 = hashlib.sha256(data).hexdigest()
    if known_sha256 and sha256 != known_sha256:
        raise ValueError(
            f"TOKENIZER_PATH={path!r} has sha256 {sha256}, but the model was made with {known_sha256}: "
            "name that tokenizer"
        )
    return sp, sha256


def load_val_split(
    data_path: str, sp: spm.SentencePieceProcessor, tokenizer_sha256: str, max_tokens: int = 0
) -> ValSplit:
    """The split to score, or only its first `max_tokens`, with the bytes of every token.

    The bytes come from the sidecar where the data has one, else from the tokenizer's pieces. Raises ValueError for ids
    outside the vocabulary, for files that contradict their manifest or each other, and for an unfinished export.
    """
    stream = TokenStream(data_path, "fineweb_val_[0-9]*.bin")
    files = list(stream.files)
    # In pieces, so that little of what is refused is ever copied.
    n_tokens = 2**23
    for start in range(0, len(stream), n_tokens):
        stream.require_below(sp.get_piece_size(), stream.read(start, n_tokens), start)
    ids = stream.read(0, len(stream))

    has_sidecar = any(Path(data_path).glob("fineweb_val_bytes_*.bin"))
    if has_sidecar:
        if not Path(data_path, "manifest.json").exists():
            # Published shards have neither; data/build_shards.py writes both, the manifest last.
            raise ValueError(
                f"DATA_PATH={data_path!r} has byte counts but no manifest.json, so its export was not finished: "
                "run data/build_shards.py again"
            )
        sidecar = TokenStream(data_path, "fineweb_val_bytes_*.bin")
        files += sidecar.files
        if len(sidecar) != len(ids):
            raise ValueError(
                f"DATA_PATH={data_path!r} has {len(ids)} validation tokens but {len(sidecar)} byte counts: "
                "export it again with data/build_shards.py"
            )
        n_bytes = sidecar.read(0, len(sidecar))
    else:
        n_bytes = piece_bytes(sp, ids)

    n_kept = min(len(ids), max_tokens or len(ids))
    if not n_bytes[1:n_kept].any():
        raise ValueError(f"DATA_PATH={data_path!r} has no text in its first {n_kept} validation tokens: score more")
    identity = {
        "val_tokens": len(ids),
        "val_documents": int((ids == sp.bos_id()).sum()),
        "val_bytes": int(n_bytes[1:].sum(dtype=np.int64)),
        "val_accounting": "sidecar" if has_sidecar else "pieces",
        "val_shards_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        **check_manifest(Path(data_path), files, tokenizer_sha256),
        "partial": n_kept < len(ids),
    }
    return ValSplit(ids[:n_kept], n_bytes[:n_kept], identity)


# Parsed, some JSON takes 35 times as much memory.
MAX_JSON_BYTES = 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON. Raises ValueError if there is none, or if the file is far too large."""
    found = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES:
            found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} is no file that can be read and holds a JSON object of at most {MAX_JSON_BYTES} bytes"
        )
    return found


def check_manifest(folder: Path, files: list[Path], tokenizer_sha256: str) -> dict[str, Any]:
    """What manifest.json adds to the identity of the validation split; raises ValueError if the files contradict it."""
    path = folder / "manifest.json"
    if not path.exists():
        return {"val_text_sha256": "unknown", "tokenizer_lossless": "unknown"}
    not_a_manifest = f"{path} is not a manifest of data/build_shards.py: export the data again"
    try:
        manifest = read_json(path)
        val = manifest["splits"]["val"]
        tokenizer = manifest["tokenizer"]
        listed = {str(name): str(sha256) for name, sha256 in val["files"].items()}
        listed_sha256 = str(tokenizer["sha256"])
        identity = {"val_text_sha256": str(val["text_sha256"]), "tokenizer_lossless": tokenizer["lossless"]}
        is_own_export = manifest.get("tool") == "data/build_shards.py"
        bytes_rule = manifest.get("bytes_rule")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(not_a_manifest) from None
    # They go into the log, where another line must not follow from them.
    is_hash = re.fullmatch(r"unknown|[0-9a-f]{64}", identity["val_text_sha256"])
    if not is_hash or identity["tokenizer_lossless"] not in (True, False, "unknown"):
        raise ValueError(not_a_manifest)

    if tokenizer["lossless"] is False and is_own_export and bytes_rule != "decoded":
        # It counted all bytes that a token covers, although the tokenizer does not give all of them back.
        raise ValueError(
            f"{path} is of an older data/build_shards.py, which counted bytes that its tokenizer loses: "
            "export the data again"
        )

    found = dict[str, str]()
    for file in files:
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    for name in sorted({*found, *listed}):
        if found.get(name) != listed.get(name):
            raise ValueError(f"{folder / name} contradicts {path}: fetch or export the data again")
    if tokenizer_sha256 != listed_sha256:
        raise ValueError(
            f"TOKENIZER_PATH has sha256 {tokenizer_sha256}, but {path} says {listed_sha256}: "
            f"name the tokenizer the data was made with, {str(tokenizer.get('file', 'unknown'))!a:.100}"
        )
    return identity


class Window(NamedTuple):
    """A stretch of text that the model sees at once. It is fed ids[start : stop - 1]; ids[first : stop] are scored."""

    start: int
    first: int
    stop: int

    @property
    def n_inputs(self) -> int:
        return self.stop - 1 - self.start


def scoring_windows(ids: np.ndarray, config: GPTConfig) -> Iterator[Window]:
    """Windows that score every position but 0 of `ids` (N,) exactly once, up to the last token of the split.

    EVAL_METHOD=flat takes the split as one segment. With `document` every document is a segment, whose last window also
    scores the BOS of the next document. The first window of a segment scores all that fits into EVAL_SEQ_LEN inputs.
    Each later one scores the next EVAL_STRIDE targets, so that a stride below EVAL_SEQ_LEN leaves room for context.
    """
    seq_len = config.eval_seq_len
    stride = config.eval_stride or seq_len
    context = seq_len - stride  # inputs before the first target of a later window

    # Segment i has the targets starts[i] + 1 to ends[i] - 1, of which the last may be the BOS of the next.
    starts = [0]
    if config.eval_method == "document":
        starts += (np.flatnonzero(ids[1:] == config.bos_id) + 1).tolist()
    ends = [start + 1 for start in starts[1:]] + [len(ids)]

    for segment_start, end in zip(starts, ends, strict=True):
        first = segment_start + 1
        stop = first + seq_len
        while first < end:
            # Without the max, the first window would start before its segment.
            start = max(segment_start, first - 1 - context)
            yield Window(start, first, min(stop, end))
            first = stop
            stop += stride


def pack_rows(windows: Iterable[Window], ids: np.ndarray, config: GPTConfig) -> list[list[Window]]:
    """Windows by row of EVAL_SEQ_LEN inputs, in order.

    With document masks, a window that starts with a BOS may stand behind another one in its row.
    """
    rows = list[list[Window]]()
    room = 0  # inputs that still fit into the last row
    for window in windows:
        can_follow = config.document_masks and ids[window.start] == config.bos_id
        if not can_follow or window.n_inputs > room:
            rows.append([])
            room = config.eval_seq_len
        rows[-1].append(window)
        room -= window.n_inputs
    return rows


class RowBatch(NamedTuple):
    """The rows of one forward pass, each (n_rows, T) int64."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor  # where in the split the target stands, or -1 where it is only context or padding


def fill_rows(rows: Sequence[Sequence[Window]], ids: np.ndarray, n_rows: int, seq_len: int) -> RowBatch:
    """A batch of `n_rows` rows of windows, one window after another. Short and missing rows are padded with 0."""
    batch = RowBatch(
        inputs=torch.zeros(n_rows, seq_len, dtype=torch.int64),
        targets=torch.zeros(n_rows, seq_len, dtype=torch.int64),
        positions=torch.full((n_rows, seq_len), -1),
    )
    for i, row in enumerate(rows):
        column = 0
        for window in row:
            tokens = torch.from_numpy(ids[window.start : window.stop].astype(np.int64))
            end = column + window.n_inputs
            n_targets = window.stop - window.first
            batch.inputs[i, column:end] = tokens[:-1]
            batch.targets[i, column:end] = tokens[1:]
            batch.positions[i, end - n_targets : end] = torch.arange(window.first, window.stop)
            column = end
    return batch


def rows_per_pass(config: GPTConfig, max_tokens: int) -> int:
    """Rows of EVAL_SEQ_LEN tokens in one forward pass: as many as `max_tokens` and EVAL_LOGITS allow, at least one."""
    return max(1, min(max_tokens, EVAL_LOGITS // config.vocab_size) // config.eval_seq_len)


def target_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target]. (B, T, V) float32, (B, T) int64 -> (B, T) float32"""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


@torch.no_grad()
def evaluate(
    logits_fn: LogitsFn,
    split: ValSplit,
    config: GPTConfig,
    val_batch_size: int,
    world: World,
    advance: Advance = no_progress,
) -> Score:
    """Score a split: every token but the first is a target, once.

    A BOS is a target too, though it stands for 0 bytes: the model has to know where a document ends. Every forward pass
    has one shape. Padding follows the tokens of a row or fills rows of its own, so it changes no score. The ranks meet
    in one collective at the end.
    """
    rows = pack_rows(scoring_windows(split.ids, config), split.ids, config)
    rank_share = world.share(len(rows))
    largest_share = math.ceil(len(rows) / world.size)
    n_rows = min(rows_per_pass(config, val_batch_size // world.size), largest_share)

    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes; on the CPU, because MPS has no float64
    for begin in range(rank_share.start, rank_share.stop, n_rows):
        end = min(begin + n_rows, rank_share.stop)
        batch = fill_rows(rows[begin:end], split.ids, n_rows, config.eval_seq_len)
        logits = logits_fn(batch.inputs.to(world.device))
        nats = target_nats(logits, batch.targets.to(world.device)).cpu()

        is_scored = batch.positions >= 0
        positions = batch.positions[is_scored].numpy()
        sums[0] += nats[is_scored].double().sum()
        sums[1] += len(positions)
        sums[2] += int(split.bytes[positions].sum(dtype=np.int64))
        advance((end - rank_share.start) / len(rank_share), "")
    world.sum_all([sums])

    if not bool(sums.isfinite().all()):
        raise FloatingPointError("val_loss is not finite: the weights are useless, train with lower learning rates")
    return Score(float(sums[0]), int(sums[1]), int(sums[2]), split.identity["partial"])


# ----------------------------------------------------------------------------------------------------------------------
# 7. Training
# ----------------------------------------------------------------------------------------------------------------------

CUDA_MICRO_BATCH_TOKENS = 65_536  # fill any GPU
CPU_MICRO_BATCH_TOKENS = 2_048  # whose activations stay in the caches

# Nats by which a loss is far above those before it. Such a step is reported, and training goes on.
SPIKE = 1.0


class Learner(NamedTuple):
    """What a training step works on and changes."""

    model: GPT
    loss_fn: LossFn
    optimizers: list[torch.optim.Optimizer]


@dataclass
class Progress:
    """The state of a run between two steps. Together with the weights and the optimizers' state it is all there is."""

    step: int = 0  # steps done
    seconds: float = 0.0  # spent training, by rank 0's clock
    train_loss: float = math.nan  # nats per token, of the last step
    # Of the last ten steps.
    recent_losses: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=10))
    recent_seconds: deque[float] = dataclasses.field(default_factory=lambda: deque([0.0], maxlen=10))
    untrained_val_bpb: float = 0.0  # 0 if it was not asked for
    bpb_of_loss: float = 0.0  # as many bits per byte of the validation text as a loss of 1; 0 before a validation
    resumes: int = 0  # how often the run went on from a checkpoint
    average: list[Tensor] = dataclasses.field(default_factory=list)  # of the weights; empty with EMA_DECAY=0

    def as_json(self) -> dict[str, Any]:
        """All but the average, which is kept with the other tensors."""
        values = {name: list(value) if isinstance(value, deque) else value for name, value in vars(self).items()}
        del values["average"]
        return values

    def finish_step(self, train_loss: float, seconds: float) -> None:
        self.step += 1
        self.train_loss = train_loss
        self.recent_losses.append(train_loss)
        self.recent_seconds.append(seconds - self.seconds)
        self.seconds = seconds

    def is_spike(self, train_loss: float) -> bool:
        """Whether a loss is more than SPIKE above the mean of the last ten."""
        recent = self.recent_losses
        return len(recent) == 10 and train_loss > sum(recent) / 10 + SPIKE

    def out_of_time(self, hp: Hyperparameters) -> bool:
        """Whether the next step, if it took as long as the slowest of the last ten, would end too late."""
        return 0 < hp.seconds_for_steps < self.seconds + max(self.recent_seconds)

    def position(self, hp: Hyperparameters) -> str:
        return f"step:{self.step}/{hp.iterations}"

    def tokens_per_second(self, hp: Hyperparameters) -> int:
        return round(self.step * hp.train_batch_tokens / max(self.seconds, 1e-9))

    def words(self, hp: Hyperparameters) -> str:
        """For people, beside the progress bar."""
        bpb = f", {self.train_loss * self.bpb_of_loss:.2f} bpb" if self.bpb_of_loss else ""
        return f"loss {self.train_loss:.2f}{bpb}, {self.tokens_per_second(hp):,} tokens/s"

    def timing(self) -> str:
        milliseconds = 1000 * self.seconds
        return f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / max(self.step, 1):.2f}ms"


@dataclass(frozen=True)
class Run:
    """What travels together through a run."""

    config: GPTConfig
    hp: Hyperparameters
    world: World
    ledger: Ledger
    log0: Log
    screen: Screen = dataclasses.field(default_factory=Screen)
    signals: Signals = dataclasses.field(default_factory=Signals)
    progress: Progress = dataclasses.field(default_factory=Progress)
    tracker: Tracker = dataclasses.field(default_factory=Tracker)
    compiled: bool = False

    def warn(self, text: str) -> None:
        self.log0(f"warning: {text}")
        self.screen.tell(f"warning: {text}")


def part_done(step: int, seconds: float, hp: Hyperparameters) -> float:
    """Part of the run that is done, 0 to 1, by ITERATIONS or by the time limit, whichever is further."""
    by_steps = step / max(hp.iterations, 1)
    by_time = seconds / (hp.seconds_for_steps or math.inf)
    return min(1.0, max(by_steps, by_time))


def lr_scale(step: int, seconds: float, hp: Hyperparameters) -> float:
    """Learning rate / its base value: 1, then linear towards 0, but never below MIN_LR."""
    if hp.warmdown_iters:
        left_by_steps = (hp.iterations - step) / hp.warmdown_iters
        # By time, the warmdown takes WARMDOWN_ITERS steps that last as long as those so far did on average.
        seconds_left = hp.seconds_for_steps - seconds if hp.seconds_for_steps else math.inf
        left_by_time = seconds_left * max(step, 1) / max(hp.warmdown_iters * seconds, 1e-9)
        left = min(left_by_steps, left_by_time)
    else:
        left = (1.0 - part_done(step, seconds, hp)) / max(hp.warmdown_frac, 1e-9)
    return min(1.0, max(left, hp.min_lr))


def muon_momentum(step: int, hp: Hyperparameters) -> float:
    """Rises linearly from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."""
    done = min(1.0, step / max(1, hp.muon_momentum_warmup_steps))
    return hp.muon_momentum_warmup_start + done * (hp.muon_momentum - hp.muon_momentum_warmup_start)


def update_average(average: list[Tensor], weights: list[Tensor], step: int, decay: float) -> None:
    """Take the weights after step `step` (1 for the first) into an exponential moving average.

    The weights of step s count decay ** (step - s), divided by the sum of all these, so that a short run's average is
    not pulled towards where it started.
    """
    torch._foreach_lerp_(average, weights, (1.0 - decay) / (1.0 - decay**step))


def fit_micro_batch(learner: Learner, loader: Loader, run: Run) -> None:
    """Choose the loader's micro-batch, unless MICRO_BATCH_TOKENS is set.

    On CUDA it is halved until a forward and backward pass fits into the memory of every rank.
    """
    if run.hp.micro_batch_tokens:
        return
    is_cuda = run.world.device.type == "cuda"
    tokens = CUDA_MICRO_BATCH_TOKENS if is_cuda else CPU_MICRO_BATCH_TOKENS
    largest = math.ceil(loader.n_sequences / run.world.size)
    loader.micro_sequences = max(1, min(largest, tokens // loader.seq_len))
    if not is_cuda:
        return

    while True:
        failures = torch.zeros(())
        try:
            # Two of them, because the second one runs beside the gradients of the first.
            for ids, targets in loader.batch(0)[-2:]:
                learner.loss_fn(ids, targets, True).backward()
        except torch.OutOfMemoryError:
            failures += 1
        learner.model.zero_grad(set_to_none=True)
        run.world.sum_all([failures])
        if not failures:
            return

        if loader.micro_sequences == 1:
            raise ValueError(f"TRAIN_SEQ_LEN={loader.seq_len} does not fit into the GPU: lower it")
        loader.micro_sequences //= 2
        # What was compiled for the larger shape is of no use any more, and there is a limit to how much it may be.
        torch.compiler.reset()
        torch.cuda.empty_cache()


class Step(NamedTuple):
    """What a step measured, over all ranks, before it changed the weights."""

    train_loss: Tensor  # () mean nats per token
    gradient_norm: Tensor  # () length of the gradient, before it is clipped


def train_step(learner: Learner, batch: Batch, scale: float, momentum: float, run: Run, looping: bool = True) -> Step:
    """One step on this rank's micro-batches, weighted by their share of its tokens."""
    train_loss = torch.zeros((), device=run.world.device)
    for ids, targets in batch:
        loss = learner.loss_fn(ids, targets, looping) * (targets.numel() / run.hp.train_batch_tokens)
        loss.backward()
        train_loss += loss.detach()

    gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
    run.world.sum_all([*gradients, train_loss])
    gradient_norm = torch.nn.utils.get_total_norm(gradients)
    if run.hp.grad_clip_norm:
        torch.nn.utils.clip_grads_with_norm_(learner.model.parameters(), run.hp.grad_clip_norm, gradient_norm)

    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
            if "momentum" in group:
                group["momentum"] = momentum
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Step(train_loss, gradient_norm)


def prime(learner: Learner, loader: Loader, run: Run) -> None:
    """Compile on WARMUP_STEPS real steps before the clock starts, then undo them.

    Looped layers are compiled like others, so one order of the layers is enough.
    """
    weights = [p.detach().clone() for p in learner.model.parameters()]
    for step in range(run.hp.warmup_steps):
        train_step(learner, loader.batch(step), 1.0, run.hp.muon_momentum, run)
        run.log0(f"warmup_step:{step + 1}/{run.hp.warmup_steps}")

    with torch.no_grad():
        torch._foreach_copy_(list(learner.model.parameters()), weights)
    for optimizer in learner.optimizers:
        optimizer.state.clear()


# -- Checkpoints -----------------------------------------------------------------------------------------------------
# Magic (8 bytes), crc32 of all that follows (uint32), length of the JSON (uint32), JSON, tensors.
#
# The JSON holds settings, progress, seconds, and the names and shapes of the tensors. These follow one after another
# as little-endian float32. Nothing in a checkpoint is executed.

CHECKPOINT_MAGIC = b"GOLFRUN\n"
CHECKPOINT_FORMAT = 1
CHECKPOINT_PREFIX = struct.Struct("<8sII")
CHECKPOINT_NAME = re.compile(r"checkpoint_\d{12}\.ckpt")
CHECKPOINTS_KEPT = 2
CHECKPOINT_KEYS = {"format", "run_id", "code_sha256", "given", "data", "progress", "seconds", "tensors"}
MAX_CHECKPOINT_JSON_BYTES = 2**20

# A run that goes on takes these from where its checkpoint lies.
PLACES = {"RUN_ID", "OUT_DIR", "RESUME"}
# What may change when a run goes on, because it moves files, or changes results by no more than rounding.
MAY_CHANGE = PLACES | {
    "DATA_PATH",
    "TOKENIZER_PATH",
    "COMPILE",
    "MICRO_BATCH_TOKENS",
    "VAL_BATCH_SIZE",
    "VAL_LOSS_EVERY",
    "TRAIN_LOG_EVERY",
    "CHECKPOINT_EVERY",
    "TRACK",
}


def names_of_parameters(model: GPT) -> dict[Tensor, str]:
    return {p: name for name, p in model.named_parameters()}


def changing_tensors(learner: Learner, progress: Progress) -> dict[str, Tensor]:
    """Everything that steps change, by name: weights, their average, and what the optimizers remember."""
    names = names_of_parameters(learner.model)
    tensors = {f"weight {name}": p.detach() for p, name in names.items()}
    for name, average in zip(names.values(), progress.average, strict=bool(progress.average)):
        tensors[f"average {name}"] = average
    for optimizer in learner.optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"{key} {names[p]}"] = value
    return dict(sorted(tensors.items()))


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("checkpoint_*.ckpt") if CHECKPOINT_NAME.fullmatch(path.name))


def remove_checkpoints(folder: Path, kept: Sequence[Path] = ()) -> None:
    """Remove the checkpoints of a run but for some, and what a kill in the middle of writing one has left."""
    unfinished = [path for path in folder.glob("checkpoint_*.ckpt.part") if CHECKPOINT_NAME.fullmatch(path.stem)]
    for path in {*checkpoints_in(folder), *unfinished}.difference(kept):
        with contextlib.suppress(OSError):
            path.unlink()


def table_of(tensors: Mapping[str, Tensor]) -> list[list[Any]]:
    return [[name, list(t.shape)] for name, t in tensors.items()]


class CheckpointWriter:
    """Writes the state of a run into its folder. Only rank 0 does, because all ranks hold the same.

    Copying the state keeps the run waiting, which the ledger does not count as training. The file is written by a
    thread beside the training.
    """

    def __init__(self, learner: Learner, data: Mapping[str, Any], run: Run) -> None:
        """`data` identifies the data, which must be the same when the run goes on."""
        self.learner = learner
        self.data = data
        self.run = run
        self.seconds_at_last = run.progress.seconds
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def is_due(self) -> bool:
        every = self.run.hp.checkpoint_every
        return every > 0 and self.run.progress.seconds >= self.seconds_at_last + every

    def start(self) -> None:
        """Copy the state as it is between two steps, and begin to write it."""
        run = self.run
        self.seconds_at_last = run.progress.seconds
        if run.world.rank > 0:
            return
        run.ledger.switch("checkpoint")
        self.finish()
        tensors = changing_tensors(self.learner, run.progress)
        copies = [t.to("cpu", copy=True).numpy().astype("<f4", copy=False) for t in tensors.values()]
        header = {
            "format": CHECKPOINT_FORMAT,
            "code_sha256": hashlib.sha256(own_code()).hexdigest(),
            "run_id": run.hp.run_id,
            "given": {name: os.environ[name] for name in sorted(os.environ.keys() & SETTINGS - PLACES)},
            "data": self.data,
            "progress": run.progress.as_json(),
            "seconds": {phase: run.ledger.seconds(phase) for phase in (*run.ledger.spent, "checkpoint")},
            "tensors": table_of(tensors),
        }
        path = run.hp.run_folder / f"checkpoint_{run.progress.step:012}.ckpt"
        self.thread = threading.Thread(target=self.write, args=(path, json.dumps(header).encode(), copies))
        self.thread.start()
        run.ledger.switch("train")

    def write(self, path: Path, header: bytes, tensors: list[np.ndarray]) -> None:
        pieces = [memoryview(header), *(tensor.data for tensor in tensors)]
        crc32 = 0
        for piece in pieces:
            crc32 = zlib.crc32(piece, crc32)
        try:
            write_file(path, CHECKPOINT_PREFIX.pack(CHECKPOINT_MAGIC, crc32, len(header)), *pieces)
        except Exception as error:  # there is nobody above a thread who would hear of it
            self.error = error
            return
        # Later ones are from before the run went on from an earlier one.
        until_now = [other for other in checkpoints_in(path.parent) if other <= path]
        remove_checkpoints(path.parent, kept=until_now[-CHECKPOINTS_KEPT:])

    def finish(self) -> None:
        """Wait until the file that is being written is there, and say so if it cannot be."""
        if self.thread:
            self.thread.join()
        self.thread = None
        if self.error:
            self.run.warn(f"{self.error}; the run goes on, with older checkpoints or none")
        self.error = None


class Checkpoint(NamedTuple):
    """A checkpoint that is whole. Its tensors are still in the file."""

    path: Path
    header: dict[str, Any]  # checked
    tensors_begin: int
    n_bytes: int


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises ValueError for a file that is damaged, of another format, or lies about its content."""
    if not path.is_file():
        raise ValueError(f"checkpoint {path} is no regular file: name one that a run wrote")
    with path.open("rb") as file:
        prefix = file.read(CHECKPOINT_PREFIX.size)
        if len(prefix) < CHECKPOINT_PREFIX.size or not prefix.startswith(CHECKPOINT_MAGIC):
            raise ValueError(f"{path} is no checkpoint of train_gpt.py: it does not start with {CHECKPOINT_MAGIC!r}")
        _, crc32, header_bytes = CHECKPOINT_PREFIX.unpack(prefix)
        if header_bytes > MAX_CHECKPOINT_JSON_BYTES:
            raise ValueError(f"checkpoint {path} is damaged (JSON of {header_bytes} bytes): take an older one")
        text = file.read(header_bytes)
        tensors_begin = file.tell()
        found_crc32 = zlib.crc32(text)
        while piece := file.read(2**20):
            found_crc32 = zlib.crc32(piece, found_crc32)
        n_bytes = file.tell()
    if found_crc32 != crc32:
        raise ValueError(f"checkpoint {path} is damaged (checksum): take an older one")

    try:
        header = json.loads(text)
        check_checkpoint_header(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {path} was not written by this version of the script ({error!s:.300}): use the one that did"
        ) from None
    return Checkpoint(path, header, tensors_begin, n_bytes)


def check_checkpoint_header(header: Mapping[str, Any]) -> None:
    """Raise ValueError, or one of the errors that read_checkpoint catches, for a header that no run writes."""
    if header["format"] != CHECKPOINT_FORMAT:
        raise ValueError(f"format {header['format']!r:.100}, not {CHECKPOINT_FORMAT}")
    if header.keys() != CHECKPOINT_KEYS:
        raise ValueError(f"keys {sorted(header)!r:.200}, not {sorted(CHECKPOINT_KEYS)}")
    given = header["given"]
    if not given.keys() <= SETTINGS - PLACES:
        raise ValueError("it has settings that this script does not have")
    if not all(type(text) is str and "\0" not in text for text in given.values()):
        raise ValueError("it has settings that no environment holds")

    progress = header["progress"]
    seconds = header["seconds"]
    expected_types = {name: type(value) for name, value in Progress().as_json().items()}
    if {name: type(value) for name, value in progress.items()} != expected_types:
        raise ValueError("it has a progress of no run")
    numbers = [value for value in progress.values() if type(value) is not list]
    numbers += [*progress["recent_losses"], *progress["recent_seconds"], *seconds.values()]
    # The comparison is also false for NaN.
    if not all(type(number) in (int, float) and 0 <= number < 1e15 for number in numbers):
        raise ValueError("it has a progress or seconds of no run")
    if progress["step"] == 0 or not progress["recent_seconds"]:
        raise ValueError("it keeps no step")
    # They become keys of the log.
    if not all(re.fullmatch("[a-z]{1,20}", phase) for phase in seconds):
        raise ValueError("it has phases of no run")
    if not all(type(name) is str for name, _ in header["tensors"]):
        raise ValueError("it has tensors of no run")


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a run that can be read. Passes over damaged ones, with a word."""
    for path in reversed(checkpoints_in(folder)):
        try:
            return read_checkpoint(path)
        except (ValueError, OSError) as error:
            show(f"warning: passed over: {error}", sys.stderr)
    return None


def find_checkpoint(env: Mapping[str, str]) -> Checkpoint | None:
    """The checkpoint that RESUME names; None if it is not set.

    Raises ValueError if there is none, or if RESUME=1 leaves open which run is meant.
    """
    # The other settings may make no sense before those of the checkpoint are added.
    resume = env.get("RESUME", "")
    out_dir = Path(env.get("OUT_DIR", Hyperparameters.out_dir))
    if not resume:
        return None
    if Path(resume).is_file():
        return read_checkpoint(Path(resume))

    if resume != "1":
        folders = [Path(resume)]
    elif "RUN_ID" in env:
        folders = [out_dir / env["RUN_ID"]]
    else:
        folders = sorted(path for path in out_dir.glob("*") if checkpoints_in(path))
    if len(folders) > 1:
        raise ValueError(f"RESUME=1 may mean {', '.join(map(str, folders))}: name the one with RESUME")
    found = newest_checkpoint(folders[0]) if folders else None
    if not found:
        where = folders[0] if folders else out_dir
        raise ValueError(f"RESUME={resume}, but {where} holds no checkpoint to go on from: unset it to start anew")
    return found


def agree_on_checkpoint(env: Mapping[str, str], last_folder: str, world: World) -> Checkpoint | None:
    """Rank 0's choice on all ranks: the newest of the run that torchrun's last attempt was at, or what RESUME names.

    Raises ValueError, on all ranks, if RESUME names none.
    """
    found = None
    problem = ""
    if world.rank == 0:
        try:
            found = newest_checkpoint(Path(last_folder)) if last_folder else find_checkpoint(env)
        except ValueError as error:
            problem = str(error)
    if problem := world.agree_on_text(problem):
        raise ValueError(problem)
    path = world.agree_on_text(str(found.path) if found else "")
    if world.rank == 0:
        return found
    return read_checkpoint(Path(path)) if path else None


def settings_to_go_on(checkpoint: Checkpoint, env: Mapping[str, str]) -> dict[str, str]:
    """The settings of a checkpoint's run that `env` leaves open. It goes on in the folder that the checkpoint is in.

    Raises ValueError, naming the differences, for settings that contradict the checkpoint's.
    """
    path = checkpoint.path
    given = checkpoint.header["given"]
    preset = given.get("PRESET", Hyperparameters.preset)
    if env.get("PRESET", preset) != preset:
        raise ValueError(f"PRESET={env['PRESET']}, but RESUME={path} is of PRESET={preset}: unset PRESET")

    folder = path.parent.resolve()
    of_run = {**given, "RUN_ID": folder.name, "OUT_DIR": os.path.relpath(folder.parent)}
    adopted = {name: text for name, text in of_run.items() if name not in env}
    adopted["RESUME"] = str(path)
    now = all_settings({**env, **adopted})
    differences = []
    for name, value in all_settings(given).items():
        if name not in MAY_CHANGE and now[name] != value:
            differences.append(f"{name}={now[name]} instead of {value}")
    if differences:
        raise ValueError(
            f"RESUME={path} was written with other settings. Unset these, or train anew: {', '.join(differences):.600}"
        )
    run_folder = Path(now["OUT_DIR"], now["RUN_ID"])
    if run_folder.resolve() != folder:
        raise ValueError(f"RESUME={path} goes on in its own folder, not in {run_folder}: unset OUT_DIR and RUN_ID")
    # Otherwise it might add to the files of another run.
    run_id = checkpoint.header["run_id"]
    if run_id != folder.name:
        raise ValueError(f"RESUME={path} is of the run {run_id!r:.100}: move it into a folder of that name")
    step = checkpoint.header["progress"]["step"]
    if step > now["ITERATIONS"]:
        raise ValueError(f"RESUME={path} is at step {step} of ITERATIONS={now['ITERATIONS']}: train anew")
    return adopted


def require_room_for_model(checkpoint: Checkpoint, config: GPTConfig) -> None:
    """Raise ValueError if a checkpoint is too small for its model, so that no small file makes us allocate a large one.

    It holds the weights and, for the optimizers, at least as much again.
    """
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in GPT(config).parameters())
    if checkpoint.n_bytes < 8 * n_parameters:
        raise ValueError(f"RESUME={checkpoint.path} has {checkpoint.n_bytes} bytes for {n_parameters} parameters")


def restore(checkpoint: Checkpoint, learner: Learner, loader: Loader, run: Run) -> None:
    """Put everything that steps change to where it was. Raises ValueError if the tensors are those of another model."""
    progress = run.progress
    for name, value in checkpoint.header["progress"].items():
        setattr(progress, name, deque(value, maxlen=10) if isinstance(value, list) else value)
    progress.resumes += 1
    for phase, spent in checkpoint.header["seconds"].items():
        run.ledger.spent[phase] = run.ledger.spent.get(phase, 0.0) + spent

    # A step on one micro-batch makes the optimizers' tensors, which those of the file then replace. What has had no
    # gradient yet, because no layers were looped, has none.
    train_step(learner, loader.batch(0)[:1], 1.0, 0.0, run)
    in_file = {name for name, _ in checkpoint.header["tensors"]}
    names = names_of_parameters(learner.model)
    for optimizer in learner.optimizers:
        for p, state in list(optimizer.state.items()):
            if in_file.isdisjoint(f"{key} {names[p]}" for key in state):
                del optimizer.state[p]
    tensors = changing_tensors(learner, progress)
    n_bytes = checkpoint.tensors_begin + 4 * sum(t.numel() for t in tensors.values())
    if checkpoint.header["tensors"] != table_of(tensors) or checkpoint.n_bytes != n_bytes:
        raise ValueError(f"RESUME={checkpoint.path} holds other tensors than this model has: train anew")
    with checkpoint.path.open("rb") as file:
        file.seek(checkpoint.tensors_begin)
        for t in tensors.values():
            values = np.fromfile(file, "<f4", t.numel()).astype(np.float32, copy=False)
            if not np.isfinite(values).all():
                raise ValueError(f"RESUME={checkpoint.path} holds values that are not finite: take an older one")
            t.copy_(torch.from_numpy(values).view(t.shape))


def require_equal_weights(weights: Sequence[Tensor], run: Run) -> None:
    """Raise ValueError if a rank holds other weights than rank 0."""
    world = run.world
    if world.size == 1:
        return
    crc32 = 0
    for w in weights:
        crc32 = zlib.crc32(w.cpu().numpy().data, crc32)
    differs = float(crc32 != world.agree(crc32))
    by_rank = world.sum_numbers(*(differs * (rank == world.rank) for rank in range(world.size)))
    if any(by_rank):
        ranks = ", ".join(str(rank) for rank, differs in enumerate(by_rank) if differs)
        raise ValueError(
            f"after step {run.progress.step} the weights of rank {ranks} are not those of rank 0, so a device is "
            "faulty or of another kind: replace it, and go on from a checkpoint before that"
        )


# -- The loop --------------------------------------------------------------------------------------------------------


def train(
    learner: Learner,
    loader: Loader,
    validate: Callable[[bool], Score],
    run: Run,
    checkpoints: CheckpointWriter,
    advance: Advance = no_progress,
) -> dict[str, Any]:
    """Run to ITERATIONS or the time limit, whichever comes first, then average and validate. -> results by log key

    Raises FloatingPointError for a loss or a gradient that is not finite, and KeyboardInterrupt, once its state is
    kept, if a signal ends the run.
    """
    hp = run.hp
    progress = run.progress
    signals = run.signals
    weights = [p.detach() for p in learner.model.parameters()]
    looping = True  # a run that loops from its first step on has nothing to announce
    batch = loader.batch(progress.step)
    run.ledger.switch("train")

    while True:
        out_of_time = progress.out_of_time(hp)
        finished = out_of_time or progress.step == hp.iterations

        was_looping = looping
        looping = finished or part_done(progress.step, progress.seconds, hp) >= hp.enable_looping_at
        if run.config.num_loops and looping and not was_looping:
            order = ",".join(map(str, run.config.layer_order(looping)))
            run.log0(f"layer_loop:enabled {progress.position(hp)} order:[{order}]")

        if finished:
            advance(1.0, progress.words(hp))
            # What follows may take minutes and fail. A run that goes on starts again from here.
            if progress.step and (hp.checkpoint_every or signals.stop):
                checkpoints.start()
                checkpoints.finish()
            signals.deferred = False
            if signals.stop:
                raise KeyboardInterrupt
            if progress.average:
                torch._foreach_copy_(weights, progress.average)
        if finished or (hp.val_loss_every and progress.step % hp.val_loss_every == 0):
            # A signal has to wait until a validation is over, and whoever sent it may not wait so long.
            if progress.step and hp.checkpoint_every and not finished:
                checkpoints.start()
            run.ledger.switch("validate")
            require_equal_weights(weights, run)
            score = validate(looping)
            run.log0(f"{progress.position(hp)} {score.line(4)} {progress.timing()}")
            run.tracker.log({"val_loss": score.val_loss, "val_bpb": score.val_bpb}, progress.step)
            progress.bpb_of_loss = score.val_bpb / max(score.val_loss, 1e-9)
            if progress.step == 0:
                progress.untrained_val_bpb = score.val_bpb
                advance(0.0, "")
            elif not finished:
                run.screen.tell(f"step {progress.step}: {score.val_bpb:.4f} bits per byte of the validation text")
            run.ledger.switch("train")
        if finished:
            break

        scale = lr_scale(progress.step, progress.seconds, hp)
        measured = train_step(learner, batch, scale, muon_momentum(progress.step, hp), run, looping)
        if progress.average:
            update_average(progress.average, weights, progress.step + 1, hp.ema_decay)
        # The next batch is prepared while a GPU is busy with the step. tolist() then waits for it.
        batch = loader.batch(progress.step + 1)
        train_loss, gradient_norm = torch.stack([measured.train_loss, measured.gradient_norm]).tolist()
        require_finite(train_loss, gradient_norm, run)
        if progress.is_spike(train_loss):
            run.warn(
                f"train_loss jumped from {progress.train_loss:.4f} to {train_loss:.4f} at step {progress.step + 1}"
            )

        # One clock for all: with their own, ranks would use different learning rates and stop at different steps.
        # They also hear here of a signal that only one of them got.
        own_seconds = run.ledger.seconds("train") if run.world.rank == 0 else 0.0
        seconds, n_stops, n_keeps = run.world.sum_numbers(own_seconds, signals.stop > 0, signals.keep)
        progress.finish_step(train_loss, seconds)
        if progress.step <= 10 or progress.step % hp.train_log_every == 0:
            run.log0(f"{progress.position(hp)} train_loss:{train_loss:.4f} {progress.timing()}")
            tracked = {
                "train_loss": train_loss,
                "gradient_norm": gradient_norm,
                "lr_scale": scale,
                "train_seconds": seconds,
                "tokens_per_second": progress.tokens_per_second(hp),
            }
            run.tracker.log(tracked, progress.step)
        advance(part_done(progress.step, progress.seconds, hp), progress.words(hp))
        epoch = loader.epoch(progress.step)
        if epoch > loader.epoch(progress.step - 1):
            run.log0(f"epoch:{epoch + 1} starts at step:{progress.step}: the train split has been read to its end")

        # Until its first step is done, a process has nothing new to keep, and a signal ends it at once.
        signals.deferred = True
        if n_stops or n_keeps or checkpoints.is_due():
            checkpoints.start()
            signals.keep = False
        if n_stops:
            checkpoints.finish()
            signals.stop = signals.stop or signal.SIGTERM
            raise KeyboardInterrupt

    if out_of_time:
        run.log0(f"stopping_early: wallclock_cap train_time:{1000 * progress.seconds:.0f}ms {progress.position(hp)}")
    checkpoints.finish()
    return results_of_training(progress, score, hp)


def require_finite(train_loss: float, gradient_norm: float, run: Run) -> None:
    """Raise FloatingPointError for a step whose loss or gradient is not finite: the weights it made are useless."""
    for name, value in (("train_loss", train_loss), ("the length of the gradient", gradient_norm)):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {run.progress.step + 1} (last good train_loss "
                f"{run.progress.train_loss:.4f}): lower the learning rates (MATRIX_LR={run.hp.matrix_lr} ...) or set "
                "GRAD_CLIP_NORM=1"
            )


def results_of_training(progress: Progress, score: Score, hp: Hyperparameters) -> dict[str, Any]:
    """Results by log key. `score` is that of the last validation."""
    results: dict[str, Any] = {
        "steps": progress.step,
        "resumes": progress.resumes,
        "pre_quant_val_loss": score.val_loss,
        "pre_quant_val_bpb": score.val_bpb,
    }
    if progress.untrained_val_bpb:
        results["untrained_val_bpb"] = progress.untrained_val_bpb
    if progress.step:
        results["train_loss"] = progress.train_loss
        results["train_seconds"] = progress.seconds
        results["tokens_per_second"] = progress.tokens_per_second(hp)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# 8. Artifact
#
# Moments    what an error in each weight would cost, measured on training batches
# Quantizer  turns weights into small whole numbers (codes), with errors where they cost least
# Coder      writes codes in as few bytes as their frequencies allow
# File       puts header and weights together, and reads them without trusting them
# Size       looks for the quantizer's step with which the file just fits
# ----------------------------------------------------------------------------------------------------------------------

# -- Moments ---------------------------------------------------------------------------------------------------------

CALIBRATION_TOKENS = 8192  # per forward and backward pass, which keep more in memory than those of a compiled graph


class LayerMoments(NamedTuple):
    """Mean second moments of what goes into a layer, and of the loss's gradient at its output."""

    inputs: Tensor  # (C, C)
    gradients: Tensor  # (R,)


Moments = dict[str, LayerMoments]  # by name of the weight


def coded_layers(model: GPT) -> dict[str, Linear]:
    """The layers whose weights become codes, by name of the weight: all matrices but those of gates."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if type(layer) is Linear}


class MomentHook:
    """Adds up the second moments of a layer while batches go forward and backward through it."""

    def __init__(self, layer: Linear) -> None:
        n_rows, n_columns = layer.weight.shape
        device = layer.weight.device
        inputs = torch.zeros(n_columns, n_columns, device=device)
        gradients = torch.zeros(n_rows, device=device)
        self.sums = LayerMoments(inputs, gradients)
        self.handle = layer.register_forward_hook(self.add_inputs)

    def add_inputs(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, *scale = args
        x = x.detach().flatten(0, -2).float()
        self.sums.inputs.addmm_(x.mT, x)

        def add_gradients(gradient: Tensor) -> None:
            # The loss's gradient at what the matrix itself gives, before a scale.
            squares = gradient.flatten(0, -2).float().square().sum(0)
            for s in scale:
                squares = squares * s.detach().square()
            self.sums.gradients.add_(squares)

        output.register_hook(add_gradients)


def calibrate(model: GPT, loader: Loader, step: int, run: Run, advance: Advance = no_progress) -> Moments:
    """Second moments per token of all coded layers, on the train batches from `step` on.

    Takes GPTQ_CALIBRATION_BATCHES batches, fewer if the time limit comes first, but a few sequences at least.
    A looped layer adds up all its passes.
    """
    hp = run.hp
    device = run.world.device

    def seconds_spent() -> float:
        return run.ledger.seconds("train") + run.ledger.seconds("calibrate")

    # Rank 0's clock decides here too. The ranks compare clocks once, and each goes on with its own, corrected.
    now = seconds_spent()
    piece_began = run.world.agree(now)
    correction = piece_began - now

    hooks = {name: MomentHook(layer) for name, layer in coded_layers(model).items()}
    n_wanted = hp.gptq_calibration_batches * len(run.world.share(loader.n_sequences)) * loader.seq_len
    n_done = 0
    for ids, targets in calibration_pieces(loader, step, hp.gptq_calibration_batches):
        # Not compiled, because hooks do not see layers inside of compiled graphs.
        logits = model(ids)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        model.zero_grad(set_to_none=True)
        n_done += targets.numel()
        advance(n_done / n_wanted, "")

        synchronize(device)
        now = seconds_spent() + correction
        next_would_end = now + (now - piece_began)
        if hp.max_wallclock_seconds and next_would_end > hp.max_wallclock_seconds:
            break
        piece_began = now
    advance(1.0, "")

    moments = {}
    sums: list[Tensor] = []
    for name, hook in hooks.items():
        hook.handle.remove()
        moments[name] = hook.sums
        sums += hook.sums
    n_tokens = torch.tensor(float(n_done), device=device)
    run.world.sum_all([*sums, n_tokens])
    torch._foreach_div_(sums, n_tokens)
    return moments


def calibration_pieces(loader: Loader, step: int, n_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and targets of this rank's batches from `step` on, CALIBRATION_TOKENS at a time."""
    for i in range(n_batches):
        for ids, targets in loader.batch(step + i):
            n_rows = max(1, CALIBRATION_TOKENS // ids.size(1))
            yield from zip(ids.split(n_rows), targets.split(n_rows), strict=True)


# -- Quantizer -------------------------------------------------------------------------------------------------------

GPTQ_DAMPING = 0.01  # added to the inputs' second moments, as a part of their mean
GRADIENT_FLOOR = 0.3  # added to the gradients' second moments, as a part of their mean
MAX_CODE = 127
BLOCK = 64  # columns that are decided together
LOOKAHEAD = 16  # further columns that the decision takes into account
STRIP = 8  # columns whose errors go to the rest of the block together


class Trellis(NamedTuple):
    """A finite automaton that says which of two quantizers the next code belongs to. Parities of codes move it."""

    next_state: tuple[tuple[int, int], ...]  # by state and parity of the code
    quantizer: tuple[int, ...]  # by state


# Dependent quantization (Fischer and Wang 1992; Schwarz et al. 2019): code k of quantizer 0 stands for k steps, of
# quantizer 1 for k - sign(k) / 2 steps. Together they offer a grid twice as fine, for a fraction of a bit more.
TRELLISES = {
    1: Trellis(next_state=((0, 0),), quantizer=(0,)),  # the uniform quantizer
    4: Trellis(next_state=((0, 2), (2, 0), (1, 3), (3, 1)), quantizer=(0, 0, 1, 1)),
    8: Trellis(
        next_state=((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)),
        quantizer=(0, 1, 0, 1, 0, 1, 0, 1),
    ),
}


class Ways(NamedTuple):
    """The two ways into each state, a and b: from which state, and by a code of which parity. (S,) int64"""

    state_a: Tensor
    choice_a: Tensor  # parity * S + state
    state_b: Tensor
    choice_b: Tensor


class Factor(NamedTuple):
    """Second moments M of a layer's inputs, factorized for GPTQ.

    Errors e (C,) in one row of weights change its output by a mean square of e M e^T. The factor writes that as a sum
    over columns j of cost[j] * (e @ feedback[:, j])**2, in which term j depends on errors up to j only.
    """

    feedback: Tensor  # (C, C) float32, 1 on the diagonal and 0 below
    cost: Tensor  # (C,) float32


def factorize(moments: Tensor) -> Factor:
    """The factor of a layer with these moments (C, C) of its inputs.

    The moments are damped, so that columns whose inputs are nearly always 0 do not compensate for the others.
    """
    damped = (moments.cpu() if moments.is_mps else moments).double()  # MPS has no float64
    damping = GPTQ_DAMPING * damped.diagonal().mean() + 1e-30
    damped = damped + damping * torch.eye(len(damped)).to(damped)

    # Cholesky gives a lower triangle. Flipped before and after, it is an upper one: damped = upper @ upper.T.
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    feedback = upper / upper.diagonal()
    cost = upper.diagonal().square()
    return Factor(feedback.float().to(moments.device), cost.float().to(moments.device))


def ways_into(trellis: Trellis, device: torch.device) -> Ways:
    n_states = len(trellis.next_state)
    ways = []
    for target in range(n_states):
        into = []
        for state, targets in enumerate(trellis.next_state):
            into += [(state, parity * n_states + state) for parity in (0, 1) if targets[parity] == target]
        way_a, way_b = into
        ways.append((*way_a, *way_b))
    return Ways(*torch.tensor(ways, device=device).unbind(1))


def nearest_codes(x: Tensor, shift: Tensor) -> Tensor:
    """The codes from 0 on whose values are nearest to the sizes `x`, even ones first, then odd ones.

    Code k stands for k - shift, but 0 for 0. (N, S, R) float32, (S, 1) 0 or 1/2 -> (N, 2, S, R) float32
    """
    half = (x + shift) / 2
    even = 2 * half.round()
    # The rounding takes even codes to be 2 apart. But with a shift, code 2 stands for 1.5, and below 0.75 0 is nearer.
    even = even.masked_fill((x < 0.75) & (shift > 0), 0.0)
    odd = 2 * half.floor() + 1
    return torch.stack((even.clamp_max(MAX_CODE - 1), odd.clamp_max(MAX_CODE)), dim=1)


def dequantize(codes: Tensor, quantizers: Tensor, step: Tensor | float) -> Tensor:
    """(..., R, C) int8, (..., R, C) 0 or 1, (..., R, 1) float32 -> (..., R, C) float32"""
    return (codes.float() - codes.sign().float() * quantizers / 2) * step


def quantizers_along(codes: np.ndarray, trellis: Trellis) -> np.ndarray:
    """The quantizer of each code, if every row starts in state 0. (R, C) int8 -> (R, C) uint8"""
    next_state = np.array(trellis.next_state)
    quantizer_of = np.array(trellis.quantizer, np.uint8)
    parities = np.ascontiguousarray(codes.T) & 1  # also 1 for odd codes below 0, in two's complement
    quantizers = np.empty_like(parities, dtype=np.uint8)
    state = np.zeros(len(codes), np.int64)
    for j, parity in enumerate(parities):
        quantizers[j] = quantizer_of[state]
        state = next_state[state, parity]
    return quantizers.T


@torch.no_grad()
def quantize_codes(w: Tensor, factor: Factor, step: Tensor, states: int) -> Tensor:
    """GPTQ (Frantar et al. 2022) along a trellis, for N matrices of one shape side by side.

    (N, R, C) float32, factors of each (N, ...), (N, R, 1) float32 -> codes (N, R, C) int8

    A Viterbi search goes along the columns, for all rows at once. It keeps one survivor per state, the cheapest path
    that ends there. Later columns compensate for the error in one, so each survivor has targets of its own. A block of
    columns is decided together, after a look at the columns that follow it. Then its errors are fed to all the rest.
    """
    n_columns = w.size(2)
    w = w / step  # From here on, everything is in steps of its row.
    target = w.clone()  # the weights, and what the errors of earlier blocks add to them
    codes = torch.empty_like(w, dtype=torch.int8)
    state = torch.zeros(w.shape[:2], dtype=torch.int64, device=w.device)  # in which each row enters the block

    for begin in range(0, n_columns, BLOCK):
        end = min(begin + BLOCK, n_columns)
        # With one state, a choice does not limit later ones, so looking ahead would change nothing.
        stop = min(end + LOOKAHEAD, n_columns) if states > 1 else end
        inside = Factor(factor.feedback[:, begin:stop, begin:stop], factor.cost[:, begin:stop])
        block = decide_block(w[..., begin:stop], target[..., begin:stop], inside, state, states, end - begin)

        decided = slice(begin, end)
        codes[..., decided] = block.codes
        state = block.state
        error = w[..., decided] - dequantize(block.codes, block.quantizers, 1.0)
        target[..., end:].baddbmm_(error, factor.feedback[:, decided, end:])
    return codes


class DecidedBlock(NamedTuple):
    codes: Tensor  # (N, R, n) int8
    quantizers: Tensor  # (N, R, n) uint8
    state: Tensor  # (N, R) int64, after them


def decide_block(w: Tensor, target: Tensor, factor: Factor, state: Tensor, states: int, n_decided: int) -> DecidedBlock:
    """Search through L columns for the cheapest codes, and decide the first `n_decided`.

    w and target (N, R, L) in steps, factors of these columns, state (N, R) before the first column
    """
    n_matrices, n_rows, n_columns = w.shape
    trellis = TRELLISES[states]
    ways = ways_into(trellis, w.device)
    quantizer_of = torch.tensor(trellis.quantizer, device=w.device)
    shift = quantizer_of[:, None] / 2  # (S, 1), by which quantizer 1 moves its values towards 0

    # By matrix, column, state and row. Survivors are copied often, and rows that lie together make that fast.
    w = w.mT.contiguous()
    targets = target.mT[:, :, None].repeat(1, 1, states, 1)  # of each survivor
    last_code = torch.empty(targets.shape, dtype=torch.int8, device=w.device)  # that each survivor took in a column
    took_b = torch.empty(targets.shape, dtype=torch.bool, device=w.device)  # whether it came by way b
    total = w.new_full((n_matrices, states, n_rows), math.inf)  # cost of the survivor of each state
    total.scatter_(1, state[:, None], 0.0)

    # Forward: extend the survivors column by column.
    for start in range(0, n_columns, STRIP):
        stop = min(start + STRIP, n_columns)
        errors = w.new_empty(n_matrices, stop - start, states, n_rows)  # of each survivor in this strip
        origin = torch.arange(states, device=w.device)[:, None].expand_as(total)  # its state before the strip

        for j in range(start, stop):
            so_far = errors[:, : j - start]
            target_here = targets[:, j].gather(1, origin)
            if j > start:
                feedback = factor.feedback[:, start:j, j, None].mT
                target_here += (feedback @ so_far.flatten(2)).view_as(target_here)

            # What each survivor can choose: the nearest even code and the nearest odd one. (N, 2, S, R)
            distance = target_here.abs()
            code = nearest_codes(distance, shift)
            value = (code - shift).clamp_min(0.0)
            cost = total[:, None] + factor.cost[:, j, None, None, None] * (distance[:, None] - value).square()
            sign = target_here[:, None]
            choices = torch.stack((cost, code.copysign(sign), value.copysign(sign)), dim=1).flatten(2, 3)

            # Of the two ways into each state, the cheaper one survives.
            by_a = choices.index_select(2, ways.choice_a)
            by_b = choices.index_select(2, ways.choice_b)
            b_wins = by_b[:, 0] < by_a[:, 0]
            total, code, value = torch.where(b_wins[:, None], by_b, by_a).unbind(1)
            last_code[:, j] = code
            took_b[:, j] = b_wins

            origin = torch.where(b_wins, origin.index_select(1, ways.state_b), origin.index_select(1, ways.state_a))
            from_a = so_far.index_select(2, ways.state_a)
            from_b = so_far.index_select(2, ways.state_b)
            errors[:, : j - start] = torch.where(b_wins[:, None], from_b, from_a)
            errors[:, j - start] = w[:, j, None] - value

        # Every survivor takes over the targets of the one it comes from, and adds its errors to them.
        later = targets[:, stop:]
        inherited = later.gather(2, origin[:, None].expand_as(later))
        feedback = factor.feedback[:, start:stop, stop:].mT
        targets[:, stop:] = torch.baddbmm(inherited.flatten(2), feedback, errors.flatten(2)).view_as(later)

    # Backward: read the codes off the cheapest survivor.
    codes = torch.empty((n_matrices, n_decided, n_rows), dtype=torch.int8, device=w.device)
    quantizers = torch.empty_like(codes, dtype=torch.uint8)
    path_state = total.argmin(1, keepdim=True)  # (N, 1, R)
    state_after = path_state
    for j in reversed(range(n_columns)):
        if j == n_decided - 1:
            state_after = path_state
        came_by_b = took_b[:, j].gather(1, path_state)
        if j < n_decided:
            codes[:, j] = last_code[:, j].gather(1, path_state)[:, 0]
        path_state = torch.where(came_by_b, ways.state_b[path_state], ways.state_a[path_state])
        if j < n_decided:
            quantizers[:, j] = quantizer_of[path_state][:, 0]
    return DecidedBlock(codes.mT, quantizers.mT, state_after[:, 0])


class CodedLayer(NamedTuple):
    exponents: np.ndarray  # (R,) uint8: row_steps makes steps of them
    codes: np.ndarray  # (R, C) int8


class CodedModel(NamedTuple):
    states: int  # of the trellis
    step: float  # of rows with exponent 0, the coarsest
    layers: dict[str, CodedLayer]  # by name of the weight


def row_steps(step: float, exponents: np.ndarray) -> Tensor:
    """step * 2**(-exponent / 8), the same on every machine. (R,) uint8 -> (R, 1) float32"""
    octaves, eighths = np.divmod(exponents.astype(np.int32), 8)
    roots = (2.0 ** (-np.arange(8) / 8)).astype(np.float32)
    return torch.from_numpy(np.ldexp(np.float32(step) * roots[eighths], -octaves))[:, None]


def finer_rows(moments: Moments, factors: dict[str, Factor]) -> dict[str, Tensor]:
    """By how many octaves each row's step is to be finer than that of the coarsest row. -> (R,) by name

    Quantization errors of a row are about independent, with variance step**2 / 12. To second order they raise the loss
    by E[g**2] / 2 * sum(cost) * step**2 / 12, where g is the loss's gradient at the row's output and cost that of its
    Factor. Steps in proportion to 1 / sqrt(E[g**2] * mean cost) make every weight of the model cost the same. Then a
    bit is worth the same everywhere, and nothing is gained by moving one. The floor keeps rows usable whose outputs
    hardly matter in the calibration batches, such as those of rare tokens.
    """
    sensitivity = {}
    for name, (_, gradients) in moments.items():
        floor = GRADIENT_FLOOR * gradients.mean() + 1e-30
        sensitivity[name] = (gradients + floor) * factors[name].cost.mean()

    # A layer without gradients has no sensitivity. Its step is at most 2**16 times the finest.
    largest = max(1e-20, *(float(x.max()) for x in sensitivity.values()))
    octaves = {name: (x / largest).log2().clamp_min(-32.0) / 2 for name, x in sensitivity.items()}
    coarsest = min(float(o.min()) for o in octaves.values())
    return {name: o - coarsest for name, o in octaves.items()}


class Steps(NamedTuple):
    """The steps of all rows."""

    coarsest: float
    exponents: dict[str, np.ndarray]  # (R,) uint8 by name: row_steps makes steps of them


def choose_steps(layers: dict[str, Tensor], finer: dict[str, Tensor], step: float) -> Steps:
    """Steps with `step` for the coarsest rows.

    A row that needs a coarser step to reach its largest weight gets one, and becomes the coarsest.
    """
    exponents = {}
    for name, w in layers.items():
        peak = w.abs().amax(1).clamp_min(1e-30)
        # With a step finer by more octaves than this, MAX_CODE would not reach the row's largest weight.
        max_octaves = (math.log2(step * MAX_CODE) - peak.log2()).clamp_max(32.0)
        exponents[name] = torch.minimum((8 * finer[name]).round(), (8 * max_octaves).floor())
    lowest = min(0, *(int(e.min()) for e in exponents.values()))
    stored = {name: (e - lowest).clamp_max(255).byte().cpu().numpy() for name, e in exponents.items()}
    return Steps(step * 2 ** (-lowest / 8), stored)


def code_layers(
    layers: dict[str, Tensor],
    factors: dict[str, Factor],
    steps: Steps,
    states: int,
    world: World,
    advance: Advance = no_progress,
) -> CodedModel:
    """Quantize all layers. Every rank decides a share of the rows of each, and gets the codes of all."""
    # Matrices of one shape go side by side: on a GPU that takes hardly longer than one of them.
    shapes = dict.fromkeys(w.shape for w in layers.values())
    stacks = [[name for name, w in layers.items() if w.shape == shape] for shape in shapes]
    codes_of_stacks: list[Tensor] = []
    for names in stacks:
        advance(len(codes_of_stacks) / len(stacks), "")
        w = torch.stack([layers[name] for name in names])
        factor = Factor(
            feedback=torch.stack([factors[name].feedback for name in names]),
            cost=torch.stack([factors[name].cost for name in names]),
        )
        of_rows = torch.stack([row_steps(steps.coarsest, steps.exponents[name]) for name in names]).to(w.device)
        rows = world.share(w.size(1))
        part = slice(rows.start, rows.stop)
        codes = torch.zeros_like(w, dtype=torch.int8)
        codes[:, part] = quantize_codes(w[:, part], factor, of_rows[:, part], states)
        codes_of_stacks.append(codes)
    world.sum_all(codes_of_stacks)

    coded_layers = {}
    for names, stack in zip(stacks, codes_of_stacks, strict=True):
        for name, codes in zip(names, stack, strict=True):
            coded_layers[name] = CodedLayer(steps.exponents[name], codes.cpu().numpy())
    return CodedModel(states, steps.coarsest, coded_layers)


# -- Coder -----------------------------------------------------------------------------------------------------------
# Interleaved range ANS (Duda 2013; Giesen 2014). Rows go side by side, each in a lane, one code per column. A lane that
# runs low takes the next 16 bits from a stream that all lanes share. How frequent a code is depends on the class of its
# row, which tells how large the row's codes are.

ANS_BITS = 14  # frequencies are in units of 2**-14
ANS_LANES = 2048  # at most; of a matrix with more rows, one band of rows is coded after the other
LANE_LOW = 2**16  # a lane holds a number from here to 2**32 - 1, and starts here
N_CLASSES = 64
N_SYMBOLS = 256  # code + 128
FREQUENCY_BYTES = 2 * N_CLASSES * N_SYMBOLS  # of the table of frequencies, in the payload


def row_classes(codes: np.ndarray) -> np.ndarray:
    """Four classes per octave of the mean absolute code. (R, C) int8 -> (R,) uint8"""
    mean = np.abs(codes.astype(np.int16)).mean(axis=1)
    return np.clip(np.rint(4 * np.log2(mean + 2.0**-7)) + 28, 0, N_CLASSES - 1).astype(np.uint8)


def to_symbols(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.int16) + 128).astype(np.uint8)


def from_symbols(symbols: np.ndarray) -> np.ndarray:
    return (symbols.astype(np.int16) - 128).astype(np.int8)


def count_symbols(symbols: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """How often each symbol occurs in rows of each class. (R, C) uint8, (R,) uint8 -> (N_CLASSES, N_SYMBOLS) int64"""
    cell = classes[:, None].astype(np.int32) * N_SYMBOLS + symbols
    return np.bincount(cell.ravel(), minlength=N_CLASSES * N_SYMBOLS).reshape(N_CLASSES, N_SYMBOLS)


def scale_counts(counts: np.ndarray) -> np.ndarray:
    """Frequencies that sum to 2**ANS_BITS in classes that occur, and are 0 only for symbols that do not.

    (N, N_SYMBOLS) int64 -> same
    """
    occurs = counts > 0
    total = counts.sum(axis=1, keepdims=True).clip(1)
    to_share = 2**ANS_BITS - occurs.sum(axis=1, keepdims=True)  # besides 1 for every symbol that occurs
    scaled = occurs + counts * to_share // total

    # What rounding down left over goes to the most frequent symbol.
    rest = np.where(occurs.any(axis=1), 2**ANS_BITS - scaled.sum(axis=1), 0)
    scaled[np.arange(len(scaled)), scaled.argmax(axis=1)] += rest
    return scaled


def ideal_bytes(counts: np.ndarray) -> float:
    """What symbols take that occur so often: as many bits as their frequencies say. encode_words comes very close."""
    bits = ANS_BITS - np.log2(scale_counts(counts).clip(1))
    return float((counts * bits).sum()) / 8


def encode_words(bands: list[tuple[np.ndarray, np.ndarray]], frequencies: np.ndarray) -> bytes:
    """Bands of symbols (R, C) and classes (R,), frequencies by class -> a uint32 for each lane, then uint16 words"""
    starts = frequencies.cumsum(axis=1) - frequencies
    lanes = np.full(ANS_LANES, LANE_LOW, np.uint64)
    words: list[bytes] = []

    # ANS is last in, first out: what is to be decoded first is encoded last.
    for symbols, classes in reversed(bands):
        x = lanes[: len(symbols)]
        for symbol in symbols.T[::-1]:
            frequency = frequencies[classes, symbol].astype(np.uint64)
            start = starts[classes, symbol].astype(np.uint64)
            is_full = x >= frequency << np.uint64(32 - ANS_BITS)
            words.append(x[is_full].astype("<u2").tobytes())  # the low 16 bits
            x[is_full] >>= np.uint64(16)
            high, low = np.divmod(x, frequency)
            x[:] = (high << np.uint64(ANS_BITS)) + low + start

    n_used = max(len(symbols) for symbols, _ in bands)
    return lanes[:n_used].astype("<u4").tobytes() + b"".join(reversed(words))


class CodedRows(NamedTuple):
    """Rows that are decoded side by side: those of a band whose codes are not known beforehand."""

    lanes: np.ndarray  # (R,) int64: the lane of each row
    classes: np.ndarray  # (R,) int64
    n_columns: int


def certain_symbols(frequencies: np.ndarray) -> np.ndarray:
    """The only symbol of each class that has just one, else -1. (N_CLASSES, N_SYMBOLS) -> (N_CLASSES,) int64

    Such codes take no bits. They need no decoding either, so that rows of zeros cost nothing.
    """
    is_certain = frequencies.max(axis=1) == 2**ANS_BITS
    return np.where(is_certain, frequencies.argmax(axis=1), -1)


def decode_words(
    data: bytes | memoryview, n_lanes: int, bands: list[CodedRows], frequencies: np.ndarray
) -> Iterator[np.ndarray]:
    """Yields the symbols (R,) uint8 of one column after another, band after band.

    Raises ValueError for words that encode_words did not make, at the latest when all columns are read.
    """
    if len(data) < 4 * n_lanes or len(data) % 2:
        raise ValueError("its words are cut short")
    lanes = np.frombuffer(data, "<u4", n_lanes).astype(np.int64)
    words = np.frombuffer(data, "<u2", offset=4 * n_lanes)
    n_read = 0

    # The low bits of a lane tell the symbol: each has as many slots as its frequency says.
    frequency_of = frequencies.ravel()
    start_of = (frequencies.cumsum(axis=1) - frequencies).ravel()
    symbol_at = np.zeros((len(frequencies), 2**ANS_BITS), np.uint8)
    for slots, row in zip(symbol_at, frequencies, strict=True):
        slots[: row.sum()] = np.repeat(np.arange(N_SYMBOLS, dtype=np.uint8), row)
    symbol_at = symbol_at.ravel()

    for band in bands:
        x = lanes[band.lanes]
        first_slot = band.classes << ANS_BITS
        first_symbol = band.classes * N_SYMBOLS
        for _ in range(band.n_columns):
            slot = x & (2**ANS_BITS - 1)
            symbols = symbol_at[first_slot + slot]
            place = first_symbol + symbols
            x = frequency_of[place] * (x >> ANS_BITS) + slot - start_of[place]

            low = np.flatnonzero(x < LANE_LOW)
            if n_read + len(low) > len(words):
                raise ValueError("its words are cut short")
            x[low] = x[low] << 16 | words[n_read : n_read + len(low)]
            n_read += len(low)
            yield symbols
        lanes[band.lanes] = x

    if n_read < len(words) or not (lanes == LANE_LOW).all():
        raise ValueError("its words do not end where they should")


# -- File ------------------------------------------------------------------------------------------------------------
# Magic (8 bytes), crc32 of all that follows (uint32), length of the header (uint32), header, payload, words.
#
# The header is JSON in zlib: format, codec, config; for trellis_ans also states and step. Which tensors there are, in
# which order, shape and kind, follows from config and codec (tensor_table).
# The payload, a zlib stream, holds the tensors one after another, and for trellis_ans at its end the frequencies of
# symbols by class, as uint16:
#   float32     any shape, little-endian
#   int8_rows   (R, C): R little-endian float16 scales, then R * C int8; the weight is q * scale. A vector is one row.
#   codes       (R, C): R uint8 exponents of the steps, R uint8 classes of the rows; the codes are in the words
# The words, for trellis_ans, are what encode_words returns.

ARTIFACT_MAGIC = b"GOLFGPT\n"
ARTIFACT_FORMAT = 5
ARTIFACT_PREFIX = struct.Struct("<8sII")
ARTIFACT_NAMES = {
    "trellis_ans": "final_model.trellis.ptz",
    "int8_zlib": "final_model.int8.ptz",
    "float32": "final_model.float32.ptz",
}

# Caps on what a file may make us allocate and compute. Each allows something to every file, enough for a model of zeros
# in the shape of the record, and more to a larger one. No run writes a file that holds so much in so few bytes.
MAX_HEADER_BYTES = 2**20
MAX_PARAMETERS = 2**28
SMALL_FILE_PARAMETERS = 2**26
PARAMETERS_PER_BYTE = 64
# Codes that are not certain have to be decoded before it turns out whether the words make sense. No run gives a code
# less than half a bit (bytes_limit), and a step along the columns yields hundreds of codes. Only models of 256 layers
# with at most 128 channels come near the caps, at 1 bit per code. On one slow core a code takes 20 ns and a step 25 us,
# so that a file of up to 1 MB is refused within 2 s. A larger one may take as long as an honest one of its size.
SMALL_FILE_CODES = 2**24
CODES_PER_BYTE = 20
SMALL_FILE_STEPS = 2**15
BYTES_PER_STEP = 16
# Codes that are kept, one byte each, before their words turn out to make sense. More are decoded twice.
UNCHECKED_CODES = 3 * 2**24


class StoredTensor(NamedTuple):
    """How a tensor lies in the payload."""

    name: str
    kind: str  # float32, int8_rows or codes
    shape: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def n_bytes(self) -> int:
        """In the payload, before zlib."""
        size = math.prod(self.shape)
        return {"float32": 4 * size, "int8_rows": 2 * self.n_rows + size, "codes": 2 * self.n_rows}[self.kind]


def tensor_table(model: GPT, codec: str) -> list[StoredTensor]:
    """Every tensor of the payload, in order. The published int8 + zlib keeps all but the matrices exact."""
    coded = coded_layers(model)
    table = []
    for name, p in model.state_dict().items():
        if codec == "trellis_ans":
            kind = "codes" if name in coded else "int8_rows"
        elif codec == "int8_zlib" and name.endswith(".weight"):
            kind = "int8_rows"
        else:
            kind = "float32"
        table.append(StoredTensor(name, kind, tuple(p.shape)))
    return table


def bands_of(table: list[StoredTensor]) -> list[tuple[str, slice]]:
    """Which rows of which tensor go through the coder side by side."""
    bands = []
    for tensor in table:
        if tensor.kind == "codes":
            for start in range(0, tensor.n_rows, ANS_LANES):
                bands.append((tensor.name, slice(start, min(start + ANS_LANES, tensor.n_rows))))
    return bands


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per row, its largest weight / 127. (R, C) float32 -> (R, C) int8, (R, 1) float16"""
    smallest_normal = 2**-14  # of float16
    scale = (w.abs().amax(dim=1, keepdim=True) / 127).clamp_min(smallest_normal).half()
    q = (w / scale.float()).round().clamp(-127, 127)  # divided by the scale as it is stored
    return q.to(torch.int8), scale


class Contents(NamedTuple):
    """What an artifact holds, its codes not yet encoded."""

    header: bytes  # compressed, like the payload
    payload: bytes
    bands: list[tuple[np.ndarray, np.ndarray]]  # for encode_words; empty without codes
    counts: np.ndarray  # (N_CLASSES, N_SYMBOLS) int64: how often each symbol occurs

    def estimated_bytes(self) -> int:
        """The size of the file to about 0.02 %, without encoding."""
        n_bytes = ARTIFACT_PREFIX.size + len(self.header) + len(self.payload) + round(ideal_bytes(self.counts))
        if self.bands:
            # A lane ends as a number of 32 bits, of which about 8 stand for symbols.
            n_bytes += 3 * max(len(symbols) for symbols, _ in self.bands)
        return n_bytes

    def encode(self) -> bytes:
        """The whole file."""
        words = encode_words(self.bands, scale_counts(self.counts)) if self.bands else b""
        body = self.header + self.payload + words
        return ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, zlib.crc32(body), len(self.header)) + body


def artifact_contents(model: GPT, codec: str, coded: CodedModel | None = None) -> Contents:
    """Lay out the artifact of a model: its config and its weights. `coded` are its codes, for trellis_ans."""
    header: dict[str, Any] = {
        "format": ARTIFACT_FORMAT,
        "codec": codec,
        "config": dataclasses.asdict(model.config),
    }
    table = tensor_table(model, codec)
    state = model.state_dict()
    payload = bytearray()
    counts = np.zeros((N_CLASSES, N_SYMBOLS), np.int64)
    symbols = dict[str, np.ndarray]()
    classes = dict[str, np.ndarray]()

    for name, kind, shape in table:
        w = state[name].detach().float().cpu().reshape(-1, shape[-1])
        # The scale must fit a float16. The comparison is also false for NaN.
        if not bool((w.abs() < 127 * 65_000).all()):
            raise ValueError(
                f"parameter {name} is not finite or too large to quantize: train with lower learning rates"
            )
        if kind == "int8_rows":
            q, scale = quantize_rows(w)
            payload += scale.numpy().astype("<f2").tobytes() + q.numpy().tobytes()
        elif kind == "float32":
            payload += w.numpy().astype("<f4").tobytes()
        elif coded:
            layer = coded.layers[name]
            symbols[name] = to_symbols(layer.codes)
            classes[name] = row_classes(layer.codes)
            counts += count_symbols(symbols[name], classes[name])
            payload += layer.exponents.tobytes() + classes[name].tobytes()

    bands = []
    if coded:
        header["states"] = coded.states
        header["step"] = coded.step
        payload += scale_counts(counts).astype("<u2").tobytes()
        bands = [(symbols[name][rows], classes[name][rows]) for name, rows in bands_of(table)]
    text = json.dumps(header, separators=(",", ":"))
    # Floats would not become smaller by more than a tenth, and it would take long.
    level = 0 if codec == "float32" else 9
    return Contents(zlib.compress(text.encode(), 9), zlib.compress(payload, level), bands, counts)


def pack_artifact(model: GPT, codec: str, coded: CodedModel | None = None) -> bytes:
    """The whole file for a model."""
    return artifact_contents(model, codec, coded).encode()


class Header(NamedTuple):
    """What the header of an artifact says, checked."""

    config: GPTConfig
    codec: str
    states: int  # of the trellis; 0 without one
    step: float  # of the coarsest rows; 0 without codes


class ArtifactParts(NamedTuple):
    """An artifact, taken apart. Its checksum, the sizes of its parts and its scales have been checked."""

    header: Header
    table: list[StoredTensor]
    payload: memoryview  # as it lies in the file, compressed
    words: memoryview
    path: Path
    n_bytes: int
    sha256: str


class Inflater:
    """Reads a zlib stream piece by piece, so that little of it is held."""

    STREAM_PIECE = 2**8  # bytes, which stand for 264 kB at most
    SKIP_PIECE = 2**16  # bytes

    def __init__(self, stream: memoryview) -> None:
        self.stream = stream
        self.n_taken = 0  # of its bytes
        self.unpacker = zlib.decompressobj()
        self.ready = bytearray()

    def fill(self, n_bytes: int) -> None:
        """Have this many bytes ready, or all that are left."""
        while len(self.ready) < n_bytes and not self.unpacker.eof and self.n_taken < len(self.stream):
            piece = self.stream[self.n_taken : self.n_taken + self.STREAM_PIECE]
            self.n_taken += len(piece)
            self.ready += self.unpacker.decompress(piece)

    def read(self, n_bytes: int) -> bytes:
        """The next bytes. Raises ValueError if the stream ends before."""
        self.fill(n_bytes)
        if len(self.ready) < n_bytes:
            raise ValueError("it has a payload of another size than its header says")
        data = bytes(self.ready[:n_bytes])
        del self.ready[:n_bytes]
        return data

    def skip(self, n_bytes: int) -> None:
        for start in range(0, n_bytes, self.SKIP_PIECE):
            self.read(min(self.SKIP_PIECE, n_bytes - start))

    def skip_floats(self, n_bytes: int, dtype: str) -> bool:
        """Whether all of the next values are finite."""
        all_finite = True
        for start in range(0, n_bytes, self.SKIP_PIECE):
            values = np.frombuffer(self.read(min(self.SKIP_PIECE, n_bytes - start)), dtype)
            all_finite = all_finite and bool(np.isfinite(values).all())
        return all_finite

    def finish(self) -> int:
        """The length of the stream in bytes. Raises ValueError if it holds anything more, or is cut short."""
        self.fill(1)
        if self.ready or not self.unpacker.eof:
            raise ValueError("it has a payload of another size than its header says")
        return self.n_taken - len(self.unpacker.unused_data)


def parse_header(text: bytes) -> Header:
    """Raises ValueError, or one of the errors that read_artifact catches, for a malformed header."""
    header = json.loads(zlib.decompressobj().decompress(text, MAX_HEADER_BYTES))
    version = header["format"]
    codec = header["codec"]
    if version != ARTIFACT_FORMAT:
        raise ValueError(
            f"format {version!r:.100}, but this script reads {ARTIFACT_FORMAT}: use the script that wrote it"
        )
    if codec not in ARTIFACT_NAMES:
        raise ValueError(
            f"codec {codec!r:.100} is not one of {', '.join(ARTIFACT_NAMES)}: use the script that wrote it"
        )
    if header["config"].keys() != {field.name for field in dataclasses.fields(GPTConfig)}:
        raise ValueError(f"its config has the settings {sorted(header['config'])!r:.400}: use the script that wrote it")
    config = GPTConfig(**header["config"])
    if config.eval_seq_len == 0:
        raise ValueError("its config has no EVAL_SEQ_LEN: make it again")
    if codec != "trellis_ans":
        return Header(config, codec, 0, 0.0)

    states = header["states"]
    step = header["step"]
    if type(states) is not int or states not in TRELLISES:
        raise ValueError(f"a trellis of states={states!r:.100} is not one of {sorted(TRELLISES)}")
    if type(step) is not float or not 0 < step < 2**16:
        raise ValueError(f"step={step!r:.100} is not a number above 0 and below 2**16")
    return Header(config, codec, states, step)


def read_artifact(path: Path) -> ArtifactParts:
    """Take an artifact apart. Nothing is read or allocated before its size is known to be bounded.

    Raises FileNotFoundError, or ValueError for a file that is damaged, of another format, or lies about its content.
    """
    if not path.exists():
        raise FileNotFoundError(f"artifact {str(path)!r} does not exist: train first, or name another file")
    if not path.is_file():
        raise ValueError(f"artifact {str(path)!r} is not a regular file: name the file that a run wrote")
    with path.open("rb") as file:
        prefix = file.read(ARTIFACT_PREFIX.size)
        if len(prefix) < ARTIFACT_PREFIX.size or not prefix.startswith(ARTIFACT_MAGIC):
            raise ValueError(f"{path} is not an artifact of train_gpt.py: it does not start with {ARTIFACT_MAGIC!r}")
        _, crc32, header_bytes = ARTIFACT_PREFIX.unpack(prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"{path} is damaged (header of {header_bytes} bytes): copy or make it again")

        text = file.read(header_bytes)
        n_bytes = path.stat().st_size
        try:
            header = parse_header(text)
            table = check_shape(header, n_bytes)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
            raise ValueError(f"{path} has a header that describes no model for this script: {error!s:.600}") from None

        # zlib never needs more than this for the payload, and a code takes at most one word.
        payload_bytes = sum(tensor.n_bytes for tensor in table)
        most_bytes = file.tell() + payload_bytes + payload_bytes // 1000 + 1024
        if header.codec == "trellis_ans":
            n_codes = sum(math.prod(tensor.shape) for tensor in table if tensor.kind == "codes")
            most_bytes += FREQUENCY_BYTES + 4 * ANS_LANES + 2 * n_codes
        if n_bytes > most_bytes:
            raise ValueError(f"{path} has more bytes than its header describes: make it again")
        body = memoryview(file.read(n_bytes))

    if zlib.crc32(body, zlib.crc32(text)) != crc32:
        raise ValueError(f"{path} is damaged (checksum): copy or make it again")
    try:
        payload_end = check_payload(body, table, header.codec)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged, {error}: copy or make it again") from None
    hashed = hashlib.sha256(prefix + text)
    hashed.update(body)
    payload = body[:payload_end]
    words = body[payload_end:]
    return ArtifactParts(header, table, payload, words, path, n_bytes, hashed.hexdigest())


def check_shape(header: Header, n_bytes: int) -> list[StoredTensor]:
    """The tensors of a header's model. Raises ValueError if no file of `n_bytes` holds so many parameters."""
    with torch.device("meta"):
        model = GPT(header.config)
    n_parameters = sum(p.numel() for p in model.parameters())
    if n_parameters > min(MAX_PARAMETERS, SMALL_FILE_PARAMETERS + PARAMETERS_PER_BYTE * n_bytes):
        raise ValueError(f"{n_parameters} parameters are more than an artifact of {n_bytes} bytes holds")
    return tensor_table(model, header.codec)


def check_payload(body: memoryview, table: list[StoredTensor], codec: str) -> int:
    """Walk through the payload at the start of `body` without keeping it. -> where it ends

    Raises ValueError for a payload of another size than its tensors have, and for values that are not finite.
    """
    inflater = Inflater(body)
    not_finite = ""
    for tensor in table:
        is_finite = True
        if tensor.kind == "float32":
            is_finite = inflater.skip_floats(tensor.n_bytes, "<f4")
        elif tensor.kind == "int8_rows":
            is_finite = inflater.skip_floats(2 * tensor.n_rows, "<f2")  # the scales
            inflater.skip(math.prod(tensor.shape))
        else:
            inflater.skip(tensor.n_bytes)
        if not is_finite:
            not_finite = tensor.name
    if codec == "trellis_ans":
        inflater.skip(FREQUENCY_BYTES)

    payload_end = inflater.finish()
    if codec != "trellis_ans" and payload_end < len(body):
        raise ValueError("it has more bytes than its header describes")
    if not_finite:
        raise ValueError(f"it has a value in {not_finite} that is not finite")
    return payload_end


def read_tensor(data: bytes, tensor: StoredTensor) -> Tensor:
    """A tensor of kind float32 or int8_rows, from its bytes in the payload."""
    if tensor.kind == "float32":
        values = np.frombuffer(data, "<f4").astype(np.float32)
    else:
        scale = np.frombuffer(data, "<f2", tensor.n_rows).astype(np.float32)
        q = np.frombuffer(data, np.int8, offset=2 * tensor.n_rows).reshape(tensor.n_rows, tensor.shape[-1])
        values = q * scale[:, None]
    return torch.from_numpy(values).view(tensor.shape)


def decode_layers(
    parts: ArtifactParts, exponents: dict[str, np.ndarray], classes: dict[str, np.ndarray], frequencies: np.ndarray
) -> dict[str, Tensor]:
    """The weights that are stored as codes, by name. Raises ValueError for words or frequencies that make no sense."""
    symbols = decode_symbols(parts, classes, frequencies)
    weights = {}
    for name, layer_symbols in symbols.items():
        codes = from_symbols(layer_symbols)
        quantizers = quantizers_along(codes, TRELLISES[parts.header.states])
        step = row_steps(parts.header.step, exponents[name])
        weights[name] = dequantize(torch.from_numpy(codes), torch.from_numpy(quantizers), step)
    return weights


def decode_symbols(
    parts: ArtifactParts, classes: dict[str, np.ndarray], frequencies: np.ndarray
) -> dict[str, np.ndarray]:
    """The symbols (R, C) uint8 of each matrix, by name. Raises ValueError for those that no run writes."""
    if max(int(rows.max()) for rows in classes.values()) >= N_CLASSES:
        raise ValueError(f"it has classes of rows that are not below {N_CLASSES}")
    totals = frequencies.sum(axis=1)
    if not np.isin(totals, (0, 2**ANS_BITS)).all():
        raise ValueError("its frequencies do not sum to 1")
    if not all(totals[rows].all() for rows in classes.values()):
        raise ValueError("it has rows of a class without symbols")

    only_symbol = certain_symbols(frequencies)
    columns = {tensor.name: tensor.shape[-1] for tensor in parts.table}
    bands = bands_of(parts.table)
    n_lanes = max(rows.stop - rows.start for _, rows in bands)
    uncertain = []
    for name, rows in bands:
        band_classes = classes[name][rows].astype(np.int64)
        lanes = np.flatnonzero(only_symbol[band_classes] < 0)
        uncertain.append(CodedRows(lanes, band_classes[lanes], columns[name] if len(lanes) else 0))
    n_codes = sum(len(rows.lanes) * rows.n_columns for rows in uncertain)
    n_steps = sum(rows.n_columns for rows in uncertain)
    too_many_codes = n_codes > SMALL_FILE_CODES + CODES_PER_BYTE * parts.n_bytes
    too_many_steps = n_steps > SMALL_FILE_STEPS + parts.n_bytes // BYTES_PER_STEP
    if too_many_codes or too_many_steps:
        raise ValueError(f"it describes {n_codes} codes in {parts.n_bytes} bytes, which no run does")

    if n_codes > UNCHECKED_CODES:
        for _ in decode_words(parts.words, n_lanes, uncertain, frequencies):
            pass
    one_column_after_another = decode_words(parts.words, n_lanes, uncertain, frequencies)
    decoded = [list(itertools.islice(one_column_after_another, rows.n_columns)) for rows in uncertain]
    # Only when it is asked for more does the decoder see whether the words end here.
    next(one_column_after_another, None)

    symbols = {}
    for name, of_rows in classes.items():
        symbols[name] = np.repeat(only_symbol[of_rows].astype(np.uint8)[:, None], columns[name], axis=1)
    for (name, rows), coded, band in zip(bands, uncertain, decoded, strict=True):
        if band:
            symbols[name][rows][coded.lanes] = np.stack(band, axis=1)
    return symbols


@np.errstate(all="ignore")  # numpy would warn of hostile values, which are refused
def build_model(parts: ArtifactParts, device: torch.device | str = "cpu", compute_dtype: str = "") -> GPT:
    """The model of an artifact, as load_artifact returns it. Raises ValueError for codes that make no sense."""
    weights = dict[str, Tensor]()
    exponents = dict[str, np.ndarray]()
    classes = dict[str, np.ndarray]()
    payload = Inflater(parts.payload)
    for tensor in parts.table:
        data = payload.read(tensor.n_bytes)
        if tensor.kind == "codes":
            exponents[tensor.name] = np.frombuffer(data, np.uint8, tensor.n_rows)
            classes[tensor.name] = np.frombuffer(data, np.uint8, offset=tensor.n_rows)
        else:
            weights[tensor.name] = read_tensor(data, tensor)
    if exponents:
        frequencies = np.frombuffer(payload.read(FREQUENCY_BYTES), "<u2").astype(np.int64)
        try:
            weights |= decode_layers(parts, exponents, classes, frequencies.reshape(N_CLASSES, N_SYMBOLS))
        except ValueError as error:
            raise ValueError(f"{parts.path} is damaged, {error}: copy or make it again") from None

    config = parts.header.config
    if compute_dtype:
        config = dataclasses.replace(config, compute_dtype=compute_dtype)
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()


def load_artifact(path: str | Path, device: torch.device | str = "cpu", compute_dtype: str = "") -> GPT:
    """Rebuild the model that is scored: dequantized, float32 weights, in eval mode.

    Its activations have the dtype that its config names, or `compute_dtype` if that is given. Raises FileNotFoundError,
    or ValueError for a file that is damaged, of another format, or lies about its content. Reads data only, runs no
    code, and takes no more memory than the header declares, which is bounded by the size of the file.
    """
    return build_model(read_artifact(Path(path)), device, compute_dtype)


# -- Size ------------------------------------------------------------------------------------------------------------

CLOSE_ENOUGH = 0.995  # of the limit: a file between this and the limit ends the search
AIM = 0.9975  # of the limit: midway between CLOSE_ENOUGH and 1
ATTEMPTS = 3
# A quantized Gaussian weight takes log2(standard deviation / step) bits plus this many: log2(2 pi e) / 2.
GAUSSIAN_BITS = 2.05
# With the same steps, a code of a trellis takes this many bits more than a rounded one, times 2**-(bits per code).
TRELLIS_BITS = 1.75


class Attempt(NamedTuple):
    contents: Contents
    packed: bytes  # the file, if it was encoded
    n_bytes: int  # of the file, or estimated
    within_limit: bool

    @property
    def rank(self) -> tuple[bool, int]:
        """Among those within the limit, more bytes win. If there is none, the smallest wins."""
        return self.within_limit, self.n_bytes if self.within_limit else -self.n_bytes


def fit_artifact(model: GPT, moments: Moments, run: Run, advance: Advance = no_progress) -> bytes:
    """The artifact with the finest steps that MAX_TOTAL_BYTES and MAX_WEIGHT_BITS allow, if it can within 0.5 %.

    Steps are first tried by rounding, which takes no time and gives a file of nearly the same size. By how much GPTQ's
    is larger, an attempt tells the next one. All ranks take part, but only rank 0 encodes: the others return nothing.
    """
    hp = run.hp
    world = run.world
    for name, sums in moments.items():
        if not all(bool(m.isfinite().all()) for m in sums):
            raise ValueError(f"moments of {name} are not finite: lower the learning rates")
    layers = {name: layer.weight.detach().float() for name, layer in coded_layers(model).items()}
    factors = {name: factorize(inputs) for name, (inputs, _) in moments.items()}
    finer = finer_rows(moments, factors)

    n_codes = sum(w.numel() for w in layers.values())
    limit = bytes_limit(model, n_codes, hp)
    bits = 8 * (limit - bytes_besides_codes(model)) / n_codes  # that the limit leaves for a code

    # The first guess assumes Gaussian weights: the mean of log2(standard deviation / step), for a coarsest step of 1.
    gaussian_octaves = 0.0
    for name, w in layers.items():
        octaves_by_row = w.std(1).clamp_min(1e-9).log2() + finer[name]
        gaussian_octaves += float(octaves_by_row.sum()) * w.size(1)
    step = 2 ** (gaussian_octaves / n_codes + GAUSSIAN_BITS - bits)
    extra = TRELLIS_BITS * 2**-bits * n_codes / 8 if hp.trellis_states > 1 else 0.0

    attempts: list[Attempt] = []

    def advance_attempt(done: float, words: str) -> None:
        advance((len(attempts) + done) / ATTEMPTS, words)

    for _ in range(ATTEMPTS):
        step, rounded = step_by_rounding(model, layers, finer, step, AIM * limit - extra)
        steps = choose_steps(layers, finer, world.agree(step))
        coded = code_layers(layers, factors, steps, hp.trellis_states, world, advance_attempt)
        contents = artifact_contents(model, "trellis_ans", coded)
        packed = b""
        n_bytes = contents.estimated_bytes()
        is_close = CLOSE_ENOUGH * limit < n_bytes <= limit
        if is_close:
            packed = contents.encode() if world.rank == 0 else b""
            n_bytes = round(world.agree(len(packed)))
        run.log0(f"quantize: states:{coded.states} step:{coded.step:.6g} bytes:{n_bytes} limit:{limit}")
        attempts.append(Attempt(contents, packed, n_bytes, n_bytes <= limit))
        if is_close and n_bytes <= limit:
            break
        extra = n_bytes - rounded
    advance(1.0, "")

    best = max(attempts, key=lambda attempt: attempt.rank)
    if world.rank > 0:
        return b""
    return best.packed or best.contents.encode()


def step_by_rounding(
    model: GPT, layers: dict[str, Tensor], finer: dict[str, Tensor], step: float, aim: float
) -> tuple[float, int]:
    """The step with which rounded codes make a file of about `aim` bytes, and its bytes. `step` is where to begin."""
    n_codes = sum(w.numel() for w in layers.values())
    bytes_per_octave = n_codes / 8  # halving the step costs about one bit per code, less where many codes are 0
    n_bytes = rounded_contents(model, layers, choose_steps(layers, finer, step)).estimated_bytes()
    for _ in range(6):
        move = (n_bytes - aim) / bytes_per_octave  # octaves by which the step is made coarser
        if abs(n_bytes - aim) < 5e-4 * aim:
            break
        step *= 2**move
        before = n_bytes
        n_bytes = rounded_contents(model, layers, choose_steps(layers, finer, step)).estimated_bytes()
        bytes_per_octave = max((before - n_bytes) / move, n_codes / 24)  # a third of a bit per code at least
    return step, n_bytes


def rounded_contents(model: GPT, layers: dict[str, Tensor], steps: Steps) -> Contents:
    """An artifact with every weight rounded to the nearest code."""
    coded = {}
    for name, w in layers.items():
        rounded = (w / row_steps(steps.coarsest, steps.exponents[name]).to(w.device)).round()
        codes = rounded.clamp(-MAX_CODE, MAX_CODE).to(torch.int8).cpu().numpy()
        coded[name] = CodedLayer(steps.exponents[name], codes)
    return artifact_contents(model, "trellis_ans", CodedModel(1, steps.coarsest, coded))


def bytes_besides_codes(model: GPT) -> int:
    """About what the file takes besides codes: other weights, the coder's lanes and the header."""
    stored = [tensor.n_bytes for tensor in tensor_table(model, "trellis_ans") if tensor.kind != "codes"]
    most_rows = max(layer.weight.size(0) for layer in coded_layers(model).values())
    return sum(stored) + 4 * min(ANS_LANES, most_rows) + 1024


def bytes_limit(model: GPT, n_codes: int, hp: Hyperparameters) -> int:
    """The most bytes for the artifact, but at least half a bit per code, even if that is over the run's limit."""
    other_bytes = bytes_besides_codes(model)
    by_total = hp.max_total_bytes - len(own_code())
    by_weights = int(hp.max_weight_bits * n_codes / 8) + other_bytes
    # Below half a bit the model would be useless. Such a run ends over the limit and says so.
    lowest = other_bytes + n_codes // 16
    return max(lowest, min(by_total, by_weights))


# ----------------------------------------------------------------------------------------------------------------------
# 9. Main
# ----------------------------------------------------------------------------------------------------------------------


def settings_from_files(env: Mapping[str, str]) -> dict[str, str]:
    """Settings that `env` leaves open and that files know.

    The run.json beside EVAL_ARTIFACT names the data of that run. The manifest of the data names their tokenizer, and
    how many pieces it has. Files that make no sense are passed over here, and refused when they are used.
    """
    hp = from_env(Hyperparameters, env)
    found = dict[str, str]()

    if hp.eval_artifact and "DATA_PATH" not in env:
        run = dict[str, Any]()
        with contextlib.suppress(ValueError):
            run = read_json(find_artifact(hp.eval_artifact).with_name("run.json"))
        for name in ("data_path", "tokenizer_path"):
            known = str(run.get(name, ""))
            # Unlike those of Path, these functions of os.path say no to a name that is too long.
            if known and name.upper() not in env and os.path.exists(known):
                found[name.upper()] = known

    data_path = Path(found.get("DATA_PATH", hp.data_path))
    try:
        tokenizer = read_json(data_path / "manifest.json")["tokenizer"]
        file_name = str(tokenizer["file"])
        n_pieces = int(tokenizer["vocab_size"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return found
    if "VOCAB_SIZE" not in env and not hp.eval_artifact:
        found["VOCAB_SIZE"] = str(n_pieces)
    if "TOKENIZER_PATH" not in env and "TOKENIZER_PATH" not in found:
        for folder in (data_path.parent.parent / "tokenizers", data_path):
            path = folder / Path(file_name).name
            if os.path.isfile(path) and path != Path(hp.tokenizer_path):
                found["TOKENIZER_PATH"] = str(path)
    return found


def find_artifact(path: str) -> Path:
    """The artifact that EVAL_ARTIFACT names: a file, or what a run left in its folder."""
    if not Path(path).is_dir():
        return Path(path)
    artifacts = sorted(Path(path).glob("final_model.*.ptz"))
    if not artifacts:
        raise FileNotFoundError(f"EVAL_ARTIFACT={path!r} is a folder without final_model.*.ptz: name another")
    if len(artifacts) > 1:
        raise ValueError(f"EVAL_ARTIFACT={path!r} is a folder with {', '.join(map(str, artifacts))}: name one of them")
    return artifacts[0]


def resolve_settings(env: Mapping[str, str], device: torch.device) -> tuple[GPTConfig, Hyperparameters]:
    """The settings of the run, with everything filled in that is left open: nothing changes them later.

    To score an artifact, its own config is taken. Raises ValueError or FileNotFoundError before anything is written.
    """
    config = from_env(GPTConfig, env)
    hp = from_env(Hyperparameters, env)
    if not hp.run_id:
        now = time.strftime("%Y-%m-%d_%H%M%S")
        what = "evaluation" if hp.eval_artifact else f"{hp.preset}_seed{hp.seed}"
        hp = dataclasses.replace(hp, run_id=f"{now}_{what}")

    if hp.eval_artifact:
        artifact = find_artifact(hp.eval_artifact)
        header = read_artifact(artifact).header
        config = adopt_config(config, header.config, env)
        hp = dataclasses.replace(hp, codec=header.codec, eval_artifact=str(artifact))

    _, tokenizer_sha256 = load_tokenizer(hp.tokenizer_path, config.vocab_size, config.bos_id, config.tokenizer_sha256)
    dtype = pick_dtype(device, config.compute_dtype)
    config = dataclasses.replace(
        config,
        eval_seq_len=config.eval_seq_len or hp.train_seq_len,
        compute_dtype=str(dtype).removeprefix("torch."),
        tokenizer_sha256=tokenizer_sha256,
    )
    return config, hp


# How an artifact is scored, which may be changed. Everything else in its config says what its weights mean.
WAYS_TO_SCORE = ("eval_method", "eval_seq_len", "eval_stride", "compute_dtype")


def adopt_config(asked: GPTConfig, stored: GPTConfig, env: Mapping[str, str]) -> GPTConfig:
    """The config of an artifact, scored as `asked`. Raises ValueError for other settings that contradict it."""
    changes = {}
    for name, value in vars(stored).items():
        wanted = getattr(asked, name)
        if name.upper() not in env or wanted == value:
            continue
        if name not in WAYS_TO_SCORE:
            raise ValueError(f"{name.upper()}={wanted} contradicts the artifact's {value}: unset it")
        is_left_open = wanted == "auto" or (name == "eval_seq_len" and wanted == 0)
        if not is_left_open:
            changes[name] = wanted
    return dataclasses.replace(stored, **changes)


def scored_otherwise(run: Run, identity: Mapping[str, Any], parts: ArtifactParts) -> list[str]:
    """In what the score of EVAL_ARTIFACT differs from the one that its run gave it, in words."""
    differences = []
    for name in WAYS_TO_SCORE:
        here = getattr(run.config, name)
        there = getattr(parts.header.config, name)
        if here != there:
            differences.append(f"{name.upper()}={here} instead of {there}")

    known = dict[str, Any]()
    with contextlib.suppress(ValueError):
        known = read_json(parts.path.with_name("run.json"))
    if known.get("val_shards_sha256", identity["val_shards_sha256"]) != identity["val_shards_sha256"]:
        differences.append(f"other validation data than DATA_PATH={known.get('data_path')}")
    limit_here = run.hp.val_max_tokens if identity["partial"] else 0
    limit_there = known.get("val_max_tokens", 0) if known.get("partial") else 0
    if limit_here != limit_there:
        differences.append(f"VAL_MAX_TOKENS={limit_here} instead of {limit_there}")
    return differences


def changed_settings(config: GPTConfig, hp: Hyperparameters, env: Mapping[str, str]) -> dict[str, Any]:
    """What `env` sets to another value than the preset has, by name of the variable."""
    defaults = all_settings({"PRESET": hp.preset})
    changed = {}
    for field, value in {**vars(config), **vars(hp)}.items():
        name = field.upper()
        if name in env and value != defaults[name]:
            changed[name] = value
    return changed


class Data(NamedTuple):
    """What a run reads."""

    train: Loader | None  # None if an artifact is only scored
    val: ValSplit

    def identity(self, config: GPTConfig) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        return {
            "train_tokens": len(self.train.stream) if self.train else 0,
            "val_shards_sha256": self.val.identity["val_shards_sha256"],
            "tokenizer_sha256": config.tokenizer_sha256,
        }


def open_data(config: GPTConfig, hp: Hyperparameters, world: World) -> Data:
    """Open the shards. Raises ValueError or FileNotFoundError for what is missing or does not fit together."""
    sp, tokenizer_sha256 = load_tokenizer(hp.tokenizer_path, config.vocab_size, config.bos_id)
    val = load_val_split(hp.data_path, sp, tokenizer_sha256, hp.val_max_tokens)
    if hp.eval_artifact:
        return Data(None, val)
    return Data(Loader(TokenStream(hp.data_path, "fineweb_train_[0-9]*.bin"), hp, config.vocab_size, world), val)


# Fewer steps than this leave a model that has learned nothing, and fewer than that one that has learned little.
USELESS_STEPS = 5
FEW_STEPS = 100


def operations_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """What the device reaches in a matrix product, the fastest of four. One takes some milliseconds."""
    # A GPU needs larger matrices than a CPU to show what it can do.
    size = 1024 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        synchronize(device)
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def require_fast_device(n_parameters: int, run: Run) -> None:
    """Raise ValueError if so few steps fit into MAX_WALLCLOCK_SECONDS that the model is far too large for the device.

    A step takes about 6 operations per parameter and token, and no device is faster than in its matrix products.
    """
    hp = run.hp
    config = run.config
    if not hp.seconds_for_steps:
        return
    passes = len(config.layer_order(looping=True)) / config.num_layers
    operations = 6 * n_parameters * passes * hp.train_batch_tokens
    dtype = pick_dtype(run.world.device, config.compute_dtype)
    speed = run.world.size * operations_per_second(run.world.device, dtype)
    n_steps = run.world.agree(hp.seconds_for_steps * speed / operations)
    if n_steps >= min(hp.iterations, FEW_STEPS):
        return

    advice = (
        f"at most {math.floor(n_steps)} steps of PRESET={hp.preset} fit into "
        f"MAX_WALLCLOCK_SECONDS={hp.max_wallclock_seconds:g} on this device: take PRESET=small (an hour on a laptop) "
        "or PRESET=smoke (two minutes)"
    )
    if n_steps < min(hp.iterations, USELESS_STEPS):
        raise ValueError(f"{advice}, or set ITERATIONS and MAX_WALLCLOCK_SECONDS=0 to do it nevertheless")
    run.warn(advice)


def train_and_store(run: Run, data: Data, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Train a model, from a checkpoint on if there is one, and write its artifact. -> results by log key"""
    config = run.config
    hp = run.hp
    world = run.world
    loader = data.train
    assert loader
    n_shards = len(loader.stream.files)
    n_train_tokens = len(loader.stream)
    dataset = Path(hp.data_path).name
    run.log0(f"train_loader:dataset:{dataset} train_shards:{n_shards} train_tokens:{n_train_tokens}")

    model = GPT(config)
    n_parameters = sum(p.numel() for p in model.parameters())
    require_fast_device(n_parameters, run)
    init_weights(model, hp)
    model.to(world.device)
    if hp.ema_decay:
        run.progress.average = [p.detach().clone() for p in model.parameters()]
    loss_fn = functools.partial(model.loss, compiled=run.compiled)
    learner = Learner(model, loss_fn, build_optimizers(model, hp, world))

    run.ledger.switch("compile")
    fit_micro_batch(learner, loader, run)
    sizes = {
        "model_params": n_parameters,
        "world_size": world.size,
        "grad_accum_steps": len(loader.batch(0)),
        "micro_batch_sequences": loader.micro_sequences,
    }
    attention = attention_kind(config, world.device, run.compiled)
    run.log0(key_values({**sizes, "compiled": run.compiled, "attention": attention}))
    shown = ("train_batch_tokens", "train_seq_len", "iterations", "warmup_steps", "max_wallclock_seconds")
    run.log0(key_values({name: getattr(hp, name) for name in shown}))
    introduce(run, n_parameters, n_train_tokens, len(data.val.ids))
    if run.compiled:
        run.screen.tell("The model is compiled first, which takes up to two minutes on a CPU and one on a GPU.")
        prime(learner, loader, run)
    if checkpoint:
        restore(checkpoint, learner, loader, run)
        position = run.progress.position(hp)
        run.log0(f"resumed:{position} {run.progress.timing()} checkpoint:{checkpoint.path}")
        run.screen.tell(f"Going on at {position} from {checkpoint.path}")
        if checkpoint.header["code_sha256"] != hashlib.sha256(own_code()).hexdigest():
            run.warn("the script has changed since the checkpoint was written")

    def validate(looping: bool) -> Score:
        def logits_fn(ids: Tensor) -> Tensor:
            return model(ids, looping, run.compiled)

        with run.screen.bar("validating", leave=False) as advance:
            return evaluate(logits_fn, data.val, config, hp.val_batch_size, world, advance)

    with run.screen.bar("training") as advance:
        checkpoints = CheckpointWriter(learner, data.identity(config), run)
        results = train(learner, loader, validate, run, checkpoints, advance)

    # What follows takes minutes, and may fail. Until it is done, the weights are kept as they are.
    run.ledger.switch("serialize")
    as_trained = hp.run_folder / ARTIFACT_NAMES["float32"]
    if world.rank == 0 and hp.codec != "float32":
        try:
            write_file(as_trained, pack_artifact(model, "float32"))
        except OSError as error:
            run.warn(f"the weights are not kept before they are quantized: {error}")

    packed = compress(model, loader, results["steps"], run)
    if world.rank == 0:
        path = write_somewhere(hp.run_folder / ARTIFACT_NAMES[hp.codec], hp, packed)
        results["artifact_path"] = str(path)
        results["artifact_sha256"] = hashlib.sha256(packed).hexdigest()
        if path != as_trained:
            # A disk that has become read-only keeps it.
            with contextlib.suppress(OSError):
                as_trained.unlink()
    # The other ranks wait for the file, and look for it where it is.
    results["artifact_path"] = world.agree_on_text(results.get("artifact_path", ""))
    return {**results, **sizes, "train_dataset": dataset, "train_tokens": n_train_tokens}


def compress(model: GPT, loader: Loader, step: int, run: Run) -> bytes:
    """The artifact of a trained model. The quantizer is calibrated on the train batches from `step` on."""
    if run.hp.codec != "trellis_ans":
        run.ledger.switch("quantize")
        return pack_artifact(model, run.hp.codec)

    run.ledger.switch("calibrate")
    with run.screen.bar("calibrating") as advance:
        moments = calibrate(model, loader, step, run, advance)
    run.ledger.switch("quantize")
    with run.screen.bar("quantizing") as advance:
        return fit_artifact(model, moments, run, advance)


def score_artifact(run: Run, split: ValSplit, parts: ArtifactParts) -> Score:
    """Score what is rebuilt from the file, and nothing else."""
    model = build_model(parts, run.world.device, run.config.compute_dtype)
    logits_fn = functools.partial(model, compiled=run.compiled)
    run.ledger.switch("evaluate")
    with run.screen.bar("scoring") as advance:
        score = evaluate(logits_fn, split, run.config, run.hp.val_batch_size, run.world, advance)
    run.ledger.switch("report")
    return score


def introduce(run: Run, n_parameters: int, n_train_tokens: int, n_val_tokens: int) -> None:
    """Tell a person what is going to be trained, on what, and for how long."""
    config = run.config
    hp = run.hp
    limits = [f"{hp.iterations:,} steps of {hp.train_batch_tokens:,} tokens"]
    if hp.max_wallclock_seconds:
        limits.append(f"{hp.max_wallclock_seconds:g} s of training")
    machine = describe_machine(run.world.device)
    tell = run.screen.tell
    tell(f"Run    {hp.run_id}: preset {hp.preset}, seed {hp.seed}")
    tell(
        f"Model  {n_parameters:,} parameters: {config.num_layers} layers of width {config.model_dim}, "
        f"vocabulary of {config.vocab_size:,}"
    )
    tell(f"Data   {Path(hp.data_path).name}: {n_train_tokens:,} tokens to train on, {n_val_tokens:,} to be scored on")
    tell(f"Device {run.world.size} x {machine['device'].replace('_', ' ')}, {config.compute_dtype}")
    tell(f"Limits {' or '.join(limits)}; {hp.max_total_bytes:,} bytes for code and weights")
    tell(f"Files  {hp.run_folder}")


def report(run: Run, results: dict[str, Any], parts: ArtifactParts) -> dict[str, Any]:
    """Log memory, seconds and bytes. -> the results with these"""
    hp = run.hp
    log0 = run.log0
    memory, reserved = peak_memory_mib(run.world.device)
    bytes_code = len(own_code())
    bytes_total = bytes_code + parts.n_bytes
    seconds = {f"seconds_{phase}": round(spent, 2) for phase, spent in run.ledger.spent.items()}
    results = {
        **results,
        "bytes_code": bytes_code,
        "bytes_artifact": parts.n_bytes,
        "bytes_total": bytes_total,
        "artifact_sha256": parts.sha256,
        **seconds,
        "peak_memory_mib": memory,
    }

    codec = hp.codec.replace("_", "+")
    log0(f"peak memory allocated: {memory} MiB reserved: {reserved} MiB")
    log0(f"ledger {key_values(seconds)} counted:seconds_train,seconds_calibrate")
    shown = ("tokens_per_second", "untrained_val_bpb", "pre_quant_val_bpb", "val_bpb", "partial")
    log0(key_values({key: round(results[key], 4) for key in shown if key in results}))
    log0(f"Serialized model {codec}: {parts.n_bytes} bytes (artifact_sha256:{parts.sha256})")
    log0(f"Code size: {bytes_code} bytes")
    log0(f"Total submission size {codec}: {bytes_total} bytes")
    if bytes_total > hp.max_total_bytes:
        log0(f"OVER THE LIMIT: bytes_total:{bytes_total} exceeds MAX_TOTAL_BYTES={hp.max_total_bytes}")
    return results


def conclude(run: Run, results: Mapping[str, Any]) -> None:
    """Tell a person how the run ended, where its files are and what to do next."""
    hp = run.hp
    tell = run.screen.tell
    scores = {
        "untrained": results.get("untrained_val_bpb"),
        "trained": results.get("pre_quant_val_bpb"),
        "as stored": results["val_bpb"],
    }
    tell("")
    tell("Bits per byte of the validation text" + (", a part of it" if results["partial"] else ""))
    for name, val_bpb in scores.items():
        if val_bpb is not None:
            tell(f"  {name:<10} {val_bpb:8.4f}")

    total = results["bytes_total"]
    tell(f"Bytes of code and weights: {results['bytes_code']:,} + {results['bytes_artifact']:,} = {total:,}")
    if total > hp.max_total_bytes:
        tell(f"  OVER THE LIMIT of {hp.max_total_bytes:,}")
    phases = sorted(run.ledger.spent.items(), key=lambda item: -item[1])
    tell("Seconds: " + ", ".join(f"{spent:.0f} {phase}" for phase, spent in phases if spent >= 0.5))

    artifact = results.get("artifact_path", hp.eval_artifact)
    tell("")
    tell(f"Model  {artifact}")
    tell(f"Log    {hp.run_folder / 'log.txt'}")
    tell(f"JSON   {hp.run_folder / 'run.json'}")
    if not hp.eval_artifact:
        tell("Next")
        tell(f'  python tools/sample.py {artifact} "The"   hear what it says')
        tell(f"  python train_gpt.py --eval_artifact={artifact}   score it again, or otherwise")
        tell(f"  python tools/plot.py {hp.run_folder}   draw its loss")
        tell("  python tools/submission.py new --help   make a record of it")


# Of these one line says what is wrong and what to do. Anything else ends with a traceback.
EXPECTED_ERRORS = (ValueError, OSError, FloatingPointError)


def main() -> int:
    """One run, from settings to score. -> exit status: 0, or 3 if code and artifact do not fit MAX_TOTAL_BYTES"""
    if {"-h", "--help"} & set(sys.argv[1:]):
        show(help_text(), sys.stdout)
        return 0
    own_code()
    os.environ.update(read_arguments(sys.argv[1:]))
    world = start_world(os.environ)
    last_folder = world.folder_of_last_attempt()
    checkpoint = agree_on_checkpoint(os.environ, last_folder, world)
    if checkpoint:
        os.environ.update(settings_to_go_on(checkpoint, os.environ))
    elif last_folder:
        os.environ.update(RUN_ID=Path(last_folder).name, OUT_DIR=str(Path(last_folder).parent))
    os.environ.update(settings_from_files(os.environ))
    ledger = Ledger(world.device)
    config, hp = resolve_settings(os.environ, world.device)
    hp = dataclasses.replace(hp, run_id=world.agree_on_text(hp.run_id))
    data = open_data(config, hp, world)
    if checkpoint:
        require_room_for_model(checkpoint, config)
        if checkpoint.header["data"] != data.identity(config):
            raise ValueError(f"DATA_PATH={hp.data_path} is not the data of RESUME={checkpoint.path}: name that data")
    # Before the run has files, so that the same command can be given again once a missing package is installed.
    tracker = Tracker(hp.track if world.rank == 0 else "")
    screen = Screen(world.rank == 0 and sys.stdout is not None and sys.stdout.isatty())
    log0 = RunLog(hp.run_folder, world, screen, goes_on=bool(checkpoint or last_folder))
    world.note_folder(hp.run_folder)
    run = Run(config, hp, world, ledger, log0, screen, tracker=tracker)
    run.signals.catch()

    try:
        results = train_and_score(run, data, checkpoint)
        status = 0 if results["bytes_total"] <= hp.max_total_bytes else 3
        if world.rank == 0:
            write_results(results, hp)
        tracker.finish(status)
        log0.close()
        conclude(run, results)
    except KeyboardInterrupt:
        run.signals.deferred = True  # a further one must not break into what is left to do
        line = what_is_left(run)
        log0.to_file(line)
        if world.rank == 0:
            show(line, sys.stderr)
        status = 128 + (run.signals.stop or signal.SIGINT)
        tracker.finish(status)
        return status
    except BaseException as error:
        run.signals.deferred = True
        blamed = blame_dead_ranks(error, run)
        is_expected = isinstance(blamed, EXPECTED_ERRORS)
        log0.to_file(f"error: {blamed}" if is_expected else traceback.format_exc())
        if blamed is error:
            raise
        raise blamed from None
    if world.size > 1:
        dist.destroy_process_group()
    return status


def what_is_left(run: Run) -> str:
    """What a run that a signal has ended leaves, and how to go on with it, in a line."""
    hp = run.hp
    artifact = hp.run_folder / ARTIFACT_NAMES[hp.codec]
    as_trained = hp.run_folder / ARTIFACT_NAMES["float32"]
    checkpoints = checkpoints_in(hp.run_folder)
    command = (
        f"python {sys.argv[0]}" if run.world.size == 1 else f"torchrun --nproc_per_node={run.world.size} {sys.argv[0]}"
    )
    if artifact.exists():
        return f"interrupted: the trained model is {artifact}, --eval_artifact={artifact} scores it"
    if checkpoints:
        return f"interrupted: the state is kept in {checkpoints[-1]}, {command} --resume={hp.run_folder} goes on"
    if as_trained.exists():
        return f"interrupted: the trained model is {as_trained}, --eval_artifact={as_trained} scores it"
    return f"interrupted: the log is {hp.run_folder / 'log.txt'}, no model was stored"


def blame_dead_ranks(error: BaseException, run: Run) -> BaseException:
    """The error itself, or if it came from the death of another rank, one that says so."""
    if run.world.size == 1 or not isinstance(error, RuntimeError):
        return error
    dead = run.world.dead_ranks()
    if not dead:
        return error
    ranks = ", ".join(map(str, dead))
    left = what_is_left(run).partition(": ")[2]
    return ConnectionError(f"rank {ranks} has died, the last step was {run.progress.position(run.hp)}: {left}")


def write_results(results: dict[str, Any], hp: Hyperparameters) -> None:
    """Write the JSON of a run. Raises OSError if a full disk made a file of the run lie elsewhere, and says where."""
    path = hp.run_folder / "run.json"
    written = write_somewhere(path, hp, json.dumps(results, indent=1, allow_nan=False).encode())

    misplaced = []
    if written != path:
        misplaced.append(f"the JSON is {written}")
    if not hp.eval_artifact and Path(results["artifact_path"]).parent != hp.run_folder:
        misplaced.append(f"the artifact is {results['artifact_path']}")
    if misplaced:
        raise OSError(
            f"{hp.run_folder} is full or read-only: {' and '.join(misplaced)}. The run is complete, move them"
        )
    remove_checkpoints(hp.run_folder)
    if not hp.eval_artifact and not point_to_latest(hp.run_folder):
        show(f"note: {hp.run_folder.with_name(LATEST)} does not lead to this run, links do not work there", sys.stderr)


def train_and_score(run: Run, data: Data, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Train, or take EVAL_ARTIFACT, and score. Logs it all. -> results by log key"""
    config = run.config
    hp = run.hp
    world = run.world
    ledger = run.ledger
    log0 = run.log0

    changed = changed_settings(config, hp, os.environ)
    of_what = f"eval_artifact:{hp.eval_artifact}" if hp.eval_artifact else f"preset:{hp.preset} seed:{hp.seed}"
    log0(f"{of_what} settings:{','.join(f'{name}={v}' for name, v in changed.items())}")
    if unread := unread_variables(os.environ):
        run.warn(f"these variables are not read, this script has no such settings: {', '.join(unread)}")
    machine = {
        **describe_machine(world.device),
        "world_size": world.size,
        "compute_dtype": config.compute_dtype,
    }
    log0(key_values(machine))

    method = {
        "eval_method": config.eval_method,
        "eval_seq_len": config.eval_seq_len,
        "eval_stride": config.eval_stride or config.eval_seq_len,
    }
    identity = {
        "code_sha256": hashlib.sha256(own_code()).hexdigest(),
        "judge_version": JUDGE_VERSION,
        **data.val.identity,
    }
    log0(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={hp.tokenizer_path}")
    counted = key_values({"val_accounting": identity["val_accounting"], "lossless": identity["tokenizer_lossless"]})
    loaded = f"val_loader:shards pattern={hp.data_path}/fineweb_val_*.bin tokens:{len(data.val.ids)}"
    log0(f"{loaded} {key_values(method)} {counted}")
    log0(key_values(identity))

    known_before = {**vars(config), **vars(hp), "settings_changed": changed, **machine, **identity}
    results = dict(known_before)
    first_step = checkpoint.header["progress"]["step"] + 1 if checkpoint else 0
    run.tracker.start(hp, known_before, first_step, run.warn)
    ledger.switch("compile")
    run = dataclasses.replace(run, compiled=wants_compile(run))
    ledger.switch("startup")
    if hp.eval_artifact:
        path = Path(hp.eval_artifact)
    else:
        results |= train_and_store(run, data, checkpoint)
        path = Path(results["artifact_path"])

    ledger.switch("load")
    parts = read_artifact(path)
    if results.get("artifact_sha256", parts.sha256) != parts.sha256:
        raise ValueError(f"{path} is not what this run wrote, something else replaced it: score it with EVAL_ARTIFACT")
    if hp.eval_artifact and (differences := scored_otherwise(run, identity, parts)):
        run.warn(f"this is not how the model's own run scored it: {', '.join(differences)}")
    score = score_artifact(run, data.val, parts)
    results |= {
        "val_loss": score.val_loss,
        "val_bpb": score.val_bpb,
        "val_nats": score.nats,
        "scored_tokens": score.tokens,
        "scored_bytes": score.bytes,
    }
    results = report(run, results, parts)
    tracked = {}
    for name, value in results.items():
        if name not in known_before and isinstance(value, int | float):
            tracked[f"final/{name}"] = value
    run.tracker.log(tracked, run.progress.step)
    milliseconds = 1000 * ledger.spent["evaluate"]
    log0(f"final_{hp.codec}_roundtrip {score.line(4)} eval_time:{milliseconds:.0f}ms {counted}")
    log0(f"final_{hp.codec}_roundtrip_exact {score.line(8)} {key_values(method)} {counted}")
    return results


if __name__ == "__main__":
    try:
        status = main()
    except EXPECTED_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if "RANK" in os.environ:
        os._exit(status)  # skips the interpreter's shutdown, in which a thread of gloo now and then aborts
    sys.exit(status)
