"""tools/plot.py: the running mean, the band of several runs, the text in a terminal, and pictures of real log lines."""

from __future__ import annotations

import itertools
import os
import re
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import plot
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plot import Curve, Point, Range
from record import ROOT
from test_submission import LATER_LOG, PUBLISHED_LOG

SVG = "{http://www.w3.org/2000/svg}"
LOG = "\n".join(
    ["train_batch_tokens:2048 train_seq_len:256 iterations:100 warmup_steps:2 max_wallclock_seconds:90.0"]
    + ["step:0/100 val_loss:6.9000 val_bpb:3.9000 train_time:0ms step_avg:0.00ms"]
    + [f"step:{step}/100 train_loss:{3 + 5 / step:.4f} train_time:{250 * step}ms" for step in range(1, 101)]
    + ["step:50/100 val_loss:3.1600 val_bpb:1.8500 train_time:12500ms"]
    + ["step:100/100 val_loss:3.0600 val_bpb:1.7500 train_time:25000ms"]
    + ["final_trellis_ans_roundtrip_exact val_loss:3.07000000 val_bpb:1.76000000"]
)


def write_log(path: Path, shift: float = 0.0) -> Path:
    """LOG with all its losses higher by `shift`."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(re.sub(r"train_loss:(\S+)", lambda found: f"train_loss:{float(found[1]) + shift:.4f}", LOG))
    return path


def lines_printed(capsys, *arguments: object) -> list[str]:
    plot.main([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


# --- Curves ---


def test_running_mean_keeps_a_straight_line_inside_and_ignores_what_is_far():
    straight = [Point(float(x), 2.0 * x) for x in range(20)]
    inside = plot.smoothed(straight, 6.0)[:-3]
    assert [p.y for p in inside] == pytest.approx([p.y for p in straight[:-3]])
    spike = [Point(float(x), 100.0 * (x == 10)) for x in range(20)]
    means = [p.y for p in plot.smoothed(spike, 4.0)]
    assert means[10] == pytest.approx(20.0)
    assert [x for x, mean in enumerate(means) if mean > 0] == [8, 9, 10, 11, 12]


@given(
    st.lists(
        st.dictionaries(st.integers(0, 50), st.floats(-9, 9), min_size=1).map(
            lambda values: [Point(float(x), values[x]) for x in sorted(values)]
        ),
        min_size=2,
        max_size=4,
    )
)
def test_band_is_mean_and_standard_deviation_where_all_runs_are(runs):
    """Held against numpy, at every point of the band."""
    band = plot.to_band([Curve(run, []) for run in runs])
    begin = max(run[0].x for run in runs)
    end = min(run[-1].x for run in runs)
    if begin > end:
        assert band.mean == []
        return
    xs = [point.x for point in band.mean]
    assert (xs[0], xs[-1]) == (begin, pytest.approx(end))
    values = np.array([np.interp(xs, [p.x for p in run], [p.y for p in run]) for run in runs])
    assert [point.y for point in band.mean] == pytest.approx(values.mean(axis=0), abs=1e-9)
    assert band.deviation == pytest.approx(values.std(axis=0, ddof=1), abs=1e-9)


def test_tokens_are_steps_times_the_tokens_of_a_step(tmp_path):
    path = write_log(tmp_path / "log.txt")
    by_tokens = plot.read_curve(path, "tokens", "loss", 0.0)
    by_steps = plot.read_curve(path, "steps", "loss", 0.0)
    assert [p.x for p in by_tokens.train] == [2048.0 * p.x for p in by_steps.train]
    assert by_tokens.train[-1].x == 100 * 2048


def test_published_log_gives_steps_seconds_and_bits_per_byte_and_tokens_if_it_tells_them(tmp_path):
    path = tmp_path / "train.log"
    path.write_text(PUBLISHED_LOG)
    assert plot.read_curve(path, "seconds", "bpb", 0.0) == ([], [(600.038, 1.2172)], 1.2243657)
    assert [p.x for p in plot.read_curve(path, "steps", "loss", 0.0).train] == [10, 13750]
    with pytest.raises(SystemExit, match=r"train\.log has no line with train_batch_tokens"):
        plot.main(["--x", "tokens", str(path)])
    # The line as the challenge's script prints it.
    header = (
        "train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000"
    )
    path.write_text(f"{header}\n{PUBLISHED_LOG}")
    assert plot.read_curve(path, "tokens", "loss", 0.0).train[-1].x == 13750 * 524288
    path.write_text(LATER_LOG)
    assert plot.read_curve(path, "steps", "bpb", 0.0).val == [(4945, 1.0756)]


# --- In the terminal ---


def test_run_alone_gives_its_name_a_falling_line_and_its_results(tmp_path, capsys):
    write_log(tmp_path / "my_run" / "log.txt")
    (tmp_path / "latest").symlink_to("my_run", target_is_directory=True)
    printed = [lines_printed(capsys, path) for path in (tmp_path / "latest", tmp_path / "latest" / "log.txt")]
    assert printed[0] == printed[1]
    heading, values, picture = printed[0]
    assert heading.startswith("loss, nats per token")
    assert re.fullmatch(r"my_run: 3\.05\d\d, stored 1\.7600 bpb", values)
    levels = [plot.BLOCKS.index(sign) for sign in picture]
    assert len(levels) > 30
    assert levels == sorted(levels, reverse=True)
    assert (levels[0], levels[-1]) == (7, 0)


def test_seeds_of_a_record_share_a_line_with_mean_and_deviation(tmp_path, capsys):
    for seed, shift in ((1, 0.0), (2, 0.1), (3, 0.5)):
        write_log(tmp_path / "2026-01-02_Idea" / f"train_seed{seed}.log", shift)
    _, values, _ = lines_printed(capsys, tmp_path / "2026-01-02_Idea", "--smooth", 0)
    mean = statistics.fmean([3.05, 3.15, 3.55])
    deviation = statistics.stdev([3.05, 3.15, 3.55])
    assert values == f"2026-01-02_Idea: {mean:.4f} +- {deviation:.4f}, stored 1.7600 +- 0.0000 bpb"


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_text_fits_the_terminal_and_compares_runs_on_one_scale(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    logs = [write_log(tmp_path / "low.txt"), write_log(tmp_path / "high.txt", 2.0)]
    heading, _, low, _, high = lines_printed(capsys, *logs)
    assert len(low) == len(high) == columns - 1
    bottom, top = (float(number) for number in re.findall(r"\d\.\d\d", heading))
    nats_per_level = (top - bottom) / len(plot.BLOCKS)
    for sign_of_low, sign_of_high in zip(low[columns // 2 :], high[columns // 2 :], strict=True):
        levels = plot.BLOCKS.index(sign_of_high) - plot.BLOCKS.index(sign_of_low)
        assert levels * nats_per_level == pytest.approx(2.0, abs=nats_per_level)


def test_terminal_without_blocks_and_python_without_packages_show_a_line(tmp_path):
    """-S leaves site-packages out; the standard library is enough."""
    path = write_log(tmp_path / "log.txt")
    command = [sys.executable, "-S", str(ROOT / "tools" / "plot.py"), str(path), "--y", "bpb"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "@" in done.stdout
    assert "1.7500, stored 1.7600 bpb" in done.stdout

    done = subprocess.run([*command, "--out", str(tmp_path / "x.png")], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "python -m pip install matplotlib" in done.stderr
    assert not (tmp_path / "x.png").exists()


# --- Pictures ---


def shapes_of(path: Path) -> tuple[list[str], int, int]:
    """The texts of an SVG, and how many lines and bands in one of the colours it has."""
    root = ElementTree.parse(path)
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    styles = [element.get("style", "") for element in root.iter(f"{SVG}path")]
    coloured = [style for style in styles if any(colour in style for colour in plot.COLOURS)]
    n_lines = sum("fill: none" in style for style in coloured)
    n_bands = sum("opacity: 0.25" in style for style in styles)
    # A band's shape is kept once, and used where the fill is.
    n_bands += sum("opacity: 0.25" in element.get("style", "") for element in root.iter(f"{SVG}use"))
    return texts, n_lines, n_bands


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_same_logs_give_the_same_bytes_on_another_day(tmp_path, suffix):
    path = write_log(tmp_path / "log.txt")
    pictures = []
    for number, day in enumerate(("1000000000", "1700000000")):
        out = tmp_path / f"{number}.{suffix}"
        command = [sys.executable, str(ROOT / "tools" / "plot.py"), "--out", str(out), str(path)]
        subprocess.run(command, env={**os.environ, "SOURCE_DATE_EPOCH": day}, check=True, capture_output=True)
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]


def test_picture_holds_the_seeds_as_curves_as_a_band_or_as_both(tmp_path):
    logs = [str(write_log(tmp_path / f"{name}.txt", 0.1 * number)) for number, name in enumerate("abc")]
    counts = {}
    for seeds in ("curves", "band", "both"):
        out = tmp_path / f"{seeds}.svg"
        plot.main(
            ["--out", str(out), "--seeds", seeds, "--line", "mine & <others> $5|$6", *logs[:2], "--line", "c", logs[2]]
        )
        texts, n_lines, n_bands = shapes_of(out)
        assert {"mine & <others> $5", "$6", "c", "seconds of training", "25"} <= set(texts)
        counts[seeds] = (n_lines, n_bands)
    assert counts == {"curves": (3, 0), "band": (2, 1), "both": (4, 1)}


def test_png_is_transparent_and_its_line_lies_where_the_log_says(tmp_path):
    """A constant loss gives one horizontal line, half way up."""
    from matplotlib.image import imread

    path = tmp_path / "flat.txt"
    path.write_text("\n".join(f"step:{step}/9 train_loss:2.0 train_time:{step}s" for step in range(1, 10)))
    plot.main(["--out", str(tmp_path / "x.png"), "--x", "steps", str(path)])
    pixels = imread(tmp_path / "x.png")  # (height, width, RGBA)
    assert pixels.shape[2] == 4
    assert pixels[0, :, 3].max() == 0
    orange = np.abs(pixels[..., :3] - np.array([0xE8, 0x74, 0x3B]) / 255).sum(axis=2) < 0.05
    # The name beside the line has the same colour, but not its length.
    rows = np.flatnonzero((orange & (pixels[..., 3] > 0.9)).sum(axis=1) > 400)
    assert 1 <= len(rows) <= 5


def contrast(colour: str, background: float) -> float:
    """The contrast ratio of WCAG 2, 1 to 21, to a grey background of that luminance."""
    luminance = 0.0
    for weight, begin in ((0.2126, 1), (0.7152, 3), (0.0722, 5)):
        part = int(colour[begin : begin + 2], 16) / 255
        luminance += weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
    brighter, darker = max(luminance, background), min(luminance, background)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("colour", [*plot.COLOURS, plot.GREY])
def test_colours_can_be_read_on_white_and_on_black(colour):
    """WCAG asks for 3 where shapes and bold words are to be told from their background."""
    assert contrast(colour, 1.0) >= 2.99
    assert contrast(colour, 0.0) >= 2.99


def test_names_beside_the_lines_stand_below_each_other():
    lines = [plot.Line(f"run {i}|second row", [Curve([Point(0, 1.0), Point(1, 1 + i / 100)], [])]) for i in range(9)]
    places = plot.names_beside(lines, Range(0.0, 2.0))
    assert [name for name, _, _ in places] == [f"run {i}\nsecond row" for i in reversed(range(9))]
    points = [place * plot.AXES_INCHES[1] * 72 for _, _, place in places]
    gaps = [above - below for above, below in itertools.pairwise(points)]
    assert min(gaps) >= 2 * plot.FONT_POINTS


# --- Logs that nobody should have ---


@pytest.mark.parametrize("out", [[], ["--out", "x.svg"]])
@pytest.mark.parametrize("text", ["", "step:1/9 train_loss:7.0 train_time:100ms", "no log at all"])
def test_log_without_a_curve_is_an_error_with_a_remedy(tmp_path, monkeypatch, text, out):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(text)
    with pytest.raises(SystemExit, match="fewer than two points"):
        plot.main([*out, "empty.txt"])
    assert not Path("x.svg").exists()


def test_folder_without_a_log_and_another_kind_of_picture_are_errors(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"is a folder without log\.txt"):
        plot.main([str(tmp_path)])
    for arguments in (["x.log", "--out", "x.gif"], []):
        with pytest.raises(SystemExit):
            plot.main(arguments)
    errors = capsys.readouterr().err
    assert "x.gif ends in neither .png nor .svg" in errors
    assert "no logs: name one" in errors


def test_curve_that_no_run_has_is_drawn_without_a_crash(tmp_path):
    """Steps in any order, or too large for a float; the time grew with the square of their number, 1.6 s for 4,000."""
    lines = [f"step:{9000 - i % 9000}/9000 train_loss:3.0 train_time:{i}ms\n" for i in range(60_000)]
    lines += [f"step:{'9' * 400}/9 train_loss:1.0 train_time:1ms\n", f"step:1/9 val_loss:{'9' * 400} train_time:1ms\n"]
    path = tmp_path / "log.txt"
    path.write_text("".join(lines))
    begin = time.process_time()
    plot.main(["--out", str(tmp_path / "x.svg"), "--x", "steps", str(path)])
    plot.main(["--x", "steps", str(path)])
    assert time.process_time() - begin < 10  # 1 on an idle machine
    ElementTree.parse(tmp_path / "x.svg")
