"""The rewrites before the tokenizer: whatever the text, it comes back, and each byte of it is counted once."""

from __future__ import annotations

import re
import string

import numpy as np
import pytest
import transforms
from hypothesis import example, given
from hypothesis import strategies as st

NAMES = sorted(transforms.TRANSFORMS)
any_text = st.text(st.characters(exclude_categories=["Cs"]))
# What the rewrites look at: capitals, letters in and outside ASCII, operators and what is next to them, and the "s".
close_text = st.text(st.sampled_from("abABsS_ \0\u00c9\u0130\u00df\u2581\u2585\ue000\ue001\ue002\ue003\ue004\ue005"))


@pytest.mark.parametrize("name", NAMES)
@given(text=st.one_of(any_text, close_text))
@example(text="")
@example(text="\ue004s \u2581 s\ue004\ue004\0")
@example(text="A\ue002bC\ue001\ue003")
def test_every_text_comes_back(name: str, text: str) -> None:
    transform = transforms.TRANSFORMS[name]
    assert transform.decode(transform.encode(text)) == text


@pytest.mark.parametrize("name", ["escape", "caseops"])
@given(text=st.one_of(any_text, close_text))
def test_sentencepiece_never_sees_its_own_space_mark(name: str, text: str) -> None:
    assert "\u2581" not in transforms.TRANSFORMS[name].encode(text)


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(st.characters(exclude_characters=transforms.OPERATORS + "\u2581", exclude_categories=["Cs", "Lu"])))
def test_plain_text_stays_as_it_is(name: str, text: str) -> None:
    assert transforms.TRANSFORMS[name].encode(text) == text


def caseops_by_rule(text: str) -> str:
    """The published rules written a second time, run by run."""
    out = ""
    for run in re.findall("[A-Za-z]+|[^A-Za-z]+", text):
        low = run.lower()
        if not run[0].isascii() or not run[0].isalpha():
            marks = {"\u2581": "\ue004s"} | {c: "\ue004" + c for c in "\ue001\ue002\ue003\ue004"}
            out += "".join(marks.get(c, c) for c in run)
        elif run == low:
            out += run
        elif len(run) >= 2 and all(c in string.ascii_uppercase for c in run):
            out += "\ue002" + low
        elif run == run[0].upper() + low[1:]:
            out += "\ue001" + low
        else:
            out += ("\ue001" if run[0] != low[0] else "") + low[0]
            out += "".join(("\ue003" if a != b else "") + b for a, b in zip(run[1:], low[1:], strict=True))
    return out


@given(text=st.one_of(any_text, close_text, st.text(string.ascii_letters + " ")))
def test_caseops_follows_the_published_rules(text: str) -> None:
    assert transforms.lower_case(text) == caseops_by_rule(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the The I NASA", "the T|the T|i A|nasa"),
        ("iPhone McDonald HTTPServer", "iC|phone T|mcC|donald T|hC|tC|tC|pC|server"),
        ("caf\u00c9s \u00c9A O'Neil", "caf\u00c9s \u00c9T|a T|o'T|neil"),
    ],
)
def test_caseops_by_example(text: str, expected: str) -> None:
    for letter, operator in (("T|", "\ue001"), ("A|", "\ue002"), ("C|", "\ue003")):
        expected = expected.replace(letter, operator)
    assert transforms.lower_case(text) == expected


@pytest.mark.parametrize("name", NAMES)
@given(text=st.one_of(any_text, close_text))
def test_source_offsets_count_each_byte_once_and_operators_never(name: str, text: str) -> None:
    """Cut the rewritten text between any two characters: the offset is the length of what the first part decodes to."""
    transform = transforms.TRANSFORMS[name]
    written = transform.encode(text)
    offsets = transforms.source_offsets(transform, written.encode())
    assert offsets[-1] == len(text.encode())
    assert (np.diff(offsets) >= 0).all()
    ends = np.cumsum([0] + [len(char.encode()) for char in written])
    for i in range(len(written) + 1):
        try:
            part = transform.decode(written[:i])
        except ValueError:  # an operator with nothing to act on yet
            continue
        assert offsets[ends[i]] == len(part.encode())


@pytest.mark.parametrize("name", NAMES)
@given(text=st.one_of(any_text, close_text))
def test_restored_characters_stand_where_they_were_written(name: str, text: str) -> None:
    """Each is one character of the source or none, with the bytes that source_offsets gives it."""
    transform = transforms.TRANSFORMS[name]
    written = transform.encode(text)
    restored = transforms.restored_characters(transform, written)
    assert len(restored) == len(written)
    assert restored.replace(transforms.NO_TEXT, "") == text
    sizes = [0 if char == transforms.NO_TEXT else len(char.encode()) for char in restored]
    ends = np.cumsum([0] + [len(char.encode()) for char in written])
    assert np.diff(transforms.source_offsets(transform, written.encode())[ends]).tolist() == sizes


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("escape", "ab\ue004c", "U\\+E004 at character 2"),
        ("escape", "\ue004", "U\\+E004 at character 0"),
        ("caseops", "a\ue001", "U\\+E001 at character 1"),
        ("caseops", "\ue002 a", "U\\+E002 at character 0"),
        ("caseops", "\ue003A", "U\\+E003 at character 0"),
        ("caseops", "a\ue004b", "U\\+E004 at character 1"),
    ],
)
def test_a_stray_operator_is_named(name: str, text: str, place: str) -> None:
    with pytest.raises(ValueError, match=place):
        transforms.TRANSFORMS[name].decode(text)
