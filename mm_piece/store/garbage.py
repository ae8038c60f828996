"""What may go from a store's folder: this library made it, and the store does not list it."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from shutil import rmtree

from mm_piece.store.folder import ANSWERS, RETENTION, WORK
from mm_piece.store.manifest import DELTA_FILE_PATTERN
from mm_piece.store.records import ManifestEntry

_TEMPORARY_NAME = re.compile(r"\..+\.[0-9]+\.tmp")  # of `atomic.writing_atomically`
_NUMBERED_SUFFIXES = {
    ANSWERS: ".json",
    RETENTION: ".safetensors",
}
_NUMBER_PATTERN = re.compile(r"[0-9]{4,}")


def list_garbage(
    store: Path,
    entries: Sequence[ManifestEntry],
) -> list[Path]:
    """Return all that may go, sorted; only the owner of the lock may remove it."""
    half_written = iter_half_written(store)
    unlisted = _iter_unlisted(store, entries)
    return sorted([*half_written, *unlisted])


def remove_garbage(paths: Iterable[Path]) -> None:
    """Remove files, and folders with all that lies in them."""
    for path in paths:
        if path.is_dir():
            rmtree(path)
        else:
            path.unlink()


def iter_half_written(store: Path) -> Iterator[Path]:
    """Yield a crashed writer's temporary files; only the owner of the lock may remove them."""
    paths = _list_own_paths(store)
    for folder in _NUMBERED_SUFFIXES:
        paths += _list_own_paths(store, folder)

    for path in paths:
        is_temporary = _TEMPORARY_NAME.fullmatch(path.name)
        if is_temporary and path.is_file():
            yield path


def _iter_unlisted(
    store: Path,
    entries: Sequence[ManifestEntry],
) -> Iterator[Path]:
    """Yield deltas, answers, retention importance and scratch of no use to this store."""
    listed = {entry.file for entry in entries}
    for path in _list_own_paths(store):
        if path.name in listed:
            continue
        is_delta = DELTA_FILE_PATTERN.fullmatch(path.name)
        if is_delta and path.is_file():
            yield path

    last = len(entries)
    for folder, suffix in _NUMBERED_SUFFIXES.items():
        yield from _iter_past_end(store, last, folder, suffix)
    yield from _iter_finished_work(store, last)


def _iter_past_end(
    store: Path,
    last: int,
    folder: str,
    suffix: str,
) -> Iterator[Path]:
    """Yield a folder's numbered files of positions that the store does not have."""
    for path in _list_own_paths(store, folder):
        # other files in the folder are not ours
        if path.suffix != suffix:
            continue
        position = _parse_number(path.stem)
        if position is None or position <= last:
            continue
        if path.is_file():
            yield path


def _iter_finished_work(store: Path, last: int) -> Iterator[Path]:
    """Yield the scratch folders of tasks that were learned."""
    for path in _list_own_paths(store, WORK):
        position = _parse_number(path.name)
        # `work/0000` is not ours: position 0 is never trained
        if not position or position > last:
            continue
        if path.is_dir():
            yield path


def _parse_number(name: str) -> int | None:
    """Return the position that a file or folder is named after; None for another name."""
    if not _NUMBER_PATTERN.fullmatch(name):
        return None
    return int(name)


def _list_own_paths(store: Path, folder: str = "") -> list[Path]:
    """List the paths in a folder of the store, links aside: this library makes none."""
    path = store / folder
    if not path.is_dir():
        return []
    # the store itself may be a link, its folders may not
    if folder and path.is_symlink():
        return []

    children = path.iterdir()
    return [child for child in children if not child.is_symlink()]
