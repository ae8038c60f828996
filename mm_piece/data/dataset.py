"""The rows of a source as examples, built on access; `read` opens and checks a source."""

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
    folder: Path  # the one that image paths are relative to
    columns: Mapping[Any, str]  # what a field is called in the source
    prompt: str | None  # the question of rows that have none
    absent_columns: frozenset[str] = frozenset()  # mapped columns that no row has

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.row_numbers)

    def __getitem__(self, position: Any) -> Any:
        """Return one example, or the subsequence that a slice names."""
        if isinstance(position, slice):
            return replace(self, row_numbers=self.row_numbers[position])

        raw = self.read_raw_row(position)
        number = self.row_numbers[position]
        return self.example_from_raw(raw, number)

    def __add__(self, others: Sequence[Example]) -> list[Example]:
        """Return these examples and others, as a list."""
        return [*self, *others]

    def read_raw_row(self, position: int) -> Any:
        """Return a row as it stands in the source."""
        number = self.row_numbers[position]
        return self.raw_rows[number - self.first_number]

    def find_unread_fields(self) -> set[str]:
        """Return the fields, of any row and of the objects in it, that nothing reads."""
        found: set[str] = set()
        for position, number in enumerate(self.row_numbers):
            raw = self.read_raw_row(position)
            row, _ = self._parse_raw_row(raw, number)
            for name, _ in row.find_unread_fields():
                found.add(name)
        return found

    def example_from_raw(self, raw: Any, number: int) -> Example:
        """Build the example of a raw row."""
        _, example = self._parse_raw_row(raw, number)
        return example

    def _parse_raw_row(self, raw: Any, number: int) -> tuple[TrackedFields, Example]:
        """Return the fields of a raw row, with those marked that are read, and its example."""
        if not isinstance(raw, Mapping):
            raise DataError(
                f"{self.source} row {number}: a row must be an object, not {format_value(raw)}"
            )

        row = build_row_fields(raw, self.columns)
        example = build_example(
            row,
            number,
            self.source,
            self.folder,
            self.prompt,
        )
        return row, example


def read(
    source: str | Path,
    images: str | Path | None = None,
    columns: Mapping[Any, str] | None = None,
    prompt: str | None = None,
) -> ExampleDataset:
    """Return all rows of a source, checked.

    Image paths are relative to `images`, or to the source's own folder. `columns` gives the name of
    a field in the source, where a row has that column; `prompt` is the question of rows that have
    none. Raises DataError in one line for a missing or empty source, a row of no known format, an
    image that is missing or no image, and images that do not match the `<image>` marks of the text.
    """
    source = _as_text(source, "source")
    if images is not None:
        images = _as_text(images, "images")
    if prompt is not None:
        prompt = _as_text(prompt, "prompt")
    if columns is not None and not isinstance(columns, Mapping):
        raise DataError(f"columns must map fields to names, not {format_value(columns)}")

    rows = _open_dataset(source, images, columns, prompt)
    absent_columns = set(rows.columns.values())
    for error in _iter_row_problems(rows, absent_columns):
        raise error  # the first one is enough
    return replace(rows, absent_columns=frozenset(absent_columns))


def iter_problems(
    source: str,
    images: str | None = None,
    columns: Mapping[Any, str] | None = None,
    prompt: str | None = None,
) -> Iterator[DataError]:
    """Yield everything that `read` would raise, row by row."""
    try:
        rows = _open_dataset(source, images, columns, prompt)
    except DataError as error:
        yield error
        return

    absent_columns = set(rows.columns.values())
    yield from _iter_row_problems(rows, absent_columns)


def _as_text(value: Any, name: str) -> str:
    """Return a text or a path as a text; DataError that names the argument for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise DataError(f"{name} must be a text, not {format_value(value)}")
    return str(value)


def _open_dataset(
    source: str,
    images: str | None,
    columns: Mapping[Any, str] | None,
    prompt: str | None,
) -> ExampleDataset:
    """Open a source, of which a slice may name some rows; no row is read yet."""
    path, bounds = split_slice(source)
    start, stop = bounds
    raw_rows, first_number = open_raw_rows(path, bounds)

    # a stream of the Hub begins at the slice, other sources at row 0
    last_number = first_number + len(raw_rows)
    row_numbers = range(last_number)[start:stop]
    if not row_numbers:
        raise DataError(f"{source} has no rows")

    folder = Path(images) if images else image_root_of(path)
    return ExampleDataset(
        source=path,
        raw_rows=raw_rows,
        first_number=first_number,
        row_numbers=row_numbers,
        folder=folder,
        columns=columns or {},
        prompt=prompt,
    )


def _iter_row_problems(rows: ExampleDataset, absent_columns: set[str]) -> Iterator[DataError]:
    """Yield what is wrong with rows, and with an image column that none of them has.

    Such a column is most likely misspelt. The columns of every row are removed from
    `absent_columns`.
    """
    for position, number in enumerate(rows.row_numbers):
        try:
            raw = rows.read_raw_row(position)
            if isinstance(raw, Mapping):
                absent_columns.difference_update(raw)
            example = rows.example_from_raw(raw, number)
            example.require_images()
        except DataError as error:
            yield error

    image_columns = set()
    for field in ("image", "images"):
        if field in rows.columns:
            image_columns.add(rows.columns[field])
    missing = sorted(image_columns & absent_columns)
    if missing:
        yield DataError(f"{rows.source}: no row has the image column {missing[0]!r}")
