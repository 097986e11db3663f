"""Tokenizers for data/build_shards.py: train one, make the one of pure bytes, encode with any SentencePiece model."""

from __future__ import annotations

import io
import re
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import sentencepiece as spm
from transforms import OPERATORS, SPACE_MARK, TRANSFORMS, Transform, source_offsets

UNTRAINABLE = OPERATORS + SPACE_MARK + "\u2585"  # the last is the trainer's unknown: it skips a text that holds it
CHAR_COVERAGE = 0.9995  # of the training text; what is rarer is not worth a piece
SPECIAL_PIECES = 4 + 256  # pad, bos, eos, unk and the byte pieces of a trained tokenizer
TOKENIZER_TEXT_CHARS = 32_000_000  # more text moves the merges of a small vocabulary little
TOKENIZER_DOCS = 5_000_000  # as published: a stream need not be read to its end twice
CACHED_WORDS = 500_000  # about 100 MB
LONGEST_CACHED_WORD = 100  # characters
BETWEEN = r"\x00-\x1f!-@\[-`{-\x7f\xa0-\xbf\u2000-\u206f"  # blanks but the space, digits and punctuation
WORDS = (  # patterns of a word, and of what no piece may hold then; the first that fits gives the fewest words
    (f" *[^ {BETWEEN}]+| *[{BETWEEN}]+| +", f"[^ {BETWEEN}][ {BETWEEN}]|[{BETWEEN}][^{BETWEEN}]"),
    (" *[^ ]+| +", "[^ ] "),
)
Tokens: TypeAlias = npt.NDArray[np.uint16]

# --- Training ---


def sample_documents(documents: Iterable[str], max_chars: int) -> list[str]:
    """Every k-th document, for the smallest power of two k that keeps the sample within `max_chars` characters."""
    sample: list[str] = []
    stride, chars = 1, 0
    for i, text in enumerate(documents):
        if i % stride:
            continue
        sample.append(text)
        chars += len(text)
        while chars > max_chars and len(sample) > 1:
            sample, stride = sample[::2], 2 * stride
            chars = sum(map(len, sample))
    return sample


def common_characters(documents: list[str], limit: int) -> str:
    """The most frequent characters, at most `limit`, up to CHAR_COVERAGE of the text."""
    counts = Counter(char for text in documents for char in text if char not in UNTRAINABLE)
    wanted, covered, alphabet = CHAR_COVERAGE * counts.total(), 0, ""
    for char, count in counts.most_common(limit):
        if covered < wanted:
            alphabet, covered = alphabet + char, covered + count
    return alphabet


def run_trainer(sentences: Iterable[str], vocab_size: int, **options: Any) -> bytes:
    """A BPE with byte fallback and the published ids. Raises ValueError when the text has too few distinct merges."""
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            num_threads=1,  # a fixed order of additions
            minloglevel=2,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            **options,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise ValueError(f"--vocab-size={vocab_size} does not fit the training text: {reason}") from None
    return model.getvalue()


def train_tokenizer(documents: list[str], vocab_size: int, caseops: bool = False) -> bytes:
    """Train a lossless byte-fallback BPE. -> the SentencePiece model, the same bytes for the same documents

    Identity normalization and byte fallback keep every character but U+2581, which the transform (transforms.py)
    carries. Characters get at most half of the pieces beyond the fixed ones, the rarer ones are spelt in bytes: the
    training text is cut where they stand, since the trainer's own character_coverage does not go below 0.98. With
    `caseops` each operator is a piece of its own, which is also what tells Tokenizer to apply them.
    """
    transform = TRANSFORMS["caseops" if caseops else "escape"]
    written = [transform.encode(text) for text in documents]
    alphabet = common_characters(written, max(1, (vocab_size - SPECIAL_PIECES) // 2))
    if not alphabet:
        raise ValueError("the train split has no text for a tokenizer: name other files or a smaller --val-docs")
    rare = re.compile(f"[^{re.escape(alphabet)}]+")
    return run_trainer(
        (part for text in written for part in rare.split(text) if part),
        vocab_size,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        required_chars=SPACE_MARK,  # spelt in bytes it would not decode to a space
        character_coverage=1.0,
        max_sentence_length=1 << 30,  # the default skips documents above 4192 bytes
        user_defined_symbols=list(OPERATORS) if caseops else [],
    )


def train_published_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """Train as the published SP1024 ... SP8192 were: NFKC and folded whitespace, so it is not lossless."""
    return run_trainer(
        (text for text in documents if text.strip()),
        vocab_size,
        normalization_rule_name="nmt_nfkc",
        character_coverage=0.999,
        hard_vocab_limit=False,
    )


# --- The model file ---
# A SentencePiece model is one protocol buffer message (sentencepiece_model.proto); the fields that matter here:
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # of the model
PIECE, SCORE, TYPE = 1, 2, 3  # of a piece
TYPE_UNKNOWN, TYPE_CONTROL, TYPE_USER_DEFINED, TYPE_BYTE = 2, 3, 4, 6
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
SETTINGS: dict[tuple[int, int], tuple[str, Any]] = {  # (part, field): (name in the manifest, default)
    (TRAINER, 3): ("model_type", 1),
    (TRAINER, 10): ("character_coverage", 0.9995),
    (TRAINER, 25): ("split_digits", False),
    (TRAINER, 26): ("allow_whitespace_only_pieces", False),
    (TRAINER, 35): ("byte_fallback", False),
    (NORMALIZER, 1): ("normalization", b""),
    (NORMALIZER, 2): ("rewrites_characters", False),  # it has compiled rules
    (NORMALIZER, 3): ("add_dummy_prefix", True),
    (NORMALIZER, 4): ("remove_extra_whitespaces", True),
    (NORMALIZER, 5): ("escape_whitespaces", True),
}


def read_message(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field, value) of a protocol buffer message: int, float, or bytes for text and for messages inside it."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            value, shift, position = value | (byte & 0x7F) << shift, shift + 7, position + 1
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()  # doubles stay raw: none matters here
        raw, position = message[position : position + size], position + size
        yield key >> 3, struct.unpack("<f", raw)[0] if key & 7 == 5 else raw


def write_message(fields: Iterable[tuple[int, Any]]) -> bytes:
    """The inverse of read_message."""

    def varint(value: int) -> bytes:
        return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])

    def write(field: int, value: Any) -> bytes:
        if isinstance(value, bytes):
            return varint(field << 3 | 2) + varint(len(value)) + value
        if isinstance(value, float):
            return varint(field << 3 | 5) + struct.pack("<f", value)
        return varint(field << 3) + varint(value)

    return b"".join(write(field, value) for field, value in fields)


def model_settings(model: bytes) -> dict[str, Any]:
    """How a model was trained and what it does to text, by the names of the trainer's options."""
    parts = dict(read_message(model))  # the last one of each field; pieces do not matter here
    found = {(part, field): v for part in (TRAINER, NORMALIZER) for field, v in read_message(parts.get(part, b""))}
    settings = {name: type(default)(found.get(key, default)) for key, (name, default) in SETTINGS.items()}
    settings["model_type"] = MODEL_TYPES[settings["model_type"]]
    settings["normalization"] = settings["normalization"].decode() or "none"
    settings["character_coverage"] = round(settings["character_coverage"], 6)
    return settings


def byte_model() -> bytes:
    """A SentencePiece model of 260 pieces that gives each byte of the text the id 4 + byte (`byte260`)."""
    special = [(b"<pad>", TYPE_CONTROL), (b"<s>", TYPE_CONTROL), (b"</s>", TYPE_CONTROL), (b"<unk>", TYPE_UNKNOWN)]
    pieces = special + [(b"<0x%02X>" % byte, TYPE_BYTE) for byte in range(256)]
    ids = [(43, 0), (41, 1), (42, 2), (40, 3)]  # of pad, BOS, EOS, unknown
    trainer = [(3, 2), (4, len(pieces)), (35, 1), *ids]  # BPE, vocabulary size, byte fallback
    normalizer = [(1, b"identity"), (3, 0), (4, 0), (5, 0)]  # no prefix, no folding, a space stays a space
    written = [(PIECES, write_message([(PIECE, p), (SCORE, 0.0), (TYPE, kind)])) for p, kind in pieces]
    return write_message([*written, (TRAINER, write_message(trainer)), (NORMALIZER, write_message(normalizer))])


def without_normalizer(model: bytes) -> bytes:
    """The same model for text that is normalized already."""
    identity = write_message([(1, b"identity"), (3, 0), (4, 0)])
    fields = ((field, identity if field == NORMALIZER else value) for field, value in read_message(model))
    return write_message(fields)


# --- Encoding ---


class WordCache(dict[str, bytes]):
    """The tokens of each word, as bytes of uint16: words repeat, and a look-up is faster than the merges of BPE."""

    def __init__(self, pattern: str, encode: Callable[[str], list[int]]) -> None:
        self.encode, self.split = encode, re.compile(pattern).findall

    def __missing__(self, word: str) -> bytes:
        tokens = array("H", self.encode(word)).tobytes()
        if len(self) >= CACHED_WORDS:
            self.clear()
        if len(word) <= LONGEST_CACHED_WORD:
            self[word] = tokens
        return tokens

    def encode_text(self, text: str) -> Tokens:
        return np.frombuffer(b"".join(map(self.__getitem__, self.split(text))), dtype=np.uint16)


class Tokenizer:
    """A SentencePiece model and the transform that its text goes through.

    The transform follows from the model: `caseops` where the operators are user-defined pieces, `escape` where U+2581
    is all that it cannot carry, else `none`. Raises ValueError, naming `path`, for what cannot label uint16 shards.
    """

    def __init__(self, model: bytes, path: Path) -> None:
        self.model, self.path = model, path
        try:
            self.sp = spm.SentencePieceProcessor(model_proto=model or b"\0")  # empty must fail, not load nothing
        except RuntimeError:
            raise ValueError(f"{path} is not a SentencePiece model: pass the .model file of one") from None
        size = self.sp.get_piece_size()
        if not hasattr(self.sp, "EncodeAsOffsetMapping"):
            raise ValueError(f"sentencepiece {spm.__version__} is too old: pip install 'sentencepiece>=0.2.2'")
        if self.sp.bos_id() < 0:
            raise ValueError(f"{path} has no BOS piece, which must open each document: train it with bos_id=1")
        if size > 0x10000:
            raise ValueError(f"{path} has {size} pieces, but shards are uint16: use at most 65536")
        self.settings = model_settings(model)
        self.is_byte = np.array([self.sp.is_byte(i) for i in range(size)])
        self.transform = self.find_transform()
        rewriting = ("rewrites_characters", "add_dummy_prefix", "remove_extra_whitespaces")
        self.normalizes = any(self.settings[name] for name in rewriting)
        self.words = self.word_cache()

    def __reduce__(self) -> tuple[type, tuple[bytes, Path]]:
        return Tokenizer, (self.model, self.path)

    def find_transform(self) -> Transform:
        pieces = (dict(read_message(value)) for field, value in read_message(self.model) if field == PIECES)
        user_defined = {piece[PIECE].decode() for piece in pieces if piece.get(TYPE) == TYPE_USER_DEFINED}
        if user_defined.issuperset(OPERATORS):
            return TRANSFORMS["caseops"]

        def carries(text: str) -> bool:
            return bool(self.sp.decode(self.sp.encode(text)) == text)

        return TRANSFORMS["escape" if carries("  a\n b\t\u00bd  ") and not carries(SPACE_MARK) else "none"]

    def word_cache(self) -> WordCache | None:
        """A cache, where the tokens of a text are proven to be those of its words, one after the other; else None.

        BPE joins two neighbours only if a piece holds both. So where no piece goes from a letter to a space, a digit or
        punctuation, or back, no merge ever crosses the start of a word, and byte fallback keeps unknown characters
        from being joined. What normalizes goes through the model's own normalizer first, as a whole. A transform
        keeps each character on its side: it writes letters and private characters for letters, and nothing else.
        """
        if self.settings["model_type"] != "bpe" or self.is_byte.sum() != 256:
            return None
        if not self.normalizes and self.transform.name == "none" and self.settings["escape_whitespaces"]:
            return None  # a U+2581 in the text would be a space to the model, but no start of a word
        sp = self.sp
        ids = [i for i in range(sp.get_piece_size()) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
        pieces = [sp.id_to_piece(i).replace(SPACE_MARK, " ") for i in ids]
        fits = (pattern for pattern, crossing in WORDS if not any(re.search(crossing, piece) for piece in pieces))
        pattern = next(fits, None)
        if not pattern:
            return None
        if self.normalizes:
            bare = spm.SentencePieceProcessor(model_proto=without_normalizer(self.model))
            return WordCache(pattern, bare.encode)
        return WordCache(pattern, lambda word: self.sp.encode(self.transform.encode(word)))

    def encode(self, text: str) -> Tokens:
        """Token ids without BOS, the same as SentencePiece gives for the transformed text."""
        if self.words is None:
            return self.sp.encode(self.transform.encode(text), out_type="numpy").astype(np.uint16)
        if self.normalizes:
            text = self.sp.normalize(self.transform.encode(text)).replace(SPACE_MARK, " ")
        return self.words.encode_text(text)

    def decode(self, ids: npt.NDArray[np.integer]) -> str:
        return self.transform.decode(self.sp.decode(ids.tolist()))

    def encode_with_bytes(self, text: str) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Token ids, and how many bytes of the UTF-8 source each one stands for; these add up to the source.

        Token i runs from its begin to that of token i + 1; the first one starts at 0 and the last one ends with the
        text. So bytes that a tokenizer folds or drops count for a token beside them. Of a character that is spelt in
        byte tokens, each of these counts 1, as far as the source has them.
        """
        raw = self.transform.encode(text).encode()
        mapping = self.sp.encode(raw, out_type="offset_mapping")  # of bytes: the offsets are bytes, not characters
        ids = np.array(mapping["ids"], dtype=np.uint16)
        if not ids.size:
            return ids, np.zeros(0, dtype=np.int64)
        begins = np.array([begin for begin, _ in mapping["offsets"]], dtype=np.int64)
        assert (np.diff(begins) >= 0).all(), "SentencePiece must give its tokens in the order of the text"
        first = np.searchsorted(begins, begins)  # of the tokens that begin at the same place
        after = np.append(begins, len(raw))[np.searchsorted(begins, begins, side="right")]
        begins = np.minimum(begins + np.where(self.is_byte[ids], np.arange(ids.size) - first, 0), after)
        begins = np.maximum.accumulate(begins)
        bounds = np.concatenate([[0], begins[1:], [len(raw)]])
        return ids, np.diff(source_offsets(self.transform, raw)[bounds])
