"""Tables of Arrow: parquet files, folders saved by `datasets`, data sets of the Hub.

Rows are read from where they lie when they are asked for: values as what they stand for
(`features`), images as undecoded bytes or paths. Parquet is read a row group at a time instead of
by `datasets`, which would first write an uncompressed copy into its cache.
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

_HUB_SOURCE = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^@/]+))?(@(?P<revision>.+))?/(?P<split>[^/]+)"
)


class ParquetRows:
    """The rows of a parquet file; one row group is held at a time."""

    def __init__(self, path: Path) -> None:
        """Only the file's footer is read."""
        from pyarrow.parquet import ParquetFile

        self.path = path
        with _translating_errors(str(path)), ParquetFile(path) as file:
            groups = range(file.num_row_groups)
            counts = (file.metadata.row_group(group).num_rows for group in groups)
            self.stops = list(accumulate(counts))
            _require_unique_columns(file.schema_arrow.names)
            self.features = features_of(file.schema_arrow)
        self.cached_group: tuple[int, Any] = (-1, None)  # a group's number and table

    def __len__(self) -> int:
        """The number of rows."""
        return self.stops[-1] if self.stops else 0

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The row at a position."""
        group = bisect_right(self.stops, position)
        start = self.stops[group - 1] if group else 0
        stored = self._read_row_group(group).slice(position - start, 1)
        with _translating_errors(f"{self.path} row {position}"):
            return decode_value(self.features, stored.to_pylist()[0])

    def _read_row_group(self, group: int) -> Any:
        from pyarrow.parquet import ParquetFile

        number, table = self.cached_group
        if number != group:
            with _translating_errors(str(self.path)), ParquetFile(self.path) as file:
                table = file.read_row_group(group)
            self.cached_group = group, table
        return table


class DatasetRows:
    """The rows of a `datasets.Dataset`, which maps its files into memory."""

    def __init__(self, table: Any, source: str) -> None:
        """Nothing is read."""
        self.table, self.source = table.with_format("arrow"), source
        self.features = table.features

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.table)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The row at a position."""
        with _translating_errors(f"{self.source} row {position}"):
            return decode_value(self.features, self.table[position].to_pylist()[0])


def open_saved_dataset(folder: Path) -> DatasetRows:
    """The rows of a folder that `Dataset.save_to_disk` wrote; DataError names a DatasetDict's."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        with _translating_errors(str(splits)):
            names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        raise DataError(
            f"{folder} holds several splits; name one: {', '.join(f'{folder}/{n}' for n in names)}"
        )
    from datasets import load_from_disk

    with _translating_errors(str(folder)):
        return DatasetRows(load_from_disk(str(folder)), str(folder))


def open_hub_dataset(
    source: str, start: int, stop: int | None
) -> tuple[DatasetRows | list[Any], int]:
    """Rows of a split of a data set of the Hub, and the number of the first.

    With `stop` the rows up to it are streamed into memory, and no more is downloaded; without, all
    of them go through the cache of `datasets`.
    """
    match = _HUB_SOURCE.fullmatch(source)
    if not match:
        raise DataError(f"{source!r} is not of the form hf:OWNER/NAME[:CONFIG][@REVISION]/SPLIT")
    from datasets import load_dataset

    name, config = match["name"], match["config"]
    split, revision = match["split"], match["revision"]
    with _translating_errors(source):
        if stop is None:
            return DatasetRows(
                load_dataset(name, config, split=split, revision=revision), source
            ), 0
        found = load_dataset(name, config, split=split, revision=revision, streaming=True)
        row_stream: Any = found.with_format("arrow").skip(start).take(max(0, stop - start))
        return [
            _fetch_images(row)
            for table in row_stream
            for row in _decode_rows(table, found.features)
        ], start


@contextmanager
def _translating_errors(source: str) -> Iterator[None]:
    """Turn a failure into one line; the readers, and what is behind the Hub's, have many kinds."""
    try:
        yield
    except Exception as error:
        raise DataError(f"cannot read {source}: {_format_reason(error)}") from error


def _format_reason(error: BaseException) -> str:
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, DatasetGenerationError) and error.__cause__:  # says only that it failed
        return _format_reason(error.__cause__)
    return " ".join(str(error).split())[:300] or type(error).__name__


def _require_unique_columns(names: list[str]) -> None:
    """Raise DataError for two columns of one name, of which a row would keep the last."""
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"it has two columns {doubled[0]!r}")


def _decode_rows(table: Any, features: Any) -> list[Any]:
    """The rows of a part of a stream, whose features may be known by the part alone."""
    known = features or features_of(table.schema)
    return [decode_value(known, row) for row in table.to_pylist()]


def _fetch_images(value: Any) -> Any:
    """A streamed value; an image that it only points to is downloaded."""
    if isinstance(value, list):
        return [_fetch_images(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"bytes", "path"} or value["bytes"] or "://" not in str(value["path"]):
        return {key: _fetch_images(item) for key, item in value.items()}
    system, path = url_to_fs(value["path"])
    return system.cat_file(path)
