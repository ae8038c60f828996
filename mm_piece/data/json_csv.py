"""Rows of text files: JSON, JSON lines and CSV."""

import csv
import io
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_piece.errors import DataError, format_value
from mm_piece.files.strict_json import require_unique_names


class JsonLinesRows:
    """The rows of a JSONL file, parsed on access; lines of whitespace are no rows."""

    def __init__(self, path: Path) -> None:
        """Find where the rows begin: 8 bytes of memory for each."""
        self.path = path
        self.starts = array("Q")
        start = 0
        try:
            with path.open("rb") as file:
                for line in file:
                    if not line.isspace():
                        self.starts.append(start)
                    start += len(line)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts)

    def __getitem__(self, position: int) -> Any:
        """Return the row at a position."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.starts[position])
                text = file.readline()
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        return _parse_json(text, f"{self.path} row {position}")


def read_json_rows(path: Path) -> list[Any]:
    """Return the rows of a JSON file, which must hold a list of them."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error

    rows = _parse_json(content, str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of rows, not {format_value(rows)}")
    return rows


def read_csv_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header; every value stays the text that it is."""
    return _read_delimited_rows(path, "excel", "CSV")


def read_tsv_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file like a CSV file, with tabs between its values."""
    return _read_delimited_rows(path, "excel-tab", "TSV")


def _read_delimited_rows(
    path: Path,
    dialect: str,
    kind: str,
) -> list[dict[str, str]]:
    """Return rows of texts; `dialect` is csv's name of the format, `kind` a reader's."""
    text = _read_text(path)
    # a field may be a document, longer than the 128 KiB that Python's csv allows
    current_limit = csv.field_size_limit()
    limit = max(current_limit, len(text))
    csv.field_size_limit(limit)

    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(
        lines,
        dialect=dialect,
        strict=True,
    )

    rows: list[dict[str, str]] = []
    try:
        names = reader.fieldnames or []
        _require_unique_names(names, path)
        for row in reader:
            # DictReader puts surplus fields under the key None, and None in place of missing ones
            if None in row or None in row.values():
                raise DataError(f"{path} row {len(rows)} has not as many fields as the header")
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path} row {len(rows)} is not {kind}: {error}") from error
    return rows


def _require_unique_names(names: Sequence[str], path: Path) -> None:
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        first = min(doubled)
        raise DataError(f"{path} has two columns {first!r}")


def _read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error

    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"cannot read {path}: line {line} is not UTF-8 text") from error


def _parse_json(content: bytes, location: str) -> Any:
    try:
        text = content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=require_unique_names)
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {location}: it is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{location} is not JSON: {_format_json_error(error)}") from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits; deep nesting
        raise DataError(f"{location} is not JSON: {format_value(error, 150)}") from error


def _format_json_error(error: json.JSONDecodeError) -> str:
    if "\n" not in error.doc.strip():  # a row of JSON lines: its number is known
        return f"{error.msg} at character {error.colno}"

    # a second value on the second line is the second row of a JSONL file
    if error.msg == "Extra data" and error.lineno == 2:
        return f"{error}; a file with a row on each line is called .jsonl"
    return str(error)
