"""JSON as its standard has it: finite numbers, no name twice in an object; and not too deep."""

import json
import math
from collections.abc import Collection
from typing import Any, TypeAlias, TypeGuard

from mm_piece.errors import format_value

_Scalar = str | int | float | bool | None
JSON: TypeAlias = dict[str, "JSON"] | list["JSON"] | _Scalar

_MAX_DEPTH = 64  # objects and lists in one another


def parse_json(text: str | bytes) -> Any:
    """Return the content of a JSON text; what it must be is for the caller to say and to check.

    Raises ValueError for `NaN`, `1e999`, a name that occurs twice and any text that is no JSON;
    RecursionError or ValueError for content that is nested too deep.
    """
    content: JSON = json.loads(
        text,
        parse_float=_parse_finite,
        parse_constant=_parse_finite,
        object_pairs_hook=require_unique_names,
    )
    _require_shallow_nesting(content)
    return content


def require_unique_names(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    """Return an object of names and values; raise ValueError if a name occurs twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {format_value(twice)} stands twice")
    return content


def is_object(content: object) -> TypeGuard[dict[str, object]]:
    """Return whether parsed content is an object of JSON."""
    return type(content) is dict


def _require_shallow_nesting(content: JSON) -> None:
    """Raise ValueError for content whose depth might exhaust the stack of a recursive function."""
    # level by level, since recursion is what must not fail here
    level = [content]
    for _ in range(_MAX_DEPTH):
        children: list[JSON] = []
        for item in level:
            children += _children_of(item)
        level = children
        if not level:
            return
    raise ValueError(f"not plain JSON: nested deeper than {_MAX_DEPTH}")


def _children_of(item: JSON) -> Collection[JSON]:
    """Return the items of a list or the values of an object; nothing for anything else."""
    if isinstance(item, dict):
        return item.values()
    if isinstance(item, list):
        return item
    return ()


def _parse_finite(number: str) -> float:
    value = float(number)  # also of "NaN" and "Infinity", which Python's reader accepts
    if not math.isfinite(value):
        raise ValueError(f"not plain JSON: {format_value(number)} is no finite number")
    return value
