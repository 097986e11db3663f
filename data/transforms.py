"""Reversible rewrites of a text before SentencePiece, undone after decoding. decode(encode(text)) == text, always.

    none      nothing
    escape    U+2581, which SentencePiece would give back as a space, becomes U+E004 "s"; U+E004 becomes U+E004 U+E004
    caseops   capitals become lower-case letters with an operator, so that "The", "THE" and "the" share pieces:

    The  -> U+E001 the          TITLE: the next letter is a capital
    NASA -> U+E002 nasa         ALLCAPS: all letters up to the next character that is none
    iPad -> i U+E003 pad        CAPNEXT: the next letter, inside a word

Case operators touch runs of ASCII letters only. An operator in the source text is escaped by U+E004, and U+2581 as
above. The operators and their rules are those of parameter-golf's CaseOps tokenizers (openai/parameter-golf, PR 1729),
which have no escape for U+2581. Private-use characters are rare in text, so that an escape costs next to nothing.
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

ESCAPED = re.compile(f"{ESCAPE}([{ESCAPE}s])|{ESCAPE}")
CAPITALS = re.compile(f"([a-z]*[A-Z][A-Za-z]*)|[{OPERATORS}{SPACE_MARK}]")  # a run of letters matches as a whole
OPERATED = re.compile(f"{ALLCAPS}([a-z]+)|[{TITLE}{CAPNEXT}]([a-z])|{ESCAPE}([{OPERATORS}s])|[{OPERATORS}]")


class Transform(NamedTuple):
    name: str
    encode: Callable[[str], str]
    decode: Callable[[str], str]  # ValueError for an operator with nothing to act on, which encode never writes
    operators: str  # the characters that stand for no source text


def escape(text: str) -> str:
    return text.replace(ESCAPE, 2 * ESCAPE).replace(SPACE_MARK, ESCAPE + "s")


def unescape(text: str) -> str:
    def literal(match: re.Match[str]) -> str:
        if not match[1]:
            raise ValueError(f"the text has a stray U+E004 at character {match.start()}: it is no output of `escape`")
        return SPACE_MARK if match[1] == "s" else match[1]

    return ESCAPED.sub(literal, text)


def lower_case(text: str) -> str:
    """Write the capitals of `text` as operators and lower-case letters."""

    def rewrite(match: re.Match[str]) -> str:
        run = match[1]
        if run is None:
            return ESCAPE + ("s" if match[0] == SPACE_MARK else match[0])
        if len(run) > 1 and run.isupper():
            return ALLCAPS + run.lower()
        first = TITLE + run[0].lower() if run[0].isupper() else run[0]
        return first + re.sub("[A-Z]", lambda letter: CAPNEXT + letter[0].lower(), run[1:])

    return CAPITALS.sub(rewrite, text)


def restore_case(text: str) -> str:
    def rewrite(match: re.Match[str]) -> str:
        letters, literal = match[1] or match[2], match[3]
        if literal:
            return SPACE_MARK if literal == "s" else literal
        if not letters:
            place = f"U+{ord(match[0]):04X} at character {match.start()}"
            raise ValueError(f"the text has a stray {place}: it is no output of `caseops`")
        return letters.upper()

    return OPERATED.sub(rewrite, text)


TRANSFORMS = {
    transform.name: transform
    for transform in (
        Transform("none", str, str, ""),
        Transform("escape", escape, unescape, ESCAPE),
        Transform("caseops", lower_case, restore_case, OPERATORS),
    )
}


def source_offsets(transform: Transform, raw: bytes) -> npt.NDArray[np.int64]:
    """Bytes of source text that stand before each byte of the transformed UTF-8 text `raw`. -> (len(raw) + 1,)

    An operator stands for nothing, the character that it escapes or changes for itself.
    """
    widths = np.ones(len(raw), dtype=np.int64)
    if transform.operators:
        operator = b"|".join(char.encode() for char in transform.operators)
        escaped = ESCAPE.encode() + b"(" + operator + b"|s)"  # the escaped character is a literal: step over it
        for match in re.finditer(escaped + b"|" + operator, raw):
            widths[match.start() : match.start() + len(ESCAPE.encode())] = 0
            if match[1] == b"s":
                widths[match.end() - 1] = len(SPACE_MARK.encode())
    return np.concatenate([[0], np.cumsum(widths)])
