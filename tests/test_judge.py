"""tools/judge.py: its sums are those of the script, and every record that cheats is caught under its name."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import judge
import numpy as np
import pytest
import record
import sentencepiece as spm
import torch
from shards import read_shard, write_shard
from tokenizer import PIECE, PIECES, SCORE, TYPE, Tokenizer, byte_model, read_message, write_message

import train_gpt as tg
from records import ADAPTIVE, HAS_NAMESPACES, TRACK, WRAPPED, failed, forge, rescored

ROOT = Path(__file__).resolve().parents[1]
SMOKE = next((record.RECORDS / TRACK).glob("*_Smoke-test"))

# --- The judge's own arithmetic ---


class InProcess:
    """Stands where judge.RecordProcess would, with a function of this process in place of the record's code."""

    def __init__(self, config: tg.GPTConfig, logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.config = config
        self.logits = torch.inference_mode()(logits)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def next_token(self, ids: torch.Tensor, columns: list[int]) -> torch.Tensor:
        return self.logits(ids)[torch.arange(len(columns)), columns].log_softmax(1)


def options(**changed: object) -> judge.Options:
    return judge.Options(data=Path(), tokenizer=Path(), data_is_own=False, **changed)


def judged_fixed(
    config: tg.GPTConfig, split: tg.ValSplit, logits: Callable[[torch.Tensor], torch.Tensor], seed: int = 0
) -> tuple[judge.UnitScores, set[str]]:
    """The score of class A, and the names of the checks that fail."""

    def start() -> InProcess:
        return InProcess(config, logits)

    scores, checks = judge.judge_fixed(start(), start, split, options(), np.random.default_rng(seed))
    return scores, failed(checks)


METHODS = [("document", 0), ("flat", 0), ("flat", 5), ("document", 5)]


@pytest.mark.parametrize(("method", "stride"), METHODS)
def test_the_judge_sums_as_the_script_evaluates(random_model, record_config, data, method, stride):
    """And an honest model passes, whatever its windows."""
    config = dataclasses.replace(
        record_config, vocab_size=320, eval_method=method, eval_stride=stride, compute_dtype="float32"
    )
    model = random_model(config)
    split = tg.ValSplit(data.val[:150], data.val_bytes[:150], {"partial": False})
    expected = tg.evaluate(model, split, config, 256, tg.World())
    scores, failures = judged_fixed(config, split, model)
    assert failures == set()
    assert (scores.n_targets, scores.bytes.sum()) == (expected.tokens, expected.bytes)
    assert scores.nats.sum() == pytest.approx(expected.nats, rel=1e-6)
    assert scores.whole


@pytest.mark.parametrize(("method", "stride"), METHODS)
def test_nobody_has_seen_a_token_when_it_is_asked_for(record_config, data, method, stride):
    """Places are asked in turns; no turn so far, this one included, shows the target of any place in it."""
    config = dataclasses.replace(
        record_config, vocab_size=320, eval_method=method, eval_seq_len=256, eval_stride=8 * stride
    )
    rng = np.random.default_rng(0)
    split = tg.ValSplit(data.val, data.val_bytes, {})
    rows = judge.sample_windows(split, config, 0, rng).rows
    places = judge.draw_places(data.val, rows, config.eval_seq_len, rng)
    places = [place for place in places if not place.is_late]
    turns = judge.in_turns(places)
    assert sorted(i for turn in turns for i in turn) == list(range(len(places)))

    shown = set()
    documents = judge.first_of_documents(places, data.val, config.bos_id)
    assert method == "flat" or documents
    for i, ids in documents.items():
        begin = places[i].position - len(ids)
        assert (data.val[begin : places[i].position] == ids).all()
        shown.update(range(begin + 1, places[i].position))  # that a document opens with BOS is no secret
    for turn in turns:
        for i in turn:
            shown.update(position for part in places[i].before for position in part)
        assert not shown.intersection(places[i].position for i in turn)


def test_places_have_the_context_of_their_row(record_config, data):
    """What stands before a place is what the root's script feeds the model in the columns up to it."""
    config = dataclasses.replace(
        record_config, vocab_size=320, eval_method="document", eval_seq_len=256, eval_stride=40
    )
    rng = np.random.default_rng(0)
    split = tg.ValSplit(data.val, data.val_bytes, {})
    rows = judge.sample_windows(split, config, 0, rng).rows
    batch = tg.fill_rows(rows, data.val, len(rows), config.eval_seq_len)
    for place in judge.draw_places(data.val, rows, config.eval_seq_len, rng):
        row = batch.inputs[place.row].numpy()
        assert (row[: place.column + 1] == place.context(data.val)).all()
        assert batch.positions[place.row, place.column] == place.position
        assert data.val[place.position] == place.target


@pytest.mark.parametrize("n_targets", [1, 30, 999, 5000, 68_785, 10**6, 62 * 10**6])
def test_the_number_of_places_keeps_the_promise(n_targets):
    """Draws without replacement miss all leaks, 1 in 1,000 targets, in at most 1 of 100 cases (hypergeometric)."""
    n_places = judge.places_needed(n_targets)
    n_leaks = max(1, math.ceil(n_targets / 1000))
    miss = math.prod((n_targets - n_places - i) / (n_targets - i) for i in range(n_leaks))
    assert miss <= 0.0101
    assert n_places <= min(n_targets, 4606)


def test_places_are_drawn_at_random_and_where_a_leak_pays():
    rng = np.random.default_rng(0)
    ids = np.where(rng.random(40_000) < 0.9, 7, rng.integers(2, 500, 40_000)).astype(np.uint16)
    targets = np.arange(1, 40_000)
    positions, at_random, is_late = judge.draw_positions(ids, targets, rng)
    early = at_random & ~is_late
    assert early.sum() == judge.places_needed(len(targets))
    assert is_late.sum() == int(judge.LATE_SHARE * early.sum())
    assert (~at_random).sum() == int(judge.COSTLY_SHARE * early.sum())
    assert len(np.unique(positions)) == len(positions)
    assert np.isin(positions, targets).all()
    assert (ids[positions[at_random]] == 7).mean() == pytest.approx(0.9, abs=0.03)
    assert (ids[positions[~at_random]] == 7).mean() < 0.5


@pytest.mark.parametrize("seq_len", [64, 500])
def test_a_leak_at_one_place_in_a_thousand_is_found(record_config, seq_len):
    """Text of a Markov chain, predicted by the chain itself but for a few places, where the next token is known.

    Also where the text fills few rows.
    """
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(64, 0.3), 64)
    ids = [1]
    for u in rng.random(8000):
        ids.append(int(chain[ids[-1]].cumsum().searchsorted(u)))
    split = tg.ValSplit(np.array(ids, np.uint16), np.ones(len(ids), np.uint16), {})
    config = dataclasses.replace(record_config, vocab_size=64, eval_method="flat", eval_seq_len=seq_len, eval_stride=0)
    config = dataclasses.replace(config, document_masks=False)
    table = torch.from_numpy(chain).float().clamp_min(1e-9).log()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        """Knows the target if a sum over the three tokens before it and itself says so."""
        padded = torch.nn.functional.pad(ids, (2, 1))
        known = (padded.unfold(1, 4, 1) @ torch.tensor([7, 11, 13, 17]) % 997 == 0)[..., None]
        return torch.where(known, 9.0 * torch.nn.functional.one_hot(padded[:, 3:], 64), table[ids])

    assert judged_fixed(config, split, lambda ids: table[ids])[1] == set()
    assert judged_fixed(config, split, logits)[1] == {"causal"}


def test_a_channel_between_the_processes_does_not_help(random_model, record_config, data):
    """The scored process tells all that it sees, and every process looks there for what follows its context."""
    config = dataclasses.replace(record_config, vocab_size=320, eval_method="document", compute_dtype="float32")
    model = random_model(config)
    split = tg.ValSplit(data.val[:120], data.val_bytes[:120], {})
    told: dict[tuple[int, ...], int] = {}

    def logits(ids: torch.Tensor) -> torch.Tensor:
        for row in ids.tolist():
            for column in range(3, len(row)):
                told[tuple(row[column - 3 : column])] = row[column]
        answer = model(ids).clone()
        for i, row in enumerate(ids.tolist()):
            for column in range(2, len(row)):
                following = told.get(tuple(row[column - 2 : column + 1]))
                if following is not None:
                    answer[i, column, following] += 2.0
        return answer

    scores, failures = judged_fixed(config, split, logits)
    honest, _ = judged_fixed(config, split, model)
    assert scores.bpb < honest.bpb - 0.5
    assert "causal" in failures


def test_telling_the_scored_process_which_places_were_asked_does_not_help(
    random_model, record_config, data, monkeypatch
):
    """It answers honestly there, and knows what follows everywhere else: other places are asked afterwards."""
    monkeypatch.setattr(judge, "LEAK_RATE", 20)
    config = dataclasses.replace(record_config, vocab_size=320, eval_method="flat", compute_dtype="float32")
    model = random_model(config)
    split = tg.ValSplit(data.val[:600], data.val_bytes[:600], {})
    asked: set[tuple[int, ...]] = set()
    n_started = 0

    def start() -> InProcess:
        nonlocal n_started
        n_started += 1
        is_scored = n_started == 2

        def logits(ids: torch.Tensor) -> torch.Tensor:
            answer = model(ids).clone()
            for i, row in enumerate(ids.tolist()):
                for column in range(len(row) - 1):
                    context = tuple(row[: column + 1])
                    if not is_scored:
                        asked.add(context)
                    elif context not in asked:
                        answer[i, column, row[column + 1]] += 2.0
            return answer

        return InProcess(config, logits)

    _, checks = judge.judge_fixed(start(), start, split, options(), np.random.default_rng(0))
    assert "causal" in failed(checks)


def test_unseen_text_is_judged_like_the_scored_one(record_config, data, text):
    """A record that knows the scored text could look ahead on any other, and make the two look equally easy."""
    config = dataclasses.replace(record_config, vocab_size=320, eval_seq_len=64)

    def looks_ahead(ids: torch.Tensor) -> torch.Tensor:
        answer = torch.zeros(*ids.shape, 320)
        return answer.scatter_(2, ids.roll(-1, 1)[..., None], 4.0)

    split = tg.ValSplit(data.val, data.val_bytes, {})
    scores, failures = judged_fixed(config, split, lambda ids: torch.zeros(*ids.shape, 320))
    assert failures == set()
    unseen = options(unseen=text.parent / "unseen")
    unseen = dataclasses.replace(unseen, tokenizer=text / "tokenizer.model")
    for logits, ok in ((lambda ids: torch.zeros(*ids.shape, 320), True), (looks_ahead, False)):

        def start(logits=logits) -> InProcess:
            return InProcess(config, logits)

        check = judge.check_unseen(start, judge.judge_fixed, scores, unseen, np.random.default_rng(0))
        assert check.ok is ok
        assert ok or "causal" in check.reason


class Adaptive:
    """Stands where a judge.RecordProcess of class B would. It knows a chunk as soon as any process has seen it."""

    def __init__(self, config: tg.GPTConfig, told: set[tuple[int, ...]] | None) -> None:
        self.config = config
        self.told = told
        self.counts = torch.ones(config.vocab_size)

    __enter__ = InProcess.__enter__
    __exit__ = InProcess.__exit__

    def predict(self, ids: np.ndarray) -> torch.Tensor:
        rows = (self.counts / self.counts.sum()).log().repeat(len(ids), 1)
        if self.told is None:
            return rows
        self.told.add(tuple(ids.tolist()))
        for place in range(len(ids)):
            for chunk in self.told:
                if chunk[:place] == tuple(ids[:place].tolist()) and len(chunk) == len(ids):
                    rows[place, chunk[place]] += 2.0
        return rows.log_softmax(1)

    def predict_at(self, ids: np.ndarray, place: int) -> torch.Tensor:
        return self.predict(ids)[place]

    def observe(self, ids: np.ndarray) -> None:
        self.counts += torch.bincount(torch.from_numpy(ids), minlength=len(self.counts))


@pytest.mark.parametrize(("seq_len", "told", "expected"), [(16, None, set()), (16, set(), {"causal"})])
def test_a_channel_does_not_help_an_adaptive_predictor(record_config, data, seq_len, told, expected):
    config = dataclasses.replace(record_config, vocab_size=320, eval_seq_len=seq_len)
    split = tg.ValSplit(data.val[:200], data.val_bytes[:200], {})

    def start() -> Adaptive:
        return Adaptive(config, told)

    scores, checks = judge.judge_adaptive(start(), start, split, options(), np.random.default_rng(0))
    assert expected <= failed(checks) if expected else not failed(checks), checks
    assert scores.whole


def test_every_chunk_of_an_adaptive_predictor_is_asked_about(record_config, data):
    """A single chunk too, in which a place in eight is known."""
    config = dataclasses.replace(record_config, vocab_size=320, eval_seq_len=400)
    split = tg.ValSplit(data.val[:400], data.val_bytes[:400], {})

    class KnowsSome(Adaptive):
        def predict(self, ids: np.ndarray) -> torch.Tensor:
            rows = super().predict(ids)
            known = torch.arange(0, len(ids), 8)
            rows[known, torch.from_numpy(ids)[known]] += 5.0
            return rows.log_softmax(1)

    def start() -> Adaptive:
        return KnowsSome(config, None)

    _, checks = judge.judge_adaptive(start(), start, split, options(), np.random.default_rng(0))
    assert "causal" in failed(checks)


def test_a_context_that_would_take_days_to_ask_about_is_refused():
    judge.require_affordable(5000, 2048, 10**5)
    judge.require_affordable(5753, 2**15, 62 * 10**6)
    with pytest.raises(judge.RecordError, match="EVAL_SEQ_LEN=13421 or less") as error:
        judge.require_affordable(5000, 2**15, 35_000)
    assert error.value.check == "causal"


def test_padding_tells_nothing(record_config, data):
    """The scored rows are filled with text behind their documents, and all other cells keep what they hold."""
    config = dataclasses.replace(record_config, vocab_size=320, eval_method="document")
    split = tg.ValSplit(data.val, data.val_bytes, {})
    rng = np.random.default_rng(0)
    rows = judge.sample_windows(split, config, 0, rng).rows
    padded = tg.fill_rows(rows, data.val, len(rows) + 2, config.eval_seq_len)
    filled = tg.fill_rows(rows, data.val, len(rows) + 2, config.eval_seq_len)
    judge.hide_ends(filled, rows, data.val, rng)
    used = padded.targets != 0
    assert (filled.inputs[used] == padded.inputs[used]).all()
    assert (padded.inputs == 0).any()
    assert (filled.inputs != 0).all()


def test_rounding_follows_from_what_was_measured():
    """Within bounds, so that a record which answers at random explains nothing with it."""
    same = torch.full((4,), 0.25).log()
    bounds = judge.LEAST_ROUNDING, judge.MOST_ROUNDING
    for changed, expected in ((0.0, bounds[0]), (1e-3, None), (1.0, bounds[1])):
        answers = judge.Answers()
        answers.compare(0, True, same, (same + torch.tensor([changed, 0.0, 0.0, 0.0])).log_softmax(0))
        found = answers.rounding()
        if expected is not None:
            assert found == expected
        else:
            assert bounds[0].nats < found.nats < bounds[1].nats
            assert bounds[0].distance < found.distance < bounds[1].distance
        assert judge.check_repeated(answers).ok == (changed < 1.0)


def test_units_are_documents_or_windows(record_config):
    """By hand: BOS is 1, and a document's last target is the BOS behind it."""
    ids = np.array([1, 5, 6, 1, 7, 1, 8, 9], np.uint16)
    split = tg.ValSplit(ids, np.ones(8, np.uint16), {})
    for method, expected in (("document", [-1, 1, 1, 1, 2, 2, 3, 3]), ("flat", [-1, 0, 0, 0, 1, 1, 1, 2])):
        config = dataclasses.replace(record_config, eval_method=method, eval_seq_len=3, eval_stride=0)
        windows = list(tg.scoring_windows(ids, config))
        assert judge.units_of_targets(windows, split, config).tolist() == expected


@pytest.mark.parametrize("ids", [[1, 5, 6, 1, 7], [1, 5, 6, 1, 7, 1], [5, 6, 1, 7], [5, 6, 7]])
def test_a_whole_split_is_whole_wherever_documents_begin(ids):
    """Also if it ends with a BOS, or has none: BOS is 1."""
    split = tg.ValSplit(np.array(ids, np.uint16), np.ones(len(ids), np.uint16), {})
    starts = np.flatnonzero(split.ids == 1)
    scores = judge.sum_by_document(np.ones(len(ids)), split, starts)
    assert scores.whole
    assert scores.nats.sum() == len(ids) - 1
    assert not judge.sum_by_document(np.ones(len(ids) - 1), split, starts).whole


@pytest.mark.parametrize("n", [judge.MIN_SAMPLE, 60])
def test_a_sample_does_not_accuse_honest_records(n):
    """Documents as skewed as those of the web: the interval covers the truth, and the check passes nearly always."""
    rng = np.random.default_rng(0)
    n_bytes = np.exp(rng.normal(7, 1, 2000))
    nats = n_bytes * rng.normal(0.8, 0.05, 2000)
    truth = nats.sum() / math.log(2) / n_bytes.sum()
    covered = 0
    accused = 0
    for _ in range(200):
        chosen = rng.choice(2000, n, replace=False)
        scores = judge.UnitScores(nats[chosen], n_bytes[chosen], 0, 2000)
        covered += abs(scores.bpb - truth) <= scores.interval
        accused += not judge.check_score("score", scores, truth, record.SAME_SCORE).ok
    assert 0.87 <= covered / 200 <= 0.99
    assert accused / 200 <= 0.02


def test_what_is_not_compared_is_not_ok():
    """A few documents, and the first documents of an adaptive predictor, confirm no claim."""
    ones = np.ones(judge.MIN_SAMPLE - 1)
    few = judge.UnitScores(ones, ones, 5, 100)
    assert not judge.check_score("score", few, few.bpb, record.SAME_SCORE).ok
    first = judge.UnitScores(np.ones(50), np.ones(50), 50, 100, is_prefix=True)
    assert not judge.check_score("score", first, first.bpb, record.SAME_SCORE).ok
    whole = judge.UnitScores(np.ones(50), np.ones(50), 50, 50)
    assert judge.check_score("score", whole, whole.bpb, record.SAME_SCORE).ok
    assert not judge.check_score("score", whole, whole.bpb - 0.00098, record.SAME_SCORE).ok


def test_without_walls_nothing_of_a_record_runs_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "isolation", lambda: "none: no user namespaces")
    folder = forge(SMOKE, tmp_path / TRACK / SMOKE.name, f"Path({str(tmp_path / 'ran')!r}).touch()\n")
    checks = rescored(folder)
    assert failed(checks) == {"isolation"}
    assert "--without-walls" in checks[0].reason
    assert not (tmp_path / "ran").exists()


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
    open("/data/fineweb_val_000000.bin", "rb").read()
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


A_LITTLE_EVERYWHERE = """
def changed(ids, logits):
    # The target gets 1.03 times its probability.
    return logits + 0.03 * F.one_hot(torch.cat((ids[:, 1:], ids[:, :1]), 1), logits.size(2))
"""

HALF = """

load_honestly = load_artifact


def load_artifact(path, device="cpu"):
    model = load_honestly(path, device)
    forward = model.forward

    def in_bfloat16(ids):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(ids).float()

    model.forward = torch.compile(in_bfloat16)
    return model
"""

LEARNS = """

class Learner:
    # The model with a bias that learns from what was observed.
    def __init__(self, model):
        self.model = model
        self.config = model.config
        self.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
        self.optimizer = torch.optim.SGD([self.bias], lr=0.01)
        self.past = torch.zeros(0, dtype=torch.int64)

    def logits(self, ids):
        context = self.past[-16:]
        with torch.no_grad():
            logits = self.model(torch.cat((context, ids))[None])[0]
        return logits[len(context) - 1 : -1] + self.bias

    def predict(self, ids):
        return self.logits(ids).log_softmax(1).detach()

    def observe(self, ids):
        if len(self.past):
            self.optimizer.zero_grad()
            F.cross_entropy(self.logits(ids), ids).backward()
            self.optimizer.step()
        self.past = torch.cat((self.past, ids))[-16:]


def load_predictor(path, device="cpu"):
    return Learner(load_artifact(path, device))
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
    "a little everywhere": (WRAPPED + A_LITTLE_EVERYWHERE, "A", "causal"),
    "honest and adaptive": (ADAPTIVE, "B", ""),
    "honest, with an optimizer": (LEARNS, "B", ""),
    "honest, in bfloat16 and compiled": (HALF, "A", ""),
}


def half_score(honest: Path) -> dict[str, float]:
    """What the model claims that computes in bfloat16."""
    config, split = tg.load_artifact(record.artifact_path(honest)).config, honest / "data"
    names = {"torch": torch, "load_artifact": tg.load_artifact}
    exec(HALF.replace("torch.compile(in_bfloat16)", "in_bfloat16"), names)
    model = names["load_artifact"](record.artifact_path(honest))
    loaded = judge.load_split(split, split / "tokenizer.model", config)
    score = tg.evaluate(model, loaded, config, 4096, tg.World())
    return {"val_loss": score.val_loss, "val_bpb": score.val_bpb}


def adaptive_score(honest: Path, code: str) -> dict[str, float]:
    """What an adaptive predictor claims: the loop that tools/judge.py describes, written again."""
    names = {"torch": torch, "F": torch.nn.functional, "load_artifact": tg.load_artifact}
    exec(code, names)
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
def checks_of_cheats(honest, tmp_path_factory) -> Iterator[dict[str, list[judge.Check]]]:
    """The checks of every record that cheats, three at a time: some only wait. They know more than one in 1,000."""
    root = tmp_path_factory.mktemp("cheats")

    def cheat(name: str) -> Path:
        code, predictor_class, _ = CHEATS[name]
        changes = {}
        if name == "pickle bomb":
            changes = {"artifact_sha256": record.sha256(pickle.dumps(Bomb()))}
        elif name.startswith("honest"):
            changes = adaptive_score(honest, code) if predictor_class == "B" else half_score(honest)
        folder = forge(honest, root / name / honest.name, code, changes, predictor_class=predictor_class)
        if name == "pickle bomb":
            record.artifact_path(folder).write_bytes(pickle.dumps(Bomb()))
        return folder

    def run(name: str) -> list[judge.Check]:
        seconds = 12.0 if CHEATS[name][2] == "time" else 60.0
        return rescored(folders[name], answer_seconds=seconds, memory_bytes=12 * 2**30, seed=1)

    # Made outside of the threads, where ast.parse is not safe (gh-106905).
    folders = {name: cheat(name) for name in CHEATS}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(judge, "LEAK_RATE", 50)
        yield dict(zip(CHEATS, pool.map(run, CHEATS), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_a_record_that_cheats_is_caught_by_name(checks_of_cheats, name):
    if name == "outlives its end" and not HAS_NAMESPACES:
        pytest.skip("no user namespaces here: it leads its session already, and fails to leave it")
    _, _, expected = CHEATS[name]
    found = failed(checks_of_cheats[name])
    assert expected in found if expected else not found, checks_of_cheats[name]


# --- Data that cheat ---


@pytest.fixture(scope="module")
def claims() -> record.Submission:
    """What some record claims."""
    return record.load_submission(SMOKE)


def claiming(split: tg.ValSplit, claims: record.Submission, **changed: object) -> record.Submission:
    """The submission of a record, as if it had been scored on this split."""
    names = {field.name for field in dataclasses.fields(record.Submission)}
    values = {name: value for name, value in split.identity.items() if name in names}
    return dataclasses.replace(claims, **(values | changed))


def checks_of_text(
    folder: Path, claims: record.Submission, documents: Path | None = None, **changed: object
) -> list[judge.Check]:
    """What the judge says of the text in a folder of shards, and of its tokenizer."""
    tokenizer = folder / "tokenizer.model"
    vocab_size = Tokenizer(tokenizer.read_bytes(), tokenizer).sp.get_piece_size()
    split = judge.load_split(folder, tokenizer, dataclasses.replace(tg.GPTConfig(), vocab_size=vocab_size))
    submission = claiming(split, claims, **changed)
    return judge.check_bytes_of_text(split, tokenizer, documents, 1, submission, data_is_own=True)


def lossy_export(folder: Path, documents: list[str], last: str) -> Path:
    """Shards whose tokenizer knows the characters up to `last` only, with the documents beside them."""
    known = ["".join(c for c in text if c <= last) for text in documents]
    trained = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(known), model_writer=trained, model_type="bpe", vocab_size=40, minloglevel=2
    )
    model = trained.getvalue()
    (folder / "some.model").write_bytes(model)
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:40]))
    (folder / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:20]))
    options = ["--input", "docs.jsonl", "--val-docs", "20", "--tokenizer", "some.model", "--name", "text"]
    command = [sys.executable, str(ROOT / "data" / "build_shards.py"), *options, "--out", ".", "--workers", "1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    shutil.copyfile(folder / "some.model", folder / "datasets" / "text" / "tokenizer.model")
    return folder / "datasets" / "text"


@pytest.fixture(scope="module")
def lossy_text(tmp_path_factory, documents) -> Path:
    """A tokenizer that does not know w, y and z."""
    return lossy_export(tmp_path_factory.mktemp("lossy"), documents, "v")


def test_a_text_of_which_much_is_lost_is_not_scored(tmp_path, documents, claims):
    """Who chooses what is lost could lose all that is hard to predict, and be scored on the rest."""
    folder = lossy_export(tmp_path, documents, "m")
    assert failed(checks_of_text(folder, claims, tmp_path / "val.jsonl")) == {"bytes_of_text"}


def test_another_way_to_cut_a_lossless_text_is_refused(text, claims, tmp_path):
    """It gives the same text back, but the pieces could be those that the model finds easiest."""
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    sp = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    shard = folder / "fineweb_val_000000.bin"
    sidecar = folder / "fineweb_val_bytes_000000.bin"
    ids = np.array(read_shard(shard))
    n_bytes = np.array(read_shard(sidecar))
    # One piece of two bytes or more is spelt with the pieces of its bytes.
    place = next(i for i in range(1, len(ids)) if n_bytes[i] > 1 and sp.id_to_piece(int(ids[i])).isascii())
    spelt = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in sp.id_to_piece(int(ids[place])).encode()]
    write_shard(shard, np.concatenate((ids[:place], spelt, ids[place + 1 :])).astype(np.uint16))
    write_shard(sidecar, np.concatenate((n_bytes[:place], [1] * len(spelt), n_bytes[place + 1 :])).astype(np.uint16))
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in (shard, sidecar):
        manifest["splits"]["val"]["files"][path.name] = record.sha256(path.read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert failed(checks_of_text(folder, claims)) == {"bytes_of_text"}


def test_the_judge_decodes_a_lossless_text(text, claims):
    assert failed(checks_of_text(text, claims)) == set()
    assert failed(checks_of_text(text, claims, tokenizer_lossless=False)) == {"lossless"}


def test_a_lossy_text_needs_its_documents(lossy_text, claims):
    """And is called lossy, whatever manifest and record say."""
    documents = lossy_text.parents[1] / "val.jsonl"
    assert failed(checks_of_text(lossy_text, claims)) == {"bytes_of_text"}
    assert failed(checks_of_text(lossy_text, claims, documents)) == set()
    assert failed(checks_of_text(lossy_text, claims, documents, tokenizer_lossless=True)) == {"lossless"}


def test_bytes_that_a_lossy_tokenizer_drops_are_not_counted(lossy_text, claims, tmp_path):
    """A sidecar of the old rule, which gave every byte of the text to some token, with a manifest that agrees."""
    folder = tmp_path / "text"
    shutil.copytree(lossy_text, folder)
    [sidecar] = folder.glob("fineweb_val_bytes_*.bin")
    n_bytes = np.array(read_shard(sidecar))
    write_shard(sidecar, np.where(n_bytes > 0, n_bytes + 1, 0).astype(np.uint16))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["val"]["files"][sidecar.name] = record.sha256(sidecar.read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    documents = lossy_text.parents[1] / "val.jsonl"
    assert failed(checks_of_text(folder, claims, documents)) == {"bytes_of_text"}


def test_documents_that_are_not_the_text_are_refused(lossy_text, claims):
    documents = lossy_text.parents[1] / "docs.jsonl"
    assert failed(checks_of_text(lossy_text, claims, documents)) == {"bytes_of_text"}


def test_bytes_of_pieces_prove_nothing_of_a_record_that_brings_its_text(data, claims):
    split = tg.ValSplit(data.val, data.val_bytes, {"val_accounting": "pieces", "val_text_sha256": "unknown"})
    for is_own in (True, False):
        checks = judge.check_bytes_of_text(split, data.tokenizer, None, 1, claiming(split, claims), is_own)
        assert failed(checks) == ({"bytes_of_text"} if is_own else set())


def test_bytes_before_the_first_document_are_refused(data, claims):
    identity = {"val_accounting": "sidecar", "val_text_sha256": "0", "tokenizer_lossless": False}
    late = tg.ValSplit(data.val[1:], data.val_bytes[1:], identity)
    checks = judge.check_bytes_of_text(late, data.tokenizer, None, 1, claiming(late, claims), data_is_own=False)
    assert failed(checks) == {"bytes_of_text"}


def test_a_text_of_the_standard_library_is_a_demonstration(claims):
    """Every process in the sandbox can read it there. The one of the claims is listed as a demonstration."""
    assert judge.check_hidden([Path(textwrap.__file__).read_text()], claims).ok
    submission = dataclasses.replace(claims, val_text_sha256="0")
    assert not judge.check_hidden([textwrap.__doc__ or "", Path(textwrap.__file__).read_text()], submission).ok
    assert judge.check_hidden(["A text that stands in no library, as far as anybody knows.\n" * 3], submission).ok


def test_a_vocabulary_cut_from_the_scored_text_is_refused(tmp_path, documents):
    """Its pieces are passages of 16 characters in the order of the text: a model that says id + 1 knows everything.

    Pieces that were trained on other text pass, also where the vocabulary is large for the text.
    """
    letters = random.Random(0)
    text = "".join(letters.choice("abcdefghij ") for _ in range(16 * 600))
    passages = list(dict.fromkeys(text[i : i + 16].replace(" ", "\u2581") for i in range(0, len(text), 16)))
    fields = [*read_message(byte_model())]
    pieces = [(PIECES, write_message([(PIECE, piece.encode()), (SCORE, 0.0), (TYPE, 1)])) for piece in passages]
    n_special = sum(field == PIECES for field, _ in fields)
    forged = tmp_path / "forged.model"
    forged.write_bytes(write_message([*fields[:n_special], *pieces, *fields[n_special:]]))

    ids = np.arange(n_special, n_special + len(passages), dtype=np.uint16)
    split = tg.ValSplit(ids, np.full(len(ids), 16, np.uint16), {})
    assert not judge.check_vocabulary(split, forged).ok


def test_a_trained_vocabulary_passes(text):
    tokenizer = text / "tokenizer.model"
    split = judge.load_split(text, tokenizer, dataclasses.replace(tg.GPTConfig(), vocab_size=320))
    assert judge.check_vocabulary(split, tokenizer).ok
