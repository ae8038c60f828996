"""Deltas as sets of entries: composed in order, shared by two, in conflict; without torch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mm_piece.deltas.arrays import DeltaArrays
from mm_piece.deltas.file import EntryRows
from mm_piece.deltas.rows import Indices, RowType, ValueRow
from mm_piece.errors import BaseError, MismatchError

_Positions = NDArray[np.signedinteger]
_Flags = NDArray[np.bool_]


def compose_entries(deltas: Sequence[DeltaArrays]) -> EntryRows:
    """Merge deltas, in order, into one set of entries; where they meet, the later one wins."""
    bases = {delta.base for delta in deltas}
    if len(bases) > 1:
        raise BaseError(f"deltas of different bases do not compose: {sorted(bases)}")

    # a dict as an ordered set: tensors in the order in which deltas first name them
    names: dict[str, None] = {}
    for delta in deltas:
        names.update(dict.fromkeys(delta.indices))

    composed: EntryRows = {}
    for name in names:
        touching = [delta for delta in deltas if name in delta.indices]
        composed[name] = _compose_tensor(name, touching)
    return composed


def _compose_tensor(
    name: str,
    deltas: Sequence[DeltaArrays],
) -> tuple[Indices, ValueRow]:
    """Return sorted indices of one tensor, and the last delta's value for each."""
    kinds = {str(kind_of(delta, name)) for delta in deltas}
    if len(kinds) > 1:
        found = ", ".join(sorted(kinds))
        raise MismatchError(f"{name} is not of one shape and dtype in all deltas: {found}")

    index_rows: list[Indices] = []
    bit_rows: list[NDArray[np.unsignedinteger]] = []
    for delta in deltas:
        index_rows.append(delta.indices[name])
        bit_rows.append(delta.values[name].bits)

    touched = np.concatenate(index_rows)
    # stable: entries with one index stay in the order of the deltas
    order = np.argsort(touched, kind="stable")
    indices = touched[order]
    is_last = np.ones(len(indices), dtype=bool)
    is_last[:-1] = indices[1:] != indices[:-1]

    bits = np.concatenate(bit_rows)
    last_bits = bits[order[is_last]]
    dtype = deltas[0].values[name].dtype
    return indices[is_last], ValueRow(dtype, last_bits)


def kind_of(delta: DeltaArrays, name: str) -> RowType:
    """Return the dtype and the shape of a tensor that a delta changes."""
    values = delta.values[name]
    return RowType(
        dtype=values.type.dtype,
        shape=delta.shapes[name],
    )


def list_shared_names(
    left: DeltaArrays,
    right: DeltaArrays,
) -> list[str]:
    """Return the tensors that both deltas change, in the order of the left one."""
    return [name for name in left.indices if name in right.indices]


def find_shared_positions(
    left: Indices,
    right: Indices,
) -> tuple[_Positions, _Positions]:
    """Return where two sorted rows of unique indices have those that are in both."""
    if not len(right):
        nowhere = np.empty(0, np.int64)
        return nowhere, nowhere

    # where each left index would be inserted on the right; one past the end cannot be read
    candidates = np.searchsorted(right, left)
    nearest = right.take(candidates, mode="clip")
    left_positions = np.flatnonzero(nearest == left)
    right_positions = candidates[left_positions]
    return left_positions, right_positions


def find_shared_entries(
    left: DeltaArrays,
    right: DeltaArrays,
    name: str,
) -> tuple[Indices, ValueRow, ValueRow]:
    """Return the flat indices that both deltas change in a tensor, and each one's values there.

    Both must change the tensor. Raises MismatchError where its shape differs.
    """
    _require_same_shape(left, right, name)
    left_indices = left.indices[name]
    right_indices = right.indices[name]
    left_positions, right_positions = find_shared_positions(left_indices, right_indices)
    return (
        left_indices[left_positions],
        _take_values(left, name, left_positions),
        _take_values(right, name, right_positions),
    )


def find_conflicts(
    left: DeltaArrays,
    right: DeltaArrays,
    name: str,
) -> Indices:
    """Return the flat indices that two deltas change to different bit patterns in a tensor.

    Both must change the tensor.
    """
    indices, left_values, right_values = find_shared_entries(left, right, name)
    conflicting = is_different(left_values, right_values)
    return indices[conflicting]


def is_different(
    left: ValueRow,
    right: ValueRow,
) -> _Flags:
    """Return for each two values whether they differ: in bits, or all of them in dtype."""
    if left.dtype != right.dtype:
        return np.ones(len(left.bits), dtype=bool)
    return left.bits != right.bits


def _take_values(
    delta: DeltaArrays,
    name: str,
    positions: _Positions,
) -> ValueRow:
    values = delta.values[name]
    return ValueRow(
        dtype=values.dtype,
        bits=values.bits[positions],
    )


def _require_same_shape(
    left: DeltaArrays,
    right: DeltaArrays,
    name: str,
) -> None:
    left_shape = list(left.shapes[name])
    right_shape = list(right.shapes[name])
    if left_shape != right_shape:
        raise MismatchError(
            f"{name} has the shapes {left_shape} and {right_shape} "
            f"in {left.task!r} and {right.task!r}"
        )
