"""`read`: the rows of a source as examples, built when they are asked for."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_piece.data.example import Example
from mm_piece.data.fields import Fields
from mm_piece.data.row_formats import example_of, fields_of
from mm_piece.data.sources import Raw, folder_of, raw_rows, sliced
from mm_piece.errors import DataError, short


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Example]):
    """Some rows of a source; each becomes an example, with its number in the source, on access."""

    source: str
    raw: Raw
    first: int  # number of the first raw row
    numbers: range
    folder: Path
    columns: Mapping[Any, str]
    prompt: str | None
    absent: frozenset[str] = frozenset()  # mapped columns that no row has

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.numbers)

    def __getitem__(self, position: Any) -> Any:
        """One example, or the part of the sequence that a slice names."""
        if isinstance(position, slice):
            return replace(self, numbers=self.numbers[position])
        return self.example(self.raw_row(position), self.numbers[position])

    def __add__(self, others: Sequence[Example]) -> list[Example]:
        """These examples and others, as a list."""
        return [*self, *others]

    def raw_row(self, position: int) -> Any:
        """A row as it stands in the source."""
        return self.raw[self.numbers[position] - self.first]

    def unread(self) -> set[str]:
        """The fields, of any row and of the objects in it, that nothing reads."""
        found: set[str] = set()
        for position, number in enumerate(self.numbers):
            row, _ = self._built(self.raw_row(position), number)
            found |= {name for name, _ in row.unread()}
        return found

    def example(self, raw: Any, number: int) -> Example:
        """The example of a raw row."""
        return self._built(raw, number)[1]

    def _built(self, raw: Any, number: int) -> tuple[Fields, Example]:
        """The fields of a raw row, those taken that are read, and its example."""
        if not isinstance(raw, Mapping):
            raise DataError(
                f"{self.source} row {number}: a row must be an object, not {short(raw)}"
            )
        row = fields_of(raw, self.columns)
        return row, example_of(row, number, self.source, self.folder, self.prompt)


def read(
    source: str | Path,
    images: str | Path | None = None,
    columns: Mapping[Any, str] | None = None,
    prompt: str | None = None,
) -> Rows:
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
        raise DataError(f"columns must map fields to names, not {short(columns)}")
    rows = _opened(source, images, columns, prompt)
    absent = set(rows.columns.values())
    for error in _problems(rows, absent):
        raise error
    return replace(rows, absent=frozenset(absent))


def _as_text(value: Any, name: str) -> str:
    """A text or a path as a text; DataError that names the argument for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise DataError(f"{name} must be a text, not {short(value)}")
    return str(value)


def problems(
    source: str,
    images: str | None = None,
    columns: Mapping[Any, str] | None = None,
    prompt: str | None = None,
) -> Iterator[DataError]:
    """Everything that `read` would raise, row by row."""
    try:
        rows = _opened(source, images, columns, prompt)
    except DataError as error:
        yield error
        return
    yield from _problems(rows, set(rows.columns.values()))


def _opened(
    source: str, images: str | None, columns: Mapping[Any, str] | None, prompt: str | None
) -> Rows:
    path, (start, stop) = sliced(source)
    raw, first = raw_rows(path, (start, stop))
    numbers = range(first + len(raw))[start:stop]
    if not numbers:
        raise DataError(f"{source} has no rows")
    folder = Path(images) if images else folder_of(path)
    return Rows(path, raw, first, numbers, folder, columns or {}, prompt)


def _problems(rows: Rows, absent: set[str]) -> Iterator[DataError]:
    """What is wrong with rows, and an image column that none of them has: most likely misspelt.

    Columns that a row has are taken out of `absent`.
    """
    for position, number in enumerate(rows.numbers):
        try:
            raw = rows.raw_row(position)
            absent.difference_update(raw if isinstance(raw, Mapping) else ())
            rows.example(raw, number).require_images()
        except DataError as error:
            yield error
    images = {rows.columns[field] for field in ("image", "images") if field in rows.columns}
    if missing := sorted(images & absent):
        yield DataError(f"{rows.source}: no row has the image column {missing[0]!r}")
