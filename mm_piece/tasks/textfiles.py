"""Rows of text files: JSON, JSON lines and CSV."""

import csv
import json
from array import array
from pathlib import Path
from typing import Any

from mm_piece.errors import DataError, short


class JsonLines:
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
        return _parsed(text, f"{self.path} row {position}")


def json_rows(path: Path) -> list[Any]:
    """The rows of a JSON file, which holds a list of them."""
    try:
        rows = _parsed(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of rows, not {short(rows)}")
    return rows


def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; every value stays the text that it is."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not CSV in UTF-8: {error}") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise DataError(f"{path} row {number} has not as many fields as the header")
    return rows


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {where}: it is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {_told(error)}") from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits; deep nesting
        raise DataError(f"{where} is not JSON: {short(error, 150)}") from error


def _told(error: json.JSONDecodeError) -> str:
    if "\n" not in error.doc.strip():
        return f"{error.msg} at character {error.colno}"
    lines = error.msg == "Extra data" and error.lineno == 2
    return f"{error}{'; a file with a row on each line is called .jsonl' if lines else ''}"
