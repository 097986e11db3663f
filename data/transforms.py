"""Rewrites of a text before SentencePiece that are undone after decoding: decode(encode(text)) == text for any text.

    none      changes nothing
    escape    U+2581 becomes U+E004 "s", because SentencePiece would give it back as a space
              U+E004 becomes U+E004 U+E004
    caseops   escapes the same way and writes capitals as lower-case letters with an operator,
              so that "The", "THE" and "the" share pieces:

    The  -> U+E001 the          TITLE: the next letter is a capital
    NASA -> U+E002 nasa         ALLCAPS: all letters up to the next character that is not a letter are capitals
    iPad -> i U+E003 pad        CAPNEXT: the next letter, inside a word, is a capital

Only ASCII letters count as letters here. caseops writes U+E004 before an operator that is in the source text.
The operators and their rules are those of parameter-golf's CaseOps tokenizers (openai/parameter-golf, PR 1729), which
have no escape for U+2581. The operators are private-use characters, which are rare in text, so that escapes cost next
to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SPACE_MARK = "\u2581"  # SentencePiece's spelling of a space
TITLE, ALLCAPS, CAPNEXT, ESCAPE = "\ue001", "\ue002", "\ue003", "\ue004"
OPERATORS = TITLE + ALLCAPS + CAPNEXT + ESCAPE
# Half a surrogate pair, which no text contains.
NO_TEXT = "\ud800"

# For `none`: no text at all.
NOTHING = re.compile("(?!)")
# For `escape`: an escape with the character behind it, or a stray one.
ESCAPED = re.compile(f"{ESCAPE}([{ESCAPE}s])|{ESCAPE}")
# For `caseops`: a whole run of letters that holds a capital, or a character to escape.
CAPITALS = re.compile(f"([a-z]*[A-Z][A-Za-z]*)|[{OPERATORS}{SPACE_MARK}]")
# For `caseops`: an operator with what it acts on, or a stray one.
OPERATED = re.compile(f"{ALLCAPS}([a-z]+)|[{TITLE}{CAPNEXT}]([a-z])|{ESCAPE}([{OPERATORS}s])|[{OPERATORS}]")


class Transform(NamedTuple):
    """One rewrite.

    decode     undoes `encode`; raises ValueError for an operator with nothing to act on, which `encode` never writes
    operators  the characters that `encode` adds and that stand for no source text
    operated   matches an operator together with the characters that it acts on
    """

    name: str
    encode: Callable[[str], str]
    decode: Callable[[str], str]
    operators: str
    operated: re.Pattern[str]


def escape(text: str) -> str:
    return text.replace(ESCAPE, 2 * ESCAPE).replace(SPACE_MARK, ESCAPE + "s")


def unescape(text: str) -> str:
    def literal(match: re.Match[str]) -> str:
        escaped = match[1]
        if not escaped:
            raise ValueError(f"the text has a stray U+E004 at character {match.start()}: it is no output of `escape`")
        return SPACE_MARK if escaped == "s" else escaped

    return ESCAPED.sub(literal, text)


def lower_case(text: str) -> str:
    """Write the capitals of `text` as operators and lower-case letters."""

    def rewrite(match: re.Match[str]) -> str:
        letters = match[1]
        if letters is None:
            return ESCAPE + ("s" if match[0] == SPACE_MARK else match[0])
        if len(letters) > 1 and letters.isupper():
            return ALLCAPS + letters.lower()

        first = TITLE + letters[0].lower() if letters[0].isupper() else letters[0]
        return first + re.sub("[A-Z]", lambda capital: CAPNEXT + capital[0].lower(), letters[1:])

    return CAPITALS.sub(rewrite, text)


def restore_case(text: str) -> str:
    """The inverse of lower_case."""

    def rewrite(match: re.Match[str]) -> str:
        letters = match[1] or match[2]
        escaped = match[3]
        if letters:
            return letters.upper()
        if escaped:
            return SPACE_MARK if escaped == "s" else escaped
        raise ValueError(
            f"the text has a stray U+{ord(match[0]):04X} at character {match.start()}: it is no output of `caseops`"
        )

    return OPERATED.sub(rewrite, text)


TRANSFORMS = {
    transform.name: transform
    for transform in (
        Transform("none", str, str, "", NOTHING),
        Transform("escape", escape, unescape, ESCAPE, ESCAPED),
        Transform("caseops", lower_case, restore_case, OPERATORS, OPERATED),
    )
}


def source_offsets(transform: Transform, raw: bytes) -> npt.NDArray[np.int64]:
    """How many bytes of source text stand before each byte of `raw`, the transformed text in UTF-8. -> (len(raw) + 1,)

    An operator stands for nothing; the character that it escapes or changes stands for itself.
    """
    widths = np.ones(len(raw), dtype=np.int64)
    if transform.operators:
        operator = b"|".join(char.encode() for char in transform.operators)
        # The first alternative also steps over the escaped character, which may look like an operator but is text.
        escape_pair = ESCAPE.encode() + b"(" + operator + b"|s)"
        for match in re.finditer(escape_pair + b"|" + operator, raw):
            widths[match.start() : match.start() + len(ESCAPE.encode())] = 0
            if match[1] == b"s":
                widths[match.end() - 1] = len(SPACE_MARK.encode())
    return np.concatenate([[0], np.cumsum(widths)])


def restored_characters(transform: Transform, written: str) -> str:
    """What each character of a transformed text stands for: a character of the source, or NO_TEXT for an operator.

    Without NO_TEXT it is what `transform.decode` gives. Raises ValueError where that does.
    """
    return transform.operated.sub(lambda match: NO_TEXT + transform.decode(match[0]), written)
