"""tools/sample.py: the probabilities it draws from, the text it shows, the files it finds, and the whole command."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sample
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample import Reader, Sampling, TextStream, probabilities
from tokenizer import Tokenizer, byte_model, train_published_tokenizer, train_tokenizer

import train_gpt as tg

SAMPLE = str(Path(sample.__file__))
ALL = Sampling(temperature=1.0, top_p=1.0, min_p=0.0, max_tokens=1)
DOCUMENTS = ["The Cat sat on the MAT, été 東京 🙂 ▁.\n\tIt was NASA's iPad.", "one two  three four\n"] * 30


# -- sampling --------------------------------------------------------------------------------------------------------


def numpy_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The same from its description, token by token."""
    if sampling.temperature == 0:
        return (np.arange(len(logits)) == np.argmax(logits)).astype(float)
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    p = weights / weights.sum()
    kept = np.zeros(len(p), bool)
    reached = 0.0
    for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        # Tokens are taken until they reach top_p; 1 takes all of them, whatever the sum is rounded to.
        if reached >= sampling.top_p and sampling.top_p < 1:
            break
        kept[i] = p[i] >= sampling.min_p * p.max()
        reached += p[i]
    return p * kept / (p * kept).sum()


@given(
    logits=st.lists(st.integers(-300, 300).map(lambda n: n / 10), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 2.5, 1e6]),
    top_p=st.sampled_from([1e-9, 0.137, 0.51, 0.933, 1.0]),
    min_p=st.sampled_from([0.0, 0.0317, 0.411, 1.0]),
)
def test_probabilities_agree_with_numpy(logits, temperature, top_p, min_p):
    sampling = Sampling(temperature, top_p, min_p, 1)
    found = probabilities(torch.tensor(logits, dtype=torch.float64), sampling).numpy()
    assert found.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(found, numpy_probabilities(np.array(logits), sampling), atol=1e-12)


def test_probabilities_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert probabilities(logits, ALL).tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert probabilities(logits, ALL._replace(top_p=0.7)).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert probabilities(logits, ALL._replace(top_p=0.8)).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    assert probabilities(logits, ALL._replace(min_p=0.4)).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert probabilities(logits, ALL._replace(temperature=0.5)).tolist() == pytest.approx(
        [16 / 22, 4 / 22, 1 / 22, 1 / 22]
    )
    assert probabilities(logits, ALL._replace(temperature=0.0)).tolist() == [1, 0, 0, 0]


def test_logits_that_are_no_numbers_are_an_error():
    with pytest.raises(ValueError, match="NaN"):
        probabilities(torch.tensor([0.0, math.nan]), ALL)


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    """Pearson's chi-squared of 4,000 samples by generate, each with a seed of its own; 16.3 has p = 0.001 for 3."""
    logits = torch.tensor([0.0, -40.0, 1.0, 0.5, -0.5, -3.0])
    model = SimpleNamespace(config=SimpleNamespace(bos_id=1))
    reader = SimpleNamespace(model=model, next_logits=lambda ids: logits)
    sampling = ALL._replace(temperature=0.9, min_p=0.05)
    p = numpy_probabilities(logits.double().numpy(), sampling)
    n = 4000
    drawn = [token for seed in range(n) for token in sample.generate(reader, [1], sampling, seed)]
    counts = np.bincount(drawn, minlength=len(p))
    assert not counts[p == 0].any()
    possible = p > 0
    assert possible.sum() == 4
    assert float((((counts - n * p)[possible]) ** 2 / (n * p)[possible]).sum()) < 16.3


# -- reading ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 40))
def test_context_is_never_longer_than_the_window_nor_shorter_than_half(n_tokens, window):
    length = n_tokens - sample.context_start(n_tokens, window)
    assert length == n_tokens if n_tokens <= window else window / 2 <= length <= window


@pytest.mark.parametrize("recipe", ["config", "record_config"])
def test_reader_gives_the_same_logits_with_a_cache_and_without(request, random_model, recipe):
    """Through windows of 16 tokens, from one text to another and back, and for the same text twice."""
    model = random_model(request.getfixturevalue(recipe))
    cached = Reader(tg, model)
    plain = Reader(SimpleNamespace(), model)
    assert plain.make_cache is None
    assert cached.window == 16
    ids = torch.randint(2, 64, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [ids[:n] for n in range(3, 40)]
    for text in [*texts, ids[:5], ids[:5], [1, *ids[:9]], ids[:10]]:
        torch.testing.assert_close(cached.next_logits(text), plain.next_logits(text), atol=2e-5, rtol=0)


def test_reader_reads_each_token_once(config, random_model, monkeypatch):
    model = random_model(config)
    n_read = []
    forward = tg.GPT.forward
    monkeypatch.setattr(
        tg.GPT, "forward", lambda self, ids, **kwargs: n_read.append(ids.size(1)) or forward(self, ids, **kwargs)
    )
    tokens = list(sample.generate(Reader(tg, model), [2, 3, 4], ALL._replace(max_tokens=8), seed=3))
    assert n_read == [3] + [1] * (len(n_read) - 1)
    assert len(tokens) in (len(n_read), len(n_read) - 1)  # the last one read may end the document


def test_text_ends_before_the_next_document(config):
    """A model that counts: token n is followed by n + 1, and 5 by BOS."""
    model = SimpleNamespace(config=config)

    def next_logits(ids: list[int]) -> torch.Tensor:
        follower = 1 if ids[-1] == 5 else ids[-1] + 1
        return torch.nn.functional.one_hot(torch.tensor(follower), 64) * 100.0

    reader = SimpleNamespace(model=model, next_logits=next_logits)
    assert list(sample.generate(reader, [1, 2], ALL._replace(max_tokens=9), seed=0)) == [3, 4, 5]
    assert list(sample.generate(reader, [1, 2], ALL._replace(max_tokens=2), seed=0)) == [3, 4]


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers() -> list[Tokenizer]:
    """Of each transform, one that normalizes, and one of bytes alone."""
    models = [
        train_tokenizer(DOCUMENTS, 320),
        train_tokenizer(DOCUMENTS, 330, caseops=True),
        train_published_tokenizer(DOCUMENTS, 320),
        byte_model(),
    ]
    return [Tokenizer(model, Path("tokenizer.model")) for model in models]


@given(text=st.text(alphabet=st.sampled_from("aZé東🙂 \n▁.\ue001\ue004ST"), max_size=20))
@settings(max_examples=60)
def test_stream_shows_what_the_tokens_decode_to(tokenizers, text):
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer)
        parts = [stream.add([token]) for token in ids.tolist()]
        parts.append(stream.add([], is_final=True))
        assert "".join(parts) == tokenizer.decode(ids)
        # A character in several byte pieces waits for its last one, and is not shown as something else before.
        assert not any(sample.REPLACEMENT in part for part in parts)


@given(data=st.data())
@settings(max_examples=60)
def test_stream_takes_any_tokens_and_never_takes_back_what_it_showed(tokenizers, data):
    for tokenizer in tokenizers:
        n_pieces = tokenizer.sp.get_piece_size()
        ids = data.draw(st.lists(st.integers(0, n_pieces - 1), max_size=12))
        stream = TextStream(tokenizer)
        shown = "".join([*(stream.add([token]) for token in ids), stream.add([], is_final=True)])
        assert shown == TextStream(tokenizer).add(ids, is_final=True)


def test_terminal_gets_no_control_characters(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    sample.show("a\x1b[2J\x9b\r\tb\n")
    assert sys.stdout.getvalue() == "a�[2J��\tb\n"


# -- the command -----------------------------------------------------------------------------------------------------


def say(capsys, *arguments: str) -> str:
    assert sample.main([*arguments, "--max-tokens", "12"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("fixture", ["trained", "trained_record"])
def test_command_goes_on_from_a_prompt(request, fixture, capsys):
    run = request.getfixturevalue(fixture)
    first = say(capsys, str(run.run_folder), "the cat")
    assert first.startswith("the cat")
    assert len(first) > len("the cat\n")
    # The same for the same seed, by the file or its folder; another for another seed.
    assert say(capsys, str(run.artifact), "the cat") == first
    others = {
        say(capsys, str(run.artifact), "the cat", "--seed", str(seed), "--temperature", "2") for seed in (1, 2, 3)
    }
    assert len(others) == 3
    greedy = {say(capsys, str(run.artifact), "the cat", "--seed", str(seed), "--temperature", "0") for seed in (1, 2)}
    assert len(greedy) == 1


def test_samples_are_those_of_their_seeds(trained, capsys):
    both = say(capsys, str(trained.run_folder), "the", "--samples", "2", "--seed", "5")
    single = [say(capsys, str(trained.run_folder), "the", "--seed", str(seed)) for seed in (5, 6)]
    assert both == f"--- seed 5 ---\n{single[0]}--- seed 6 ---\n{single[1]}"


def test_lines_of_another_program_are_answered_one_by_one(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nand\n"))
    answers = say(capsys, str(trained.run_folder))
    single = [
        say(capsys, str(trained.run_folder), "the cat"),
        say(capsys, str(trained.run_folder), "and", "--seed", "1338"),
    ]
    assert answers == "".join(single)


@pytest.mark.parametrize(("prompt", "status"), [([], 0), (["the"], 130)])
def test_ctrl_c_ends_it_with_a_whole_line(trained, capsys, monkeypatch, prompt, status):
    def interrupted(reader, ids, sampling, seed):
        yield from itertools.islice(generate(reader, ids, sampling, seed), 3)
        raise KeyboardInterrupt

    generate = sample.generate
    monkeypatch.setattr(sample, "generate", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n"))
    assert sample.main([str(trained.run_folder), *prompt]) == status
    assert capsys.readouterr().out.endswith("\n")


def test_record_is_loaded_by_its_own_script_even_without_a_cache(honest, tmp_path, capsys):
    record = tmp_path / "record"
    shutil.copytree(honest, record)
    with_cache = say(capsys, str(record), "the cat")
    script = record / "train_gpt.py"
    script.write_text(script.read_text().replace("class Cache:", "class Memory:"))
    assert sample.main([str(record), "the cat", "--max-tokens", "12"]) == 0
    captured = capsys.readouterr()
    assert captured.out == with_cache
    assert "no cache, the context is read again" in captured.err


def test_tokenizer_is_found_or_asked_for(trained, data, tmp_path, capsys):
    lone = tmp_path / "lone" / trained.artifact.name
    lone.parent.mkdir()
    shutil.copyfile(trained.artifact, lone)
    with pytest.raises(SystemExit, match=r"leads to no tokenizer with sha256 \w{64}: .* by --tokenizer"):
        sample.main([str(lone), "the"])

    other = tmp_path / "other.model"
    other.write_bytes(byte_model())
    with pytest.raises(SystemExit, match=r"--tokenizer .*other.model has sha256 .* was made with"):
        sample.main([str(lone), "the", "--tokenizer", str(other)])

    named = say(capsys, str(lone), "the", "--tokenizer", str(data.tokenizer))
    assert named == say(capsys, str(trained.run_folder), "the")
    # By the run.json beside it; one that names another file is passed over.
    (lone.parent / "run.json").write_text(json.dumps({"tokenizer_path": str(other)}))
    shutil.copyfile(data.tokenizer, lone.parent / "tokenizer.model")
    assert say(capsys, str(lone), "the") == named


def test_missing_or_double_artifact_is_an_error_with_a_remedy(trained, tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere does not exist: name an artifact"):
        sample.main([str(tmp_path / "nowhere"), "the"])
    with pytest.raises(SystemExit, match=r"is a folder without final_model"):
        sample.main([str(tmp_path), "the"])
    for codec in ("a", "b"):
        shutil.copyfile(trained.artifact, tmp_path / f"final_model.{codec}.ptz")
    with pytest.raises(SystemExit, match=r"final_model.a.ptz, final_model.b.ptz: name one of these"):
        sample.main([str(tmp_path), "the"])
    (tmp_path / "script.py").write_text("")
    with pytest.raises(SystemExit, match=r"script.py has no load_artifact"):
        sample.main([str(trained.artifact), "the", "--script", str(tmp_path / "script.py")])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "argument --temperature: -1 must be at least 0"),
        ("--temperature", "nan", "must be at least 0"),
        ("--top-p", "1.5", "1.5 must be from 1e-09 to 1"),
        ("--min-p", "2", "2 must be from 0 to 1"),
        ("--samples", "0", "0 must be at least 1"),
        ("--max-tokens", "many", "argument --max-tokens: invalid"),
    ],
)
def test_option_out_of_range_is_an_error(capsys, option, value, message):
    with pytest.raises(SystemExit):
        sample.main(["x", "the", f"{option}={value}"])
    assert message in capsys.readouterr().err
