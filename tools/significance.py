"""How likely a difference between two sets of seeds is by chance: Welch's and Student's one-sided t-tests.

    from significance import below, welch

    welch([1.20, 1.21, 1.19], [1.10, 1.11, 1.09], min_gain=0.002)   # p-value of "the gain is at most 0.002"
    below(1.2244, [1.2240, 1.2238, 1.2241])                         # p-value of "the mean is not below 1.2244"

Written out here, because it is all that the project would need SciPy for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def welch(old: Sequence[float], new: Sequence[float], min_gain: float = 0.0) -> float | None:
    """One-sided p-value of "mean(old) - mean(new) is at most min_gain"; None if a side has fewer than two values."""
    if len(old) < 2 or len(new) < 2:
        return None
    excess = statistics.fmean(old) - statistics.fmean(new) - min_gain

    old_variance = statistics.variance(old) / len(old)  # of the mean
    new_variance = statistics.variance(new) / len(new)
    total = old_variance + new_variance
    if total == 0.0:  # without any spread, the difference is what it is
        if excess == 0.0:
            return 0.5
        return 0.0 if excess > 0 else 1.0

    # The degrees of freedom after Welch and Satterthwaite.
    old_share = old_variance / total
    df = 1.0 / (old_share**2 / (len(old) - 1) + (1.0 - old_share) ** 2 / (len(new) - 1))
    return student_tail(excess / math.sqrt(total), df)


def below(target: float, values: Sequence[float]) -> float:
    """One-sided p-value of "the mean is not below target"; 1 for a single value, which shows no spread."""
    if len(values) < 2:
        return 1.0
    excess = target - statistics.fmean(values)
    deviation = statistics.stdev(values)
    if deviation == 0.0:  # without any spread, the difference is what it is
        if excess == 0.0:
            return 0.5
        return 1.0 if excess < 0 else 0.0
    return student_tail(excess / deviation * math.sqrt(len(values)), len(values) - 1)


def student_tail(t: float, df: float) -> float:
    """P(T >= t) of Student's t distribution with df degrees of freedom.

    For t >= 0 this is half the regularized incomplete beta function I_x(df / 2, 1 / 2) at x = df / (df + t^2).
    """
    if t < 0:
        return 1.0 - student_tail(-t, df)
    a = df / 2
    b = 0.5
    ratio = t * t / df
    x = 1.0 / (1.0 + ratio)
    if x == 0.0:
        return 0.0
    if ratio == 0.0:
        return 0.5

    rest = ratio / (1.0 + ratio)  # 1 - x, without cancellation
    log_factor = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    factor = math.exp(log_factor)

    # The continued fraction converges fast on one side of the mean of the beta distribution; on the other side,
    # I_x(a, b) = 1 - I_(1-x)(b, a).
    if x < (a + 1) / (a + b + 2):
        return 0.5 * factor * beta_fraction(x, a, b) / a
    return 0.5 * (1.0 - factor * beta_fraction(rest, b, a) / b)


def student_quantile(p: float, df: float) -> float:
    """The t that Student's t distribution with df degrees of freedom stays below with probability p; p is above 1/2.

    Found by bisection. Infinity without any degree of freedom.
    """
    if df <= 0:
        return math.inf
    high = 1.0
    while student_tail(high, df) > 1.0 - p:
        high *= 2
    low = 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if student_tail(middle, df) > 1.0 - p:
            low = middle
        else:
            high = middle
    return high


def beta_fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    tiny = 1e-300  # stands in for a zero that the method would divide by
    c = 1.0
    d = 1.0 / ((1.0 - (a + b) * x / (a + 1.0)) or tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / ((1.0 + term * d) or tiny)
            c = (1.0 + term / c) or tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value
