"""The store that a recipe's run goes on with: found, and the same run's as far as it has come."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mm_piece import distributed
from mm_piece.errors import (
    BaseError,
    PieceError,
    StoreError,
    format_value,
)
from mm_piece.evaluation.matrix import count_measured_rows
from mm_piece.evaluation.recorded_answers import forget_measurements
from mm_piece.recipe import Recipe, Task
from mm_piece.store.base_location import locate_base
from mm_piece.store.base_reading import trained_dtype
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.folder import is_store, require_unused
from mm_piece.store.manifest import require_folders_inside
from mm_piece.training.preflight import Plan, base_checkpoint_of

# Settings of a selection that change no result.
_RESOURCE_SETTINGS = {"memory", "accumulators", "cache"}

# Settings that divide a step's examples: they may change as long as a step has as many.
_BATCH_SETTINGS = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    *distributed.PROCESS_SETTINGS,
}

# Keys of a recipe that may differ from those of the run that made the store.
_FREE_KEYS = ("store", "base", "revision", "cache", "general")

# Keys of a task that change no delta: where they differ, positions are measured again.
_TEST_KEYS = {"test", "metric", "max_new_tokens"}


class _Absent:
    """What stands in a message for a setting that is not there; null is a value."""

    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def find_store(plan: Plan) -> DeltaStore | None:
    """Open the store that a recipe goes on with; None where a new one is to be created.

    A store without deltas takes any recipe, and then counts as new. Raises StoreError if the store
    is another run's, or if its folder holds something else, and what `verify` finds of its files.
    """
    path = Path(plan.recipe.store)
    is_new = distributed.broadcast(not is_store(path))
    if is_new:
        if distributed.is_main():
            require_unused(path)
        return None

    store = DeltaStore.open(path)
    if _is_replaceable(store, plan.recipe):
        return None

    _require_files(store)
    _require_same_base(store, plan.recipe)
    recorded = _require_same_recipe(store, plan.recipe)
    _require_same_batch_sizes(store, recorded, plan.recipe)

    forget_measurements(store, recorded, plan.recipe)
    if distributed.is_main():
        store.write_recipe(plan.recipe.to_yaml())
    # the others read its results next: they must not see rows that are gone
    distributed.barrier()
    return store


def require_fitting_store(plan: Plan) -> None:
    """Raise what `find_store` would raise of a recipe's store, and write nothing.

    A step's number of examples is left out, as it depends on how many processes will train; and so
    are the weights of a base on the Hub, which would have to be downloaded.
    """
    path = Path(plan.recipe.store)
    if not is_store(path):
        require_unused(path)
        return

    store = DeltaStore.open(path)
    if _is_replaceable(store, plan.recipe):
        return

    _require_files(store)
    if Path(plan.recipe.base).is_dir():
        _require_same_base(store, plan.recipe)
    _require_same_recipe(store, plan.recipe)


def _is_replaceable(store: DeltaStore, recipe: Recipe) -> bool:
    """Whether a store has no deltas, and is of another recipe: a new one takes its place."""
    return not len(store) and store.recipe != recipe.to_yaml()


def is_finished(store: DeltaStore, recipe: Recipe) -> bool:
    """Whether a store has learned and measured every task of a recipe."""
    num_tasks = len(recipe.tasks)
    num_rows = count_measured_rows(store, recipe)
    return len(store) >= num_tasks and num_rows > num_tasks  # the first row is the base's


def _require_files(store: DeltaStore) -> None:
    """Raise what `verify` finds of the deltas' files: one is missing, or not what is listed.

    A finished run reads none of them otherwise.
    """
    for position in range(1, len(store) + 1):
        try:
            store.data(position)
        except PieceError as error:
            raise type(error)(f"position {position}: {error}") from error


def _require_same_recipe(store: DeltaStore, recipe: Recipe) -> Recipe:
    """Return the recipe of a store; raise StoreError unless it is this one, so far as it goes.

    Tasks may have been added at the end.
    """
    ignored_keys = {
        "select": _RESOURCE_SETTINGS,
        "train": _BATCH_SETTINGS,
        "tasks": {
            "__all__": {
                "train_settings": _BATCH_SETTINGS,
                **dict.fromkeys(_TEST_KEYS, True),
            }
        },
    }
    recorded = store.load_recipe()
    before = recorded.model_dump(exclude=ignored_keys)
    after = recipe.model_dump(exclude=ignored_keys)

    num_tasks = len(before["tasks"])
    after["tasks"] = after["tasks"][:num_tasks]
    for key in before:
        if key in _FREE_KEYS:
            continue
        for place, old, new in _iter_differences(before[key], after[key], key):
            raise StoreError(
                f"store {store.path} was made by a recipe with another {key!r}: "
                f"{place} was {format_value(old)}, here it is {format_value(new)}; "
                "only tasks at the end may be added: use a new store"
            )
    return recorded


def _iter_differences(
    before: Any,
    after: Any,
    place: str,
) -> Iterator[tuple[str, Any, Any]]:
    """Yield where two settings differ, and both values; `_ABSENT` for one that is not there."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            old = before.get(key, _ABSENT)
            new = after.get(key, _ABSENT)
            yield from _iter_differences(old, new, f"{place}.{key}")
    elif isinstance(before, tuple) and isinstance(after, tuple):
        pairs = zip_longest(before, after, fillvalue=_ABSENT)
        for number, (old, new) in enumerate(pairs):
            yield from _iter_differences(old, new, f"{place}[{number}]")
    elif before != after:
        yield place, before, after


def _require_same_batch_sizes(
    store: DeltaStore,
    recorded: Recipe,
    recipe: Recipe,
) -> None:
    """Raise StoreError if a step of any recorded task had another number of examples.

    A recipe does not say how many processes share a step; the last delta's step size does.
    """
    position = len(store)
    if not position:
        return

    last_task = recorded.tasks[position - 1]
    last_delta = store.delta(position)
    num_examples = last_delta.info.get("batch", batch_size_of(recipe, recipe.tasks[position - 1]))
    num_processes = num_examples / _batch_size_of_process(recorded, last_task)

    for recorded_task, task in zip(recorded.tasks, recipe.tasks, strict=False):  # some are added
        before = round(num_processes * _batch_size_of_process(recorded, recorded_task))
        now = batch_size_of(recipe, task)
        if before != now:
            raise StoreError(
                f"store {store.path} learns {before} examples of {task.name!r} a step, here it "
                f"would be {now}: processes times per_device_train_batch_size times "
                "gradient_accumulation_steps"
            )


def _require_same_base(store: DeltaStore, recipe: Recipe) -> None:
    """Raise BaseError unless the base has the store's weights, wherever the two lie by now."""
    require_folders_inside(store.path)
    base_location = locate_base(recipe.base, recipe.revision, store.path)
    if store.base.with_facts(base_location) == store.base:
        return

    dtype = trained_dtype(store.base, store.path)
    base = base_checkpoint_of(recipe, dtype)
    if base.compute_fingerprint() != store.base.fingerprint:
        raise BaseError(f"store {store.path} was made on another base than {recipe.base}")


def batch_size_of(recipe: Recipe, task: Task) -> int:
    """Return how many examples of a task a step learns, on all processes together."""
    return _batch_size_of_process(recipe, task) * distributed.world_size()


def _batch_size_of_process(recipe: Recipe, task: Task) -> int:
    """Return how many examples of a task one process learns in a step."""
    settings = recipe.train_of(task)
    per_batch = settings.get("per_device_train_batch_size", 8)
    accumulated = settings.get("gradient_accumulation_steps", 1)
    return per_batch * accumulated
