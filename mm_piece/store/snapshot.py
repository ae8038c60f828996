"""A part of a store, verified, as it is copied elsewhere: positions 0 to some position."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_piece.errors import RecipeError
from mm_piece.recipe import parse_recipe
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.manifest import ManifestEntry


@dataclass(frozen=True)
class StoreSnapshot:
    """Positions 0…at of a store, verified; messages call it `name`."""

    store: DeltaStore
    name: str
    base: dict[str, Any]
    entries: list[ManifestEntry]
    recipe: str
    results: dict[str, Any]
    answers: dict[int, dict[str, Any]]


def read_snapshot(store: DeltaStore, at: int | None) -> StoreSnapshot:
    """Read and verify positions 0…`at` of a store."""
    # verified before anything is copied
    entries = store.verify(at)
    answers = {}
    for position in range(len(entries) + 1):
        rows = store.answers(position)
        if rows:
            answers[position] = rows

    return StoreSnapshot(
        store=store,
        name=str(store.path),
        base=store.base,
        entries=entries,
        results=_truncate_results(store.results(), entries),
        recipe=store.recipe,
        answers=answers,
    )


def _truncate_results(
    results: dict[str, Any],
    entries: Sequence[ManifestEntry],
) -> dict[str, Any]:
    """Return the results measured at the base and at these positions."""
    num_rows = len(entries) + 1  # one for the base
    truncated = dict(results)
    for key in ("matrix", "base_ability"):
        if key in results:
            truncated[key] = results[key][:num_rows]

    kinds = results.get("base_kinds")
    if kinds:
        truncated["base_kinds"] = {kind: values[:num_rows] for kind, values in kinds.items()}

    tasks = {entry.task for entry in entries}
    for key in ("seconds", "stability"):
        by_task = results.get(key)
        if by_task:
            truncated[key] = _select_keys(by_task, tasks)
    return truncated


def _select_keys(
    content: dict[str, Any],
    keys: set[str],
) -> dict[str, Any]:
    """Return the items with some keys, in their order."""
    return {key: value for key, value in content.items() if key in keys}


def drop_unlearned_tasks(
    snapshot: StoreSnapshot,
    to: Path,
) -> StoreSnapshot:
    """Drop the tasks that were not learned from recipe and results; the recipe names `to`.

    A store that `train` did not make may have any text as its recipe, or one of other tasks: it
    stays as it is.
    """
    learned = [entry.task for entry in snapshot.entries]
    num_learned = len(learned)
    results = snapshot.results
    tasks_of_results = results.get("tasks", [])
    # a matrix has one column for each task of the recipe, learned or not
    if tasks_of_results[:num_learned] == learned:
        results = dict(results)
        results["tasks"] = learned
        results["matrix"] = [row[:num_learned] for row in results["matrix"]]
        snapshot = replace(snapshot, results=results)

    try:
        recipe = parse_recipe(snapshot.recipe)
    except RecipeError:
        return snapshot

    tasks = tuple(task for task in recipe.tasks if task.name in learned)
    if not tasks:
        return snapshot

    changes = {
        "tasks": tasks,
        "store": str(to),
    }
    recipe = recipe.model_copy(update=changes)
    text = recipe.to_yaml()
    return replace(snapshot, recipe=text)
