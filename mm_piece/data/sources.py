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
from mm_piece.data.arrow import Parquet, hub_rows, saved
from mm_piece.data.image_folder import ClassFolders, Named
from mm_piece.data.json_csv import JsonLines, csv_rows, json_rows
from mm_piece.errors import DataError

Bounds = tuple[int, int | None]  # first row, and last + 1


class Raw(Protocol):
    """Rows as they stand in a source, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Any: ...


class Joined:
    """The rows of several parts, one part after the other."""

    def __init__(self, parts: Sequence[Raw]) -> None:
        """Nothing is read."""
        self.parts, self.stops = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        """The number of rows of all parts."""
        return self.stops[-1]

    def __getitem__(self, position: int) -> Any:
        """The row at a position."""
        part = bisect_right(self.stops, position)
        return self.parts[part][position - (self.stops[part - 1] if part else 0)]


def sliced(source: str) -> tuple[str, Bounds]:
    """A source without its slice, and the rows that the slice names: `train.json[100:200]`."""
    match = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", source)
    if not match:
        if re.search(r"\[[^\[\]/]*\]$", source) and not Path(source).exists():
            raise DataError(f"{source}: a slice is [FIRST:STOP], counted from 0, such as [:100]")
        return source, (0, None)
    return match[1], (int(match[2] or 0), int(match[3]) if match[3] else None)


def raw_rows(source: str, bounds: Bounds) -> tuple[Raw, int]:
    """The raw rows of a source, and the number of the first one; not fewer than `bounds` names.

    Raises DataError in one line for what is missing, cannot be read or is no source.
    """
    if source.startswith("hf:"):
        return hub_rows(source, *bounds)
    if source.startswith("scenes:"):
        return _scenes(source), 0
    path = Path(source)
    if path.is_dir():
        return _folder(path), 0
    if "*" in path.name:
        return _parts(sorted(path.parent.glob(path.name)), source), 0
    return _file(path), 0


def folder_of(source: str) -> Path:
    """The folder that image paths of a source are relative to."""
    if source.startswith("hf:"):
        return Path()
    return Path(source) if Path(source).is_dir() else Path(source).parent


def _scenes(source: str) -> Raw:
    name, separator, split = source.removeprefix("scenes:").partition("/")
    if not separator:
        raise DataError(f"{source!r} is not of the form scenes:NAME/SPLIT")
    return scenes.rows(name, split)


def _file(path: Path) -> Raw:
    if path.suffix.lower() in _READERS and path.exists():
        return _READERS[path.suffix.lower()](path)
    if path.exists():
        allowed = ", ".join(_READERS)
        raise DataError(f"cannot read {path}: a file of rows ends in one of {allowed}")
    looks = len(path.parts) == 2 and not path.suffix and not path.is_absolute()
    hint = f"; a data set of the Hub is written hf:{path}/SPLIT" if looks else ""
    raise DataError(f"cannot read {path}: it does not exist{hint}")


def _parts(files: Sequence[Path], source: str) -> Raw:
    if not files:
        raise DataError(f"cannot read {source}: no file has such a name")
    return Joined([_file(file) for file in files])


def _folder(folder: Path) -> Raw:
    """What a folder holds: a saved data set, images, or the parts of one table."""
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return saved(folder)
    for suffix in (".csv", ".jsonl", ".parquet"):
        if (folder / f"metadata{suffix}").is_file():
            return Named(_file(folder / f"metadata{suffix}"))
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _READERS)
    if len({re.sub(r"\d+", "", file.name) for file in files}) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise DataError(f"{folder} holds several tables: {names}; name one, or {folder}/NAME-*")
    if files:
        return _parts(files, str(folder))
    images = ClassFolders(folder)
    if not images:
        raise DataError(f"{folder} holds no rows: no data set, no table and no images")
    return images


_READERS: dict[str, Callable[[Path], Raw]] = {
    ".json": json_rows,
    ".jsonl": JsonLines,
    ".csv": csv_rows,
    ".parquet": Parquet,
}
