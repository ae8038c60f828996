"""Where rows come from, as sequences of raw rows.

    rows.json  .jsonl  .csv  .tsv  .parquet            a file, or the parts of one: `rows-*.parquet`
    folder                                             what `datasets` saved; the parts of a table;
                                                       images in a folder for each class, or named
                                                       by metadata.csv, .jsonl or .parquet
    hf:OWNER/NAME[:CONFIG][@REVISION]/SPLIT            a data set of the Hub
    scenes:NAME/SPLIT                                  the embedded data

JSON and CSV lie in memory as a whole; the other sources read or draw a row when it is needed.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from mm_piece.data import scenes
from mm_piece.data.arrow import ParquetRows, open_hub_dataset, open_saved_dataset
from mm_piece.data.image_folder import ClassFolderRows, MetadataRows
from mm_piece.data.json_csv import (
    JsonLinesRows,
    read_csv_rows,
    read_json_rows,
    read_tsv_rows,
)
from mm_piece.errors import DataError

RowBounds = tuple[int, int | None]  # first row, and last + 1


class SourceRows(Protocol):
    """Rows as they stand in a source, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Any: ...


class ConcatenatedRows:
    """The rows of several parts, one part after the other."""

    def __init__(self, parts: Sequence[SourceRows]) -> None:
        """Take the parts, without reading a row."""
        self.parts = parts
        lengths = map(len, parts)
        self.stops = list(accumulate(lengths))  # where each part ends

    def __len__(self) -> int:
        """Return the number of rows of all parts."""
        return self.stops[-1]

    def __getitem__(self, position: int) -> Any:
        """Return the row at a position."""
        index = bisect_right(self.stops, position)
        start = self.stops[index - 1] if index else 0
        part = self.parts[index]
        return part[position - start]


def split_slice(source: str) -> tuple[str, RowBounds]:
    """Return a source without its slice, and the rows that the slice names.

    A slice stands at the end, as in `train.json[100:200]`. Raises DataError for a malformed one.
    """
    match = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", source)
    if not match:
        # brackets may also belong to the name of a file
        ends_in_brackets = re.search(r"\[[^\[\]/]*\]$", source)
        if ends_in_brackets and not Path(source).exists():
            raise DataError(f"{source}: a slice is [FIRST:STOP], counted from 0, such as [:100]")
        return source, (0, None)

    path, first, stop = match.groups()
    first_row = int(first or 0)
    if not stop:
        return path, (first_row, None)
    return path, (first_row, int(stop))


def open_raw_rows(
    source: str,
    bounds: RowBounds,
) -> tuple[SourceRows, int]:
    """Return raw rows of a source, and the number of the first one.

    They comprise the rows that `bounds` names, and may be all of the source. Raises DataError in
    one line for a source that is missing, cannot be read or is none.
    """
    if source.startswith("hf:"):
        return open_hub_dataset(source, *bounds)
    if source.startswith("scenes:"):
        return _open_scenes(source), 0
    if "://" in source:
        raise DataError(
            f"cannot read {source}: it is a URL; rows must be files here: download it first, "
            "or name a data set of the Hub, hf:OWNER/NAME/SPLIT"
        )

    path = Path(source)
    if path.is_dir():
        return _open_folder(path), 0
    if "*" in path.name:
        matching = path.parent.glob(path.name)
        return _open_parts(sorted(matching), source), 0
    return _open_file(path), 0


def image_root_of(source: str) -> Path:
    """Return the folder that image paths of a source are relative to."""
    if source.startswith("hf:"):
        return Path()

    path = Path(source)
    if path.is_dir():
        return path
    return path.parent


def _open_scenes(source: str) -> SourceRows:
    path = source.removeprefix("scenes:")
    name, separator, split = path.partition("/")
    if not separator:
        raise DataError(f"{source!r} is not of the form scenes:NAME/SPLIT")
    return scenes.SceneRows(name, split)


def _open_file(path: Path) -> SourceRows:
    if not path.exists():
        raise _make_missing_error(path)

    suffix = path.suffix.lower()
    reader = _READERS.get(suffix)
    if reader is None:
        allowed = ", ".join(_READERS)
        raise DataError(f"cannot read {path}: a file of rows ends in one of {allowed}")
    return reader(path)


def _make_missing_error(path: Path) -> DataError:
    hint = ""
    # OWNER/NAME is what a data set of the Hub is called elsewhere
    is_plain = not path.suffix and not path.is_absolute()
    if is_plain and len(path.parts) == 2:
        hint = f"; a data set of the Hub is written hf:{path}/SPLIT"
    if nearest := _find_nearest_name(path):
        hint = f"; did you mean {nearest}?"
    if path.is_absolute():
        return DataError(f"cannot read {path}: it does not exist{hint}")
    return DataError(
        f"cannot read {path}: {path.absolute()} does not exist "
        f"(paths count from the folder that the command runs in){hint}"
    )


def _find_nearest_name(path: Path) -> Path | None:
    """Return what lies beside a missing file or folder and has nearly its name."""
    try:
        names = [neighbour.name for neighbour in path.parent.iterdir()]
    except OSError:  # the folder is missing too
        return None

    close = get_close_matches(path.name, names, n=1, cutoff=0.75)
    if not close:
        return None
    return path.parent / close[0]


def _open_parts(files: Sequence[Path], source: str) -> SourceRows:
    if not files:
        tried = Path(source).absolute()
        raise DataError(f"cannot read {source}: no file has such a name; looked for as {tried}")

    parts = []
    for file in files:
        parts.append(_open_file(file))
    return ConcatenatedRows(parts)


def _open_folder(folder: Path) -> SourceRows:
    """Open what a folder holds: a saved data set, images, or the parts of one table."""
    for name in ("state.json", "dataset_dict.json"):
        if (folder / name).is_file():
            return open_saved_dataset(folder)

    for suffix in (".csv", ".jsonl", ".parquet"):
        metadata = folder / f"metadata{suffix}"
        if metadata.is_file():
            rows = _open_file(metadata)
            return MetadataRows(rows)

    files = _find_tables(folder)
    if files:
        return _open_parts(files, str(folder))

    images = ClassFolderRows(folder)
    if not images:
        raise DataError(f"{folder} holds no rows: no data set, no table and no images")
    return images


def _find_tables(folder: Path) -> list[Path]:
    """Return the parts of the one table in a folder; DataError if there are several tables."""
    files = []
    stems = set()
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in _READERS:
            continue
        files.append(file)
        # parts of one table differ in their numbers alone, as train-00000-of-00002.parquet
        stem = re.sub(r"\d+", "", file.name)
        stems.add(stem)

    if len(stems) > 1:
        first_names = [file.name for file in files[:5]]
        names = ", ".join(first_names)
        raise DataError(f"{folder} holds several tables: {names}; name one, or {folder}/NAME-*")
    return files


# By suffix, in lower case.
_READERS: dict[str, Callable[[Path], SourceRows]] = {
    ".json": read_json_rows,
    ".jsonl": JsonLinesRows,
    ".csv": read_csv_rows,
    ".tsv": read_tsv_rows,
    ".parquet": ParquetRows,
}
