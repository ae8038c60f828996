"""What two sets of changes have in common: counts per tensor and group, overlaps, conflicts.

Without torch: `mm-piece diff` counts entries and compares bit patterns, which numpy does as well.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np

from mm_piece.deltas.arrays import DeltaArrays
from mm_piece.deltas.entry_sets import (
    compose_entries,
    find_shared_entries,
    find_shared_positions,
    is_different,
    kind_of,
    list_shared_names,
)
from mm_piece.deltas.rows import Indices, RowType, ValueRow
from mm_piece.errors import MismatchError
from mm_piece.families import GROUPS, group_of

CountKey = Literal["left", "right", "equal", "different"]
COUNT_KEYS: tuple[CountKey, ...] = (
    "left",
    "right",
    "equal",
    "different",
)


class Counts(TypedDict):
    """Numbers of entries that two sides change, by `COUNT_KEYS`."""

    left: int
    right: int
    equal: int
    different: int


class TensorCounts(Counts):
    """Those of one tensor."""

    name: str
    group: str
    shape: list[int]


class Overlap(TypedDict):
    """What each two of some deltas share: square matrices of numbers of entries."""

    tasks: list[str]
    entries: list[list[int]]
    conflicts: list[list[int]]


class PositionComparison(TypedDict):
    """What `compare_positions` returns."""

    same_base: bool
    groups: dict[str, Counts]
    overlap: Overlap
    tensors: list[TensorCounts]


def compare_positions(
    left: Sequence[DeltaArrays],
    right: Sequence[DeltaArrays],
) -> PositionComparison:
    """Compare two positions, each given by the deltas that lead to it from the base.

    Counts are of entries, per tensor and per group: `left` and `right` are changed on that side
    only, `equal` on both sides to the same bits, `different` on both to different ones. `overlap`
    has a row for every delta of either side; it counts the entries that two deltas share, and those
    that they set differently. Raises MismatchError where the sides change tensors of different
    shape or dtype.
    """
    deltas = [*left, *right]
    left_entries = compose_entries(left)
    right_entries = compose_entries(right)
    _require_same_kind(deltas)

    shapes: dict[str, tuple[int, ...]] = {}
    for delta in deltas:
        shapes.update(delta.shapes)

    tensors: list[TensorCounts] = []
    # in the order of the left side; tensors that only the right side changes come last
    names = dict.fromkeys([*left_entries, *right_entries])
    for name in names:
        counts = _count_changes(
            left_entries.get(name),
            right_entries.get(name),
        )
        row: TensorCounts = {
            "name": name,
            "group": group_of(name),
            "shape": list(shapes[name]),
            **counts,
        }
        tensors.append(row)

    bases = {delta.base for delta in deltas}
    return {
        "same_base": len(bases) <= 1,
        "groups": {group: _sum_group(tensors, group) for group in GROUPS},
        "overlap": count_overlap(deltas),
        "tensors": tensors,
    }


def count_overlap(deltas: Sequence[DeltaArrays]) -> Overlap:
    """Return how many entries each two deltas share, and how many of them they set differently.

    `entries` and `conflicts` are square matrices, one row and one column for each of `tasks`.
    """
    # two positions of one store share their first deltas
    distinct: list[DeltaArrays] = []
    for delta in deltas:
        if not any(_is_same_delta(delta, earlier) for earlier in distinct):
            distinct.append(delta)

    entries: list[list[int]] = []
    conflicts: list[list[int]] = []
    for left in distinct:
        pairs = [_count_pair(left, right) for right in distinct]
        entries.append([num_shared for num_shared, _ in pairs])
        conflicts.append([num_conflicts for _, num_conflicts in pairs])

    return {
        "tasks": [delta.task for delta in distinct],
        "entries": entries,
        "conflicts": conflicts,
    }


def _count_pair(
    left: DeltaArrays,
    right: DeltaArrays,
) -> tuple[int, int]:
    """Return how many entries two deltas share, and how many of them conflict."""
    num_shared = 0
    num_conflicts = 0
    for name in list_shared_names(left, right):
        shared, left_values, right_values = find_shared_entries(left, right, name)
        conflicts = is_different(left_values, right_values)
        num_shared += len(shared)
        num_conflicts += int(conflicts.sum())
    return num_shared, num_conflicts


def _is_same_delta(left: DeltaArrays, right: DeltaArrays) -> bool:
    """Return whether two deltas are one: their files would be equal."""
    for field in ("task", "base", "parent"):
        if getattr(left, field) != getattr(right, field):
            return False
    # names of tensors, and digests of the values before
    if left.before != right.before:
        return False

    for name, left_indices in left.indices.items():
        if not np.array_equal(left_indices, right.indices[name]):
            return False
        if is_different(left.values[name], right.values[name]).any():
            return False
    return True


def _require_same_kind(deltas: Sequence[DeltaArrays]) -> None:
    """Raise MismatchError unless each tensor has one shape and dtype in all deltas."""
    kinds: dict[str, RowType] = {}
    for delta in deltas:
        for name in delta.shapes:
            kind = kind_of(delta, name)
            expected = kinds.setdefault(name, kind)
            if expected != kind:
                raise MismatchError(f"{name} is {expected} on one side, {kind} on the other")


def _count_changes(
    left: tuple[Indices, ValueRow] | None,
    right: tuple[Indices, ValueRow] | None,
) -> Counts:
    """Return the counts of one tensor."""
    if left is None or right is None:
        return {
            "left": len(left[0]) if left else 0,
            "right": len(right[0]) if right else 0,
            "equal": 0,
            "different": 0,
        }

    left_indices, left_values = left
    right_indices, right_values = right
    left_positions, right_positions = find_shared_positions(left_indices, right_indices)
    left_bits = left_values.bits[left_positions]
    right_bits = right_values.bits[right_positions]

    num_shared = len(left_positions)
    num_equal = int((left_bits == right_bits).sum())
    return {
        "left": len(left_indices) - num_shared,
        "right": len(right_indices) - num_shared,
        "equal": num_equal,
        "different": num_shared - num_equal,
    }


def _sum_group(
    tensors: Sequence[TensorCounts],
    group: str,
) -> Counts:
    """Return the counts of all tensors of one group, added up."""
    totals: Counts = {"left": 0, "right": 0, "equal": 0, "different": 0}
    for tensor in tensors:
        if tensor["group"] == group:
            for key in COUNT_KEYS:
                totals[key] += tensor[key]
    return totals
