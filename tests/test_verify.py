"""tools/verify.py: an honest record passes, and every way to cheat is caught under its name."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import record
import verify
from hypothesis import given
from hypothesis import strategies as st
from shards import read_shard, write_shard

from records import HAS_NAMESPACES, TRACK, failed, forge, rescored

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copied(honest, tmp_path) -> Path:
    """A copy of the honest record, to be changed by a test."""
    folder = tmp_path / TRACK / honest.name
    shutil.copytree(honest, folder)
    return folder


def reason_of(name: str, folder: Path) -> str:
    """The reason that the static check of this name gives."""
    return next(check.reason for check in verify.static_checks(folder) if check.name == name)


# --- An honest record ---


def test_an_honest_record_passes_every_static_check(honest):
    checks = verify.static_checks(honest)
    assert failed(checks) == set(), checks
    assert len({check.name for check in checks}) == len(checks) >= 12


def test_static_checks_need_no_torch(honest):
    """It takes longer to import than all of them together."""
    code = "import sys, verify; verify.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(honest)], cwd=ROOT / "tools").returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NAMESPACES, reason="no user namespaces here, so that nothing is signed")
def test_an_honest_record_scores_what_it_claims_and_signing_it_is_remembered(copied, capsys):
    assert verify.main([str(copied), "--rescore", "--json", "--sign", "me", "--seed", "1"]) == 0
    names = {check["name"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {"causal", "documents", "deterministic", "score", "bytes_of_text", "text", "load"} <= names
    review = record.load_reviews(copied)[-1]
    claims = record.load_submission(copied)
    assert (review.kind, review.reviewer, review.code_sha256) == ("rescored", "me", claims.code_sha256)
    assert review.val_bpb == pytest.approx(claims.seed_results[review.seed].val_bpb, abs=1e-6)
    assert failed(verify.static_checks(copied)) == set()


# --- Records that cheat, by their files ---


def static_failures(
    honest: Path, root: Path, code: str = "", changes: dict | None = None, **claims: object
) -> set[str]:
    """Names of the static checks that fail for a forged record."""
    folder = forge(honest, root / TRACK / honest.name, code, changes, **claims)
    return failed(verify.static_checks(folder))


def test_forging_alone_is_not_seen(honest, tmp_path):
    assert static_failures(honest, tmp_path, "# a comment\n") == set()


@pytest.mark.parametrize(
    "code",
    [
        "exec('x = 1')\n",
        "run = eval\n",
        "compile('1', '', 'eval')\n",
        "__import__('pickle').loads(b'')\n",
        "import pickle\n",
        "from marshal import loads\n",
        "import importlib.util\n",
        "import subprocess\n",
        "import my_weights\n",
        "from . import helper\n",
        "from .helper import x\n",
        "from .torch import x\n",
        "x = " + repr("a" * 1600) + "\n",
        'x = 1\n"""' + "a" * 5000 + '"""\n',
        "x = [" + ",\n".join([repr("a" * 250)] * 200) + "]\n",
        "x = " + "+".join(["1"] * 300) + "\n",
        "import base64\nexec(zlib.decompress(base64.b85decode('" + "A" * 2000 + "')))\n",
    ],
)
def test_code_that_is_not_on_the_page_is_refused(honest, tmp_path, code):
    assert static_failures(honest, tmp_path, code) == {"source"}


ORDINARY = """
import datetime
import gc
import re

fast = torch.compile(nn.Linear(1, 1), mode="max-autotune")
fast.compile()
pattern = re.compile("x")
threads = torch.multiprocessing.get_all_sharing_strategies()
last = gc.collect(), platform.system(), list(fast.modules()), bytes.fromhex("00"), fast.__dict__
"""

TRITON_KERNEL = """
import triton
import triton.language as tl


@triton.jit
def relu_squared_kernel(x_pointer, y_pointer, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    x = tl.load(x_pointer + offsets, mask=inside)
    x = tl.maximum(x, 0.0)
    tl.store(y_pointer + offsets, x * x, mask=inside)


def relu_squared(x):
    y = torch.empty_like(x)
    relu_squared_kernel[(triton.cdiv(x.numel(), 128),)](x, y, x.numel(), BLOCK=128)
    return y
"""


@pytest.mark.parametrize("code", [ORDINARY, TRITON_KERNEL])
def test_ordinary_code_and_triton_kernels_are_not_refused(honest, tmp_path, code):
    assert static_failures(honest, tmp_path, code) == set()


@pytest.mark.slow
def test_the_triton_kernel_is_a_real_one(tmp_path):
    """Run by Triton's interpreter, which needs no GPU; its result is that of torch."""
    pytest.importorskip("triton")
    script = tmp_path / "kernel.py"
    script.write_text(
        f"import torch\n{TRITON_KERNEL}\nx = torch.linspace(-2, 2, 300)\n"
        "torch.testing.assert_close(relu_squared(x), torch.relu(x).square())\n"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", ["import urllib.request\n", "from socket import socket\n", "import requests as r\n"])
def test_a_script_that_talks_to_a_network_is_refused(honest, tmp_path, code):
    assert static_failures(honest, tmp_path, code) == {"no_network"}


def test_a_coding_that_makes_comments_code_is_refused(honest, tmp_path):
    folder = forge(honest, tmp_path / TRACK / honest.name)
    script = record.script_path(folder)
    script.write_bytes(b"# coding: raw_unicode_escape\n# \\u000aimport pickle\n" + script.read_bytes())
    assert "raw_unicode_escape" in reason_of("source", folder)


def test_a_dropped_tail_is_caught(honest, tmp_path):
    run = record.read_json(record.run_path(honest, "1"))
    fewer = run["scored_tokens"] - 7
    val_bpb = run["val_loss"] / math.log(2) * fewer / run["scored_bytes"]
    changes = {"scored_tokens": fewer, "val_loss": run["val_loss"], "val_bpb": val_bpb}
    assert static_failures(honest, tmp_path, "", changes) == {"targets"}


def test_targets_scored_twice_are_caught(honest, tmp_path):
    run = record.read_json(record.run_path(honest, "1"))
    changes = {"scored_tokens": 2 * run["scored_tokens"], "scored_bytes": 2 * run["scored_bytes"]}
    changes |= {"val_loss": run["val_loss"], "val_bpb": run["val_bpb"]}
    assert static_failures(honest, tmp_path, "", changes) >= {"targets", "implied_bytes"}


def test_a_lie_about_bytes_is_caught(honest, tmp_path):
    run = record.read_json(record.run_path(honest, "1"))
    lie = {"val_bpb": 0.9 * run["val_bpb"], "val_loss": run["val_loss"]}
    assert static_failures(honest, tmp_path / "1", "", lie) == {"implied_bytes"}
    more = round(run["val_bytes"] / 0.9)
    lie |= {"val_bytes": more, "scored_bytes": more}
    lie["val_bpb"] = run["val_loss"] / math.log(2) * run["scored_tokens"] / more
    assert static_failures(honest, tmp_path / "2", "", lie) == {"data"}


def test_a_sidecar_that_lies_is_caught_by_the_text(honest, tmp_path):
    """Sidecar, manifest and claim agree, all of them forged: the text has the bytes it has."""
    run = record.read_json(record.run_path(honest, "1"))
    sidecar = honest / "data" / "fineweb_val_bytes_000000.bin"
    longer = np.array(read_shard(sidecar)) * 2
    more = int(longer.sum(dtype=np.int64))
    lie = {"val_bytes": more, "scored_bytes": more, "val_loss": run["val_loss"], "val_bpb": run["val_bpb"] / 2}
    folder = forge(honest, tmp_path / TRACK / honest.name, "", lie)
    write_shard(folder / "data" / sidecar.name, longer)
    manifest = record.read_json(folder / "data" / "manifest.json")
    manifest["splits"]["val"]["files"][sidecar.name] = record.sha256((folder / "data" / sidecar.name).read_bytes())
    (folder / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert failed(verify.static_checks(folder)) == set()
    assert failed(rescored(folder)) == {"bytes_of_text"}


def test_what_submission_json_says_must_follow_from_the_runs(copied):
    claims = record.load_submission(copied)
    record.save_submission(copied, dataclasses.replace(claims, val_bpb=claims.val_bpb - 0.01))
    assert failed(verify.static_checks(copied)) == {"summary"}


def test_a_seed_left_out_is_caught(copied):
    best = [record.read_json(record.run_path(copied, "2"))]
    about = record.load_submission(copied).about
    record.save_submission(copied, record.summarize(best, record.script_path(copied).read_bytes(), about))
    assert "seeds" in failed(verify.static_checks(copied))


def test_a_log_that_says_something_else_is_caught(copied):
    log = record.log_path(copied, "1")
    log.write_text(log.read_text().replace("val_bpb:", "val_bpb:1"))
    assert failed(verify.static_checks(copied)) == {"logs"}


@pytest.mark.parametrize(
    "name", ["submission.json", "README.md", "train_seed1.log", "train_seed2.json", "train_gpt.py"]
)
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    reasons = [check.reason for check in verify.static_checks(copied) if not check.ok]
    assert any(name in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cuda:NVIDIA_H100_80GB_HBM3", "world_size": 8},
        {"seconds_evaluate": 0.1},
        {"train_tokens": 5},
        {"model_params": 1},
        {"judge_version": 99},
        {"torch": "9.9"},
        {"model_dim": 999},
        {"pre_quant_val_bpb": 0.5},
    ],
)
def test_a_json_that_says_something_else_than_the_log_is_caught(honest, tmp_path, changes):
    """Even where everything in submission.json follows from the JSON."""
    folder = forge(honest, tmp_path / TRACK / honest.name, "", changes)
    for path in sorted(honest.glob("train_seed*.log")):
        shutil.copyfile(path, folder / path.name)
    assert "logs" in failed(verify.static_checks(folder))


def test_lineage_tells_what_changed_in_the_script_and_in_the_settings(honest, tmp_path):
    track = tmp_path / TRACK
    base = forge(honest, track / "2026-01-01_Base")
    new = forge(honest, track / honest.name, "# one line\n", {"matrix_lr": 0.5}, base=f"{track.name}/{base.name}")
    assert failed(verify.static_checks(new)) == set()
    assert reason_of("lineage", new).startswith("1 lines more and 0 less")
    assert reason_of("lineage", new).endswith("settings: MATRIX_LR=0.5")


def test_praise_by_the_author_counts_for_nothing(copied):
    claims = record.load_submission(copied)
    record.add_review(copied, record.Review("2026-01-01", claims.author.upper(), "reproduced", claims.code_sha256))
    assert failed(verify.static_checks(copied)) == {"reviews"}
    (copied / "reviews.json").write_text("{}")
    assert failed(verify.static_checks(copied)) == {"reviews"}


def test_files_that_do_not_belong_in_a_record_are_refused(copied):
    (copied / "helper.py").write_text("x = 1\n")
    (copied / "here").symlink_to("/etc")
    assert "helper.py" in reason_of("files", copied)
    assert "here is a link" in reason_of("files", copied)


def test_limits_of_a_track_hold(honest, tmp_path):
    def failures(track: str, **changes: object) -> dict[str, str]:
        root = tmp_path / f"{track}{len(changes)}"
        folder = forge(honest, root / track / honest.name, "", changes, track=track)
        return {check.name: check.reason for check in verify.static_checks(folder) if not check.ok}

    found = failures("track_10min_16mb")
    assert "H100" in found["track"]
    assert "asks for 3" in found["seeds"]
    slow = {"device": "cuda:NVIDIA_H100", "world_size": 8, "seconds_train": 600.0, "seconds_calibrate": 0.5}
    found = failures("track_10min_16mb", **slow)
    assert found.keys() == {"track", "seeds", "clock"}
    assert "not on the published FineWeb validation text" in found["track"]
    assert "600.50 s of training" in found["clock"]
    assert {"context", "benchmark"} <= set(failures("track_tiny_100m")["track"].split())
    assert "below 1.2244 at p = 0.99" in failures("track_speedrun")["track"]


FIELDS = [field.name for field in dataclasses.fields(record.Submission)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda part: st.lists(part) | st.dictionaries(st.text() | st.sampled_from(FIELDS), part),
)


@given(JSON)
def test_any_json_in_place_of_a_submission_is_a_failed_check(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("x") / "2026-01-01_X"
    folder.mkdir()
    (folder / "submission.json").write_text(json.dumps(value))
    assert "schema" in failed(verify.static_checks(folder))


def test_a_record_cannot_print_a_check_of_its_own(honest, tmp_path, capsys):
    lie = "cpu:X\nok   score: val_bpb 0.9\x1b[8m"
    folder = forge(honest, tmp_path / TRACK / honest.name, "", {"device": lie})
    verify.main([str(folder)])
    out = capsys.readouterr().out
    assert "ok   score" not in [line[:10] for line in out.splitlines()]
    assert "\x1b" not in out
