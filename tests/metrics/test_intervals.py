"""Confidence intervals: Student's quantile, and the means over seeds that tables show."""

import sys
from math import inf, pi, sqrt, tan

import pytest

from mm_piece.metrics.intervals import compute_interval, format_interval, student_quantile

# Published tables of the t distribution, two-sided 95 %.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042, 1000: 1.962}


@pytest.mark.parametrize("degrees", QUANTILES)
def test_quantiles_are_those_of_published_tables(degrees):
    assert round(student_quantile(degrees), 3) == QUANTILES[degrees]


def test_quantiles_are_those_of_scipy():
    special = pytest.importorskip("scipy.special")
    # the last scipy for Python 3.10 is right to ten digits; the closed forms below hold everywhere
    tolerance = 1e-10 if sys.version_info < (3, 11) else 1e-12
    for degrees in [*range(1, 100), 1000]:
        expected = float(special.stdtrit(degrees, 0.975))
        assert student_quantile(degrees) == pytest.approx(expected, rel=tolerance)


def test_quantiles_are_those_of_the_closed_forms():
    share = 0.95  # inside of the interval
    closed = {1: tan(pi * share / 2), 2: share * sqrt(2 / (1 - share**2))}
    for degrees, expected in closed.items():
        assert student_quantile(degrees) == pytest.approx(expected, rel=1e-13)


def test_an_interval_is_worked_by_hand():
    middle, half_width = compute_interval([1.0, 2.0, 3.0])
    assert middle == 2
    assert half_width == pytest.approx(4.302653 / sqrt(3), rel=1e-6)
    assert compute_interval([0.5]) == (0.5, inf)


def test_an_interval_is_shown_in_percent():
    assert format_interval([0.1, 0.2]) == "15.0 ± 63.5"
    assert format_interval([0.25]) == "25.0"
    assert format_interval([0.25], "+") == "+25.0"
