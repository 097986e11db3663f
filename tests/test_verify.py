"""tools/verify.py: an honest record passes, and every way to cheat is caught under its name."""

from __future__ import annotations

import dataclasses
import json
import math
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
import record as sub
import sandbox
import submission
import torch
import verify
from hypothesis import given
from hypothesis import strategies as st
from shards import read_shard, write_shard

import train_gpt as tg
from records import ADAPTIVE, WRAPPED, failed, forge, options, rescored

ROOT = Path(__file__).resolve().parents[1]
FIELDS = [field.name for field in dataclasses.fields(sub.Submission)]
WALLS = sandbox.isolation() == "namespaces"


@pytest.fixture(scope="module")
def honest(tmp_path_factory, run_script, record_settings, text) -> Path:
    """A record that tools/submission.py made of two real runs."""
    records = tmp_path_factory.mktemp("records")
    settings = {**record_settings, "DATA_PATH": str(text), "TOKENIZER_PATH": str(text / "tokenizer.model")}
    settings |= {"TRAIN_SEQ_LEN": "256", "TRAIN_BATCH_TOKENS": "1024"}  # several documents in a row
    runs = []
    for seed in ("1", "2"):
        run = run_script(**settings, SEED=seed, MAX_WEIGHT_BITS="4", OUT_DIR="logs", ARTIFACT_DIR=str(records / seed))
        assert run.status == 0, run.err
        runs.append(str(run.folder / "logs" / "run.json"))
    what = ["--track", "track_non_record_16mb", "--name", "Honest", "--github-id", "x", "--blurb", "b", "--author", "y"]
    assert submission.main(["new", *what, "--records", str(records), "--artifact", "--runs", *runs]) == 0
    return next((records / "track_non_record_16mb").iterdir())


# --- An honest record ---


def test_an_honest_record_passes_every_static_check(honest):
    checks = verify.static_checks(honest)
    assert failed(checks) == set(), checks
    assert len({check.name for check in checks}) == len(checks) >= 12


def test_static_checks_take_less_than_two_seconds_and_no_torch(honest):
    code = "import sys, verify; verify.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(honest)], cwd=ROOT / "tools", capture_output=True)
    assert done.returncode == 0
    assert time.perf_counter() - begin < 2 * 3  # 2 s quiet, more beside other tests


@pytest.mark.skipif(not WALLS, reason="no user namespaces here, so that nothing is signed")
def test_an_honest_record_scores_what_it_claims_and_signing_it_is_remembered(honest, tmp_path, capsys):
    folder = tmp_path / honest.parent.name / honest.name
    shutil.copytree(honest, folder)
    assert verify.main([str(folder), "--rescore", "--json", "--sign", "me", "--seed", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = {check["name"] for check in told["checks"]}
    assert {"causal", "documents", "deterministic", "score", "bytes_of_text", "text", "load"} <= names
    review = sub.load_reviews(folder)[-1]
    s = sub.load_submission(folder)
    assert (review.kind, review.reviewer, review.code_sha256) == ("rescored", "me", s.code_sha256)
    assert review.val_bpb == pytest.approx(s.seed_results[review.seed].val_bpb, abs=1e-6)
    assert failed(verify.static_checks(folder)) == set()


def test_the_judge_sums_as_the_script_evaluates(random_model, record_config, data, hp):
    """Two implementations of one definition: windows summed one by one, and the script's own evaluation."""
    for method, stride in (("document", 0), ("flat", 0), ("flat", 5), ("document", 5)):
        config = dataclasses.replace(
            record_config, vocab_size=320, eval_method=method, eval_stride=stride, compute_dtype="float32"
        )
        model = random_model(config)
        split = tg.ValSplit(data.val, data.val_bytes, {"partial": False})
        expected = tg.evaluate(model, split, config, hp, tg.World())
        record = SimpleNamespace(config=config, logits=torch.inference_mode()(model))
        scored, done = judge.score_fixed(record, split, 0, np.random.default_rng(0))
        assert (scored.targets, scored.bytes.sum()) == (expected.tokens, expected.bytes)
        assert scored.nats.sum() == pytest.approx(expected.nats, rel=1e-9)
        n_rows = len(tg.pack_rows(tg.scoring_windows(data.val, config), data.val, config))
        assert sum(probe.at_random for probe in done.probes) == min(judge.PROBES, n_rows)
        asked = [probe for turn in judge.in_turns(done.probes) for probe in turn]
        assert {probe.position for probe in asked} <= {probe.position for probe in done.probes}
        for i, probe in enumerate(asked):
            shown = [position for part in probe.seen for position in part]
            assert (split.ids[shown] == probe.row).all()
            assert (probe.row[-len(probe.document) :] == probe.document).all()
            assert probe.target == split.ids[probe.position]
            assert not {later.position for later in asked[i:]}.intersection(shown)


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
    table, asked = torch.from_numpy(chain).float().clamp_min(1e-9).log(), [0, 0, 0]

    def leaks(place: torch.Tensor) -> torch.Tensor:  # (..., 4): the tokens before a place and at it
        return (place @ torch.tensor([7, 11, 13, 17])) % 997 == 0

    def logits(ids: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(ids, (2, 1))
        known = leaks(padded.unfold(1, 4, 1))[..., None]
        return torch.where(known, 9.0 * torch.nn.functional.one_hot(padded[:, 3:], 64), table[ids])

    record = SimpleNamespace(config=config, logits=logits)
    for seed in range(10):
        _, done = judge.score_fixed(record, split, 0, np.random.default_rng(seed))
        shown = [[*[0, 0, *probe.row.tolist()][-3:], probe.target] for probe in done.probes]
        hit = leaks(torch.tensor(shown)).numpy()
        at_random = np.array([probe.at_random for probe in done.probes])
        assert hit[~at_random].any()
        asked = [a + int(b) for a, b in zip(asked, (hit[at_random].any(), hit[~at_random].sum(), 1), strict=True)]
    assert asked[0] < asked[2]  # chance alone would not do


def test_the_interval_of_a_sample_covers_the_score_of_the_whole():
    """The 95 % interval covers the truth about 95 times in 100."""
    rng = np.random.default_rng(0)
    n_bytes = rng.integers(100, 2000, 1000)
    nats = n_bytes * rng.normal(1.0, 0.2, 1000)
    truth = nats.sum() / math.log(2) / n_bytes.sum()
    hits = 0
    for _ in range(400):
        chosen = rng.choice(1000, 50, replace=False)
        scored = judge.Scored(nats[chosen], n_bytes[chosen], 0, 1000)
        hits += abs(scored.bpb - truth) <= scored.interval
    assert 0.91 <= hits / 400 <= 0.99


# --- Records that cheat, by --rescore ---

NEXT_TOKEN = (
    WRAPPED
    + '''

def changed(ids, logits):
    """Knows what comes."""
    return logits + 9 * F.one_hot(torch.cat((ids[:, 1:], ids[:, :1]), 1), logits.size(2))
'''
)
A_LITTLE = (
    WRAPPED
    + '''

def changed(ids, logits):
    """Knows what comes with a certainty of 1 in 1,000."""
    following = F.one_hot(torch.cat((ids[:, 1:], ids[:, :1]), 1), logits.size(2))
    return torch.log(0.999 * logits.softmax(2) + 0.001 * following)
'''
)
NEXT_TO_NOTHING = A_LITTLE.replace("1 in 1,000", "1 in 50,000").replace("0.999", "0.99998").replace("0.001", "0.00002")
REPEATS = (
    WRAPPED
    + '''

said = {}


def changed(ids, logits):
    """Knows the documents before; repeats for a document what it said when it saw more."""
    logits = logits + 4 * (F.one_hot(ids, logits.size(2)).cumsum(1) > 0)
    for row in range(len(ids)):
        for t in range(ids.size(1)):
            tail = tuple(ids[row, max(0, t - 5) : t + 1].tolist())
            logits[row, t] = said.setdefault(tail, logits[row, t].clone())
    return logits
'''
)
OTHER_DOCUMENTS = (
    WRAPPED
    + '''

def changed(ids, logits):
    """Knows what other documents in the row hold."""
    seen = F.one_hot(ids, logits.size(2)).cumsum(1)
    return logits + 4 * (seen > 0)
'''
)
RANDOM = (
    WRAPPED
    + """

def changed(ids, logits):
    return logits + torch.randn_like(logits)
"""
)
READS_VAL = """

load_honestly = load_artifact


def load_artifact(path, device="cpu"):
    known = open("VAL", "rb").read()
    return load_honestly(path, device)
"""
NETWORK = """

import socket

load_honestly = load_artifact


def load_artifact(path, device="cpu"):
    try:
        socket.create_connection(("127.0.0.1", 9), 1)
    except OSError:
        pass
    return load_honestly(path, device)
"""
PROGRAM = """

load_honestly = load_artifact


def load_artifact(path, device="cpu"):
    try:
        os.system("true")
    except OSError:
        pass
    return load_honestly(path, device)
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
UNNORMALISED = (
    ADAPTIVE
    + """

predict_honestly = Predictor.predict
Predictor.predict = lambda self, ids: predict_honestly(self, ids) + 0.5
"""
)
SCORES_TWICE = (
    ADAPTIVE
    + '''

predict_honestly = Predictor.predict


def predict(self, ids):
    """Learns the chunk first and says then what is in it."""
    before = self.counts.clone()
    self.counts += 1000 * torch.bincount(ids, minlength=len(before))
    said = predict_honestly(self, ids)
    self.counts = before
    return said


Predictor.predict = predict
'''
)
SIDE_EFFECTS = (
    ADAPTIVE
    + '''

predict_honestly = Predictor.predict


def predict(self, ids):
    """Learns every chunk twice."""
    said = predict_honestly(self, ids)
    self.counts += torch.bincount(ids, minlength=len(self.counts))
    return said


Predictor.predict = predict
'''
)


REMEMBERS = (
    ADAPTIVE
    + """


class Cheat(Predictor):
    \"\"\"Looks into the chunk, and repeats what it said as far as the question stays the same.\"\"\"

    said = None

    def predict(self, ids):
        rows = torch.full((len(ids), self.config.vocab_size), 1e-6)
        rows[torch.arange(len(ids)), ids] = 1.0
        rows = (rows / rows.sum(1, keepdim=True)).log()
        if self.said is not None:
            before, told = self.said
            n = min(len(before), len(ids))
            same = int((before[:n] == ids[:n]).int().cumprod(0).sum())
            rows[: same + 1] = told[: same + 1]
        self.said = ids.clone(), rows.clone()
        return rows


def load_predictor(path, device="cpu"):
    return Cheat(load_artifact(path, device))
"""
)
DEAF = """

import re
import threading

load_honestly = load_artifact


def load_artifact(path, device="cpu"):
    threading.Timer(1.0, lambda: re.match("(a+)+b", 60 * "a")).start()
    return load_honestly(path, device)
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


class Bomb:
    def __reduce__(self):
        return Path, ("exploded",)


CHEATS = {  # by name: the code, the class, and the check that catches it
    "leaks the next token": (NEXT_TOKEN, "A", "causal"),
    "leaks a little": (A_LITTLE, "A", "causal"),
    "leaks next to nothing": (NEXT_TO_NOTHING, "A", "causal"),
    "leaks other documents, and remembers": (REPEATS, "A", "documents"),
    "leaks the chunk, and remembers": (REMEMBERS, "B", "causal"),
    "stops reading": (DEAF, "A", "time"),
    "outlives its end": (SURVIVOR, "A", "time"),
    "speaks nonsense": (NONSENSE, "A", "load"),
    "leaks other documents": (OTHER_DOCUMENTS, "A", "documents"),
    "answers at random": (RANDOM, "A", "deterministic"),
    "reads val from disk": (READS_VAL, "A", "files_read"),
    "reads the network": (NETWORK, "A", "network"),
    "starts a program": (PROGRAM, "A", "programs"),
    "pickle bomb": (PICKLED, "A", "pickle"),
    "endless loop": (ENDLESS, "A", "time"),
    "takes all memory": (GREEDY, "A", "memory"),
    "unnormalised": (UNNORMALISED, "B", "normalised"),
    "scores twice": (SCORES_TWICE, "B", "causal"),
    "learns twice": (SIDE_EFFECTS, "B", "side_effects"),
    "honest and adaptive": (ADAPTIVE, "B", ""),
}


def adaptive_score(honest: Path) -> dict[str, float]:
    """What the adaptive predictor claims: the loop that tools/judge.py describes, written again."""
    names = {"torch": torch, "load_artifact": tg.load_artifact}
    exec(ADAPTIVE, names)
    predictor = names["load_predictor"](sub.artifact_path(honest))
    ids = torch.from_numpy(np.array(read_shard(honest / "data" / "fineweb_val_000000.bin"), np.int64))
    n_bytes = int(read_shard(honest / "data" / "fineweb_val_bytes_000000.bin")[1:].sum(dtype=np.int64))
    first, *chunks = [ids[:1], *ids[1:].split(predictor.config.eval_seq_len)]
    predictor.observe(first)
    nats = 0.0
    for chunk in chunks:
        nats -= float(predictor.predict(chunk).double().gather(1, chunk[:, None]).sum())
        predictor.observe(chunk)
    return {"val_loss": nats / (len(ids) - 1), "val_bpb": nats / math.log(2) / n_bytes}


@pytest.fixture(scope="module")
def caught(honest, tmp_path_factory) -> dict[str, dict[str, verify.Check]]:
    """The checks of every record that cheats, three at a time: some only wait."""
    root = tmp_path_factory.mktemp("cheats")

    def cheat(name: str) -> Path:
        code, predictor_class, _ = CHEATS[name]
        code = code.replace("VAL", str(honest / "data" / "fineweb_val_000000.bin"))
        changes = {"artifact_sha256": sub.sha256(pickle.dumps(Bomb()))} if name == "pickle bomb" else {}
        changes = adaptive_score(honest) if name == "honest and adaptive" else changes
        folder = forge(honest, root / name / honest.name, code, changes, predictor_class=predictor_class)
        if name == "pickle bomb":
            sub.artifact_path(folder).write_bytes(pickle.dumps(Bomb()))
        return folder

    def run(name: str) -> dict[str, verify.Check]:
        seconds = 12.0 if CHEATS[name][2] == "time" else 60.0
        return rescored(folders[name], timeout=seconds, memory=12.0, seed=1)

    folders = {name: cheat(name) for name in CHEATS}  # outside the threads: ast.parse is not safe there (gh-106905)
    with ThreadPoolExecutor(3) as pool:
        return dict(zip(CHEATS, pool.map(run, CHEATS), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_a_record_that_cheats_is_caught_by_name(caught, name):
    if name == "outlives its end" and not WALLS:
        pytest.skip("no user namespaces here: it leads its session already, and fails to leave it")
    expected = CHEATS[name][2]
    found = failed(caught[name])
    assert expected in found if expected else not found, caught[name]


@pytest.mark.skipif(not WALLS, reason="no user namespaces here")
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


@pytest.mark.skipif(not WALLS, reason="no user namespaces here")
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


@pytest.mark.skipif(not WALLS, reason="no user namespaces here")
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


def static_failures(honest: Path, target: Path, code: str = "", changes: dict | None = None, **top: object) -> set[str]:
    return failed(
        verify.static_checks(forge(honest, target / "track_non_record_16mb" / honest.name, code, changes, **top))
    )


def test_forging_alone_is_not_seen(honest, tmp_path):
    assert static_failures(honest, tmp_path, "# a comment\n") == set()


def test_code_in_a_blob_is_refused(honest, tmp_path):
    blob = "import base64\nexec(zlib.decompress(base64.b85decode('" + "A" * 2000 + "')))\n"
    assert "source" in static_failures(honest, tmp_path, blob)


@pytest.mark.parametrize(
    "code",
    [
        "exec('x = 1')",
        "run = eval\n",
        "import pickle\n",
        "from marshal import loads\n",
        "import importlib.util\n",
        "torch.load('x')\n",
        "getattr(__builtins__, 'ex' + 'ec')('x = 1')\n",
        "os.execv('/bin/true', [])\n",
        "np.load('x', allow_pickle=True)\n",
        "import subprocess\n",
        "import my_weights\n",
        "from os import system\n",
        "import os as o\no.execv('/bin/true', [])\n",
        "o = os\n",
        "getattr(torch, 'lo' + 'ad')('x')\n",
        "sys.modules['os']\n",
        "from torch import load\n",
        "torch.serialization.load('x')\n",
        "import torch.utils.cpp_extension\n",
        "np.ctypeslib.ctypes.CDLL(None)\n",
        "import pydoc\n",
        "import concurrent.futures\n",
        "os.__dict__['sys' + 'tem']('true')\n",
        "getattr(load_artifact, '__glo' + 'bals__')\n",
        "os.system('true')\n",
        "__loader__.load_module('x')\n",
        'x = 1\n"""' + "a" * 5000 + '"""\n',
        "x = [" + ",\n".join([repr("a" * 250)] * 200) + "]\n",
        "from . import helper\n",
        "x = " + repr("a" * 1600) + "\n",
        "x = " + "+".join(["1"] * 300) + "\n",
        "bytes.fromhex('00')\n",
    ],
)
def test_code_that_is_not_on_the_page_is_refused(honest, tmp_path, code):
    assert static_failures(honest, tmp_path, code) == {"source"}


def test_ordinary_code_is_not_refused(honest, tmp_path):
    code = "import gc\nimport datetime\n\nlast = gc.collect(), platform.system(), list(nn.Linear(1, 1).modules())\n"
    assert static_failures(honest, tmp_path, code) == set()


@pytest.mark.parametrize("code", ["import urllib.request\n", "from socket import socket\n", "import requests as r\n"])
def test_a_script_that_speaks_to_a_network_is_refused(honest, tmp_path, code):
    assert static_failures(honest, tmp_path, code) == {"no_network"}


def test_a_dropped_tail_is_caught(honest, tmp_path):
    run = sub.read_json(sub.run_path(honest, "1"))
    fewer = run["scored_tokens"] - 7
    changes = {"scored_tokens": fewer, "val_bpb": run["val_loss"] / math.log(2) * fewer / run["scored_bytes"]}
    assert static_failures(honest, tmp_path, "", {"val_loss": run["val_loss"], **changes}) == {"targets"}


def test_targets_scored_twice_are_caught(honest, tmp_path):
    run = sub.read_json(sub.run_path(honest, "1"))
    changes = {"scored_tokens": 2 * run["scored_tokens"], "scored_bytes": 2 * run["scored_bytes"]}
    changes |= {"val_loss": run["val_loss"], "val_bpb": run["val_bpb"]}
    assert static_failures(honest, tmp_path, "", changes) >= {"targets", "implied_bytes"}


def test_a_lie_about_bytes_is_caught(honest, tmp_path):
    run = sub.read_json(sub.run_path(honest, "1"))
    lie = {"val_bpb": 0.9 * run["val_bpb"], "val_loss": run["val_loss"]}
    assert static_failures(honest, tmp_path / "1", "", lie) == {"implied_bytes"}
    more = round(run["val_bytes"] / 0.9)
    lie |= {"val_bytes": more, "scored_bytes": more}
    lie["val_bpb"] = run["val_loss"] / math.log(2) * run["scored_tokens"] / more
    assert static_failures(honest, tmp_path / "2", "", lie) == {"data"}


def test_a_sidecar_that_lies_is_caught_by_the_text(honest, tmp_path):
    """Sidecar, manifest and claim agree, all of them forged: the text has the bytes it has."""
    folder = tmp_path / "track_non_record_16mb" / honest.name
    run = sub.read_json(sub.run_path(honest, "1"))
    sidecar = honest / "data" / "fineweb_val_bytes_000000.bin"
    longer = np.array(read_shard(sidecar)) * 2
    more = int(longer.sum(dtype=np.int64))
    lie = {"val_bytes": more, "scored_bytes": more, "val_loss": run["val_loss"], "val_bpb": run["val_bpb"] / 2}
    forge(honest, folder, "", lie)
    write_shard(folder / "data" / sidecar.name, longer)
    manifest = sub.read_json(folder / "data" / "manifest.json")
    manifest["splits"]["val"]["files"][sidecar.name] = sub.sha256((folder / "data" / sidecar.name).read_bytes())
    (folder / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert failed(verify.static_checks(folder)) == set()
    assert failed(rescored(folder, sample=2)) >= {"bytes_of_text"}


def test_what_submission_json_says_must_follow_from_the_runs(honest, tmp_path):
    folder = tmp_path / "track_non_record_16mb" / honest.name
    shutil.copytree(honest, folder)
    told = json.loads((folder / "submission.json").read_text())
    told["val_bpb"] -= 0.01
    (folder / "submission.json").write_text(json.dumps(told))
    assert failed(verify.static_checks(folder)) == {"summary"}


def test_a_seed_left_out_is_caught(honest, tmp_path):
    folder = tmp_path / "track_non_record_16mb" / honest.name
    shutil.copytree(honest, folder)
    s = sub.load_submission(folder)
    best = [sub.read_json(sub.run_path(folder, "2"))]
    sub.save_submission(folder, sub.summarize(best, sub.script_path(folder).read_bytes(), s.about))
    assert "seeds" in failed(verify.static_checks(folder))


def test_a_log_that_says_something_else_is_caught(honest, tmp_path):
    folder = tmp_path / "track_non_record_16mb" / honest.name
    shutil.copytree(honest, folder)
    log = sub.log_path(folder, "1")
    log.write_text(log.read_text().replace("val_bpb:", "val_bpb:1"))
    assert failed(verify.static_checks(folder)) == {"logs"}


@pytest.mark.parametrize(
    "name", ["submission.json", "README.md", "train_seed1.log", "train_seed2.json", "train_gpt.py"]
)
def test_a_missing_file_is_named(honest, tmp_path, name):
    folder = tmp_path / "track_non_record_16mb" / honest.name
    shutil.copytree(honest, folder)
    (folder / name).unlink()
    wrong = [check for check in verify.static_checks(folder) if not check.ok]
    assert any(name in check.reason for check in wrong), wrong


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
    folder = forge(honest, tmp_path / "track_non_record_16mb" / honest.name, "", changes)
    for path in sorted(honest.glob("train_seed*.log")):
        shutil.copyfile(path, folder / path.name)
    assert "logs" in failed(verify.static_checks(folder))


def test_a_target_is_reached_where_chance_would_not_do():
    """Student's test of three values by hand: t = 2.5 has p = 0.065 with two degrees of freedom."""
    values = [1.0, 1.1, 1.2]
    assert verify.below(1.1 + 2.5 * 0.1 / math.sqrt(3), values) == pytest.approx(0.06480, abs=1e-5)
    assert verify.below(1.1 - 2.5 * 0.1 / math.sqrt(3), values) == pytest.approx(1 - 0.06480, abs=1e-5)
    assert [verify.below(1.0, [x, x]) for x in (0.9, 1.0, 1.1)] == [0.0, 0.0, 1.0]
    assert verify.below(1.0, [0.1]) == 1.0


def test_lineage_tells_what_changed_in_the_script_and_in_the_settings(honest, tmp_path):
    track = tmp_path / "track_non_record_16mb"
    base = forge(honest, track / "2026-01-01_Base")
    new = forge(honest, track / honest.name, "# one line\n", {"matrix_lr": 0.5}, base=f"{track.name}/{base.name}")
    check = next(check for check in verify.static_checks(new) if check.name == "lineage")
    assert check.ok
    assert check.reason.startswith("1 lines more and 0 less")
    assert check.reason.endswith("settings: MATRIX_LR=0.5")


def test_praise_by_the_author_counts_for_nothing(honest, tmp_path):
    folder = tmp_path / "track_non_record_16mb" / honest.name
    shutil.copytree(honest, folder)
    s = sub.load_submission(folder)
    sub.add_review(folder, sub.Review("2026-01-01", s.author.upper(), "reproduced", s.code_sha256))
    assert failed(verify.static_checks(folder)) == {"reviews"}
    (folder / "reviews.json").write_text("{}")
    assert failed(verify.static_checks(folder)) == {"reviews"}


def test_files_that_are_none_of_a_record_are_refused(honest, tmp_path):
    folder = tmp_path / "track_non_record_16mb" / honest.name
    shutil.copytree(honest, folder)
    (folder / "helper.py").write_text("x = 1\n")
    (folder / "here").symlink_to("/etc")
    check = next(check for check in verify.static_checks(folder) if check.name == "files")
    assert "helper.py" in check.reason
    assert "here is a link" in check.reason


def test_limits_of_a_track_hold(honest, tmp_path):
    def at(track: str, changes: dict | None = None) -> dict[str, str]:
        folder = forge(
            honest, tmp_path / f"{track}{len(changes or {})}" / track / honest.name, "", changes, track=track
        )
        return {check.name: check.reason for check in verify.static_checks(folder) if not check.ok}

    found = at("track_10min_16mb")
    assert "H100" in found["track"]
    assert "wants 3" in found["seeds"]
    slow = {"device": "cuda:NVIDIA_H100", "world_size": 8, "seconds_train": 600.0, "seconds_calibrate": 0.5}
    found = at("track_10min_16mb", slow)
    assert found.keys() == {"track", "seeds", "clock"}
    assert "not on the published FineWeb validation text" in found["track"]
    assert "600.50 s of training" in found["clock"]
    assert {"context", "benchmark"} <= set(at("track_tiny_100m")["track"].split())
    assert "below 1.2244 at p = 0.99" in at("track_speedrun")["track"]


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


def test_a_coding_that_makes_comments_code_is_refused(honest, tmp_path):
    folder = forge(honest, tmp_path / "track_non_record_16mb" / honest.name)
    script = sub.script_path(folder)
    script.write_bytes(b"# coding: raw_unicode_escape\n# \\u000aimport pickle\n" + script.read_bytes())
    check = next(check for check in verify.static_checks(folder) if check.name == "source")
    assert "raw_unicode_escape" in check.reason


def test_a_record_cannot_print_a_check_of_its_own(honest, tmp_path, capsys):
    lie = "cpu:X\nok   score: val_bpb 0.9\x1b[8m"
    folder = forge(honest, tmp_path / "track_non_record_16mb" / honest.name, "", {"device": lie})
    verify.main([str(folder)])
    out = capsys.readouterr().out
    assert "ok   score" not in [line[:10] for line in out.splitlines()]
    assert "\x1b" not in out


def test_long_pieces_are_no_tokenizer(tmp_path, train_tokenizer, documents):
    """A vocabulary of whole passages would be a model that counts no bytes."""
    for length, fine in ((16, True), (40, False)):
        path = tmp_path / f"{length}.model"
        passage = [*documents, *[40 * "zx"] * 2000]
        options = {"max_sentencepiece_length": length, "split_by_whitespace": False}
        path.write_bytes(train_tokenizer(passage, **options))
        assert judge.check_tokenizer(path).ok == fine


def test_what_a_record_says_of_its_own_text_must_be_provable(data, tmp_path):
    """Without a lossless tokenizer its own shards prove nothing; those that a judge names are believed."""
    for lossless, accounting, own, fine in (
        (False, "sidecar", True, False),
        (False, "sidecar", False, True),
        ("unknown", "pieces", True, False),
        ("unknown", "pieces", False, True),
    ):
        identity = {"val_accounting": accounting, "val_text_sha256": "0", "tokenizer_lossless": lossless}
        split = tg.ValSplit(data.val, data.val_bytes, identity)
        assert judge.recount(split, data.tokenizer, None, 1, own).ok == fine
    late = tg.ValSplit(data.val[1:], data.val_bytes[1:], {**identity, "val_accounting": "sidecar"})
    assert not judge.recount(late, data.tokenizer, None, 1, False).ok  # bytes before the first document


# --- Training again ---


@pytest.mark.slow
@pytest.mark.skipif(not WALLS, reason="no user namespaces here")
def test_an_honest_record_trains_again_to_what_it_claims(honest, text):
    s = sub.load_submission(honest)
    checks, scored = verify.rerun(honest, s, options(honest, data=text, run_seed="1"))
    assert failed(checks) == set()
    assert scored is not None
    assert scored.bpb == pytest.approx(s.seed_results["1"].val_bpb, abs=1e-3)
