"""Write the leaderboard as one HTML page, with the loss curves of all runs.

    python tools/page.py records.html

The page is a single file that loads nothing from anywhere: tables that sort by a click, and under each table a figure
of the training and validation losses in the logs of its records. tools/page.html is its template; what ranks with
what is decided by tools/leaderboard.py.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leaderboard import (
    NO_RECORD,
    STATES,
    Board,
    Cell,
    Entry,
    Row,
    Table,
    caption,
    clean,
    link,
    read_board,
    rule,
    table_cells,
    table_note,
    tables_of_tracks,
    tracks_without_records,
)
from record import RECORDS, CurvePoint, load_tracks, log_path, parse_log, read_text

TEMPLATE = Path(__file__).with_suffix(".html")
MAX_POINTS = 400  # of a curve in the figure
TRAIN_SMOOTHING = 2  # the training loss is the mean of a logged step and so many on either side

COLUMN_OF_RANK = {"val_bpb": "val_bpb", "train_seconds": "train s"}
COLUMN_HELP = {
    "pre-quant": "val_bpb before the weights were quantized",
    "bytes": "code and artifact",
    "train s": "training and what else counts against its limit",
    "gain": "over the best record of the days before",
    "p": "how likely seeds like these are if the gain is not over what the track asks for",
}
COLUMNS_OF_WORDS = {"record", "hardware", "author", "state", "new record"}


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def html_table(table: Table, base: Path, figure: str) -> str:
    """A table with its title and, if `figure` is not empty, a place for the figure of that name."""
    rows = table_cells(table)
    for cells in rows:
        del cells["summary"]  # the whole of it stands below the name
    heads = "".join(html_head(title) for title in rows[0])

    lines = []
    for row, cells in zip(table.rows, rows, strict=True):
        columns = "".join(html_cell(title, cell, table, base) for title, cell in cells.items())
        lines.append(f'<tr role="row" class="{row_class(row)}">{columns}</tr>')
    body = "\n".join(lines)

    label = html.escape(f"{table.track.title}. {caption(table)}")
    place = f'\n<figure data-curves="{html.escape(figure)}"></figure>' if figure else ""
    note = table_note(table)
    shown_note = f'\n<p class="rule">{html.escape(note)}</p>' if note else ""
    return f"""<h3>{html.escape(caption(table))}</h3>{shown_note}
<div class="wide"><table role="table" aria-label="{label}">
<thead role="rowgroup"><tr role="row">{heads}</tr></thead>
<tbody role="rowgroup">
{body}
</tbody></table></div>{place}"""


def html_head(title: str) -> str:
    kind = "w" if title in COLUMNS_OF_WORDS else "n"
    order = " aria-sort=ascending" if title == "#" else ""
    button = f'<button type="button" title="{COLUMN_HELP.get(title, "")}">{html.escape(title)}</button>'
    return f'<th role="columnheader" scope="col" class="{kind}"{order}>{button}</th>'


def row_class(row: Row) -> str:
    if row.rank is None:
        return "void"
    return "new" if row.verdict in ("yes", "first") else ""


def html_cell(title: str, cell: Cell, table: Table, base: Path) -> str:
    text = html.escape(clean(cell.text))
    about = html.escape(clean(cell.title))
    if cell.folder:
        shown = f'<a href="{html.escape(link(cell.folder, base))}/">{text}</a><small>{about}</small>'
        if cell.base:
            older = f'<a href="{html.escape(link(cell.base, base))}/">{html.escape(cell.base.name)}</a>'
            shown += f"<small>builds on {older}</small>"
    elif title == "state":
        shown = f'<span class="badge {cell.sort}" title="{about}" tabindex="0">{text}</span>'
    elif about:
        shown = f'<span title="{about}">{text}</span>'
    else:
        shown = text

    kind = "w" if title in COLUMNS_OF_WORDS else "n"
    if title == COLUMN_OF_RANK[table.track.rank_by]:
        kind += " score"
    sort = "" if cell.sort is None else html.escape(clean(str(cell.sort)))
    return f'<td role="cell" class="{kind}" data-label="{html.escape(title)}" data-sort="{sort}">{shown}</td>'


# ----------------------------------------------------------------------------------------------------------------------
# Curves
# ----------------------------------------------------------------------------------------------------------------------


def figure_data(table: Table) -> list[dict[str, Any]]:
    """What the figure of a table draws: its records that have logs, each with its runs."""
    found = []
    for row in table.rows:
        runs = entry_runs(row.entry)
        if runs:
            s = row.entry.submission
            found.append({"name": clean(s.name, 80) or row.entry.folder.name, "date": s.date, "runs": runs})
    return found


def entry_runs(entry: Entry) -> list[dict[str, Any]]:
    """The curves of a record, one item for each seed whose log is there."""
    runs = []
    for seed, result in entry.submission.seed_results.items():
        try:
            log = parse_log(read_text(log_path(entry.folder, seed)))
        except ValueError:
            # It is missing or nothing that can be read, which tools/verify.py says.
            continue
        val = thinned(log.val_curve)
        train = thinned(log.train_curve, TRAIN_SMOOTHING)
        if val or train:
            # Nats per token times this scale are bits per byte.
            tokens_per_byte = result.scored_tokens / result.scored_bytes if result.scored_bytes > 0 else 0.0
            scale = round(tokens_per_byte / math.log(2), 6)
            runs.append({"seed": seed, "scale": scale, "val": val, "train": train})
    return runs


def thinned(curve: Sequence[CurvePoint], smoothing: int = 0) -> list[tuple[int, float | None, float]]:
    """Few enough points to draw: step, seconds and loss, the mean of up to `smoothing` neighbours on either side.

    Near an end fewer neighbours are taken, but as many on both sides, so that a straight line stays one.
    """
    points = [point for point in curve if 0 < point.loss < 1e3 and point.step < 1e9]  # drops NaN, too
    losses = [point.loss for point in points]
    every = max(1, math.ceil(len(points) / MAX_POINTS))

    drawn = []
    last = len(points) - 1
    for i, point in enumerate(points):
        if i % every == 0 or i == last:
            reach = min(smoothing, i, last - i)
            loss = statistics.fmean(losses[i - reach : i + reach + 1])
            seconds = round(point.seconds, 3) if math.isfinite(point.seconds) else None
            drawn.append((point.step, seconds, round(loss, 4)))
    return drawn


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------


def page(board: Board, base: Path) -> str:
    """The whole page, for a file in the folder `base`."""
    template = TEMPLATE.read_text(encoding="utf-8")
    sections, curves = html_sections(board, base)

    links = []
    for track_name in tables_of_tracks(board):
        links.append(f'<a href="#{html.escape(track_name)}">{html.escape(board.tracks[track_name].title)}</a>')
    states = [f'<span><span class="badge {state}">{state}</span> {meaning}</span>' for state, meaning in STATES.items()]

    parts = {
        "policy": content_policy(template),
        "nav": "".join(links),
        "states": "".join(states),
        "sections": sections,
        "data": script_json(curves),
    }
    # All placeholders are filled in one pass, so that a record's name which looks like one stays a name.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def content_policy(template: str) -> str:
    """A policy that lets only the template's own script and style work, and forbids every request."""
    hashes = {}
    for element in ("script", "style"):
        code = re.findall(rf"<{element}>(.*?)</{element}>", template, re.DOTALL)[0]
        hashes[element] = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def html_sections(board: Board, base: Path) -> tuple[str, dict[str, Any]]:
    """The sections of all tracks, and what each figure draws, by the figure's name."""
    sections = []
    curves: dict[str, Any] = {}
    for track_name, group in tables_of_tracks(board).items():
        track = board.tracks[track_name]
        tables = []
        for number, table in enumerate(group, 1):
            figure = f"{track_name}-{number}"
            drawn = figure_data(table)
            if drawn:
                curves[figure] = drawn
            tables.append(html_table(table, base, figure if drawn else ""))
        body = "\n".join(tables)
        sections.append(f"""<section id="{html.escape(track_name)}"><h2>{html.escape(track.title)}</h2>
<p>{html.escape(track.rules)}</p>
<p class="rule">{html.escape(rule(track) if group else NO_RECORD)}</p>
{body}
</section>""")

    empty = tracks_without_records(board)
    if not board.tables:
        sections.append(f"<p>{NO_RECORD}</p>")
    elif empty:
        sections.append(f'<p class="rule">No record yet: {html.escape("; ".join(empty))}.</p>')
    if board.unlisted:
        sections.append(unlisted_section(board, base))
    return "\n".join(sections), curves


def unlisted_section(board: Board, base: Path) -> str:
    items = []
    for folder, reason in board.unlisted:
        name = html.escape(clean(f"{folder.parent.name}/{folder.name}"))
        items.append(f'<li><a href="{html.escape(link(folder, base))}/">{name}</a>: {html.escape(clean(reason))}</li>')
    body = "\n".join(items)
    return f"""<section><h2>Not listed</h2>
<p>Folders that hold no record which can be ranked, and why.</p>
<ul>
{body}
</ul></section>"""


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII only
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the HTML file to write")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        _, tracks = load_tracks()
        board = read_board(args.records, tracks)
        args.out.write_text(page(board, args.out.parent), encoding="utf-8", newline="\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {len(board.tables)} tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
