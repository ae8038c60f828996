"""Scores as both harnesses give them, in one form."""

from collections.abc import Mapping
from typing import Any, TypedDict


class Score(TypedDict):
    """What a metric found, and the standard error of it; None where there is none."""

    value: float
    stderr: float | None


Scores = dict[str, dict[str, Score]]  # task -> metric -> score

_STDERR_SUFFIX = "_stderr"


def parse_harness_results(results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """The numbers in a harness's results; keys `metric,filter` become `metric` or `metric filter`.

    Tasks without any number are left out: groups that are only a name for their tasks.
    """
    found = {task: _parse_metrics(metrics) for task, metrics in results.items()}
    return {task: scores for task, scores in found.items() if scores}


def _parse_metrics(metrics: Mapping[str, Any]) -> dict[str, Score]:
    numbers = {key: value for key, value in metrics.items() if "," in key and _is_number(value)}
    errors = {}
    for key, value in numbers.items():
        metric, of_error, _ = key.partition(_STDERR_SUFFIX)
        if of_error:  # of several kinds of standard error, the first
            errors.setdefault((metric, key.partition(",")[2]), float(value))
    return {
        metric if chosen == "none" else f"{metric} {chosen}": {
            "value": float(numbers[f"{metric},{chosen}"]),
            "stderr": errors.get((metric, chosen)),
        }
        for metric, _, chosen in (
            key.partition(",") for key in numbers if _STDERR_SUFFIX not in key
        )
    }


def _is_number(value: Any) -> bool:
    try:
        return float(value) == float(value)  # neither a text nor not-a-number
    except (TypeError, ValueError):
        return False
