"""Settings: a wrong one never trains silently, and its message names the variable and the value."""

from __future__ import annotations

import dataclasses
import math
import re
import string

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import train_gpt as tg

ALPHABET = string.ascii_uppercase + string.digits + "_"
PUBLISHED_SETTINGS = (
    "VOCAB_SIZE=1024 NUM_LAYERS=9 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=2 "
    "ROPE_BASE=10000 LOGIT_SOFTCAP=30 BOS_ID=1 EVAL_METHOD=flat EVAL_SEQ_LEN=0 EVAL_STRIDE=0 SEED=1337 "
    "TRAIN_BATCH_TOKENS=524288 TRAIN_SEQ_LEN=1024 ITERATIONS=20000 WARMDOWN_ITERS=1200 WARMUP_STEPS=20 "
    "MAX_WALLCLOCK_SECONDS=600 VAL_BATCH_SIZE=524288 VAL_LOSS_EVERY=1000 TRAIN_LOG_EVERY=200 GRAD_CLIP_NORM=0 "
    "TIED_EMBED_INIT_STD=0.005 QK_GAIN_INIT=1.5 TIED_EMBED_LR=0.05 MATRIX_LR=0.04 "
    "SCALAR_LR=0.04 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=500 "
    "MUON_BACKEND_STEPS=5 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8 MAX_TOTAL_BYTES=16000000 CODEC=int8_zlib"
)
PUBLISHED = dict(item.split("=") for item in PUBLISHED_SETTINGS.split())
NOT_OF_THE_RECIPE = (  # fields that change neither what is learned nor what is scored, or do not beside the others
    "preset run_id data_path tokenizer_path out_dir artifact_dir eval_artifact compile compute_dtype "
    "micro_batch_tokens val_max_tokens tokenizer_sha256 loop_start loop_end enable_looping_at "
    "trellis_states max_weight_bits gptq_calibration_batches gptq_reserve_seconds"
)
SETTINGS = {field.name.upper() for cls in (tg.GPTConfig, tg.Hyperparameters) for field in dataclasses.fields(cls)}


FIELDS = [field for cls in (tg.GPTConfig, tg.Hyperparameters) for field in dataclasses.fields(cls)]
NUMBERS = [field for field in FIELDS if type(field.default) in (int, float) and "low" in field.metadata]


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


def n_parameters(config: tg.GPTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in tg.GPT(config).parameters())


def test_baseline_has_the_published_number_of_parameters():
    """Results are comparable with those published only if the model is theirs."""
    assert n_parameters(read(PRESET="baseline")[0]) == 17_059_912


def test_baseline_has_the_published_settings():
    """Whatever this project makes the defaults, this preset stays the reference that others know."""
    assert read(PRESET="baseline", **PUBLISHED) == read(PRESET="baseline")


def test_baseline_has_none_of_the_techniques_that_came_later():
    """Nor of those that are still to come: a new switch must be off here, a new number 0."""
    config, hp = read(PRESET="baseline")
    others = {**vars(config), **vars(hp)}.keys() - {name.lower() for name in PUBLISHED} - set(NOT_OF_THE_RECIPE.split())
    assert {name: value for name, value in {**vars(config), **vars(hp)}.items() if name in others and value} == {}


def test_record_has_the_published_shape_and_almost_its_number_of_parameters():
    """The published recipe of this shape counts 35,945,673: it has 66 scalars for two residual lanes, and 2 that
    nothing trains."""
    config, _ = read()
    shape = config.vocab_size, config.num_layers, config.model_dim, config.num_heads, config.num_kv_heads
    assert shape == (8192, 11, 512, 8, 4)
    assert (config.rope_dims, config.xsa_last_n, config.num_loops) == (16, 11, 2)
    vectors = {"gain": 8, "scales": 2 * 512, "mix": 2 * 512, "gate": 8 * 12}  # of a layer
    matrices = 2 * 512 * 512 + 2 * 256 * 512 + 2 * 4 * 512 * 512
    rest = {"embedding": 8192 * 512, "smear": 13, "skips": 8 * 2 * 512}
    assert n_parameters(config) == 11 * (matrices + sum(vectors.values())) + sum(rest.values()) == 35_945_605
    assert n_parameters(config) == 35_945_673 - 66 - 2


def another_value(field: dataclasses.Field) -> str:
    """A valid setting that is not the default."""
    named = {"preset": "smoke", "eval_method": "flat", "compute_dtype": "float32", "compile": "1"}
    named |= {"model_dim": "256", "num_heads": "4", "num_kv_heads": "2", "rope_dims": "4", "train_batch_tokens": "2048"}
    named |= {"train_seq_len": "1024", "codec": "int8_zlib", "trellis_states": "4"}
    if field.name in named or isinstance(field.default, str):
        return named.get(field.name, "other")
    if isinstance(field.default, bool):
        return str(int(not field.default))
    return str(field.default + 1 if isinstance(field.default, int) else field.default / 2 or 0.5)


def test_every_setting_is_read_back_as_written():
    """One concept, one name: the field num_layers is NUM_LAYERS, and no two classes share a name."""
    for cls in (tg.GPTConfig, tg.Hyperparameters):
        for field in dataclasses.fields(cls):
            text = another_value(field)
            value = getattr(tg.from_env(cls, {field.name.upper(): text}), field.name)
            assert str(int(value) if isinstance(value, bool) else value) == text
            assert value != field.default
    names = [{f.name for f in dataclasses.fields(cls)} for cls in (tg.GPTConfig, tg.Hyperparameters)]
    assert not names[0] & names[1]


@pytest.mark.parametrize(("text", "value"), [("0", False), ("1", True)])
def test_bool_is_0_or_1(text, value):
    assert read(LN_SCALE=text)[0].ln_scale is value


@given(st.sampled_from(NUMBERS), st.floats(1e-6, 1e6))
def test_a_number_beyond_the_limits_of_its_field_is_refused(field, distance):
    """Below, above, and what is not a number at all."""
    low, high = field.metadata["low"], field.metadata["high"]
    kind = type(field.default)
    for value in (low - distance, high + max(1.0, distance), math.nan, math.inf):
        if kind is int and not math.isfinite(value):
            continue
        beyond = kind(math.floor(value) if value < low else math.ceil(value)) if kind is int else value
        if low <= beyond <= high or field.metadata["choices"]:
            continue
        with pytest.raises(ValueError, match=rf"^{field.name.upper()}="):
            read(**{field.name.upper(): str(beyond)})


def test_most_numbers_have_limits_of_their_own_and_all_have_some():
    """Nothing means minus one layer, and nothing means infinity."""
    assert len(NUMBERS) > 20
    for field in FIELDS:
        if type(field.default) in (int, float):
            for text in ("-1", "10" * 10 + "0"):
                with pytest.raises(ValueError, match=rf"^{field.name.upper()}="):
                    read(**{field.name.upper(): text})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PRESET", "smok"),
        ("NUM_LAYERS", "12.0"),
        ("NUM_LAYERS", "twelve"),
        ("NUM_LAYERS", ""),
        ("ITERATIONS", "1e3"),
        ("VOCAB_SIZE", "65537"),  # ids are stored as uint16
        ("MODEL_DIM", "520"),  # an odd number of channels per head
        ("NUM_KV_HEADS", "3"),
        ("ROPE_DIMS", "15"),
        ("ROPE_DIMS", "66"),  # more channels than a head has
        ("LOOP_START", "6"),  # after LOOP_END
        ("LOOP_END", "11"),
        ("BOS_ID", "8192"),
        ("LN_SCALE", "yes"),
        ("LN_SCALE", ""),
        ("TIE_EMBEDDINGS", "0"),  # of the published script, which this one cannot do
        ("EVAL_METHOD", "sliding"),
        ("TRELLIS_STATES", "2"),
        ("COMPUTE_DTYPE", "float16"),
        ("TRAIN_BATCH_TOKENS", "1000"),  # not a whole number of sequences
        ("MAX_WALLCLOCK_SECONDS", "ten"),
        ("RUN_ID", "../x"),
    ],
)
def test_wrong_value_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(value)}"):
        read(**{name: value})


def test_loop_that_is_off_may_name_layers_that_are_not_there():
    """A small model needs one setting for it, not three; the message says which."""
    with pytest.raises(ValueError, match=r"LOOP_START=3 LOOP_END=5 .*NUM_LAYERS=4.*NUM_LOOPS=0"):
        read(NUM_LAYERS="4")
    assert read(NUM_LAYERS="4", NUM_LOOPS="0")[0].layer_order(looping=True) == [0, 1, 2, 3]


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


def test_settings_of_the_published_script_that_mean_nothing_here_pass():
    """Its embeddings are tied by default, and these are the rates of others."""
    assert read(TIE_EMBEDDINGS="1", EMBED_LR="0.6", HEAD_LR="0.008") == read()


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
