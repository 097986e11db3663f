"""tools/submission.py: one schema, all seeds, and published folders read with a list of what they lack."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import record as sub
import submission
import verify
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]

# --- Logs ---

PUBLISHED_LOG = """\
val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/fineweb_1024_bpe.model
train_loader:dataset:fineweb10B_sp1024 train_shards:80
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:62021632
model_params:17059912
world_size:8 grad_accum_steps:1
seed:1337
warmup_step:1/20
step:10/20000 train_loss:5.2500 train_time:435ms step_avg:43.54ms
step:13750/20000 train_loss:1.9910 train_time:598726ms step_avg:43.54ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
peak memory allocated: 10184 MiB reserved: 10200 MiB
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""
LATER_LOG = """\
4945/20000 train_loss: 2.3600 train_time: 9.9m tok/s: 6550000
4945/20000 val_loss: 2.3539 val_bpb: 1.0756
quantized val_loss: 2.3401 val_bpb: 1.0693 eval_time:100ms
quantized_ttt_phased val_loss:2.31944212 val_bpb:1.05989454 eval_time:508800ms
Code size (uncompressed): 157868 bytes
Total submission size quantized+brotli: 15897259 bytes
"""


def test_a_published_log_is_read():
    log = sub.parse_log(PUBLISHED_LOG)
    assert log.train_curve == [(10, 0.435, 5.25), (13750, 598.726, 1.991)]
    assert log.val_curve == [(13780, 600.038, 2.0606)]
    assert log.final == ("final_int8_zlib_roundtrip_exact", 2.07269931, 1.2243657)
    sizes = {"bytes_code": "47642", "bytes_artifact": "15815847", "bytes_total": "15863489"}
    assert sizes.items() <= log.values.items()
    assert (log.values["seed"], log.values["model_params"], log.values["world_size"]) == ("1337", "17059912", "8")


def test_later_spellings_are_read():
    log = sub.parse_log(LATER_LOG)
    assert log.train_curve == [(4945, pytest.approx(594.0), 2.36)]
    assert log.final == ("quantized_ttt_phased", 2.31944212, 1.05989454)
    assert log.values["bytes_total"] == "15897259"


def test_a_score_of_a_part_of_the_split_is_no_result():
    line = "final_int8_zlib_roundtrip_exact val_loss:3.1 val_bpb:1.2 partial:100_targets eval_method:flat"
    assert sub.parse_log(line).final is None


@settings(max_examples=50)
@given(st.text())
def test_any_text_is_a_log(text):
    sub.parse_log(text)
    sub.parse_log("\n".join(f"step:1/2 train_loss:{part} val_bpb:{part}" for part in text.split()))


# --- Published folders ---


def published(folder: Path, **changes: Any) -> Path:
    """A folder as the published challenge accepts it."""
    told = {
        "author": "Baseline",
        "github_id": "openai",
        "name": "Naive Baseline",
        "blurb": "SP-1024, 9 layers, width 512.",
        "date": "2026-03-18T14:56:29Z",
        "val_loss": 2.07269931,
        "val_bpb": 1.2243657,
        "bytes_total": 15863489,
        "bytes_code": 47642,
    }
    folder.mkdir(exist_ok=True)
    (folder / "submission.json").write_text(json.dumps(told | changes))
    (folder / "README.md").write_text("# Naive Baseline\n")
    (folder / "train.log").write_text(PUBLISHED_LOG)
    (folder / "train_gpt.py").write_text("print('x')\n")
    return folder


def test_a_published_folder_imports_with_a_list_of_what_it_lacks(tmp_path):
    found = submission.import_published(published(tmp_path / "x"))
    assert found.known["val_bpb"] == 1.2243657
    assert found.known["bytes_total"] == 15863489
    assert found.seeds["1337"]["log_val_bpb"] == 1.2243657
    implied = 2.07269931 / math.log(2) * 62_021_632 / 1.2243657
    assert found.seeds["1337"]["implied_bytes"] == round(implied)
    lacking = " | ".join(found.missing)
    for what in ("the artifact", "val_text_sha256", "predictor_class", "settings", "code_sha256", "hardware"):
        assert what in lacking
    for present in ("README.md", "train_gpt.py", "name", "any training log"):
        assert present not in found.missing
    assert "submission.json: val_bpb" not in found.missing


def test_names_that_mean_the_same_are_one(tmp_path):
    results = {"42": {"val_bpb": 1.06, "artifact_bytes": 15897259}, "0": {"val_bpb": 1.07}}
    changes = {"mean_val_bpb": 1.065, "artifact_bytes_max": 15_900_000, "gpu": "1xRTX5090", "pytorch_version": "2.9.1"}
    folder = published(tmp_path / "x", seed_results=results, seeds=[42, 0, 7], **changes)
    told = json.loads((folder / "submission.json").read_text())
    del told["val_bpb"], told["bytes_total"]
    (folder / "submission.json").write_text(json.dumps(told | {"no_slot": True}))
    found = submission.import_published(folder)
    names = {"val_bpb": 1.065, "bytes_total": 15_900_000, "hardware": "1xRTX5090", "torch": "2.9.1"}
    assert names.items() <= found.known.items()
    assert {f"the log of seed {seed}" for seed in ("42", "0", "7")} <= set(found.missing)
    assert any("'no_slot'" in text for text in found.missing)


def test_folders_that_lack_everything_import_too(tmp_path, capsys):
    found = submission.import_published(tmp_path)
    assert {"submission.json", "any training log", "README.md", "train_gpt.py"} <= set(found.missing)
    (tmp_path / "submission_ternary.json").write_text('{"val_bpb": 1.2}')
    assert "submission.json (it has submission_ternary.json)" in submission.import_published(tmp_path).missing
    assert submission.main(["import", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["known"] == {"val_bpb": 1.2}


def test_a_path_that_is_no_folder_is_not_imported(tmp_path, capsys):
    (tmp_path / "file").write_text("{}")
    for name, message in {"nowhere": "nowhere is missing", "file": "file is a file"}.items():
        assert submission.main(["import", str(tmp_path / name)]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part),
)
NAMES = sorted({*(f.name for f in dataclasses.fields(sub.Submission)), "seeds", "seed_results", "gpu", "base_pr"})


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_any_published_json_imports(tmp_path_factory, told):
    submission.import_published(published(tmp_path_factory.mktemp("x"), **told))


# --- The schema ---


def example() -> dict[str, Any]:
    """A whole submission.json, of made-up figures."""
    by_type = {"str": "x", "int": 1, "float": 1.5, "dict[str, Any]": {}, "dict[str, float]": {}, "bool | None": None}
    by_type |= {"Words": "x", "float | None": 0.5, "Literal['A', 'B']": "A", "Literal['sidecar', 'pieces']": "sidecar"}
    result = {f.name: by_type[str(f.type).replace('"', "'")] for f in dataclasses.fields(sub.SeedResult)}
    made = {
        f.name: {"1": result} if f.name == "seed_results" else by_type[str(f.type).replace('"', "'")]
        for f in dataclasses.fields(sub.Submission)
    }
    return made


def test_the_published_schema_is_that_of_the_class():
    assert sub.SCHEMA_FILE.read_text() == sub.schema_text()


def test_the_schema_and_the_reader_accept_the_same():
    """jsonschema is another implementation of what the class means."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(sub.schema_text()))
    whole = example()
    cases = [whole]
    for name, value in whole.items():
        cases += [{k: v for k, v in whole.items() if k != name}, whole | {name: [value]}, whole | {name: None}]
        cases += [whole | {name: other} for other in ("x", "", " \n", 2, 2.5, True)]
    cases += [whole | {"extra": 1}, [], 3, whole | {"seed_results": {"1": whole["seed_results"]["1"] | {"y": 2}}}]
    for case in cases:
        ours = not list(sub.faults(case, sub.Submission, "x"))
        assert ours == validator.is_valid(case), case


def test_every_fault_is_named():
    told = example() | {"val_bpb": "low", "no_slot": True, "predictor_class": "C"}
    del told["author"]
    with pytest.raises(
        ValueError, match=r"no_slot is an unknown key.*author is missing.*class.*'C'.*val_bpb.*'low'"
    ) as error:
        sub.from_json(sub.Submission, told, "submission.json")
    assert str(error.value).count(";") == 3


@pytest.mark.parametrize("name", ["name", "author", "github_id", "blurb", "licence"])
def test_a_text_that_says_nothing_is_refused(name):
    assert not list(sub.faults(example(), sub.Submission, "x"))
    for blank in ("", " \t\n"):
        assert list(sub.faults(example() | {name: blank}, sub.Submission, "x")) == [
            f"x.{name} is {blank!r}, blank: fill it in"
        ]


def test_numbers_that_are_none_are_refused():
    for value in (math.nan, math.inf, True, "1"):
        assert list(sub.faults(example() | {"val_bpb": value}, sub.Submission, "x"))


def test_the_tracks_can_be_read_and_keep_the_published_limits():
    version, tracks = sub.load_tracks()
    main = tracks["track_10min_16mb"]
    assert version >= 1
    assert (main.max_total_bytes, main.max_train_seconds, main.max_eval_seconds) == (16_000_000, 600, 600)
    assert (main.world_size, main.min_gain, main.p_value) == (8, 0.002, 0.01)
    assert {"track_speedrun", "track_slowrun", "track_tiny_100m", "track_1gpu_10min_16mb"} <= tracks.keys()


# --- new ---


def run_json(folder: Path, seed: int, **changes: Any) -> Path:
    """The JSON and the log of a run that could have been, with results that follow from its seed."""
    names = sub.script_settings((ROOT / "train_gpt.py").read_text())
    run: dict[str, Any] = dict.fromkeys(names, 1)
    run |= {f.name: 1 for f in dataclasses.fields(sub.SeedResult)} | {"seconds_train": 5.0, "seconds_calibrate": 0.5}
    run |= {"seconds_evaluate": 2.0, "seed": seed, "run_id": f"r{seed}", "eval_artifact": "", "partial": False}
    run |= {"code_sha256": sub.sha256((ROOT / "train_gpt.py").read_bytes()), "bytes_code": 10, "steps": 30}
    run |= dict.fromkeys(("val_shards_sha256", "val_text_sha256", "tokenizer_sha256", "artifact_sha256"), "0")
    run |= {"device": "cpu:x", "world_size": 1, "judge_version": 2, "python": "3", "torch": "2", "model_params": 5}
    run |= {"val_tokens": 7, "val_documents": 2, "val_bytes": 20, "val_accounting": "sidecar", "train_tokens": 9}
    run |= {"tokenizer_lossless": True, "train_dataset": "x", "date": "2026-01-02T03:04:05Z", "val_bpb": 1 + seed / 100}
    run |= {"data_path": "data/datasets/x", "tokenizer_path": "data/tokenizers/x.model", "artifact_dir": "."}
    run |= {"val_loss": 2.0 + seed / 100, "bytes_artifact": 100 + seed, "bytes_total": 110 + seed, **changes}
    folder.mkdir(exist_ok=True)
    path = folder / f"{run['run_id']}.json"
    path.write_text(json.dumps(run))
    path.with_suffix(".txt").write_text(f"preset:smoke seed:{seed} settings:MODEL_DIM=64,SEED={seed},OUT_DIR=x\n")
    return path


def new(tmp_path: Path, *more: str) -> tuple[int, Path]:
    what = ["--track", "track_non_record_16mb", "--name", "An Idea!", "--github-id", "ada", "--blurb", "It is new."]
    places = ["--author", "Ada", "--logs", str(tmp_path / "logs"), "--records", str(tmp_path / "records")]
    status = submission.main(["new", *what, *places, *more])
    return status, tmp_path / "records" / "track_non_record_16mb" / "2026-01-02_An-Idea"


def test_new_takes_every_seed_that_was_run(tmp_path):
    for seed in (3, 1, 2):
        run_json(tmp_path / "logs", seed)
    run_json(tmp_path / "logs", 9, run_id="other", model_dim=2)
    run_json(tmp_path / "logs", 8, run_id="part", partial=True)
    last = run_json(tmp_path / "logs", 4)
    status, folder = new(tmp_path)
    assert status == 0
    s = sub.load_submission(folder)
    assert list(s.seed_results) == ["1", "2", "3", "4"]
    assert s.val_bpb == pytest.approx(1.025)
    assert s.val_bpb_std == pytest.approx(statistics.stdev([1.01, 1.02, 1.03, 1.04]))
    assert (s.bytes_total, s.train_seconds) == (114, 5.5)
    assert sub.run_path(folder, "4").read_bytes() == last.read_bytes()
    text = (folder / "README.md").read_text()
    assert "It is new." in text
    assert sub.script_path(folder).read_bytes() == (ROOT / "train_gpt.py").read_bytes()


def typed(command: str, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """The arguments and the settings that a launcher gets from a command line, as the shell understands it."""
    echo = "import json, os, sys\nprint(json.dumps([sys.argv, dict(os.environ)]))\n"
    for name in ("python", "torchrun"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!{sys.executable} -S\n{echo}")
        stub.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], env={"PATH": path}, cwd=tmp_path, capture_output=True, text=True)
    (program, *arguments), env = json.loads(done.stdout)
    known = {name.upper() for name in sub.script_settings((ROOT / "train_gpt.py").read_text())}
    return [Path(program).name, *arguments], {key: env[key] for key in env.keys() & known}


@pytest.mark.parametrize(
    ("run", "launcher", "tokenizer"),
    [
        ({}, ["python"], "./data/tokenizers/sp.model"),
        ({"world_size": 8}, ["torchrun", "--standalone", "--nproc_per_node=8"], "./data/tokenizers/sp.model"),
        ({"tokenizer_path": "/my data/set_sp1024/t.model"}, ["python"], "./data/datasets/set_sp1024/t.model"),
    ],
)
def test_the_readme_repeats_the_run_from_the_root(tmp_path, run, launcher, tokenizer):
    where = {"data_path": "/my data/set_sp1024", "tokenizer_path": "/my data/sp.model", "train_dataset": "set_sp1024"}
    path = run_json(tmp_path / "logs", 5, **where | run)
    changed = "MODEL_DIM=64,SHUFFLE=False,TIE_EMBEDDINGS=True,RUN_ID=a b,SEED=5,DATA_PATH=/my data/set_sp1024"
    places = "TOKENIZER_PATH=/x,y,OUT_DIR=x,ARTIFACT_DIR=x"
    log = f"preset:smoke seed:5 settings:{changed},{places},ITERATIONS=30\ndate:2026-01-02T03:04:05Z python:3\n"
    path.with_suffix(".txt").write_text(log)
    status, folder = new(tmp_path)
    assert status == 0
    commands = (folder / "README.md").read_text().split("```")[1].removeprefix("bash\n").splitlines()
    record = f"records/{folder.parent.name}/{folder.name}"
    assert commands[0] == f"python tools/verify.py {record}"
    arguments, settings = typed(commands[1], tmp_path)
    assert arguments == [*launcher, f"{record}/train_gpt.py"]
    assert settings == {
        "PRESET": "smoke",
        "MODEL_DIM": "64",
        "SHUFFLE": "0",
        "TIE_EMBEDDINGS": "1",
        "ITERATIONS": "30",
        "DATA_PATH": "./data/datasets/set_sp1024",
        "TOKENIZER_PATH": tokenizer,
        "SEED": "5",
        "OUT_DIR": "/tmp/again",
        "ARTIFACT_DIR": "/tmp/again",
    }


def test_a_log_without_settings_is_refused(tmp_path, capsys):
    run_json(tmp_path / "logs", 1).with_suffix(".txt").write_text("step:1/2 train_loss:3\n")
    assert new(tmp_path)[0] == 1
    assert "the log of run r1 lacks the line preset:... settings:..." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial": True}, "scored a part"),
        ({"code_sha256": "1"}, "code_sha256 is "),
        ({"val_shards_sha256": "1"}, "val_shards_sha256 is 0 in run r1 and 1 in run r2: "),
        ({"train_dataset": "y"}, "train_dataset is x in run r1 and y in run r2: "),
        ({"train_tokens": 10}, "train_tokens is 9 in run r1 and 10 in run r2: "),
        ({"model_dim": 2}, "MODEL_DIM is 1 in run r1 and 2 in run r2: a record holds runs of one kind"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(tmp_path, capsys, changes, message):
    first = run_json(tmp_path / "logs", 1)
    second = run_json(tmp_path / "logs", 2, **changes)
    status, folder = new(tmp_path, "--runs", str(first), str(second))
    assert status == 1
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_one_seed_run_twice_is_refused_with_a_command_that_works(tmp_path, capsys):
    logs = tmp_path / "log s"
    late = run_json(logs, 1, run_id="late", date="2026-01-03T00:00:00Z")
    early = run_json(logs, 1, run_id="early")
    other = run_json(logs, 2)
    for named in ([], ["--runs", str(late), str(early), str(other)]):
        assert new(tmp_path, "--logs", str(logs), *named)[0] == 1
        error = capsys.readouterr().err
        assert f"seed 1 was run 2 times: {early} (run early of 2026-01-02T03:04:05Z), {late} (run late of " in error
        advice = shlex.split(error[error.index("--runs") :])
        assert sorted(advice) == sorted(["--runs", str(early), str(other)])
    status, folder = new(tmp_path, *advice)
    assert status == 0
    assert sub.run_path(folder, "1").read_bytes() == early.read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        {"val_shards_sha256": "1"},
        {"tokenizer_sha256": "1"},
        {"train_dataset": "y"},
        {"train_tokens": 10},
        {"device": "cpu:y"},
        {"world_size": 2},
    ],
)
def test_runs_with_the_same_settings_but_other_data_or_hardware_are_left_out_and_named(tmp_path, capsys, other):
    left_out = run_json(tmp_path / "logs", 1, run_id="other", **other)
    run_json(tmp_path / "logs", 1)
    run_json(tmp_path / "logs", 2)
    status, folder = new(tmp_path)
    assert status == 0
    assert sorted(json.loads(sub.run_path(folder, seed).read_text())["run_id"] for seed in "12") == ["r1", "r2"]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out {left_out}: {next(iter(other))} is ")
    assert "--runs" in line


def test_new_refuses_a_script_that_did_not_run(tmp_path, capsys):
    run_json(tmp_path / "logs", 1, code_sha256="1")
    assert new(tmp_path, "--runs", str(tmp_path / "logs" / "r1.json"))[0] == 1
    assert "the run was made with" in capsys.readouterr().err


def test_new_never_overwrites(tmp_path, capsys):
    run_json(tmp_path / "logs", 1)
    assert new(tmp_path)[0] == 0
    assert new(tmp_path)[0] == 1
    assert "choose another --name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--name", "日本語モデル", "--name=日本語モデル leaves nothing to name the folder by"),
        ("--name", " .- ", "Latin letters or digits"),
        ("--date", "2026/11/24", "the date '2026/11/24' is not a day of the form YYYY-MM-DD"),
        ("--date", "tomorrow", "give one with --date"),
        ("--date", "2026-02-30", "is not a day"),
        ("--date", "20260102", "is not a day"),
    ],
)
def test_a_name_or_a_date_that_names_no_folder_is_refused(tmp_path, capsys, option, value, message):
    run_json(tmp_path / "logs", 1)
    assert new(tmp_path, option, value)[0] == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("name", ["An Idea!", "../up", "a/b", "日本 v2", "_x", "x" * 80])
def test_every_folder_that_new_makes_has_a_name_that_verify_accepts(tmp_path, name):
    run_json(tmp_path / "logs", 1)
    assert new(tmp_path, "--name", name)[0] == 0
    [folder] = (tmp_path / "records" / "track_non_record_16mb").iterdir()
    assert sub.FOLDER_NAME.fullmatch(folder.name)


def test_files_in_the_logs_that_are_no_runs_are_skipped_and_named(tmp_path, capsys):
    logs = tmp_path / "logs"
    run_json(logs, 1)
    run_json(logs, 7, run_id="scored", eval_artifact="x.ptz")
    strange = {"list": "[1, 2]", "half": '{"steps": 3, "val_', "tool": '{"steps": 3, "version": "1.0"}', "text": '"x"'}
    for name, text in strange.items():
        (logs / f"{name}.json").write_text(text)
    (logs / "folder.json").mkdir()
    (logs / "link.json").symlink_to("nowhere")
    status, folder = new(tmp_path)
    assert status == 0
    assert list(sub.load_submission(folder).seed_results) == ["1"]
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(": ")[0] for line in lines) == sorted(f"skipped {logs / name}.json" for name in strange)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "other.json is not the JSON of a training run: it holds no JSON object"),
        ('{"steps": 3}', "it lacks artifact_dir, artifact_sha256, bytes_artifact, bytes_code ..., which"),
        ('{"steps": 3, ', "other.json is not JSON"),
        (None, "other.json is missing"),
    ],
)
def test_a_file_that_is_no_run_cannot_be_named_as_one(tmp_path, capsys, text, message):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    assert new(tmp_path, "--runs", str(path))[0] == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(sub.run_types())), VALUES)
def test_a_run_with_a_value_of_another_type_is_an_error_not_a_crash(tmp_path, name, value):
    path = run_json(tmp_path / "logs", 1)
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {name: value}))
    status, folder = new(tmp_path, "--runs", str(path))
    assert status in (0, 1)
    shutil.rmtree(folder.parent, ignore_errors=True)


def test_a_script_that_is_not_python_is_an_error_of_one_line(tmp_path, capsys):
    run_json(tmp_path / "logs", 1)
    script = tmp_path / "train_gpt.py"
    faulty = {"def main(:\n": "the script is not Python: invalid syntax in line 1", "\0": "null bytes"}
    for source, message in faulty.items():
        script.write_text(source)
        assert new(tmp_path, "--script", str(script))[0] == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_record_is_written_whole_or_not_at_all(tmp_path, capsys):
    run_json(tmp_path / "logs", 1)
    log = run_json(tmp_path / "logs", 2).with_suffix(".txt")
    log.unlink()
    status, folder = new(tmp_path)
    assert status == 1
    assert f"{log} is missing" in capsys.readouterr().err
    assert list(folder.parent.iterdir()) == []
    log.write_text("preset:smoke seed:2 settings:SEED=2\n")
    assert new(tmp_path)[0] == 0
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("option", ["--github-id", "--blurb", "--licence"])
def test_new_asks_for_the_text_that_is_blank(tmp_path, capsys, option):
    run_json(tmp_path / "logs", 1)
    assert new(tmp_path, option, " ")[0] == 1
    assert f"{option}=' ' is blank" in capsys.readouterr().err


def test_new_asks_for_an_author_where_git_knows_none(tmp_path, capsys, monkeypatch):
    run_json(tmp_path / "logs", 1)
    monkeypatch.setattr(submission, "git_setting", lambda name: "")
    status, folder = new(tmp_path, "--author", "")
    assert status == 1
    assert "give one with --author" in capsys.readouterr().err
    assert not folder.exists()
    monkeypatch.setattr(submission, "git_setting", lambda name: "Grace")
    assert new(tmp_path, "--author", "")[0] == 0
    assert sub.load_submission(folder).author == "Grace"


def test_the_artifact_is_that_of_whichever_run_still_has_one(tmp_path, capsys):
    place, data = tmp_path / "out", tmp_path / "shards"
    for folder in (place, data):
        folder.mkdir()
    for name in ("fineweb_val_000000.bin", "manifest.json", "sp.model"):
        (data / name).write_text(name)
    where = {"artifact_dir": str(place), "data_path": str(data), "tokenizer_path": str(data / "sp.model")}
    for seed in (1, 2):
        run_json(tmp_path / "logs", seed, artifact_sha256=sub.sha256(f"weights {seed}".encode()), **where)
    assert new(tmp_path, "--artifact")[0] == 1
    assert f"ARTIFACT_DIR={place} holds nothing" in capsys.readouterr().err
    artifact = place / "final_model.int8.ptz"
    artifact.write_text("weights of another run")
    assert new(tmp_path, "--artifact")[0] == 1
    assert f"holds {artifact}: of none of these runs" in capsys.readouterr().err
    artifact.write_text("weights 2")
    status, folder = new(tmp_path, "--artifact")
    assert status == 0
    assert f"{artifact}: the artifact of seed 2" in capsys.readouterr().out
    assert (folder / artifact.name).read_text() == "weights 2"
    assert (folder / "data" / "tokenizer.model").read_text() == "sp.model"


TINY = {"wikitext2_nats_per_byte": 0.9, "blimp_accuracy": 0.7, "arc_easy_accuracy": 1}


def tiny(tmp_path: Path, results: Any) -> tuple[int, Path]:
    """`new` in the track that asks for benchmarks."""
    file = tmp_path / "benchmarks.json"
    file.write_text(json.dumps(results))
    status, folder = new(tmp_path, "--track", "track_tiny_100m", "--benchmarks", str(file))
    return status, tmp_path / "records" / "track_tiny_100m" / folder.name


def test_a_record_can_report_the_benchmarks_that_its_track_asks_for(tmp_path):
    for seed in (1, 2):
        run_json(tmp_path / "logs", seed, eval_seq_len=2048)
    status, folder = tiny(tmp_path, TINY)
    assert status == 0
    s = sub.load_submission(folder)
    assert s.benchmarks == TINY
    assert "Benchmarks: wikitext2_nats_per_byte 0.9000, " in (folder / "README.md").read_text()
    assert verify.check_track(folder, s).ok
    runs = [json.loads(sub.run_path(folder, seed).read_text()) for seed in s.seed_results]
    assert verify.check_summary(folder, s, dict(enumerate(runs))).ok
    assert sub.summarize(runs, sub.script_path(folder).read_bytes(), s.about) == s


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({**TINY, "blimp_accuracy": math.nan}, "blimp_accuracy is nan, not a finite number"),
        ({**TINY, "blimp_accuracy": "0.7"}, "blimp_accuracy is '0.7', not a finite number"),
        ({**TINY, "blimp": 0.7}, "benchmarks.json has 'blimp' (track_tiny_100m asks for wikitext2_nats_per_byte"),
        ({"blimp_accuracy": 0.7}, "benchmarks.json lacks wikitext2_nats_per_byte"),
        ([0.7], "benchmarks.json is [0.7], not an object"),
    ],
)
def test_benchmarks_that_are_not_those_of_the_track_are_refused(tmp_path, capsys, results, message):
    run_json(tmp_path / "logs", 1)
    status, folder = tiny(tmp_path, results)
    assert status == 1
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_benchmarks_go_with_a_track_that_asks_for_them(tmp_path, capsys):
    run_json(tmp_path / "logs", 1)
    (tmp_path / "b.json").write_text(json.dumps(TINY))
    assert new(tmp_path, "--benchmarks", str(tmp_path / "b.json"))[0] == 1
    assert "track_non_record_16mb asks for no benchmarks" in capsys.readouterr().err
    assert new(tmp_path, "--track", "track_tiny_100m")[0] == 1
    assert "give --benchmarks a file" in capsys.readouterr().err


def test_new_without_a_run_says_so(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    assert new(tmp_path)[0] == 1
    assert "train first" in capsys.readouterr().err


def test_a_record_of_our_own_lacks_only_its_artifact(tmp_path):
    final = "final_int8_zlib_roundtrip_exact val_loss:2.01000000 val_bpb:1.01000000"
    for seed in (1, 2):
        log = run_json(tmp_path / "logs", seed).with_suffix(".txt")
        log.write_text(f"preset:smoke seed:{seed} settings:SEED={seed}\n{final}\n")
    folder = new(tmp_path)[1]
    found = submission.import_published(folder)
    assert found.missing == ["the artifact, so that the score cannot be computed again without training"]
    assert found.seeds["1"]["val_bpb"] == 1.01
    told = json.loads((folder / "submission.json").read_text())
    for odd in ([], "x", None):
        (folder / "submission.json").write_text(json.dumps(told | {"seed_results": odd}))
        assert "submission.json: seed_results" in submission.import_published(folder).missing


# --- Reviews ---


def test_reviews_are_kept_in_order(tmp_path):
    first = sub.Review("2026-01-01", "a", "rescored", "0", val_bpb=1.5)
    second = sub.Review("2026-01-02", "b", "disputed", "0", note="why")
    sub.add_review(tmp_path, first)
    sub.add_review(tmp_path, second)
    assert sub.load_reviews(tmp_path) == [first, second]
    (tmp_path / "reviews.json").write_text('[{"kind": "praised"}]')
    with pytest.raises(ValueError, match="praised"):
        sub.load_reviews(tmp_path)


def test_an_objection_can_be_made_and_settled(tmp_path):
    run_json(tmp_path / "logs", 1)
    folder = new(tmp_path)[1]
    for kind in ("disputed", "settled"):
        assert submission.main(["review", str(folder), "--kind", kind, "--reviewer", "b", "--note", "why"]) == 0
    assert [r.kind for r in sub.load_reviews(folder)] == ["disputed", "settled"]
