"""Means over seeds and their 95 % confidence intervals, by Student's t."""

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

from scipy.special import stdtrit  # of scipy.stats, which takes a second to import


def compute_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its interval; the width is infinite for a single value."""
    if len(values) < 2:
        return mean(values), float("inf")
    quantile = float(stdtrit(len(values) - 1, 0.975))
    return mean(values), quantile * stdev(values) / sqrt(len(values))


def format_interval(values: Sequence[float], sign: str = "") -> str:
    """Fractions in percent: mean ± half the interval; the mean alone for a single value."""
    middle, half = compute_interval([100 * value for value in values])
    return f"{middle:{sign}.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")
