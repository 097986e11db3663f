"""Settings: a wrong one never trains silently, and its message names the variable and the value."""

from __future__ import annotations

import dataclasses
import re
import string

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import train_gpt as tg

ALPHABET = string.ascii_uppercase + string.digits + "_"
SETTINGS = {field.name.upper() for cls in (tg.GPTConfig, tg.Hyperparameters) for field in dataclasses.fields(cls)}


def read(**env: str) -> tuple[tg.GPTConfig, tg.Hyperparameters]:
    return tg.from_env(tg.GPTConfig, env), tg.from_env(tg.Hyperparameters, env)


def test_no_settings_give_the_defaults():
    assert read() == (tg.GPTConfig(), tg.Hyperparameters())


def test_settings_override_the_preset_and_the_preset_the_defaults():
    config, hp = read(PRESET="smoke", NUM_LAYERS="7", SEED="5")
    assert (config.num_layers, hp.seed, hp.preset) == (7, 5, "smoke")
    assert config.model_dim == read(PRESET="smoke")[0].model_dim != tg.GPTConfig().model_dim


@pytest.mark.parametrize("preset", sorted(tg.PRESETS))
def test_every_preset_is_valid_and_names_only_settings(preset):
    read(PRESET=preset)
    assert set(re.findall(r"[A-Z][A-Z0-9_]{2,}", str(tg.PRESETS[preset]))) <= SETTINGS


def test_baseline_has_the_published_number_of_parameters():
    """Results are comparable with those published only if the default model is theirs."""
    config, _ = read(PRESET="baseline")
    with torch.device("meta"):
        assert sum(p.numel() for p in tg.GPT(config).parameters()) == 17_059_912


def test_every_setting_is_read_back_as_written():
    """One concept, one name: the field num_layers is NUM_LAYERS, and no two classes share a name."""
    changed = {"compute_dtype": "float32", "compile": "1", "preset": "smoke", "tie_embeddings": "0"}
    for cls in (tg.GPTConfig, tg.Hyperparameters):
        for field in dataclasses.fields(cls):
            text = changed.get(field.name, str(getattr(cls(), field.name)))
            text = {"True": "1", "False": "0"}.get(text, text)
            assert str(getattr(tg.from_env(cls, {field.name.upper(): text}), field.name)) in (text, "False")
    names = [{f.name for f in dataclasses.fields(cls)} for cls in (tg.GPTConfig, tg.Hyperparameters)]
    assert not names[0] & names[1]


@pytest.mark.parametrize(("text", "value"), [("0", False), ("1", True)])
def test_bool_is_0_or_1(text, value):
    assert read(TIE_EMBEDDINGS=text)[0].tie_embeddings is value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PRESET", "smok"),
        ("NUM_LAYERS", "12.0"),
        ("NUM_LAYERS", "twelve"),
        ("NUM_LAYERS", ""),
        ("NUM_LAYERS", "0"),
        ("NUM_LAYERS", "-1"),
        ("NUM_LAYERS", "1000000000"),
        ("VOCAB_SIZE", "0"),
        ("VOCAB_SIZE", "65537"),  # ids are stored as uint16
        ("MODEL_DIM", "500"),
        ("MODEL_DIM", "520"),  # an odd number of channels per head
        ("NUM_HEADS", "0"),
        ("NUM_KV_HEADS", "0"),
        ("NUM_KV_HEADS", "3"),
        ("NUM_KV_HEADS", "16"),
        ("MLP_MULT", "0"),
        ("TIE_EMBEDDINGS", "true"),
        ("TIE_EMBEDDINGS", ""),
        ("TIE_EMBEDDINGS", "2"),
        ("ROPE_BASE", "0.5"),
        ("ROPE_BASE", "nan"),
        ("LOGIT_SOFTCAP", "0"),
        ("LOGIT_SOFTCAP", "inf"),
        ("BOS_ID", "1024"),
        ("BOS_ID", "-1"),
        ("EVAL_SEQ_LEN", "-1"),
        ("EVAL_STRIDE", "-1"),
        ("SEED", "1.5"),
        ("SEED", "-1"),
        ("ITERATIONS", "1e3"),
        ("ITERATIONS", "-1"),
        ("TRAIN_SEQ_LEN", "0"),
        ("TRAIN_BATCH_TOKENS", "0"),
        ("TRAIN_BATCH_TOKENS", "1000"),
        ("VAL_BATCH_SIZE", "0"),
        ("TRAIN_LOG_EVERY", "0"),
        ("MAX_TOTAL_BYTES", "0"),
        ("MAX_WALLCLOCK_SECONDS", "-1"),
        ("MAX_WALLCLOCK_SECONDS", "nan"),
        ("MAX_WALLCLOCK_SECONDS", "ten"),
        ("MATRIX_LR", "inf"),
        ("MATRIX_LR", "-0.1"),
        ("COMPUTE_DTYPE", "float16"),
        ("COMPILE", "yes"),
        ("RUN_ID", "../x"),
        ("RUN_ID", "a/b"),
    ],
)
def test_wrong_value_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(value)}"):
        read(**{name: value})


def test_stride_beyond_the_context_is_refused():
    """Such an evaluation would skip targets."""
    with pytest.raises(ValueError, match=r"EVAL_STRIDE=129 .*EVAL_SEQ_LEN=128"):
        read(EVAL_SEQ_LEN="128", EVAL_STRIDE="129")


@pytest.mark.parametrize(("name", "value"), [("num_layers", 4.0), ("num_layers", True), ("rope_base", 10_000)])
def test_config_of_an_artifact_has_exact_types(name, value):
    """The config of a foreign file goes through the same checks as the environment."""
    with pytest.raises(ValueError, match=name.upper()):
        tg.GPTConfig(**{name: value})


@st.composite
def one_edit(draw) -> tuple[str, str]:
    """A setting and a name one insertion, deletion, substitution or swap away."""
    right = draw(st.sampled_from(sorted(SETTINGS)))
    at, letter = draw(st.integers(0, len(right) - 1)), draw(st.sampled_from(ALPHABET))
    swapped = right[:at] + right[at : at + 2][::-1] + right[at + 2 :]
    insertions = [right[:at] + letter + right[at:], right + letter]
    return right, draw(
        st.sampled_from([*insertions, right[:at] + right[at + 1 :], right[:at] + letter + right[at + 1 :], swapped])
    )


@given(one_edit())
def test_misspelt_setting_is_refused_and_the_right_one_named(edit):
    """NUM_LAYER=12 would otherwise train the default model for ten minutes."""
    right, wrong = edit
    assume(wrong not in SETTINGS)
    with pytest.raises(ValueError, match=rf"^{wrong}='12' .*\b{right}\b"):
        read(**{wrong: "12"})


def test_both_classes_refuse_a_misspelt_setting():
    """Whichever is read first must see it, since both are read from one environment."""
    for cls in (tg.GPTConfig, tg.Hyperparameters):
        with pytest.raises(ValueError, match=r"NUM_LAYER='12'.*NUM_LAYERS"):
            tg.from_env(cls, {"NUM_LAYER": "12"})


def test_variables_of_launcher_and_libraries_pass():
    names = (
        "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE "
        "MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_ERROR_FILE NCCL_DEBUG "
        "OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES GLOO_SOCKET_IFNAME PYTORCH_CUDA_ALLOC_CONF PATH HOME "
        "SHELL USER PWD LANG TERM _ CC CXX SLURM_JOB_ID"
    )
    assert read(**dict.fromkeys(names.split(), "1")) == read()
