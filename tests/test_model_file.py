"""Files of tokenizers: honest ones are read, and none can crash the reader, or hold text without being refused."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_file as mf
import pytest
import sentencepiece as spm
import tokenizer as tk
from hypothesis import given, settings
from hypothesis import strategies as st
from model_file import read_message, write_message
from transforms import OPERATORS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"
SENTENCE = "The cat sat on a mat and THEN it ran off with 12 caf\u00e9s to be (well) seen Again."
DOCUMENTS = [f"{SENTENCE} number {i}" for i in range(60)]
SECRET = b"what the validation text says, word by word"


def foreign_model(**options: Any) -> bytes:
    """One that another tool could have trained."""
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "vocab_size": 320, "hard_vocab_limit": False, "minloglevel": 2}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(DOCUMENTS), model_writer=model, **{**defaults, **options})
    return model.getvalue()


@pytest.fixture(scope="module")
def plain() -> bytes:
    """A small model without a map of characters."""
    return foreign_model(byte_fallback=True, normalization_rule_name="identity")


# --- Honest models ---

HONEST: dict[str, Callable[[], bytes]] = {
    "lossless": lambda: tk.train_tokenizer(DOCUMENTS, 300),
    "caseops": lambda: tk.train_tokenizer(DOCUMENTS, 300, caseops=True),
    "byte260": tk.byte_model,
    "published settings": lambda: tk.train_published_tokenizer(DOCUMENTS, 300),
    "unigram": lambda: foreign_model(model_type="unigram", vocab_size=60),
    "unigram with bytes": lambda: foreign_model(model_type="unigram", vocab_size=320, byte_fallback=True),
    "word": lambda: foreign_model(model_type="word", vocab_size=40),
    "char": lambda: foreign_model(model_type="char", vocab_size=60),
    "nfkc": lambda: foreign_model(normalization_rule_name="nfkc"),
    "nmt_nfkc_cf": lambda: foreign_model(normalization_rule_name="nmt_nfkc_cf"),
    "nfkc_cf": lambda: foreign_model(normalization_rule_name="nfkc_cf"),
    "suffix": lambda: foreign_model(treat_whitespace_as_suffix=True),
    "symbols": lambda: foreign_model(control_symbols=["<|im_start|>"], user_defined_symbols=["<x>", *OPERATORS]),
}


@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_model_has_no_faults(kind: str) -> None:
    model = HONEST[kind]()
    assert mf.model_faults(model) == []
    assert mf.parse_model(model).pieces == [
        mf.Piece(sp.id_to_piece(i), sp.get_score(i), kind_of(sp, i))
        for sp in [spm.SentencePieceProcessor(model_proto=model)]
        for i in range(sp.get_piece_size())
    ]


def kind_of(sp: spm.SentencePieceProcessor, i: int) -> int:
    if sp.is_unknown(i):
        return mf.TYPE_UNKNOWN
    if sp.is_control(i):
        return mf.TYPE_CONTROL
    if sp.is_byte(i):
        return mf.TYPE_BYTE
    fields = [value for field, value in read_message(sp.serialized_model_proto()) if field == mf.PIECES]
    return dict(read_message(fields[i])).get(mf.TYPE, mf.TYPE_NORMAL)


@pytest.mark.parametrize("name", ["fineweb_1024_bpe", "fineweb_4096_bpe", "fineweb_8192_bpe"])
def test_the_published_models_have_no_faults(name: str) -> None:
    path = SHARED / f"{name}.model"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    model = path.read_bytes()
    assert mf.model_faults(model) == []
    sp = spm.SentencePieceProcessor(model_proto=model)
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size()) if not sp.is_byte(i)]
    assert mf.vocabulary_bytes(model) == sum(len(piece.encode()) for piece in pieces)


def test_scores_that_do_not_follow_from_the_order_are_counted(plain: bytes) -> None:
    """A float holds four bytes of text as well as a score."""
    counted = mf.vocabulary_bytes(plain)
    assert mf.vocabulary_bytes(with_pieces(plain, [piece("x" * 9, -1234.5)])) == counted + 9 + 4
    words = foreign_model(model_type="word", vocab_size=40)
    pieces = mf.parse_model(words).pieces
    assert mf.vocabulary_bytes(words) == sum(len(p.text.encode()) + 4 * (p.score != 0) for p in pieces)


# --- Models that hold text ---


def piece(text: str, score: float = 0.0, kind: int = mf.TYPE_USER_DEFINED) -> bytes:
    return write_message([(mf.PIECE, text.encode()), (mf.SCORE, score), (mf.TYPE, kind)])


def with_pieces(model: bytes, pieces: list[bytes]) -> bytes:
    return model + write_message((mf.PIECES, message) for message in pieces)


def with_field(part: int, field: int, value: Any) -> Callable[[bytes], bytes]:
    """A function that adds a field to one part of a model."""

    def change(model: bytes) -> bytes:
        fields = dict(read_message(model))
        message = fields.get(part, b"") + write_message([(field, value)])
        others = [(number, content) for number, content in read_message(model) if number != part]
        return write_message([*others, (part, message)])

    return change


def with_other_map(model: bytes) -> bytes:
    """The map of nmt_nfkc, in which one character becomes another text."""
    character_map = bytearray(shipped_map())
    character_map[-40] ^= 1
    normalizer = write_message([(1, b"nmt_nfkc"), (mf.CHARACTER_MAP, bytes(character_map))])
    fields = [(field, normalizer if field == mf.NORMALIZER else value) for field, value in read_message(model)]
    return write_message(fields)


def shipped_map() -> bytes:
    proto = spm.SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_model_proto()
    return dict(read_message(dict(read_message(proto))[mf.NORMALIZER]))[mf.CHARACTER_MAP]


FORGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "denormalizer": (with_field(mf.DENORMALIZER, mf.CHARACTER_MAP, shipped_map()), "it has a denormalizer"),
    "denormalizer rules": (with_field(mf.DENORMALIZER, mf.RULES_AS_TEXT, b"41\t42"), "it has a denormalizer"),
    "map": (with_other_map, "a map of characters that came with no version of SentencePiece"),
    "rules": (with_field(mf.NORMALIZER, mf.RULES_AS_TEXT, b"41\t42"), "its normalizer has rules of its own"),
    "surface": (with_field(mf.TRAINER, mf.UNKNOWN_SURFACE, SECRET), "its unknown piece decodes to b'what the"),
    "self-test": (lambda m: m + write_message([(mf.SELF_TEST, b"")]), "it holds samples for a self-test"),
    "long text": (with_field(mf.TRAINER, 1, 30 * SECRET), "its settings hold 1298 bytes of text"),
    "symbols": (with_field(mf.TRAINER, mf.CONTROL_SYMBOLS, SECRET), "its settings list symbols that are not pieces"),
    "long piece": (lambda m: with_pieces(m, [piece("x" * 17, 0.0, 1)]), "its longest piece 'xxxxx"),
    "long symbol": (lambda m: with_pieces(m, [piece("x" * 17)]), "its longest piece 'xxxxx"),
    "long control": (lambda m: with_pieces(m, [piece("x" * 17, 0.0, 3)]), "its longest piece 'xxxxx"),
    "long unused": (lambda m: with_pieces(m, [piece("x" * 17, 0.0, 5)]), "its longest piece 'xxxxx"),
    "copy": (lambda m: with_pieces(m, [piece("xq"), piece("xq")]), "its piece 'xq' occurs 2 times"),
    "two unknown": (lambda m: with_pieces(m, [piece("<u>", 0.0, 2)]), "it has 2 unknown pieces"),
    "unknown field": (lambda m: m + write_message([(200, SECRET)]), "the model has the unknown field 200"),
    "extension": (lambda m: m + write_message([(1, piece("xq") + write_message([(201, SECRET)]))]), "field 201"),
    "field of trainer": (with_field(mf.TRAINER, 99, SECRET), "the trainer has the unknown field 99"),
    "field of normalizer": (with_field(mf.NORMALIZER, 99, SECRET), "the normalizer has the unknown field 99"),
    "second trainer": (lambda m: m + write_message([(mf.TRAINER, SECRET)]), "the model has field 2 twice"),
    "second name": (with_field(mf.NORMALIZER, 1, SECRET), "the normalizer has field 1 twice"),
    "pieces": (lambda m: with_pieces(m, [piece(f"{i:x}z") for i in range(65_300)]), "more than 65536 values"),
    "no UTF-8": (lambda m: m + write_message([(1, write_message([(1, b"\xff\xfe")]))]), "is not UTF-8"),
    "not finite": (lambda m: with_pieces(m, [piece("xq", float("nan"))]), "with the score nan"),
    "kind": (lambda m: with_pieces(m, [piece("xq", 0.0, 77)]), "of the unknown type 77"),
    "false byte": (lambda m: with_pieces(m, [piece("<0xZZ>", 0.0, 6)]), "is no byte"),
    "empty": (lambda m: with_pieces(m, [piece("")]), "it has an empty piece"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_model_that_could_hold_text_is_refused_by_name(plain: bytes, kind: str) -> None:
    forge, fault = FORGED[kind]
    faults = mf.model_faults(forge(plain))
    assert len(faults) == 1
    assert fault in faults[0]


def test_some_missing_byte_is_a_fault() -> None:
    fields = list(read_message(tk.byte_model()))
    del fields[100]
    assert mf.model_faults(write_message(fields)) == [
        "it has 255 byte pieces, not one for each of the 256 bytes: train it again"
    ]


@pytest.mark.parametrize("kind", ["denormalizer", "map", "rules", "unknown field", "false byte", "kind"])
def test_a_tokenizer_refuses_rules_that_nobody_knows(plain: bytes, kind: str) -> None:
    """Its bytes are counted from the characters of its pieces."""
    forge, fault = FORGED[kind]
    with pytest.raises(ValueError, match=r"^bad\.model ") as refusal:
        tk.Tokenizer(forge(plain), Path("bad.model"))
    assert fault in str(refusal.value)


@pytest.mark.parametrize("kind", [mf.TYPE_NORMAL, mf.TYPE_USER_DEFINED, mf.TYPE_UNUSED])
def test_no_piece_is_longer_than_a_sidecar_can_count(plain: bytes, kind: int) -> None:
    """SentencePiece sees to that. The sidecar has 65,535 bytes for a token at most."""
    with pytest.raises(ValueError, match=r"bad\.model .*piece is too long"):
        tk.Tokenizer(with_pieces(plain, [piece("x" * 8192, -500.0, kind)]), Path("bad.model"))


# --- Damaged files ---


@given(st.lists(st.tuples(st.integers(1, 10**6), st.binary() | st.integers(0, 2**64 - 1))))
def test_a_message_is_read_as_it_was_written(fields: list[tuple[int, Any]]) -> None:
    assert list(read_message(write_message(fields))) == fields


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_a_value_error(message: bytes) -> None:
    try:
        for field, _ in read_message(message):
            assert field >= 0
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (b"\x0a", "ends inside a number"),
        (b"\x0a\xff\xff\xff\xff\x07", "needs 2147483647 bytes, but 0 are left"),
        (b"\x08" + 11 * b"\xff", "has more than 10 bytes"),
        (b"\x15\0\0", "needs 4 bytes, but 2 are left"),
        (b"\x0b", "wire type 3, which no model has"),
        (b"\x09" + bytes(8), "wire type 1, which no model has"),
    ],
)
def test_a_damaged_message_is_refused(message: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        list(read_message(message))


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_model_is_refused_by_name_or_counts_bytes_soundly(plain: bytes, data: st.DataObject) -> None:
    """Bytes are changed, cut out, put in and put behind."""
    model = bytearray(plain)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(model)))
        n_lost = data.draw(st.integers(0, 8))
        model[place : place + n_lost] = data.draw(st.binary(max_size=8))
    try:
        tokenizer = tk.Tokenizer(bytes(model), Path("bad.model"))
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert message.startswith("bad.model ")
        return
    text = "The cat  sat \u00bd"
    assert tokenizer.encode_with_bytes(text)[1].sum() <= len(text.encode())
    assert isinstance(mf.model_faults(bytes(model)), list)


ODD_VALUES: dict[type, st.SearchStrategy[Any]] = {
    int: st.sampled_from([0, 1, 2, 3, 6, 127, 2**31 - 1, 2**31, 2**64 - 1]),
    float: st.sampled_from([0.0, -0.0, 1e38, -1e38, 1e-45]),
    bytes: st.sampled_from([b"", b"a", b"<s>", b"<unk>", b"<0x41>", b"\0", b"\xff", b" ", "\u2581\u2581".encode()]),
}


@settings(max_examples=150)
@given(data=st.data())
def test_odd_values_in_a_model_are_refused_by_name_or_do_no_harm(plain: bytes, data: st.DataObject) -> None:
    """The message is whole, but says what no trainer writes. Tokens stay those of SentencePiece itself."""
    schemas = {mf.PIECES: mf.PIECE_SCHEMA, mf.TRAINER: mf.TRAINER_SCHEMA, mf.NORMALIZER: mf.NORMALIZER_SCHEMA}
    fields = list(read_message(plain))
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(fields) - 1) | st.integers(len(fields) - 2, len(fields) - 1))
        part, message = fields[i]
        changed = data.draw(st.sampled_from(sorted(schemas[part].kinds)))
        values = dict(read_message(message)) | {changed: data.draw(ODD_VALUES[schemas[part].kinds[changed]])}
        fields[i] = (part, write_message(values.items()))
    model = write_message(fields)
    try:
        tokenizer = tk.Tokenizer(model, Path("bad.model"))
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert message.startswith("bad.model ")
        return
    text = "The cat  sat \u00bd"
    ids, n_bytes = tokenizer.encode_with_bytes(text)
    assert ids.tolist() == tokenizer.sp.encode(tokenizer.transform.encode(text))
    assert n_bytes.sum() <= len(text.encode())


GREEDY: dict[str, Callable[[bytes], bytes]] = {
    # Read as a number, a text of this length was made of zeros.
    "name of 1.5 GiB": lambda m: m + write_message([(mf.NORMALIZER, write_message([(1, 3 << 29)]))]),
    "piece of 2 GiB": lambda m: m + b"\x0a\xff\xff\xff\xff\x07",
    "endless number": lambda m: m + b"\x08" + (1 << 20) * b"\xff",
    "empty pieces": lambda m: (8 << 20) * b"\x0a\x00",
    "empty symbols": lambda m: m + write_message([(mf.TRAINER, (1 << 22) * b"\xf2\x01\x00")]),
    "too large": lambda m: m + write_message([(mf.PIECES, bytes(17 << 20))]),
}
REFUSE = """
import resource, sys, time
from pathlib import Path
import tokenizer

path = Path(sys.argv[1])
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + path.stat().st_size + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

model = path.read_bytes()
started = time.process_time()
faults = tokenizer.model_faults(model)
seconds = time.process_time() - started
try:
    tokenizer.Tokenizer(model, path)
except ValueError as error:
    print(len(faults), str(path) in str(error), seconds < 2)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells the size of a process")
@pytest.mark.parametrize("kind", GREEDY)
def test_a_model_that_asks_for_time_or_memory_is_refused_in_bounds(plain: bytes, kind: str, tmp_path: Path) -> None:
    """2 seconds, and 64 MiB beside the file and what was imported."""
    path = tmp_path / "greedy.model"
    path.write_bytes(GREEDY[kind](plain))
    env = {"PYTHONPATH": str(Path(tk.__file__).parent), "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", REFUSE, str(path)], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert run.stdout.split() == ["1", "True", "True"], run.stderr
