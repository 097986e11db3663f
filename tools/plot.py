"""Draw loss or bits per byte of runs, in the terminal or as a picture.

    python tools/plot.py runs/latest                               a sparkline, and the results
    python tools/plot.py runs/latest --x tokens --out loss.png     a picture, PNG or SVG
    python tools/plot.py --out duel.svg --seeds band --line "new idea" runs/new_* --line baseline runs/base_*

Takes logs of this project and of the published challenge (tools/record.py), and folders: that of a run, and that of a
record, whose seeds then share a line. --x compares by seconds of training, steps or tokens.

The loss of a single step is noisy, so a curve of --y loss is a running mean over --smooth of the run, and the dots are
validations. A training loss has no bits per byte, so --y bpb shows validations alone. Seeds that share a line are
drawn one by one, as a band of their mean plus and minus one standard deviation, or both. The band ends where the first
of them ends. In the terminal, it is the mean that is shown.

A picture needs matplotlib. With one version of it, the same logs give the same file, byte for byte. Its background is
transparent, and its colours can be read on white and on black.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from record import CurvePoint, RunLog, parse_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY = "#808a94"
COLOURS = ("#e8743b", "#4c8dd6", "#3da35d", "#b565c4", "#a88600", "#d64c6f")
DASHES = ("-", "--", ":")  # a further round through the colours has other dashes
UNITS = {"loss": "loss, nats per token", "bpb": "bits per byte of the validation text"}
AXES_INCHES = (7.2, 4.2)
FONT_POINTS = 10
# The first steps fall so steeply that the rest of the curve would be flat: the upward axis starts behind them.
SKIPPED_SHARE = 0.06
# No run has a step, a second or a loss beyond this. Numbers so large would leave the axes without ticks.
MAX_DRAWN = 1e12
BAND_POINTS = 400  # along a band
# From low to high. A terminal without the first ones gets the others.
BLOCKS = "▁▂▃▄▅▆▇█"
LETTERS = "_.-~+*#@"


class Point(NamedTuple):
    x: float  # seconds, steps or tokens
    y: float  # nats per token, or bits per byte


class Curve(NamedTuple):
    """One run."""

    train: list[Point]  # smoothed; empty for bits per byte
    val: list[Point]
    val_bpb: float | None = None  # the result of the run, once it has one

    @property
    def line(self) -> list[Point]:
        """What is drawn as a line. Validations are joined to one where they are all there is."""
        return self.train or self.val


class Line(NamedTuple):
    """Runs that share a name and a colour."""

    name: str
    curves: list[Curve]


class Band(NamedTuple):
    """The mean of runs, and their standard deviation (0 for one run) at each of its points."""

    mean: list[Point]
    deviation: list[float]


class Range(NamedTuple):
    """What an axis shows."""

    low: float
    high: float

    def part(self, value: float) -> float:
        """Where a value lies on the axis: 0 at its low end, 1 at its high one."""
        return (value - self.low) / (self.high - self.low)


# ----------------------------------------------------------------------------------------------------------------------
# From logs to curves
# ----------------------------------------------------------------------------------------------------------------------


def logs_of(path: Path) -> list[Path]:
    """The log itself, the one in the folder of a run, or those in the folder of a record."""
    if not path.is_dir():
        return [path]
    log = path / "log.txt"
    logs = [log] if log.is_file() else sorted(path.glob("*.log"))
    if not logs:
        raise ValueError(f"{path} is a folder without log.txt or *.log: name the folder of a run, or a log")
    return logs


def name_of(path: Path) -> str:
    """What to call the line of a log or folder. All runs call their logs alike, but not their folders."""
    resolved = path.resolve()
    if resolved.is_dir():
        return resolved.name
    return resolved.parent.name if path.name == "log.txt" else path.stem


def tokens_per_step(log: RunLog, path: Path) -> int:
    text = log.values.get("train_batch_tokens", "")
    if not text.isdecimal() or not 0 < int(text) < MAX_DRAWN:
        raise ValueError(
            f"{path} has no line with train_batch_tokens:<number>, so its tokens are not known: try --x steps"
        )
    return int(text)


def to_points(curve: Sequence[CurvePoint], x: str, y: str, step_tokens: int) -> list[Point]:
    """The points of a curve that can be drawn, from left to right."""
    points = []
    for p in curve:
        across = p.seconds
        if x == "steps":
            across = float(p.step)
        elif x == "tokens":
            across = float(p.step * step_tokens)

        upward = p.bpb if y == "bpb" else p.loss
        # The comparisons are false for NaN.
        if upward is not None and abs(upward) < MAX_DRAWN and across < MAX_DRAWN:
            points.append(Point(across, upward))
    return sorted(points)


def smoothed(points: Sequence[Point], width: float) -> list[Point]:
    """Each point's y becomes the mean over the points at most `width` / 2 away from it.

    The window is narrower near the start, where the loss falls so fast that a mean would be far from it.
    """
    xs = [point.x for point in points]
    sums = [0.0, *itertools.accumulate(point.y for point in points)]
    means = []
    for point in points:
        reach = min(width / 2, point.x - xs[0])
        first = bisect.bisect_left(xs, point.x - reach)
        stop = bisect.bisect_right(xs, point.x + reach)
        means.append(Point(point.x, (sums[stop] - sums[first]) / (stop - first)))
    return means


def read_curve(path: Path, x: str, y: str, smooth: float) -> Curve:
    log = parse_log(path.read_text(encoding="utf-8", errors="replace"))
    step_tokens = tokens_per_step(log, path) if x == "tokens" else 0
    train = to_points(log.train_curve, x, y, step_tokens)
    if train:
        train = smoothed(train, smooth * (train[-1].x - train[0].x))
    return Curve(train, to_points(log.val_curve, x, y, step_tokens), log.final.val_bpb if log.final else None)


def value_at(points: Sequence[Point], x: float) -> float:
    """The value at `x` of the straight lines between points, and beside them that of the first or last point."""
    x = min(max(x, points[0].x), points[-1].x)
    right = min(bisect.bisect_left(points, x, key=lambda point: point.x), len(points) - 1)
    left = max(right - 1, 0)
    a = points[left]
    b = points[right]
    if b.x <= a.x:
        return b.y
    return a.y + (b.y - a.y) * (x - a.x) / (b.x - a.x)


def spread(values: Sequence[float]) -> float:
    """Their standard deviation; 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def to_band(curves: Sequence[Curve]) -> Band:
    """Mean and standard deviation of the lines of runs, over the range that all of them cover."""
    lines = [curve.line for curve in curves if curve.line]
    begin = max((line[0].x for line in lines), default=0.0)
    end = min((line[-1].x for line in lines), default=-1.0)
    if begin > end:
        return Band([], [])

    mean = []
    deviation = []
    for number in range(BAND_POINTS + 1):
        x = begin + (end - begin) * number / BAND_POINTS
        values = [value_at(line, x) for line in lines]
        mean.append(Point(x, statistics.fmean(values)))
        deviation.append(spread(values))
    return Band(mean, deviation)


def find_ranges(lines: Sequence[Line]) -> tuple[Range, Range]:
    """What the axes have to show of every run, across and upward; ValueError where there is nothing to show."""
    points = [point for line in lines for curve in line.curves for point in (*curve.train, *curve.val)]
    end = max((point.x for point in points), default=0.0)
    if len(points) < 2 or end <= 0:
        raise ValueError(
            "the logs hold fewer than two points to draw: name logs of runs that have begun, or try --x steps, --y loss"
        )

    shown = [point.y for point in points if point.x >= SKIPPED_SHARE * end]
    if len(shown) < 2:
        shown = [point.y for point in points]
    margin = 0.05 * (max(shown) - min(shown)) or 0.5
    return Range(0.0, end), Range(min(shown) - margin, max(shown) + margin)


# ----------------------------------------------------------------------------------------------------------------------
# In the terminal
# ----------------------------------------------------------------------------------------------------------------------


def sparkline(points: Sequence[Point], across: Range, upward: Range, width: int, signs: str) -> str:
    """`width` signs along an axis, each as high as the lines between the points are there, blank beside them."""
    if not points:
        return " " * width
    begin = across.part(points[0].x) * width
    end = across.part(points[-1].x) * width
    text = ""
    for column in range(width):
        if column + 1 < begin or column > end:
            text += " "
            continue
        x = across.low + (column + 0.5) / width * (across.high - across.low)
        part = upward.part(value_at(points, x))
        level = math.floor(part * len(signs))
        text += signs[min(max(level, 0), len(signs) - 1)]
    return text


def in_text(lines: Sequence[Line], x: str, y: str, columns: int, signs: str) -> str:
    """A heading, and for each line its name with its last values, and a sparkline as wide as the terminal."""
    across, upward = find_ranges(lines)
    rows = [
        f"{UNITS[y]}, from {upward.low:.2f} {signs[0]} to {upward.high:.2f} {signs[-1]}, over {across.high:,.0f} {x}"
    ]
    for line in lines:
        mean, _ = to_band(line.curves)
        rows.append(f"{line.name.replace('|', ' ')}: {last_values(line)}")
        rows.append(sparkline(mean, across, upward, columns - 1, signs).rstrip())
    return "\n".join(rows)


def last_values(line: Line) -> str:
    """The last values of a line's runs, and the bits per byte of their stored models."""
    parts = []
    ends = [curve.line[-1].y for curve in line.curves if curve.line]
    if ends:
        parts.append(mean_and_spread(ends))
    results = [curve.val_bpb for curve in line.curves if curve.val_bpb is not None]
    if results:
        parts.append(f"stored {mean_and_spread(results)} bpb")
    return ", ".join(parts)


def mean_and_spread(values: Sequence[float]) -> str:
    """2.1047 +- 0.0098, or 2.1047 for a single value"""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} +- {spread(values):.4f}" if len(values) > 1 else mean


def signs_for(encoding: str | None) -> str:
    """What a terminal can show."""
    try:
        BLOCKS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return LETTERS
    return BLOCKS


# ----------------------------------------------------------------------------------------------------------------------
# As a picture
# ----------------------------------------------------------------------------------------------------------------------


def draw(lines: Sequence[Line], x: str, y: str, seeds: str, out: Path) -> None:
    """Write the picture. Raises ValueError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise ValueError(f"--out needs matplotlib ({error}): python -m pip install matplotlib") from None

    across, upward = find_ranges(lines)
    with matplotlib.rc_context():
        # Whatever the matplotlibrc of this machine says.
        matplotlib.rcdefaults()
        for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
            matplotlib.rcParams[name] = GREY
        matplotlib.rcParams["font.size"] = FONT_POINTS
        # In an SVG, words stay words, and ids are the same each time.
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["svg.hashsalt"] = "plot"

        figure = Figure(figsize=AXES_INCHES)
        axes = figure.add_axes((0, 0, 1, 1))
        # A dot at the very end should not be cut in half.
        axes.set_xlim(across.low, 1.005 * across.high)
        axes.set_ylim(upward)
        axes.set_xlabel(f"{x} of training")
        axes.set_ylabel(UNITS[y])
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="y", color=GREY, alpha=0.3)
        if x == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter())

        for number, line in enumerate(lines):
            style = DASHES[number // len(COLOURS) % len(DASHES)]
            draw_line(axes, line, COLOURS[number % len(COLOURS)], style, seeds)
        for name, colour, height in names_beside(lines, upward):
            # A dollar sign in a name begins no formula.
            axes.annotate(
                name, (1.02, height), xycoords="axes fraction", color=colour, weight="bold", va="top", parse_math=False
            )
        # Neither the day nor the version of matplotlib belongs in the file.
        unset = {"Date": None, "Creator": None} if out.suffix == ".svg" else {"Software": None}
        figure.savefig(out, transparent=True, bbox_inches="tight", dpi=150, metadata=unset)


def draw_line(axes: Axes, line: Line, colour: str, style: str, seeds: str) -> None:
    """Draw the runs of a line: each as a curve, all of them as a band, or both. Validations are dots."""
    is_band = seeds != "curves" and len(line.curves) > 1
    if is_band:
        mean, deviation = to_band(line.curves)
        xs = [point.x for point in mean]
        low = [point.y - width for point, width in zip(mean, deviation, strict=True)]
        high = [point.y + width for point, width in zip(mean, deviation, strict=True)]
        axes.fill_between(xs, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(xs, [point.y for point in mean], color=colour, linestyle=style)

    for curve in line.curves:
        if curve.line and (seeds == "both" or not is_band):
            axes.plot(*zip(*curve.line, strict=True), color=colour, linestyle=style, linewidth=1.0)
        if curve.val:
            axes.plot(*zip(*curve.val, strict=True), "o", color=colour, markersize=3.5)


def names_beside(lines: Sequence[Line], upward: Range) -> list[tuple[str, str, float]]:
    """Name, colour and place of each line: beside its end, or lower where two would overlap.

    The place is that of the name's top, as a part of the upward axis. A | in a name begins another row.
    """
    row_height = 1.5 * FONT_POINTS / 72 / AXES_INCHES[1]
    ends = []
    for number, line in enumerate(lines):
        last = [curve.line[-1].y for curve in line.curves if curve.line]
        if last:
            height = upward.part(statistics.fmean(last)) + row_height / 2
            ends.append((height, line.name.replace("|", "\n"), COLOURS[number % len(COLOURS)]))
    ends.sort(reverse=True)

    places = []
    top = math.inf
    for height, name, colour in ends:
        top = min(height, top)
        places.append((name, colour, top))
        top -= row_height * len(name.split("\n"))
    return places


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "logs", nargs="*", type=Path, metavar="LOG", help="a log or a folder; each gets a line of its own"
    )
    parser.add_argument(
        "--line",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "LOG"),
        help="a name (a | breaks it into rows) and the logs or folders that share it; may be repeated",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture, .png or .svg; without it, text is printed")
    parser.add_argument("--x", choices=("seconds", "steps", "tokens"), default="seconds", help="of training")
    parser.add_argument("--y", choices=("loss", "bpb"), default="loss", help="what is drawn")
    parser.add_argument(
        "--seeds",
        choices=("curves", "band", "both"),
        default="curves",
        help="how a picture shows runs that share a line",
    )
    parser.add_argument("--smooth", type=float, default=0.08, help="width of the running mean, as a part of the run")
    args = parser.parse_args(argv)
    if not args.logs and not args.line:
        parser.error("no logs: name one, or the folder of a run, such as runs/latest")
    if args.out and args.out.suffix not in (".png", ".svg"):
        parser.error(f"--out {args.out} ends in neither .png nor .svg")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    named = [(name, [Path(path) for path in paths]) for name, *paths in args.line]
    named += [(name_of(path), [path]) for path in args.logs]
    try:
        lines = []
        for name, paths in named:
            logs = [log for path in paths for log in logs_of(path)]
            lines.append(Line(name, [read_curve(log, args.x, args.y, args.smooth) for log in logs]))
        if args.out:
            draw(lines, args.x, args.y, args.seeds, args.out)
            print(f"{args.out}: {len(lines)} lines, {args.out.stat().st_size} bytes")
        else:
            columns = shutil.get_terminal_size().columns
            print(in_text(lines, args.x, args.y, columns, signs_for(sys.stdout.encoding)))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
