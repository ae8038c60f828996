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


class RecipeLoader(yaml.SafeLoader):
    """YAML in which `1e-5` is a number, as whoever writes it means, and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if doubled := [key for key in keys if keys.count(key) > 1 and key != "<<"]:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"key {doubled[0]!r} stands twice in what begins at line {line}")
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?)$"
    ),
    list("-+0123456789."),
)


def read_text(path: str | Path, description: str) -> str:
    """The text of a file; RecipeError says of `what` there is that it cannot be read, and why."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {description} {path}: {_format_reason(error)}") from error


def parse_mapping(text: str, source: str, keys: str) -> dict[str, Any]:
    """The mapping that a YAML text is; `source` names it in errors, `keys` some of its keys."""
    try:
        content = yaml.load(text, Loader=RecipeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{source} must be a mapping of keys such as {keys}")
    return content


def format_problem(error: ValidationError, root: type[BaseModel], sections: Sections) -> str:
    """The problem that tells most, in one line, with the keys or values that are allowed."""
    # A misspelt key also leaves one missing; of a union's branches the deepest error tells most.
    problem = max(error.errors(), key=lambda p: (p["type"] == "extra_forbidden", len(p["loc"])))
    key_path = ".".join(str(part) for part in problem["loc"] if not _UNION_BRANCH.match(str(part)))
    if problem["type"] == "extra_forbidden":
        location = problem["loc"]
        model = root if len(location) == 1 else sections.get(str(location[0]), root)
        return f"unknown key {key_path!r}; {_suggest_key(str(location[-1]), model)}"
    if problem["type"] == "missing":
        return f"missing key {key_path!r}"
    if problem["type"] == "literal_error":
        allowed = problem["msg"].removeprefix("Input should be ")
        return f"{key_path}: unknown {problem['input']!r}; allowed: {allowed}"
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return f"{key_path}: {message}" if key_path else message


def _suggest_key(key: str, model: type[BaseModel]) -> str:
    known = [field.alias or name for name, field in model.model_fields.items()]
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"


def _format_reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"
