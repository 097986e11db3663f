"""The file of a SentencePiece model: how it is read and written, and what it may hold.

A model is one message in the format of protocol buffers (sentencepiece_model.proto). Its fields have numbers instead of
names. A file that anyone may have written is read here before SentencePiece sees it: SentencePiece trusts its input.

    read_message, write_message   any message
    parse_model                   a model, or ValueError for a file that is damaged or has fields that no model has
    model_faults                  what would let a tokenizer hold text instead of splitting it
    vocabulary_bytes              how much a vocabulary could hold
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import sentencepiece as spm
from transforms import SPACE_MARK

# The number of pieces that uint16 shards can name.
MAX_PIECES = 0x10000
# The trainer's own limit, with a space counted as one character.
MAX_PIECE_CHARACTERS = 16
# File names, languages and names of pieces in the trainer's settings, all together.
MAX_SETTINGS_TEXT = 1000
# Caps on what a file may make us read. A model of 65,536 pieces of 16 characters takes less than 7 MB.
MAX_MODEL_BYTES = 16 << 20
MAX_PART_BYTES = 1 << 20

# Fields of the model: its pieces, how it was trained, how it changes text, and how it changes decoded text.
PIECES = 1
TRAINER = 2
NORMALIZER = 3
SELF_TEST = 4
DENORMALIZER = 5

# Fields of a piece.
PIECE = 1
SCORE = 2
TYPE = 3

# Types of a piece.
TYPE_NORMAL = 1
TYPE_UNKNOWN = 2
TYPE_CONTROL = 3
TYPE_USER_DEFINED = 4
TYPE_UNUSED = 5
TYPE_BYTE = 6

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

# Fields of the trainer that are named below.
MODEL_TYPE = 3
CONTROL_SYMBOLS = 30
USER_DEFINED_SYMBOLS = 31
UNKNOWN_SURFACE = 44
# Fields of the normalizer that are named below.
CHARACTER_MAP = 2
RULES_AS_TEXT = 6

DEFAULT_UNKNOWN_SURFACE = " \u2047 ".encode()
BYTE_NAMES = {f"<0x{byte:02X}>" for byte in range(256)}


class Schema(NamedTuple):
    """The fields that a message may have.

    name      what the message is called in errors
    kinds     the type of each field's value; whole numbers, choices and switches are all int
    repeated  the fields that may occur more than once
    """

    name: str
    kinds: Mapping[int, type]
    repeated: frozenset[int] = frozenset()


MODEL_SCHEMA = Schema(
    "the model",
    dict.fromkeys([PIECES, TRAINER, NORMALIZER, SELF_TEST, DENORMALIZER], bytes),
    frozenset([PIECES]),
)
PIECE_SCHEMA = Schema("a piece", {PIECE: bytes, SCORE: float, TYPE: int})
NORMALIZER_SCHEMA = Schema(
    "the normalizer", {1: bytes, CHARACTER_MAP: bytes, 3: int, 4: int, 5: int, RULES_AS_TEXT: bytes}
)
DENORMALIZER_SCHEMA = NORMALIZER_SCHEMA._replace(name="the denormalizer")
TRAINER_SCHEMA = Schema(
    "the trainer",
    {
        **dict.fromkeys([1, 2, 5, 7, CONTROL_SYMBOLS, USER_DEFINED_SYMBOLS, 36, UNKNOWN_SURFACE], bytes),
        **dict.fromkeys([45, 46, 47, 48, 53, 54], bytes),
        **dict.fromkeys([10, 15, 51], float),
        **dict.fromkeys([MODEL_TYPE, 4, 6, 11, 12, 13, 14, *range(16, 27), 32, 33, 34, 35, *range(40, 44)], int),
        **dict.fromkeys([49, 50, 52, 55], int),
    },
    # Input files, languages and symbols.
    frozenset([1, 5, CONTROL_SYMBOLS, USER_DEFINED_SYMBOLS]),
)

# sha256 of the compiled maps of characters that came with SentencePiece. The installed version adds its own.
KNOWN_CHARACTER_MAPS = {
    # 0.1.98 to 0.2.0: nmt_nfkc, nfkc, nmt_nfkc_cf, nfkc_cf
    "51d3684747b35ef99cd4802f37cc1ee0c6bec4d060814f774efb1066d3c167f2",
    "557b5397b1133d8abb62f7923e5b53ee496d3e36b9f63fd42625077c33688a14",
    "6cec34e8016fd0d0a2da28b60b00e36b19a275df83786bf6b494bd033c708f83",
    "b30e4085ba1fad56d2401f4612419b6b3b42c5adc1e04f3aa1806399895d6bdd",
    # 0.2.1, which made the published tokenizers
    "79372c41389c2b9b29bc171017ab5400e352debd686b02670a42bec709015074",
    "52f11028ff8a7df3e009d94a8b6a54d4a8a17132efb4ccc1c9a0a41e432bd91e",
    "22c292c76f503795f30c85d79d30a7f572fff4f49e00392d2d60f4f93e941a1e",
    "60833ec11201446659c3549c183b18f024c4007628cc6b3a4e91ae007697b826",
    # 0.2.2
    "5febaab28312e9dbddb42be695c9e4380367f7ebe65121cdf894fb5d59d37eed",
    "7e46d9e08af4b6a37991b04fb8388644c1595a0abcd0f26d6a5d575e2a3663ea",
    "2df05162904a1bca9784913964d2a863d656676479f7c8bb11be49c980ea5f77",
    "d8dfef3d6db0eef0742f8b55a73aee7fce6c1e21d26a09b8d3d4b52c42a791cb",
    # 0.2.3, where it differs from 0.2.2: nmt_nfkc, nmt_nfkc_cf
    "1e2c7b43d3ee9755ceaa2ac335e253d8703604e0249ee1e81156c92b46423844",
    "2c03512e62f9ed965ec90d85314211b63b5b8aa0395311ea2147eec9ff738907",
}
SHIPPED_RULES = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")


# --- Messages ---


def read_varint(message: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and the position behind it. Raises ValueError if it has no end.

    Seven bits per byte, lowest first; the top bit is set in all bytes but the last.
    """
    value = 0
    for n_read in range(10):
        if position + n_read >= len(message):
            raise ValueError("it ends inside a number")
        byte = message[position + n_read]
        value |= (byte & 0x7F) << (7 * n_read)
        if byte < 0x80:
            return value, position + n_read + 1
    raise ValueError(f"the number at byte {position} has more than 10 bytes")


def read_message(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field, value) pairs of a protocol buffer message, in order.

    A value is an int, a float, or bytes: those of a text or of a message inside this one. Raises ValueError for a
    message that is cut off, and for doubles and groups, which models do not have.
    """
    position = 0
    while position < len(message):
        key, position = read_varint(message, position)
        field = key >> 3
        wire_type = key & 7

        if wire_type == 0:
            value, position = read_varint(message, position)
            yield field, value
            continue
        if wire_type == 2:
            size, position = read_varint(message, position)
        elif wire_type == 5:
            size = 4
        else:
            raise ValueError(f"field {field} has wire type {wire_type}, which no model has")

        if size > len(message) - position:
            raise ValueError(f"field {field} needs {size} bytes, but {len(message) - position} are left")
        content = message[position : position + size]
        position += size
        yield field, content if wire_type == 2 else struct.unpack("<f", content)[0]


def write_message(fields: Iterable[tuple[int, Any]]) -> bytes:
    """The inverse of read_message."""

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


def read_fields(message: bytes, schema: Schema) -> dict[int, list[Any]]:
    """The values of each field of a message. Raises ValueError for fields that the schema does not have."""
    found: dict[int, list[Any]] = {}
    for field, value in read_message(message):
        if field not in schema.kinds:
            raise ValueError(f"{schema.name} has the unknown field {field}")
        if not isinstance(value, schema.kinds[field]):
            raise ValueError(f"{schema.name} has in field {field} a value of type {type(value).__name__}")

        values = found.setdefault(field, [])
        if values and field not in schema.repeated:
            raise ValueError(f"{schema.name} has field {field} twice")
        if len(values) == MAX_PIECES:
            raise ValueError(f"{schema.name} has more than {MAX_PIECES} values in field {field}")
        values.append(value)
    return found


# --- Models ---


class Piece(NamedTuple):
    """One entry of the vocabulary, as the file spells it: a space is U+2581, a byte "<0x41>"."""

    text: str
    score: float
    type: int

    @property
    def is_text(self) -> bool:
        """Whether it stands for its own characters."""
        return self.type in (TYPE_NORMAL, TYPE_USER_DEFINED, TYPE_UNUSED)


class Model(NamedTuple):
    """What the file of a model says. The parts have their values by the number of the field."""

    pieces: list[Piece]
    trainer: dict[int, list[Any]]
    normalizer: dict[int, list[Any]]
    denormalizer: dict[int, list[Any]]
    has_self_test: bool

    @property
    def unknown_surface(self) -> bytes:
        """What an unknown piece decodes to."""
        [surface] = self.trainer.get(UNKNOWN_SURFACE, [DEFAULT_UNKNOWN_SURFACE])
        return bytes(surface)


def parse_piece(message: bytes) -> Piece:
    fields = read_fields(message, PIECE_SCHEMA)
    [text] = fields.get(PIECE, [b""])
    [score] = fields.get(SCORE, [0.0])
    [kind] = fields.get(TYPE, [TYPE_NORMAL])
    try:
        text = text.decode()
    except UnicodeDecodeError:
        raise ValueError(f"its piece {text[:40]!r} is not UTF-8") from None
    if not text:
        raise ValueError("it has an empty piece")
    if kind == TYPE_BYTE and text not in BYTE_NAMES:
        raise ValueError(f"its piece {text[:40]!a} is no byte, but has the type of one")
    if not TYPE_NORMAL <= kind <= TYPE_BYTE:
        raise ValueError(f"it has a piece of the unknown type {kind}")
    if not math.isfinite(score):
        raise ValueError(f"it has a piece with the score {score}")
    return Piece(text, score, kind)


def parse_model(model: bytes) -> Model:
    """Read the file of a model. Raises ValueError for one that is damaged, larger than any model, or none at all.

    It takes no more memory than a few times the size of the file, whatever the file says.
    """
    if len(model) > MAX_MODEL_BYTES:
        raise ValueError(f"it has {len(model)} bytes, more than the {MAX_MODEL_BYTES} of the largest model")
    parts = read_fields(model, MODEL_SCHEMA)
    if PIECES not in parts:
        raise ValueError("it has no pieces")

    specs = []
    for field, schema in (
        (TRAINER, TRAINER_SCHEMA),
        (NORMALIZER, NORMALIZER_SCHEMA),
        (DENORMALIZER, DENORMALIZER_SCHEMA),
    ):
        [message] = parts.get(field, [b""])
        if len(message) > MAX_PART_BYTES:
            raise ValueError(f"{schema.name} has {len(message)} bytes, more than {MAX_PART_BYTES}")
        specs.append(read_fields(message, schema))
    trainer, normalizer, denormalizer = specs

    [model_type] = trainer.get(MODEL_TYPE, [1])
    if model_type not in MODEL_TYPES:
        raise ValueError(f"it has the unknown model type {model_type}")
    pieces = [parse_piece(message) for message in parts[PIECES]]
    return Model(pieces, trainer, normalizer, denormalizer, SELF_TEST in parts)


def piece_bytes(model: Model) -> list[bytes]:
    """The UTF-8 of what each piece decodes to behind other text, for SentencePiece without a denormalizer."""
    decoded = []
    for piece in model.pieces:
        if piece.type == TYPE_BYTE:
            decoded.append(bytes([int(piece.text[3:5], 16)]))
        elif piece.type == TYPE_CONTROL:
            decoded.append(b"")
        elif piece.type == TYPE_UNKNOWN:
            decoded.append(model.unknown_surface)
        else:
            decoded.append(piece.text.replace(SPACE_MARK, " ").encode())
    return decoded


# --- What a model may hold ---


@functools.cache
def shipped_character_maps() -> frozenset[str]:
    """sha256 of the maps of characters that SentencePiece ships, those of the installed version among them."""
    maps = set(KNOWN_CHARACTER_MAPS)
    for rule in SHIPPED_RULES:
        proto = spm.SentencePieceNormalizer(rule_name=rule).serialized_model_proto()
        normalizer = dict(read_message(dict(read_message(proto))[NORMALIZER]))
        maps.add(hashlib.sha256(normalizer[CHARACTER_MAP]).hexdigest())
    return frozenset(maps)


def rule_faults(model: Model) -> list[str]:
    """Rules by which a model rewrites text before it is encoded, or after it is decoded, and which nobody knows."""
    faults = []
    if any(model.denormalizer.get(CHARACTER_MAP, [])) or any(model.denormalizer.get(RULES_AS_TEXT, [])):
        faults.append("it has a denormalizer, which writes text that no token stands for: train it without one")
    if any(model.normalizer.get(RULES_AS_TEXT, [])):
        faults.append("its normalizer has rules of its own: train it with a normalization_rule_name of SentencePiece")
    for character_map in model.normalizer.get(CHARACTER_MAP, []):
        if character_map and hashlib.sha256(character_map).hexdigest() not in shipped_character_maps():
            faults.append(
                "its normalizer has a map of characters that came with no version of SentencePiece: "
                "train it with a normalization_rule_name of SentencePiece"
            )
    return faults


def text_faults(model: Model) -> list[str]:
    """Places besides the pieces where the file could hold text."""
    faults = []
    if model.unknown_surface != DEFAULT_UNKNOWN_SURFACE:
        faults.append(
            f"its unknown piece decodes to {model.unknown_surface[:40]!r}: train it without an unk_surface of its own"
        )
    if model.has_self_test:
        faults.append("it holds samples for a self-test: train it with self_test_sample_size=0")

    symbols = []
    n_bytes = sum(len(text) for text in model.normalizer.get(1, []))
    for field, values in model.trainer.items():
        if field in (CONTROL_SYMBOLS, USER_DEFINED_SYMBOLS):
            symbols += values
        elif field != UNKNOWN_SURFACE:
            n_bytes += sum(len(value) for value in values if isinstance(value, bytes))
    if n_bytes > MAX_SETTINGS_TEXT:
        faults.append(f"its settings hold {n_bytes} bytes of text, more than {MAX_SETTINGS_TEXT}: shorten file names")

    pieces = {piece.text.encode() for piece in model.pieces}
    if len(set(symbols)) < len(symbols) or not pieces.issuperset(symbols):
        faults.append("its settings list symbols that are not pieces, or list them twice: train it again")
    return faults


def vocabulary_faults(model: Model) -> list[str]:
    """Pieces that no trainer makes."""
    faults = []
    counts = Counter(piece.text for piece in model.pieces)
    [(most_common, count)] = counts.most_common(1)
    if count > 1:
        faults.append(f"its piece {most_common[:40]!a} occurs {count} times: train it again")

    longest = max(counts, key=len)
    if len(longest) > MAX_PIECE_CHARACTERS:
        faults.append(
            f"its longest piece {longest[:40]!a} has {len(longest)} characters: "
            f"train it with max_sentencepiece_length={MAX_PIECE_CHARACTERS}"
        )

    n_unknown = sum(piece.type == TYPE_UNKNOWN for piece in model.pieces)
    if n_unknown != 1:
        faults.append(f"it has {n_unknown} unknown pieces, not 1: train it again")
    byte_names = {piece.text for piece in model.pieces if piece.type == TYPE_BYTE}
    if byte_names and byte_names != BYTE_NAMES:
        faults.append(f"it has {len(byte_names)} byte pieces, not one for each of the 256 bytes: train it again")
    return faults


def decoding_faults(model: bytes) -> list[str]:
    """Pieces that SentencePiece decodes to anything but their own characters, alone or beside each other."""
    sp = spm.SentencePieceProcessor(model_proto=model)
    parsed = parse_model(model)
    expected = piece_bytes(parsed)
    plain = [i for i, piece in enumerate(parsed.pieces) if piece.type != TYPE_BYTE]

    # The blank that a tokenizer puts in front of a text is dropped when it is decoded, so another piece stands before.
    first = next((i for i in plain if expected[i].strip(b" ")), None)
    if first is None:
        return []
    pairs = [[first, i] for i in plain] + [[i, j] for i, j in itertools.pairwise(plain) if expected[i].strip(b" ")]
    for (left, right), text in zip(pairs, sp.decode(pairs), strict=True):
        together = (expected[left] + expected[right]).decode()
        if text.lstrip(" ") != together.lstrip(" "):
            return [f"its pieces {left} and {right} decode to {text[:40]!a}, not to {together[:40]!a}"]
    return []


def model_faults(model: bytes) -> list[str]:
    """What would let the file of a tokenizer hold text, or do more than split text into short pieces. Empty if nothing.

    Each fault is half a sentence about the file, and says how to mend it. A tokenizer without faults has at most 65,536
    pieces of at most 16 characters, decodes each token to its own piece and nothing else, normalizes text by a rule
    that SentencePiece ships or by none, and holds no other text of any length.
    """
    try:
        parsed = parse_model(model)
    except ValueError as error:
        return [f"it is not a SentencePiece model ({error}): train it again"]
    faults = [*rule_faults(parsed), *text_faults(parsed), *vocabulary_faults(parsed)]
    if faults:
        # SentencePiece need not load what is refused anyway.
        return faults
    try:
        return decoding_faults(model)
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        return [f"SentencePiece cannot load it ({reason}): train it again"]


def vocabulary_bytes(model: bytes) -> int:
    """How many bytes of text the vocabulary could hold: the UTF-8 of all pieces but those of bytes.

    The bytes are counted as they are, because the size of compressed text depends on the version of the compressor. A
    piece whose score does not follow from its place, as it does in a BPE, counts 4 bytes more. Raises ValueError for
    a file that is not a model.
    """
    parsed = parse_model(model)
    is_bpe = MODEL_TYPES[parsed.trainer.get(MODEL_TYPE, [1])[0]] == "bpe"
    n_bytes = 0
    n_merges = 0
    for piece in parsed.pieces:
        if piece.type == TYPE_BYTE:
            continue
        n_bytes += len(piece.text.encode())

        expected_score = 0.0
        if is_bpe and piece.type == TYPE_NORMAL:
            expected_score = -float(n_merges)
            n_merges += 1
        if piece.score not in (expected_score, 0.0):
            n_bytes += 4
    return n_bytes
