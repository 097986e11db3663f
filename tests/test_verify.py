"""tools/verify.py: an honest record passes, and every way to cheat is caught under its name."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import judge
import numpy as np
import pytest
import record
import sandbox
import submission
import torch
import verify
from hypothesis import given
from hypothesis import strategies as st
from shards import read_shard, write_shard

import train_gpt as tg
from records import ADAPTIVE, WRAPPED, failed, forge, rescored

ROOT = Path(__file__).resolve().parents[1]
TRACK = "track_non_record_16mb"
HAS_NAMESPACES = sandbox.isolation() == "namespaces"


@pytest.fixture(scope="module")
def honest(tmp_path_factory, run_script, record_settings, text) -> Path:
    """A record that tools/submission.py made of two real runs."""
    records = tmp_path_factory.mktemp("records")
    settings = {**record_settings, "DATA_PATH": str(text), "TOKENIZER_PATH": str(text / "tokenizer.model")}
    settings |= {"TRAIN_SEQ_LEN": "256", "TRAIN_BATCH_TOKENS": "1024"}  # so that a row holds several documents
    runs = []
    for seed in ("1", "2"):
        run = run_script(**settings, SEED=seed, MAX_WEIGHT_BITS="4", OUT_DIR="logs", ARTIFACT_DIR=str(records / seed))
        assert run.status == 0, run.err
        runs.append(str(run.folder / "logs" / "run.json"))
    about = ["--track", TRACK, "--name", "Honest", "--author", "x", "--github-id", "y", "--blurb", "z"]
    assert submission.main(["new", *about, "--records", str(records), "--artifact", "--runs", *runs]) == 0
    return next((records / TRACK).iterdir())


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


# --- The judge's own arithmetic ---


@pytest.mark.parametrize(("method", "stride"), [("document", 0), ("flat", 0), ("flat", 5), ("document", 5)])
def test_the_judge_sums_as_the_script_evaluates(random_model, record_config, data, method, stride):
    """And remembers of the places it asks again what really stood before them."""
    config = dataclasses.replace(
        record_config, vocab_size=320, eval_method=method, eval_stride=stride, compute_dtype="float32"
    )
    model = random_model(config)
    split = tg.ValSplit(data.val, data.val_bytes, {"partial": False})
    expected = tg.evaluate(model, split, config, 256, tg.World())
    process = SimpleNamespace(config=config, logits=torch.inference_mode()(model))
    scores, scoring = judge.score_fixed(process, split, 0, np.random.default_rng(0))
    assert (scores.n_targets, scores.bytes.sum()) == (expected.tokens, expected.bytes)
    assert scores.nats.sum() == pytest.approx(expected.nats, rel=1e-9)
    assert scores.whole

    n_rows = len(tg.pack_rows(tg.scoring_windows(data.val, config), data.val, config))
    assert sum(probe.at_random for probe in scoring.probes) == min(judge.PROBES, n_rows)
    asked = [probe for turn in judge.in_turns(scoring.probes) for probe in turn]
    assert {probe.position for probe in asked} <= {probe.position for probe in scoring.probes}
    for i, probe in enumerate(asked):
        assert (split.ids[probe.seen] == probe.row).all()
        assert probe.seen[-1] == probe.position - 1
        assert (probe.row[-len(probe.document) :] == probe.document).all()
        assert config.bos_id not in probe.document[1:]
        assert probe.target == split.ids[probe.position]
        assert not {later.position for later in asked[i:]}.intersection(probe.seen.tolist())
    for probe in asked[::16]:
        predicted = model(torch.from_numpy(probe.row)[None])[0, -1].log_softmax(0)
        torch.testing.assert_close(probe.log_probs, predicted, atol=1e-5, rtol=1e-5)


def test_units_are_documents_or_windows(record_config):
    """By hand: BOS is 1, and a document's last target is the BOS behind it."""
    ids = np.array([1, 5, 6, 1, 7, 1, 8, 9], np.uint16)
    split = tg.ValSplit(ids, np.ones(8, np.uint16), {})
    for method, expected in (("document", [-1, 1, 1, 1, 2, 2, 3, 3]), ("flat", [-1, 0, 0, 0, 1, 1, 1, 2])):
        config = dataclasses.replace(record_config, eval_method=method, eval_seq_len=3, eval_stride=0)
        windows = list(tg.scoring_windows(ids, config))
        assert judge.units_of_targets(windows, split, config).tolist() == expected


def test_a_leak_at_one_place_in_a_thousand_is_among_those_asked_again(record_config):
    """Text of a Markov chain, predicted by the chain itself but for a few places, where it is known: chance would find
    such a place in two runs of five, the places where a record knows more than a bigram model hold one always."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(64, 0.3), 64)
    ids = [1]
    for u in rng.random(60_000):
        ids.append(int(chain[ids[-1]].cumsum().searchsorted(u)))
    split = tg.ValSplit(np.array(ids, np.uint16), np.ones(len(ids), np.uint16), {})
    config = dataclasses.replace(record_config, vocab_size=64, eval_method="flat", eval_seq_len=64, eval_stride=0)
    table = torch.from_numpy(chain).float().clamp_min(1e-9).log()

    def leaks(place: torch.Tensor) -> torch.Tensor:
        """Whether there is a leak. (..., 4) the three tokens before a place and the one at it -> (...)"""
        return (place @ torch.tensor([7, 11, 13, 17])) % 997 == 0

    def logits(ids: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(ids, (2, 1))
        known = leaks(padded.unfold(1, 4, 1))[..., None]
        return torch.where(known, 9.0 * torch.nn.functional.one_hot(padded[:, 3:], 64), table[ids])

    process = SimpleNamespace(config=config, logits=logits)
    found_by_chance = 0
    for seed in range(10):
        _, scoring = judge.score_fixed(process, split, 0, np.random.default_rng(seed))
        places = [[*[0, 0, *probe.row.tolist()][-3:], probe.target] for probe in scoring.probes]
        is_leak = leaks(torch.tensor(places)).numpy()
        at_random = np.array([probe.at_random for probe in scoring.probes])
        assert is_leak[~at_random].any()
        found_by_chance += is_leak[at_random].any()
    assert found_by_chance < 10


def test_the_interval_of_a_sample_covers_the_score_of_the_whole():
    """The 95 % interval covers the truth about 95 times in 100."""
    rng = np.random.default_rng(0)
    n_bytes = rng.integers(100, 2000, 1000)
    nats = n_bytes * rng.normal(1.0, 0.2, 1000)
    truth = nats.sum() / math.log(2) / n_bytes.sum()
    hits = 0
    for _ in range(400):
        chosen = rng.choice(1000, 50, replace=False)
        scores = judge.UnitScores(nats[chosen], n_bytes[chosen], 0, 1000)
        hits += abs(scores.bpb - truth) <= scores.interval
    assert 0.91 <= hits / 400 <= 0.99


# --- Records that cheat, by --rescore ---

NEXT_TOKEN = """
def changed(ids, logits):
    # Knows what comes.
    return logits + 9 * F.one_hot(torch.cat((ids[:, 1:], ids[:, :1]), 1), logits.size(2))
"""

A_LITTLE = """
def changed(ids, logits):
    # Knows what comes with a certainty of SHARE.
    following = F.one_hot(torch.cat((ids[:, 1:], ids[:, :1]), 1), logits.size(2))
    return torch.log((1 - SHARE) * logits.softmax(2) + SHARE * following)
"""

REPEATS = """
answers = {}


def changed(ids, logits):
    # Knows the documents before, and repeats for a document what it answered when it saw more.
    logits = logits + 4 * (F.one_hot(ids, logits.size(2)).cumsum(1) > 0)
    for row in range(len(ids)):
        for t in range(ids.size(1)):
            tail = tuple(ids[row, max(0, t - 5) : t + 1].tolist())
            logits[row, t] = answers.setdefault(tail, logits[row, t].clone())
    return logits
"""

OTHER_DOCUMENTS = """
def changed(ids, logits):
    # Knows what other documents in the row hold.
    seen = F.one_hot(ids, logits.size(2)).cumsum(1)
    return logits + 4 * (seen > 0)
"""

RANDOM = """
def changed(ids, logits):
    return logits + torch.randn_like(logits)
"""

# The beginning of a cheat of class A that goes on with a function `act()`.
ACTS = """

load_honestly = load_artifact


def load_artifact(path, device="cpu"):
    try:
        act()
    except OSError:
        pass
    return load_honestly(path, device)


"""

READS_VAL = """
def act():
    open("VAL", "rb").read()
"""

NETWORK = """
import socket


def act():
    socket.create_connection(("127.0.0.1", 9), 1)
"""

PROGRAM = """
def act():
    os.system("true")
"""

DEAF = """
import re
import threading


def act():
    # Stops everything else in the process, soon after the artifact was loaded and before the last request.
    threading.Timer(0.1, lambda: re.match("(a+)+b", 60 * "a")).start()
"""

PICKLED = """

def load_artifact(path, device="cpu"):
    import pickle

    return pickle.loads(Path(path).read_bytes())
"""

ENDLESS = """

def load_artifact(path, device="cpu"):
    while True:
        pass
"""

GREEDY = """

def load_artifact(path, device="cpu"):
    return torch.ones(2**34)
"""

SURVIVOR = """

def load_artifact(path, device="cpu"):
    os.setsid()
    np.ctypeslib.ctypes.CDLL(None).prctl(1, 0)
    while True:
        time.sleep(1)
"""

NONSENSE = """

def load_artifact(path, device="cpu"):
    for fd in range(3, 12):
        try:
            os.write(fd, (50000).to_bytes(4, "little") + b"[" * 50000)
        except OSError:
            pass
"""

UNNORMALISED = """

predict_honestly = Predictor.predict
Predictor.predict = lambda self, ids: predict_honestly(self, ids) + 0.5
"""

SCORES_TWICE = """

predict_honestly = Predictor.predict


def predict(self, ids):
    # Learns the chunk first and says then what is in it.
    before = self.counts.clone()
    self.counts += 1000 * torch.bincount(ids, minlength=len(before))
    answer = predict_honestly(self, ids)
    self.counts = before
    return answer


Predictor.predict = predict
"""

SIDE_EFFECTS = """

predict_honestly = Predictor.predict


def predict(self, ids):
    # Learns every chunk twice.
    answer = predict_honestly(self, ids)
    self.counts += torch.bincount(ids, minlength=len(self.counts))
    return answer


Predictor.predict = predict
"""

REMEMBERS = """

class Cheat(Predictor):
    # Looks into the chunk, and repeats what it answered as far as the question stays the same.
    last = None

    def predict(self, ids):
        rows = torch.full((len(ids), self.config.vocab_size), 1e-6)
        rows[torch.arange(len(ids)), ids] = 1.0
        rows = (rows / rows.sum(1, keepdim=True)).log()
        if self.last is not None:
            last_ids, last_rows = self.last
            n = min(len(last_ids), len(ids))
            same = int((last_ids[:n] == ids[:n]).int().cumprod(0).sum())
            rows[: same + 1] = last_rows[: same + 1]
        self.last = ids.clone(), rows.clone()
        return rows


def load_predictor(path, device="cpu"):
    return Cheat(load_artifact(path, device))
"""


class Bomb:
    def __reduce__(self):
        return Path, ("exploded",)


# By name: the code, the class, and the check that catches it.
CHEATS = {
    "leaks the next token": (WRAPPED + NEXT_TOKEN, "A", "causal"),
    "leaks a little": (WRAPPED + A_LITTLE.replace("SHARE", "1e-3"), "A", "causal"),
    "leaks next to nothing": (WRAPPED + A_LITTLE.replace("SHARE", "2e-5"), "A", "causal"),
    "leaks other documents": (WRAPPED + OTHER_DOCUMENTS, "A", "documents"),
    "leaks other documents, and remembers": (WRAPPED + REPEATS, "A", "documents"),
    "answers at random": (WRAPPED + RANDOM, "A", "deterministic"),
    "stops reading": (ACTS + DEAF, "A", "time"),
    "outlives its end": (SURVIVOR, "A", "time"),
    "endless loop": (ENDLESS, "A", "time"),
    "speaks nonsense": (NONSENSE, "A", "load"),
    "reads val from disk": (ACTS + READS_VAL, "A", "files_read"),
    "reads the network": (ACTS + NETWORK, "A", "network"),
    "starts a program": (ACTS + PROGRAM, "A", "programs"),
    "pickle bomb": (PICKLED, "A", "pickle"),
    "takes all memory": (GREEDY, "A", "memory"),
    "unnormalised": (ADAPTIVE + UNNORMALISED, "B", "normalised"),
    "scores twice": (ADAPTIVE + SCORES_TWICE, "B", "causal"),
    "leaks the chunk, and remembers": (ADAPTIVE + REMEMBERS, "B", "causal"),
    "learns twice": (ADAPTIVE + SIDE_EFFECTS, "B", "side_effects"),
    "honest and adaptive": (ADAPTIVE, "B", ""),
}


def adaptive_score(honest: Path) -> dict[str, float]:
    """What the adaptive predictor claims: the loop that tools/judge.py describes, written again."""
    names = {"torch": torch, "load_artifact": tg.load_artifact}
    exec(ADAPTIVE, names)
    predictor = names["load_predictor"](record.artifact_path(honest))
    ids = torch.from_numpy(np.array(read_shard(honest / "data" / "fineweb_val_000000.bin"), np.int64))
    n_bytes = int(read_shard(honest / "data" / "fineweb_val_bytes_000000.bin")[1:].sum(dtype=np.int64))
    nats = 0.0
    predictor.observe(ids[:1])
    for chunk in ids[1:].split(predictor.config.eval_seq_len):
        nats -= float(predictor.predict(chunk).double().gather(1, chunk[:, None]).sum())
        predictor.observe(chunk)
    return {"val_loss": nats / (len(ids) - 1), "val_bpb": nats / math.log(2) / n_bytes}


@pytest.fixture(scope="module")
def checks_of_cheats(honest, tmp_path_factory) -> dict[str, list[judge.Check]]:
    """The checks of every record that cheats, three at a time: some only wait."""
    root = tmp_path_factory.mktemp("cheats")

    def cheat(name: str) -> Path:
        code, predictor_class, _ = CHEATS[name]
        code = code.replace("VAL", str(honest / "data" / "fineweb_val_000000.bin"))
        changes = {}
        if name == "pickle bomb":
            changes = {"artifact_sha256": record.sha256(pickle.dumps(Bomb()))}
        elif name == "honest and adaptive":
            changes = adaptive_score(honest)
        folder = forge(honest, root / name / honest.name, code, changes, predictor_class=predictor_class)
        if name == "pickle bomb":
            record.artifact_path(folder).write_bytes(pickle.dumps(Bomb()))
        return folder

    def run(name: str) -> list[judge.Check]:
        seconds = 12.0 if CHEATS[name][2] == "time" else 60.0
        return rescored(folders[name], answer_seconds=seconds, memory_bytes=12 * 2**30, seed=1)

    # Made outside of the threads, where ast.parse is not safe (gh-106905).
    folders = {name: cheat(name) for name in CHEATS}
    with ThreadPoolExecutor(3) as pool:
        return dict(zip(CHEATS, pool.map(run, CHEATS), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_a_record_that_cheats_is_caught_by_name(checks_of_cheats, name):
    if name == "outlives its end" and not HAS_NAMESPACES:
        pytest.skip("no user namespaces here: it leads its session already, and fails to leave it")
    _, _, expected = CHEATS[name]
    found = failed(checks_of_cheats[name])
    assert expected in found if expected else not found, checks_of_cheats[name]


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no user namespaces here")
def test_nothing_outlives_the_sandbox(tmp_path):
    """Not even a process that left the group and does not die with its parent."""
    program = tmp_path / "program.py"
    program.write_text(
        "import ctypes, os, time\nos.setsid()\nctypes.CDLL(None).prctl(1, 0)\nprint(1, flush=True)\ntime.sleep(60)\n"
    )
    binds, pipe = [sandbox.Bind(program, "/x/program.py")], subprocess.PIPE
    inside = sandbox.Sandboxed(["/x/program.py", str(tmp_path)], binds, sandbox.Limits(), {}, stdout=pipe)
    assert inside.popen.stdout.readline() == b"1\n"

    def running() -> list[str]:
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return [line.decode() for line in lines if b"/x/program.py" in line and str(tmp_path).encode() in line]

    assert running()
    inside.close()
    patience = time.monotonic() + 20
    while running() and time.monotonic() < patience:
        time.sleep(0.05)
    assert running() == []


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no user namespaces here")
def test_settings_of_a_record_hold_inside_only(tmp_path, monkeypatch):
    """PATH and the like from a record must not reach the programs that build the walls."""
    (tmp_path / "unshare").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "unshare").chmod(0o755)
    program = tmp_path / "program.py"
    program.write_text("import os\nprint(os.environ['SETTING'], os.environ['PATH'])\n")
    binds, env = [sandbox.Bind(program, "/x/program.py")], {"PATH": str(tmp_path), "SETTING": "1"}
    inside = sandbox.Sandboxed(["/x/program.py"], binds, sandbox.Limits(), env, stdout=subprocess.PIPE)
    out = inside.popen.communicate()[0].decode().split()
    inside.close()
    assert out[0] == "1"
    assert str(tmp_path) not in out[1]
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no user namespaces here")
def test_walls_hold_without_the_audit_hook(tmp_path):
    """What a process inside can reach: no file of this test, no network, no place to write but its /tmp."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    program = tmp_path / "program.py"
    program.write_text(f"""
import json, os, socket, subprocess
def tried(act):
    try:
        act()
    except (OSError, subprocess.CalledProcessError) as error:
        return type(error).__name__
    return "done"
print(json.dumps([
    tried(lambda: open({str(secret)!r})),
    tried(lambda: open("/usr/x", "w")),
    tried(lambda: open("/tmp/x", "w")),
    tried(lambda: socket.create_connection(("127.0.0.1", 22), 1)),
    tried(lambda: os.chroot("/tmp")),
    tried(lambda: subprocess.run(["unshare", "--user", "true"], check=True, stderr=subprocess.DEVNULL)),
    tried(lambda: os.utime("/dev/null")),
    [name for _, name in socket.if_nameindex()],
    sorted(os.listdir("/")),
]))
""")
    binds = [sandbox.Bind(program, "/x/program.py")]
    inside = sandbox.Sandboxed(["/x/program.py"], binds, sandbox.Limits(), {}, stdout=subprocess.PIPE)
    out = json.loads(inside.popen.communicate()[0])
    inside.close()
    assert out[:3] == ["FileNotFoundError", "OSError", "done"]
    assert out[3:7] == ["OSError", "PermissionError", "CalledProcessError", "OSError"]
    assert out[7] == ["lo"]
    assert "x" in out[8]
    assert "home" not in out[8]
    assert not inside.root.exists()


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


# --- Data that cheat ---


def test_a_tokenizer_with_long_pieces_is_refused(tmp_path, train_tokenizer, documents):
    """A vocabulary of whole passages would be a model that counts no bytes."""
    for length, allowed in ((16, True), (40, False)):
        path = tmp_path / f"{length}.model"
        passage = [*documents, *[40 * "zx"] * 2000]
        path.write_bytes(train_tokenizer(passage, max_sentencepiece_length=length, split_by_whitespace=False))
        assert judge.check_tokenizer(path).ok == allowed


@pytest.mark.parametrize(("lossless", "accounting"), [(False, "sidecar"), ("unknown", "pieces")])
def test_what_a_record_says_of_its_own_text_must_be_provable(data, lossless, accounting):
    """Without a lossless tokenizer its own shards prove nothing; those that a judge names are believed."""
    identity = {"val_accounting": accounting, "val_text_sha256": "0", "tokenizer_lossless": lossless}
    split = tg.ValSplit(data.val, data.val_bytes, identity)
    assert judge.check_bytes_of_text(split, data.tokenizer, None, 1, data_is_own=False).ok
    assert not judge.check_bytes_of_text(split, data.tokenizer, None, 1, data_is_own=True).ok


def test_bytes_before_the_first_document_are_refused(data):
    identity = {"val_accounting": "sidecar", "val_text_sha256": "0", "tokenizer_lossless": False}
    late = tg.ValSplit(data.val[1:], data.val_bytes[1:], identity)
    assert not judge.check_bytes_of_text(late, data.tokenizer, None, 1, data_is_own=False).ok
