"""The rows of a source as examples, built on access; `read` opens and checks a source."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from mm_piece.data.absent_columns import (
    IMAGE_COLUMNS,
    describe_absent_columns,
    iter_readable_rows,
)
from mm_piece.data.absent_images import find_absent_images
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
    images: str | None = None  # the folder of the images as it was given

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

    rows = open_examples(source, images, columns, prompt)
    require_sound_rows(rows)
    return rows


def require_sound_rows(rows: ExampleDataset) -> None:
    """Raise the first of a source's problems."""
    for error in iter_problems(rows):
        raise error


def _as_text(value: Any, name: str) -> str:
    """Return a text or a path as a text; DataError that names the argument for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise DataError(f"{name} must be a text, not {format_value(value)}")
    return str(value)


def open_examples(
    source: str,
    images: str | None = None,
    columns: Mapping[Any, str] | None = None,
    prompt: str | None = None,
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
        images=images,
    )


def iter_problems(rows: ExampleDataset) -> Iterator[DataError]:
    """Yield everything that is wrong with the rows of a source.

    What is wrong with all of them comes first, as one problem: an image column that none of them
    has, and a folder that holds none of their images.
    """
    image_columns = {field: name for field, name in rows.columns.items() if field in IMAGE_COLUMNS}
    raw_rows = iter_readable_rows(len(rows), rows.read_raw_row)
    absent_columns = describe_absent_columns(image_columns, [rows.source], raw_rows)
    if absent_columns:
        yield DataError(absent_columns)
        return

    examples = iter_readable_rows(len(rows), rows.__getitem__)
    absent_images = find_absent_images(rows.source, examples, rows.folder, rows.images)
    if absent_images:
        yield absent_images

    for position in range(len(rows)):
        try:
            example = rows[position]
            if not absent_images:
                example.require_images()
        except DataError as error:
            yield error


def find_absent_columns(sources: Sequence[ExampleDataset]) -> str | None:
    """Return in one line which mapped columns no row of a task's sources has.

    A column need be in one of the sources only.
    """
    first, *_ = sources
    names = [rows.source for rows in sources]
    readable = [iter_readable_rows(len(rows), rows.read_raw_row) for rows in sources]
    return describe_absent_columns(first.columns, names, chain.from_iterable(readable))
