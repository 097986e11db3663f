"""tools/export_hf.py: the tokenizer, the model's lines, the folder that transformers loads, its check, its card."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
import yaml
from artifact import open_subject
from hypothesis import given
from hypothesis import strategies as st
from tokenizer import Tokenizer, byte_model, train_published_tokenizer
from tokenizer import train_tokenizer as train_lossless

import train_gpt as tg

# Read when transformers is imported: the code of exported models stays out of the user's cache.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules_"))
pytest.importorskip("transformers", reason='pip install "transformers>=5"')

import evaluate
import export_hf
import hf_card
import hf_script
import hf_tokenizer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save
from sample import card_samples
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DOCUMENTS = [
    "The cat sat on the mat, \u00e9t\u00e9 \u6771\u4eac \U0001f642.\n\tIt was  NASA's\n\n  iPad \u2581 1234"
] * 30
GREEDY = {"do_sample": False, "temperature": None, "top_p": None}
PROMPTS = ["the cat", "a dog ran over the house and then it was seen", "on"]


# --- Tokenizer ---


def makers() -> dict[str, bytes]:
    return {
        "lossless": train_lossless(DOCUMENTS, 330),
        "published": train_published_tokenizer(DOCUMENTS, 330),
        "bytes": byte_model(),
    }


def published_files() -> list[Path]:
    return sorted((SHARED / "tokenizers").glob("*.model"))


# Without marks: see the docstring of hf_tokenizer.py.
CHARACTERS = st.characters(exclude_categories=["Cs", "Mn", "Mc", "Me"], exclude_characters="\uff9e\uff9f")
USUAL = st.sampled_from([*"abc  \n\t.T1", "the", " cat", "\u2581", "\ue004", "s", "<s>", "<0x41>", "e\u0301", "\u00a0"])
TEXTS = st.lists(USUAL | CHARACTERS, max_size=30).map("".join)


@pytest.mark.parametrize("name", ["lossless", "published", "bytes"])
def test_converted_tokenizer_gives_the_ids_and_texts_of_sentencepiece(name):
    tokenizer = Tokenizer(makers()[name], Path(name))
    fast = hf_tokenizer.convert(tokenizer)
    fast.encode_special_tokens = True

    @given(TEXTS)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids.tolist()
        assert fast.encode(text).ids == [tokenizer.sp.bos_id(), *ids]
        if not tokenizer.is_unknown[ids].any():
            assert fast.decode(ids.tolist(), skip_special_tokens=True) == tokenizer.decode(ids)

    check()


@pytest.mark.skipif(not published_files(), reason="the published tokenizers are not here")
def test_published_tokenizers_are_converted_on_real_text():
    documents = [json.loads(line)["text"] for line in (SHARED / "corpus_val.jsonl").open(encoding="utf-8")][:60]
    # Vietnamese, Korean and Japanese with their letters in parts, as macOS writes names of files.
    documents.append("Vie\u0323\u0302t Nam \u1112\u1161\u11ab\u1100\u1173\u11af \u304b\u3099 \uff76\uff9e")
    for path in published_files():
        tokenizer = Tokenizer(path.read_bytes(), path)
        fast = hf_tokenizer.convert(tokenizer)
        for text in documents:
            ids = tokenizer.sp.encode(text)
            assert fast.encode(text, add_special_tokens=False).ids == ids
            assert fast.decode(ids) == tokenizer.sp.decode(ids)


def other_tokenizers(train_tokenizer) -> dict[str, tuple[bytes, str]]:
    """Tokenizers that tokenizer.json cannot describe, and why."""
    unigram = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS),
        model_writer=unigram,
        model_type="unigram",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    own = train_tokenizer(DOCUMENTS, user_defined_symbols=["cat"])
    return {
        "caseops": (train_lossless(DOCUMENTS, 340, caseops=True), "operators for capitals (caseops)"),
        "unigram": (unigram.getvalue(), "the type unigram"),
        "user-defined": (own, "user-defined pieces"),
    }


@pytest.mark.parametrize(
    "name",
    ["caseops", pytest.param("unigram", marks=pytest.mark.slow), pytest.param("user-defined", marks=pytest.mark.slow)],
)
def test_tokenizers_with_other_rules_are_exported_as_code(name, train_tokenizer, random_model, record_config, tmp_path):
    model, rule = other_tokenizers(train_tokenizer)[name]
    tokenizer = Tokenizer(model, Path("x.model"))
    with pytest.raises(ValueError, match=re.escape(f"x.model has {rule}, which tokenizer.json has no step for")):
        hf_tokenizer.convert(tokenizer)

    config = dataclasses.replace(record_config, vocab_size=tokenizer.sp.get_piece_size(), eval_seq_len=32)
    folder = tmp_path / name
    folder.mkdir()
    (folder / "final_model.float32.ptz").write_bytes(tg.pack_artifact(random_model(config), "float32"))
    (folder / "tokenizer.model").write_bytes(model)
    # This checks ids and texts.
    export_hf.main([str(folder), str(tmp_path / "out")])
    exported = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    exported.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)

    @given(TEXTS)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert exported.encode(text) == again.encode(text) == [tokenizer.sp.bos_id(), *ids]
        if not tokenizer.is_unknown[ids].any():
            assert exported.decode(ids.tolist(), skip_special_tokens=True) == tokenizer.decode(ids)

    check()
    # What a model makes up need not be what the tokenizer writes.
    assert isinstance(exported.decode(list(range(tokenizer.sp.get_piece_size()))), str)


# --- The model's lines ---

SCRIPT = '''"""A script."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

# Half of it.
HALF = 0.5
WORDS = json.dumps([size for size in ("Model",)])


def decorate(function: Any) -> Any:
    return function


# Rounds up.
@decorate
def up(x: Settings) -> int:
    return math.ceil(x)


class Settings(NamedTuple):
    lr: float = 1.0


class Model:
    size: int = up(HALF)

    def train(self, settings: Settings) -> None:
        self.size = 1


if WORDS:
    raise SystemExit(1)
'''
MODEL_LINES = """from __future__ import annotations
import math
from typing import Any


# Half of it.
HALF = 0.5


def decorate(function: Any) -> Any:
    return function


# Rounds up.
@decorate
def up(x: Settings) -> int:
    return math.ceil(x)


class Model:
    size: int = up(HALF)

    def train(self, settings: Settings) -> None:
        self.size = 1
"""


def test_only_the_lines_that_a_model_needs_are_taken():
    assert hf_script.model_source(SCRIPT, ["Model"]) == MODEL_LINES


def test_model_that_is_not_in_the_script_is_an_error():
    with pytest.raises(ValueError, match="does not define Network at its top level"):
        hf_script.model_source(SCRIPT, ["Network"])


# --- The folder ---


@pytest.fixture(scope="module")
def home(tmp_path_factory, data) -> Path:
    return tmp_path_factory.mktemp("models")


def write_artifact(folder: Path, model: tg.GPT, data) -> Path:
    folder.mkdir()
    path = folder / "final_model.float32.ptz"
    path.write_bytes(tg.pack_artifact(model, "float32"))
    shutil.copyfile(data.tokenizer, folder / "tokenizer.model")
    return path


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("baseline", "bfloat16")]


@pytest.fixture(scope="module", params=["record", *SLOW_KINDS])
def exported(request, home, data, config, record_config, random_model):
    """(artifact, exported folder) of a model without and with the techniques of the record, and of one for a GPU."""
    of_kind = {"baseline": config, "record": record_config, "bfloat16": record_config}[request.param]
    dtype = "bfloat16" if request.param == "bfloat16" else "float32"
    of_kind = dataclasses.replace(of_kind, vocab_size=320, eval_seq_len=32, compute_dtype=dtype)
    artifact = write_artifact(home / request.param, random_model(of_kind), data)
    folder = home / f"exported-{request.param}"
    export_hf.main([str(artifact), str(folder)])
    return artifact, folder


@pytest.fixture(scope="module")
def loaded(exported):
    """The exported model and tokenizer, and the model as the script loads it."""
    artifact, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return model, tokenizer, tg.load_artifact(artifact, compute_dtype="float32")


def greedy(model: tg.GPT, ids: list[int], n: int) -> list[int]:
    """Tokens that the artifact goes on with, each from the whole text."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-n:]


def test_logits_are_those_of_the_artifact(loaded):
    model, _, artifact = loaded
    ids = torch.randint(0, 320, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, artifact(ids), atol=1e-5, rtol=0)
        last = model(ids, logits_to_keep=2).logits
        torch.testing.assert_close(last, artifact(ids)[:, -2:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_batch_with_padding_goes_on_like_single_texts(loaded, use_cache):
    model, tokenizer, artifact = loaded
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    out = model.generate(**batch, **GREEDY, max_new_tokens=12, use_cache=use_cache, eos_token_id=-1)
    for prompt, tokens in zip(PROMPTS, out, strict=True):
        assert tokens[-12:].tolist() == greedy(artifact, tokenizer.encode(prompt), 12)


def test_beams_are_the_same_with_a_cache_and_without(loaded):
    model, tokenizer, _ = loaded
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    settings = {**GREEDY, "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    torch.testing.assert_close(
        model.generate(**batch, **settings, use_cache=True), model.generate(**batch, **settings, use_cache=False)
    )


def test_cache_reads_a_text_in_parts(loaded):
    model, tokenizer, artifact = loaded
    ids = torch.tensor([tokenizer.encode(PROMPTS[1])])
    with torch.no_grad():
        first = model(ids[:, :3], use_cache=True)
        past = first.cache if "cache" in first else first.past_key_values
        second = model(ids[:, 3:], past_key_values=past, use_cache=True)
        whole = artifact(ids)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole, atol=1e-4, rtol=0)


def test_generation_ends_where_a_next_document_begins(loaded):
    model, tokenizer, _ = loaded
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == model.generation_config.eos_token_id == 1
    ids = torch.tensor([tokenizer.encode("the")])
    out = model.generate(ids, **GREEDY, max_new_tokens=5, sequence_bias={(1,): 100.0})
    assert out.tolist() == [[*ids[0].tolist(), 1]]


def test_pipeline_speaks_and_labels_give_a_loss(exported, loaded):
    _, folder = exported
    model, tokenizer, artifact = loaded
    speak = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    [answer] = speak("the cat", max_new_tokens=5)
    assert answer["generated_text"].startswith("the cat")

    ids = torch.tensor([tokenizer.encode(PROMPTS[1])])
    loss = model(ids, labels=ids).loss
    loss.backward()
    expected = torch.nn.functional.cross_entropy(artifact(ids)[0, :-1], ids[0, 1:])
    torch.testing.assert_close(loss, expected)
    assert all(p.grad is not None for p in model.parameters())


def test_saved_again_it_is_the_same_model(loaded, tmp_path):
    model, tokenizer, _ = loaded
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
    text = "a <s> \u6771\u4eac  b"
    assert AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True).encode(text) == tokenizer.encode(text)


def test_dtype_is_the_one_that_is_asked_for(exported, loaded):
    _, folder = exported
    model, tokenizer, _ = loaded
    assert model.model.compute_dtype == torch.float32
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert half.model.compute_dtype == torch.bfloat16
    ids = torch.tensor([tokenizer.encode(PROMPTS[1])])
    assert 0 < (half(ids).logits - model(ids).logits).abs().max() < 0.5


def test_script_without_a_cache_is_exported_too(home, data, config, random_model):
    of_script = dataclasses.replace(config, vocab_size=320, eval_seq_len=32)
    artifact = write_artifact(home / "old", random_model(of_script), data)
    source = (Path(tg.__file__)).read_text(encoding="utf-8").replace("class Cache:", "class Memory:")
    (artifact.parent / "train_gpt.py").write_text(source, encoding="utf-8")
    export_hf.main([str(artifact.parent), str(home / "exported-old")])
    assert "CACHE_CLASS = None" in (home / "exported-old" / "golf_script.py").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(home / "exported-old", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(home / "exported-old", trust_remote_code=True)
    ids = tokenizer.encode("the cat")
    out = model.generate(torch.tensor([ids]), **GREEDY, max_new_tokens=5, eos_token_id=-1)
    assert out[0, -5:].tolist() == greedy(tg.load_artifact(artifact), ids, 5)


# --- The check ---


def test_folder_that_differs_from_the_artifact_is_not_kept(trained, tmp_path, monkeypatch):
    write_files = export_hf.write_files

    def with_wrong_weight(subject, folder):
        write_files(subject, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.blocks.0.attn.proj.weight"][0, 0] += 1.0
        (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))

    def with_wrong_blank(subject, folder):
        write_files(subject, folder)
        path = folder / "tokenizer.json"
        text = path.read_text(encoding="utf-8")
        assert '"String": " "' in text
        path.write_text(text.replace('"String": " "', '"String": "x"'), encoding="utf-8")

    def with_wrong_padding(subject, folder):
        write_files(subject, folder)
        path = folder / "modeling_golf.py"
        path.write_text(path.read_text(encoding="utf-8").replace("if attention_mask is None:", "if True:"))

    for broken, message in (
        (with_wrong_weight, "logits differ from the artifact's"),
        (with_wrong_blank, "the exported tokenizer"),
        (with_wrong_padding, "in a batch with padding, the logits of"),
    ):
        monkeypatch.setattr(export_hf, "write_files", broken)
        with pytest.raises(SystemExit, match=message):
            export_hf.main([str(trained.artifact), str(tmp_path / "out")])
        assert list(tmp_path.iterdir()) == []


def test_folder_that_exists_is_left_alone(trained, tmp_path):
    with pytest.raises(SystemExit, match="exists already: name another folder, or remove it"):
        export_hf.main([str(trained.artifact), str(tmp_path)])


# --- The card ---


@pytest.fixture(scope="module")
def results(trained, tmp_path_factory) -> Path:
    """Of tools/evaluate.py, as far as the card reads it."""
    path = tmp_path_factory.mktemp("results") / "lmeval.json"
    evaluate.main([str(trained.artifact), "--tasks", "bpb,samples", "--out", str(path)])
    return path


def test_card_tells_what_the_run_left(trained, results, tmp_path):
    folder = tmp_path / "my-model"
    export_hf.main([str(trained.artifact), str(folder), "--licence", "MIT", "--results", str(results)])
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.model_name == "my-model"
    [of_split] = card.data.eval_results
    assert of_split.metric_value == round(trained.results["val_bpb"], 4)

    run = trained.results
    for figure in (f"{run['model_params']:,}", f"{run['bytes_artifact']:,}", run["artifact_sha256"], "loss.svg"):
        assert figure in card.text
    assert (folder / "loss.svg").read_text(encoding="utf-8").startswith("<")
    assert json.loads((folder / "results_lmeval.json").read_text()) == json.loads(results.read_text())

    samples = card_samples(open_subject(trained.artifact))
    assert len(samples) == 3
    for sample in samples:
        assert hf_card.markdown(sample.text.removeprefix(sample.prompt)) in card.text


def test_card_keeps_protocols_and_parts_of_scores_apart(trained, results):
    subject = open_subject(trained.artifact)
    subject = subject._replace(run={**subject.run, "partial": True})
    of_task = {"bpb": 2.0, "acc": 0.5, "partial": []}
    of_board = {"protocol": "board", "tasks": {"wikitext2": of_task, "blimp": {**of_task, "partial": ["62 sets"]}}}
    of_harness = {"protocol": "lmeval", "tasks": {"wikitext2": {**of_task, "bpb": 1.5}}}
    card = hf_card.Card(hf_card.CardFacts("x", "mit", []), subject, None, [of_board, of_harness], False)
    [entry] = yaml.safe_load(hf_card.front_matter(card))["model-index"]
    shown = {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in entry["results"]
        for metric in result["metrics"]
    }
    # Neither a score of a part of the validation split, nor one of a part of BLiMP.
    assert shown == {
        ("WikiText-2, protocol board", "bpb"): 2.0,
        ("WikiText-2, protocol board", "acc"): 0.5,
        ("WikiText-2, protocol lmeval", "bpb"): 1.5,
        ("WikiText-2, protocol lmeval", "acc"): 0.5,
    }
    assert f"first {subject.run['scored_tokens']:,} validation tokens" in "\n".join(hf_card.introduction(card))


def test_results_of_another_artifact_are_refused(trained, results, tmp_path):
    other = {**json.loads(results.read_text()), "artifact_sha256": "0" * 64}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    with pytest.raises(SystemExit, match=r"other\.json is not what tools/evaluate\.py --out wrote for the artifact"):
        export_hf.main([str(trained.artifact), str(tmp_path / "out"), "--results", str(path)])


@given(st.text(alphabet="ab \n\\`*_#<>[]|&~$.-+1)", max_size=40))
def test_samples_do_not_become_markup(text):
    shown = hf_card.markdown(text)
    assert shown.replace("  \n> ", "\n").replace("\\", "") == text.replace("\\", "")
    for character in "`*_#<>[]|&~$":
        assert shown.count(f"\\{character}") == text.count(character)
