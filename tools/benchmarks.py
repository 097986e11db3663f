"""The benchmarks that tools/evaluate.py scores: BLiMP, ARC-Easy and WikiText-2, from local files or from the Hub.

Local files lie in one folder, DIR, and the first of each line that exists is read:

    DIR/blimp/       blimp.jsonl, blimp.jsonl.zst, blimp_62.jsonl.zst, blimp_small.jsonl
                     rows {"sentence_good", "sentence_bad", "UID"}, as the authors publish them
    DIR/arc-easy/    test.jsonl, test_half.jsonl
                     rows {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}, as AI2 publishes them
    DIR/wikitext-2/  wiki.test.raw, the raw text of the test split

A local file may hold a part of its benchmark only. What is missing is told, so that no figure passes for the whole.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from record import ROOT

sys.path.insert(0, str(ROOT / "data"))
from documents import zst_lines

# Of the whole benchmarks.
BLIMP_SETS = 67
BLIMP_PAIRS = 1000
ARC_EASY_QUESTIONS = 2376
WIKITEXT_DOCUMENTS = 62

BLIMP_FILES = ("blimp.jsonl", "blimp.jsonl.zst", "blimp_62.jsonl.zst", "blimp_small.jsonl")
ARC_EASY_FILES = ("test.jsonl", "test_half.jsonl")
WIKITEXT_FILES = ("wiki.test.raw",)


class Pair(NamedTuple):
    """A minimal pair of BLiMP (Warstadt et al., 2020)."""

    good: str
    bad: str


class Blimp(NamedTuple):
    sets: dict[str, list[Pair]]  # by the name of the paradigm
    source: str
    missing: list[str]  # what of the benchmark is not there, in words


class Question(NamedTuple):
    """A question of ARC-Easy (Clark et al., 2018)."""

    stem: str
    choices: list[str]
    gold: int  # index of the right choice


class ArcEasy(NamedTuple):
    questions: list[Question]
    source: str
    missing: list[str]


class Wikitext(NamedTuple):
    """The test split of WikiText-2 raw (Merity et al., 2016)."""

    pages: list[str]  # one for each article; joined, they are the split
    source: str
    missing: list[str]


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def first_file(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that exists. Raises FileNotFoundError, naming all of them, if none does."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder} has none of {', '.join(names)}: put one there, or leave out --data to fetch it from the Hub"
    )


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of each line that is not blank, of .jsonl or .jsonl.zst. Raises ValueError for one without JSON."""
    with path.open("rb") as file:
        lines = zst_lines(path, file) if path.suffix == ".zst" else file
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                yield place, json.loads(line)
            except ValueError:
                raise ValueError(f"{place} is not JSON: fetch the file again") from None


def read_blimp(path: Path) -> dict[str, list[Pair]]:
    sets = dict[str, list[Pair]]()
    for place, row in json_rows(path):
        try:
            pair = Pair(str(row["sentence_good"]), str(row["sentence_bad"]))
            name = str(row["UID"])
        except (KeyError, TypeError):
            raise ValueError(f"{place} has no sentence_good, sentence_bad and UID: is this BLiMP?") from None
        sets.setdefault(name, []).append(pair)
    return sets


def read_arc_easy(path: Path) -> list[Question]:
    questions = []
    for place, row in json_rows(path):
        try:
            texts = [str(choice["text"]) for choice in row["question"]["choices"]]
            labels = [str(choice["label"]) for choice in row["question"]["choices"]]
            gold = labels.index(str(row["answerKey"]))
            questions.append(Question(str(row["question"]["stem"]), texts, gold))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{place} is no question with stem, choices and the key of one: is this ARC?") from None
    return questions


def split_articles(text: str) -> list[str]:
    """Cut WikiText into its articles, each of which begins with a line ` = Title = `. Joined, they are the text.

    The test split has 60 articles, and two lines of formulas that look like titles. The data set that the harness reads
    is cut at those too, and has 62 documents. So are ours.
    """
    titles = re.finditer(r"^ = [^=\n]*[^=\n] = ?$", text, re.M)
    starts = [title.start() for title in titles]
    # Blank lines above the first title belong to its article.
    starts[:1] = [0]
    return [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# The Hub
# ----------------------------------------------------------------------------------------------------------------------


def from_hub(name: str, fetch: Callable[[Any], Any]) -> Any:
    """What `fetch` gets with the datasets package. Raises ValueError if it cannot be had, and says what to do."""
    try:
        datasets = importlib.import_module("datasets")
        # The attribute is missing where Python took the folder data/datasets for the package.
        datasets.load_dataset  # noqa: B018
    except (ImportError, AttributeError):
        raise ValueError(
            f"{name} is fetched with the datasets package: pip install datasets, or pass --data DIR with local files"
        ) from None
    try:
        return fetch(datasets)
    except Exception as error:
        # What is raised without a network depends on the versions of several packages.
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{name} cannot be fetched from the Hub ({reason:.200}): "
            "try again with a network, or pass --data DIR with local files"
        ) from None


def hub_rows(name: str, config: str, split: str) -> list[Any]:
    return list(from_hub(name, lambda datasets: datasets.load_dataset(name, config, split=split)))


def hub_blimp() -> dict[str, list[Pair]]:
    name = "nyu-mll/blimp"
    sets = dict[str, list[Pair]]()
    for config in from_hub(name, lambda datasets: datasets.get_dataset_config_names(name)):
        # The Hub calls its only split train.
        rows = hub_rows(name, config, "train")
        sets[config] = [Pair(row["sentence_good"], row["sentence_bad"]) for row in rows]
    return sets


def hub_arc_easy() -> list[Question]:
    questions = []
    for row in hub_rows("allenai/ai2_arc", "ARC-Easy", "test"):
        gold = row["choices"]["label"].index(row["answerKey"])
        questions.append(Question(row["question"], row["choices"]["text"], gold))
    return questions


# ----------------------------------------------------------------------------------------------------------------------
# The benchmarks
# ----------------------------------------------------------------------------------------------------------------------


def load_blimp(data: Path | None) -> Blimp:
    """BLiMP from DIR/blimp, or from the Hub without a DIR. Raises OSError or ValueError, naming file and remedy."""
    if data is None:
        sets = hub_blimp()
        source = "nyu-mll/blimp"
    else:
        path = first_file(data / "blimp", BLIMP_FILES)
        sets = read_blimp(path)
        source = path.name

    missing = []
    if len(sets) < BLIMP_SETS:
        missing.append(f"{len(sets)} of {BLIMP_SETS} sets")
    smallest = min((len(pairs) for pairs in sets.values()), default=0)
    if smallest < BLIMP_PAIRS:
        missing.append(f"{smallest} of {BLIMP_PAIRS} pairs in a set")
    return Blimp(sets, source, missing)


def load_arc_easy(data: Path | None) -> ArcEasy:
    """The test split of ARC-Easy from DIR/arc-easy or from the Hub; errors as load_blimp."""
    if data is None:
        questions = hub_arc_easy()
        source = "allenai/ai2_arc"
    else:
        path = first_file(data / "arc-easy", ARC_EASY_FILES)
        questions = read_arc_easy(path)
        source = path.name

    missing = []
    if len(questions) < ARC_EASY_QUESTIONS:
        missing.append(f"{len(questions)} of {ARC_EASY_QUESTIONS} questions")
    return ArcEasy(questions, source, missing)


def load_wikitext(data: Path | None) -> Wikitext:
    """The test split of WikiText-2 raw from DIR/wikitext-2 or from the Hub; errors as load_blimp."""
    if data is None:
        source = "EleutherAI/wikitext_document_level"
        pages = [row["page"] for row in hub_rows(source, "wikitext-2-raw-v1", "test")]
    else:
        path = first_file(data / "wikitext-2", WIKITEXT_FILES)
        pages = split_articles(path.read_text(encoding="utf-8"))
        source = path.name

    missing = []
    if len(pages) != WIKITEXT_DOCUMENTS:
        missing.append(f"{len(pages)} of {WIKITEXT_DOCUMENTS} articles")
    return Wikitext(pages, source, missing)


def detokenize(page: str) -> str:
    """Undo the spaces of WikiText around punctuation, in the order and with the effects of the task `wikitext`.

    The rules are those of lm-evaluation-harness 0.4.13 (tasks/wikitext), errors included: its rule for / ' [0-9]/ has
    the slashes of another language in it and never applies to English, and " N " becomes " 1 ".
    """
    page = page.replace("s '", "s'")
    page = re.sub(r"/' [0-9]/", r"/'[0-9]/", page)
    for joined in ("-", ",", "."):
        page = page.replace(f" @{joined}@ ", joined)
    for mark in (":", ";", ".", "!", "?", ","):
        page = page.replace(f" {mark} ", f"{mark} ")

    page = re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", page)
    page = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", page)
    page = re.sub(r"{\s*([^}]*?)\s*}", r"{\1}", page)
    page = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', page)
    page = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", page)

    page = page.replace("= = = =", "====")
    page = page.replace("= = =", "===")
    page = page.replace("= =", "==")
    page = page.replace(" \u00b0 ", "\u00b0")
    page = page.replace(" \n", "\n")
    page = page.replace("\n ", "\n")
    page = page.replace(" N ", " 1 ")
    return page.replace(" 's", "'s")
