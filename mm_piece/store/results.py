"""The results of a store, `results.json`: what one is, and the only ways in which they grow.

Every function returns new results and leaves the old ones as they are; `DeltaStore.update_results`
reads, changes and writes them as one step.
"""

from collections.abc import (
    Collection,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

TaskFacts = dict[str, dict[str, float]]  # by task, by name


class Results(TypedDict, total=False):
    """What was measured at the positions of a store; empty before the first row."""

    tasks: list[str]  # of the matrix's columns
    general: list[str]  # tasks that base ability is the mean of
    matrix: list[list[float]]  # fractions from 0 to 1; row t was measured after task t
    base_ability: list[float]  # one per row
    base_ability_name: str
    base_kinds: dict[str, list[float]]  # base ability by kind of question
    seconds: TaskFacts
    losses: TaskFacts  # by step: mean training loss of the steps since the one before
    stability: TaskFacts


class AnswerRecord(TypedDict):
    """One answer of a model, and what it scores."""

    row: int
    prompt: str
    answer: str
    prediction: str
    score: float


Answers = Mapping[str, Sequence[AnswerRecord]]  # by task


@dataclass(frozen=True)
class MeasuredRow:
    """The scores at one position."""

    tasks: Mapping[str, float]
    general: Mapping[str, float]
    kinds: Mapping[str, float]  # of the general tasks' questions


def add_row(
    results: Results,
    position: int,
    row: MeasuredRow,
) -> Results:
    """Add the row of a position; any later row goes."""
    earlier_rows = results.get("matrix", [])
    scores = list(row.tasks.values())
    added: Results = {
        **results,
        "tasks": list(row.tasks),
        "general": list(row.general),
        "matrix": [*earlier_rows[:position], scores],
    }
    if not row.general:
        return added

    earlier_abilities = results.get("base_ability", [])
    ability = sum(row.general.values()) / len(row.general)
    added["base_ability"] = [*earlier_abilities[:position], ability]
    added["base_ability_name"] = ", ".join(row.general)

    earlier_kinds = results.get("base_kinds", {})
    kinds = {}
    for kind, score in row.kinds.items():
        earlier_scores = earlier_kinds.get(kind, [])
        kinds[kind] = [*earlier_scores[:position], score]
    added["base_kinds"] = kinds
    return added


def remove_rows(results: Results) -> Results:
    """Return the results without what was measured at positions; facts of trainings stay."""
    remaining: Results = {**results}
    # of a recipe without general tasks, nothing is left of base ability
    for key in ("base_ability", "base_ability_name", "base_kinds"):
        remaining.pop(key, None)
    if "matrix" in results:
        remaining["matrix"] = []
    return remaining


def add_task_facts(
    results: Results,
    section: Literal["seconds", "losses", "stability"],
    task: str,
    facts: dict[str, float],
) -> Results:
    """Add what learning a task took, its training losses, or how stable its mask is."""
    facts_by_task = dict(results.get(section, {}))
    facts_by_task[task] = facts

    added: Results = {**results}
    added[section] = facts_by_task
    return added


def truncate_results(results: Results, tasks: Sequence[str]) -> Results:
    """Return the results measured at the base and after each of the first `tasks`."""
    num_rows = len(tasks) + 1  # one for the base
    truncated: Results = {**results}
    if "matrix" in results:
        truncated["matrix"] = results["matrix"][:num_rows]
    if "base_ability" in results:
        truncated["base_ability"] = results["base_ability"][:num_rows]

    kinds = results.get("base_kinds")
    if kinds:
        shortened = {}
        for kind, scores in kinds.items():
            shortened[kind] = scores[:num_rows]
        truncated["base_kinds"] = shortened

    if "seconds" in results:
        truncated["seconds"] = _pick_tasks(results["seconds"], tasks)
    if "losses" in results:
        truncated["losses"] = _pick_tasks(results["losses"], tasks)
    if "stability" in results:
        truncated["stability"] = _pick_tasks(results["stability"], tasks)
    return truncated


def drop_columns(results: Results, tasks: Sequence[str]) -> Results:
    """Return the results with the columns of the first `tasks` alone; others stay as they are."""
    num_tasks = len(tasks)
    columns = results.get("tasks", [])
    if columns[:num_tasks] != list(tasks):
        return results

    matrix = results.get("matrix", [])
    return {
        **results,
        "tasks": list(tasks),
        "matrix": [row[:num_tasks] for row in matrix],
    }


def parse_overlaps(
    results: Mapping[str, Any],
    task: str,
) -> list[tuple[int, float]]:
    """Return a task's numbers of examples and overlaps from a store's results, ascending."""
    return _parse_numbered(results, "stability", task)


def parse_losses(
    results: Mapping[str, Any],
    task: str,
) -> list[tuple[int, float]]:
    """Return a task's steps and training losses from a store's results, ascending."""
    return _parse_numbered(results, "losses", task)


def _parse_numbered(
    results: Mapping[str, Any],
    section: str,
    task: str,
) -> list[tuple[int, float]]:
    """Return a task's facts that have a number as their name.

    Results are data from a file: entries of another form are left out.
    """
    by_task = results.get(section, {})
    recorded = by_task.get(task, {})
    facts: list[tuple[int, float]] = []
    for name, value in recorded.items():
        # not isinstance: a boolean is no number; and one of JSON may have any size
        is_number = type(value) in (int, float) and abs(value) < 2**63
        if name.isdecimal() and len(name) < 19 and is_number:
            facts.append((int(name), value))

    facts.sort()
    return facts


def _pick_tasks(
    facts_by_task: TaskFacts,
    tasks: Collection[str],
) -> TaskFacts:
    return {task: facts for task, facts in facts_by_task.items() if task in tasks}
