"""What stores and delta files hold: found by a user's names for them, described, compared.

Without torch, which takes longer to import than all of this.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from mm_piece.deltas.arrays import DeltaArrays
from mm_piece.errors import as_path
from mm_piece.families import group_of
from mm_piece.store.delta_store import DeltaStore

if TYPE_CHECKING:
    from mm_piece.deltas.comparison import PositionComparison


def as_store(store: str | Path | DeltaStore) -> DeltaStore:
    """Return the store of a path, or the store itself."""
    if isinstance(store, DeltaStore):
        return store

    path = as_path(store, "store")
    return DeltaStore.open(path)


def is_delta_file(source: str | Path | DeltaStore) -> TypeGuard[str | Path]:
    """Return whether a source is a delta file, not a store."""
    if isinstance(source, DeltaStore):
        return False
    return as_path(source, "store").is_file()


def describe_delta(
    source: str | Path | DeltaStore,
    at: int | None,
) -> dict[str, Any]:
    """Return a delta's header and one record per tensor.

    The delta is a file, or the one that leads to a store's position (default: the last). `info` is
    the maker's word; the other facts are read and counted here.
    """
    delta = _read_delta(source, at)
    records = []
    for name, index in delta.indices.items():
        record = {
            "name": name,
            "group": group_of(name),
            "shape": list(delta.shapes[name]),
            "entries": len(index),
        }
        records.append(record)

    return {
        "task": delta.task,
        "base": delta.base,
        "parent": delta.parent,
        "entries": delta.entries,
        "info": delta.info,
        "tensors": records,
    }


def _read_delta(
    source: str | Path | DeltaStore,
    at: int | None,
) -> DeltaArrays:
    """Read a delta file, or the delta that leads to a position of a store."""
    if is_delta_file(source):
        return DeltaArrays.load(source)

    store = as_store(source)
    position = at
    if position is None:
        position = len(store)
    return store.delta_arrays(position)


def diff_positions(
    left: str | Path,
    right: str | Path,
) -> "PositionComparison":
    """Compare two positions: each a store, `STORE@T` or a delta file; see `compare_positions`."""
    from mm_piece.deltas.comparison import compare_positions  # `show` needs none of it

    left_deltas = _read_deltas_at(left)
    right_deltas = _read_deltas_at(right)
    return compare_positions(left_deltas, right_deltas)


def _read_deltas_at(source: str | Path) -> list[DeltaArrays]:
    """Read the deltas of a source: a store (its last position), `STORE@T`, or a delta file."""
    if Path(source).is_file():
        delta = DeltaArrays.load(source)
        return [delta]

    store, at = _find_position(source)
    last = store.position(at)
    deltas = []
    for position in range(1, last + 1):
        delta = store.delta_arrays(position)
        deltas.append(delta)
    return deltas


def _find_position(source: str | Path) -> tuple[DeltaStore, int | None]:
    """Open the store that a source names; return it and the position, None for the last."""
    match = re.fullmatch(r"(.+)@([^@/]*)", str(source))
    # a folder whose own name ends in @T is a store, not a position
    if match and not Path(source).exists():
        store = DeltaStore.open(match[1])
        text = match[2]
        position = int(text) if text.isdecimal() else text
        return store, store.require_position(position)  # type: ignore[arg-type] - it may be a text

    return DeltaStore.open(source), None
