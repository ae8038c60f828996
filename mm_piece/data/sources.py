"""Where rows come from: a file, a folder, the Hub or the embedded data, as a sequence of raw rows.

    rows.json  rows.jsonl  rows.csv  rows.parquet      a file, or the parts of one: `rows-*.parquet`
    folder                                             what `datasets` saved; the parts of a table;
                                                       images in a folder for each class, or named
                                                       by metadata.csv, .jsonl or .parquet
    hf:OWNER/NAME[:CONFIG][@REVISION]/SPLIT            a data set of the Hub
    scenes:NAME/SPLIT                                  the embedded data

Only JSON and CSV are held in memory; the others are read row by row when rows are asked for.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from mm_piece.data import scenes
from mm_piece.data.arrow import ParquetRows, open_hub_dataset, open_saved_dataset
from mm_piece.data.image_folder import ClassFolderRows, MetadataRows
from mm_piece.data.json_csv import JsonLinesRows, read_csv_rows, read_json_rows
from mm_piece.errors import DataError

RowBounds = tuple[int, int | None]  # first row, and last + 1


class SourceRows(Protocol):
    """Rows as they stand in a source, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Any: ...


class ConcatenatedRows:
    """The rows of several parts, one part after the other."""

    def __init__(self, parts: Sequence[SourceRows]) -> None:
        """Nothing is read."""
        self.parts, self.stops = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        """The number of rows of all parts."""
        return self.stops[-1]

    def __getitem__(self, position: int) -> Any:
        """The row at a position."""
        part_index = bisect_right(self.stops, position)
        return self.parts[part_index][position - (self.stops[part_index - 1] if part_index else 0)]


def split_slice(source: str) -> tuple[str, RowBounds]:
    """A source without its slice, and the rows that the slice names: `train.json[100:200]`."""
    match = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", source)
    if not match:
        if re.search(r"\[[^\[\]/]*\]$", source) and not Path(source).exists():
            raise DataError(f"{source}: a slice is [FIRST:STOP], counted from 0, such as [:100]")
        return source, (0, None)
    return match[1], (int(match[2] or 0), int(match[3]) if match[3] else None)


def open_raw_rows(source: str, bounds: RowBounds) -> tuple[SourceRows, int]:
    """The raw rows of a source, and the number of the first one; not fewer than `bounds` names.

    Raises DataError in one line for what is missing, cannot be read or is no source.
    """
    if source.startswith("hf:"):
        return open_hub_dataset(source, *bounds)
    if source.startswith("scenes:"):
        return _open_scenes(source), 0
    path = Path(source)
    if path.is_dir():
        return _open_folder(path), 0
    if "*" in path.name:
        return _open_parts(sorted(path.parent.glob(path.name)), source), 0
    return _open_file(path), 0


def image_root_of(source: str) -> Path:
    """The folder that image paths of a source are relative to."""
    if source.startswith("hf:"):
        return Path()
    return Path(source) if Path(source).is_dir() else Path(source).parent


def _open_scenes(source: str) -> SourceRows:
    name, separator, split = source.removeprefix("scenes:").partition("/")
    if not separator:
        raise DataError(f"{source!r} is not of the form scenes:NAME/SPLIT")
    return scenes.make_rows(name, split)


def _open_file(path: Path) -> SourceRows:
    if path.suffix.lower() in _READERS and path.exists():
        return _READERS[path.suffix.lower()](path)
    if path.exists():
        allowed = ", ".join(_READERS)
        raise DataError(f"cannot read {path}: a file of rows ends in one of {allowed}")
    looks = len(path.parts) == 2 and not path.suffix and not path.is_absolute()
    hint = f"; a data set of the Hub is written hf:{path}/SPLIT" if looks else ""
    raise DataError(f"cannot read {path}: it does not exist{hint}")


def _open_parts(files: Sequence[Path], source: str) -> SourceRows:
    if not files:
        raise DataError(f"cannot read {source}: no file has such a name")
    return ConcatenatedRows([_open_file(file) for file in files])


def _open_folder(folder: Path) -> SourceRows:
    """What a folder holds: a saved data set, images, or the parts of one table."""
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return open_saved_dataset(folder)
    for suffix in (".csv", ".jsonl", ".parquet"):
        if (folder / f"metadata{suffix}").is_file():
            return MetadataRows(_open_file(folder / f"metadata{suffix}"))
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _READERS)
    if len({re.sub(r"\d+", "", file.name) for file in files}) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise DataError(f"{folder} holds several tables: {names}; name one, or {folder}/NAME-*")
    if files:
        return _open_parts(files, str(folder))
    images = ClassFolderRows(folder)
    if not images:
        raise DataError(f"{folder} holds no rows: no data set, no table and no images")
    return images


_READERS: dict[str, Callable[[Path], SourceRows]] = {
    ".json": read_json_rows,
    ".jsonl": JsonLinesRows,
    ".csv": read_csv_rows,
    ".parquet": ParquetRows,
}
