"""tools/verify.py: an honest record passes, and every way to cheat is caught under its name."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import record
import source
import verify
from hypothesis import given, settings
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


# Bytes that no words are made of, as text in lines that look short enough.
DATA = "\n".join(textwrap.wrap(base64.b85encode(random.Random(0).randbytes(60_000)).decode().replace(" ", "x"), 100))


@pytest.mark.parametrize(
    "code",
    [
        "exec('x = 1')\n",
        "run = eval\n",
        "compile('1', '', 'eval')\n",
        "__import__('pickle').loads(b'')\n",
        "from marshal import loads\n",
        "import my_weights\n",
        "from . import helper\n",
        "from .helper import x\n",
        "from .torch import x\n",
        "x = " + repr("a" * 1600) + "\n",
        'x = 1\n"""' + "a" * 5000 + '"""\n',
        "x = [" + ",\n".join([repr("a" * 250)] * 200) + "]\n",
        "x = " + "+".join(["1"] * 300) + "\n",
        "x = json.codecs.builtins.eval('1')\n",
        "x = getattr(json.codecs, 'builtins')\n",
        "x = vars(json)['__builtins__']\n",
        "x = globals()['eval']\n",
        "x = sys.modules['json'].__dict__['exec']\n",
        "x = getattr(json.codecs, 'eval')\n",
        "x = (lambda: 0).__globals__\n",
        "x = ().__class__.__base__.__subclasses__()\n",
        "import types\nx = types.FunctionType\n",
        "import importlib\nimportlib.import_module('my_' + 'weights')\n",
        "import importlib\nimportlib.import_module('marshal')\n",
        "from importlib.util import spec_from_file_location\n",
        "import pickle\nx = pickle.loads(b'')\n",
        "from pickle import Unpickler\n",
        "import runpy\n",
        "import builtins\n",
        "from torch.utils import cpp_extension\n",
        "x = [" + "1, " * 40 + "\n" + ("1, " * 40 + "\n") * 20 + "]\n",
        "x = 0x" + "f" * 40 + "\n",
        "x = 1" + " " * 290 + "\n",
        "x\u0430 = 1\n",
        "".join(f"# {line}\n" for line in DATA.splitlines()),
        "".join(f"x = {line!r}\n" for line in DATA.splitlines()),
        '"""\n' + DATA[:3900] + '"""\n' + '"""\n' + DATA[3900:7000] + '"""\n',
        "import base64\nexec(zlib.decompress(base64.b85decode('" + "A" * 2000 + "')))\n",
    ],
)
def test_code_that_is_not_on_the_page_is_refused(code):
    assert source.find_faults(b"import json\nimport sys\nimport zlib\n" + code.encode()).unreadable


def test_a_record_with_code_that_is_not_on_the_page_fails(honest, tmp_path):
    assert static_failures(honest, tmp_path, "exec('x = 1')\n") == {"source"}


ORDINARY = """
import datetime
import gc
import importlib
import importlib.util
import inspect
import codecs
import contextvars
import cProfile
import html
import logging
import pickle
import re
import signal
import subprocess
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor

HAS_FLASH = importlib.util.find_spec("flash_attn_interface") is not None
brotli = importlib.import_module("zlib")
model = nn.Linear(1, 1).eval()
mode = "eval"

seconds = {"eval": 1.0, "compile": 2.0}
total = seconds["eval"] + seconds["compile"]
compiler = getattr(torch, "compile", None)
largest = 18446744073709551616
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
def test_compile_of_torch_is_not_that_of_python(honest, tmp_path):
    code = "from torch import compile, nn\nfast = compile(nn.Linear(1, 1))\n"
    assert static_failures(honest, tmp_path, code) == set()


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"# coding: utf8\n", b"# -*- coding: UTF-8 -*-\n"])
def test_all_spellings_of_utf8_are_read(start):
    assert source.find_faults(start + b"x = 1\n") == ((), ())


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


@pytest.mark.slow
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
    reason = reason_of("lineage", new)
    assert f"{track.name}/{base.name}, adds 1 line to the script and removes 0" in reason
    assert reason.endswith("1 setting: MATRIX_LR=0.5")


def test_praise_by_the_author_counts_for_nothing(copied):
    claims = record.load_submission(copied)
    record.add_review(copied, record.Review("2026-01-01", claims.author.upper(), "reproduced", claims.code_sha256))
    assert failed(verify.static_checks(copied)) == {"reviews"}
    (copied / "reviews.json").write_text("{}")
    assert failed(verify.static_checks(copied)) == {"reviews"}


@pytest.mark.parametrize("name", ["{} ", " {}", "{}\u200b", "{}.", "@{}", "", "\u2060"])
def test_the_author_is_known_by_any_spelling(copied, name):
    claims = record.load_submission(copied)
    seed, result = next(iter(claims.seed_results.items()))
    review = confirmation(claims, seed, result.val_bpb)
    record.add_review(copied, dataclasses.replace(review, reviewer=name.format(claims.github_id)))
    assert failed(verify.static_checks(copied)) == {"reviews"}


def confirmation(claims: record.Submission, seed: str, val_bpb: float) -> record.Review:
    return record.Review(
        date=claims.date,
        reviewer="Grace",
        kind="rescored",
        code_sha256=claims.code_sha256,
        seed=seed,
        val_bpb=val_bpb,
        judge_version=record.newest_judge_version(),
        artifact_sha256=claims.seed_results[seed].artifact_sha256,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"val_bpb": 9.9},
        {"val_bpb": None},
        {"val_bpb_interval": 5.0},
        {"judge_version": 1},
        {"judge_version": 99},
        {"artifact_sha256": ""},
        {"seed": "01"},
        {"kind": "disputed", "seed": "01"},
    ],
)
def test_a_review_that_does_not_confirm_the_claim_is_refused(copied, changes):
    claims = record.load_submission(copied)
    good = confirmation(claims, "1", claims.seed_results["1"].val_bpb)
    record.add_review(copied, good)
    assert failed(verify.static_checks(copied)) == set()
    (copied / "reviews.json").unlink()
    record.add_review(copied, dataclasses.replace(good, **changes))
    assert failed(verify.static_checks(copied)) == {"reviews"}


def test_a_dispute_of_an_unknown_seed_holds_for_all(honest):
    claims = record.load_submission(honest)
    disputed = record.Review("2026-02-01", "r", "disputed", claims.code_sha256, seed="01")
    assert set(record.seed_states(claims, [disputed]).values()) == {"disputed"}


def test_seconds_of_training_count_under_any_name(honest, tmp_path):
    folder = forge(honest, tmp_path / TRACK / honest.name, "", {"seconds_warm": 1000.0})
    assert all(result.train_seconds > 1000 for result in record.load_submission(folder).seed_results.values())
    run = record.read_json(record.run_path(honest, "1"))
    del run["seconds_train"]
    assert record.run_faults(run) == ["it lacks seconds_train, which a training run writes"]


def test_a_log_without_times_is_caught(copied):
    path = record.log_path(copied, "1")
    path.write_text(re.sub(r" train_time:\S+", "", path.read_text()))
    assert "no time of any step" in reason_of("clock", copied)


@pytest.mark.parametrize(
    "changes",
    [
        {"val_text_sha256": "invented"},
        {"val_text_sha256": "A" * 64},
        {"model_params": -5},
        {"device": "cpu:AMD\u200b"},
        {"device": "cpu:AMD_"},
        {"train_tokens": -7},
    ],
)
def test_values_that_no_run_writes_are_refused(honest, tmp_path, changes):
    assert "schema" in static_failures(honest, tmp_path, changes=changes)


def test_a_record_is_not_older_than_its_runs(honest, tmp_path):
    track = tmp_path / TRACK
    folder = forge(honest, track / "2026-01-02_Early", "", date="2026-01-02")
    assert "its last run was made on" in reason_of("summary", folder)


def test_a_tokenizer_that_rewrites_text_is_not_lossless(honest, tmp_path, train_tokenizer, documents):
    model = train_tokenizer(documents, normalization_rule_name="nmt_nfkc_cf")
    folder = forge(honest, tmp_path / TRACK / honest.name, "", {"tokenizer_sha256": record.sha256(model)})
    (folder / "data" / "tokenizer.model").write_bytes(model)
    assert "rewrites characters" in reason_of("data", folder)


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
    assert "below 1.2244 at p = " in failures("track_speedrun")["track"]


@pytest.mark.parametrize("day", ["1970-01-01", "2026-13-45", "2099-01-01", "", "20260201", "yesterday", "2026-02-30"])
def test_an_odd_date_is_refused(copied, day):
    claims = record.load_submission(copied)
    record.save_submission(copied, dataclasses.replace(claims, date=day))
    assert "schema" in failed(verify.static_checks(copied))


@pytest.mark.parametrize("seed", ["01", "001", "-1", "1.0", "\u0661"])
def test_one_seed_cannot_count_twice(copied, seed):
    claims = record.load_submission(copied)
    results = claims.seed_results | {seed: claims.seed_results["1"]}
    for path in (record.run_path, record.log_path):
        shutil.copyfile(path(copied, "1"), path(copied, seed))
    record.save_submission(copied, dataclasses.replace(claims, seed_results=results))
    assert "seeds" in failed(verify.static_checks(copied))
    assert "same artifact_sha256" in reason_of("seeds", copied)


def test_seeds_without_an_artifact_are_called_so(honest):
    assert "there is no artifact" in reason_of("seeds", honest)


def test_a_second_artifact_is_refused(copied):
    (copied / "final_model.other.ptz").write_bytes(b"data")
    assert "2 artifacts" in reason_of("files", copied)


def test_what_git_ignores_is_no_part_of_a_record(copied):
    (copied / ".DS_Store").write_bytes(b"x")
    (copied / "__pycache__").mkdir()
    (copied / "__pycache__" / "train_gpt.cpython-311.pyc").write_bytes(b"x")
    assert failed(verify.static_checks(copied)) == set()


def test_line_ends_that_git_changed_are_named(copied):
    script = record.script_path(copied)
    script.write_bytes(script.read_bytes().replace(b"\n", b"\r\n"))
    assert "core.autocrlf" in reason_of("source", copied)


def test_a_byte_order_mark_is_read_and_utf16_is_named(copied):
    path = copied / "submission.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert failed(verify.static_checks(copied)) == set()
    log = record.log_path(copied, "1")
    log.write_bytes(log.read_text().encode("utf-16"))
    assert "PowerShell" in reason_of("logs", copied)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": 1, "name": 2}', "twice"),
        ('{"name": NaN}', "NaN"),
        ('{"name": -Infinity}', "Infinity"),
        ('{"name": 1e999}', "too large"),
        ('{"name": ' + "9" * 5000 + "}", "5000 digits"),
        ("[" * 100_000, "recursion"),
        ("{", "not JSON"),
    ],
)
def test_json_that_two_readers_take_apart_is_refused(tmp_path, text, reason):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        record.read_json(path)


def hostile(folder: Path, name: str) -> None:
    """Put something into a record that costs much time or memory to look at."""
    script = record.script_path(folder)
    if name == "long script":
        script.write_bytes(b"a;" * 7_500_000)
    elif name == "dense script":
        script.write_bytes(b"x=[" + b"1," * 100_000 + b"]")
    elif name == "nested script":
        script.write_bytes(b"(" * 100_000)
    elif name == "sparse JSON":
        with (folder / "submission.json").open("wb") as file:
            file.truncate(1_500_000_000)
    elif name == "sparse shard":
        with (folder / "data" / "fineweb_val_000000.bin").open("ab") as file:
            file.truncate(2**30)
    elif name == "long log":
        record.log_path(folder, "1").write_text("step:1/2 train_loss:1 x:1 " * 40_000_0)
    elif name == "key twice in a long JSON":
        pairs = ", ".join(f'"{i}": 1' for i in range(150_000))
        (folder / "submission.json").write_text("{" + pairs + ', "149999": 1}')
    elif name == "sparse artifact":
        [artifact] = folder.glob("final_model.*.ptz")
        with artifact.open("ab") as file:
            file.truncate(2**31)
        claims = record.read_json(folder / "submission.json")
        for result in claims["seed_results"].values():
            result["bytes_artifact"] = 2**31
        (folder / "submission.json").write_text(json.dumps(claims))
    elif name == "lines for a comparison":
        rng = random.Random(0)
        lines = [f"#{rng.randrange(120)}\n" for _ in range(100_000)]
        base = folder.parent / "2026-01-01_Base"
        shutil.copytree(folder, base)
        script.write_text("".join(lines))
        record.script_path(base).write_text("".join(reversed(lines)))
        claims = record.read_json(folder / "submission.json")
        claims["base"] = f"{folder.parent.name}/{base.name}"
        (folder / "submission.json").write_text(json.dumps(claims))
    elif name == "log of blank lines":
        record.log_path(folder, "1").write_text("\n" * 4_000_000)
    elif name == "log of one key":
        record.log_path(folder, "1").write_text(("a:1 " * 990 + "\n") * 1000)
    elif name == "many files":
        for i in range(5000):
            (folder / f"{i}.md").touch()
    elif name == "pipe as artifact":
        [artifact] = folder.glob("final_model.*.ptz")
        artifact.unlink()
        os.mkfifo(artifact)
    elif name == "pipe as log":
        record.log_path(folder, "1").unlink()
        os.mkfifo(record.log_path(folder, "1"))


HOSTILE = ["key twice in a long JSON", "sparse artifact", "lines for a comparison", "log of blank lines"]
HOSTILE += ["long script", "dense script", "nested script", "sparse JSON", "sparse shard", "long log", "log of one key"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*HOSTILE, "many files", "pipe as artifact", "pipe as log"])
def test_hostile_files_cost_little_and_fail(copied, name):
    """Seconds of this process, which other processes on the machine do not add to, and memory at its highest."""
    hostile(copied, name)
    code = (
        "import re, sys, time, verify\n"
        "from pathlib import Path\n"
        "checks = verify.static_checks(Path(sys.argv[1]))\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]\n"
        "print(all(check.ok for check in checks), time.process_time(), int(peak) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(copied)], cwd=ROOT / "tools", capture_output=True, text=True)
    ok, seconds, mebibytes = done.stdout.split()
    assert ok == "False", done.stderr
    assert float(seconds) < 5.0
    assert int(mebibytes) < 250


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


@settings(max_examples=15)
@given(st.data())
def test_no_change_of_a_run_or_a_review_breaks_the_checks(honest, tmp_path_factory, data):
    """Any value in place of any value: every check has an outcome."""
    folder = tmp_path_factory.mktemp("x") / TRACK / honest.name
    shutil.copytree(honest, folder, ignore=shutil.ignore_patterns("data", "*.ptz"))
    path = record.run_path(folder, "1")
    run = json.loads(path.read_text())
    key = data.draw(st.sampled_from(sorted(record.run_types())))
    odd = st.one_of(JSON, st.sampled_from([10**400, -1, 0, 1e308, [], {}, "", True]))
    run[key] = data.draw(odd)
    path.write_text(json.dumps(data.draw(st.sampled_from([run, [run], run[key]]))))
    (folder / "reviews.json").write_text(json.dumps(data.draw(JSON)))
    assert len(verify.static_checks(folder)) >= 5


def test_a_check_that_breaks_is_a_failure():
    def breaks() -> record.Check:
        raise OverflowError("int too large")

    assert verify.guarded("x", breaks) == record.Check(
        "x", False, "it cannot be judged: OverflowError('int too large')"
    )


def test_reviews_hold_for_the_seed_and_the_code_that_they_name(honest):
    """One artifact that was scored again says nothing of the other seeds."""
    claims = record.load_submission(honest)
    code = claims.code_sha256
    artifact = claims.seed_results["1"].artifact_sha256
    rescored = record.Review("2026-02-01", "r", "rescored", code, seed="1", artifact_sha256=artifact)
    assert record.seed_states(claims, [rescored]) == {"1": "rescored", "2": "unconfirmed"}
    other_code = dataclasses.replace(rescored, code_sha256="0")
    other_artifact = dataclasses.replace(rescored, artifact_sha256="0")
    assert record.seed_states(claims, [other_code, other_artifact]) == {"1": "unconfirmed", "2": "unconfirmed"}
    reproduced = dataclasses.replace(rescored, kind="reproduced", seed="2", artifact_sha256="")
    assert record.seed_states(claims, [reproduced, rescored]) == {"1": "rescored", "2": "reproduced"}
    disputed = record.Review("2026-02-01", "r", "disputed", code)
    assert record.seed_states(claims, [rescored, disputed]) == {"1": "disputed", "2": "disputed"}


def test_a_record_cannot_print_a_check_of_its_own(honest, tmp_path, capsys):
    lie = "cpu:X\nok   score: val_bpb 0.9\x1b[8m"
    folder = forge(honest, tmp_path / TRACK / honest.name, "", {"device": lie})
    verify.main([str(folder)])
    out = capsys.readouterr().out
    assert "ok   score" not in [line[:10] for line in out.splitlines()]
    assert "\x1b" not in out


# --- How far a record is confirmed, and what is the judge's own mistake ---


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_the_last_line_counts_and_names_what_fails(copied, capsys):
    (copied / "README.md").unlink()
    (copied / "reviews.json").write_text("{}")
    n_checks = len(verify.static_checks(copied))
    assert verify.main([str(copied)]) == 1
    assert last_line(capsys) == f"FAILS 2 of {n_checks} checks: files, reviews."


def test_the_last_line_says_what_others_confirmed_and_what_nobody_did(copied, capsys):
    """From what is in reviews.json: one deed of two, then both, then an objection."""
    claims = record.load_submission(copied)
    assert verify.main([str(copied)]) == 0
    line = last_line(capsys)
    assert line.startswith("PASSES the static checks")
    assert "--rescore" in line
    assert "--rerun" in line

    scored = confirmation(claims, "1", claims.seed_results["1"].val_bpb)
    record.add_review(copied, scored)
    assert verify.main([str(copied)]) == 0
    line = last_line(capsys)
    assert "seed 1 was scored again" in line
    assert f"{claims.seed_results['1'].val_bpb:.4f}, as claimed (Grace, {claims.date})" in line
    assert "--rescore" not in line
    assert "--rerun" in line

    record.add_review(copied, dataclasses.replace(scored, kind="reproduced", seed="2", artifact_sha256=""))
    record.add_review(copied, dataclasses.replace(scored, kind="disputed", note="it reads the text"))
    assert verify.main([str(copied)]) == 0
    line = last_line(capsys)
    assert "Seed 2 was trained again" in line
    assert "Grace objects: it reads the text" in line
    assert "--rerun" not in line


def test_a_folder_of_the_published_challenge_is_called_so(tmp_path, capsys):
    folder = tmp_path / "2026-03-18_Theirs"
    folder.mkdir()
    (folder / "submission.json").write_text('{"author": "a", "name": "n", "val_bpb": 1.2, "bytes_total": 5}')
    assert verify.main([str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert f"submission.py import {folder}" in line


def test_a_record_of_our_own_without_a_version_is_still_a_record(copied):
    claims = record.read_json(copied / "submission.json")
    del claims["schema_version"]
    (copied / "submission.json").write_text(json.dumps(claims))
    assert verify.main([str(copied)]) == 1


def data_folder(root: Path, model: bytes, named: str) -> Path:
    """A data set as the tools of data/ lay it out, whose manifest names a tokenizer by file and sha256."""
    data = root / "datasets" / "my_sp1024"
    (root / "tokenizers").mkdir(parents=True)
    data.mkdir(parents=True)
    (root / "tokenizers" / "my.model").write_bytes(model)
    (data / "manifest.json").write_text(json.dumps({"tokenizer": {"file": "my.model", "sha256": named}}))
    return data


def test_the_tokenizer_of_data_is_the_one_that_its_manifest_names(tmp_path):
    data = data_folder(tmp_path / "a", b"model", record.sha256(b"model"))
    assert verify.tokenizer_of(data).read_bytes() == b"model"
    assert verify.tokenizer_of(data) == tmp_path / "a" / "tokenizers" / "my.model"

    # One of the same name in another folder is taken for what it holds, not for where it lies.
    (data / "my.model").write_bytes(b"another")
    assert verify.tokenizer_of(data).read_bytes() == b"model"

    other = data_folder(tmp_path / "b", b"another", record.sha256(b"model"))
    with pytest.raises(record.JudgeError, match=record.sha256(b"another")[:12]):
        verify.tokenizer_of(other)
    (tmp_path / "b" / "tokenizers" / "my.model").unlink()
    with pytest.raises(record.JudgeError, match=r"my\.model"):
        verify.tokenizer_of(other)
    (other / "manifest.json").write_text("[]")
    with pytest.raises(record.JudgeError, match=r"manifest\.json"):
        verify.tokenizer_of(other)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rescore", "--data", "nowhere"], "nowhere"),
        (["--rescore", "--data", "."], "fineweb_val"),
        (["--rescore", "--tokenizer", "no.model"], "no.model"),
        (["--rescore", "--artifact", "no.ptz"], "no.ptz"),
        (["--rescore", "--artifact", __file__], "by size and sha256"),
        (["--rescore", "--documents", "no.jsonl"], "no.jsonl"),
        (["--rescore", "--unseen", "nothing"], "nothing"),
        (["--rerun", "--run-seed", "77"], "seeds 1 and 2"),
        (["--rerun", "--run-seed", "x"], "seeds 1 and 2"),
    ],
)
def test_a_mistake_of_the_judge_is_not_a_failure_of_the_record(honest, tmp_path, monkeypatch, capsys, options, named):
    monkeypatch.chdir(tmp_path)
    assert verify.main([str(honest), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_an_artifact_that_is_not_there_is_asked_for(copied, capsys):
    [artifact] = copied.glob("final_model.*.ptz")
    artifact.unlink()
    assert verify.main([str(copied), "--rescore"]) == 2
    assert "--artifact" in capsys.readouterr().err
