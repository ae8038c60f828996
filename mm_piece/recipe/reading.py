"""Recipes out of YAML, with overrides from the command line.

Whatever is wrong with a recipe becomes a RecipeError of one line.
"""

from collections.abc import Iterable
from pathlib import Path

import yaml
from pydantic import ValidationError

from mm_piece.errors import RecipeError, as_path
from mm_piece.recipe.base_options import HONOURED
from mm_piece.recipe.parsing import (
    YAML,
    RecipeLoader,
    parse_mapping,
    read_text,
)
from mm_piece.recipe.problems import Places, Sections, format_problem
from mm_piece.recipe.schema import GeneralTask, Recipe, Task
from mm_piece.recipe.select import SelectionSettings
from mm_piece.recipe.train_keys import RUN_KEYS, TASK_KEYS

_SECTIONS: Sections = {
    "tasks": Task,
    "general": GeneralTask,
    "select": SelectionSettings,
}
# Where a key that stands somewhere else belongs.
KEY_PLACES: Places = {
    "beside `tasks`": set(Recipe.model_fields),
    "in a task of `tasks`": set(Task.model_fields),
    "under `select`": set(SelectionSettings.model_fields),
    "under `train`": RUN_KEYS | TASK_KEYS,
    "under a task's `train_settings`": TASK_KEYS,
    "under `model`": set(HONOURED),
}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, with `key=value` overrides (dotted keys, list positions by number).

    Raises RecipeError in one line: file missing, YAML broken, key unknown (with the nearest known
    one), value out of range.
    """
    file = as_path(path, "recipe")
    text = read_text(file, "recipe")
    return parse_recipe(text, str(path), overrides)


def as_recipe(recipe: str | Path | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """Return a recipe as it is, or read its file with overrides.

    Raises RecipeError as `load_recipe` does, and for overrides of a recipe that was read already.
    """
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides)

    for override in overrides:
        raise RecipeError(
            f"{override!r} overrides a recipe's file, and this recipe was read already: "
            "name its file, or change it by `model_copy`"
        )
    return recipe


def parse_recipe(
    text: str,
    source: str = "recipe",
    overrides: Iterable[str] = (),
) -> Recipe:
    """Parse a recipe from a YAML text; `source` names it in errors."""
    content = parse_mapping(text, source, "base, store, tasks")
    for override in overrides:
        _apply_override(content, override)

    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problem = format_problem(error, Recipe, _SECTIONS, KEY_PLACES)
        raise RecipeError(f"{source}: {problem}") from error


def _apply_override(content: YAML, assignment: str) -> None:
    """Set the value that `key=value` names, in a recipe's content as YAML gave it."""
    key, separator, value = str(assignment).partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {assignment!r} is not of the form key=value")

    *path, last = key.split(".")
    try:
        for step in path:
            content = _enter_section(content, step)

        parsed: YAML = yaml.load(value, Loader=RecipeLoader)
        _set_value(content, last, parsed)
    except (ValueError, IndexError, TypeError) as error:
        raise RecipeError(f"--set {assignment!r}: there is no {key!r} in the recipe") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {assignment!r}: the value is not YAML") from error


def _enter_section(content: YAML, step: str) -> YAML:
    """Return what stands under a key, or at a list's position."""
    if isinstance(content, list):
        return content[int(step)]
    if isinstance(content, dict):
        # an override may name a section that the recipe leaves out
        return content.setdefault(step, {})
    raise TypeError(f"nothing stands under {content!r}")


def _set_value(content: YAML, key: str, value: YAML) -> None:
    if isinstance(content, list):
        content[int(key)] = value
    elif isinstance(content, dict):
        content[key] = value
    else:
        raise TypeError(f"nothing stands under {content!r}")
