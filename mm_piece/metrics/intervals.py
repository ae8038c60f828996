"""Means over seeds and their 95 % confidence intervals, by Student's t."""

from collections.abc import Sequence
from math import cos, pi, sin, sqrt, tan
from statistics import mean, stdev

_CONFIDENCE = 0.95
_HALVINGS = 60  # of an interval that begins at π / 2: more than a float can tell apart


def compute_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its interval; the width is infinite for one value."""
    count = len(values)
    if count < 2:
        return mean(values), float("inf")

    half_width = student_quantile(count - 1) * stdev(values) / sqrt(count)
    return mean(values), half_width


def student_quantile(degrees: int) -> float:
    """Return the t whose interval −t … t holds 95 % of Student's distribution."""
    # as an angle θ, with t = √degrees · tan θ
    low, high = 0.0, pi / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _compute_coverage(middle, degrees) < _CONFIDENCE:
            low = middle
        else:
            high = middle
    return sqrt(degrees) * tan(low)


def _compute_coverage(angle: float, degrees: int) -> float:
    """Return the probability of −t … t, by Abramowitz and Stegun's finite sums 26.7.3 and 26.7.4.

    Powers of cos θ are odd for odd degrees of freedom, and even for even ones.
    """
    is_odd = degrees % 2 == 1
    power = 1 if is_odd else 0
    term = cos(angle) ** power
    total = 0.0
    while power <= degrees - 2:
        total += term
        term *= cos(angle) ** 2 * (power + 1) / (power + 2)
        power += 2

    share = sin(angle) * total
    if is_odd:
        return 2 / pi * (angle + share)
    return share


def format_interval(
    values: Sequence[float],
    sign: str = "",
) -> str:
    """Return fractions in percent: mean ± half the interval; the mean alone for a single value.

    With the `sign` `+`, means above zero have one too.
    """
    percents = [100 * value for value in values]
    middle, half_width = compute_interval(percents)
    text = f"{middle:{sign}.1f}"
    if len(values) > 1:
        text += f" ± {half_width:.1f}"
    return text
