"""YAML into strict models; whatever is wrong becomes one line."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mm_piece.errors import RecipeError

Sections = Mapping[str, type[BaseModel]]  # key of the root -> what stands under it

_UNION_BRANCH = re.compile(r"float$|dict\[|\[key\]|literal\[")  # pydantic's own steps into a union


class Loader(yaml.SafeLoader):
    """YAML in which `1e-5` is a number, as whoever writes it means, and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if doubled := [key for key in keys if keys.count(key) > 1 and key != "<<"]:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"key {doubled[0]!r} stands twice in what begins at line {line}")
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?)$"
    ),
    list("-+0123456789."),
)


def text_of(path: str | Path, what: str) -> str:
    """The text of a file; RecipeError says of `what` there is that it cannot be read, and why."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {what} {path}: {_reason(error)}") from error


def mapping_of(text: str, source: str, keys: str) -> dict[str, Any]:
    """The mapping that a YAML text is; `source` names it in errors, `keys` some of its keys."""
    try:
        content = yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{source} must be a mapping of keys such as {keys}")
    return content


def first_problem(error: ValidationError, root: type[BaseModel], sections: Sections) -> str:
    """The problem that tells most, in one line, with the keys or values that are allowed."""
    # A misspelt key also leaves one missing; of a union's branches the deepest error tells most.
    problem = max(error.errors(), key=lambda p: (p["type"] == "extra_forbidden", len(p["loc"])))
    where = ".".join(str(part) for part in problem["loc"] if not _UNION_BRANCH.match(str(part)))
    if problem["type"] == "extra_forbidden":
        place = problem["loc"]
        model = root if len(place) == 1 else sections.get(str(place[0]), root)
        return f"unknown key {where!r}; {_nearest(str(place[-1]), model)}"
    if problem["type"] == "missing":
        return f"missing key {where!r}"
    if problem["type"] == "literal_error":
        allowed = problem["msg"].removeprefix("Input should be ")
        return f"{where}: unknown {problem['input']!r}; allowed: {allowed}"
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return f"{where}: {message}" if where else message


def _nearest(key: str, model: type[BaseModel]) -> str:
    known = [field.alias or name for name, field in model.model_fields.items()]
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"
