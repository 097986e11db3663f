"""tools/rerun.py: an honest record trains again to its score; one that comes from the validation text does not."""

from __future__ import annotations

import ast
import dataclasses
import io
import shutil
import sys
import time
import tokenize
from pathlib import Path

import judge
import numpy as np
import pytest
import record
import rerun
import sandbox
import submission
import verify
from shards import read_shard

import train_gpt as tg
from records import TRACK, failed, options_for, rescored

ROOT = Path(__file__).resolve().parents[1]
SMOKE = next((record.RECORDS / TRACK).glob("*_Smoke-test"))
ABOUT = ["--track", "track_non_record_16mb", "--github-id", "x", "--blurb", "b", "--author", "y"]

needs_walls = pytest.mark.skipif(sandbox.isolation() != "namespaces", reason="no namespaces here")


def made_record(run_script, script: Path, records: Path, text: Path, **settings: str) -> Path:
    """A record of one run of a script, with its artifact."""
    settings |= {"DATA_PATH": str(text), "TOKENIZER_PATH": str(text / "tokenizer.model")}
    run = run_script(str(script), **settings, SEED="1")
    assert run.status == 0, run.err
    files = ["--records", str(records), "--runs", str(run.run_folder / "run.json"), "--script", str(script)]
    assert submission.main(["new", *ABOUT, "--name", "Made", "--artifact", *files]) == 0
    return next((records / "track_non_record_16mb").iterdir())


@pytest.mark.slow
@needs_walls
def test_an_honest_record_trains_again_to_what_it_claims(text, tmp_path, run_script, record_settings):
    folder = made_record(run_script, ROOT / "train_gpt.py", tmp_path, text, **record_settings)
    claims = record.load_submission(folder)
    options = options_for(folder, data=text, unseen=text.parent / "unseen")
    checks, scores = rerun.rerun(folder, claims, options, "1", 200.0)
    assert failed(checks) == set(), checks
    assert {"train", "curve", "unseen", "rerun"} <= {check.name for check in checks}
    assert scores is not None
    assert scores.bpb == pytest.approx(claims.seed_results["1"].val_bpb, abs=1e-3)


@pytest.mark.slow
@needs_walls
def test_training_on_the_validation_text_is_caught(text, tmp_path, run_script, record_settings):
    """A script that memorises the validation split scores well, until the split is hidden while it trains."""
    source = (ROOT / "train_gpt.py").read_text()
    script = tmp_path / "train_gpt.py"
    script.write_text(source.replace('"fineweb_train_[0-9]*.bin"', '"fineweb_val_[0-9]*.bin"'))
    assert script.read_text() != source
    longer = {"ITERATIONS": "120", "MODEL_DIM": "64", "MAX_WEIGHT_BITS": "8", "TRAIN_LOG_EVERY": "50"}
    folder = made_record(run_script, script, tmp_path, text, **record_settings, **longer)

    assert failed(verify.static_checks(folder)) == set()
    assert failed(rescored(folder, unseen=text.parent / "unseen")) == {"unseen"}
    checks, _ = rerun.rerun(folder, record.load_submission(folder), options_for(folder, data=text), "1", 200.0)
    assert failed(checks) == {"rerun"}, checks


@pytest.mark.parametrize(
    "source",
    [
        "# weights\nx = '# no comment'  # one\n",
        'def f():  # a\n    """# text"""\n    return (  # b\n        1\n    )\n',
        "x = 1 # \u00e9\u4e16\ny = f'{x} # {x!r}'\r\n",
    ],
)
def test_a_script_runs_without_its_comments(source):
    """What is left is the same program, line by line."""
    bare = rerun.without_comments(source.encode()).decode()
    assert ast.dump(ast.parse(bare), include_attributes=True) == ast.dump(ast.parse(source), include_attributes=True)
    for comment in ("weights", "one", "# a", "# b", "\u4e16"):
        assert comment not in bare


def test_the_comments_of_the_whole_script_are_left_out():
    source = (ROOT / "train_gpt.py").read_bytes()
    bare = rerun.without_comments(source)
    assert ast.dump(ast.parse(bare)) == ast.dump(ast.parse(source))
    kinds = {token.type for token in tokenize.tokenize(io.BytesIO(bare).readline)}
    assert tokenize.COMMENT not in kinds


def retrained(tmp_path: Path, losses: list[float], seconds: float = 100.0, **changed: object) -> rerun.Retrained:
    """A new training of the smoke record's first seed, with these training losses at steps 1, 2 ..."""
    run = record.read_json(record.run_path(SMOKE, "1")) | changed
    log = "".join(f"step:{step}/9 train_loss:{loss} train_time:1ms\n" for step, loss in enumerate(losses, 1))
    artifact = tmp_path / "final_model.trellis.ptz"
    artifact.write_bytes(b"new")
    return rerun.Retrained(artifact, run, log, seconds)


@pytest.mark.parametrize(
    ("new", "ok"),
    [
        ([7.0, 5.0, 4.0, 3.0], True),
        ([7.1, 4.9, 4.2, 2.9], True),
        ([7.0, 3.0, 3.0, 3.0], False),  # knows at once what it should learn
        ([7.0, 5.0, 4.0], False),  # stops early
        ([], False),
    ],
)
def test_the_losses_have_to_go_down_as_in_the_log(tmp_path, new, ok):
    old = "".join(f"step:{step}/9 train_loss:{loss} train_time:1ms\n" for step, loss in enumerate([7, 5, 4, 3], 1))
    claims = record.load_submission(SMOKE)
    claims = dataclasses.replace(claims, settings=claims.settings | {"max_wallclock_seconds": 0.0})
    assert rerun.check_curve(old, retrained(tmp_path, new), claims).ok == ok


def test_a_training_takes_the_time_that_it_says_and_writes_an_artifact_of_its_own(tmp_path):
    claims = record.load_submission(SMOKE)
    ledger = sum(claims.seed_results["1"].ledger_seconds.values())
    assert rerun.check_training(claims, "1", retrained(tmp_path, [], ledger)).ok
    assert not rerun.check_training(claims, "1", retrained(tmp_path, [], ledger / 3)).ok
    other = retrained(tmp_path, [], ledger)
    shutil.copyfile(record.artifact_path(SMOKE), other.artifact)  # that of another seed
    assert "gives the artifact of seed" in rerun.check_training(claims, "1", other).reason


def test_unseen_text_is_kept_from_the_training(text, tmp_path):
    """The shortened training shard and the unseen text are the old shard, and its bytes are those of the text."""
    settings = {"bos_id": 1, "vocab_size": 320}
    shards = sorted(text.glob("fineweb_train_[0-9]*.bin"))
    training = rerun.Training(Path(), settings, "1", text, text / "tokenizer.model", shards)
    shorter, unseen = rerun.hold_out(training, tmp_path / "unseen")
    left = read_shard(shorter.train_shards[-1])
    kept = read_shard(unseen / "fineweb_val_000000.bin")
    assert np.concatenate((left, kept)).tolist() == read_shard(shards[-1]).tolist()
    assert len(kept) <= len(read_shard(text / "fineweb_val_000000.bin"))

    config = dataclasses.replace(tg.GPTConfig(), vocab_size=320)
    split = judge.load_split(unseen, training.tokenizer, config)
    decoder = judge.Tokenizer(training.tokenizer.read_bytes(), training.tokenizer)
    starts = np.flatnonzero(kept == 1)
    texts = [decoder.decode(ids[1:]) for ids in np.split(np.array(kept), starts)[1:]]
    assert split.bytes.sum() == sum(len(document.encode()) for document in texts)


@needs_walls
def test_a_training_that_writes_without_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(rerun, "MAX_OUT_BYTES", 2**20)
    program = tmp_path / "program.py"
    program.write_text(
        "import time\nfor i in range(100):\n    open(f'/out/{i}', 'wb').write(bytes(2**18))\ntime.sleep(60)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    binds = [sandbox.Bind(program, "/x/program.py"), sandbox.Bind(out, "/out", writable=True)]
    inside = sandbox.Sandboxed(["/x/program.py"], binds, sandbox.Limits(), {})
    with pytest.raises(judge.RecordError, match="bytes"):
        rerun.wait(inside, out, time.monotonic() + 30)
    inside.close()


def test_data_in_a_folder_that_scripts_can_read_are_refused():
    assert sandbox.is_visible(Path(sys.prefix, "lib", "data"))
    assert not sandbox.is_visible(Path(sys.prefix, "data"))
    assert not sandbox.is_visible(ROOT / "data")
