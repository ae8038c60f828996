"""YAML texts as strict pydantic models.

Whatever is wrong with a text becomes a RecipeError of one line.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, TypeGuard

import yaml

from mm_piece.errors import RecipeError

_Scalar = str | int | float | bool | None
YAML: TypeAlias = dict[str, "YAML"] | list["YAML"] | _Scalar


class RecipeLoader(yaml.SafeLoader):
    """A YAML loader to which `1e-5` is a number and a doubled key an error."""

    def construct_mapping(
        self,
        node: yaml.MappingNode,
        deep: bool = False,
    ) -> dict[Hashable, object]:
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        keys = [scalar.value for scalar in scalars]
        # `<<` merges another mapping, and may stand several times
        doubled = [key for key in keys if keys.count(key) > 1 and key != "<<"]
        if doubled:
            first = doubled[0]
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"key {first!r} stands twice in what begins at line {line}")

        return super().construct_mapping(node, deep)


class _Resolver(Protocol):
    """What a loader takes plain texts for; PyYAML does not say the types itself."""

    def add_implicit_resolver(
        self,
        tag: str,
        regexp: re.Pattern[str],
        first: Sequence[str],
    ) -> None:
        """Give texts that match a tag; `first` are the characters that they may begin with."""


def _resolve_floats(resolver: _Resolver) -> None:
    # YAML 1.1, which PyYAML reads, wants a point in a float: it takes `1e-5` for a text.
    resolver.add_implicit_resolver(
        tag="tag:yaml.org,2002:float",
        regexp=_FLOAT,
        first=list("-+0123456789."),
    )


_FLOAT = re.compile(
    r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?)$"
)
_resolve_floats(RecipeLoader)


def read_text(path: str | Path, description: str) -> str:
    """Read a file as UTF-8.

    Raises RecipeError with the reason if that fails; `description` says what the file is.
    """
    try:
        file = Path(path)
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = _format_reason(error)
        raise RecipeError(f"cannot read {description} {path}: {reason}") from error


def parse_mapping(text: str, source: str, keys: str) -> dict[str, YAML]:
    """Parse a YAML text that is a mapping.

    `source` names the text in errors, and `keys` some of its keys. Raises RecipeError.
    """
    try:
        content: YAML = yaml.load(text, Loader=RecipeLoader)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(f"{source} is not YAML: {_format_yaml_error(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        one_line = " ".join(str(error).split())
        raise RecipeError(f"{source} is not YAML: {one_line}") from error

    if not isinstance(content, dict):
        raise RecipeError(f"{source} must be a mapping of keys such as {keys}")
    return content


def is_mapping(value: object) -> TypeGuard[Mapping[object, object]]:
    """Return whether a value is a mapping, of whatever."""
    return isinstance(value, Mapping)


def _format_reason(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return error.strerror or str(error)


def _format_yaml_error(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong with a YAML text, where, and what most likely makes it right."""
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context or ""
    if mark is None:
        return problem

    place = f"line {mark.line + 1}, column {mark.column + 1}"
    # a question is the text that people write without quotes
    hint = 'a text with ? : , or # stands in quotes, as in prompt: "Red, or blue?"'
    return f"{place}: {problem}; {hint}"
