"""Tokenizers: every text comes back, every byte of it is counted once, and the cache does not change a single token."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import tokenizer as tk
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer import Tokenizer
from transforms import OPERATORS

import train_gpt

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PUBLISHED = SHARED / "tokenizers" / "fineweb_1024_bpe.model"
needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"{PUBLISHED} is absent")

SENTENCE = "The cat sat on a mat and THEN it ran off with 12 caf\u00e9s\n\n    to be: (well) seen Again.\n"
WORDS = SENTENCE.split(" ")
DOCUMENTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 40)) + f" number {i}" for i in range(30)]
KINDS = ["lossless", "caseops", "bytes", pytest.param("published", marks=needs_published)]
FOREIGN = ["foreign caseops", "foreign punctuated"]
LOSSLESS = ["lossless", "caseops", "bytes"]

any_text = st.text(st.characters(exclude_categories=["Cs"]))  # UTF-8 has no surrogates
awkward_text = st.text(
    st.sampled_from(
        " \n\t\r\0abA1Qs_(\u2019\u00e9\u00bd\u2047\u2581\u2585\u3000\uff21\ufb01\ufeff\U0001f642\u0301\u00ad\u200b"
        + OPERATORS
    )
)
wordy_text = st.lists(st.sampled_from([*WORDS, "", "\u2581", "\ue004", "\u0301", "\u0915\u093f"])).map(" ".join)
texts = st.one_of(any_text, awkward_text, wordy_text)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    models = {
        "lossless": tk.train_tokenizer(DOCUMENTS, 320),
        "caseops": tk.train_tokenizer(DOCUMENTS, 320, caseops=True),
        "bytes": tk.byte_model(),
    }
    if PUBLISHED.exists():
        models["published"] = PUBLISHED.read_bytes()
    found = {kind: Tokenizer(model, Path(f"{kind}.model")) for kind, model in models.items()}
    punctuated = {"split_by_unicode_script": False, "normalization_rule_name": "identity", "add_dummy_prefix": False}
    return found | {
        "foreign caseops": foreign_tokenizer(byte_fallback=True, user_defined_symbols=list(OPERATORS)),
        "foreign punctuated": foreign_tokenizer(byte_fallback=True, **punctuated, remove_extra_whitespaces=False),
    }


def foreign_tokenizer(documents: list[str] = DOCUMENTS, **options: Any) -> Tokenizer:
    """One that another tool could have trained."""
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "vocab_size": 320, "hard_vocab_limit": False, "minloglevel": 2}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(documents), model_writer=model, **{**defaults, **options})
    return Tokenizer(model.getvalue(), Path("foreign.model"))


def plain_encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.sp.encode(tokenizer.transform.encode(text))


# --- Training ---


def test_a_model_with_bos_as_a_piece_of_text_is_named() -> None:
    """It was trained with bos_id=1, so that this advice would not help."""
    with pytest.raises(ValueError, match=r"has <s> as a piece of text.*train it without <s> in user_defined_symbols"):
        foreign_tokenizer(user_defined_symbols=["<s>"], bos_id=1)
    with pytest.raises(ValueError, match=r"has no BOS piece.*train it with bos_id=1"):
        foreign_tokenizer(bos_id=-1)


def test_a_tokenizer_is_lossless_even_where_the_training_text_has_no_space() -> None:
    """Spelt in bytes, a space would decode to U+2581."""
    model = tk.train_tokenizer(["".join(chr(97 + i * i * i % 26) for i in range(999))], 280)
    tokenizer = Tokenizer(model, Path("toy.model"))
    assert tokenizer.decode(tokenizer.encode(" a  b ")) == " a  b "


@pytest.mark.parametrize("kind", LOSSLESS)
def test_special_ids_and_byte_pieces(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    sp = tokenizers[kind].sp
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert sum(sp.is_byte(i) for i in range(sp.get_piece_size())) == 256


def test_the_operators_are_pieces_of_their_own(tokenizers: dict[str, Tokenizer]) -> None:
    sp = tokenizers["caseops"].sp
    assert [sp.id_to_piece(i) for i in range(4, 8)] == list(OPERATORS)
    assert not any(set(OPERATORS) & set(sp.id_to_piece(i)) for i in range(8, sp.get_piece_size()))
    assert tokenizers["caseops"].encode("NASA")[0] == 5
    assert list(tokenizers["caseops"].encode("The mat The")).count(4) == 2


@pytest.mark.parametrize("awkward", ["", "\t", "\0", "\u2581", "\u2585", "\ue004", "\r\n"])
def test_no_length_and_no_character_keeps_a_document_from_the_tokenizer(awkward: str) -> None:
    """One file may hold one long document: the trainer must not skip it."""
    letters = [chr(97 + i * i * i % 7 + i % 3) + " " * (i % 5 == 0) for i in range(10_000)]
    model = tk.train_tokenizer(["".join(letters) + 2000 * awkward], 300)
    assert Tokenizer(model, Path("toy.model")).sp.get_piece_size() == 300


def test_a_large_alphabet_leaves_room_for_merges() -> None:
    rare = "".join(map(chr, range(0x4E00, 0x5E00)))
    tokenizer = Tokenizer(tk.train_tokenizer([*DOCUMENTS, rare], 400), Path("toy.model"))
    sp = tokenizer.sp
    assert sum(len(sp.id_to_piece(i)) > 1 and not sp.is_byte(i) for i in range(4, 400)) > 50
    assert tokenizer.decode(tokenizer.encode(rare)) == rare


def test_the_smallest_vocabulary_spells_text_in_bytes() -> None:
    tokenizer = Tokenizer(tk.train_tokenizer(DOCUMENTS, 261), Path("toy.model"))
    assert tokenizer.decode(tokenizer.encode(DOCUMENTS[7])) == DOCUMENTS[7]
    assert len(tokenizer.encode(DOCUMENTS[7])) == len(DOCUMENTS[7].encode())


@given(lengths=st.lists(st.integers(0, 50), max_size=60), limit=st.integers(1, 500))
def test_the_training_sample_is_evenly_spaced_and_bounded(lengths: list[int], limit: int) -> None:
    documents = [chr(256 + i) * n for i, n in enumerate(lengths)]
    sample = tk.sample_documents(documents, limit)
    assert len(sample) <= 1 or sum(map(len, sample)) <= limit
    strides = [2**k for k in range(8)]
    assert sample == [] or sample in [documents[::stride] for stride in strides]


@needs_published
def test_published_settings_are_those_of_the_published_model() -> None:
    """Read from the model file of the publishers. Left out: the table of NFKC, which varies by version."""
    ours = tk.train_published_tokenizer(DOCUMENTS, 300)
    fields = []
    for model in (ours, PUBLISHED.read_bytes()):
        parts = dict(tk.read_message(model))
        varying = (1, 2, 4, 16)  # input, output, size of the vocabulary, threads
        trainer = {k: v for k, v in tk.read_message(parts[tk.TRAINER]) if k not in varying}
        fields.append((trainer, {k: v for k, v in tk.read_message(parts[tk.NORMALIZER]) if k != 2}))
    assert fields[0][1] == fields[1][1]
    assert fields[0][0] == fields[1][0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_file_is_read_and_written_without_loss(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    model = tokenizers[kind].model
    assert tk.write_message(tk.read_message(model)) == model


def test_settings_are_read_from_the_model(tokenizers: dict[str, Tokenizer]) -> None:
    lossless = tokenizers["lossless"].settings
    assert (lossless["model_type"], lossless["normalization"], lossless["byte_fallback"]) == ("bpe", "identity", True)
    assert not lossless["remove_extra_whitespaces"]
    if "published" in tokenizers:
        published = tokenizers["published"].settings
        assert (published["normalization"], published["character_coverage"]) == ("nmt_nfkc", 0.999)
        assert published["remove_extra_whitespaces"]
        assert published["rewrites_characters"]


# --- Round trips ---


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text=" \n\n   \t\0 ")
@example(text="\u2585\ufeff\U0010ffff\u2581\ue004s\ue004")
def test_every_text_comes_back(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(text=texts)
def test_byte260_ids_are_4_plus_byte(tokenizers: dict[str, Tokenizer], text: str) -> None:
    """In SentencePiece itself too, which is what reads the model elsewhere."""
    expected = [4 + byte for byte in text.encode()]
    assert tokenizers["bytes"].encode(text).tolist() == expected
    assert tokenizers["bytes"].sp.encode(text) == expected
    assert tokenizers["bytes"].sp.get_piece_size() == 260


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("lossless", "escape"),
        ("caseops", "caseops"),
        ("bytes", "none"),
        pytest.param("published", "none", marks=needs_published),
    ],
)
def test_the_transform_follows_from_the_model(tokenizers: dict[str, Tokenizer], kind: str, name: str) -> None:
    assert tokenizers[kind].transform.name == name


# --- The cache of words ---


def test_words_are_as_short_as_the_pieces_allow(tokenizers: dict[str, Tokenizer]) -> None:
    """A tokenizer with pieces like "mat." needs words that end at a space only."""
    sp = tokenizers["foreign punctuated"].sp
    assert any(re.fullmatch(r"\u2581?\w+[.):]+", sp.id_to_piece(i)) for i in range(300))
    cached = tokenizers["foreign punctuated"].word_cache
    assert cached is not None
    assert cached.split("The mat. It") == ["The", " mat.", " It"]
    cached = tokenizers["foreign caseops"].word_cache
    assert cached is not None
    assert cached.split("The mat. It") == ["The", " mat", ".", " It"]


@pytest.mark.parametrize("kind", KINDS + FOREIGN)
@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text="  The  cat   ")
@example(text="\u2581\u2581 a\u2581b \u2581")
@example(text=" \u0301a \u0308 \u093f \u200b ")
def test_cached_words_give_the_tokens_of_sentencepiece(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.word_cache is not None
    assert tokenizer.encode(text).tolist() == plain_encode(tokenizer, text)


@needs_published
@pytest.mark.parametrize("name", ["fineweb_8192_bpe", "caseops"])
def test_cached_words_give_the_tokens_of_sentencepiece_on_real_text(
    tokenizers: dict[str, Tokenizer], name: str
) -> None:
    path = SHARED / "tokenizers" / f"{name}.model"
    tokenizer = Tokenizer(path.read_bytes(), path) if path.exists() else tokenizers[name]
    assert tokenizer.word_cache is not None
    lines = (SHARED / "web-real" / "commoncrawl_misc.jsonl").open(encoding="utf-8")
    for text in (json.loads(line)["text"] for line in lines):
        assert tokenizer.encode(text).tolist() == plain_encode(tokenizer, text)


def test_a_model_whose_pieces_cross_words_is_not_cached() -> None:
    """Neither is one without byte fallback, where unknown neighbours become one token."""
    for options in (
        {"split_by_whitespace": False, "byte_fallback": True},
        {"treat_whitespace_as_suffix": True, "byte_fallback": True},
        {"byte_fallback": False},
        {"byte_fallback": True, "model_type": "unigram"},
    ):
        tokenizer = foreign_tokenizer(**options)
        assert tokenizer.word_cache is None
        assert tokenizer.encode(SENTENCE).tolist() == plain_encode(tokenizer, SENTENCE)


def test_a_model_that_normalizes_and_keeps_spaces_is_not_cached() -> None:
    """No trainer makes one, but its tokens must be those of SentencePiece all the same."""
    fields = list(tk.read_message(foreign_tokenizer(byte_fallback=True).model))
    normalizer = tk.write_message([(1, b"identity"), (3, 0), (5, 0)])
    model = tk.write_message((field, normalizer if field == tk.NORMALIZER else value) for field, value in fields)
    tokenizer = Tokenizer(model, Path("foreign.model"))
    assert tokenizer.word_cache is None
    assert tokenizer.encode(SENTENCE).tolist() == plain_encode(tokenizer, SENTENCE)


def test_a_full_cache_starts_over(tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tk, "CACHED_WORDS", 5)
    monkeypatch.setattr(tk, "LONGEST_CACHED_WORD", 6)
    tokenizer = Tokenizer(tokenizers["lossless"].model, Path("toy.model"))
    assert tokenizer.word_cache is not None
    for text in DOCUMENTS:
        assert tokenizer.encode(text).tolist() == plain_encode(tokenizer, text)
        assert len(tokenizer.word_cache) <= 5
        assert all(len(word) <= 6 for word in tokenizer.word_cache)


# --- Source bytes ---

LOSSY: dict[str, dict[str, Any]] = {
    "digits": {"byte_fallback": False, "vocab_size": 60},  # trained on digits alone
    "word": {"model_type": "word"},
    "unigram": {"model_type": "unigram", "vocab_size": 60, "normalization_rule_name": "identity"},
    "char": {"model_type": "char", "remove_extra_whitespaces": False},
    "nmt_nfkc": {"byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
    "nfkc_cf": {"byte_fallback": True, "normalization_rule_name": "nfkc_cf", "add_dummy_prefix": False},
    "one blank": {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False},
    "suffix": {"byte_fallback": True, "treat_whitespace_as_suffix": True},
    "caseops": {"byte_fallback": True, "user_defined_symbols": list(OPERATORS)},
    "caseops without bytes": {"user_defined_symbols": list(OPERATORS), "normalization_rule_name": "nmt_nfkc_cf"},
    "other surface": {"unk_surface": "the \ue004", "user_defined_symbols": list(OPERATORS)},
}


@pytest.fixture(scope="module")
def lossy_tokenizers() -> dict[str, Tokenizer]:
    found = {}
    for name, options in LOSSY.items():
        documents = [" ".join(map(str, range(i, 40 * i, i))) for i in range(1, 40)] if name == "digits" else DOCUMENTS
        found[name] = foreign_tokenizer(documents, **options)
    return found


def bytes_in_common(a: str, b: str) -> int:
    """The longest common subsequence of two texts in bytes, by the table of the textbook."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            both = table[i][j] + len(x.encode()) if x == y else 0
            table[i + 1][j + 1] = max(table[i][j + 1], table[i + 1][j], both)
    return table[-1][-1]


@given(any_text | awkward_text, any_text | awkward_text)
@example("ab\u00e9\u00e9c", "a\u00e9xc")
def test_common_bytes_are_those_of_the_longest_common_subsequence(a: str, b: str) -> None:
    assert tk.common_bytes(a, b) == bytes_in_common(a, b)


@pytest.mark.parametrize("kind", LOSSY)
@settings(max_examples=100, deadline=None)
@given(text=texts)
@example(text="  The  12 cats\n\nRAN \u00bd \uff21 off  ")
@example(text=" \u2047  \u2047 the \u2047 cat")
def test_no_more_bytes_are_counted_than_decoding_gives_back(
    lossy_tokenizers: dict[str, Tokenizer], kind: str, text: str
) -> None:
    """And all of them if the text comes back without an unknown piece."""
    tokenizer = lossy_tokenizers[kind]
    ids, n_bytes = tokenizer.encode_with_bytes(text)
    assert ids.tolist() == plain_encode(tokenizer, text)
    assert n_bytes.shape == ids.shape
    assert (n_bytes >= 0).all()

    unknown = ids == tokenizer.sp.unk_id()
    assert not n_bytes[unknown].any()
    try:
        decoded = tokenizer.decode(ids)
    except ValueError:  # a lost operator
        decoded = ""
    assert n_bytes.sum() <= bytes_in_common(decoded, text)
    if decoded == text and not unknown.any():
        assert n_bytes.sum() == len(text.encode())


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("digits", "12 cats in 1999", 9),  # digits and blanks; each word of letters is one unknown piece
        ("digits", "no digits", 1),  # the blank
        ("word", "The cat zebra sat", 11),  # the blank before the zebra is lost with it
        ("unigram", "the \u6771\u4eac cat", 8),
        ("char", "  the\u6771", 5),
        ("nmt_nfkc", "a  \n b  ", 3),
        ("nmt_nfkc", "\uff21\u00bd\ufb01", 0),
        ("nmt_nfkc", "The CAT\nsat", 10),
        ("nfkc_cf", "The CAT sat", 7),
        ("one blank", "the   cat ", 7),
    ],
)
def test_bytes_that_a_lossy_tokenizer_gives_back(
    lossy_tokenizers: dict[str, Tokenizer], kind: str, text: str, expected: int
) -> None:
    assert lossy_tokenizers[kind].encode_with_bytes(text)[1].sum() == expected


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text="  a\n\nb  ")
@example(text="\u00bd\uff21\ufb01")
def test_source_bytes_of_a_lossless_tokenizer_add_up_to_the_text(
    tokenizers: dict[str, Tokenizer], kind: str, text: str
) -> None:
    """Also where the transform adds operators."""
    tokenizer = tokenizers[kind]
    ids, n_bytes = tokenizer.encode_with_bytes(text)
    assert ids.tolist() == plain_encode(tokenizer, text)
    assert n_bytes.shape == ids.shape
    assert (n_bytes >= 0).all()
    assert n_bytes.sum() == len(text.encode())


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=150, deadline=None)
@given(text=texts.filter(lambda text: not set(OPERATORS + "\u2581") & set(text)))
def test_source_bytes_of_a_lossless_tokenizer_are_those_of_its_pieces(
    tokenizers: dict[str, Tokenizer], kind: str, text: str
) -> None:
    """Independent count: a byte piece is one byte, an operator none, and any other piece its own UTF-8 length."""
    sp = tokenizers[kind].sp
    ids, n_bytes = tokenizers[kind].encode_with_bytes(text)
    pieces = [sp.id_to_piece(int(i)).replace("\u2581", " ") for i in ids]
    expected = [
        1 if sp.is_byte(int(i)) else 0 if piece in OPERATORS else len(piece.encode())
        for i, piece in zip(ids, pieces, strict=True)
    ]
    assert n_bytes.tolist() == expected


def test_an_escape_counts_for_the_character_it_carries(tokenizers: dict[str, Tokenizer]) -> None:
    ids, n_bytes = tokenizers["caseops"].encode_with_bytes("\u2581\ue001 A")
    pieces = [tokenizers["caseops"].sp.id_to_piece(int(i)) for i in ids]
    assert pieces[0] == "\ue004"
    assert pieces[-2:] == ["\ue001", "a"]
    assert n_bytes.tolist()[-2:] == [0, 1]
    assert n_bytes[0] == 0
    assert n_bytes.sum() == 8


@needs_published
def test_folded_bytes_count_for_no_token(tokenizers: dict[str, Tokenizer]) -> None:
    ids, n_bytes = tokenizers["published"].encode_with_bytes("a  \n b  ")
    pieces = [tokenizers["published"].sp.id_to_piece(int(i)) for i in ids]
    assert list(zip(pieces, n_bytes.tolist(), strict=True)) == [("a", 1), ("\u2581b", 2)]


# --- The two accountings ---


def both_accountings(tokenizer: Tokenizer, texts: list[str]) -> tuple[int, int]:
    """Bytes of the documents by the sidecar, and by the published rule (train_gpt.piece_bytes)."""
    sidecar = 0
    documents = []
    for text in texts:
        ids, n_bytes = tokenizer.encode_with_bytes(text)
        sidecar += int(n_bytes.sum())
        documents += [[tokenizer.sp.bos_id()], ids]
    tokens = np.concatenate(documents).astype(np.uint16)
    return sidecar, int(train_gpt.piece_bytes(tokenizer.sp, tokens).sum())


@needs_published
@pytest.mark.parametrize(
    ("text", "given_back", "normalized"),
    [
        ("Plain text, one space between words.", 36, 36),
        ("caf\u00e9 \u6771\u4eac \U0001f642", 17, 17),  # composed characters, also those that only byte pieces spell
        (" a leading space", 15, 15),
        ("two  spaces", 10, 10),
        ("a line\nanother", 13, 14),  # the newline became a space, which is not in the text
        ("a paragraph\n\nanother  ", 18, 19),
        ("\uff21", 0, 1),  # a full-width A is a plain one afterwards
        ("\u00bd", 0, 5),  # one half becomes "1", a fraction slash, "2"
        ("\ufb01", 0, 2),  # the ligature fi
        ("e\u0301", 0, 2),  # composed
        ("a\u200bb", 2, 3),  # a zero-width space becomes a plain one
        ("\u200b", 0, 0),  # no token is left, and the export drops the document
    ],
)
def test_where_the_published_accounting_agrees_with_the_sidecar(
    tokenizers: dict[str, Tokenizer], text: str, given_back: int, normalized: int
) -> None:
    """The published rule counts the bytes of the normalized text, the sidecar those that are in the source too."""
    assert both_accountings(tokenizers["published"], [text]) == (given_back, normalized)


@pytest.mark.parametrize("text", ["two words", " a leading space", "caf\u00e9 \u6771", "one\n\ntwo"])
def test_a_lossless_tokenizer_differs_from_the_published_accounting_in_a_leading_space_only(text: str) -> None:
    """Without whitespace-only pieces, which train_gpt.piece_bytes refuses."""
    tokenizer = foreign_tokenizer(
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    )
    sidecar, pieces = both_accountings(tokenizer, [text])
    assert sidecar == len(text.encode())
    assert sidecar - pieces == text.startswith(" ")


@needs_published
def test_what_each_accounting_misses_of_corpus_val(tokenizers: dict[str, Tokenizer]) -> None:
    """Above all newlines: the published rule counts the space that each paragraph's become, the sidecar nothing."""
    texts = [json.loads(line)["text"] for line in (SHARED / "corpus_val.jsonl").open(encoding="utf-8")]
    assert sum(len(text.encode()) for text in texts) == 3_034_930
    assert both_accountings(tokenizers["published"], texts) == (3_014_310, 3_025_499)
