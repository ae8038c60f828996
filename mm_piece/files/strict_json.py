"""JSON as its standard has it: finite numbers, no name twice in an object; and not too deep."""

import json
import math
from collections.abc import Collection
from typing import Any

from mm_piece.errors import short

_DEEPEST = 64  # objects and lists in one another


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says; ValueError for `NaN`, `1e999`, a name twice, any other text.

    RecursionError or ValueError for what is nested too deep.
    """
    content = json.loads(
        text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=require_unique
    )
    _require_shallow(content)
    return content


def require_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of names and values; ValueError if a name stands twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {short(twice)} stands twice")
    return content


def _require_shallow(content: Any) -> None:
    """Raise ValueError for what a function that goes into depth might trip over."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [part for item in level for part in _parts(item)]
        if not level:
            return
    raise ValueError(f"not plain JSON: nested deeper than {_DEEPEST}")


def _parts(item: Any) -> Collection[Any]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"not plain JSON: {short(number)} is no finite number")
    return value
