"""What `mm-piece check` finds of a recipe: its settings, base, data and store, before training.

`train` finds the same while it opens its store, and stops at the first that is wrong.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mm_piece.data.chat_template import find_default_system_prompt
from mm_piece.data.processor import tokenizer_of
from mm_piece.errors import PieceError, format_value
from mm_piece.families import weights
from mm_piece.models.base import (
    load_processor,
    max_positions_of,
    pick_reading_options,
)
from mm_piece.models.generation import find_ignored_settings
from mm_piece.recipe import Recipe, as_recipe
from mm_piece.selection.task import require_selectable
from mm_piece.training.base_parts import BaseParts, require_options_fit
from mm_piece.training.data_check import ProgressWrapper, TaskCheck, check_task, iter_notes
from mm_piece.training.preflight import Plan, base_checkpoint_of, preflight
from mm_piece.training.store_setup import require_fitting_store


@dataclass
class RecipeCheck:
    """Every task of a recipe; sound if no split has an error."""

    tasks: list[TaskCheck]
    max_positions: int  # that the base was made for
    base_notes: list[str] = field(default_factory=list)  # notes on it
    store_error: str | None = None  # why the recipe's store cannot be created or continued

    @property
    def notes(self) -> list[str]:
        """What is no error and most likely not meant, a line each."""
        notes = list(self.base_notes)
        for task in self.tasks:
            for split in task.splits:
                split_notes = iter_notes(task, split, self.max_positions)
                notes += [f"{split.source}: {note}" for note in split_notes]
        return notes

    @property
    def is_readable(self) -> bool:
        """Whether every source could be opened; rows may still be wrong."""
        return all(split.readable for task in self.tasks for split in task.splits)

    @property
    def errors(self) -> list[str]:
        """All errors, each one line that names source and row."""
        errors = []
        for task in self.tasks:
            for split in task.splits:
                errors += split.errors
        if self.store_error:
            errors.append(self.store_error)
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
    notes = [*parts.notes, *base_notes]
    found = RecipeCheck(tasks, max_positions, notes)
    # a wrong path would be named twice, as one that is not the store's too
    if found.is_readable:
        found.store_error = _find_store_error(plan)
    return found


def _find_store_error(plan: Plan) -> str | None:
    """Return why `train` would refuse the recipe's store, as far as no model is needed for it."""
    try:
        require_fitting_store(plan)
    except PieceError as error:
        return str(error)
    return None


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

    system_prompt = find_default_system_prompt(parts.processor)
    if system_prompt:
        encoded = tokenizer_of(parts.processor)(system_prompt, add_special_tokens=False)
        num_tokens = len(encoded["input_ids"])
        yield (
            f"the base's chat template begins every row without a system text with one of "
            f"{num_tokens} tokens: {format_value(system_prompt, 100)}"
        )

    files = pick_reading_options(recipe.model)
    ignored = find_ignored_settings(recipe.base, recipe.revision, **files)
    if ignored:
        yield (
            f"{', '.join(ignored)} in the base's generation settings: without effect, answers are "
            "greedy and end at a task's `max_new_tokens`"
        )
