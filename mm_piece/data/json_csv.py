"""Rows of text files: JSON, JSON lines and CSV."""

import csv
import io
import json
from array import array
from pathlib import Path
from typing import Any

from mm_piece.errors import DataError, format_value
from mm_piece.files.strict_json import require_unique_names


class JsonLinesRows:
    """The rows of a JSONL file, each parsed when it is asked for; blank lines are none."""

    def __init__(self, path: Path) -> None:
        """Only the starts of the rows are kept, 8 bytes each."""
        self.path, self.starts = path, array("Q")
        try:
            with path.open("rb") as file:
                start = 0
                for line in file:
                    if not line.isspace():
                        self.starts.append(start)
                    start += len(line)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.starts)

    def __getitem__(self, position: int) -> Any:
        """The row at a position."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.starts[position])
                text = file.readline()
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        return _parse_json(text, f"{self.path} row {position}")


def read_json_rows(path: Path) -> list[Any]:
    """The rows of a JSON file, which holds a list of them."""
    try:
        rows = _parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of rows, not {format_value(rows)}")
    return rows


def read_csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; every value stays the text that it is."""
    text = _read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # documents are long
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, str]] = []
    try:
        names = reader.fieldnames or []
        if doubled := {name for name in names if names.count(name) > 1}:
            raise DataError(f"{path} has two columns {sorted(doubled)[0]!r}")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path} row {len(rows)} has not as many fields as the header")
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path} row {len(rows)} is not CSV: {error}") from error
    return rows


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"cannot read {path}: line {line} is not UTF-8 text") from error


def _parse_json(text: bytes, location: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=require_unique_names)
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {location}: it is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{location} is not JSON: {_format_json_error(error)}") from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits; deep nesting
        raise DataError(f"{location} is not JSON: {format_value(error, 150)}") from error


def _format_json_error(error: json.JSONDecodeError) -> str:
    if "\n" not in error.doc.strip():
        return f"{error.msg} at character {error.colno}"
    lines = error.msg == "Extra data" and error.lineno == 2
    return f"{error}{'; a file with a row on each line is called .jsonl' if lines else ''}"
