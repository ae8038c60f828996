"""The fields of a row and of the objects inside it: which hold anything, and which were read."""

import math
from collections.abc import Mapping
from typing import Any


class TrackedFields:
    """The fields of an object, each of which counts as read once it was taken.

    Objects inside it have fields of their own, such as `messages[].loss`.
    """

    def __init__(self, given: Mapping[Any, Any], path: str = "") -> None:
        """Gaps are left out."""
        self.raw_values = {name: value for name, value in given.items() if not is_missing(value)}
        self.path, self.read_names = path, set[Any]()
        self.hidden_values: dict[Any, Any] = {}  # what is there and must not be read
        self.nested_fields: list[TrackedFields] = []

    def choose_field(self, *names: str) -> str | None:
        """The first of some fields that holds anything, else the first that is there.

        Others of them that say the same count as read too.
        """
        there = [name for name in names if name in self.raw_values]
        chosen = next((name for name in there if is_filled(self.raw_values[name])), None)
        if chosen is None:
            return there[0] if there else None
        value = self.raw_values[chosen]
        self.read_names |= {
            name for name in there if name == chosen or _is_same_value(self.raw_values[name], value)
        }
        return chosen

    def read_value(self, *names: str) -> Any:
        """The value of the field that `choose` names; None for none."""
        chosen = self.choose_field(*names)
        return None if chosen is None else self.raw_values[chosen]

    def has_value(self, *names: str) -> bool:
        """Whether one of some fields holds anything."""
        return any(is_filled(self.raw_values[name]) for name in self.raw_values.keys() & names)

    def add_nested_fields(self, given: Mapping[Any, Any], name: str) -> "TrackedFields":
        """The fields of an object that stands in the field `name`."""
        self.nested_fields.append(TrackedFields(given, f"{self.path}{name}."))
        return self.nested_fields[-1]

    def find_unread_fields(self) -> list[tuple[str, Any]]:
        """The fields, here and in the objects inside, that hold something and were not taken."""
        fields = [
            (name, value) for name, value in self.raw_values.items() if name not in self.read_names
        ]
        own = [
            (f"{self.path}{n}", v)
            for n, v in (*fields, *self.hidden_values.items())
            if is_filled(v)
        ]
        return own + [field for inner in self.nested_fields for field in inner.find_unread_fields()]


def is_missing(value: Any) -> bool:
    """Whether a table has nothing there: None, or NaN in a column of numbers."""
    return value is None or isinstance(value, float) and math.isnan(value)


def is_filled(value: Any) -> bool:
    """Whether a value says anything: no gap, no blank text, no list or object of such alone."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        return any(map(is_filled, value.values()))
    if isinstance(value, list):
        return any(map(is_filled, value))
    return not is_missing(value)


def to_object_list(given: Any) -> Any:
    """A list of objects, which Arrow may keep as lists side by side; others as they are."""
    columns = list(given.values()) if isinstance(given, dict) else []
    if not columns or not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        return given
    return [dict(zip(given, row, strict=True)) for row in zip(*columns, strict=True)]


def _is_same_value(one: Any, other: Any) -> bool:
    """Whether two values say the same; a list of one says what that one says."""
    plain = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in (one, other)]
    return (
        all(isinstance(v, str | int | float | list | dict) for v in plain) and plain[0] == plain[1]
    )
