"""What is wrong with a recipe's settings, found before a base is loaded or a row is read.

Both `check` and `train` begin with it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from mm_piece import importance
from mm_piece.distributed import (
    ZeroConfig,
    without_deepspeed,
    zero_config,
)
from mm_piece.dtypes import as_dtype, dtype_name
from mm_piece.errors import RecipeError
from mm_piece.metrics.answers import ANSWER_METRICS
from mm_piece.models.base import pick_reading_options
from mm_piece.models.checkpoint import Checkpoint, fetch_checkpoint
from mm_piece.recipe import Recipe, Task
from mm_piece.training.arguments import arguments, require_task_settings


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
        message = str(error).removeprefix("train: ")
        raise RecipeError(f"task {task.name!r}: train_settings: {message}") from error


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Return the dtype of a recipe's base; ModelError for what is no dtype to train in."""
    name = recipe.model.get("dtype", "float32")
    return as_dtype(name)


def base_checkpoint_of(recipe: Recipe, dtype: torch.dtype) -> Checkpoint:
    """Return the files of a recipe's base, downloaded where they must be."""
    files = pick_reading_options(recipe.model)
    folder = fetch_checkpoint(recipe.base, recipe.revision, **files)
    return Checkpoint(folder, dtype, **files)
