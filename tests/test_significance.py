"""tools/significance.py against closed forms, printed tables, numerical integration and simulation."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from significance import below, student_tail, welch


def closed_form(t: float, df: int) -> float:
    """P(T >= t) where elementary functions give it."""
    return {
        1: 0.5 - math.atan(t) / math.pi,
        2: 0.5 - t / (2 * math.sqrt(2 + t * t)),
        4: 0.5 - t * (t * t + 6) / (2 * (t * t + 4) ** 1.5),
    }[df]


@pytest.mark.parametrize("df", [1, 2, 4])
def test_tail_equals_its_closed_forms(df: int):
    for t in (-30.0, -2.5, -1.0, -1e-3, 0.0, 1e-200, 1e-8, 0.3, 1.0, 2.0, 3.747, 12.0, 40.0, 1e8):
        assert student_tail(t, df) == pytest.approx(closed_form(t, df), rel=1e-9, abs=1e-13)


def test_tail_at_tabulated_quantiles():
    """Degrees of freedom, probability and quantile, to three decimals, from printed tables."""
    table = [
        *((1, 0.01, 31.821), (2, 0.01, 6.965), (3, 0.05, 2.353), (4, 0.01, 3.747), (5, 0.025, 2.571)),
        *((10, 0.01, 2.764), (20, 0.005, 2.845), (30, 0.01, 2.457), (60, 0.05, 1.671), (120, 0.01, 2.358)),
    ]
    for df, p, quantile in table:
        assert student_tail(quantile, df) == pytest.approx(p, abs=4e-4 * p / 0.01 + 1e-5)


@pytest.mark.parametrize(("df", "t"), [(1.3, 4.0), (2.7, 0.2), (5.5, 1.5), (17.2, 4.0), (300.0, 1.5)])
def test_tail_equals_the_integrated_density(df: float, t: float):
    """Simpson's rule over u = atan(x / sqrt(df)), which makes the density a power of the cosine."""
    high = math.pi / 2
    n = 20_000

    def area(start: float) -> float:
        h = (high - start) / n
        inner = (max(math.cos(start + i * h), 0.0) ** (df - 1) * (4 if i % 2 else 2) for i in range(1, n))
        return h / 3 * (math.cos(start) ** (df - 1) + sum(inner))

    # For df < 2 the power is steep near the end; the error is that of the last step, bounded by h ** df.
    low = math.atan(t / math.sqrt(df))
    assert student_tail(t, df) == pytest.approx(0.5 * area(low) / area(0.0), rel=2e-5)


def test_p_values_are_uniform_where_nothing_was_gained():
    """Of many pairs of samples whose means differ by just min_gain, a share p has a p-value below p."""
    rng = random.Random(0)
    found = []
    for _ in range(4000):
        old = [rng.gauss(0.002, 1e-3) for _ in range(4)]
        new = [rng.gauss(0, 1e-3) for _ in range(4)]
        found.append(welch(old, new, 0.002))
    for p in (0.01, 0.05, 0.25, 0.5):
        share = sum(x is not None and x < p for x in found) / len(found)
        assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / len(found)))  # exact for equal spreads


def test_welch_on_a_worked_example():
    """The p-value by the textbook's formulas, step by step, and one whose closed form is known."""
    old = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9]
    new = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8]
    a = statistics.variance(old) / 6
    b = statistics.variance(new) / 7
    df = (a + b) ** 2 / (a * a / 5 + b * b / 6)
    t = (sum(new) / 7 - sum(old) / 6) / math.sqrt(a + b)
    assert welch(new, old) == pytest.approx(student_tail(t, df), rel=1e-12)

    # Equal sizes n and equal spreads have 2 n - 2 degrees of freedom.
    assert welch([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == pytest.approx(closed_form(1 / math.sqrt(2 / 3), 4), rel=1e-12)


def test_welch_without_spread_or_with_one_seed():
    assert welch([1.0, 1.0], [0.9, 0.9]) == 0.0
    assert welch([1.0, 1.0], [1.1, 1.1]) == 1.0
    assert welch([1.0, 1.0], [1.0, 1.0]) == 0.5
    assert welch([1.0], [0.9, 0.8, 0.7]) is None
    assert welch([1.0, 0.9], [0.8]) is None


samples = st.lists(st.floats(0.1, 10.0), min_size=2, max_size=7)


@given(old=samples, new=samples, gain=st.floats(0.0, 1.0), shift=st.floats(0.0, 3.0))
def test_p_is_a_probability_symmetric_and_falls_with_the_difference(
    old: list[float], new: list[float], gain: float, shift: float
):
    p = welch(old, new, gain)
    assert p is not None
    assert 0.0 <= p <= 1.0
    swapped = welch(new, old, -gain)
    assert swapped is not None
    assert p + swapped == pytest.approx(1.0, abs=1e-9)
    if len(set(old)) > 1 or len(set(new)) > 1:  # else rounding may make a spread of a shift
        better = welch(old, [x - shift for x in new], gain)
        assert better is not None
        assert better <= p + 1e-9


def test_below_is_the_test_of_one_sample():
    values = [1.0, 2.0, 3.0]  # mean 2, deviation 1
    assert below(3.0, values) == pytest.approx(closed_form(math.sqrt(3), 2), rel=1e-12)
    assert below(1.0, values) == pytest.approx(1 - closed_form(math.sqrt(3), 2), rel=1e-12)
    assert below(2.0, [1.0]) == 1.0
    assert (below(2.0, [1.0, 1.0]), below(1.0, [2.0, 2.0])) == (0.0, 1.0)
