"""Mapped columns that no row has: most likely they are misspelt."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mm_piece.errors import DataError, format_value

IMAGE_COLUMNS = ("image", "images")


def describe_absent_columns(
    columns: Mapping[Any, str],
    sources: Sequence[str],
    raw_rows: Iterable[Any],
) -> str | None:
    """Return in one line which columns none of the rows has; None if every column is found.

    Rows are read until the last column is found, so one row is enough where nothing is wrong.
    """
    absent = set(columns.values())
    found: dict[str, None] = {}  # field names, in the order of the rows
    if not absent:
        return None

    for raw in raw_rows:
        if not isinstance(raw, Mapping):  # an error of its own
            continue
        absent.difference_update(raw)
        if not absent:
            return None
        found.update(dict.fromkeys(map(str, raw)))

    if not found:  # rows that cannot be read have other errors
        return None

    where = " or ".join(dict.fromkeys(sources))
    problems = []
    for field, name in columns.items():
        if name in absent:
            hint = _suggest_field(name, [*found])
            problems.append(f"{field}: no row of {where} has a field {name!r}; {hint}")
    return f"columns: {'; '.join(problems)}"


def iter_readable_rows(num_rows: int, read_row: Any) -> Iterable[Any]:
    """Yield raw rows without those that cannot be read: each of them is an error of its own."""
    for position in range(num_rows):
        try:
            yield read_row(position)
        except DataError:
            continue


def _suggest_field(name: str, found: list[str]) -> str:
    """Return what may be meant by a name that no row has."""
    listed = format_value(", ".join(found), 200)
    close = get_close_matches(name, found, n=1)
    if close:
        return f"did you mean {close[0]!r}? (the fields are {listed})"
    return f"the fields are {listed}"
