"""Tokenizers for data/build_shards.py: train one, make one of pure bytes, encode text with any SentencePiece model."""

from __future__ import annotations

import io
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import sentencepiece as spm
from model_file import (
    MODEL_TYPES,
    NORMALIZER,
    PIECE,
    PIECES,
    SCORE,
    TRAINER,
    TYPE,
    TYPE_BYTE,
    TYPE_CONTROL,
    TYPE_UNKNOWN,
    TYPE_USER_DEFINED,
    Model,
    model_faults,
    parse_model,
    piece_bytes,
    read_message,
    rule_faults,
    vocabulary_bytes,
    write_message,
)
from transforms import NO_TEXT, OPERATORS, SPACE_MARK, TRANSFORMS, Transform, restored_characters, source_offsets

# What other tools take from here. The last two tell what a tokenizer file may hold (model_file.py).
__all__ = ["Tokenizer", "byte_model", "model_faults", "train_tokenizer", "vocabulary_bytes"]

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


def model_settings(model: bytes) -> dict[str, Any]:
    """How a model was trained and how it changes text, under the names of the trainer's options.

    Raises ValueError for a file that is not a model.
    """
    parsed = parse_model(model)
    parts = {TRAINER: parsed.trainer, NORMALIZER: parsed.normalizer}

    settings = {}
    for (part, field), (name, default) in SETTINGS.items():
        [value] = parts[part].get(field, [default])
        as_its_type = type(default)
        settings[name] = as_its_type(value)
    settings["model_type"] = MODEL_TYPES[settings["model_type"]]
    settings["normalization"] = settings["normalization"].decode(errors="replace") or "none"
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
            parsed = parse_model(model)
        except ValueError as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error}): pass the .model file of one") from None
        # Without rules of its own, a tokenizer decodes each token to the characters of its piece.
        faults = rule_faults(parsed)
        if faults:
            raise ValueError(f"{path} cannot be used: {faults[0]}")
        try:
            self.sp = spm.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            reason = str(error).rsplit("] ", 1)[-1].strip()
            raise ValueError(f"{path} is not a SentencePiece model ({reason}): pass the .model file of one") from None

        if not hasattr(self.sp, "EncodeAsOffsetMapping"):
            raise ValueError(f"sentencepiece {spm.__version__} is too old: pip install 'sentencepiece>=0.2.2'")
        self.require_bos(parsed)

        self.settings = model_settings(model)
        self.is_unknown = np.array([piece.type == TYPE_UNKNOWN for piece in parsed.pieces])
        self.is_byte = np.array([piece.type == TYPE_BYTE for piece in parsed.pieces])
        self.piece_bytes = piece_bytes(parsed)
        self.piece_sizes = np.array([len(decoded) for decoded in self.piece_bytes])
        self.normalizes = (
            self.settings["rewrites_characters"]
            or self.settings["add_dummy_prefix"]
            or self.settings["remove_extra_whitespaces"]
        )
        self.transform = self.find_transform(parsed)
        self.word_cache = self.make_word_cache()

    def __reduce__(self) -> tuple[type, tuple[bytes, Path]]:
        """A worker process gets the model alone and builds the rest from it: the cache cannot be pickled."""
        return Tokenizer, (self.model, self.path)

    def require_bos(self, parsed: Model) -> None:
        """Raise ValueError if no piece can open a document: the BOS must be a control piece, which no text contains."""
        if self.sp.bos_id() >= 0:
            return
        kinds = {piece.text: piece.type for piece in parsed.pieces}
        if kinds.get("<s>", TYPE_CONTROL) != TYPE_CONTROL:
            raise ValueError(
                f"{self.path} has <s> as a piece of text, so that it is no BOS: "
                "train it without <s> in user_defined_symbols"
            )
        raise ValueError(f"{self.path} has no BOS piece, which must open each document: train it with bos_id=1")

    def find_transform(self, parsed: Model) -> Transform:
        user_defined = {piece.text for piece in parsed.pieces if piece.type == TYPE_USER_DEFINED}
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
        if self.normalizes and not self.settings["escape_whitespaces"]:
            # The copy that does not normalize would write a space as U+2581.
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
        """Token ids without BOS, and how many bytes of the UTF-8 source each one gives back.

        A text that decodes to itself counts with all its bytes: a token with those of its piece, an operator of the
        transform with none.

        Of any other text, only what decoding gives back is counted. The text is cut where tokens begin in it, and so is
        the decoded text; tokens that begin at the same place belong together, such as the bytes of a character. What a
        part of the text and the same part of the decoded text have in common (the longest common subsequence of their
        characters) counts for the last token of the part. An unknown piece gives nothing back, nor does the blank that
        a tokenizer puts in front of a text. So the bytes of a document are never more than those that it has in common
        with what its tokens decode to.

        Raises ValueError for a tokenizer that decodes tokens to other text than that of their pieces.
        """
        ids = self.encode(text)
        if not ids.size:
            return ids, np.zeros(0, dtype=np.int64)

        pieces = b"".join(map(self.piece_bytes.__getitem__, ids.tolist()))
        n_added = self.added_blanks(ids, pieces)
        written = self.transform.encode(text)
        raw = written.encode()
        ends = (np.cumsum(self.piece_sizes[ids]) - n_added).clip(0)

        if pieces[n_added:] == raw and not self.is_unknown[ids].any():
            bounds = np.concatenate([[0], ends])
            return ids, np.diff(source_offsets(self.transform, raw)[bounds])
        return ids, self.bytes_given_back(written, ids, pieces[n_added:], ends)

    def added_blanks(self, ids: Tokens, pieces: bytes) -> int:
        """How many blanks at the begin of the joined pieces are not part of the decoded text."""
        decoded = self.sp.decode(ids.tolist()).encode()
        n_added = len(pieces) - len(decoded)
        if pieces != b" " * n_added + decoded:
            raise ValueError(f"{self.path} decodes tokens to other text than that of their pieces: train it again")
        return n_added

    def bytes_given_back(
        self, written: str, ids: Tokens, decoded: bytes, ends: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """The bytes of each token of a text that is not decoded to itself (see encode_with_bytes).

        written  the text after the transform
        decoded  what the tokens decode to, before the transform is undone; token i ends there at byte ends[i]
        """
        n_bytes = [0] * ids.size
        try:
            decoded_chars = restored_characters(self.transform, decoded.decode())
        except ValueError:
            # An operator was lost or added, so that nothing comes back.
            return np.array(n_bytes)
        source_chars = restored_characters(self.transform, written)

        # Places in the decoded text are counted in characters from here on, as SentencePiece counts those of a text.
        is_first_byte = np.frombuffer(decoded, np.uint8) & 0xC0 != 0x80
        decoded_ends = np.concatenate([[0], np.cumsum(is_first_byte)])[ends].tolist()
        known_chars = list(decoded_chars)
        for i in np.flatnonzero(self.is_unknown[ids]).tolist():
            begin = decoded_ends[i - 1] if i else 0
            known_chars[begin : decoded_ends[i]] = NO_TEXT * (decoded_ends[i] - begin)
        decoded_chars = "".join(known_chars)

        begins = [begin for begin, _ in self.sp.encode(written, out_type="offset_mapping")["offsets"]]
        assert len(begins) == ids.size, "the cache of words must give the tokens of SentencePiece"
        source_begin = 0
        decoded_begin = 0
        for i, source_end in enumerate([*begins[1:], len(source_chars)]):
            is_last = i + 1 == ids.size
            if begins[i] == source_end and not is_last:
                # The next token begins at the same place.
                continue
            source = source_chars[source_begin:source_end]
            n_bytes[i] = common_bytes(source, decoded_chars[decoded_begin : decoded_ends[i]])
            source_begin = source_end
            decoded_begin = decoded_ends[i]
        return np.array(n_bytes)


def first_difference(a: str, b: str) -> int:
    """How many characters at the begin of two texts are the same."""
    for i, (char, other) in enumerate(zip(a, b, strict=False)):
        if char != other:
            return i
    return min(len(a), len(b))


def common_bytes(a: str, b: str) -> int:
    """The UTF-8 bytes that two texts have in common: those of the longest subsequence of characters, in bytes."""
    if a == b and a.isascii():
        return len(a)
    a = a.replace(NO_TEXT, "")
    b = b.replace(NO_TEXT, "")
    if a == b:
        return len(a.encode())

    # Most of the time only one end differs: equal characters at an end belong to a longest common subsequence.
    n_first = first_difference(a, b)
    n_last = first_difference(a[n_first:][::-1], b[n_first:][::-1])
    n_bytes = len(a[:n_first].encode()) + len(a[len(a) - n_last :].encode())

    # The rest by dynamic programming: best[j] is the answer for the characters of `a` so far and the first j of `b`.
    rest_a = a[n_first : len(a) - n_last]
    rest_b = b[n_first : len(b) - n_last]
    shared = set(rest_a) & set(rest_b)
    other_chars = [char for char in rest_b if char in shared]
    best = [0] * (len(other_chars) + 1)
    for char in rest_a:
        if char not in shared:
            continue
        size = len(char.encode())
        before = 0
        for j, other in enumerate(other_chars, start=1):
            above = best[j]
            best[j] = before + size if char == other else max(above, best[j - 1])
            before = above
    return n_bytes + best[-1]
