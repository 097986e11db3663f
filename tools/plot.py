"""Draw the loss curves of training logs as an SVG file.

    python tools/plot.py --out loss.svg runs/*/log.txt                 one line for each log
    python tools/plot.py --out duel.svg --line "new idea" runs/new_*/log.txt --line baseline runs/base_*/log.txt

Reads logs of this project and of the published challenge (tools/record.py). Runs that share a --line, such as the seeds
of one experiment, share a colour and a name. A single step's loss is noisy, so each curve is a running mean over
--smooth of the run; validation losses are dots. --x steps compares by steps instead of seconds. The same logs give the
same file, byte for byte. Its background is transparent and its colours can be read on white and on black.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from record import CurvePoint, RunLog, parse_log

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 60, 170, 16, 46  # margins; the names of the lines stand in the right one
GREY = "#808a94"
COLOURS = ("#e8743b", "#4c8dd6", "#3da35d", "#b565c4", "#c7a008", "#d64c6f")
FONT_SIZE = 13
# The first steps fall so steeply that the rest of the curve would be flat: the loss axis starts behind them.
SKIPPED_SHARE = 0.06
# No run has a step, a second or a loss beyond this. Numbers so large would leave the axes without ticks.
MAX_DRAWN = 1e12


class Point(NamedTuple):
    x: float  # seconds or steps
    y: float  # loss, nats per token


class Curve(NamedTuple):
    """One run."""

    train: list[Point]  # smoothed
    val: list[Point]


class Line(NamedTuple):
    """Runs that share a name and a colour."""

    name: str
    colour: str
    curves: list[Curve]


class Axis(NamedTuple):
    """Maps the values low .. high to the pixels start .. end."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values on the axis, three to six of them."""
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / 5))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 5)
        # A run of 300 s ends after 299.9 s, and its axis should show the 300 all the same.
        tolerance = 0.005 * span
        first = math.ceil((self.low - tolerance) / step)
        last = math.floor((self.high + tolerance) / step)
        return [number * step for number in range(first, last + 1)]


def to_points(curve: Sequence[CurvePoint], by_steps: bool) -> list[Point]:
    """The points of a curve that can be drawn, from left to right."""
    points = [Point(float(p.step) if by_steps else p.seconds, p.loss) for p in curve]
    # Both comparisons are false for NaN.
    return sorted(point for point in points if point.x < MAX_DRAWN and abs(point.y) < MAX_DRAWN)


def smoothed(points: Sequence[Point], width: float) -> list[Point]:
    """Each point's loss becomes the mean over the points at most `width` / 2 away from it.

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


def to_curve(log: RunLog, by_steps: bool, smooth: float) -> Curve:
    train = to_points(log.train_curve, by_steps)
    if train:
        train = smoothed(train, smooth * (train[-1].x - train[0].x))
    return Curve(train, to_points(log.val_curve, by_steps))


def find_axes(lines: Sequence[Line]) -> tuple[Axis, Axis]:
    """The axes that show every run; ValueError where there is nothing to show."""
    points = [point for line in lines for curve in line.curves for point in (*curve.train, *curve.val)]
    end = max((point.x for point in points), default=0.0)
    later = [point.y for point in points if point.x >= SKIPPED_SHARE * end]
    if len(points) < 2 or end <= 0:
        raise ValueError("the logs hold fewer than two points to draw: name logs of finished runs, or try --x steps")

    margin = 0.05 * (max(later) - min(later)) or 0.5
    across = Axis(0.0, end, LEFT, WIDTH - RIGHT)
    upward = Axis(min(later) - margin, max(later) + margin, HEIGHT - BOTTOM, TOP)
    return across, upward


def draw_axes(across: Axis, upward: Axis, x_name: str) -> list[str]:
    """Grid, numbers and titles."""
    shapes = []
    for value in upward.ticks():
        y = upward.place(value)
        shapes.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GREY}" stroke-opacity="0.3"/>')
        shapes.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in across.ticks():
        x = across.place(value)
        shapes.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{value:g}</text>')

    middle = (LEFT + WIDTH - RIGHT) / 2
    shapes.append(f'<path d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="{GREY}"/>')
    shapes.append(f'<text x="{middle:g}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>')
    centre = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 14 {centre:g})"'
    shapes.append(f'<text x="14" y="{centre:g}" text-anchor="middle" {turned}>loss, nats per token</text>')
    return shapes


def draw_curve(curve: Curve, colour: str, across: Axis, upward: Axis) -> list[str]:
    shapes = []
    if curve.train:
        corners = " ".join(f"{across.place(p.x):.1f},{upward.place(p.y):.1f}" for p in curve.train)
        shapes.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    for p in curve.val:
        shapes.append(f'<circle cx="{across.place(p.x):.1f}" cy="{upward.place(p.y):.1f}" r="3" fill="{colour}"/>')
    return shapes


def draw_names(lines: Sequence[Line], upward: Axis) -> list[str]:
    """The name of each line beside its end, moved down where two would overlap."""
    ends = []
    for line in lines:
        last = [(curve.train or curve.val)[-1].y for curve in line.curves if curve.train or curve.val]
        if last:
            ends.append((upward.place(sum(last) / len(last)), line))
    ends.sort(key=lambda end: end[0])

    shapes = []
    lowest = -math.inf
    for y, line in ends:
        lowest = max(y, lowest)
        parts = line.name.split("|")
        for part in parts:
            place = f'x="{WIDTH - RIGHT + 10}" y="{lowest + 4:.1f}"'
            shapes.append(f'<text {place} style="fill:{line.colour};font-weight:600">{escape(part)}</text>')
            lowest += FONT_SIZE + 3
    return shapes


def draw(lines: Sequence[Line], x_name: str) -> str:
    """The whole SVG file."""
    across, upward = find_axes(lines)
    font = f"font-family:system-ui,sans-serif;font-size:{FONT_SIZE}px;fill:{GREY}"
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f"<style>text{{{font}}}</style>",
        # The steep start leaves the plot at its top.
        f'<clipPath id="plot"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT + 4}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>',
        *draw_axes(across, upward, x_name),
        '<g clip-path="url(#plot)">',
    ]
    for line in lines:
        for curve in line.curves:
            shapes += draw_curve(curve, line.colour, across, upward)
    return "\n".join([*shapes, "</g>", *draw_names(lines, upward), "</svg>", ""])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG", help="a line of its own for each of these")
    parser.add_argument(
        "--line",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "LOG"),
        help="a name (a | breaks it into rows) and the logs that share it; may be repeated",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.svg")
    parser.add_argument("--x", choices=("seconds", "steps"), default="seconds", help="of training")
    parser.add_argument("--smooth", type=float, default=0.08, help="width of the running mean, as a part of the run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    named = [(name, [Path(path) for path in paths]) for name, *paths in args.line]
    for path in args.logs:
        # All runs call their logs alike, but not their folders.
        name = path.resolve().parent.name if path.name == "log.txt" else path.stem
        named.append((name, [path]))
    try:
        lines = []
        for number, (name, paths) in enumerate(named):
            logs = [parse_log(path.read_text(encoding="utf-8", errors="replace")) for path in paths]
            curves = [to_curve(log, args.x == "steps", args.smooth) for log in logs]
            lines.append(Line(name, COLOURS[number % len(COLOURS)], curves))
        picture = draw(lines, f"{args.x} of training")
        args.out.write_text(picture, encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {len(named)} lines, {len(picture)} bytes")


if __name__ == "__main__":
    main()
