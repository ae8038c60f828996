"""A part of a store, verified, as it is copied elsewhere: positions 0 to some position."""

from dataclasses import dataclass, replace
from pathlib import Path

from mm_piece.errors import RecipeError
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.records import BaseRecord, ManifestEntry
from mm_piece.store.results import Answers, Results, drop_columns, truncate_results


@dataclass(frozen=True)
class StoreSnapshot:
    """Positions 0…at of a store, verified; messages call it `name`."""

    store: DeltaStore
    name: str
    base: BaseRecord
    entries: list[ManifestEntry]
    recipe: str
    results: Results
    answers: dict[int, Answers]


def read_snapshot(store: DeltaStore, at: int | None) -> StoreSnapshot:
    """Read and verify positions 0…`at` of a store."""
    # verified before anything is copied
    entries = store.verify(at)
    tasks = [entry.task for entry in entries]
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
        results=truncate_results(store.results(), tasks),
        recipe=store.recipe,
        answers=answers,
    )


def drop_unlearned_tasks(
    snapshot: StoreSnapshot,
    to: Path,
) -> StoreSnapshot:
    """Drop the tasks that were not learned from recipe and results; the recipe names `to`.

    A store that `train` did not make may have any text as its recipe, or one of other tasks: it
    stays as it is.
    """
    from mm_piece.recipe import parse_recipe

    learned = [entry.task for entry in snapshot.entries]
    # a matrix has one column for each task of the recipe, learned or not
    results = drop_columns(snapshot.results, learned)
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
