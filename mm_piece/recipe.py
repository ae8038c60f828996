"""What one YAML recipe may say: strict, frozen, every default spelled out in the store."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mm_piece.errors import RecipeError
from mm_piece.names import GROUPS, Group

METHODS = (
    *("piece-f", "piece-s", "piece-f-official", "piece-s-official"),
    *("magnitude", "random"),
)
Metric = Literal["exact", "vqa", "choice", "rouge-l", "bleu", "edit", "cider"]
Column = Literal["prompt", "answer", "answers", "image", "images", "messages", "conversations"]
_UNION_BRANCH = re.compile(r"float$|dict\[|\[key\]")  # pydantic's own steps into a union
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GeneralTask(_Strict):
    """Something measured at every position and never trained on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", max_length=100)
    test: str
    images: str | None = None
    columns: dict[Column, str] = {}  # what a row's field is called in the source
    prompt: str | None = None  # for rows without one, such as labelled images
    metric: Metric = "exact"
    max_new_tokens: int = Field(default=32, ge=1)
    max_length: int | None = Field(default=None, ge=16)  # tokens, images included


class Task(GeneralTask):
    """A named train set and test set, one step of the sequence."""

    train: str


class Select(_Strict):
    """Which entries a task may change."""

    method: str = "piece-f"
    density: float | dict[Group, float] = 0.001
    samples: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=8, ge=1)  # examples a pass looks at together
    memory: str | int = "8GiB"
    exclude: tuple[Group, ...] = (
        "embedding",
        "head",
    )
    xi: float = Field(default=1e-3, gt=0, allow_inf_nan=False)

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method in METHODS or "." in method:
            return method
        raise ValueError(
            f"unknown method {method!r}; allowed: {', '.join(METHODS)}, or a dotted path"
        )

    @field_validator("density", mode="before")
    @classmethod
    def _density_in_range(cls, density: Any) -> Any:
        if density == {}:
            raise ValueError(f"no group has a density; groups: {', '.join(GROUPS)}")
        for value in density.values() if isinstance(density, dict) else [density]:
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            if not plain or not 0 < value <= 1:
                shown = float(value) if plain else repr(value)
                raise ValueError(f"density {shown} is out of (0, 1]")
        return density

    @field_validator("memory")
    @classmethod
    def _memory_readable(cls, memory: str | int) -> str | int:
        parse_bytes(memory)
        return memory


class Recipe(_Strict):
    """One run: a base, an ordered list of tasks, how to select and how to train."""

    base: str
    revision: str | None = None
    model: dict[str, Any] = {}
    store: str = Field(min_length=1)
    tasks: tuple[Task, ...] = Field(min_length=1)
    general: tuple[GeneralTask, ...] = ()
    select: Select = Select()
    train: dict[str, Any] = {}
    cache: str | int = "20GiB"  # disk for the encoded examples of a task while it is learned
    seed: int = Field(default=42, ge=0, lt=2**31)

    @field_validator("cache")
    @classmethod
    def _cache_readable(cls, cache: str | int) -> str | int:
        parse_bytes(cache)
        return cache

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Recipe":
        names = [task.name for task in (*self.tasks, *self.general)]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"task name {sorted(doubled)[0]!r} is used twice")
        return self

    def text(self) -> str:
        """The resolved recipe as YAML, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_bytes(size: str | int) -> int:
    """Bytes of `8GiB`, `5GB` or a plain number; ValueError names the allowed units."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not match or match[2] not in _UNITS or not 1024 <= _size(match) < 2**63:
        raise ValueError(
            f"{size!r} is not a size such as 8GiB, of at least 1KiB "
            f"(units: {', '.join(_UNITS)[2:]})"
        )
    return int(_size(match))


def _size(match: re.Match[str]) -> float:
    return float(match[1]) * _UNITS[match[2]]


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
