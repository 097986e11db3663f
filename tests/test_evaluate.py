"""tools/evaluate.py and tools/benchmarks.py: figures against closed forms, a second implementation, and the harness."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import statistics
import sys
import types
from pathlib import Path
from typing import Any

import artifact
import benchmarks
import evaluate
import numpy as np
import pytest
import record
import sentencepiece as spm
import torch
from artifact import Stretch, Subject, open_subject
from evaluate import Options
from hypothesis import given
from hypothesis import strategies as st
from sample import CARD_PROMPTS
from sample import main as sample_command
from tokenizer import Tokenizer
from tokenizer import train_tokenizer as train_own_tokenizer
from transforms import OPERATORS

SHARED = record.ROOT.parent / "shared" / "data"
SMOKE = next((record.RECORDS / "track_non_record_16mb").glob("*_Smoke-test"))

PAGES = [
    " = First page = \n Some words , others ; a 1 @,@ 000 @-@ word page ( with brackets ) . \n = = Part = = \n End \n",
    ' = Second = \n " A quote " is here : it \'s short . \u6771\u4eac \n',
]
PAIRS = {
    "agreement": [("the cat sees it.", "the cat see it."), ("a dog runs.", "a dog run."), ("same here.", "same here.")],
    "islands": [("who did you see?", "who did you see him?"), ("it is so.", "so it is is.")],
}
QUESTIONS = [
    ("What is wet?", ["water", "sand", "dry air", "rock"], 0),
    ("Which one is a star?", ["the moon", "the sun", "the earth"], 1),
    ("How many legs has a dog?", ["1", "2", "4"], 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Small benchmarks in the layout of --data."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name in ("blimp", "arc-easy", "wikitext-2"):
        (folder / name).mkdir()
    pairs = [
        {"sentence_good": good, "sentence_bad": bad, "UID": name} for name, of in PAIRS.items() for good, bad in of
    ]
    questions = []
    for stem, texts, gold in QUESTIONS:
        labels = "ABCD"[: len(texts)]
        choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        questions.append({"question": {"stem": stem, "choices": choices}, "answerKey": labels[gold]})
    for path, rows in (("blimp/blimp.jsonl", pairs), ("arc-easy/test.jsonl", questions)):
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wikitext-2" / "wiki.test.raw").write_text("".join(PAGES))
    return folder


@pytest.fixture(scope="module")
def sp(lossless_tokenizer) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=lossless_tokenizer)


@pytest.fixture(scope="module")
def stub(lossless_tokenizer):
    """A function that makes a subject whose every prediction has the same logits, (V,)."""

    def make(logits: torch.Tensor) -> Subject:
        config = types.SimpleNamespace(vocab_size=len(logits), bos_id=1, eval_seq_len=16)

        def model(ids: torch.Tensor) -> torch.Tensor:
            return logits.expand(*ids.shape, -1).clone()

        tokenizer = Tokenizer(lossless_tokenizer, Path("tokenizer.model"))
        script = Path("train_gpt.py")
        nothing = types.ModuleType("script")
        return Subject(model, config, tokenizer, Path("a.ptz"), script, nothing, {}, torch.device("cpu"))

    return make


@pytest.fixture(scope="module")
def uniform(stub) -> Subject:
    return stub(torch.zeros(320))


@pytest.fixture(scope="module")
def log_p() -> torch.Tensor:
    """The logarithms of some unigram distribution."""
    return torch.randn(320, generator=torch.Generator().manual_seed(0)).log_softmax(0)


@pytest.fixture(scope="module")
def unigram(stub, log_p) -> Subject:
    return stub(log_p)


@pytest.fixture(scope="module")
def subject(trained_record) -> Subject:
    return open_subject(trained_record.run_folder)


def options(folder: Path, protocol: str = "lmeval", **changes: Any) -> Options:
    return Options(**{"protocol": protocol, "context": 16, "data": folder, **changes})


def figures(task: str, subject: Subject, scoring: Options) -> dict[str, Any]:
    return evaluate.RUN_TASK[task](subject, scoring, evaluate.load_task(task, subject, scoring))


# --- Closed forms ---


def test_uniform_model_needs_log2_of_the_vocabulary_per_token(uniform, folder, sp):
    result = figures("wikitext2", uniform, options(folder))
    n_tokens = sum(len(sp.encode(benchmarks.detokenize(page))) for page in PAGES)
    n_bytes = len("".join(PAGES).encode())
    assert result["tokens"] == n_tokens
    assert result["bytes"] == n_bytes
    assert result["loss"] == pytest.approx(math.log(320), rel=1e-6)
    assert result["bpb"] == pytest.approx(n_tokens * math.log2(320) / n_bytes, rel=1e-6)
    assert result["byte_perplexity"] == pytest.approx(2 ** result["bpb"], rel=1e-9)
    assert result["token_perplexity"] == pytest.approx(320, rel=1e-5)


def test_board_scores_every_token_of_the_text_but_the_first(uniform, folder, sp):
    result = figures("wikitext2", uniform, options(folder, "board"))
    text = "".join(PAGES)
    n_targets = len(sp.encode(text)) - 1
    assert result["tokens"] == n_targets
    assert result["nats"] == pytest.approx(n_targets * math.log(320), rel=1e-6)
    assert result["bytes"] == result["bytes_normalised"] == len(text.encode())
    assert result["words"] == len(text.split())
    assert result["word_perplexity"] == pytest.approx(math.exp(result["nats"] / len(text.split())), rel=1e-9)


@pytest.mark.parametrize("protocol", evaluate.PROTOCOLS)
def test_tokenizer_that_drops_line_ends_gets_no_credit_for_them(uniform, train_tokenizer, documents, folder, protocol):
    """Per byte of the text it has an easier task, per byte of what its tokens decode to it has not."""
    model = train_tokenizer(documents)
    lossy = uniform._replace(tokenizer=Tokenizer(model, Path("lossy.model")))
    result = figures("wikitext2", lossy, options(folder, protocol))
    sp = spm.SentencePieceProcessor(model_proto=model)
    texts = ["".join(PAGES)] if protocol == "board" else [benchmarks.detokenize(page) for page in PAGES]
    assert result["bytes"] == len("".join(PAGES).encode())
    assert result["bytes_normalised"] == sum(len(sp.decode(sp.encode(text)).encode()) for text in texts)
    assert result["bytes_normalised"] < result["bytes"]
    n_targets = sum(len(sp.encode(text)) for text in texts) - (protocol == "board")
    assert result["bpb"] == pytest.approx(n_targets * math.log2(320) / result["bytes"], rel=1e-6)
    assert result["bpb_normalised"] == pytest.approx(n_targets * math.log2(320) / result["bytes_normalised"], rel=1e-6)


def test_words_are_those_of_the_text_before_it_was_detokenized(uniform, folder):
    """The harness counts an empty word before a blank at the start, and one behind a blank at the end."""
    result = figures("wikitext2", uniform, options(folder))
    assert result["words"] == sum(len(page.split()) + 2 for page in PAGES)


@pytest.mark.parametrize("protocol", evaluate.PROTOCOLS)
def test_unigram_model_chooses_by_the_sum_over_the_sentence(unigram, log_p, sp, folder, protocol):
    def score(sentence: str) -> float:
        ids = sp.encode(sentence)[1:] if protocol == "board" else sp.encode(" " + sentence)
        return float(log_p[ids].double().sum())

    result = figures("blimp", unigram, options(folder, protocol))
    right = {name: [score(good) > score(bad) for good, bad in pairs] for name, pairs in PAIRS.items()}
    for name, answers in right.items():
        assert result["sets"][name]["acc"] == sum(answers) / len(answers)
    assert result["acc"] == statistics.fmean(sum(answers) / len(answers) for answers in right.values())
    assert result["n"] == 5
    assert result["ties"] == 1  # the pair of equal sentences


def test_unigram_model_answers_by_the_tokens_of_the_choice_alone(unigram, log_p, sp, folder):
    answers = []
    answers_norm = []
    for stem, choices, gold in QUESTIONS:
        prompt = sp.encode(f"Question: {stem}\nAnswer:")
        sums = [float(log_p[sp.encode(f"Question: {stem}\nAnswer: {c}")[len(prompt) :]].sum()) for c in choices]
        per_character = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        answers.append(sums.index(max(sums)) == gold)
        answers_norm.append(per_character.index(max(per_character)) == gold)
    result = figures("arc_easy", unigram, options(folder, context=256))
    assert (result["acc"], result["acc_norm"]) == (statistics.fmean(answers), statistics.fmean(answers_norm))
    board = figures("arc_easy", unigram, options(folder, "board"))
    assert board["acc"] == result["acc"]
    assert "acc_norm" not in board


def test_model_that_knows_nothing_is_never_right(stub, tmp_path):
    """With equal probabilities for all choices, counting ties as right would make this 100 %."""
    (tmp_path / "blimp").mkdir()
    rows = [{"sentence_good": "ab", "sentence_bad": "ba", "UID": "letters"}] * 3
    (tmp_path / "blimp" / "blimp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    uniform = stub(torch.zeros(320))
    assert len(artifact.encode(uniform, " ab")) == len(artifact.encode(uniform, " ba"))
    result = figures("blimp", uniform, options(tmp_path))
    assert (result["acc"], result["ties"], result["n"]) == (0, 3, 3)


@pytest.mark.parametrize(
    ("scores", "gold", "right", "tie"),
    [
        ([-1.0, -2.0], 0, True, False),
        ([-1.0, -1.0], 0, False, True),
        ([-2.0, -1.0, -2.0], 1, True, False),
        ([-2.0, -1.0, -1.0], 0, False, False),
        ([-1.0, -3.0, -1.0], 2, False, True),
    ],
)
def test_only_a_strictly_higher_score_is_right(scores, gold, right, tie):
    assert evaluate.chooses(scores, gold) is right
    assert evaluate.is_tie(scores, gold) is tie


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_standard_error_is_that_of_a_mean(answers):
    expected = statistics.stdev(map(float, answers)) / math.sqrt(len(answers))
    assert evaluate.standard_error(answers) == pytest.approx(expected, abs=1e-12)
    assert evaluate.standard_error(answers[:1]) is None


@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=20), min_size=1, max_size=6))
def test_pooled_error_comes_from_the_variance_within_the_sets(sets):
    n = sum(map(len, sets))
    squares = sum((x - statistics.fmean(answers)) ** 2 for answers in sets for x in answers)
    errors = [evaluate.standard_error(answers) for answers in sets]
    pooled = evaluate.pooled_error(errors, [len(answers) for answers in sets])
    assert pooled == pytest.approx(math.sqrt(squares / (n - len(sets)) / n), abs=1e-12)
    assert evaluate.pooled_error([*errors, None], [*map(len, sets), 1]) is None


# --- Windows ---


@given(st.integers(1, 60), st.integers(1, 20))
def test_rolling_windows_score_each_token_once_behind_what_stands_before_it(n, context):
    ids = list(range(2, n + 2))
    text = [1, *ids]
    scored = []
    for stretch in evaluate.rolling_windows(ids, 1, context):
        assert len(stretch.ids) <= context + 1
        start = stretch.ids[0] - 1
        assert list(stretch.ids) == text[start : start + len(stretch.ids)]
        scored += stretch.ids[-stretch.n_targets :]
    assert scored == ids
    # The last window is as long as the others, so that its targets have as much context.
    assert len(stretch.ids) == min(n, context) + 1


@given(st.integers(1, 60), st.integers(1, 20))
def test_flat_windows_score_each_token_but_the_first_once(n, context):
    ids = list(range(n))
    windows = list(evaluate.flat_windows(ids, context))
    assert [token for window in windows for token in window.ids[-window.n_targets :]] == ids[1:]
    assert all(len(window.ids) == window.n_targets + 1 <= context + 1 for window in windows)


def test_too_long_sentence_loses_its_end_on_the_board_and_its_beginning_in_the_harness(uniform):
    sentence = "abc " * 200
    ids = artifact.encode(uniform, sentence)
    assert len(ids) > 256
    board = evaluate.sentence_stretch(uniform, sentence, "board", 16)
    assert board == Stretch(ids[:256], 255)
    harness = evaluate.sentence_stretch(uniform, sentence, "lmeval", 16)
    assert harness == Stretch(artifact.encode(uniform, " " + sentence)[-17:], 16)


def test_positions_are_parted_by_powers_of_two():
    positions = np.array([1, 1, 2, 3, 4, 5, 8, 9])
    nats = np.array([4.0, 2.0, 2.0, 1.0, 3.0, 5.0, 7.0, 1.0])
    rows = evaluate.loss_by_position(positions, nats)
    found = [(row["from"], row["to"], row["tokens"], row["loss"]) for row in rows]
    assert found == [(1, 1, 2, 3.0), (2, 2, 1, 2.0), (3, 4, 2, 2.0), (5, 8, 2, 6.0), (9, 16, 1, 1.0)]
    assert evaluate.positions_of(Stretch([1, 5, 6, 7], 3)).tolist() == [1, 2, 3]
    assert evaluate.positions_of(Stretch([1, 5, 6, 7], 1)).tolist() == [3]


# --- A real model ---


def test_scores_are_those_of_a_second_implementation(subject):
    """One sentence at a time, with a softmax in float64."""
    sentences = ["the cat sat", "a", "some other words, and more of them.", "\u6771\u4eac"]
    stretches = [evaluate.sentence_stretch(subject, sentence, "lmeval", 256) for sentence in sentences]
    scores = artifact.score_stretches(subject, stretches, "test")
    for stretch, scored in zip(stretches, scores, strict=True):
        with torch.no_grad():
            logits = subject.model(torch.tensor([stretch.ids[:-1]]))[0].double().numpy()
        log_sums = np.log(np.exp(logits).sum(1))
        targets = np.array(stretch.ids[1:])
        nats = log_sums - logits[range(len(targets)), targets]
        assert scored.nats == pytest.approx(nats, abs=1e-5)
        assert scored.is_greedy == bool((logits.argmax(1) == targets).all())


@pytest.mark.parametrize("name", ["trained", "trained_record"])
def test_batches_and_padding_change_no_score(request, name):
    subject = open_subject(request.getfixturevalue(name).run_folder)
    rng = np.random.default_rng(0)
    stretches = []
    for n in rng.integers(1, 33, 32).tolist():
        stretches.append(Stretch([1, *rng.integers(3, 320, n).tolist()], max(1, n // 2)))
    alone = artifact.score_stretches(subject, stretches, "alone", batch_tokens=1)
    together = artifact.score_stretches(subject, stretches, "together", batch_tokens=32 * 33)
    for stretch, one, other in zip(stretches, alone, together, strict=True):
        assert one.nats.shape == other.nats.shape == (stretch.n_targets,)
        assert other.nats == pytest.approx(one.nats, abs=1e-5)


@pytest.mark.parametrize("name", ["trained", "trained_record"])
@pytest.mark.parametrize("protocol", evaluate.PROTOCOLS)
def test_bpb_is_that_of_the_run(request, name, protocol):
    run = request.getfixturevalue(name)
    subject = open_subject(run.run_folder)
    result = figures("bpb", subject, Options(protocol, 256))
    assert result["bpb"] == pytest.approx(run.results["val_bpb"], rel=1e-6)
    assert result["loss"] == pytest.approx(run.results["val_loss"], rel=1e-6)
    assert (result["tokens"], result["bytes"]) == (run.results["scored_tokens"], run.results["scored_bytes"])
    # The tokenizer of the tests is lossless.
    assert result["bytes_normalised"] == result["bytes"]
    assert result["partial"] == []
    assert sum(row["tokens"] for row in result["loss_by_position"]) == result["tokens"]


def test_text_that_is_cut_behind_an_operator_is_still_counted(stub, documents):
    tokenizer = Tokenizer(train_own_tokenizer(documents, 400, caseops=True), Path("caseops.model"))
    subject = stub(torch.zeros(400))._replace(tokenizer=tokenizer)
    ids = artifact.encode(subject, "cat The")
    operator = next(i for i, token in enumerate(ids) if tokenizer.sp.id_to_piece(token) == OPERATORS[0])
    assert evaluate.decoded_bytes(subject, ids) == 7
    assert evaluate.decoded_bytes(subject, ids[: operator + 1]) == len(tokenizer.decode(np.array(ids[:operator])))


def test_weights_that_are_not_finite_are_refused(stub):
    with pytest.raises(FloatingPointError, match=r"a\.ptz gives scores that are not finite"):
        artifact.score_stretches(stub(torch.full((320,), math.nan)), [Stretch([1, 2, 3], 2)], "test")


# --- Text ---


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("a well @-@ known 1 @,@ 000 and 2 @.@ 5", "a well-known 1,000 and 2.5"),
        ("one , two ; three : four . Five ! Six ? Seven", "one, two; three: four. Five! Six? Seven"),
        ("( in brackets ) and [ others ] { too }", "(in brackets) and [others] {too}"),
        ('he said " a word " there', 'he said "a word" there'),
        ("the dog 's tail", "the dog's tail"),
        (" = Title = \n = = Part = = \n text \n", " = Title =\n== Part ==\ntext\n"),
        ("30 \u00b0 C", "30\u00b0C"),
        ("a N b", "a 1 b"),
    ],
)
def test_detokenizer(page, expected):
    assert benchmarks.detokenize(page) == expected


def test_articles_begin_with_their_titles_and_make_up_the_text():
    text = "\n" + "".join(PAGES)
    assert benchmarks.split_articles(text) == ["\n" + PAGES[0], PAGES[1]]
    assert benchmarks.split_articles("no title\n") == ["no title\n"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not here")
def test_real_files_hold_what_they_should():
    """Counts from the papers and from the data's own description. 62 documents: see split_articles."""
    blimp = benchmarks.load_blimp(SHARED)
    assert (len(blimp.sets), {len(pairs) for pairs in blimp.sets.values()}) == (62, {1000})
    assert blimp.missing == ["62 of 67 sets"]
    arc = benchmarks.load_arc_easy(SHARED)
    assert arc.missing == ["1188 of 2376 questions"]
    assert {len(question.choices) for question in arc.questions} == {3, 4, 5}
    wikitext = benchmarks.load_wikitext(SHARED)
    assert (len(wikitext.pages), wikitext.missing) == (62, [])
    text = (SHARED / "wikitext-2" / "wiki.test.raw").read_text()
    assert "".join(wikitext.pages) == text
    assert len(text.split()) == 241_211


# --- The command ---


def test_command_writes_all_figures_as_json(trained_record, folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    evaluate.main([str(trained_record.run_folder), "--data", str(folder), "--protocol", "board", "--out", str(out)])
    results = json.loads(out.read_text())
    assert (results["protocol"], results["context"]) == ("board", 256)
    assert results["artifact_sha256"] == trained_record.results["artifact_sha256"]
    assert list(results["tasks"]) == list(evaluate.TASKS)
    assert results["tasks"]["blimp"]["sets"].keys() == PAIRS.keys()
    printed = capsys.readouterr().out
    assert "Protocol board" in printed
    assert "lmeval" not in printed
    # These small files are not the whole benchmarks.
    assert results["partial"] is True
    assert "PARTIAL: 2 of 67 sets, 2 of 1000 pairs in a set" in printed
    assert "PARTIAL: 3 of 2376 questions" in printed


def test_limit_is_marked_as_partial_everywhere(trained_record, folder, capsys):
    evaluate.main([str(trained_record.run_folder), "--data", str(folder), "--limit", "1"])
    printed = capsys.readouterr().out
    assert re.search(r"^PARTIAL", printed, re.M)
    for note in ("1 articles", "1 pairs of each set", "1 questions", r"1000 of \d+ tokens"):
        assert re.search(rf"PARTIAL: .*\b{note}", printed), note
    assert "         2, of them" in printed


def test_record_folder_leads_to_its_script_and_tokenizer():
    subject = open_subject(SMOKE)
    assert subject.script == SMOKE / "train_gpt.py"
    assert subject.tokenizer.path == SMOKE / "data" / "tokenizer.model"
    assert evaluate.find_val_data(subject) == SMOKE / "data"


def test_tokenizer_is_found_through_run_json_and_held_against_the_artifact(trained, data, tmp_path):
    assert open_subject(trained.artifact).tokenizer.path == data.tokenizer
    other = SMOKE / "data" / "tokenizer.model"
    with pytest.raises(ValueError, match=f"--tokenizer {other} has sha256 .* was made with"):
        open_subject(trained.artifact, tokenizer=other)
    shutil.copyfile(trained.artifact, tmp_path / trained.artifact.name)
    with pytest.raises(FileNotFoundError, match=r"leads to no tokenizer with sha256 .*--tokenizer"):
        open_subject(tmp_path)
    assert open_subject(tmp_path, tokenizer=data.tokenizer).config.vocab_size == 320


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist: name an artifact"),
        (["."], "is a folder without final_model"),
        (["RUN", "--script", "nowhere.py"], "--script nowhere.py does not exist"),
        (["RUN", "--tokenizer", "nowhere.model"], "--tokenizer nowhere.model does not exist"),
        (["RUN", "--data", "nowhere", "--tasks", "blimp"], "has none of blimp.jsonl, "),
        (["RUN", "--data", "broken", "--tasks", "arc_easy"], "test.jsonl line 1 is no question"),
    ],
)
def test_errors_name_file_and_remedy(trained, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "broken" / "arc-easy").mkdir(parents=True)
    (tmp_path / "broken" / "arc-easy" / "test.jsonl").write_text('{"question": {"stem": "a"}}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(message)}"):
        evaluate.main([str(trained.run_folder) if a == "RUN" else a for a in arguments])


def test_missing_data_is_told_before_anything_is_scored(trained, data, folder, tmp_path, monkeypatch):
    shutil.copyfile(trained.artifact, tmp_path / trained.artifact.name)
    monkeypatch.setattr(evaluate, "score_stretches", lambda *_: pytest.fail("it began to score"))
    arguments = [str(tmp_path), "--tokenizer", str(data.tokenizer), "--data", str(folder)]
    with pytest.raises(SystemExit, match=r"leads to no validation shards .*--val-data, or leave bpb out of --tasks"):
        evaluate.main(arguments)


def test_without_a_network_the_error_names_the_option(trained, monkeypatch):
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(SystemExit, match=r"allenai/ai2_arc cannot be fetched from the Hub \(no route\): .*--data DIR"):
        evaluate.main([str(trained.run_folder), "--tasks", "arc_easy"])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace())
    with pytest.raises(SystemExit, match="pip install datasets"):
        evaluate.main([str(trained.run_folder), "--tasks", "arc_easy"])


def test_rows_of_the_hub_are_read_as_local_ones(monkeypatch, folder):
    """The Hub's layout, as its data set pages show it."""
    questions = []
    for stem, texts, gold in QUESTIONS:
        choices = {"text": texts, "label": [str(i + 1) for i in range(len(texts))]}
        questions.append({"question": stem, "choices": choices, "answerKey": str(gold + 1)})
    tables = {
        ("allenai/ai2_arc", "ARC-Easy", "test"): questions,
        ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"): [{"page": page} for page in PAGES],
    }
    for name, pairs in PAIRS.items():
        tables["nyu-mll/blimp", name, "train"] = [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs]
    hub = types.SimpleNamespace(
        load_dataset=lambda name, config, split: tables[name, config, split],
        get_dataset_config_names=lambda name: list(PAIRS),
    )
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert benchmarks.load_arc_easy(None).questions == benchmarks.load_arc_easy(folder).questions
    assert benchmarks.load_blimp(None).sets == benchmarks.load_blimp(folder).sets
    assert benchmarks.load_wikitext(None).pages == benchmarks.load_wikitext(folder).pages


# --- Context and samples ---


class Forgetful(torch.nn.Module):
    """A model that knows how often each token is, but only near the begin of its window."""

    def __init__(self, counts: np.ndarray, context: int) -> None:
        super().__init__()
        self.log_counts = torch.from_numpy(counts).float().log()
        self.context = context

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        knows = (torch.arange(ids.size(1)) < self.context).float()
        return knows[:, None] * self.log_counts.expand(*ids.shape, -1)


@pytest.mark.parametrize(("context", "holds"), [(16, True), (15, False), (12, False), (8, False)])
def test_context_claim_fails_where_more_context_makes_it_worse(subject, folder, context, holds):
    ids = evaluate.encode(subject, "".join(PAGES))
    counts = np.bincount(ids, minlength=subject.config.vocab_size) + 0.1
    forgetful = subject._replace(model=Forgetful(counts, context))
    result = figures("context", forgetful, options(folder, context=16))
    assert result["claimed"] == 16
    assert result["holds"] == holds
    if holds:
        # What stands farther away changes nothing.
        assert result["gain"] == pytest.approx(0, abs=1e-6)


def test_gain_of_context_is_that_of_the_model_on_each_window(subject, folder):
    result = figures("context", subject, options(folder, context=16))
    ids = evaluate.encode(subject, "".join(PAGES))
    n_windows = min(32, (len(ids) - 1) // 16)
    assert result["windows"] == n_windows
    gains = []
    for window in range(n_windows):
        start = window * (len(ids) - 17) // (n_windows - 1)
        targets = torch.tensor(ids[start + 13 : start + 17])
        losses = []
        for first in (start, start + 8):
            with torch.no_grad():
                logits = subject.model(torch.tensor([ids[first : start + 16]]))[0, -4:]
            losses.append(float(torch.nn.functional.cross_entropy(logits.double(), targets)))
        gains.append(losses[1] - losses[0])
    assert result["gain"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert result["gain_stderr"] == pytest.approx(np.std(gains, ddof=1) / n_windows**0.5, abs=1e-5)


def test_text_shorter_than_the_context_is_an_error(subject, folder):
    with pytest.raises(ValueError, match=r"has \d+ tokens: no context of 30000 can be tested on it"):
        figures("context", subject, options(folder, context=30_000))


def test_samples_are_those_of_the_command(subject, folder, capsys):
    samples = figures("samples", subject, options(folder))["samples"]
    assert [sample["prompt"] for sample in samples] == list(CARD_PROMPTS)
    for expected in samples:
        command = [str(subject.artifact), expected["prompt"], "--seed", str(expected["seed"]), "--max-tokens", "120"]
        assert sample_command(command) == 0
        assert capsys.readouterr().out == expected["text"] + "\n"


# --- lm-evaluation-harness ---


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "harness", raising=False)
    with pytest.raises(ImportError, match=r"pip install -r requirements-lmeval\.txt"):
        importlib.import_module("harness")


@pytest.mark.slow
def test_figures_are_those_of_the_harness(subject, folder):
    """On the small files, and on real ones where they are: no tie, so that the two rules for ties agree."""
    pytest.importorskip("lm_eval", reason="pip install -r requirements-lmeval.txt")
    import harness

    def check(data: Path, limit: int | None, context: int) -> None:
        model = harness.ArtifactLM(subject, context)
        theirs = harness.run_harness(model, ["blimp", "arc_easy", "wikitext"], data, limit)
        scoring = options(data, context=context, limit=limit)
        blimp = figures("blimp", subject, scoring)
        # The harness counts a tie as right if the good sentence comes first.
        ties = statistics.fmean(of_set["ties"] / of_set["n"] for of_set in blimp["sets"].values())
        assert blimp["acc"] + ties == pytest.approx(theirs["blimp"]["acc,none"], abs=1e-4)
        for name, of_set in blimp["sets"].items():
            if not of_set["ties"]:
                assert of_set["acc"] == pytest.approx(theirs[f"blimp_{name}"]["acc,none"], abs=1e-4)
                assert of_set["acc_stderr"] == pytest.approx(theirs[f"blimp_{name}"]["acc_stderr,none"], abs=1e-4)
        if not blimp["ties"]:
            assert blimp["acc_stderr"] == pytest.approx(theirs["blimp"]["acc_stderr,none"], abs=1e-4)

        arc = figures("arc_easy", subject, scoring)
        for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
            assert arc[key] == pytest.approx(theirs["arc_easy"][f"{key},none"], abs=1e-4)

        text = figures("wikitext2", subject, scoring)
        assert text["bpb"] == pytest.approx(theirs["wikitext"]["bits_per_byte,none"], abs=1e-4)
        assert text["byte_perplexity"] == pytest.approx(theirs["wikitext"]["byte_perplexity,none"], rel=1e-4)
        assert text["word_perplexity"] == pytest.approx(theirs["wikitext"]["word_perplexity,none"], rel=1e-4)

    check(folder, None, 32)
    # Shorter than some prompts, which then lose their beginning.
    check(folder, None, 11)
    if SHARED.is_dir():
        check(SHARED, 3, 64)


@pytest.mark.slow
def test_detokenizer_is_that_of_the_harness():
    pytest.importorskip("lm_eval", reason="pip install -r requirements-lmeval.txt")
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    @given(st.text(alphabet="sN \n@-,.:;!?()[]{}\"'=\u00b0a1/", max_size=60))
    def check(page: str) -> None:
        assert benchmarks.detokenize(page) == wikitext_detokenizer({"page": page})

    check()
    if SHARED.is_dir():
        for page in benchmarks.load_wikitext(SHARED).pages:
            assert benchmarks.detokenize(page) == wikitext_detokenizer({"page": page})
