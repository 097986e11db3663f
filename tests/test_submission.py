"""tools/record.py and tools/submission.py: logs, the schema, records made from runs, and published folders."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import record
import submission
import verify
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import import_published, verdict_on

SCRIPT = record.ROOT / "train_gpt.py"

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
    log = record.parse_log(PUBLISHED_LOG)
    assert log.train_curve == [(10, 0.435, 5.25, None), (13750, 598.726, 1.991, None)]
    assert log.val_curve == [(13780, 600.038, 2.0606, 1.2172)]
    assert log.final == ("final_int8_zlib_roundtrip_exact", 2.07269931, 1.2243657)
    sizes = {"bytes_code": "47642", "bytes_artifact": "15815847", "bytes_total": "15863489"}
    assert sizes.items() <= log.values.items()
    assert (log.values["seed"], log.values["model_params"], log.values["world_size"]) == ("1337", "17059912", "8")


def test_later_spellings_are_read():
    log = record.parse_log(LATER_LOG)
    assert log.train_curve == [(4945, pytest.approx(594.0), 2.36, None)]
    assert [(point.step, point.bpb) for point in log.val_curve] == [(4945, 1.0756)]
    assert log.final == ("quantized_ttt_phased", 2.31944212, 1.05989454)
    assert log.values["bytes_total"] == "15897259"


def test_a_score_of_a_part_of_the_split_is_no_result():
    line = "final_int8_zlib_roundtrip_exact val_loss:3.1 val_bpb:1.2 partial:100_targets eval_method:flat"
    assert record.parse_log(line).final is None


@settings(max_examples=50)
@given(st.text())
def test_any_text_is_a_log(text):
    record.parse_log(text)
    record.parse_log("\n".join(f"step:1/2 train_loss:{part} val_bpb:{part}" for part in text.split()))


KEYS = "\n".join(" ".join(f"k{line}_{i}:1" for i in range(201)) for line in range(100))


@pytest.mark.parametrize(
    "text",
    ["\n" * 100_001, "a\r" * 100_001, "\u2028" * 100_001, KEYS],
    ids=["lines", "lines of old editors", "lines of Unicode", "keys"],
)
def test_a_log_of_more_than_a_run_prints_is_refused(text):
    """4 MB of keys took 53 MiB."""
    with pytest.raises(ValueError, match="a log has more than"):
        record.parse_log(text)


# --- Published folders ---


def published(folder: Path, **changes: Any) -> Path:
    """A folder as the published challenge accepts it."""
    claims = {
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
    (folder / "submission.json").write_text(json.dumps(claims | changes))
    (folder / "README.md").write_text("# Naive Baseline\n")
    (folder / "train.log").write_text(PUBLISHED_LOG)
    (folder / "train_gpt.py").write_text("print('x')\n")
    return folder


def test_a_published_folder_imports_with_a_list_of_what_it_lacks(tmp_path):
    found = import_published(published(tmp_path / "x"))
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
    found = import_published(folder)
    names = {"val_bpb": 1.065, "bytes_total": 15_900_000, "hardware": "1xRTX5090", "torch": "2.9.1"}
    assert names.items() <= found.known.items()
    assert {f"the log of seed {seed}" for seed in ("42", "0", "7")} <= set(found.missing)
    assert any("'no_slot'" in text for text in found.missing)


def test_folders_that_lack_everything_import_too(tmp_path, capsys):
    found = import_published(tmp_path)
    assert {"submission.json", "any training log", "README.md", "train_gpt.py"} <= set(found.missing)
    (tmp_path / "submission_ternary.json").write_text('{"val_bpb": 1.2}')
    assert "submission.json (it has submission_ternary.json)" in import_published(tmp_path).missing
    assert submission.main(["import", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["known"] == {"val_bpb": 1.2}


def verdict_lines(folder: Path) -> dict[str, str]:
    """The lines of a verdict by their first words."""
    lines = verdict_on(folder, import_published(folder))
    return {re.split(r"[:,] ", line)[0]: line for line in lines}


def test_a_verdict_follows_from_files_and_logs(tmp_path):
    """The published baseline: its limits, class, seed and score, in this order; what is missing comes after them."""
    folder = published(tmp_path / "x")
    lines = verdict_on(folder, import_published(folder))
    found = verdict_lines(folder)
    n_code = len("print('x')\n")
    size = found["ok   size"]
    assert f"{n_code:,} bytes of train_gpt.py" in size
    assert f"make {n_code + 15_815_847:,} of 16,000,000 allowed" in size
    assert "submission.json says 15,863,489" in size
    assert "600.0 s at most (seed 1337), 0.04 s more than the 600 allowed" in found["FAIL training"]
    assert "1.4 s" in found["ok   evaluation"]
    assert "world_size 8" in found["ok   hardware"]
    assert found["Class A"].endswith("(final_int8_zlib_roundtrip_exact).")
    assert "17,059,912" in found["Seeds"]
    assert "1.22437 over 1 log, as submission.json says" in found["Score"]
    assert lines[-1].startswith("FAILS 1 of 4 limits: training.")
    order = [lines.index(found[name]) for name in ("ok   size", "Class A", "Seeds", "Score")]
    assert order == sorted(order)
    assert max(order) < min(i for i, line in enumerate(lines) if line.startswith("Missing"))


def test_code_counts_as_it_lies_in_the_folder(tmp_path):
    """A log that counts compressed code is under the limit, and the folder as it is over it. Its score is class B."""
    folder = published(tmp_path / "x", val_bpb=1.0611, seeds=[42, 0])
    (folder / "train.log").unlink()
    (folder / "train_gpt.py").write_bytes(b"#" * 158_429)
    for seed, bpb in ((42, 1.05989454), (0, 1.06124613)):
        (folder / f"train_seed{seed}.log").write_text(
            "model_params: 35943512\n"
            "4945/20000 val_loss: 2.3539 val_bpb: 1.0756\n"
            "stopping_early: wallclock_cap train_time: 599592ms step: 4945/20000\n"
            "Serialized model quantized+pergroup: 15865260 bytes\n"
            "Total submission size quantized+pergroup: 15897259 bytes\n"
            "diagnostic quantized val_loss:2.3401 val_bpb:1.0693 eval_time:100ms\n"
            f"quantized_ttt_phased val_loss:2.31944212 val_bpb:{bpb} eval_time:508800ms\n"
        )
    found = verdict_lines(folder)
    total = 158_429 + 15_865_260
    assert f"make {total:,}, {total - 16_000_000:,} more than the 16,000,000 allowed" in found["FAIL size"]
    assert "599.6 s" in found["ok   training"]
    assert "508.8 s" in found["ok   evaluation"]
    assert "quantized_ttt_phased" in found["Class B"]
    assert "35,943,512" in found["Seeds"]
    scores = [1.05989454, 1.06124613]
    assert f"{statistics.fmean(scores):.5f}, standard deviation {statistics.stdev(scores):.5f}" in found["Score"]
    assert "another score" in found["Score"], "1.0611 is not the mean of these two"
    lacking = " ".join(import_published(folder).missing)
    assert "model_params" not in lacking
    assert "train_seconds" not in lacking


@pytest.mark.parametrize(("n_bytes", "fits"), [(151_080_363, True), (151_078_222, True), (155_769_746, False)])
def test_another_export_of_the_text_is_seen_by_its_bytes(tmp_path, n_bytes, fits):
    """The merged records were divided by the first two numbers of bytes, and the published baseline by the third."""
    loss = 2.07269931
    n_tokens = 62_021_632
    bpb = loss / math.log(2) * n_tokens / n_bytes
    folder = published(tmp_path / "x", val_bpb=bpb)
    (folder / "train.log").write_text(
        f"val_loader:x tokens:{n_tokens}\nfinal_exact val_loss:{loss} val_bpb:{bpb:.8f}\n"
    )
    line = verdict_lines(folder)["Text"]
    assert f"{n_bytes / 1e6:.1f}"[:3] in line
    assert ("which fits the published FineWeb" in line) is fits


def test_files_of_another_name_are_named_beside_what_is_missing(tmp_path):
    folder = published(tmp_path / "x")
    (folder / "train.log").rename(folder / "binary_log.txt")
    (folder / "train_gpt.py").rename(folder / "train_gpt_cuda_binary.py")
    (folder / "README.md").unlink()
    (folder / "notes.txt").write_text("nothing\n")
    found = import_published(folder)
    missing = [line for line in verdict_on(folder, found) if line.startswith("Missing: ")]
    assert any("train_gpt.py" in line and "train_gpt_cuda_binary.py" in line for line in missing)
    assert any("binary_log.txt" in line for line in missing)
    assert "Missing: README.md." in missing
    assert found.seeds["1337"]["log_val_bpb"] == 1.2243657
    assert not any("notes.txt" in line for line in missing)


@pytest.mark.parametrize(("claim", "letter"), [(1.1509, "A"), (1.28036136, "B"), (1.5, "B")])
def test_the_class_is_that_of_the_score_that_is_claimed(tmp_path, claim, letter):
    """A run may report a score after training at test time, and another one before it."""
    folder = published(tmp_path / "x", val_bpb=claim)
    (folder / "train.log").write_text(
        "final_int6_sliding_window_exact val_loss:1.94321685 val_bpb:1.15088552\n"
        "legal_ttt_exact val_loss:2.16183080 val_bpb:1.28036136\n"
    )
    [line] = [line for line in verdict_on(folder, import_published(folder)) if line.startswith("Class")]
    assert line.startswith(f"Class {letter}")
    assert "legal_ttt_exact" in line


def test_the_verdict_comes_before_the_json(tmp_path, capsys):
    folder = published(tmp_path / "x", name="evil \x1b[8m\nFAIL")
    assert submission.main(["import", str(folder)]) == 0
    verdict, _, rest = capsys.readouterr().out.partition("\n\n{")
    assert verdict.splitlines()[-1].startswith("FAILS 1 of 4 limits")
    assert "\x1b" not in verdict
    assert json.loads("{" + rest)["known"]["val_bpb"] == 1.2243657


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
NAMES = sorted({*(f.name for f in dataclasses.fields(record.Submission)), "seeds", "seed_results", "gpu", "base_pr"})


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_any_published_json_imports(tmp_path_factory, told):
    folder = published(tmp_path_factory.mktemp("x"), **told)
    assert verdict_on(folder, import_published(folder))


# --- The schema ---


@pytest.fixture
def claims() -> dict[str, Any]:
    """The submission.json of a record of this repository."""
    return json.loads((record.record_folders()[0] / "submission.json").read_text())


def test_a_submission_is_read_and_written_without_loss(claims, tmp_path):
    made = record.from_json(record.Submission, claims, "submission.json")
    assert isinstance(made.seed_results["1"], record.SeedResult)
    record.save_submission(tmp_path, made)
    assert record.load_submission(tmp_path) == made


def test_every_fault_is_named(claims):
    claims |= {"val_bpb": "low", "no_slot": True, "predictor_class": "C", "val_bpb_std": [], "settings": 3, "name": " "}
    claims["seed_results"]["1"]["steps"] = 2.5
    del claims["author"]
    found = record.faults(claims, record.Submission, "x")
    names = {fault.split()[0] for fault in found}
    tops = ("author", "name", "no_slot", "predictor_class", "settings", "val_bpb", "val_bpb_std")
    assert names == {f"x.{name}" for name in (*tops, "seed_results.1.steps")}
    with pytest.raises(ValueError, match=re.escape("; ".join(found))):
        record.from_json(record.Submission, claims, "x")


@pytest.mark.parametrize("changes", [{"seed_results": {}}, {"benchmarks": ""}, {}], ids=["seeds", "benchmarks", "keys"])
def test_no_more_faults_are_looked_for_than_are_shown(claims, changes):
    """1.7 MB of empty seeds took 230 MB for messages that nobody reads."""
    for key, value in changes.items():
        claims[key] = {str(i): value for i in range(20_000)}
    if not changes:
        claims |= {str(i): 0 for i in range(20_000)}
    assert len(record.faults(claims, record.Submission, "x")) <= 2 * record.MAX_FAULTS


def test_too_many_seeds_or_reviews_are_refused(tmp_path, claims):
    """The runs of all seeds are kept, and reviews are looked through for each."""
    claims["seed_results"] = {str(i): claims["seed_results"]["1"] for i in range(record.MAX_SEEDS + 1)}
    (tmp_path / "submission.json").write_text(json.dumps(claims))
    with pytest.raises(ValueError, match="101 seeds"):
        record.load_submission(tmp_path)
    (tmp_path / "reviews.json").write_text("[" + "{}," * record.MAX_REVIEWS + "{}]")
    with pytest.raises(ValueError, match="501 reviews"):
        record.load_reviews(tmp_path)


@pytest.mark.parametrize("name", ["name", "author", "github_id", "blurb", "licence"])
def test_a_text_that_says_nothing_is_refused(claims, name):
    for blank in ("", " \t\n"):
        [fault] = record.faults(claims | {name: blank}, record.Submission, "x")
        assert fault.startswith(f"x.{name} is {blank!r}")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (float, [1, 0.5, -2.0], [math.nan, math.inf, True, "1", None, 10**400]),
        (int, [0, -3], [1.0, True, "1", None]),
        (bool, [True], [1, "true", None]),
        (bool | None, [False, None], [0, "null"]),
        (str, ["", "x"], [1, None, ["x"]]),
        (tuple[str, ...], [[], ["x"]], ["x", [1], {"x": 1}]),
        (dict[str, float], [{}, {"x": 1.0}], [[], {"x": "1"}, None]),
    ],
)
def test_a_value_of_another_type_is_a_fault(kind, good, bad):
    assert all(record.faults(value, kind, "x") == [] for value in good)
    assert all(record.faults(value, kind, "x") != [] for value in bad)


def test_the_tracks_can_be_read_and_keep_the_published_limits():
    version, tracks = record.load_tracks()
    main = tracks["track_10min_16mb"]
    assert version >= 1
    assert (main.max_total_bytes, main.max_train_seconds, main.max_eval_seconds) == (16_000_000, 600, 600)
    assert (main.world_size, main.min_gain, main.p_value) == (8, 0.002, 0.01)
    assert {"track_speedrun", "track_slowrun", "track_tiny_100m", "track_1gpu_10min_16mb"} <= tracks.keys()


# --- new ---


def run_json(folder: Path, seed: int, **changes: Any) -> Path:
    """The JSON and the log of a run that could have been, with results that follow from its seed."""
    run: dict[str, Any] = dict.fromkeys(record.script_settings(SCRIPT.read_text()), 1)
    run |= dict.fromkeys(record.COPIED_TO_SEED_RESULT, 1)
    run |= {
        "preset": "smoke",
        "seed": seed,
        "run_id": f"r{seed}",
        "eval_artifact": "",
        "partial": False,
        "settings_changed": {"MODEL_DIM": 64, "SEED": seed, "OUT_DIR": "x"},
        "date": "2026-01-02T03:04:05Z",
        "python": "3",
        "torch": "2",
        "device": "cpu:x",
        "world_size": 1,
        "code_sha256": record.sha256(SCRIPT.read_bytes()),
        "judge_version": 2,
        "model_params": 5,
        "val_tokens": 7,
        "val_documents": 2,
        "val_bytes": 20,
        "val_accounting": "sidecar",
        "val_shards_sha256": "0",
        "val_text_sha256": "0",
        "tokenizer_sha256": "0",
        "tokenizer_lossless": True,
        "train_dataset": "x",
        "train_tokens": 9,
        "data_path": "data/datasets/x",
        "tokenizer_path": "data/tokenizers/x.model",
        "artifact_sha256": record.sha256(f"weights {seed}".encode()),
        "steps": 30,
        "val_loss": 2.0 + seed / 100,
        "val_bpb": 1 + seed / 100,
        "bytes_code": 10,
        "bytes_artifact": 100 + seed,
        "bytes_total": 110 + seed,
        "seconds_train": 5.0,
        "seconds_calibrate": 0.5,
        "seconds_evaluate": 2.0,
        **changes,
    }
    path = folder / str(run["run_id"]) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))
    path.with_name("log.txt").write_text("step:1/2 train_loss:3\n")
    return path


def new(tmp_path: Path, *more: str) -> tuple[int, Path]:
    """The exit status of `new`, and the folder that it should have made."""
    about = ["--track", "track_non_record_16mb", "--name", "An Idea!", "--github-id", "ada", "--blurb", "It is new."]
    places = ["--author", "Ada", "--out-dir", str(tmp_path / "runs"), "--records", str(tmp_path / "records")]
    status = submission.main(["new", *about, *places, *more])
    return status, tmp_path / "records" / "track_non_record_16mb" / "2026-01-02_An-Idea"


def test_new_takes_every_seed_that_was_run(tmp_path):
    for seed in (3, 1, 2):
        run_json(tmp_path / "runs", seed)
    run_json(tmp_path / "runs", 9, run_id="other", model_dim=2)
    run_json(tmp_path / "runs", 8, run_id="part", partial=True)
    run_json(tmp_path / "runs", 7, run_id="scored", eval_artifact="x.ptz")
    last = run_json(tmp_path / "runs", 4)
    status, folder = new(tmp_path)
    assert status == 0
    s = record.load_submission(folder)
    assert list(s.seed_results) == ["1", "2", "3", "4"]
    assert s.val_bpb == pytest.approx(1.025)
    assert s.val_bpb_std == pytest.approx(statistics.stdev([1.01, 1.02, 1.03, 1.04]))
    assert (s.bytes_total, s.train_seconds) == (114, 5.5)
    assert record.run_path(folder, "4").read_bytes() == last.read_bytes()
    assert record.script_path(folder).read_bytes() == SCRIPT.read_bytes()
    assert "It is new." in (folder / "README.md").read_text()


def launched(command: str, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
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
    known = {name.upper() for name in record.script_settings(SCRIPT.read_text())}
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
    changed = {"MODEL_DIM": 64, "SHUFFLE": False, "DOCUMENT_MASKS": True, "RUN_ID": "a b", "CODEC": "x y,$z"}
    changed |= {"SEED": 5, "DATA_PATH": "/my data/set_sp1024", "OUT_DIR": "x", "MIN_LR": 0.25}
    run_json(tmp_path / "runs", 5, settings_changed=changed, **where | run)
    status, folder = new(tmp_path)
    assert status == 0
    commands = (folder / "README.md").read_text().split("```")[1].removeprefix("bash\n").splitlines()
    name = f"records/{folder.parent.name}/{folder.name}"
    assert commands[0] == f"python tools/verify.py {name}"
    arguments, given = launched(commands[1], tmp_path)
    assert arguments == [*launcher, f"{name}/train_gpt.py"]
    assert given == {
        "PRESET": "smoke",
        "MODEL_DIM": "64",
        "SHUFFLE": "0",
        "DOCUMENT_MASKS": "1",
        "CODEC": "x y,$z",
        "MIN_LR": "0.25",
        "DATA_PATH": "./data/datasets/set_sp1024",
        "TOKENIZER_PATH": tokenizer,
        "SEED": "5",
        "OUT_DIR": "/tmp/again",
    }


def test_a_run_that_does_not_say_what_was_changed_is_repeated_with_all_its_settings(tmp_path):
    path = run_json(tmp_path / "runs", 1, preset="baseline", model_dim=96)
    run = json.loads(path.read_text())
    del run["settings_changed"]
    path.write_text(json.dumps(run))
    folder = new(tmp_path)[1]
    _, given = launched((folder / "README.md").read_text().split("```")[1].splitlines()[-1], tmp_path)
    settings = record.load_submission(folder).settings
    assert {name.upper(): str(value) for name, value in settings.items()}.items() <= given.items()
    assert (given["PRESET"], given["MODEL_DIM"]) == ("baseline", "96")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"partial": True}, "run r2"),
        ({"code_sha256": "1"}, "code_sha256"),
        ({"val_shards_sha256": "1"}, "val_shards_sha256"),
        ({"train_tokens": 10}, "train_tokens"),
        ({"model_dim": 2}, "model_dim"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(tmp_path, capsys, changes, named):
    first = run_json(tmp_path / "runs", 1)
    second = run_json(tmp_path / "runs", 2, **changes)
    status, folder = new(tmp_path, "--runs", str(first), str(second))
    assert status == 1
    assert named in capsys.readouterr().err
    assert not folder.exists()


def test_one_seed_run_twice_is_refused_with_a_command_that_works(tmp_path, capsys):
    logs = tmp_path / "log s"
    late = run_json(logs, 1, run_id="late", date="2026-01-03T00:00:00Z")
    early = run_json(logs, 1, run_id="early")
    other = run_json(logs, 2)
    for named in ([], ["--runs", str(late), str(early), str(other)]):
        assert new(tmp_path, "--out-dir", str(logs), *named)[0] == 1
        error = capsys.readouterr().err
        assert "seed 1 was run 2 times" in error
        advice = shlex.split(error[error.index("--runs") :])
        assert sorted(advice) == sorted(["--runs", str(early), str(other)])
    status, folder = new(tmp_path, *advice)
    assert status == 0
    assert record.run_path(folder, "1").read_bytes() == early.read_bytes()


@pytest.mark.parametrize("other", [{"val_shards_sha256": "1"}, {"tokenizer_sha256": "1"}, {"device": "cpu:y"}])
def test_runs_with_the_same_settings_but_other_data_or_hardware_are_left_out_and_named(tmp_path, capsys, other):
    left_out = run_json(tmp_path / "runs", 1, run_id="other", **other)
    run_json(tmp_path / "runs", 1)
    run_json(tmp_path / "runs", 2)
    status, folder = new(tmp_path)
    assert status == 0
    assert sorted(json.loads(record.run_path(folder, seed).read_text())["run_id"] for seed in "12") == ["r1", "r2"]
    [line] = capsys.readouterr().err.splitlines()
    assert str(left_out) in line
    assert next(iter(other)) in line


def test_files_among_the_runs_that_are_none_are_skipped_and_named(tmp_path, capsys):
    runs = tmp_path / "runs"
    first = run_json(runs, 1)
    strange = {"list": "[1, 2]", "half": '{"steps": 3, "val_', "tool": '{"steps": 3, "version": "1.0"}', "text": '"x"'}
    for name, text in strange.items():
        (runs / name).mkdir()
        (runs / name / "run.json").write_text(text)
    (runs / "folder" / "run.json").mkdir(parents=True)
    (runs / "latest").symlink_to(first.parent)
    status, folder = new(tmp_path)
    assert status == 0
    assert list(record.load_submission(folder).seed_results) == ["1"]
    lines = capsys.readouterr().err.splitlines()
    named = sorted(line.split(": ")[0] for line in lines)
    assert named == sorted(f"skipped {runs / name / 'run.json'}" for name in strange)


@pytest.mark.parametrize("text", ["[1, 2]", '{"steps": 3}', '{"steps": 3, ', None])
def test_a_file_that_is_no_run_cannot_be_named_as_one(tmp_path, capsys, text):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    assert new(tmp_path, "--runs", str(path))[0] == 1
    error = capsys.readouterr().err
    assert "other.json" in error
    assert error.count("\n") == 1


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(record.run_types())), VALUES)
def test_a_run_with_a_value_of_another_type_is_an_error_not_a_crash(tmp_path, name, value):
    path = run_json(tmp_path / "runs", 1)
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {name: value}))
    status, folder = new(tmp_path, "--runs", str(path))
    assert status in (0, 1)
    shutil.rmtree(folder.parent, ignore_errors=True)


def test_the_script_must_be_the_one_that_ran(tmp_path, capsys):
    path = run_json(tmp_path / "runs", 1, code_sha256="1")
    assert new(tmp_path, "--runs", str(path))[0] == 1
    assert "give --script the one that ran" in capsys.readouterr().err
    script = tmp_path / "train_gpt.py"
    for source in ("def main(:\n", "\0"):
        script.write_text(source)
        assert new(tmp_path, "--script", str(script))[0] == 1
        assert "the script is not Python" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--name", ["日本語モデル", " .- "]),
        ("--date", ["2026/11/24", "tomorrow", "2026-02-30", "20260102"]),
        ("--github-id", [" "]),
        ("--blurb", [" "]),
        ("--licence", [""]),
        ("--track", ["track_of_nobody"]),
    ],
)
def test_an_option_that_says_nothing_is_refused_by_name(tmp_path, capsys, option, values):
    run_json(tmp_path / "runs", 1)
    for value in values:
        assert new(tmp_path, option, value)[0] == 1
        assert option in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


def test_the_author_is_the_one_that_git_knows(tmp_path, capsys, monkeypatch):
    run_json(tmp_path / "runs", 1)
    monkeypatch.setattr(submission, "git_user_name", lambda: "")
    assert new(tmp_path, "--author", "")[0] == 1
    assert "--author" in capsys.readouterr().err
    monkeypatch.setattr(submission, "git_user_name", lambda: "Grace")
    status, folder = new(tmp_path, "--author", "")
    assert status == 0
    assert record.load_submission(folder).author == "Grace"


@pytest.mark.parametrize("name", ["An Idea!", "../up", "a/b", "日本 v2", "_x", "x" * 80])
def test_every_folder_that_new_makes_has_a_name_that_verify_accepts(tmp_path, name):
    run_json(tmp_path / "runs", 1)
    assert new(tmp_path, "--name", name)[0] == 0
    [folder] = (tmp_path / "records" / "track_non_record_16mb").iterdir()
    assert record.FOLDER_NAME.fullmatch(folder.name)


def test_a_record_is_written_whole_or_not_at_all_and_never_over_another(tmp_path, capsys):
    run_json(tmp_path / "runs", 1)
    log = run_json(tmp_path / "runs", 2).with_name("log.txt")
    log.unlink()
    status, folder = new(tmp_path)
    assert status == 1
    assert str(log) in capsys.readouterr().err
    assert list(folder.parent.iterdir()) == []

    log.write_text("step:1/2 train_loss:3\n")
    assert new(tmp_path)[0] == 0
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert new(tmp_path)[0] == 1
    assert "choose another --name" in capsys.readouterr().err


def test_new_without_a_run_says_so(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    assert new(tmp_path)[0] == 1
    assert "train first" in capsys.readouterr().err


def test_the_artifact_is_that_of_whichever_run_still_has_one(tmp_path, capsys):
    data = tmp_path / "shards"
    data.mkdir()
    for name in ("fineweb_val_000000.bin", "manifest.json", "sp.model"):
        (data / name).write_text(name)
    where = {"data_path": str(data), "tokenizer_path": str(data / "sp.model")}
    for seed in (1, 2):
        run_json(tmp_path / "runs", seed, artifact_sha256=record.sha256(f"weights {seed}".encode()), **where)
    artifact = tmp_path / "runs" / "r2" / "final_model.int8.ptz"
    assert new(tmp_path, "--artifact")[0] == 1
    artifact.write_text("weights of another run")
    assert new(tmp_path, "--artifact")[0] == 1
    assert str(artifact.parent) in capsys.readouterr().err
    artifact.write_text("weights 2")
    status, folder = new(tmp_path, "--artifact")
    assert status == 0
    assert "the artifact of seed 2" in capsys.readouterr().out
    assert (folder / artifact.name).read_text() == "weights 2"
    assert (folder / "data" / "tokenizer.model").read_text() == "sp.model"


@pytest.mark.parametrize(("name", "slug"), [("Ünï", "Uni"), ("Étude no. 2", "Etude-no.-2"), ("a/b", "a-b")])
def test_a_folder_is_named_in_latin_letters(name, slug):
    assert submission.folder_slug(name) == slug


def test_one_artifact_for_two_runs_is_refused(tmp_path, capsys):
    """Two runs in one folder once left one artifact, which both called theirs."""
    for seed in (1, 2):
        run_json(tmp_path / "runs", seed, artifact_sha256="0")
    status, folder = new(tmp_path)
    assert status == 1
    assert "one and the same artifact" in capsys.readouterr().err
    assert not folder.exists()


def test_git_changes_no_byte_of_a_record(tmp_path):
    """Not even where it writes the line ends of Windows, as Git for Windows does by default."""
    project = tmp_path / "project"
    folder = project / "records" / "track_x" / "2026-01-01_X"
    folder.mkdir(parents=True)
    shutil.copyfile(record.ROOT / ".gitattributes", project / ".gitattributes")
    (folder / "train_gpt.py").write_bytes(b"x = 1\ny = 2\n")
    (folder / "train_seed1.log").write_bytes(b"a\r\nb\n")
    git = ["git", "-c", "core.autocrlf=true", "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=project, check=True, capture_output=True)
    subprocess.run([*git, "clone", "-q", str(project), str(tmp_path / "clone")], check=True, capture_output=True)
    for path in folder.iterdir():
        assert (tmp_path / "clone" / path.relative_to(project)).read_bytes() == path.read_bytes()


def test_new_says_at_once_what_the_track_refuses(tmp_path, capsys):
    """All of it, before anything is written; the limits are those of the published challenge."""
    for seed in (1, 2):
        run_json(tmp_path / "runs", seed, bytes_total=16_000_001 + seed, seconds_train=600.5, seconds_evaluate=700.0)
    options = ["--track", "track_10min_16mb"]
    assert new(tmp_path, *options)[0] == 1
    error = capsys.readouterr().err
    for named in (
        "H100",
        "8x H100",
        "2 seeds",
        "16,000,002",
        "16,000,003",
        "601.00 s of training",
        "700.00 s of eval",
    ):
        assert named in error
    assert "the published FineWeb validation text" in error
    assert "track_slowrun" in error.splitlines()[-1]
    assert "track_non_record_16mb" not in error, "it is too large for that one, too"
    assert not (tmp_path / "records").exists()

    assert new(tmp_path, *options, "--force")[0] == 0
    [folder] = (tmp_path / "records" / "track_10min_16mb").iterdir()
    failing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tools/verify.py will fail it")]
    names = {check.name for check in verify.static_checks(folder) if not check.ok}
    assert {line.split(": ")[1] for line in failing} == names >= {"track", "seeds", "bytes", "clock"}


def test_new_refuses_by_the_very_rules_of_verify(tmp_path):
    """Whatever a track asks for: a fault is found by both or by neither."""
    runs = {"device": "cuda:NVIDIA_H100", "world_size": 8, "val_documents": 50_000, "val_bytes": 151_080_363}
    for seed in (1, 2, 3):
        run_json(tmp_path / "runs", seed, val_text_sha256="unknown", val_accounting="pieces", **runs)
    status, folder = new(tmp_path, "--track", "track_10min_16mb")
    assert status == 0
    s = record.load_submission(tmp_path / "records" / "track_10min_16mb" / folder.name)
    for name, track in record.load_tracks()[1].items():
        moved = dataclasses.replace(s, track=name)
        logs = {seed: record.parse_log("step:1/2 train_loss:3 train_time:1ms\n") for seed in s.seed_results}
        place = tmp_path / name / folder.name
        checks = [
            verify.check_track(place, moved),
            verify.check_seeds(place, moved),
            verify.check_bytes(place, moved),
            verify.check_clock(moved, logs),
        ]
        found = [check.reason for check in checks if not check.ok]
        faults = verify.refusals(moved, track)
        assert all(any(fault in reason for reason in found) for fault in faults), name
        if not faults:
            assert not any("the track" in reason for reason in found), name


BENCHMARKS = {"wikitext2_bits_per_byte": 1.9, "blimp_accuracy": 0.7, "arc_easy_accuracy": 0.25}


def evaluation(run: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What tools/evaluate.py writes, as far as records need it."""
    tasks = {
        "wikitext2": {"bpb": 1.9},
        "blimp": {"acc": 0.7},
        "arc_easy": {"acc": 0.25},
        "context": {"claimed": 2048, "holds": True},
        "samples": {"samples": [{"prompt": "The", "seed": 1337, "text": "The cat *sat*."}]},
    }
    of_run = {"protocol": "board", "partial": False, "artifact_sha256": run["artifact_sha256"], "tasks": tasks}
    return {**of_run, **changes, "tasks": {**tasks, **changes.get("tasks", {})}}


def tiny(tmp_path: Path, results: Any) -> tuple[int, Path]:
    """`new` in the track that asks for benchmarks."""
    file = tmp_path / "board.json"
    file.write_text(json.dumps(results))
    status, folder = new(tmp_path, "--track", "track_tiny_100m", "--benchmarks", str(file))
    return status, tmp_path / "records" / "track_tiny_100m" / folder.name


@pytest.fixture
def tiny_run(tmp_path) -> dict[str, Any]:
    """The JSON of one of two runs with a context that the track takes."""
    paths = [run_json(tmp_path / "runs", seed, eval_seq_len=2048) for seed in (1, 2)]
    return record.read_json(paths[-1])


def test_record_reports_the_benchmarks_that_its_track_asks_for(tmp_path, tiny_run):
    status, folder = tiny(tmp_path, evaluation(tiny_run))
    assert status == 0
    s = record.load_submission(folder)
    assert s.benchmarks == BENCHMARKS
    assert s.context == 2048
    assert verify.check_track(folder, s).ok
    assert verify.check_benchmarks(folder, s, record.load_tracks()[1][s.track]).ok
    runs = [record.read_run(record.run_path(folder, seed)) for seed in s.seed_results]
    assert record.summarize(runs, record.script_path(folder).read_bytes(), s.about) == s

    card = folder / "README.md"
    text = card.read_text()
    assert "wikitext2_bits_per_byte 1.9000" in text
    assert "    The cat *sat*." in text
    # What is new, only the author can tell.
    assert "still has the comment" in verify.check_card(folder, s).reason
    text = re.sub("<!-- Write here.*?-->", "Nothing.", text)
    card.write_text(text)
    assert verify.check_card(folder, s).ok
    for told in (f"{s.model_params:,}", "2,048", "MIT"):
        card.write_text(text.replace(told, "?"))
        assert "does not tell the" in verify.check_card(folder, s).reason


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"protocol": "lmeval"}, "protocol 'lmeval', the track asks for board"),
        ({"partial": True}, "of a part of the benchmarks only"),
        ({"artifact_sha256": "0" * 64}, "another artifact"),
        ({"tasks": {"blimp": {}}}, "no blimp_accuracy"),
        ({"tasks": {"blimp": {"acc": "0.7"}}}, "no blimp_accuracy"),
        ({"tasks": {"context": {"claimed": 1027, "holds": True}}}, "a context of 1028 tokens"),
        ({"tasks": {"context": {"claimed": 2048, "holds": False}}}, "a context of 1028 tokens"),
        ({"tasks": {"context": {"claimed": 2048, "holds": 1}}}, "a context of 1028 tokens"),
        ({"tasks": {"samples": {"samples": [{"text": " "}, 3]}}}, "no samples"),
        ({"tasks": {"samples": {}}}, "no samples"),
        ({"tasks": {"samples": []}}, "board.json: tasks.samples is []"),
        ({"artifact_sha256": 3}, "board.json: artifact_sha256 is 3"),
    ],
)
def test_benchmarks_that_the_track_does_not_take_are_refused(tmp_path, capsys, tiny_run, changes, named):
    status, folder = tiny(tmp_path, evaluation(tiny_run, **changes))
    assert status == 1
    error = capsys.readouterr().err
    assert named in error
    assert "tools/evaluate.py" in error
    assert not folder.exists()


def test_benchmarks_go_with_a_track_that_asks_for_them(tmp_path, capsys):
    run_json(tmp_path / "runs", 1)
    for options in (["--benchmarks", "file"], ["--track", "track_tiny_100m"]):
        assert new(tmp_path, *options)[0] == 1
        assert "--benchmarks" in capsys.readouterr().err


def test_record_without_its_benchmarks_does_not_verify(tmp_path, tiny_run):
    _, folder = tiny(tmp_path, evaluation(tiny_run))
    s = record.load_submission(folder)
    file = record.benchmarks_path(folder)

    def reason() -> str:
        [check] = [check for check in verify.benchmark_checks(folder, s) if check.name == "benchmarks"]
        return "" if check.ok else check.reason

    assert reason() == ""
    file.write_text(json.dumps(evaluation(tiny_run, tasks={"blimp": {"acc": 0.71}})))
    assert "blimp_accuracy is 0.7 in submission.json and 0.71 in the file" in reason()
    file.write_text(json.dumps(evaluation(tiny_run, artifact_sha256="1" * 64)))
    assert "another artifact" in reason()
    file.unlink()
    assert "benchmarks.json is missing" in reason()
    for licence, is_open in (("AGPL-3.0", True), ("CC-BY-NC-4.0", False), ("proprietary", False)):
        claims = dataclasses.replace(s, licence=licence)
        assert ("licence" not in verify.check_track(folder, claims).reason) == is_open


def test_a_record_of_our_own_lacks_only_its_artifact(tmp_path):
    final = "final_int8_zlib_roundtrip_exact val_loss:2.01000000 val_bpb:1.01000000"
    for seed in (1, 2):
        run_json(tmp_path / "runs", seed).with_name("log.txt").write_text(f"{final}\n")
    folder = new(tmp_path)[1]
    found = import_published(folder)
    [missing] = found.missing
    assert missing.startswith("the artifact")
    assert found.seeds["1"]["val_bpb"] == 1.01
    claims = record.read_json(folder / "submission.json")
    for odd in ([], "x", None):
        (folder / "submission.json").write_text(json.dumps(claims | {"seed_results": odd}))
        assert "submission.json: seed_results" in import_published(folder).missing


# --- Reviews ---


def test_reviews_are_kept_in_order(tmp_path):
    first = record.Review("2026-01-01", "a", "rescored", "0", val_bpb=1.5)
    second = record.Review("2026-01-02", "b", "disputed", "0", note="why")
    record.add_review(tmp_path, first)
    record.add_review(tmp_path, second)
    assert record.load_reviews(tmp_path) == [first, second]
    (tmp_path / "reviews.json").write_text('[{"kind": "praised"}]')
    with pytest.raises(ValueError, match="praised"):
        record.load_reviews(tmp_path)


def test_an_objection_can_be_made_and_settled(tmp_path):
    run_json(tmp_path / "runs", 1)
    folder = new(tmp_path)[1]
    for kind in ("disputed", "settled"):
        assert submission.main(["review", str(folder), "--kind", kind, "--reviewer", "b", "--note", "why"]) == 0
    assert [r.kind for r in record.load_reviews(folder)] == ["disputed", "settled"]
