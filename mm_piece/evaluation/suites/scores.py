"""Scores of a harness in one form: a value and its standard error, by task and metric.

Both harnesses return numbers under keys `metric,filter`, where a filter extracts answers from
texts, and standard errors under `metric_stderr,filter`.
"""

from collections.abc import Mapping
from typing import Any, TypedDict


class Score(TypedDict):
    """Value of a metric, and its standard error (None without any)."""

    value: float
    stderr: float | None


Scores = dict[str, dict[str, Score]]  # task -> metric -> score

_STDERR_SUFFIX = "_stderr"


def parse_harness_results(results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """Return the numbers in a harness's results; keys become `metric` or `metric filter`.

    Leaves out tasks without any number, such as groups that only name their tasks.
    """
    found = {}
    for task, metrics in results.items():
        # a group without a mean has no numbers
        scores = _parse_metrics(metrics)
        if scores:
            found[task] = scores
    return found


def _parse_metrics(metrics: Mapping[str, Any]) -> dict[str, Score]:
    numbers = {}
    errors = {}
    for key, value in metrics.items():
        name, comma, text_filter = key.partition(",")
        if not comma or not _is_number(value):  # also the task's alias
            continue

        metric, is_error, _ = key.partition(_STDERR_SUFFIX)
        if not is_error:
            numbers[name, text_filter] = float(value)
        else:
            # a metric may have several kinds of standard error: the first counts
            errors.setdefault((metric, text_filter), float(value))

    scores: dict[str, Score] = {}
    for (metric, text_filter), value in numbers.items():
        title = metric
        if text_filter != "none":
            title = f"{metric} {text_filter}"
        error = errors.get((metric, text_filter))
        scores[title] = {"value": value, "stderr": error}
    return scores


def _is_number(value: Any) -> bool:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return False
    return number == number  # not-a-number, which harnesses use for "none", differs from itself
