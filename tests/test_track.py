"""TRACK: numbers of a run go to a tracker live, and no tracker can end the run or change its result.

The faults are real: a package of the tracker's name stands on the path, notes how it is called, and raises when told.
What the true packages keep is read back with their own readers, where they are installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import record
import source
from conftest import FinishedRun
from test_faults import DRIVER as FAULT_DRIVER

import train_gpt as tg

DRIVER = """
import os, signal, sys
sys.path.insert(0, {packages!r})
import train_gpt as tg

finish_step = tg.Progress.finish_step

def finish_and_signal(progress, *rest):
    finish_step(progress, *rest)
    if os.environ.get("SIGTERM_IN_STEP") == str(progress.step):
        os.kill(os.getpid(), signal.SIGTERM)

tg.Progress.finish_step = finish_and_signal
try:
    status = tg.main()
except tg.EXPECTED_ERRORS as error:
    sys.exit(f"error: {{error}}")
sys.exit(status)
"""

# Notes every call as a line of JSON, and then raises what FAULT asks for: the call's name and the exception.
PACKAGE = """
import json, os

def note(call, *positional, **named):
    with open("calls", "a") as file:
        print(json.dumps([os.getpid(), call, positional, named], default=str), file=file)
    where, _, what = os.environ.get("FAULT", "").partition(":")
    if where == call:
        raise eval(what)

def init(**named): note("init", **named)
def log(values, step): note("log", values, step)
def finish(*status): note("finish", *status)
def login(**named):
    note("login", **named)
    return bool(os.environ.get("WANDB_API_KEY"))
def Settings(**named): return named
"""


@pytest.fixture(scope="module")
def run_tracked(tmp_path_factory, tiny_settings, fork) -> Callable[..., FinishedRun]:
    """A function that runs the script with packages of the trackers' names that note how they are called."""
    packages = tmp_path_factory.mktemp("packages")
    for name in ("wandb", "trackio"):
        (packages / f"{name}.py").write_text(PACKAGE)
    driver = packages / "driver.py"
    driver.write_text(DRIVER.format(packages=str(packages)))

    def run(track: str, size: int = 1, folder: Path | None = None, **changes: str | None) -> FinishedRun:
        settings = {**tiny_settings, "TRACK": track, **changes}
        env = {name: value for name, value in settings.items() if value is not None}
        return fork(str(driver), folder or tmp_path_factory.mktemp("tracked"), env, size)

    return run


def calls_of(run: FinishedRun, name: str) -> list[tuple[list[Any], dict[str, Any]]]:
    """Positional and named arguments of the calls of one function."""
    calls = [json.loads(line) for line in (run.folder / "calls").read_text().splitlines()]
    return [(positional, named) for _, call, positional, named in calls if call == name]


# -- what is sent ----------------------------------------------------------------------------------------------------


def assert_follows_the_log(sent: list[tuple[int, dict[str, float]]], run: FinishedRun) -> None:
    """The steps and losses are those of the log's lines, and the results those of run.json."""
    log = record.parse_log(run.log)
    train = [(step, round(values["train_loss"], 4)) for step, values in sent if "train_loss" in values]
    assert train == [(point.step, point.loss) for point in log.train_curve]
    val = [(step, round(values["val_bpb"], 4)) for step, values in sent if "val_bpb" in values]
    assert val == [(point.step, point.bpb) for point in log.val_curve]
    last_step, last = sent[-1]
    assert last_step == run.results["steps"]
    for name in ("val_loss", "val_bpb", "bytes_total", "seconds_train"):
        assert last[f"final/{name}"] == pytest.approx(run.results[name], rel=1e-6)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_tracker_gets_settings_and_what_the_log_says_and_changes_nothing(name, run_tracked, trained):
    run = run_tracked(name, VAL_LOSS_EVERY="10")
    assert run.status == 0, run.err
    assert run.artifact.read_bytes() == trained.artifact.read_bytes()

    [(_, about)] = calls_of(run, "init")
    assert about["name"] == "run"
    assert about["resume"] == "allow"
    config = about["config"]
    assert (config["matrix_lr"], config["model_dim"], config["track"]) == (0.04, 32, name)
    assert config["val_shards_sha256"] == run.results["val_shards_sha256"]

    assert_follows_the_log([(step, values) for (values, step), _ in calls_of(run, "log")], run)
    assert calls_of(run, "finish") == [([0] if name == "wandb" else [], {})]


def test_only_rank_0_tracks(run_tracked):
    run = run_tracked("trackio", size=2, ITERATIONS="3")
    assert run.status == 0, run.err
    lines = [json.loads(line) for line in (run.folder / "calls").read_text().splitlines()]
    assert len({process for process, *_ in lines}) == 1
    assert len(calls_of(run, "init")) == len(calls_of(run, "finish")) == 1


def test_run_that_goes_on_goes_on_in_the_tracker(run_tracked):
    """Under the same name, from the step behind its checkpoint. The tracker is told with which status a part ended."""
    run = run_tracked("wandb", SIGTERM_IN_STEP="12")
    assert run.status == 128 + 15
    assert calls_of(run, "finish") == [([128 + 15], {})]
    done = run_tracked("wandb", folder=run.folder, **{**dict.fromkeys(tg.SETTINGS), "RESUME": "1", "TRACK": None})
    assert done.status == 0, done.err
    [(_, first), (_, second)] = calls_of(done, "init")
    assert first["id"] == second["id"] == "run"
    assert second["resume"] == "allow"
    assert_follows_the_log([(step, values) for (values, step), _ in calls_of(done, "log")], done)


# -- what goes wrong -------------------------------------------------------------------------------------------------

FAULTS = [
    ("wandb", "init:ConnectionError('no network\\nand more')"),
    ("trackio", "log:OSError(28, 'No space left on device')"),
    ("wandb", "log:SystemExit(1)"),
    ("trackio", "finish:RuntimeError('half sent')"),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_tracker_that_fails_is_one_warning_and_the_result_is_the_same(name, fault, run_tracked, trained):
    run = run_tracked(name, FAULT=fault)
    assert run.status == 0, run.err
    assert run.artifact.read_bytes() == trained.artifact.read_bytes()
    assert run.results["val_bpb"] == trained.results["val_bpb"]
    where, _, what = fault.partition(":")
    [warning] = [line for line in run.log.splitlines() if line.startswith("warning:")]
    assert warning.startswith(f"warning: TRACK={name} failed, the run goes on without it: {what.partition('(')[0]}: ")
    # It is not asked again.
    assert len(calls_of(run, where)) == 1
    assert len(calls_of(run, "finish")) == (where == "finish")


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_package_that_is_missing_is_an_error_before_there_are_files(name, fork, tiny_settings, tmp_path):
    """A folder of that name, as wandb leaves one where it runs, is no package."""
    folder = tmp_path / "run"
    (folder / name).mkdir(parents=True)
    driver = tmp_path / "driver.py"
    # What is installed cannot be found any more. What the script needs is loaded already.
    hidden = "sys.path[:] = [{packages!r}, *(path for path in sys.path if not path.endswith('-packages'))]"
    driver.write_text(DRIVER.replace("sys.path.insert(0, {packages!r})", hidden).format(packages=str(folder)))
    run = fork(str(driver), folder, {**tiny_settings, "TRACK": name})
    assert run.status == 1
    assert run.err == f"error: TRACK={name} needs its package: python -m pip install {name}, or go without: --track=\n"
    assert [path.name for path in folder.iterdir()] == [name]


def test_tracker_that_nobody_knows_is_refused(tiny_settings):
    with pytest.raises(ValueError, match=r"^TRACK='mlflow' must be one of trackio, wandb, tensorboard$"):
        tg.from_env(tg.Hyperparameters, {**tiny_settings, "TRACK": "mlflow"})
    for name in ("REPORT_TO", "WANDB_LOG"):
        with pytest.raises(ValueError, match=f"^{name}='wandb' is a setting of other scripts: say TRACK"):
            tg.from_env(tg.Hyperparameters, {**tiny_settings, name: "wandb"})


@pytest.mark.parametrize(
    ("mode", "key", "expected"), [("online", "", "offline"), ("disabled", "", "disabled"), (None, "k", None)]
)
def test_wandb_stays_offline_where_nobody_has_logged_in(mode, key, expected, run_tracked):
    """It would ask on the terminal otherwise. As in the true package, login() says whether there is a key."""
    run = run_tracked("wandb", WANDB_MODE=mode, WANDB_API_KEY=key, ITERATIONS="1")
    assert run.status == 0, run.err
    [(_, about)] = calls_of(run, "init")
    assert about["mode"] == expected


# -- the true packages -----------------------------------------------------------------------------------------------


def test_tensorboard_shows_the_steps_of_a_run_that_went_on_once(run_tracked):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_tracked("tensorboard", SIGTERM_IN_STEP="12", VAL_LOSS_EVERY="5")
    assert run.status == 128 + 15
    done = run_tracked("tensorboard", folder=run.folder, **{**dict.fromkeys(tg.SETTINGS), "RESUME": "1", "TRACK": None})
    assert done.status == 0, done.err
    assert "warning" not in done.log

    events = EventAccumulator(str(done.run_folder / "tensorboard"))
    events.Reload()
    sent = []
    for name in events.Tags()["scalars"]:
        sent += [(event.step, {name: event.value}) for event in events.Scalars(name)]
    results = {name: value for _, values in sent for name, value in values.items() if name.startswith("final/")}
    assert_follows_the_log([*sent, (done.results["steps"], results)], done)


def test_trackio_keeps_the_run_on_this_machine(run_script, tmp_path):
    pytest.importorskip("trackio")
    own_folders = {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    run = run_script(TRACK="trackio", VAL_LOSS_EVERY="10", **own_folders)
    assert run.status == 0, run.err
    assert "warning" not in run.log
    code = (
        "import json\nfrom trackio.sqlite_storage import SQLiteStorage\n"
        "print(json.dumps(SQLiteStorage.get_logs('parameter-golf', 'run')))"
    )
    env = {**os.environ, **own_folders}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    sent = [(values["step"], values) for values in json.loads(done.stdout)]
    assert_follows_the_log(sent, run)


def test_wandb_without_an_account_asks_nothing_and_keeps_the_run_in_its_folder(tiny_settings, tmp_path):
    """At a terminal, where it asks otherwise."""
    pytest.importorskip("wandb")
    reader, writer = pty.openpty()
    env = {**tiny_settings, "TRACK": "wandb", "HOME": str(tmp_path)}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), writer)
    process = subprocess.Popen([sys.executable, tg.__file__], cwd=tmp_path, env=env, **streams)
    os.close(writer)
    seen = b""
    with contextlib.suppress(OSError):
        while piece := os.read(reader, 2**16):
            seen += piece
    os.close(reader)
    assert process.wait(60) == 0, seen.decode()
    assert b"warning: TRACK" not in seen
    [kept] = (tmp_path / "runs" / "run").glob("wandb/offline-run-*-run/run-run.wandb")
    for name in (b"train_loss", b"val_bpb", b"final/bytes_total", b"matrix_lr"):
        assert name in kept.read_bytes()


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_run_survives_when_the_disk_of_its_tracker_fills_up(name, fork, tiny_settings, tmp_path, mount, trained):
    """Before the tenth step, the folder of the run has no room any more, nor has that of trackio."""
    pytest.importorskip(name)
    disk = mount("size=1m")
    driver = tmp_path / "driver.py"
    driver.write_text(FAULT_DRIVER.format(fault="fill(os.environ['OUT_DIR'])"))
    elsewhere = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "TRACKIO_DIR": str(disk / "trackio")}
    run = fork(str(driver), tmp_path, {**tiny_settings, "TRACK": name, "OUT_DIR": str(disk), **elsewhere})
    assert run.losses == trained.losses
    [results] = tmp_path.glob("*.run.json")
    assert json.loads(results.read_text())["val_bpb"] == trained.results["val_bpb"]
    # The others write in processes and threads of their own, which keep it to themselves.
    assert run.out.count("warning: TRACK=") == (name == "tensorboard")


# -- records ---------------------------------------------------------------------------------------------------------


def test_seeds_of_a_record_may_be_tracked_differently():
    assert "track" in record.PER_RUN


def test_script_may_tell_a_tracker_and_not_ask_it():
    """A tracker can fetch files, too. What the script itself does with them is allowed."""
    assert source.find_faults(Path(tg.__file__).read_bytes()) == ((), ())
    allowed = "import wandb\nwandb.init(project='x')\nwandb.log({'a': 1})\nend = wandb.finish\n"
    assert source.find_faults(allowed.encode()) == ((), ())
    for code in (
        "import wandb\nwandb.restore('weights')\n",
        "import wandb as w\nw.restore('weights')\n",
        "import wandb\nw = wandb\nw.restore('weights')\n",
        "import wandb.apis\n",
        "from wandb import restore\n",
        "from trackio.api import Api\n",
        "import importlib\nimportlib.import_module('trackio').Api()\n",
        "import trackio\ngetattr(trackio, 'Api')()\n",
    ):
        faults = source.find_faults(code.encode())
        assert faults.network, code
        assert not faults.unreadable, code
