"""A recipe from YAML text, with overrides; whatever is wrong becomes one line."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mm_piece.errors import RecipeError
from mm_piece.recipe.schema import GeneralTask, Recipe, Task
from mm_piece.recipe.select import Select

_UNION_BRANCH = re.compile(r"float$|dict\[|\[key\]|literal\[")  # pydantic's own steps into a union


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-5` is a number, as whoever writes it means, and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if doubled := [key for key in keys if keys.count(key) > 1 and key != "<<"]:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"key {doubled[0]!r} stands twice in what begins at line {line}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?)$"
    ),
    list("-+0123456789."),
)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, with `key=value` overrides (dotted keys, list positions by number).

    Raises RecipeError in one line: file missing, YAML broken, key unknown (with the nearest known
    one), value out of range.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read recipe {path}: {_reason(error)}") from error
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, source: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from YAML text; `source` names it in errors."""
    try:
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{source} must be a mapping of keys such as base, store, tasks")
    for override in overrides:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_first_problem(error)}") from error


def _override(content: Any, assignment: str) -> None:
    key, separator, value = assignment.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {assignment!r} is not of the form key=value")
    *path, last = key.split(".")
    try:
        for step in path:
            content = (
                content[int(step)] if isinstance(content, list) else content.setdefault(step, {})
            )
        content[int(last) if isinstance(content, list) else last] = yaml.load(value, Loader=_Loader)
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise RecipeError(f"--set {assignment!r}: there is no {key!r} in the recipe") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {assignment!r}: the value is not YAML") from error


def _first_problem(error: ValidationError) -> str:
    # A misspelt key also leaves one missing; of a union's branches the deepest error tells most.
    problem = max(error.errors(), key=lambda p: (p["type"] == "extra_forbidden", len(p["loc"])))
    where = ".".join(str(part) for part in problem["loc"] if not _UNION_BRANCH.match(str(part)))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {_nearest(str(problem['loc'][-1]), problem['loc'])}"
    if problem["type"] == "missing":
        return f"missing key {where!r}"
    if problem["type"] == "literal_error":
        allowed = problem["msg"].removeprefix("Input should be ")
        return f"{where}: unknown {problem['input']!r}; allowed: {allowed}"
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return f"{where}: {message}" if where else message


def _nearest(key: str, location: tuple[int | str, ...]) -> str:
    section = {"tasks": Task, "general": GeneralTask, "select": Select}.get(
        str(location[0]), Recipe
    )
    known = list((Recipe if len(location) == 1 else section).model_fields)
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"
