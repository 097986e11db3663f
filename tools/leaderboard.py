"""Rank the records, and write the tables in records/README.md and README.md.

    python tools/leaderboard.py              rewrite both tables from the folders in records/
    python tools/leaderboard.py --check      write nothing; exit with 1 and name the file if a table is out of date

A table holds the records of one track, one class of predictor (A fixed, B adaptive), one scored text and way to count
its bytes and, where the track says so, one kind of machine: only those can be compared. The lowest mean over all seeds
ranks first. Tables of two kinds rank nothing: those of texts that lie in every Python, which are demonstrations, and
those of texts that records/texts.json does not list, because anybody can make one up. A record that shares an artifact,
or a loss to the last digit, with an older one fails as its copy.

The tables come in the order of tracks.json, which has the most important track first, then in that of texts.json.
Texts that nobody listed come last.

A new record shows, at p < p_value, that it beats the best of the days before by more than the track's min_gain. The
test is Welch's, one-sided, over all seeds of both, of the hypothesis "the gain is at most min_gain". This is the
published rule read literally ("show at p < 0.01 that they achieved the required improvement"); it is stricter than
a gain of min_gain with a test against 0. A single seed has no spread, so with one on either side nothing is shown.

The bar is the best of the earlier records that stand and have the track's min_seeds, whether they counted as new or
not. The best of a table's first day counts without a test. A record stands if it is not disputed and fails no check of
tools/verify.py; the others are listed below the rest, without a rank. Records by the maintainers are reference runs:
they set the bar, but are never called new records.

The state of a record follows from its folder:

    disputed     reviews.json holds a dispute that no later entry settles
    reproduced   somebody trained its seeds again, with the code that it has now
    rescored     somebody scored the artifacts of its seeds again, with the code that it has now
    consistent   its files agree with each other, by the static checks of tools/verify.py, and nobody looked further
    failing      it fails one of these checks

A confirmation holds for the seed that it names. Where that is not all of them, the state says how many.

A folder that cannot be read is listed below the tables with the reason. The same records give the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import os
import re
import statistics
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from record import (
    FOLDER_NAME,
    RECORDS,
    ROOT,
    UNIQUE_RESULTS,
    Review,
    ScoredText,
    Submission,
    Track,
    benchmarks_path,
    confirmations,
    is_published,
    known_text,
    load_evaluation,
    load_reviews,
    load_submission,
    load_tracks,
    newest_judge_version,
    place_of_text,
    record_folders,
    seed_states,
)
from significance import welch
from verify import static_checks

MAINTAINERS = "The maintainers"  # the author of reference runs
PREDICTOR_CLASSES = {
    "A": "class A, fixed predictors",
    "B": "class B, which learn from tokens that were scored",
}
UNITS = {"val_bpb": "bpb", "train_seconds": "s"}
DEMONSTRATION = (
    "Not ranked. This text is the documentation of Python itself, which every script can read where it is judged, so "
    "the table only shows how a record looks."
)
UNLISTED_TEXT = "Not ranked. records/texts.json does not list this text, so nobody knows what was scored."
NO_RECORD = "No record yet."
MAX_SUMMARY = 100  # characters

State = Literal["disputed", "reproduced", "rescored", "consistent", "failing"]
STATES: dict[State, str] = {
    "reproduced": "somebody else trained its seeds again",
    "rescored": "somebody else scored its artifacts again",
    "consistent": "its files agree with each other, and nobody has looked further",
    "failing": "it fails a check of its files",
    "disputed": "an objection is open",
}


# ----------------------------------------------------------------------------------------------------------------------
# From folders to tables
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A record that can be ranked."""

    folder: Path
    submission: Submission
    state: State
    reason: str  # for the state, in a sentence
    failures: tuple[str, ...]  # the checks that it fails
    n_confirmed: int = 0  # seeds that the state holds for, where somebody else confirmed it
    interval: float | None = None  # half width at 95 % of the score behind the state, where a sample was scored

    @property
    def stands(self) -> bool:
        return self.state != "disputed" and not self.failures

    @property
    def is_reference(self) -> bool:
        return self.submission.author == MAINTAINERS

    def mean(self, key: str) -> float:
        """Computed from the seeds, not taken from what submission.json says the mean is."""
        return statistics.fmean(self.submission.values(key))


class Row(NamedTuple):
    """A line of a table."""

    entry: Entry
    rank: int | None  # None if the record does not stand, or its text is not ranked
    gain: float | None  # over the bar, in units of the track's rank_by; None if there was no bar
    p: float | None
    verdict: str  # on whether it is a new record: "first", "yes", "reference run", or why not


class TableKey(NamedTuple):
    """What records must share to be compared."""

    track_name: str
    predictor_class: str
    text: ScoredText
    device: str  # empty where all kinds of machines share a table


class Table(NamedTuple):
    """Records that can be compared, the best first."""

    key: TableKey
    track: Track
    rows: list[Row]


class Board(NamedTuple):
    """Everything that there is to show."""

    tracks: dict[str, Track]
    tables: list[Table]  # the most important first
    unlisted: list[tuple[Path, str]]  # folders that hold no readable record, and why


def read_board(records: Path, tracks: dict[str, Track]) -> Board:
    """Read every folder under the tracks of a folder of records."""
    groups: dict[TableKey, list[Entry]] = {}
    unlisted = []
    folder_with: dict[tuple[str, Any], Path] = {}
    for folder in record_folders(records):
        # Editors and tools leave such folders; they are not under version control.
        if folder.name.startswith((".", "_")) or folder.suffix == ".part":
            continue
        try:
            entry = read_entry(folder, tracks)
        except Exception as error:  # no record, however odd, may take the whole board down
            unlisted.append((folder, clean(str(error), 200)))
            continue
        entry = without_copies(entry, folder_with)
        s = entry.submission
        device = s.hardware if tracks[s.track].by_device else ""
        key = TableKey(s.track, s.predictor_class, s.scored_text, device)
        groups.setdefault(key, []).append(entry)

    track_names = list(tracks)

    def importance(key: TableKey) -> tuple[Any, ...]:
        text = key.text
        accounting = (text.accounting, str(text.lossless), text.sha256, text.documents, text.bytes)
        place = place_of_text(text.documents, text.sha256)
        return track_names.index(key.track_name), place, key.predictor_class, accounting, key.device

    tables = []
    for key in sorted(groups, key=importance):
        track = tracks[key.track_name]
        tables.append(Table(key, track, ranked(groups[key], track)))
    return Board(tracks, tables, unlisted)


def without_copies(entry: Entry, folder_with: dict[tuple[str, Any], Path]) -> Entry:
    """The entry, which fails if one of its runs stands in an older record: no two runs end with the same weights.

    Takes the runs of the entry into `folder_with`.
    """
    for result in entry.submission.seed_results.values():
        for key in UNIQUE_RESULTS:
            other = folder_with.setdefault((key, getattr(result, key)), entry.folder)
            if other != entry.folder:
                reason = f"copy: it has the {key} of a run in {other.parent.name}/{other.name}"
                return dataclasses.replace(
                    entry, state="failing", reason=f"fails a check: {reason}", failures=(*entry.failures, reason)
                )
    return entry


def read_entry(folder: Path, tracks: Mapping[str, Track]) -> Entry:
    """Read one record; ValueError with the reason if it cannot be ranked."""
    if not FOLDER_NAME.fullmatch(folder.name):
        raise ValueError("the folder's name is not YYYY-MM-DD_Name")
    if is_published(folder):
        raise ValueError("a submission of the published challenge: tools/submission.py import shows what it holds")
    submission = load_submission(folder)
    if folder.parent.name not in tracks:
        raise ValueError(f"tracks.json has no track {folder.parent.name}")
    if submission.track != folder.parent.name:
        raise ValueError(f"submission.json says that the track is {submission.track!r:.60}")
    if not is_day(submission.date):
        raise ValueError(f"submission.json has the date {submission.date!r:.60}, not YYYY-MM-DD")
    if not submission.seed_results:
        raise ValueError("submission.json holds no seeds")
    for seed in submission.seed_results:
        if not re.fullmatch(r"\d{1,20}", seed):
            raise ValueError(f"submission.json has the seed {seed!r:.60}, which is no number")
    for key in ("val_bpb", "pre_quant_val_bpb", "train_seconds"):
        # Sums and squares of larger numbers might overflow.
        if not all(0.0 <= value < 1e9 for value in submission.values(key)):
            raise ValueError(f"submission.json has an impossible {key}")

    failures = failed_checks(folder)
    state, reason, n_confirmed, interval = state_of(submission, load_reviews(folder), failures)
    return Entry(folder, submission, state, reason, failures, n_confirmed, interval)


def is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text  # fromisoformat also reads 20261124
    except ValueError:
        return False


def failed_checks(folder: Path) -> tuple[str, ...]:
    try:
        checks = static_checks(folder)
    except Exception as error:  # no record, however odd, may take the whole board down
        return (f"tools/verify.py cannot judge it: {error!r}",)
    return tuple(f"{check.name}: {check.reason}" for check in checks if not check.ok)


def state_of(
    submission: Submission, reviews: Sequence[Review], failures: Sequence[str]
) -> tuple[State, str, int, float | None]:
    """The state of a record, the reason for it, how many seeds it holds for, and the interval of the score behind it.

    Reviews come oldest first. Confirmations do not count for other code than that of the record, nor for a record that
    fails a check.
    """
    states = list(seed_states(submission, reviews).values())
    confirmed = confirmations(submission, reviews)
    if "disputed" in states:
        dispute = [review for review in reviews if review.kind == "disputed"][-1]
        return "disputed", describe(dispute, "disputed"), states.count("disputed"), None
    if failures:
        return "failing", f"fails a check: {'; '.join(failures)}", 0, None

    # A review and the state that it brings have one name. What is worth more comes first.
    deeds: dict[Literal["reproduced", "rescored"], str] = {"reproduced": "trained again", "rescored": "scored again"}
    for state, deed in deeds.items():
        if state in states:
            found = [review for review in confirmed if review.kind == state]
            reasons = "; ".join(describe(review, deed) for review in found)
            return state, reasons, states.count(state), found[-1].val_bpb_interval
    return "consistent", "passes the static checks of tools/verify.py; nobody has scored or trained it again", 0, None


def describe(review: Review, deed: str) -> str:
    """seed 1 scored again by Grace, 2026-02-01 with judge 3 on 2x x86_64: val_bpb 1.2000 (a note)"""
    text = f"{deed} by {review.reviewer}, {review.date}"
    if review.seed:
        text = f"seed {review.seed} {text}"
    if review.judge_version is not None:
        text += f" with judge {review.judge_version}"
    if review.hardware:
        text += f" on {review.hardware}"
    if review.val_bpb is not None:
        text += f": val_bpb {review.val_bpb:.4f}"
        if review.val_bpb_interval is not None:
            text += f" +- {review.val_bpb_interval:.4f}"
    if review.note:
        text += f" ({review.note})"
    return text


def ranked(entries: Iterable[Entry], track: Track) -> list[Row]:
    """The rows of a table: the best first, those that do not stand last."""
    key = track.rank_by
    ordered = sorted(entries, key=lambda e: (not e.stands, e.mean(key), e.submission.date, e.folder.name))
    bars = [entry for entry in ordered if entry.stands and len(entry.submission.seed_results) >= track.min_seeds]
    first_day = min((entry.submission.date for entry in bars), default="")
    first = next((entry for entry in bars if entry.submission.date == first_day), None)

    rows = []
    for place, entry in enumerate(ordered, 1):
        # `bars` has the best first, so that the first one of an earlier day is the one to beat.
        bar = next((other for other in bars if other.submission.date < entry.submission.date), None)
        gain = None
        p = None
        if bar is not None:
            gain = bar.mean(key) - entry.mean(key)
            p = welch(bar.submission.values(key), entry.submission.values(key), track.min_gain)
        text = entry.submission.scored_text
        if not ranks(text):
            verdict = "not ranked: a demonstration" if is_demonstration(text) else "not ranked: an unlisted text"
            rows.append(Row(entry, None, None, None, verdict))
            continue
        verdict = verdict_on(entry, track, gain, p, is_first=entry is first)
        rows.append(Row(entry, place if entry.stands else None, gain, p, verdict))
    return rows


def ranks(text: ScoredText) -> bool:
    """Whether results on this text are ranked: it is known, and not everybody has it."""
    return known_text(text.documents, text.sha256) is not None and not is_demonstration(text)


def is_demonstration(text: ScoredText) -> bool:
    """Whether every script can read this text where it is judged."""
    known = known_text(text.documents, text.sha256)
    return known is not None and known.demonstration


def verdict_on(entry: Entry, track: Track, gain: float | None, p: float | None, is_first: bool) -> str:
    """Whether a record is a new one and, if not, why."""
    if not entry.stands:
        return "no: disputed" if entry.state == "disputed" else "no: fails a check"
    if entry.is_reference:
        return "reference run"
    if is_first:
        return "first"
    if len(entry.submission.seed_results) < track.min_seeds:
        return f"no: too few seeds, {track.min_seeds} are needed"
    if gain is None:
        return "no: a better one came on the same day"
    if gain <= 0:
        return "no: an earlier one is as good or better"
    if gain <= track.min_gain:
        return f"no: better by {track.min_gain:g} {UNITS[track.rank_by]} or less"
    if p is None:
        return "no: with one seed the gain may be chance"
    if p >= track.p_value:
        return f"no: the gain may be chance (p is not under {track.p_value:g})"
    return "yes"


# ----------------------------------------------------------------------------------------------------------------------
# What a table says, in Markdown and on the page alike
# ----------------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One cell of a table. Its texts come from the record's author, and may be hostile until they are escaped."""

    text: str
    sort: float | str | None = None  # None is last in any order
    folder: Path | None = None  # the record to link to
    title: str = ""  # more about the text
    base: Path | None = None  # the record that the linked one builds on


def row_cells(row: Row, track: Track) -> dict[str, Cell]:
    """The cells of a row, by the title of their column."""
    entry = row.entry
    s = entry.submission
    score = measured_cell(entry, "val_bpb", track)
    seconds = measured_cell(entry, "train_seconds", track)
    seeds = Cell(str(len(s.seed_results)), len(s.seed_results), title=", ".join(s.seed_results))

    cells = {
        "#": Cell("–" if row.rank is None else str(row.rank), row.rank),
        "record": name_cell(entry),
        "summary": Cell(summary(s.blurb)),
    }
    if track.rank_by == "val_bpb":
        cells |= {"val_bpb": score, "seeds": seeds}
    else:
        cells |= {"train s": seconds, "seeds": seeds, "val_bpb": score}
    for name in track.benchmarks:
        value = s.benchmarks.get(name)
        cells[name.replace("_", " ")] = Cell("" if value is None else f"{value:.4f}", value)
    if track.benchmarks:
        cells["samples"] = samples_cell(entry)

    before = entry.mean("pre_quant_val_bpb")
    cells["pre-quant"] = Cell(number(before, "val_bpb"), before)
    size = max(result.bytes_total for result in s.seed_results.values())
    cells["bytes"] = Cell(f"{size:,}", size)
    if track.rank_by == "val_bpb":
        cells["train s"] = seconds

    state = entry.state if entry.interval is None else f"{entry.state} ± {entry.interval:.4f}"
    if 0 < entry.n_confirmed < len(s.seed_results):
        state += f" ({entry.n_confirmed} of {len(s.seed_results)} seeds)"
    if s.judge_version < newest_judge_version():
        state += ", older rules"
    return cells | {
        "hardware": Cell(hardware(s.hardware), s.hardware),
        "author": Cell(clean(s.author, 60), s.author.casefold(), title=s.github_id),
        "date": Cell(s.date, s.date),
        "state": Cell(state, entry.state, title=entry.reason),
        **gain_cells(row, track),
        "new record": Cell(row.verdict, row.verdict),
    }


def gain_cells(row: Row, track: Track) -> dict[str, Cell]:
    """The gain, and how likely it is by chance, where they mean something.

    That is a gain above 0, and a test of one that is above what the track asks for.
    """
    gain = Cell("")
    p = Cell("")
    if row.gain is not None and row.gain > 0 and row.entry.stands:
        gain = Cell(number(row.gain, track.rank_by, signed=True), row.gain)
        if row.gain > track.min_gain:
            p = Cell(p_text(row.p), row.p)
    return {"gain": gain, "p": p}


def table_cells(table: Table) -> list[dict[str, Cell]]:
    """The cells of all rows, without the columns of gains where no row has one."""
    rows = [row_cells(row, table.track) for row in table.rows]
    for column in ("gain", "p"):
        if not any(row[column].text for row in rows):
            for row in rows:
                del row[column]
    return rows


def summary(blurb: str) -> str:
    """The first sentence of what the author says of a record. A long one is cut after a clause, or after a word."""
    sentence = re.split(r"(?<=[.!?]) ", clean(blurb))[0]
    if len(sentence) <= MAX_SUMMARY:
        return sentence
    start = sentence[: MAX_SUMMARY - 3]
    ends = [found.start() for found in re.finditer(r"[,;:] ", start)]
    end = ends[-1] if ends and ends[-1] > MAX_SUMMARY // 2 else start.rfind(" ")
    return (start[:end] if end > 0 else start) + "..."


def name_cell(entry: Entry) -> Cell:
    s = entry.submission
    text = clean(s.name, 80) or entry.folder.name
    if entry.is_reference:
        text += " (reference run)"
    base = None
    if re.fullmatch(r"track_\w+/[\w.+-]+", s.base):
        base = entry.folder.parents[1] / s.base
    return Cell(text, s.name.casefold(), entry.folder, s.blurb, base)


def samples_cell(entry: Entry) -> Cell:
    """How the first text begins that the model wrote."""
    try:
        samples = load_evaluation(benchmarks_path(entry.folder)).samples
    except (ValueError, OSError):
        return Cell("")
    return Cell(clean(samples[0], 80) if samples else "", title=clean(" / ".join(samples)))


def measured_cell(entry: Entry, key: str, track: Track) -> Cell:
    """A mean over the seeds; what the track ranks by also has its standard deviation."""
    values = entry.submission.values(key)
    text = number(entry.mean(key), key)
    if key == track.rank_by and len(values) > 1:
        text += f" ± {number(statistics.stdev(values), key)}"
    return Cell(text, entry.mean(key))


def number(value: float, key: str, signed: bool = False) -> str:
    digits = 4 if key == "val_bpb" else 1
    return f"{value:{'+' if signed else ''},.{digits}f}"


def p_text(p: float | None) -> str:
    if p is None:
        return "n/a"
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def hardware(name: str) -> str:
    """8x H100 80GB HBM3"""
    return re.sub(r"cuda:|cpu:|NVIDIA[_ ]", "", name).replace("_", " ")


def clean(text: str, limit: int = 400) -> str:
    """One line of text, without characters that are invisible, turn its direction or cannot be encoded."""
    visible = []
    for character in text:
        if character.isspace():
            visible.append(" ")
        elif unicodedata.category(character)[0] != "C":
            visible.append(character)
    line = " ".join("".join(visible).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def rule(track: Track) -> str:
    """What counts as a new record in a track."""
    margin = f" by more than {track.min_gain:g} {UNITS[track.rank_by]}" if track.min_gain else ""
    seeds = f"at least {track.min_seeds} seeds" if track.min_seeds > 1 else "at least two seeds on both sides"
    return (
        f"Ranked by the mean {track.rank_by}, lowest first. A new record beats the best of the days before{margin} at "
        f"p < {track.p_value:g} (one-sided Welch t-test over all seeds), with {seeds}. The first of a table counts "
        "without a test. What is disputed or fails a check has no rank and sets no bar. Reference runs are the "
        "maintainers' own: they set the bar, but are never called new records."
    )


def text_name(text: ScoredText) -> str:
    """The text of a table in words."""
    known = known_text(text.documents, text.sha256)
    if known is None:
        return f"an unlisted text of {text.documents:,} documents (sha256 {clean(text.sha256)[:8]})"
    if known.bytes != text.bytes:
        return f"{known.name}, in an export of {text.bytes:,} bytes"
    return known.name


def bytes_of_text(text: ScoredText) -> str:
    counted = {True: "lossless tokenizers", False: "lossy tokenizers", None: "counted from the tokenizer's pieces"}
    return f"{text.bytes:,} bytes, {counted[text.lossless]}"


def caption(table: Table) -> str:
    text = table.key.text
    parts = [f"On {text_name(text)} ({bytes_of_text(text)})", PREDICTOR_CLASSES[table.key.predictor_class]]
    if table.key.device:
        parts.append(hardware(table.key.device))
    return clean("; ".join(parts))


def table_note(table: Table) -> str:
    """Why a table ranks nothing; empty if it does."""
    if is_demonstration(table.key.text):
        return DEMONSTRATION
    return "" if ranks(table.key.text) else UNLISTED_TEXT


def tables_of_tracks(board: Board) -> dict[str, list[Table]]:
    """The tables by the name of their track: of every track that has one, and of the most important one."""
    tables: dict[str, list[Table]] = {next(iter(board.tracks)): []} if board.tables else {}
    for table in board.tables:
        tables.setdefault(table.key.track_name, []).append(table)
    return tables


def tracks_without_records(board: Board) -> list[str]:
    """The titles of the other tracks, which have no table."""
    shown = tables_of_tracks(board)
    return [track.title for name, track in board.tracks.items() if name not in shown]


# ----------------------------------------------------------------------------------------------------------------------
# Markdown
# ----------------------------------------------------------------------------------------------------------------------


def full_markdown(board: Board, base: Path) -> str:
    """All tables, for a file in the folder `base`."""
    lines: list[str] = []
    for track_name, tables in tables_of_tracks(board).items():
        track = board.tracks[track_name]
        lines += [f"## {escape_markdown(track.title)}", "", escape_markdown(track.rules), ""]
        lines += [rule(track) if tables else NO_RECORD, ""]
        for table in tables:
            lines += [f"### {escape_markdown(caption(table))}", ""]
            if note := table_note(table):
                lines += [note, ""]
            lines += markdown_table(table_cells(table), base)
            lines.append("")

            notes = [why_no_rank(row.entry) for row in table.rows if not row.entry.stands]
            if notes:
                lines += [*notes, ""]

    if board.tables:
        meanings = "; ".join(f"{state}, {meaning}" for state, meaning in STATES.items())
        lines += [
            f"States: {meanings}. Older rules: scored by a judge before the present one, JUDGE_VERSION "
            f"{newest_judge_version()}.",
            "",
        ]
    empty = tracks_without_records(board)
    if empty:
        lines += [f"No record yet: {'; '.join(map(escape_markdown, empty))}.", ""]
    if board.unlisted:
        lines += ["## Not listed", "", "Folders that hold no record which can be ranked, and why.", ""]
        for folder, reason in board.unlisted:
            name = escape_markdown(f"{folder.parent.name}/{folder.name}")
            lines.append(f"- [{name}]({link(folder, base)}): {escape_markdown(reason)}")
    return "\n".join(lines).strip()


def why_no_rank(entry: Entry) -> str:
    reasons = [f"fails {failure}" for failure in entry.failures]
    if entry.state == "disputed":
        reasons = [entry.reason]
    return f"- {escape_markdown(entry.submission.name)}: {escape_markdown('; '.join(reasons))}"


SHORT_COLUMNS = ("record", "summary", "author", "date", "state")


def short_markdown(board: Board, base: Path) -> str:
    """The best of every table that ranks something, for a file in the folder `base`."""
    rows = []
    for table in board.tables:
        best = table.rows[0]
        if best.rank is None:
            continue
        cells = row_cells(best, table.track)
        title = table.track.title
        if table.key.predictor_class != "A":  # fixed predictors are the rule, and need no words
            title += f", class {table.key.predictor_class}"
        score = "val_bpb" if table.track.rank_by == "val_bpb" else "train s"
        rows.append(
            {
                "track": Cell(title),
                "score": Cell(f"{cells[score].text} {UNITS[table.track.rank_by]}"),
                **{column: cells[column] for column in SHORT_COLUMNS},
                "text": Cell(text_name(table.key.text)),
            }
        )
    if not rows:
        return NO_RECORD

    lines = []
    headline = next(iter(board.tracks.values()))
    if board.tables[0].track is not headline:
        lines = [f"{escape_markdown(headline.title)}: no record yet. The best of the other tracks:", ""]
    return "\n".join([*lines, *markdown_table(rows, base)])


def markdown_table(rows: Sequence[Mapping[str, Cell]], base: Path) -> list[str]:
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    for row in rows:
        lines.append(f"| {' | '.join(markdown_cell(cell, base) for cell in row.values())} |")
    return lines


def markdown_cell(cell: Cell, base: Path) -> str:
    text = escape_markdown(cell.text)
    return f"[{text}]({link(cell.folder, base)})" if cell.folder else text


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: without markup, HTML, links, mentions, ends of cells or our markers."""
    text = re.sub(r"([\\`*_{}\[\]#|!~@$=^]|:(?=\S))", r"\\\1", clean(text))
    text = re.sub(r"(?i)\b(www)\.", r"\1\\.", text)  # "www." makes a link by itself, as a colon may
    return html.escape(text, quote=False)


def link(folder: Path, base: Path) -> str:
    """The address of a folder, as seen from another."""
    relative = Path(os.path.relpath(folder, base)).as_posix()
    return quote(os.fsencode(relative), safe="/+")


# ----------------------------------------------------------------------------------------------------------------------
# Files and the command line
# ----------------------------------------------------------------------------------------------------------------------

BEGIN = "<!-- leaderboard:begin -->"
END = "<!-- leaderboard:end -->"
NEW_RECORDS_README = f"""# Records

Everything between the two markers is written by `python tools/leaderboard.py`.

{BEGIN}
{END}
"""


def up_to_date_files(records: Path, readme: Path) -> dict[Path, str]:
    """What the two files should hold, by their paths."""
    _, tracks = load_tracks()
    board = read_board(records, tracks)

    records_readme = records / "README.md"
    old = records_readme.read_text(encoding="utf-8") if records_readme.exists() else NEW_RECORDS_README
    if not readme.is_file():
        raise ValueError(f"{readme} is missing: --readme names the file that holds the short table")
    return {
        records_readme: replace_table(records_readme, old, full_markdown(board, records)),
        readme: replace_table(readme, readme.read_text(encoding="utf-8"), short_markdown(board, readme.parent)),
    }


def replace_table(path: Path, text: str, table: str) -> str:
    """The text of a file with the table between its markers replaced."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in head or END in tail:
        raise ValueError(f"{path} must hold the line {BEGIN} and below it the line {END}, once each: write them in")
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is out of date")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="has the short table")
    args = parser.parse_args(argv)
    try:
        files = up_to_date_files(args.records, args.readme)
        stale = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
        if args.check:
            for path in stale:
                print(f"{path} is not what the records say: run python tools/leaderboard.py", file=sys.stderr)
            return 1 if stale else 0

        for path in stale:
            path.write_text(files[path], encoding="utf-8", newline="\n")
        for path in files:
            print(f"{path}: {'written' if path in stale else 'up to date'}")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
