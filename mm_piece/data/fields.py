"""The fields of a row and of the objects inside it.

`TrackedFields` records which fields the readers use, so that a field that nothing reads is noticed.
The functions below it settle what counts as empty.
"""

import math
from collections.abc import Mapping
from typing import Any

# Other types are never the same value: arrays, for one, do not compare to a single truth value.
_COMPARABLE_TYPES = (str, int, float, list, dict)


class TrackedFields:
    """The fields of an object, and which of them have been read.

    Objects inside it have fields of their own, such as `messages[].loss`.
    """

    def __init__(
        self,
        given: Mapping[Any, Any],
        path: str = "",
    ) -> None:
        """Take the values of an object, gaps left out; `path` begins the names of its fields."""
        self.path = path
        self.raw_values: dict[Any, Any] = {}
        self.read_names: set[Any] = set()
        self.hidden_values: dict[Any, Any] = {}  # present, but a mapped column replaces them
        self.nested_fields: list[TrackedFields] = []
        self.column_names: dict[Any, str] = {}  # of mapped fields, what the source calls them

        for name, value in given.items():
            if not is_missing(value):
                self.raw_values[name] = value

    def choose_field(self, *names: str) -> str | None:
        """Return the first of some fields that holds anything, else the first that is present.

        The chosen field counts as read, and so do the others of `names` that say the same.
        """
        values = self.raw_values
        present = [name for name in names if name in values]
        if not present:
            return None

        filled = [name for name in present if is_filled(values[name])]
        if not filled:
            return present[0]

        chosen = filled[0]
        self.read_names.add(chosen)  # by itself: bytes and images are never compared
        value = values[chosen]
        for name in present:
            if _is_same_value(values[name], value):
                self.read_names.add(name)
        return chosen

    def read_value(self, *names: str) -> Any:
        """Return the value of the field that `choose_field` picks; None if there is none."""
        chosen = self.choose_field(*names)
        if chosen is None:
            return None
        return self.raw_values[chosen]

    def has_value(self, *names: str) -> bool:
        """Return whether one of some fields holds anything."""
        values = self.raw_values
        present = values.keys() & names
        return any(is_filled(values[name]) for name in present)

    def add_nested_fields(
        self,
        given: Mapping[Any, Any],
        name: str,
    ) -> "TrackedFields":
        """Return the fields of an object in the field `name`, tracked as part of this one."""
        field = name.removesuffix("[]")
        suffix = name.removeprefix(field)
        column = self.column_names.get(field, field)
        parent = self.path
        path = f"{parent}{column}{suffix}."
        nested = TrackedFields(given, path)
        self.nested_fields.append(nested)
        return nested

    def find_unread_fields(self) -> list[tuple[str, Any]]:
        """Return the names and values of filled fields, here and inside, that nothing has read.

        Names are those of the source.
        """
        fields = []
        for name, value in self.raw_values.items():
            if name not in self.read_names:
                column = self.column_names.get(name, name)
                fields.append((column, value))
        fields.extend(self.hidden_values.items())

        unread = []
        for name, value in fields:
            if is_filled(value):
                path = f"{self.path}{name}"
                unread.append((path, value))

        # the path of an object inside begins with this one's
        for inner in self.nested_fields:
            unread.extend(inner.find_unread_fields())
        return unread


def is_missing(value: Any) -> bool:
    """Return whether a table has a gap there: None, or NaN in a column of numbers."""
    if value is None:
        return True
    return isinstance(value, float) and math.isnan(value)


def is_filled(value: Any) -> bool:
    """Return whether a value says anything.

    Gaps and texts of whitespace say nothing, nor do lists and objects of nothing else.
    """
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return any(map(is_filled, value))
    return not is_missing(value)


def to_object_list(given: Any) -> Any:
    """Return a list of objects for an object of equally long lists; other values as they are.

    Arrow may store a list of objects as one list for each field.
    """
    if not isinstance(given, dict) or not given:
        return given

    columns = list(given.values())
    lengths = set()
    for column in columns:
        if not isinstance(column, list):
            return given
        lengths.add(len(column))
    if len(lengths) > 1:
        return given

    objects = []
    for values in zip(*columns, strict=True):
        named_values = zip(given, values, strict=True)
        objects.append(dict(named_values))
    return objects


def _is_same_value(one: Any, other: Any) -> bool:
    """Return whether two values say the same; a list of one item says what its item says."""
    one = _unwrap_single(one)
    other = _unwrap_single(other)
    if not isinstance(one, _COMPARABLE_TYPES):
        return False
    if not isinstance(other, _COMPARABLE_TYPES):
        return False
    return one == other


def _unwrap_single(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1:
        return value[0]
    return value
