"""A recipe from YAML text, with overrides; whatever is wrong becomes one line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mm_piece.errors import RecipeError, as_path
from mm_piece.recipe.parsing import RecipeLoader, Sections, format_problem, parse_mapping, read_text
from mm_piece.recipe.schema import GeneralTask, Recipe, Task
from mm_piece.recipe.select import SelectionSettings

_SECTIONS: Sections = {"tasks": Task, "general": GeneralTask, "select": SelectionSettings}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, with `key=value` overrides (dotted keys, list positions by number).

    Raises RecipeError in one line: file missing, YAML broken, key unknown (with the nearest known
    one), value out of range.
    """
    return parse_recipe(read_text(as_path(path, "recipe"), "recipe"), str(path), overrides)


def parse_recipe(text: str, source: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from YAML text; `source` names it in errors."""
    content = parse_mapping(text, source, "base, store, tasks")
    for override in overrides:
        _apply_override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{source}: {format_problem(error, Recipe, _SECTIONS)}") from error


def _apply_override(content: Any, assignment: str) -> None:
    key, separator, value = str(assignment).partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {assignment!r} is not of the form key=value")
    *path, last = key.split(".")
    try:
        for step in path:
            content = (
                content[int(step)] if isinstance(content, list) else content.setdefault(step, {})
            )
        content[int(last) if isinstance(content, list) else last] = yaml.load(
            value, Loader=RecipeLoader
        )
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise RecipeError(f"--set {assignment!r}: there is no {key!r} in the recipe") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {assignment!r}: the value is not YAML") from error
