"""Ways to turn an honest record into one that cheats, and to judge it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import judge
import record
import sandbox
import verify

TRACK = "track_non_record_16mb"
HAS_NAMESPACES = sandbox.isolation() == "namespaces"

# A script with this at its end is an honest one of class B.
ADAPTIVE = '''

class Predictor:
    """The model, mixed with how often each token was seen in what was observed."""

    def __init__(self, model):
        self.model = model
        self.config = model.config
        self.counts = torch.ones(model.config.vocab_size, dtype=torch.float64)
        self.past = torch.zeros(0, dtype=torch.int64)

    @torch.inference_mode()
    def predict(self, ids):
        context = self.past[-16:]
        logits = self.model(torch.cat((context, ids))[None])[0, len(context) - 1 : -1]
        cache = self.counts / self.counts.sum()
        return (0.9 * logits.double().softmax(1) + 0.1 * cache).log().float()

    def observe(self, ids):
        self.counts += torch.bincount(ids, minlength=len(self.counts))
        self.past = torch.cat((self.past, ids))[-16:]


def load_predictor(path, device="cpu"):
    return Predictor(load_artifact(path, device))
'''

# The beginning of a cheat of class A, which goes on with a function `changed(ids, logits)`.
WRAPPED = """

load_honestly = load_artifact


def load_artifact(path, device="cpu"):
    model = load_honestly(path, device)
    forward = model.forward
    model.forward = lambda ids: changed(ids, forward(ids))
    return model


"""


def forge(folder: Path, target: Path, code: str = "", changes: Mapping[str, Any] | None = None, **claims: Any) -> Path:
    """A copy of a record with code added to its script and other results, every hash, size and log made to agree.

    `changes` replace values of every run, `claims` those of submission.json alone.
    """
    shutil.copytree(folder, target)
    script = record.script_path(target)
    old_size = script.stat().st_size
    script.write_bytes(script.read_bytes() + code.encode())
    new_size = script.stat().st_size

    runs = []
    for path in sorted(target.glob("train_seed*.json")):
        run = record.read_json(path)
        old_total = run["bytes_total"]
        run["code_sha256"] = record.sha256(script.read_bytes())
        run["bytes_code"] = new_size
        run["bytes_total"] = new_size + run["bytes_artifact"]
        run |= changes or {}
        path.write_text(json.dumps(run))
        runs.append(run)

        log = path.with_suffix(".log")
        text = log.read_text().replace(f"{old_size} bytes", f"{new_size} bytes")
        text = text.replace(f"{old_total} bytes", f"{run['bytes_total']} bytes")
        lines = text.splitlines(keepends=True)
        log.write_text("".join(line if line.startswith("step:") else rewritten(line, run) for line in lines))

    about = record.load_submission(folder).about | claims
    record.save_submission(target, record.summarize(runs, script.read_bytes(), about))
    return target


def rewritten(line: str, run: Mapping[str, Any]) -> str:
    """A line of a log with the values that the JSON of a run has, to as many digits as before."""

    def pair(match: re.Match[str]) -> str:
        key, old = match[1], match[2]
        if key not in run or key == "eval_stride":
            return match[0]
        value = run[key]
        digits = len(old.partition(".")[2])
        if isinstance(value, bool):
            value = int(value)
        elif isinstance(value, float) and digits:
            value = f"{value:.{digits}f}"
        return f"{key}:{value}"

    # A closing bracket at the end of a value may belong to the line.
    return re.sub(r"\b([a-z]\w*):([^\s,]*[^\s,)])", pair, line)


def rescored(folder: Path, **options: Any) -> list[judge.Check]:
    """The checks of --rescore."""
    submission = record.load_submission(folder)
    artifact = record.artifact_path(folder)
    assert artifact is not None
    checks, scores = judge.rescore(record.script_path(folder), artifact, submission, options_for(folder, **options))
    if scores is not None:
        claim = submission.seed_results[verify.seed_of(submission, artifact)].val_bpb
        checks.append(judge.check_score("score", scores, claim, record.SAME_SCORE))
    return checks


def options_for(folder: Path, **changed: Any) -> judge.Options:
    """The options of the command line for the data of a record, with some changed."""
    data = record.data_path(folder)
    defaults = {
        "data": data,
        "tokenizer": data / "tokenizer.model",
        "data_is_own": "data" not in changed,
        "answer_seconds": 60.0,
    }
    return judge.Options(**(defaults | changed))


def failed(checks: Iterable[judge.Check]) -> set[str]:
    return {check.name for check in checks if not check.ok}
