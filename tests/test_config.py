"""Settings: a wrong one never trains silently, and its message names the variable and the value."""

from __future__ import annotations

import dataclasses
import math
import re
import string
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import train_gpt as tg

CLASSES = (tg.GPTConfig, tg.Hyperparameters)
FIELDS = [field for cls in CLASSES for field in dataclasses.fields(cls)]
SETTINGS = {field.name.upper() for field in FIELDS}
NUMBERS = [field for field in FIELDS if type(field.default) in (int, float)]

# The command line of the published baseline, as others run it.
PUBLISHED_SETTINGS = (
    "VOCAB_SIZE=1024 NUM_LAYERS=9 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=2 TIE_EMBEDDINGS=1 "
    "ROPE_BASE=10000 LOGIT_SOFTCAP=30 BOS_ID=1 EVAL_METHOD=flat EVAL_SEQ_LEN=0 EVAL_STRIDE=0 SEED=1337 "
    "TRAIN_BATCH_TOKENS=524288 TRAIN_SEQ_LEN=1024 ITERATIONS=20000 WARMDOWN_ITERS=1200 "
    "MAX_WALLCLOCK_SECONDS=600 VAL_BATCH_SIZE=524288 VAL_LOSS_EVERY=1000 TRAIN_LOG_EVERY=200 GRAD_CLIP_NORM=0 "
    "TIED_EMBED_INIT_STD=0.005 QK_GAIN_INIT=1.5 TIED_EMBED_LR=0.05 MATRIX_LR=0.04 "
    "SCALAR_LR=0.04 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=500 "
    "MUON_BACKEND_STEPS=5 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8 MAX_TOTAL_BYTES=16000000 CODEC=int8_zlib"
)
PUBLISHED = dict(item.split("=") for item in PUBLISHED_SETTINGS.split())

# Fields that change neither what is learned nor what is scored, or do so only together with others.
NOT_OF_THE_RECIPE = (
    "preset run_id data_path tokenizer_path out_dir eval_artifact compile compute_dtype "
    "micro_batch_tokens warmup_steps val_max_tokens tokenizer_sha256 loop_start loop_end enable_looping_at "
    "trellis_states max_weight_bits gptq_calibration_batches gptq_reserve_seconds"
)


def read(**env: str) -> tuple[tg.GPTConfig, tg.Hyperparameters]:
    return tg.from_env(tg.GPTConfig, env), tg.from_env(tg.Hyperparameters, env)


def n_parameters(config: tg.GPTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in tg.GPT(config).parameters())


# -- presets ---------------------------------------------------------------------------------------------------------


def test_no_settings_give_the_defaults():
    assert read() == (tg.GPTConfig(), tg.Hyperparameters())


def test_settings_override_the_preset_and_the_preset_the_defaults():
    config, hp = read(PRESET="smoke", NUM_LAYERS="7", SEED="5")
    assert (config.num_layers, hp.seed, hp.preset) == (7, 5, "smoke")
    assert config.model_dim == read(PRESET="smoke")[0].model_dim != tg.GPTConfig().model_dim


@pytest.mark.parametrize("preset", sorted(tg.PRESETS))
def test_every_preset_is_valid_and_names_only_settings(preset):
    read(PRESET=preset)
    names = {item.split("=")[0] for item in tg.PRESETS[preset].split()}
    assert names <= SETTINGS


def test_baseline_has_the_published_number_of_parameters():
    """Results are comparable with those published only if the model is theirs."""
    assert n_parameters(read(PRESET="baseline")[0]) == 17_059_912


def test_baseline_has_the_published_settings():
    """Whatever this project makes the defaults, this preset stays the reference that others know."""
    assert read(PRESET="baseline", **PUBLISHED) == read(PRESET="baseline")


def test_baseline_has_none_of_the_techniques_that_came_later():
    """Nor of those that are still to come: a new switch must be off here, and a new number 0."""
    config, hp = read(PRESET="baseline")
    expected = {name.lower() for name in PUBLISHED} | set(NOT_OF_THE_RECIPE.split())
    later = {}
    for name, value in {**vars(config), **vars(hp)}.items():
        if name not in expected and value:
            later[name] = value
    assert later == {}


def test_record_has_the_published_shape_and_almost_its_number_of_parameters():
    """The published recipe of this shape counts 35,945,673: it has 66 scalars for two residual lanes, and 2 that
    nothing trains."""
    config, _ = read()
    shape = config.vocab_size, config.num_layers, config.model_dim, config.num_heads, config.num_kv_heads
    assert shape == (8192, 11, 512, 8, 4)
    assert (config.rope_dims, config.xsa_last_n, config.num_loops) == (16, 11, 2)

    matrices = 2 * 512 * 512 + 2 * 256 * 512 + 2 * 4 * 512 * 512
    vectors = {"gain": 8, "scales": 2 * 512, "mix": 2 * 512, "gate": 8 * 12}
    outside_layers = {"embedding": 8192 * 512, "smear": 13, "skips": 8 * 2 * 512}
    expected = 11 * (matrices + sum(vectors.values())) + sum(outside_layers.values())
    assert n_parameters(config) == expected == 35_945_673 - 66 - 2


# -- values ----------------------------------------------------------------------------------------------------------


def another_value(field: dataclasses.Field) -> str:
    """A valid setting that is not the default."""
    valid_with_the_other_defaults = {
        "preset": "smoke",
        "model_dim": "256",
        "num_heads": "4",
        "num_kv_heads": "2",
        "rope_dims": "4",
        "eval_method": "flat",
        "compute_dtype": "float32",
        "compile": "1",
        "track": "wandb",
        "train_batch_tokens": "2048",
        "train_seq_len": "1024",
        "codec": "int8_zlib",
        "trellis_states": "4",
    }
    if field.name in valid_with_the_other_defaults:
        return valid_with_the_other_defaults[field.name]
    if isinstance(field.default, str):
        return "other"
    if isinstance(field.default, bool):
        return str(int(not field.default))
    if isinstance(field.default, int):
        return str(field.default + 1)
    return str(field.default / 2 or 0.5)


def test_every_setting_is_read_back_as_written():
    for cls in CLASSES:
        for field in dataclasses.fields(cls):
            text = another_value(field)
            value = getattr(tg.from_env(cls, {field.name.upper(): text}), field.name)
            assert type(value) is type(field.default)
            assert str(int(value) if isinstance(value, bool) else value) == text
            assert value != field.default


def test_no_two_fields_share_a_variable():
    assert len(SETTINGS) == len(FIELDS)


def limits(field: dataclasses.Field) -> tuple[float, float]:
    """The lowest and the highest value allowed."""
    return field.metadata.get("low", 0), field.metadata.get("high", 1e15)


def refusal(name: str, value: float) -> str:
    """The message with which a value of a variable is refused, or nothing."""
    try:
        read(**{name: repr(value)})
    except ValueError as error:
        return str(error)
    return ""


@given(st.sampled_from(NUMBERS), st.floats(min_value=0, allow_nan=False))
def test_value_outside_of_the_limits_of_its_field_is_refused(field, excess):
    """However little it is outside, on either side, and if it is no number. The limits themselves are allowed."""
    name = field.name.upper()
    low, high = limits(field)
    if isinstance(field.default, int):
        distance = int(min(excess, 1e18)) + 1
        outside = [int(low) - distance, int(high) + distance]
        inside = [int(low), int(high)]
    else:
        outside = [math.nextafter(low, -math.inf) - excess, math.nextafter(high, math.inf) + excess, math.nan]
        inside = [float(low), float(high)]

    for value in outside:
        assert refusal(name, value).startswith(f"{name}={value} must be from ")
    for value in inside:
        assert not refusal(name, value).startswith(f"{name}={value} must be from ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PRESET", "smok"),
        ("NUM_LAYERS", "12.0"),
        ("NUM_LAYERS", ""),
        ("NUM_LAYERS", "0"),
        ("VOCAB_SIZE", "65537"),  # ids are stored as uint16
        ("MODEL_DIM", "520"),  # an odd number of channels per head
        ("NUM_KV_HEADS", "3"),
        ("ROPE_DIMS", "15"),
        ("ROPE_DIMS", "66"),  # more channels than a head has
        ("LOGIT_SOFTCAP", "0"),
        ("LN_SCALE", "yes"),
        ("LOOP_START", "6"),  # after LOOP_END
        ("LOOP_END", "11"),
        ("NUM_LOOPS", "256"),  # makes 779 passes through layers
        ("BOS_ID", "8192"),
        ("EVAL_METHOD", "sliding"),
        ("TRAIN_BATCH_TOKENS", "1000"),
        ("MAX_WALLCLOCK_SECONDS", "nan"),
        ("EMA_DECAY", "1.0"),  # would divide by zero
        ("TRELLIS_STATES", "2"),
        ("RUN_ID", "../x"),
    ],
)
def test_wrong_value_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(value)}"):
        read(**{name: value})


def test_untied_embedding_is_refused():
    """Command lines of the published challenge may say TIE_EMBEDDINGS=1, which is what this script does."""
    assert read(TIE_EMBEDDINGS="1") == read()
    with pytest.raises(ValueError, match=r"TIE_EMBEDDINGS=0 is not supported.*unset it"):
        read(TIE_EMBEDDINGS="0")


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


def test_changed_settings_are_those_that_differ_from_the_preset():
    """A variable that repeats the preset's value changes nothing."""
    smoke = read(PRESET="smoke")[0]
    env = {"PRESET": "smoke", "MODEL_DIM": "128", "NUM_LAYERS": str(smoke.num_layers), "LN_SCALE": "0", "PATH": "/bin"}
    changed: dict[str, Any] = {"MODEL_DIM": 128, "LN_SCALE": False}
    assert tg.changed_settings(*read(**env), env) == changed


# -- names -----------------------------------------------------------------------------------------------------------


@st.composite
def one_edit(draw) -> tuple[str, str]:
    """A setting, and a name that one insertion, deletion, substitution or swap makes of it."""
    right = draw(st.sampled_from(sorted(SETTINGS)))
    at = draw(st.integers(0, len(right) - 1))
    letter = draw(st.sampled_from(string.ascii_uppercase + string.digits + "_"))
    before = right[:at]
    behind = right[at + 1 :]
    inserted = before + letter + right[at:]
    appended = right + letter
    deleted = before + behind
    substituted = before + letter + behind
    swapped = before + right[at : at + 2][::-1] + right[at + 2 :]
    return right, draw(st.sampled_from([inserted, appended, deleted, substituted, swapped]))


@given(one_edit())
def test_misspelt_setting_is_refused_and_the_right_one_named(edit):
    """NUM_LAYER=12 would otherwise train the default model for ten minutes."""
    right, wrong = edit
    assume(wrong not in SETTINGS)
    with pytest.raises(ValueError, match=rf"^{wrong}='12' .*\b{right}\b"):
        read(**{wrong: "12"})


@pytest.mark.parametrize("cls", CLASSES)
def test_both_classes_refuse_a_misspelt_setting(cls):
    """Whichever is read first must see it, since both are read from one environment."""
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


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("SEQ_LEN", "TRAIN_SEQ_LEN"),
        ("BATCH_SIZE", "TRAIN_BATCH_TOKENS"),
        ("LEARNING_RATE", "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR"),
        ("LR", "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR"),
        ("MAX_STEPS", "ITERATIONS"),
        ("N_LAYER", "NUM_LAYERS"),
        ("N_EMBD", "MODEL_DIM"),
        ("EMBED_LR", "TIED_EMBED_LR"),
        ("HEAD_LR", "TIED_EMBED_LR"),
        ("TORCH_COMPILE", "COMPILE"),
    ],
)
def test_setting_of_another_script_is_refused_and_ours_named(name, ours):
    """It would be ignored, and the defaults trained instead."""
    for spelling in (name, name.lower(), name.title()):
        with pytest.raises(ValueError, match=rf"^{spelling}='1e-9' .*say {ours}, or unset it$"):
            read(**{spelling: "1e-9"})


@pytest.mark.parametrize("name", ["TTT_ENABLED", "ttt_lr", "SWA_EVERY", "BIGRAM_VOCAB_SIZE", "DROPOUT", "init_from"])
def test_setting_for_what_this_script_cannot_do_is_refused(name):
    with pytest.raises(ValueError, match=rf"^{name}='1' .*does not have: unset it$"):
        read(**{name: "1"})


def test_names_of_other_scripts_lead_to_settings_and_are_none():
    names = [name for theirs in tg.NAMES_ELSEWHERE.values() for name in theirs.split()]
    assert len(names) == len(set(names))
    assert not SETTINGS & {*names, *tg.ABSENT.split()}
    assert not [name for name in SETTINGS if name.startswith(tg.ABSENT_PREFIXES)]
    ours = re.findall(r"[A-Z][A-Z\d_]+", " ".join(tg.NAMES_ELSEWHERE))
    assert set(ours) - SETTINGS == {"CUDA_VISIBLE_DEVICES"}


@given(st.sampled_from(sorted(SETTINGS | {"TIE_EMBEDDINGS"})), st.data())
def test_setting_in_another_case_or_without_underscores_is_refused(right, data):
    letters = [letter.lower() if data.draw(st.booleans()) else letter for letter in right]
    wrong = "".join(letters)
    if data.draw(st.booleans()):
        wrong = wrong.replace("_", data.draw(st.sampled_from(["", "-"])))
    assume(wrong != right)
    with pytest.raises(ValueError, match=rf"^{wrong}='1' is not a setting: say .*\b{right}\b"):
        read(**{wrong: "1"})


def test_variables_of_shells_and_ci_pass():
    names = (
        "PATH HOME SHELL USER LOGNAME PWD OLDPWD LANG LC_ALL LC_CTYPE TERM TERM_PROGRAM COLORTERM COLUMNS LINES EDITOR "
        "VISUAL PAGER MAIL HOSTNAME HISTSIZE DISPLAY TMPDIR TEMP TZ SHLVL PS1 DEBUG VERBOSE NO_COLOR CI CC CXX CFLAGS "
        "CXXFLAGS LDFLAGS MAKEFLAGS GITHUB_RUN_ID GITHUB_SHA RUNNER_OS GITLAB_CI CI_JOB_ID CI_COMMIT_SHA BUILD_ID "
        "BUILD_NUMBER JOB_NAME NODE_NAME WORKSPACE VIRTUAL_ENV CONDA_PREFIX PYTHONPATH PYTHONHASHSEED "
        "HF_HOME HF_TOKEN WANDB_API_KEY WANDB_PROJECT XDG_CACHE_HOME SSH_TTY http_proxy https_proxy no_proxy all_proxy "
        "npm_config_cache npm_config_loglevel SLURM_NTASKS SLURM_PROCID KUBERNETES_PORT TRITON_CACHE_DIR"
    )
    assert read(**dict.fromkeys(names.split(), "1")) == read()


# -- launcher ----------------------------------------------------------------------------------------------------------

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "5",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_launcher_places_this_process():
    assert tg.read_launcher(TORCHRUN) == (5, 16, 5)
    assert tg.read_launcher({}) == (0, 1, 0)
    assert tg.read_launcher({"MASTER_ADDR": "node0", "MASTER_PORT": "1234", "SLURM_PROCID": "3"}) == (0, 1, 0)


@given(st.sampled_from(sorted(TORCHRUN)))
def test_launcher_variable_that_is_missing_is_named(name):
    env = {key: value for key, value in TORCHRUN.items() if key != name}
    if name == "LOCAL_WORLD_SIZE":  # which other launchers do not set
        assert tg.read_launcher(env) == (5, 16, 5)
        return
    names = "RANK" if name == "WORLD_SIZE" else name
    with pytest.raises(ValueError, match=rf"\b{names}\b.*start with torchrun, or unset "):
        tg.read_launcher(env)


@pytest.mark.parametrize(
    "env",
    [
        "RANK=1",
        "RANK=",
        "RANK=abc",
        "RANK=-1",
        "RANK=1.0",
        "RANK=²",
        f"RANK={'9' * 5000}",
        "RANK=1 WORLD_SIZE=1",
        "RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=1",
        "WORLD_SIZE=0",
        "WORLD_SIZE=",
        "WORLD_SIZE=2",
        "WORLD_SIZE=two",
        "LOCAL_RANK=1",
        "LOCAL_WORLD_SIZE=0",
        "LOCAL_WORLD_SIZE=4",
        "MASTER_PORT=0",
        "MASTER_PORT=http",
        "MASTER_ADDR=",
    ],
)
def test_launcher_variables_left_in_the_shell_are_refused_by_name_and_value(env):
    """They would train to the end and then fail, or wait for ranks that never come."""
    variables = dict(item.split("=") for item in env.split())
    name, value = next(iter(variables.items()))
    with pytest.raises(ValueError, match=rf"^{name}='?{value[:90]}.*start with torchrun, or unset {name}"):
        tg.read_launcher(variables)
