"""`read`: the rows of a source as examples, built when they are asked for."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_piece.data.example import Example
from mm_piece.data.fields import TrackedFields
from mm_piece.data.row_formats import build_example, build_row_fields
from mm_piece.data.sources import SourceRows, image_root_of, open_raw_rows, split_slice
from mm_piece.errors import DataError, format_value


@dataclass(frozen=True, eq=False)
class ExampleDataset(Sequence[Example]):
    """Some rows of a source; each becomes an example, with its number in the source, on access."""

    source: str
    raw_rows: SourceRows
    first_number: int  # number of the first raw row
    row_numbers: range
    folder: Path
    columns: Mapping[Any, str]
    prompt: str | None
    absent_columns: frozenset[str] = frozenset()  # mapped columns that no row has

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.row_numbers)

    def __getitem__(self, position: Any) -> Any:
        """One example, or the part of the sequence that a slice names."""
        if isinstance(position, slice):
            return replace(self, row_numbers=self.row_numbers[position])
        return self.example_from_raw(self.read_raw_row(position), self.row_numbers[position])

    def __add__(self, others: Sequence[Example]) -> list[Example]:
        """These examples and others, as a list."""
        return [*self, *others]

    def read_raw_row(self, position: int) -> Any:
        """A row as it stands in the source."""
        return self.raw_rows[self.row_numbers[position] - self.first_number]

    def find_unread_fields(self) -> set[str]:
        """The fields, of any row and of the objects in it, that nothing reads."""
        found: set[str] = set()
        for position, number in enumerate(self.row_numbers):
            row, _ = self._parse_raw_row(self.read_raw_row(position), number)
            found |= {name for name, _ in row.find_unread_fields()}
        return found

    def example_from_raw(self, raw: Any, number: int) -> Example:
        """The example of a raw row."""
        return self._parse_raw_row(raw, number)[1]

    def _parse_raw_row(self, raw: Any, number: int) -> tuple[TrackedFields, Example]:
        """The fields of a raw row, those taken that are read, and its example."""
        if not isinstance(raw, Mapping):
            raise DataError(
                f"{self.source} row {number}: a row must be an object, not {format_value(raw)}"
            )
        row = build_row_fields(raw, self.columns)
        return row, build_example(row, number, self.source, self.folder, self.prompt)


def read(
    source: str | Path,
    images: str | Path | None = None,
    columns: Mapping[Any, str] | None = None,
    prompt: str | None = None,
) -> ExampleDataset:
    """All rows of a source; image paths are relative to `images`, or to the source's own folder.

    `columns` says what a field is called in the source, where a row has that column; `prompt` is
    the question of rows that have none. Raises DataError in one line for a missing or empty source,
    a row of no known format, an image that is missing or no image, and images that do not match
    the `<image>` marks of the text.
    """
    source = _as_text(source, "source")
    images = None if images is None else _as_text(images, "images")
    prompt = None if prompt is None else _as_text(prompt, "prompt")
    if columns is not None and not isinstance(columns, Mapping):
        raise DataError(f"columns must map fields to names, not {format_value(columns)}")
    rows = _open_dataset(source, images, columns, prompt)
    absent_columns = set(rows.columns.values())
    for error in _iter_row_problems(rows, absent_columns):
        raise error
    return replace(rows, absent_columns=frozenset(absent_columns))


def _as_text(value: Any, name: str) -> str:
    """A text or a path as a text; DataError that names the argument for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise DataError(f"{name} must be a text, not {format_value(value)}")
    return str(value)


def iter_problems(
    source: str,
    images: str | None = None,
    columns: Mapping[Any, str] | None = None,
    prompt: str | None = None,
) -> Iterator[DataError]:
    """Everything that `read` would raise, row by row."""
    try:
        rows = _open_dataset(source, images, columns, prompt)
    except DataError as error:
        yield error
        return
    yield from _iter_row_problems(rows, set(rows.columns.values()))


def _open_dataset(
    source: str, images: str | None, columns: Mapping[Any, str] | None, prompt: str | None
) -> ExampleDataset:
    path, (start, stop) = split_slice(source)
    raw, first = open_raw_rows(path, (start, stop))
    numbers = range(first + len(raw))[start:stop]
    if not numbers:
        raise DataError(f"{source} has no rows")
    folder = Path(images) if images else image_root_of(path)
    return ExampleDataset(path, raw, first, numbers, folder, columns or {}, prompt)


def _iter_row_problems(rows: ExampleDataset, absent_columns: set[str]) -> Iterator[DataError]:
    """What is wrong with rows, and an image column that none of them has: most likely misspelt.

    Columns that a row has are taken out of `absent`.
    """
    for position, number in enumerate(rows.row_numbers):
        try:
            raw = rows.read_raw_row(position)
            absent_columns.difference_update(raw if isinstance(raw, Mapping) else ())
            rows.example_from_raw(raw, number).require_images()
        except DataError as error:
            yield error
    images = {rows.columns[field] for field in ("image", "images") if field in rows.columns}
    if missing := sorted(images & absent_columns):
        yield DataError(f"{rows.source}: no row has the image column {missing[0]!r}")
