"""JSON as its standard has it: finite numbers, no name twice in an object; and not too deep."""

import json
import math
from collections.abc import Collection
from typing import Any

from mm_piece.errors import format_value

_MAX_DEPTH = 64  # objects and lists in one another


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says; ValueError for `NaN`, `1e999`, a name twice, any other text.

    RecursionError or ValueError for what is nested too deep.
    """
    content = json.loads(
        text,
        parse_float=_parse_finite,
        parse_constant=_parse_finite,
        object_pairs_hook=require_unique_names,
    )
    _require_shallow_nesting(content)
    return content


def require_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of names and values; ValueError if a name stands twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {format_value(twice)} stands twice")
    return content


def _require_shallow_nesting(content: Any) -> None:
    """Raise ValueError for what a function that goes into depth might trip over."""
    level = [content]
    for _ in range(_MAX_DEPTH):
        level = [child for item in level for child in _children_of(item)]
        if not level:
            return
    raise ValueError(f"not plain JSON: nested deeper than {_MAX_DEPTH}")


def _children_of(item: Any) -> Collection[Any]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


def _parse_finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"not plain JSON: {format_value(number)} is no finite number")
    return value
