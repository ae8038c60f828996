"""What is found before anything is trained: of the settings for both `check` and `train`.

`preflight` looks at settings alone and is quick. `check` goes on to the base and every row, and
tells all that is wrong with the data; `train` finds the same while it opens its store.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mm_piece import importance
from mm_piece.distributed import (
    ZeroConfig,
    without_deepspeed,
    zero_config,
)
from mm_piece.dtypes import as_dtype, dtype_name
from mm_piece.errors import RecipeError
from mm_piece.families import weights
from mm_piece.metrics.answers import ANSWER_METRICS
from mm_piece.models.base import (
    load_processor,
    max_positions_of,
    pick_reading_options,
)
from mm_piece.models.checkpoint import Checkpoint, fetch_checkpoint
from mm_piece.models.generation import find_ignored_settings
from mm_piece.recipe import Recipe, Task, as_recipe
from mm_piece.selection.task import require_selectable
from mm_piece.training.arguments import arguments, require_task_settings
from mm_piece.training.base_parts import BaseParts, require_options_fit
from mm_piece.training.data_check import ProgressWrapper, TaskCheck, check_task, iter_notes


@dataclass(frozen=True)
class Plan:
    """A recipe with sound settings, and how its processes are to share a model."""

    recipe: Recipe
    zero: ZeroConfig

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the base is held and trained in."""
        return dtype_of(self.recipe)


def preflight(recipe: Recipe, *, launched: bool = True) -> Plan:
    """Return the plan of a recipe whose settings fit each other and what is installed here.

    No base is loaded and no row is read. `launched` is false where nobody started the processes
    that a DeepSpeed configuration needs. Raises RecipeError, ModelError and SelectionError.
    """
    dtype = dtype_of(recipe)
    zero = zero_config(recipe.train, dtype_name(dtype))
    if launched:
        zero.require_launcher()

    # Trainer's arguments refuse what they do not know, and what does not fit together.
    settings = recipe.train
    if not launched:
        settings = without_deepspeed(settings)
    arguments(settings, Path(recipe.store), recipe.seed)
    for task in recipe.tasks:
        _require_task_settings_fit(recipe, task)

    importance.resolve_rule(recipe.select.method)
    for task in (*recipe.tasks, *recipe.general):
        score = ANSWER_METRICS[task.metric]
        score([], [])  # raises if the metric's library is missing

    return Plan(recipe, zero)


def _require_task_settings_fit(recipe: Recipe, task: Task) -> None:
    """Raise RecipeError for a task's own settings that do not fit each other or the recipe's."""
    if not task.train_settings:
        return

    require_task_settings(task)
    settings = recipe.train_of(task)
    try:
        zero_config(settings, dtype_name(dtype_of(recipe)))
        arguments(without_deepspeed(settings), Path(recipe.store), recipe.seed)
    except RecipeError as error:
        raise RecipeError(f"task {task.name!r}: {error}") from error


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Return the dtype of a recipe's base; ModelError for what is no dtype to train in."""
    name = recipe.model.get("dtype", "float32")
    return as_dtype(name)


def base_checkpoint_of(recipe: Recipe, dtype: torch.dtype) -> Checkpoint:
    """Return the files of a recipe's base, downloaded where they must be."""
    files = pick_reading_options(recipe.model)
    folder = fetch_checkpoint(recipe.base, recipe.revision, **files)
    return Checkpoint(folder, dtype, **files)


@dataclass
class RecipeCheck:
    """Every task of a recipe; sound if no split has an error."""

    tasks: list[TaskCheck]
    max_positions: int  # that the base was made for
    base_notes: list[str] = field(default_factory=list)  # notes on it

    @property
    def notes(self) -> list[str]:
        """What is no error and most likely not meant, a line each."""
        notes = list(self.base_notes)
        for task in self.tasks:
            for split in task.splits:
                split_notes = iter_notes(split, task.max_length, self.max_positions)
                notes += [f"{split.source}: {note}" for note in split_notes]
        return notes

    @property
    def errors(self) -> list[str]:
        """All errors, each one line that names source and row."""
        errors = []
        for task in self.tasks:
            for split in task.splits:
                errors += split.errors
        # two tasks may share a source: each of its errors once
        return list(dict.fromkeys(errors))

    def to_dict(self) -> dict[str, Any]:
        """The whole as plain values, for JSON."""
        return {
            "tasks": [asdict(task) for task in self.tasks],
            "notes": self.notes,
            "errors": self.errors,
        }


def _show_no_progress(items: Iterable[Any], title: str) -> Iterable[Any]:
    return items


def check(
    recipe: str | Path | Recipe,
    *overrides: str,
    rows: int = 1000,
    progress: ProgressWrapper = _show_no_progress,
) -> RecipeCheck:
    """Look at a recipe's settings, base and data as training would, and write nothing.

    Every row is read and its images' headers are looked at; `rows` of each source, evenly spread,
    are decoded and tokenized. Raises RecipeError, ModelError and SelectionError for what is wrong
    with the recipe itself. What is wrong with the data stands in the result, all of it.
    """
    recipe = as_recipe(recipe, overrides)
    plan = preflight(recipe, launched=False)

    files = pick_reading_options(recipe.model)
    processor = load_processor(recipe.base, recipe.revision, **files)
    require_options_fit(recipe.base, recipe.revision, recipe.model)
    parts = BaseParts(recipe.base, recipe.revision, processor, **files)
    base_notes = [*_iter_base_notes(plan, parts)]

    tasks = []
    for task in (*recipe.tasks, *recipe.general):
        checked = check_task(task, parts, rows, progress)
        tasks.append(checked)

    max_positions = max_positions_of(recipe.base, recipe.revision, **files)
    return RecipeCheck(tasks, max_positions, [*parts.notes, *base_notes])


def _iter_base_notes(plan: Plan, parts: BaseParts) -> Iterator[str]:
    """Yield notes on what nothing reads of a base's files.

    Raises SelectionError unless the base has entries to select, and ModelError for a folder with a
    weight that is not finite. A base on the Hub is not downloaded for that.
    """
    recipe = plan.recipe
    shapes = {}
    for name, weight in weights(parts.model).items():
        shapes[name] = tuple(weight.shape)
    require_selectable(recipe, shapes)

    if Path(recipe.base).is_dir():
        checkpoint = base_checkpoint_of(recipe, plan.dtype)
        checkpoint.require_finite()
        unread = checkpoint.skeleton.unread
        if unread:
            yield (
                f"{recipe.base}: nothing reads {len(unread)} tensors of its files, "
                f"{unread[0]} first"
            )

    files = pick_reading_options(recipe.model)
    ignored = find_ignored_settings(recipe.base, recipe.revision, **files)
    if ignored:
        yield (
            "base: answers are greedy, of its generation settings nothing reads "
            f"{', '.join(ignored)}"
        )
