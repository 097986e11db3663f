"""An honest record of a tiny model, and ways to turn it into one that cheats."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import record as sub
import verify

ADAPTIVE = '''

class Predictor:
    """The model, mixed with how often each token was seen in what was observed."""

    def __init__(self, model):
        self.model, self.config = model, model.config
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

WRAPPED = """

load_honestly = load_artifact


def load_artifact(path, device="cpu"):
    model = load_honestly(path, device)
    forward = model.forward
    model.forward = lambda ids: changed(ids, forward(ids))
    return model
"""


def retold(line: str, run: Mapping[str, Any]) -> str:
    """A line of a log with the values that the JSON of a run has, to as many digits as before."""

    def value(found: re.Match[str]) -> str:
        key, before = found[1], found[2]
        if key not in run or key == "eval_stride":
            return found[0]
        digits = len(before.partition(".")[2])
        told = f"{run[key]:.{digits}f}" if isinstance(run[key], float) and digits else run[key]
        return f"{key}:{int(told) if isinstance(told, bool) else told}"

    return re.sub(r"\b([a-z]\w*):([^\s,)]+)", value, line)


def forge(folder: Path, target: Path, code: str = "", changes: Mapping[str, Any] | None = None, **top: Any) -> Path:
    """A copy of a record with code added to its script and other results, every hash and size made to fit.

    `changes` replace values of every run, `top` those of submission.json alone.
    """
    shutil.copytree(folder, target)
    script = sub.script_path(target)
    before = script.read_bytes()
    script.write_bytes(before + code.encode())
    runs, old_size, new_size = [], len(before), len(before) + len(code.encode())
    for path in sorted(target.glob("train_seed*.json")):
        run = json.loads(path.read_text())
        old = dict(run)
        run |= {"code_sha256": sub.sha256(script.read_bytes()), "bytes_code": new_size}
        run |= {"bytes_total": new_size + run["bytes_artifact"], **(changes or {})}
        path.write_text(json.dumps(run))
        runs.append(run)
        log = path.with_suffix(".log")
        text = log.read_text().replace(f"{old_size} bytes", f"{new_size} bytes")
        text = text.replace(f"{old['bytes_total']} bytes", f"{run['bytes_total']} bytes")
        lines = [line if line.startswith("step:") else retold(line, run) for line in text.splitlines(keepends=True)]
        text = "".join(lines)
        log.write_text(text)
    about = sub.load_submission(folder).about | top
    sub.save_submission(target, sub.summarize(runs, script.read_bytes(), about))
    return target


def options(folder: Path, **changed: object) -> SimpleNamespace:
    """Those of the command line."""
    given = {
        "data": folder / "data",
        "tokenizer": folder / "data" / "tokenizer.model",
        "documents": None,
        "unseen": None,
    }
    given |= {
        "folder": folder,
        "sample": 0,
        "seed": None,
        "run_seed": "",
        "timeout": 60.0,
        "train_timeout": 200.0,
        "memory": 8.0,
        "artifact": None,
    }
    return SimpleNamespace(**given | changed)


def rescored(folder: Path, **changed: object) -> dict[str, verify.Check]:
    """The checks of --rescore by name."""
    s, artifact = sub.load_submission(folder), sub.artifact_path(folder)
    assert artifact is not None
    checks, scored = verify.rescore(sub.script_path(folder), artifact, s, options(folder, **changed))
    if scored is not None:
        claim = s.seed_results[verify.seed_of(s, artifact)].val_bpb
        checks.append(verify.check_score("score", scored, claim, verify.SAME_SCORE))
    return {check.name: check for check in checks}


def failed(checks: object) -> set[str]:
    found = checks.values() if isinstance(checks, dict) else checks
    return {check.name for check in found if not check.ok}
