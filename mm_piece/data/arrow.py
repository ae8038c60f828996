"""Tables of Arrow: parquet files, folders saved by `datasets`, data sets of the Hub.

Rows are read in place, one at a time, with their values decoded (`arrow_features`) and images as
undecoded bytes or paths. Parquet is read a row group at a time instead of by `datasets`, which
would first write an uncompressed copy into its cache.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from fsspec import url_to_fs

from mm_piece.data.arrow_features import decode_value, features_of
from mm_piece.errors import DataError

# hf:OWNER/NAME[:CONFIG][@REVISION]/SPLIT; a revision may have slashes of its own
_HUB_SOURCE = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^@/]+))?(@(?P<revision>.+))?/(?P<split>[^/]+)"
)
_MAX_REASON_LENGTH = 300


class ParquetRows:
    """The rows of a parquet file, of which one row group is in memory at a time."""

    def __init__(self, path: Path) -> None:
        """Open a file, of which only the footer is read."""
        from pyarrow.parquet import ParquetFile

        self.path = path
        with _translating_errors(str(path)), ParquetFile(path) as file:
            row_counts = []
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                row_counts.append(metadata.num_rows)
            _require_unique_columns(file.schema_arrow.names)
            self.features = features_of(file.schema_arrow)
        self.stops = list(accumulate(row_counts))  # where each group ends
        self.cached_group: tuple[int, Any] = (-1, None)  # a group's number and table

    def __len__(self) -> int:
        """Return the number of rows."""
        if not self.stops:
            return 0
        return self.stops[-1]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return the row at a position."""
        group = bisect_right(self.stops, position)
        start = self.stops[group - 1] if group else 0
        table = self._read_row_group(group)
        # one row alone becomes Python objects
        row = table.slice(position - start, 1)
        with _translating_errors(f"{self.path} row {position}"):
            stored = row.to_pylist()[0]
            return decode_value(self.features, stored)

    def _read_row_group(self, group: int) -> Any:
        from pyarrow.parquet import ParquetFile

        number, table = self.cached_group
        if number == group:
            return table

        with _translating_errors(str(self.path)), ParquetFile(self.path) as file:
            table = file.read_row_group(group)
        self.cached_group = (group, table)
        return table


class DatasetRows:
    """The rows of a `datasets.Dataset`, which maps its files into memory."""

    def __init__(self, table: Any, source: str) -> None:
        """Take a data set, without reading a row."""
        # rows as Arrow tables: `datasets` would decode images
        self.table = table.with_format("arrow")
        self.source = source
        self.features = table.features

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return the row at a position."""
        with _translating_errors(f"{self.source} row {position}"):
            row = self.table[position]
            stored = row.to_pylist()[0]
            return decode_value(self.features, stored)


def open_saved_dataset(folder: Path) -> DatasetRows:
    """Return the rows of a folder that `Dataset.save_to_disk` wrote.

    Raises DataError for the folder of a DatasetDict; the message names its splits.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        with _translating_errors(str(splits)):
            text = splits.read_text(encoding="utf-8")
            names = json.loads(text)["splits"]
        listed = ", ".join(f"{folder}/{name}" for name in names)
        raise DataError(f"{folder} holds several splits; name one: {listed}")

    from datasets import load_from_disk

    with _translating_errors(str(folder)):
        table = load_from_disk(str(folder))
        return DatasetRows(table, str(folder))


def open_hub_dataset(
    source: str,
    start: int,
    stop: int | None,
) -> tuple[DatasetRows | list[Any], int]:
    """Return rows of a split of a data set of the Hub, and the number of the first.

    With `stop` the rows up to it are streamed into memory, and no more is downloaded; without, all
    of them go through the cache of `datasets`.
    """
    match = _HUB_SOURCE.fullmatch(source)
    if not match:
        raise DataError(f"{source!r} is not of the form hf:OWNER/NAME[:CONFIG][@REVISION]/SPLIT")

    from datasets import load_dataset

    name = match["name"]
    config = match["config"]
    options: dict[str, Any] = {
        "split": match["split"],
        "revision": match["revision"],
    }
    with _translating_errors(source):
        # without an end, all rows are needed: downloaded once, they are mapped into memory
        if stop is None:
            table = load_dataset(name, config, **options)
            return DatasetRows(table, source), 0

        stream = load_dataset(name, config, streaming=True, **options)
        return _read_streamed_rows(stream, start, stop), start


def _read_streamed_rows(
    stream: Any,
    start: int,
    stop: int,
) -> list[Any]:
    num_rows = max(0, stop - start)
    tables = stream.with_format("arrow")
    tables = tables.skip(start)
    tables = tables.take(num_rows)

    rows = []
    for table in tables:
        for row in _decode_rows(table, stream.features):
            row = _fetch_images(row)
            rows.append(row)
    return rows


@contextmanager
def _translating_errors(source: str) -> Iterator[None]:
    """Turn an error of a reader into a DataError of one line while the block runs.

    The readers, and the libraries behind the Hub's, raise many kinds.
    """
    try:
        yield
    except Exception as error:
        raise DataError(f"cannot read {source}: {_format_reason(error)}") from error


def _format_reason(error: BaseException) -> str:
    from datasets.exceptions import DatasetGenerationError

    # its own message says only that something failed
    if isinstance(error, DatasetGenerationError) and error.__cause__:
        return _format_reason(error.__cause__)

    words = str(error).split()
    line = " ".join(words)
    if not line:
        return type(error).__name__
    return line[:_MAX_REASON_LENGTH]


def _require_unique_columns(names: list[str]) -> None:
    """Raise DataError for two columns of one name, of which a row would keep the last."""
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        first = min(doubled)
        raise DataError(f"it has two columns {first!r}")


def _decode_rows(table: Any, features: Any) -> list[Any]:
    """Return the rows of one table of a stream.

    A stream need not have features before its rows are read: a table's own schema has them then.
    """
    known = features or features_of(table.schema)
    rows = []
    for stored in table.to_pylist():
        rows.append(decode_value(known, stored))
    return rows


def _fetch_images(value: Any) -> Any:
    """Return a streamed value with the images that it only points to downloaded."""
    if isinstance(value, list):
        return [_fetch_images(item) for item in value]
    if not isinstance(value, dict):
        return value

    is_image = value.keys() == {"bytes", "path"}
    if is_image and not value["bytes"]:
        # rows of a stream may point into archives of the Hub, as in zip://1.png::https://…
        address = str(value["path"])
        if "://" in address:
            system, path = url_to_fs(address)
            return system.cat_file(path)

    fetched = {}
    for key, item in value.items():
        fetched[key] = _fetch_images(item)
    return fetched
