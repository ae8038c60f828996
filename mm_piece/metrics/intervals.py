"""Means over seeds and their 95 % confidence intervals, by Student's t."""

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev


def compute_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its interval; the width is infinite for one value."""
    count = len(values)
    if count < 2:
        return mean(values), float("inf")

    from scipy.special import stdtrit  # of scipy.stats, which takes a second to import

    # two-sided 95 %: 2.5 % of the distribution lie above the quantile
    quantile = float(stdtrit(count - 1, 0.975))
    half_width = quantile * stdev(values) / sqrt(count)
    return mean(values), half_width


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
