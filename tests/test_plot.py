"""tools/plot.py: the axes, the running mean, and a picture of real log lines."""

from __future__ import annotations

import itertools
import math
import time
import xml.etree.ElementTree as ElementTree

import plot
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plot import Axis, Point

LOG = "\n".join(
    [f"step:{step}/100 train_loss:{3 + 5 / step:.4f} train_time:{250 * step}ms" for step in range(1, 101)]
    + ["step:100/100 val_loss:3.0600 val_bpb:1.7500 train_time:25000ms"]
)


@given(st.floats(-100, 100), st.floats(0.01, 1000))
def test_ticks_are_few_equally_spaced_and_on_the_axis(low, span):
    axis = Axis(low, low + span, 0.0, 100.0)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert all(-1 <= axis.place(tick) <= 101 for tick in ticks)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - round_value) for round_value in (1, 2, 5, 10)) < 1e-6


def test_running_mean_keeps_a_straight_line_inside_and_ignores_what_is_far():
    straight = [Point(float(x), 2.0 * x) for x in range(20)]
    inside = plot.smoothed(straight, 6.0)[:-3]
    assert [p.y for p in inside] == pytest.approx([p.y for p in straight[:-3]])
    spike = [Point(float(x), 100.0 * (x == 10)) for x in range(20)]
    means = [p.y for p in plot.smoothed(spike, 4.0)]
    assert means[10] == pytest.approx(20.0)
    assert [x for x, mean in enumerate(means) if mean > 0] == [8, 9, 10, 11, 12]


def test_picture_holds_every_line_and_is_the_same_each_time(tmp_path):
    for name in ("a_1", "a_2", "b"):
        (tmp_path / f"{name}.txt").write_text(LOG)
    logs = [str(tmp_path / f"{name}.txt") for name in ("a_1", "a_2", "b")]
    pictures = []
    for out in (tmp_path / "first.svg", tmp_path / "second.svg"):
        plot.main(["--out", str(out), "--line", "mine & <others>", *logs[:2], "--line", "b", logs[2]])
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    root = ElementTree.fromstring(pictures[0])
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"mine & <others>", "b", "seconds of training", "25"} <= set(texts)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 3
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3


@pytest.mark.parametrize("text", ["", "step:1/9 train_loss:7.0 train_time:100ms", "no log at all"])
def test_log_without_a_curve_is_an_error_with_a_remedy(tmp_path, text):
    path = tmp_path / "empty.txt"
    path.write_text(text)
    with pytest.raises(SystemExit, match="fewer than two points"):
        plot.main(["--out", str(tmp_path / "x.svg"), str(path)])
    assert not (tmp_path / "x.svg").exists()


def test_curve_that_no_run_has_is_drawn_without_a_crash(tmp_path):
    """Steps in any order, or too large for a float; the time grew with the square of their number, 1.6 s for 4,000."""
    lines = [f"step:{9000 - i % 9000}/9000 train_loss:3.0 train_time:{i}ms\n" for i in range(60_000)]
    lines += [f"step:{'9' * 400}/9 train_loss:1.0 train_time:1ms\n", f"step:1/9 val_loss:{'9' * 400} train_time:1ms\n"]
    path = tmp_path / "log.txt"
    path.write_text("".join(lines))
    begin = time.process_time()
    plot.main(["--out", str(tmp_path / "x.svg"), "--x", "steps", str(path)])
    assert time.process_time() - begin < 10  # 1 on an idle machine
    ElementTree.parse(tmp_path / "x.svg")
