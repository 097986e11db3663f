"""Tokenizers for data/build_shards.py: train one, make one of pure bytes, encode text with any SentencePiece model."""

from __future__ import annotations

import io
import re
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import sentencepiece as spm
from transforms import OPERATORS, SPACE_MARK, TRANSFORMS, Transform, source_offsets

# U+2585 is how SentencePiece's trainer marks the unknown: it skips every text that holds one.
UNTRAINABLE = OPERATORS + SPACE_MARK + "\u2585"
# The pieces of a trained tokenizer that are fixed: pad, BOS, EOS, unknown, and one for each byte.
SPECIAL_PIECES = 4 + 256
# The most common characters get pieces until they cover this share of the text; the others are spelt in bytes.
CHAR_COVERAGE = 0.9995
# More text hardly changes the merges of a small vocabulary.
TOKENIZER_TEXT_CHARS = 32_000_000
# As many documents as the published tokenizers saw, so that a long stream need not be read to its end twice.
TOKENIZER_DOCS = 5_000_000
# Limits of the cache of words, which then takes about 100 MB.
CACHED_WORDS = 500_000
LONGEST_CACHED_WORD = 100

Tokens: TypeAlias = npt.NDArray[np.uint16]

# --- Training ---


def sample_documents(documents: Iterable[str], max_chars: int) -> list[str]:
    """Every k-th document, where k is the smallest power of two that keeps the sample within `max_chars` characters."""
    sample: list[str] = []
    stride = 1
    chars = 0
    for i, text in enumerate(documents):
        if i % stride:
            continue
        sample.append(text)
        chars += len(text)
        while chars > max_chars and len(sample) > 1:
            sample = sample[::2]
            stride *= 2
            chars = sum(map(len, sample))
    return sample


def common_characters(documents: list[str], limit: int) -> str:
    """The most frequent characters, at most `limit`, up to CHAR_COVERAGE of the text."""
    counts = Counter(char for text in documents for char in text if char not in UNTRAINABLE)
    enough = CHAR_COVERAGE * counts.total()
    alphabet = ""
    covered = 0
    for char, count in counts.most_common(limit):
        if covered >= enough:
            break
        alphabet += char
        covered += count
    return alphabet


def run_trainer(sentences: Iterable[str], vocab_size: int, **options: Any) -> bytes:
    """Train a BPE with byte fallback and the published special ids. -> the SentencePiece model

    Raises ValueError if the text is too small for `vocab_size` pieces.
    """
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
            num_threads=1,  # several threads would add up their counts in any order
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

    SentencePiece without normalization and with byte fallback keeps every character but U+2581, and the transform
    (transforms.py) takes care of that one. With `caseops` each operator of the transform is a piece of its own, which
    also tells Tokenizer to apply it.
    """
    transform = TRANSFORMS["caseops" if caseops else "escape"]
    transformed = [transform.encode(text) for text in documents]

    # Characters get at most half of the pieces, so that merges get the rest. The trainer's own limit does not go low
    # enough (character_coverage must be at least 0.98), so we cut the training text at each rarer character.
    alphabet = common_characters(transformed, max(1, (vocab_size - SPECIAL_PIECES) // 2))
    if not alphabet:
        raise ValueError("the train split has no text for a tokenizer: name other files or a smaller --val-docs")
    rare = re.compile(f"[^{re.escape(alphabet)}]+")

    return run_trainer(
        (part for text in transformed for part in rare.split(text) if part),
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
    """Train with the settings of the published SP1024 ... SP8192. They apply NFKC and fold blanks: not lossless."""
    return run_trainer(
        (text for text in documents if text.strip()),
        vocab_size,
        normalization_rule_name="nmt_nfkc",
        character_coverage=0.999,
        hard_vocab_limit=False,
    )


# --- The model file ---
# A SentencePiece model is one message in the format of protocol buffers (sentencepiece_model.proto). Its fields have
# numbers instead of names; these are the ones that we need.

# Fields of the model: its pieces, how it was trained, and how it changes text first.
PIECES = 1
TRAINER = 2
NORMALIZER = 3

# Fields of a piece.
PIECE = 1
SCORE = 2
TYPE = 3

# Types of a piece.
TYPE_UNKNOWN = 2
TYPE_CONTROL = 3
TYPE_USER_DEFINED = 4
TYPE_BYTE = 6

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

# What the manifest tells about a model: (part, field) -> (name, default where the model does not say).
# A model that rewrites characters has compiled rules in that field.
SETTINGS: dict[tuple[int, int], tuple[str, Any]] = {
    (TRAINER, 3): ("model_type", 1),
    (TRAINER, 10): ("character_coverage", 0.9995),
    (TRAINER, 25): ("split_digits", False),
    (TRAINER, 26): ("allow_whitespace_only_pieces", False),
    (TRAINER, 35): ("byte_fallback", False),
    (NORMALIZER, 1): ("normalization", b""),
    (NORMALIZER, 2): ("rewrites_characters", False),
    (NORMALIZER, 3): ("add_dummy_prefix", True),
    (NORMALIZER, 4): ("remove_extra_whitespaces", True),
    (NORMALIZER, 5): ("escape_whitespaces", True),
}


def read_message(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field, value) pairs of a protocol buffer message, in order.

    A value is an int, a float, or bytes: those of a text or of a message inside this one. Doubles stay raw bytes too,
    since we need none.
    """
    position = 0

    def read_varint() -> int:
        """Seven bits per byte, lowest first; the top bit is set in all bytes but the last."""
        nonlocal position
        value = 0
        shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def read_bytes(size: int) -> bytes:
        nonlocal position
        position += size
        return message[position - size : position]

    while position < len(message):
        key = read_varint()
        field = key >> 3
        wire_type = key & 7
        if wire_type == 0:
            yield field, read_varint()
        elif wire_type == 1:
            yield field, read_bytes(8)
        elif wire_type == 5:
            yield field, struct.unpack("<f", read_bytes(4))[0]
        else:
            yield field, read_bytes(read_varint())


def write_message(fields: Iterable[tuple[int, Any]]) -> bytes:
    """The inverse of read_message, for messages without doubles."""

    def varint(value: int) -> bytes:
        if value <= 0x7F:
            return bytes([value])
        return bytes([value & 0x7F | 0x80]) + varint(value >> 7)

    def write(field: int, value: Any) -> bytes:
        if isinstance(value, bytes):
            return varint(field << 3 | 2) + varint(len(value)) + value
        if isinstance(value, float):
            return varint(field << 3 | 5) + struct.pack("<f", value)
        return varint(field << 3) + varint(value)

    return b"".join(write(field, value) for field, value in fields)


def model_settings(model: bytes) -> dict[str, Any]:
    """How a model was trained and how it changes text, under the names of the trainer's options."""
    parts = dict(read_message(model))  # the pieces overwrite each other here, but the two parts occur once
    values = {}
    for part in (TRAINER, NORMALIZER):
        for field, value in read_message(parts.get(part, b"")):
            values[part, field] = value

    settings = {}
    for key, (name, default) in SETTINGS.items():
        as_its_type = type(default)
        settings[name] = as_its_type(values.get(key, default))
    settings["model_type"] = MODEL_TYPES[settings["model_type"]]
    settings["normalization"] = settings["normalization"].decode() or "none"
    settings["character_coverage"] = round(settings["character_coverage"], 6)
    return settings


def byte_model() -> bytes:
    """A SentencePiece model of 260 pieces that gives each byte of the text the id 4 + byte (`byte260`)."""
    pieces = [(b"<pad>", TYPE_CONTROL), (b"<s>", TYPE_CONTROL), (b"</s>", TYPE_CONTROL), (b"<unk>", TYPE_UNKNOWN)]
    pieces += [(b"<0x%02X>" % byte, TYPE_BYTE) for byte in range(256)]
    model = [(PIECES, write_message([(PIECE, piece), (SCORE, 0.0), (TYPE, kind)])) for piece, kind in pieces]

    # The model type is BPE, the fourth entry turns byte fallback on, and the ids are those of pad, BOS, EOS, unknown.
    trainer = [(3, 2), (4, len(pieces)), (35, 1), (43, 0), (41, 1), (42, 2), (40, 3)]
    # No space is added in front, blanks are not folded, and a space stays a space.
    normalizer = [(1, b"identity"), (3, 0), (4, 0), (5, 0)]
    return write_message([*model, (TRAINER, write_message(trainer)), (NORMALIZER, write_message(normalizer))])


def without_normalizer(model: bytes) -> bytes:
    """The same model for text that has been normalized already."""
    identity = write_message([(1, b"identity"), (3, 0), (4, 0)])
    fields = [(field, identity if field == NORMALIZER else value) for field, value in read_message(model)]
    return write_message(fields)


# --- Encoding ---

# The cache of words. Words repeat, and looking up the tokens of a word is faster than running the merges of BPE again.
# It must not change a single token, so we use it only for models where the following holds.
#
# BPE starts from single characters and joins two neighbours only if the result is a piece of its vocabulary. Take
# "The mat. It" and cut it into the words "The", " mat", "." and " It". A join across the first cut would make a piece
# with a space after a letter ("e m"), one across the second cut a piece with punctuation after a letter ("t."), one
# across the third a piece with a space after punctuation (". I"). If the vocabulary has no piece of these kinds, no
# join ever crosses a cut, and so the tokens of the text are those of its words, one after the other.
#
# Three things could still spoil this:
# - A model without byte fallback makes one token of several unknown characters, across cuts too. So the model must
#   have a piece for every byte.
# - Normalization looks at neighbours: it folds blanks and composes characters. So a model that normalizes gets the
#   whole text first, and its words are then encoded by a copy of it that does not normalize.
# - The transform must not move a cut. It does not: only characters that count as letters here are rewritten, and what
#   it writes for them counts as letters too. (Everything that is not listed below counts as a letter.)


class WordPattern(NamedTuple):
    """One way to cut a text into words.

    word      matches the words of a text, one after the other
    crossing  matches a piece with characters of two words, which a model must not have
    """

    word: str
    crossing: str


# Control characters, digits and punctuation; the space is apart because it goes with the word behind it.
BETWEEN = r"\x00-\x1f!-@\[-`{-\x7f\xa0-\xbf\u2000-\u206f"

# The first pattern that a model allows is the best, because its words are the shortest and repeat most. The second one
# is for models with pieces like "mat.".
WORD_PATTERNS = (
    WordPattern(f" *[^ {BETWEEN}]+| *[{BETWEEN}]+| +", f"[^ {BETWEEN}][ {BETWEEN}]|[{BETWEEN}][^{BETWEEN}]"),
    WordPattern(" *[^ ]+| +", "[^ ] "),
)


class WordCache(dict[str, bytes]):
    """The tokens of each word, as the bytes of their uint16 numbers."""

    def __init__(self, pattern: str, encode: Callable[[str], list[int]]) -> None:
        self.split = re.compile(pattern).findall
        self.encode = encode

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

    The transform follows from the model. It is `caseops` if the operators are user-defined pieces, `escape` if the
    model carries all characters but U+2581, and `none` otherwise.

    Raises ValueError, naming `path`, for a file that is not a model and for a model that cannot make shards.
    """

    def __init__(self, model: bytes, path: Path) -> None:
        self.model = model
        self.path = path
        try:
            # Given an empty model, SentencePiece would load nothing and say nothing.
            self.sp = spm.SentencePieceProcessor(model_proto=model or b"\0")
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
        self.normalizes = (
            self.settings["rewrites_characters"]
            or self.settings["add_dummy_prefix"]
            or self.settings["remove_extra_whitespaces"]
        )
        self.transform = self.find_transform()
        self.word_cache = self.make_word_cache()

    def __reduce__(self) -> tuple[type, tuple[bytes, Path]]:
        """A worker process gets the model alone and builds the rest from it: the cache cannot be pickled."""
        return Tokenizer, (self.model, self.path)

    def find_transform(self) -> Transform:
        user_defined = set()
        for field, value in read_message(self.model):
            if field == PIECES:
                piece = dict(read_message(value))
                if piece.get(TYPE) == TYPE_USER_DEFINED:
                    user_defined.add(piece[PIECE].decode())
        if user_defined.issuperset(OPERATORS):
            return TRANSFORMS["caseops"]

        def carries(text: str) -> bool:
            return bool(self.sp.decode(self.sp.encode(text)) == text)

        lacks_space_mark_alone = carries("  a\n b\t\u00bd  ") and not carries(SPACE_MARK)
        return TRANSFORMS["escape" if lacks_space_mark_alone else "none"]

    def make_word_cache(self) -> WordCache | None:
        """An empty cache, or None for a model whose tokens a cache might change (see above)."""
        if self.settings["model_type"] != "bpe" or self.is_byte.sum() != 256:
            return None
        if not self.normalizes and self.transform.name == "none" and self.settings["escape_whitespaces"]:
            # Such a model takes a U+2581 in the text for a space, where the patterns do not cut.
            return None

        pieces = []
        for i in range(self.sp.get_piece_size()):
            if not (self.sp.is_control(i) or self.sp.is_unknown(i) or self.sp.is_byte(i)):
                pieces.append(self.sp.id_to_piece(i).replace(SPACE_MARK, " "))

        for pattern in WORD_PATTERNS:
            if not any(re.search(pattern.crossing, piece) for piece in pieces):
                return WordCache(pattern.word, self.word_encoder())
        return None

    def word_encoder(self) -> Callable[[str], list[int]]:
        """The function that encodes a word which is not in the cache yet."""
        if self.normalizes:
            bare = spm.SentencePieceProcessor(model_proto=without_normalizer(self.model))
            encode: Callable[[str], list[int]] = bare.encode
            return encode
        return lambda word: self.sp.encode(self.transform.encode(word))

    def encode(self, text: str) -> Tokens:
        """Token ids without BOS, the same as SentencePiece gives for the transformed text."""
        if self.word_cache is None:
            return self.sp.encode(self.transform.encode(text), out_type="numpy").astype(np.uint16)
        if self.normalizes:
            text = self.sp.normalize(self.transform.encode(text)).replace(SPACE_MARK, " ")
        return self.word_cache.encode_text(text)

    def decode(self, ids: npt.NDArray[np.integer]) -> str:
        return self.transform.decode(self.sp.decode(ids.tolist()))

    def encode_with_bytes(self, text: str) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Token ids without BOS, and how many bytes of the UTF-8 source each one stands for; they add up to the source.

        A token stands for all bytes from its begin to the begin of the next one; the first one also for what is before
        it. So bytes that a tokenizer folds or drops count for a token beside them. If a character is spelt in byte
        tokens, each of these stands for one byte, as long as the source has one left for it.
        """
        raw = self.transform.encode(text).encode()
        # SentencePiece counts offsets in bytes if it gets bytes.
        mapping = self.sp.encode(raw, out_type="offset_mapping")
        ids = np.array(mapping["ids"], dtype=np.uint16)
        if not ids.size:
            return ids, np.zeros(0, dtype=np.int64)

        begins = np.array([begin for begin, _ in mapping["offsets"]], dtype=np.int64)
        assert (np.diff(begins) >= 0).all(), "SentencePiece must give its tokens in the order of the text"

        # The byte tokens of one character all begin where the character begins. Move the second one on by one byte, the
        # third one by two, and so on, but none beyond the begin of the next character: normalization may have made
        # more bytes of this one than the source has.
        n_before_at_same_place = np.arange(ids.size) - np.searchsorted(begins, begins)
        next_begin = np.append(begins, len(raw))[np.searchsorted(begins, begins, side="right")]
        moved = np.where(self.is_byte[ids], begins + n_before_at_same_place, begins)
        begins = np.maximum.accumulate(np.minimum(moved, next_begin))

        bounds = np.concatenate([[0], begins[1:], [len(raw)]])
        return ids, np.diff(source_offsets(self.transform, raw)[bounds])


# --- What a model file may hold ---

# Characters: SentencePiece's default for the longest piece that it trains.
LONGEST_PIECE = 16


def model_pieces(model: bytes) -> list[str]:
    """The pieces of a model that stand for text."""
    sp = spm.SentencePieceProcessor(model_proto=model)
    return [sp.id_to_piece(i) for i in range(sp.get_piece_size()) if not sp.is_byte(i) and not sp.is_control(i)]


def model_faults(model: bytes) -> list[str]:
    """Why a model could hold more of a text than a tokenizer needs to; empty if it could not."""
    longest = max(map(len, model_pieces(model)))
    if longest > LONGEST_PIECE:
        return [f"its longest piece has {longest} characters, at most {LONGEST_PIECE} are allowed"]
    return []


def vocabulary_bytes(model: bytes) -> int:
    """The bytes of all pieces that stand for text."""
    return sum(len(piece.encode()) for piece in model_pieces(model))
