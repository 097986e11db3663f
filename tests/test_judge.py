"""tools/judge.py: its sums are those of the script, and every record that cheats is caught under its name."""

from __future__ import annotations

import dataclasses
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import judge
import numpy as np
import pytest
import record
import torch
from shards import read_shard

import train_gpt as tg
from records import ADAPTIVE, HAS_NAMESPACES, WRAPPED, failed, forge, rescored

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
