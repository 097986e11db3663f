"""Rank the records: tables in records/README.md and README.md, or one static page with the curves of all runs.

    python tools/leaderboard.py                  rewrite both tables from the folders of records/
    python tools/leaderboard.py --check          change nothing; exit 1 and name the file if one is out of date
    python tools/leaderboard.py --html FILE      write the page instead: one file, nothing is loaded from anywhere

A table holds the records of one track, one class of predictor (A fixed, B adaptive), one scored text and, where the
track says so, one kind of machine: only those are comparable. In it the lowest mean over all seeds ranks first.

A new record is one that shows, at p < p_value, that it beats the best of the days before by more than the track's
min_gain: a one-sided Welch t-test over all seeds of both, of the hypothesis "the gain is at most min_gain". That is the
published rule read literally ("show at p < 0.01 that they achieved the required improvement"), and stricter than a
gain of min_gain with a test against 0. One seed has no spread, so with one on either side nothing is shown. The best of
the first day of a table counts without a test. The bar is the best of the earlier records that stand and have the
track's min_seeds, whether they counted as new or not. A record stands if it is not disputed and fails no check of
tools/verify.py; others are listed below the rest, without a rank.

The state of a record follows from its folder:

    disputed     a dispute in reviews.json that no later entry settles
    reproduced   somebody trained it again, with the code that it has now
    re-scored    somebody scored its artifact again, with the code that it has now
    verified     every static check of tools/verify.py passes
    claimed      none of these

What cannot be read is listed below the tables with the reason. The same records give the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import itertools
import json
import math
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
    Review,
    Submission,
    Track,
    known_text,
    load_reviews,
    load_submission,
    load_tracks,
    log_path,
    parse_log,
    record_folders,
)
from significance import welch
from verify import static_checks

BEGIN, END = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"
TEMPLATE = Path(__file__).with_suffix(".html")
CLASSES = {"A": "Class A, a fixed predictor", "B": "Class B, adapts to tokens that were scored"}
UNITS = {"val_bpb": "bpb", "train_seconds": "s"}
HEAD = f"""# Records

One folder for each record, `<track>/<YYYY-MM-DD>_<Name>/`, with the script, the logs and `submission.json`: see
`tools/submission.py`. The limits of the tracks are in [tracks.json](tracks.json), known validation texts in
[texts.json](texts.json). [studies](studies) compare techniques and are ranked nowhere. Everything between the two
markers is written by `python tools/leaderboard.py`.

{BEGIN}
{END}
"""
MAX_LOG_BYTES = 1 << 24  # a log is text for people; what is larger is not drawn
MAX_POINTS = 400  # of a curve on the page

State = Literal["disputed", "reproduced", "re-scored", "verified", "claimed"]
STATES: dict[State, str] = {
    "reproduced": "somebody trained it again",
    "re-scored": "somebody scored its artifact again",
    "verified": "its files pass every static check",
    "claimed": "its files fail one",
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
    why: str  # of the state, a sentence
    failures: tuple[str, ...]  # checks that it fails
    interval: float | None = None  # half width at 95 % of the score behind the state, where a sample was scored

    @property
    def stands(self) -> bool:
        return self.state != "disputed" and not self.failures

    def score(self, key: str) -> float:
        """The mean over all seeds, of the seeds themselves."""
        return statistics.fmean(self.submission.values(key))


class Row(NamedTuple):
    entry: Entry
    rank: int | None  # None: it does not stand
    gain: float | None  # over the bar, in units of the track's rank_by; None: no bar before it
    p: float | None
    verdict: str  # first, yes, or why it is no new record


class Table(NamedTuple):
    """Records that are comparable, the best first."""

    track: Track
    track_name: str
    predictor_class: str
    text: tuple[str, str, int, int]
    device: str  # empty where all kinds share the table
    rows: list[Row]


class Board(NamedTuple):
    tracks: dict[str, Track]
    tables: list[Table]  # in the order of tracks.json; the table with the most records of a track first
    unlisted: list[tuple[Path, str]]  # folders that hold no readable record, and why


def failed_checks(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(f"{check.name}: {check.reason}" for check in static_checks(folder) if not check.ok)
    except Exception as error:  # whatever a record holds that no check expects: it must not take the board down
        return (f"tools/verify.py cannot judge it: {error!r}",)


def state_of(
    submission: Submission, reviews: Sequence[Review], failures: Sequence[str]
) -> tuple[State, str, float | None]:
    """The state of a record, its reason, and the interval of a score that is that of a sample.

    Reviews come oldest first. Those of other code do not count, nor do any for a record that fails a check.
    """

    def said(review: Review, what: str) -> str:
        score = f": val_bpb {review.val_bpb:.4f}" if review.val_bpb is not None else ""
        half = f" +- {review.val_bpb_interval:.4f}" if score and review.val_bpb_interval is not None else ""
        machine = f" on {review.hardware}" if review.hardware else ""
        note = f" ({review.note})" if review.note else ""
        return f"{what} by {review.reviewer}, {review.date}{machine}{score}{half}{note}"

    verdicts = [review for review in reviews if review.kind in ("disputed", "settled")]
    if verdicts and verdicts[-1].kind == "disputed":
        return "disputed", said(verdicts[-1], "disputed"), None
    if failures:
        return "claimed", "fails a check: " + "; ".join(failures), None
    kinds: tuple[tuple[str, State, str], ...] = (
        ("reproduced", "reproduced", "trained again"),
        ("rescored", "re-scored", "scored again"),
    )
    for kind, state, what in kinds:
        found = [r for r in reviews if r.kind == kind and r.code_sha256 == submission.code_sha256]
        if found:
            return state, said(found[-1], what), found[-1].val_bpb_interval
    return "verified", "passes every check of tools/verify.py that needs no training", None


def read_entry(folder: Path, tracks: Mapping[str, Track]) -> Entry:
    """ValueError with the reason if the folder holds no record that can be ranked."""
    if not FOLDER_NAME.fullmatch(folder.name):
        raise ValueError("the folder's name is not YYYY-MM-DD_Name")
    submission = load_submission(folder)
    if folder.parent.name not in tracks:
        raise ValueError(f"tracks.json has no track {folder.parent.name}")
    if submission.track != folder.parent.name:
        raise ValueError(f"submission.json says that the track is {submission.track!r:.60}")
    try:
        day = date.fromisoformat(submission.date).isoformat()
    except ValueError:
        day = ""
    if day != submission.date:
        raise ValueError(f"submission.json has the date {submission.date!r:.60}, not YYYY-MM-DD")
    if not submission.seed_results or not all(re.fullmatch(r"\d{1,20}", seed) for seed in submission.seed_results):
        raise ValueError("submission.json holds no seeds, or one that is no number")
    for key in ("val_bpb", "pre_quant_val_bpb", "train_seconds"):
        if not all(0.0 <= value < 1e9 for value in submission.values(key)):  # else sums and squares may overflow
            raise ValueError(f"submission.json has an impossible {key}")
    reviews = load_reviews(folder)
    failures = failed_checks(folder)
    state, why, interval = state_of(submission, reviews, failures)
    return Entry(folder, submission, state, why, failures, interval)


def judged(entries: Iterable[Entry], track: Track) -> list[Row]:
    """The rows of a table: the best first, those that do not stand last."""
    key = track.rank_by
    ordered = sorted(entries, key=lambda e: (not e.stands, e.score(key), e.submission.date, e.folder.name))
    bars = [e for e in ordered if e.stands and len(e.submission.seed_results) >= track.min_seeds]
    first_day = min((e.submission.date for e in bars), default="")
    first = next((e for e in bars if e.submission.date == first_day), None)
    rows = []
    for number, entry in enumerate(ordered, 1):
        bar = next((e for e in bars if e.submission.date < entry.submission.date), None)  # bars are in order of score
        gain = p = None
        if bar is not None:
            gain = bar.score(key) - entry.score(key)
            p = welch(bar.submission.values(key), entry.submission.values(key), track.min_gain)
        verdict = "first" if entry is first else verdict_of(entry, track, gain, p)
        rows.append(Row(entry, number if entry.stands else None, gain, p, verdict))
    return rows


def verdict_of(entry: Entry, track: Track, gain: float | None, p: float | None) -> str:
    """`yes`, or why the record is not a new one."""
    if not entry.stands:
        return "no: disputed" if entry.state == "disputed" else "no: fails a check"
    if len(entry.submission.seed_results) < track.min_seeds:
        return f"no: needs {track.min_seeds} seeds"
    if gain is None:
        return "no: not the best of the first day"
    if gain <= track.min_gain:
        return f"no: gain not over {track.min_gain:g}"
    if p is None:
        return "no: one seed shows no spread"
    return "yes" if p < track.p_value else f"no: p not under {track.p_value:g}"


def read_board(records: Path, tracks: dict[str, Track]) -> Board:
    """Everything that lies under the tracks of a folder of records."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    unlisted = []
    for folder in record_folders(records):
        if folder.name.startswith((".", "_")) or folder.suffix == ".part":  # of tools, and not under version control
            continue
        try:
            entry = read_entry(folder, tracks)
        except (ValueError, OSError, ArithmeticError) as error:  # the last: a number too large for a float
            unlisted.append((folder, clean(f"{error}", 200)))
            continue
        s = entry.submission
        device = s.hardware if tracks[s.track].by_device else ""
        groups.setdefault((s.track, s.predictor_class, s.scored_text, device), []).append(entry)
    places = {name: i for i, name in enumerate(tracks)}
    order = sorted(groups, key=lambda key: (places[key[0]], key[1], -len(groups[key]), key[2:]))
    tables = [
        Table(tracks[name], name, kind, text, device, judged(groups[name, kind, text, device], tracks[name]))
        for name, kind, text, device in order
    ]
    return Board(tracks, tables, unlisted)


# ----------------------------------------------------------------------------------------------------------------------
# What tables say, for Markdown and HTML alike
# ----------------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """Of a table. Text is still as hostile as the record's author."""

    text: str
    sort: float | str | None = None  # None: last in any order
    folder: Path | None = None  # to link to
    title: str = ""
    base: Path | None = None  # the record that this one builds on


def clean(text: str, limit: int = 400) -> str:
    """One line without characters that are invisible, turn the direction of text or cannot be encoded."""
    kept = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    kept = " ".join(kept.split())
    return kept if len(kept) <= limit else kept[: limit - 3] + "..."


def number(value: float, key: str, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''},.{4 if key == 'val_bpb' else 1}f}"


def p_text(row: Row) -> str:
    if row.gain is None:
        return ""
    if row.p is None:
        return "n/a"
    return "<0.0001" if row.p < 1e-4 else f"{row.p:.2g}"


def hardware(name: str) -> str:
    """8x H100 80GB HBM3"""
    return re.sub(r"cuda:|cpu:|NVIDIA[_ ]", "", name).replace("_", " ")


def cells(row: Row, track: Track) -> dict[str, Cell]:
    """A row by the titles of its columns."""
    entry, s = row.entry, row.entry.submission
    means = {key: entry.score(key) for key in ("val_bpb", "train_seconds")}
    texts = {key: number(value, key) for key, value in means.items()}
    if len(s.seed_results) > 1:
        texts[track.rank_by] += f" ± {number(statistics.stdev(s.values(track.rank_by)), track.rank_by)}"
    score = {"val_bpb": Cell(texts["val_bpb"], means["val_bpb"])}
    seconds = {"train s": Cell(texts["train_seconds"], means["train_seconds"])}
    seeds = {"seeds": Cell(str(len(s.seed_results)), len(s.seed_results), title=", ".join(s.seed_results))}
    before = entry.score("pre_quant_val_bpb")
    size = max(result.bytes_total for result in s.seed_results.values())
    by_score = track.rank_by == "val_bpb"
    base = entry.folder.parents[1] / s.base if re.fullmatch(r"track_\w+/[\w.+-]+", s.base) else None
    sampled = f" ± {entry.interval:.4f}" if entry.interval is not None else ""
    benchmarks = {name: s.benchmarks.get(name) for name in track.benchmarks}
    return {
        "#": Cell("–" if row.rank is None else str(row.rank), row.rank),
        "record": Cell(clean(s.name, 80) or entry.folder.name, s.name.casefold(), entry.folder, s.blurb, base),
        **(score | seeds if by_score else seconds | seeds | score),
        **{name.replace("_", " "): Cell("" if v is None else f"{v:.4f}", v) for name, v in benchmarks.items()},
        "pre-quant": Cell(number(before, "val_bpb"), before),
        "bytes": Cell(f"{size:,}", size),
        **(seconds if by_score else {}),
        "hardware": Cell(hardware(s.hardware), s.hardware),
        "author": Cell(clean(s.author, 60), s.author.casefold(), title=s.github_id),
        "date": Cell(s.date, s.date),
        "state": Cell(entry.state + sampled, entry.state, title=entry.why),
        "gain": Cell("" if row.gain is None else number(row.gain, track.rank_by, signed=True), row.gain),
        "p": Cell(p_text(row), row.p),
        "new record": Cell(row.verdict, row.verdict),
    }


def rule(track: Track) -> str:
    """What counts as a new record, in one line."""
    least = f"at least {track.min_seeds} seeds" if track.min_seeds > 1 else "at least two seeds on both sides"
    margin = f" by more than {track.min_gain:g} {UNITS[track.rank_by]}" if track.min_gain else ""
    return (
        f"Ranked by the mean {track.rank_by}, lowest first. A new record beats the best of the days before{margin} at "
        f"p < {track.p_value:g} (one-sided Welch t-test over all seeds), with {least}; the first of a table counts. "
        "One that is disputed, or fails a check, has no rank and sets no bar."
    )


def text_name(table: Table) -> str:
    accounting, sha256, documents, n_bytes = table.text
    known = known_text(documents, sha256)
    name = known.name if known and known.bytes == n_bytes else f"text {clean(sha256)[:12]}, {documents:,} documents"
    return f"{name}, {n_bytes:,} bytes ({accounting})"


def caption(table: Table) -> str:
    device = f"; {hardware(table.device)}" if table.device else ""
    return clean(f"{CLASSES[table.predictor_class]}; {text_name(table)}{device}")


def without_tables(board: Board) -> list[str]:
    """Titles of the tracks that have no record yet."""
    used = {table.track_name for table in board.tables}
    return [track.title for name, track in board.tracks.items() if name not in used]


# ----------------------------------------------------------------------------------------------------------------------
# Markdown
# ----------------------------------------------------------------------------------------------------------------------


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no link, no mention, no cell's end, no marker."""
    text = re.sub(r"([\\`*_{}\[\]#|!~@$=^]|:(?=\S))", r"\\\1", clean(text))
    text = re.sub(r"(?i)\b(www)\.", r"\1\\.", text)  # it, like a colon, would make a link
    return html.escape(text, quote=False)


def link(folder: Path, base: Path) -> str:
    """The address of a folder, as seen from another."""
    return quote(os.fsencode(Path(os.path.relpath(folder, base)).as_posix()), safe="/+")


def markdown_cell(cell: Cell, base: Path) -> str:
    text = escape_markdown(cell.text)
    return f"[{text}]({link(cell.folder, base)})" if cell.folder else text


def markdown_table(rows: Sequence[Mapping[str, Cell]], base: Path) -> list[str]:
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return lines + [f"| {' | '.join(markdown_cell(cell, base) for cell in row.values())} |" for row in rows]


def full_markdown(board: Board, base: Path) -> str:
    """All tables."""
    lines: list[str] = []
    for name, tables in itertools.groupby(board.tables, key=lambda table: table.track_name):
        track = board.tracks[name]
        lines += [f"## {escape_markdown(track.title)}", "", escape_markdown(track.rules), "", rule(track), ""]
        for table in tables:
            lines += [f"### {escape_markdown(caption(table))}", ""]
            lines += [*markdown_table([cells(row, track) for row in table.rows], base), ""]
            notes = [row.entry for row in table.rows if not row.entry.stands]
            for e in notes:
                reasons = [e.why] if e.state == "disputed" else [f"fails {failure}" for failure in e.failures]
                lines += [f"- {escape_markdown(e.submission.name)}: {escape_markdown('; '.join(reasons))}"]
            lines += [""] * bool(notes)
    if board.tables:
        meanings = "; ".join(f"{state}, {meaning}" for state, meaning in STATES.items())
        lines += [f"States: {meanings}.", ""]
    if empty := without_tables(board):
        lines += ["No record yet: " + "; ".join(map(escape_markdown, empty)) + ".", ""]
    if board.unlisted:
        lines += [
            "## Not listed",
            "",
            "Folders without a record that can be ranked, and why.",
            "",
        ]
        for folder, reason in board.unlisted:
            shown = escape_markdown(f"{folder.parent.name}/{folder.name}")
            lines += [f"- [{shown}]({link(folder, base)}): {escape_markdown(reason)}"]
    return "\n".join(lines).strip()


SHORT = ("record", "val_bpb", "seeds", "bytes", "train s", "hardware", "author", "date", "state")


def short_markdown(board: Board, base: Path) -> str:
    """The best of every table."""
    rows = []
    for table in board.tables:
        if table.rows[0].rank is not None:
            best = cells(table.rows[0], table.track)
            about = {"track": Cell(table.track.title), "class": Cell(table.predictor_class)}
            rows.append(about | {"text": Cell(text_name(table))} | {key: best[key] for key in SHORT})
    return "\n".join(markdown_table(rows, base)) if rows else "No record yet."


def with_table(path: Path, text: str, table: str) -> str:
    """The text with what stands between its markers replaced."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in head or END in tail:
        raise ValueError(f"{path} must hold the line {BEGIN} and below it the line {END}, once each: write them in")
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------

SCORES = {"val_bpb": "val_bpb", "train_seconds": "train s"}  # titles of the columns
ABOUT = {
    "pre-quant": "val_bpb before the weights were quantized",
    "bytes": "code and artifact",
    "train s": "training and what else counts against its limit",
    "gain": "over the best record of the days before",
    "p": "how likely seeds like these are if the gain is not over what the track asks for",
}
LEFT = {"record", "hardware", "author", "state", "new record"}  # columns of words


def html_cell(title: str, cell: Cell, ranks: bool, base: Path) -> str:
    shown = html.escape(clean(cell.text))
    about = html.escape(clean(cell.title))
    if cell.folder:
        shown = f'<a href="{html.escape(link(cell.folder, base))}/">{shown}</a><small>{about}</small>'
        if cell.base:
            older = f'<a href="{html.escape(link(cell.base, base))}/">{html.escape(cell.base.name)}</a>'
            shown += f"<small>builds on {older}</small>"
    elif title == "state":
        shown = f'<span class="badge {cell.sort}" title="{about}" tabindex="0">{shown}</span>'
    elif about:
        shown = f'<span title="{about}">{shown}</span>'
    key = "" if cell.sort is None else html.escape(clean(str(cell.sort)))
    kind = ("w" if title in LEFT else "n") + (" score" if ranks else "")
    return f'<td role="cell" class="{kind}" data-label="{html.escape(title)}" data-sort="{key}">{shown}</td>'


def html_table(table: Table, base: Path, figure: str) -> str:
    """A table with its title, and `figure`, the name of its curves where it has some."""
    rows = [cells(row, table.track) for row in table.rows]
    titles = "".join(
        f'<th role="columnheader" scope="col" class="{"w" if title in LEFT else "n"}"'
        f'{" aria-sort=ascending" if title == "#" else ""}><button type="button" title="{ABOUT.get(title, "")}">'
        f"{html.escape(title)}</button></th>"
        for title in rows[0]
    )
    lines, score = [], SCORES[table.track.rank_by]
    for row, row_cells in zip(table.rows, rows, strict=True):
        kind = "void" if row.rank is None else "new" if row.verdict in ("yes", "first") else ""
        tds = [html_cell(title, cell, title == score, base) for title, cell in row_cells.items()]
        lines.append(f'<tr role="row" class="{kind}">{"".join(tds)}</tr>')
    label = html.escape(f"{table.track.title}. {caption(table)}")
    return (
        f'<h3>{html.escape(caption(table))}</h3>\n<div class="wide"><table role="table" aria-label="{label}">\n'
        f'<thead role="rowgroup"><tr role="row">{titles}</tr></thead>\n<tbody role="rowgroup">\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
        + f'\n<figure data-curves="{html.escape(figure)}"></figure>' * bool(figure)
    )


Curve = list[tuple[int, float | None, float]]  # step, seconds, nats per token


def thinned(curve: Iterable[tuple[int, float, float]], smooth: int = 0) -> Curve:
    """Finite points only, each the mean of up to `smooth` on either side, as many on both; few enough to draw."""
    points = [point for point in curve if 0 < point[2] < 1e3 and point[0] < 1e9]  # false for NaN
    losses = [loss for _, _, loss in points]
    drawn: Curve = []
    every = max(1, math.ceil(len(points) / MAX_POINTS))
    for i, (step, seconds, _) in enumerate(points):
        if i % every == 0 or i == len(points) - 1:
            reach = min(smooth, i, len(points) - 1 - i)
            loss = statistics.fmean(losses[i - reach : i + reach + 1])
            drawn.append((step, round(seconds, 3) if math.isfinite(seconds) else None, round(loss, 4)))
    return drawn


def runs(entry: Entry) -> list[dict[str, Any]]:
    """What the page draws of a record: one item for each seed whose log is there."""
    found = []
    for seed, result in entry.submission.seed_results.items():
        path = log_path(entry.folder, seed)
        if not path.is_file() or path.stat().st_size > MAX_LOG_BYTES:
            continue
        try:
            log = parse_log(path.read_text(encoding="utf-8", errors="replace"))
        except ValueError:  # a figure that is none, like 1.2.3
            continue
        val, train = thinned(log.val_curve), thinned(log.train_curve, smooth=2)
        if val or train:
            tokens_per_byte = result.scored_tokens / result.scored_bytes if result.scored_bytes > 0 else 0.0
            scale = round(tokens_per_byte / math.log(2), 6)  # nats per token times this are bits per byte
            found.append({"seed": seed, "scale": scale, "val": val, "train": train})
    return found


def curves(table: Table) -> list[dict[str, Any]]:
    """The records of a table that have logs, with their runs."""
    found = []
    for row in table.rows:
        s = row.entry.submission
        about = {"name": clean(s.name, 80) or row.entry.folder.name, "date": s.date}
        found.append(about | {"runs": runs(row.entry)})
    return [record for record in found if record["runs"]]


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII only
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def html_sections(board: Board, base: Path) -> tuple[str, dict[str, Any]]:
    """The sections of all tracks, and the curves of each figure by its name."""
    sections, data = [], dict[str, Any]()
    for name, group in itertools.groupby(board.tables, key=lambda table: table.track_name):
        track, tables = board.tracks[name], list[str]()
        for table in group:
            figure = f"{name}-{len(tables) + 1}"
            drawn = curves(table)
            data |= {figure: drawn} if drawn else {}
            tables.append(html_table(table, base, figure if drawn else ""))
        sections.append(
            f'<section id="{html.escape(name)}"><h2>{html.escape(track.title)}</h2>\n'
            f'<p>{html.escape(track.rules)}</p>\n<p class="rule">{html.escape(rule(track))}</p>\n'
            + "\n".join(tables)
            + "\n</section>"
        )
    if not board.tables:
        sections.append("<p>No record yet.</p>")
    elif empty := without_tables(board):
        sections.append(f'<p class="rule">No record yet: {html.escape("; ".join(empty))}.</p>')
    if board.unlisted:
        items = "\n".join(
            f'<li><a href="{html.escape(link(folder, base))}/">'
            f"{html.escape(clean(f'{folder.parent.name}/{folder.name}'))}</a>: {html.escape(clean(reason))}</li>"
            for folder, reason in board.unlisted
        )
        sections.append(
            "<section><h2>Not listed</h2>\n<p>Folders without a record that can be ranked, and why.</p>\n"
            f"<ul>\n{items}\n</ul></section>"
        )
    return "\n".join(sections), data


def page(board: Board, base: Path) -> str:
    """One HTML file. Its policy lets only the template's own script and style work, and forbids every request."""
    template = TEMPLATE.read_text(encoding="utf-8")
    hashes = {}
    for element in ("script", "style"):
        code = re.findall(rf"<{element}>(.*?)</{element}>", template, re.DOTALL)[0]
        hashes[element] = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    names = dict.fromkeys(table.track_name for table in board.tables)
    nav = "".join(f'<a href="#{html.escape(n)}">{html.escape(board.tracks[n].title)}</a>' for n in names)
    states = "".join(f'<span><span class="badge {s}">{s}</span> {meaning}</span>' for s, meaning in STATES.items())
    sections, data = html_sections(board, base)
    parts = {
        "policy": policy,
        "nav": nav,
        "states": states,
        "sections": sections,
        "data": script_json(data),
    }
    # one pass, so that a name which looks like a placeholder stays a name
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def wanted_files(args: argparse.Namespace) -> dict[Path, str]:
    """What the files should hold, by path."""
    records, readme = Path(args.records), Path(args.readme)
    board = read_board(records, load_tracks()[1])
    if args.html:
        return {Path(args.html): page(board, Path(args.html).parent)}
    full = records / "README.md"
    old = full.read_text(encoding="utf-8") if full.exists() else HEAD
    if not readme.is_file():
        raise ValueError(f"{readme} is missing: --readme names the file that holds the short table")
    return {
        full: with_table(full, old, full_markdown(board, records)),
        readme: with_table(readme, readme.read_text(encoding="utf-8"), short_markdown(board, readme.parent)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    parser.add_argument("--html", metavar="FILE", help="write the page (with --check: compare it), and no table")
    parser.add_argument("--records", default=str(RECORDS), metavar="DIR")
    parser.add_argument("--readme", default=str(ROOT / "README.md"), metavar="FILE", help="holds the short table")
    args = parser.parse_args(argv)
    try:
        wanted = wanted_files(args)
        stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
        if args.check:
            for path in stale:
                print(f"{path} is not what the records say: run python tools/leaderboard.py", file=sys.stderr)
            return int(bool(stale))
        for path in stale:
            path.write_text(wanted[path], encoding="utf-8", newline="\n")
        print("\n".join(f"{path}: {'written' if path in stale else 'up to date'}" for path in wanted))
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
