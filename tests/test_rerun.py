"""tools/verify.py --rerun and --unseen: a score that comes from the validation text itself does not come again."""

from __future__ import annotations

from pathlib import Path

import pytest
import record as sub
import sandbox
import submission
import verify

from records import failed, options, rescored

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(sandbox.isolation() != "namespaces", reason="no user namespaces here")
def test_training_on_the_validation_text_is_caught(text, tmp_path, run_script, record_settings):
    """A script that memorises the validation split scores well, until the split is hidden while it trains."""
    script = tmp_path / "train_gpt.py"
    source = (ROOT / "train_gpt.py").read_text()
    script.write_text(source.replace('"fineweb_train_[0-9]*.bin"', '"fineweb_val_[0-9]*.bin"'))
    assert script.read_text() != source
    settings = {**record_settings, "DATA_PATH": str(text), "TOKENIZER_PATH": str(text / "tokenizer.model")}
    settings |= {"ITERATIONS": "120", "MODEL_DIM": "64", "MAX_WEIGHT_BITS": "8", "TRAIN_LOG_EVERY": "50"}
    run = run_script(str(script), **settings, SEED="1", ARTIFACT_DIR=str(tmp_path))
    assert run.status == 0, run.err
    what = ["--track", "track_non_record_16mb", "--name", "Cheat", "--github-id", "x", "--blurb", "b", "--author", "y"]
    files = ["--records", str(tmp_path), "--runs", str(run.folder / "logs" / "run.json"), "--script", str(script)]
    assert submission.main(["new", *what, "--artifact", *files]) == 0
    folder = next((tmp_path / "track_non_record_16mb").iterdir())
    assert failed(verify.static_checks(folder)) == set()
    assert failed(rescored(folder, unseen=text.parent / "unseen")) == {"unseen"}
    checks, _ = verify.rerun(folder, sub.load_submission(folder), options(folder, data=text, run_seed="1"))
    assert failed(checks) == {"rerun"}, checks
