"""tools/rerun.py: an honest record trains again to its score; one that comes from the validation text does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import record
import rerun
import sandbox
import submission
import verify

from records import failed, options_for, rescored

ROOT = Path(__file__).resolve().parents[1]
ABOUT = ["--track", "track_non_record_16mb", "--github-id", "x", "--blurb", "b", "--author", "y"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sandbox.isolation() != "namespaces", reason="no user namespaces here"),
]


def made_record(run_script, script: Path, records: Path, text: Path, **settings: str) -> Path:
    """A record of one run of a script, with its artifact."""
    settings |= {"DATA_PATH": str(text), "TOKENIZER_PATH": str(text / "tokenizer.model")}
    run = run_script(str(script), **settings, SEED="1", ARTIFACT_DIR=str(records))
    assert run.status == 0, run.err
    files = ["--records", str(records), "--runs", str(run.folder / "logs" / "run.json"), "--script", str(script)]
    assert submission.main(["new", *ABOUT, "--name", "Made", "--artifact", *files]) == 0
    return next((records / "track_non_record_16mb").iterdir())


def test_an_honest_record_trains_again_to_what_it_claims(text, tmp_path, run_script, record_settings):
    folder = made_record(run_script, ROOT / "train_gpt.py", tmp_path, text, **record_settings)
    claims = record.load_submission(folder)
    checks, scores = rerun.rerun(folder, claims, options_for(folder, data=text), "1", 200.0)
    assert failed(checks) == set(), checks
    assert scores is not None
    assert scores.bpb == pytest.approx(claims.seed_results["1"].val_bpb, abs=1e-3)


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
