"""The doctor: what it says of real runs and of broken machines, and its estimates against what real runs take."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import doctor
import pytest
import torch
from conftest import FinishedRun

import train_gpt as tg

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examine(run_script) -> Callable[..., FinishedRun]:
    """A function that starts the doctor with the tiny settings, as a person would."""

    def run(*arguments: str, **settings: str | None) -> FinishedRun:
        # With the tests' PYTHONPATH, a path that the doctor does not add itself would not be missed.
        return run_script(doctor.__file__, *arguments, **{"RUN_ID": None, "PYTHONPATH": None, **settings})

    return run


@pytest.fixture(scope="module")
def healthy(examine) -> FinishedRun:
    return examine("--num_layers=4", ITERATIONS="30", MLP_MULT="2", VE_ENABLED="1", CODEC="int8_zlib")


@pytest.fixture
def plan(tiny_settings) -> doctor.Plan:
    """Of the tiny settings, in this process."""
    return doctor.make_plan([], tiny_settings)


def lines_of(run: FinishedRun, word: str) -> list[str]:
    """The findings with this word, each in one line."""
    text = re.sub(r"\n {20}", " ", run.out)
    return [line[20:] for line in text.splitlines() if line[11:].startswith(f"{word} ")]


# -- whole screens ---------------------------------------------------------------------------------------------------


def test_screen_of_a_run_that_can_start(healthy, data):
    """Only the variable that is not read is a warning, so the status is 1."""
    assert (healthy.status, healthy.err) == (1, "")
    assert healthy.last_line == "The run can start, with 1 warning."
    assert lines_of(healthy, "FAIL") == []
    assert lines_of(healthy, "warning") == ["not read, the script has no such settings: VE_ENABLED"]
    titles = re.findall(r"^(\S+) +(?:ok|note|warning) ", healthy.out, re.MULTILINE)
    assert titles == ["Software", "Settings", "Machine", "Back-ends", "Data", "Model", "Files"]
    assert f"train: {len(data.train):,} tokens in 2 shards" in healthy.out
    assert f"val: {len(data.val):,} tokens, {int(data.val_bytes[1:].sum()):,} bytes from the sidecar" in healthy.out


def test_lines_are_not_too_long(healthy):
    assert max(map(len, healthy.out.splitlines())) <= doctor.COLUMNS


def test_settings_are_told_with_what_they_change(healthy):
    notes = lines_of(healthy, "note")
    assert "NUM_LAYERS=4 instead of 9: layers of the transformer" in notes
    [same] = [note for note in notes if note.startswith("set to what PRESET=baseline has anyway")]
    assert {"MLP_MULT", "CODEC"} <= set(re.findall(r"\w+", same))


def test_run_leaves_no_files(healthy):
    assert list(healthy.folder.iterdir()) == []


@pytest.fixture
def examine_here(monkeypatch, capsys, tmp_path) -> Callable[..., FinishedRun]:
    """A function that does the same in this process, which is seconds faster."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **settings: str) -> FinishedRun:
        monkeypatch.setattr(os, "environ", settings)
        status = doctor.main(arguments)
        out, err = capsys.readouterr()
        return FinishedRun(status, out, err, tmp_path)

    return run


def test_status_is_0_without_warnings(examine_here, tiny_settings):
    run = examine_here(**tiny_settings)
    assert (run.status, run.last_line) == (0, "The run can start."), run.out


def test_missing_data_names_the_command_that_gets_it(examine_here):
    """The checks behind it go on."""
    run = examine_here(PRESET="smoke", NUM_LAYERS="2", MODEL_DIM="128", PATH="")
    [failure] = lines_of(run, "FAIL")
    assert failure.endswith("does not exist: python data/build_shards.py")
    assert "a step takes" in run.out
    assert run.status == 2
    assert len(run.out.splitlines()) < 40


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_command_that_gets_the_data_is_one_that_the_script_knows(preset):
    script, *options = doctor.DATA_COMMANDS[preset].removeprefix("python ").split()
    assert script in tg.HOW_TO_GET_DATA
    assert " ".join(options) in tg.HOW_TO_GET_DATA
    assert Path(doctor.ROOT, script).exists()


@pytest.mark.parametrize(
    ("arguments", "settings", "expected"),
    [
        ([], {"NUM_LAYER": "12"}, "NUM_LAYER='12' is not a setting: say NUM_LAYERS, or unset it"),
        (["--num_layer=12"], {}, "NUM_LAYER='12' is not a setting: say NUM_LAYERS, or unset it"),
        ([], {"NUM_HEADS": "3"}, "NUM_HEADS=3 must be a multiple of NUM_KV_HEADS=2"),
    ],
)
def test_settings_that_the_script_refuses(examine_here, tiny_settings, arguments, settings, expected):
    run = examine_here(*arguments, **{**tiny_settings, **settings})
    assert run.status == 2
    assert lines_of(run, "FAIL") == [expected]
    assert "Model" not in run.out


def test_launcher_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert doctor.main([]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_missing_package_is_told_without_a_traceback(examine, tmp_path):
    (tmp_path / "sentencepiece.py").write_text("raise ImportError('no sentencepiece here')")
    run = examine(PYTHONPATH=str(tmp_path))
    assert (run.status, run.err) == (2, "")
    [failure] = lines_of(run, "FAIL")
    assert "no sentencepiece here" in failure
    assert failure.endswith("python -m pip install -r requirements.txt")


# -- checks ----------------------------------------------------------------------------------------------------------


def test_exception_in_a_check_is_a_failure_of_this_check(capsys):
    def check() -> Iterator[doctor.Finding]:
        yield doctor.Finding("ok", "first")
        raise RuntimeError("broken\nin two lines")

    report = doctor.Report()
    report.examine("One", check())
    report.examine("Other", [doctor.Finding("note", "second")])
    assert report.conclude() == 2
    out = capsys.readouterr().out
    assert out.startswith(
        "One        ok       first\n           FAIL     RuntimeError: broken\nOther      note     second\n"
    )


@pytest.mark.parametrize(("words", "status"), [(["ok", "note"], 0), (["ok", "warning"], 1), (["warning", "FAIL"], 2)])
def test_status_is_that_of_the_worst_line(words, status):
    report = doctor.Report()
    report.examine("All", [doctor.Finding(word, "text") for word in words])
    assert report.conclude() == status


def test_versions_that_are_too_old_or_missing(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# comment\nnumpy>=1.0  # another\ntorch>=99.1\nno-such-package-of-ours>=2\n")
    ok, failure = doctor.check_versions(requirements)
    assert (ok.word, failure.word) == ("ok", "FAIL")
    assert f"torch {torch.__version__} is older than torch>=99.1" in failure.text
    assert "no-such-package-of-ours>=2 is not installed" in failure.text
    assert "numpy" not in failure.text
    assert failure.text.endswith("\npython -m pip install -r requirements.txt")


def test_tracker_that_is_not_installed_would_stop_the_run(tiny_settings, monkeypatch, capsys):
    plan = doctor.make_plan([], {**tiny_settings, "TRACK": "trackio"})
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.endswith("-packages")])
    report = doctor.Report()
    report.examine("Settings", doctor.check_settings(plan))
    assert report.words[-1] == "FAIL"
    assert "TRACK=trackio needs its package: python -m pip install trackio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({"cpu.max": "150000 100000", "memory.max": "1000", "memory.current": "700"}, 1.5, 500),
        ({"cpu.max": "max 100000", "memory.max": "max", "memory.current": "700"}, math.inf, math.inf),
        ({"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, 0.5, math.inf),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, math.inf, math.inf),
        ({"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "400"}, math.inf, 800),
    ],
)
def test_limits_of_containers(tmp_path, files, cores, memory):
    """In the formats of Linux's documentation. 200 bytes are files that are cached."""
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert doctor.cgroup_cores([tmp_path]) == cores
    assert doctor.cgroup_memory([tmp_path]) == memory


def test_limits_of_all_groups_above_hold(tmp_path):
    root = tmp_path / "cgroup"
    own = tmp_path / "own"
    (root / "a" / "b").mkdir(parents=True)
    (root / "memory" / "c").mkdir(parents=True)
    own.write_text("0::/a/b\n4:memory:/c\n5:cpu,cpuacct:/d\n")
    folders = doctor.cgroup_folders("memory", root, own)
    assert set(folders) == {root / "a" / "b", root / "a", root, root / "memory" / "c", root / "memory"}


def test_too_many_threads_are_a_warning(plan, monkeypatch):
    """A container's share of the cores is nothing that torch looks at."""
    monkeypatch.setattr(doctor, "cgroup_cores", lambda folders: 2.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    warnings = [finding.text for finding in doctor.check_machine(plan) if finding.word == "warning"]
    assert len(warnings) == 1
    assert "OMP_NUM_THREADS=2" in warnings[0]


def test_variables_of_a_launcher_that_are_left_over():
    waits = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for env, word in (({}, None), ({"RANK": "0"}, "note"), (waits, "FAIL"), ({"WORLD_SIZE": "2"}, "FAIL")):
        words = [finding.word for finding in doctor.check_launcher(env)]
        assert words == ([word] if word else [])


# -- compiling -------------------------------------------------------------------------------------------------------


def test_compiler_that_is_not_there_is_a_note(plan, monkeypatch):
    plan.hp = dataclasses.replace(plan.hp, compile="auto")
    monkeypatch.setattr(tg, "has_compiler", lambda device: False)
    [finding] = doctor.check_compile(plan)
    assert (finding.word, plan.compiled) == ("note", False)


@pytest.mark.parametrize(
    ("wish", "result", "word", "compiled"),
    [
        ("auto", {"seconds": 3.0}, "ok", True),
        ("auto", {"reason": "omp.h", "starts": False}, "warning", False),
        ("1", {"reason": "omp.h", "starts": False}, "FAIL", False),
        # The script only tries something tiny, and would fail later.
        ("auto", {"reason": "omp.h", "starts": True}, "FAIL", False),
        ("auto", {"reason": "slow", "timed_out": True}, "warning", True),
    ],
)
def test_compiling_is_judged_as_the_script_would(plan, monkeypatch, wish, result, word, compiled):
    plan.hp = dataclasses.replace(plan.hp, compile=wish)
    monkeypatch.setattr(tg, "has_compiler", lambda device: True)
    monkeypatch.setattr(doctor, "compiled_step_in_time", lambda env: result)
    [finding] = doctor.check_compile(plan)
    assert (finding.word, plan.compiled) == (word, compiled)


def test_compiling_ends_with_its_time(tiny_settings):
    began = time.monotonic()
    result = doctor.compiled_step_in_time({**tiny_settings, "COMPILE": "1"}, limit=0.5)
    assert time.monotonic() - began < 10
    assert result["timed_out"]


BROKEN_COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "g++ (GCC) 12"; exit 0;; esac
echo "main.cpp:1:10: fatal error: omp.h: No such file or directory" >&2
exit 1
"""


@pytest.mark.slow
@pytest.mark.parametrize(("wish", "word", "status"), [("auto", "warning", 1), ("1", "FAIL", 2)])
def test_broken_compiler(examine, tmp_path, wish, word, status):
    compiler = tmp_path / "c++"
    compiler.write_text(BROKEN_COMPILER)
    compiler.chmod(0o755)
    run = examine(COMPILE=wish, CXX=str(compiler), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    [line] = lines_of(run, word)
    assert "fatal error: omp.h" in line
    assert run.status == status


@pytest.mark.slow
@pytest.mark.skipif(not tg.has_compiler(CPU), reason="there is no C++ compiler")
def test_compiled_step(tiny_settings, record_settings):
    """With all techniques."""
    changed = {name: value for name, value in record_settings.items() if value is not None}
    result = doctor.compiled_step_in_time({**tiny_settings, **changed, "COMPILE": "1"}, limit=600.0)
    assert result.keys() == {"seconds"}


# -- memory, time and room ---------------------------------------------------------------------------------------------


def optimizer_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Of all tensors in their states, but for AdamW's counts of steps."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return sum(t.nbytes for state in states for name, t in state.items() if name != "step")


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("name", ["config", "record_config"])
def test_checkpoint_holds_what_optimizers_hold_after_a_step(request, name, ema_decay, record_hp):
    config = request.getfixturevalue(name)
    hp = dataclasses.replace(record_hp, ema_decay=ema_decay)
    world = tg.World()
    model = tg.GPT(config)
    tg.init_weights(model, hp)
    optimizers = tg.build_optimizers(model, hp, world)
    ids = torch.randint(config.vocab_size, (2, 16))
    run = tg.Run(config, hp, world, tg.Ledger(CPU), log0=lambda line: None)
    tg.train_step(tg.Learner(model, model.loss, optimizers), [(ids, ids)], 1.0, 0.9, run)

    weights = sum(p.nbytes for p in model.parameters())
    sizes = doctor.sizes_of(config, hp)
    assert 4 * sizes.parameters == weights
    n_copies = 2 if ema_decay else 1
    assert doctor.checkpoint_bytes(sizes, hp) == n_copies * weights + optimizer_bytes(optimizers)


def test_artifact_is_not_larger_than_expected(trained, trained_record):
    for run in (trained, trained_record):
        config = tg.read_artifact(run.artifact).header.config
        hp = dataclasses.replace(tg.Hyperparameters(), codec=run.results["codec"])
        expected = doctor.sizes_of(config, hp).artifact_bytes
        assert run.artifact.stat().st_size <= expected
        assert run.results["model_params"] == doctor.sizes_of(config, hp).parameters


def test_activations_are_those_that_a_real_model_keeps(record_config, random_model):
    """Seen by torch's own hooks. The model without storage has a dense mask, and so at least as many."""
    ids = torch.randint(record_config.vocab_size, (4, 32))
    model = random_model(record_config)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(ids, ids)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
    assert real <= doctor.activation_bytes(record_config, ids.numel(), 32) < 1.5 * real


@pytest.mark.slow
def test_peak_memory_is_about_that_of_a_run(run_script, tmp_path):
    """Of a model whose activations and logits are not small beside Python and torch."""
    settings = {"VOCAB_SIZE": "320", "NUM_LAYERS": "6", "MODEL_DIM": "256", "TRAIN_SEQ_LEN": "256"}
    settings |= {"TRAIN_BATCH_TOKENS": "4096", "MICRO_BATCH_TOKENS": "4096", "ITERATIONS": "2"}
    settings |= {"VAL_BATCH_SIZE": "65536", "EMA_DECAY": "0.9"}
    run = run_script(tg.__file__, **settings)
    assert run.status == 0, run.err
    told = run_script(doctor.__file__, **{**settings, "RUN_ID": None}).out
    [estimate, unit] = re.findall(r"memory: about (\S+) (MiB|GiB) at the peak", told)[0]
    estimated_mib = float(estimate) * (1024 if unit == "GiB" else 1)
    assert 0.7 * run.results["peak_memory_mib"] < estimated_mib < 1.6 * run.results["peak_memory_mib"]


def test_model_that_does_not_fit_is_not_built(plan, monkeypatch):
    plan.config = dataclasses.replace(plan.config, num_layers=8, model_dim=16_384)

    def fail(*args: object) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(doctor, "set_up", fail)
    parameters, memory = doctor.check_model(plan)
    assert parameters.word == "ok"
    assert memory.word == "FAIL"
    assert "choose a smaller model" in memory.text


@pytest.mark.parametrize(("memory", "word"), [(2**34, "ok"), (2**20, "FAIL")])
def test_memory_that_others_have_taken(plan, monkeypatch, memory, word):
    plan.hp = dataclasses.replace(plan.hp, eval_artifact="model.ptz")
    monkeypatch.setattr(doctor, "available_memory", lambda device: memory)
    monkeypatch.setattr(doctor, "own_memory", lambda: 0)
    _, finding = doctor.check_model(plan)
    assert finding.word == word


@pytest.mark.parametrize(("steps_per_second", "words"), [(1e9, []), (0.5, ["warning"]), (0.01, ["FAIL"])])
def test_slow_device_is_judged_by_the_script(plan, monkeypatch, steps_per_second, words):
    """With 60 seconds: 30 steps are few, and less than one is useless."""
    plan.hp = dataclasses.replace(plan.hp, iterations=1000, max_wallclock_seconds=60.0)
    sizes = doctor.sizes_of(plan.config, plan.hp)
    operations = 6 * sizes.parameters * plan.hp.train_batch_tokens
    monkeypatch.setattr(tg, "operations_per_second", lambda device, dtype: steps_per_second * operations)
    monkeypatch.setattr(doctor, "measure", lambda plan: doctor.Timing(2.0, 1, 1.0, False))
    found = [finding.word for finding in doctor.check_time(plan, sizes)]
    assert [word for word in found if word in ("warning", "FAIL")] == words


def test_steps_that_fit_into_the_limit(hp):
    hp = dataclasses.replace(hp, iterations=100, max_wallclock_seconds=60.0, codec="int8_zlib")
    assert doctor.steps_in_time(hp, 0.1) == 100
    assert doctor.steps_in_time(hp, 7.0) == 8
    assert doctor.steps_in_time(dataclasses.replace(hp, max_wallclock_seconds=0.0), 7.0) == 100
    assert "about 8 of ITERATIONS=100 steps fit into MAX_WALLCLOCK_SECONDS=60" in doctor.told_steps(hp, 7.0)


def test_step_is_as_slow_as_in_a_run(plan, tiny_settings, run_script):
    """Up to a factor, because others use this machine too."""
    plan.config = dataclasses.replace(plan.config, eval_seq_len=32)
    measured = doctor.measure(plan)
    assert measured.n_micro == 1
    run = run_script(ITERATIONS="20")
    seconds = run.results["train_seconds"] / 20
    assert seconds / 5 < measured.step_seconds < 5 * seconds


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system with room for 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_room_for_the_files(plan, small_disk):
    plan.hp = dataclasses.replace(plan.hp, out_dir=str(small_disk / "runs"))
    assert [f.word for f in doctor.check_room(plan, small_disk)] == ["ok", "ok"]

    wide = dataclasses.replace(plan.config, model_dim=64)
    plan.config = wide
    sizes = doctor.sizes_of(wide, plan.hp)
    room_for_files = 4 * sizes.parameters + sizes.artifact_bytes + doctor.LOG_BYTES
    (small_disk / "filler").write_bytes(bytes(2**22 - room_for_files - 2**16))
    assert [f.word for f in doctor.check_room(plan, small_disk)] == ["ok", "warning"]

    (small_disk / "filler").write_bytes(bytes(2**22 - room_for_files + 2**16))
    [finding] = doctor.check_room(plan, small_disk)
    assert finding.word == "FAIL"
    assert "make room" in finding.text


def test_folder_that_cannot_hold_the_run(plan, tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    for out_dir, run_id, words in (
        (occupied, "r", "is no folder"),
        (occupied / "below", "r", "is no folder"),
        (tmp_path, "file", "names a run whose files are in"),
    ):
        plan.hp = dataclasses.replace(plan.hp, out_dir=str(out_dir), run_id=run_id)
        failures = [f.text for f in doctor.check_files(plan) if f.word == "FAIL"]
        assert len(failures) == 1
        assert words in failures[0]
