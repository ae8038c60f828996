"""What two sets of changes have in common: counts per tensor and group, overlaps, conflicts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm_piece.deltas.delta import Delta
from mm_piece.deltas.merging import compose_deltas, find_conflicts, find_shared_entries
from mm_piece.dtypes import view_bits
from mm_piece.errors import MismatchError
from mm_piece.families import GROUPS, group_of

COUNT_KEYS = ("left", "right", "equal", "different")


def compare_positions(left: Sequence[Delta], right: Sequence[Delta]) -> dict[str, Any]:
    """Compare two positions, each given by the deltas that lead to it from the base.

    Counts are of entries: changed only on the left, only on the right, on both sides to the same
    bits, on both to different ones; per tensor and per group. `overlap` has a row for every delta
    that either side has, and counts what they share and where they disagree. Raises MismatchError
    where the sides change tensors of different shape or dtype.
    """
    ours, theirs = compose_deltas(left), compose_deltas(right)
    names = list(dict.fromkeys([*ours, *theirs]))
    shapes = {name: delta.shapes[name] for delta in (*left, *right) for name in delta.shapes}
    _require_same_kind(left, right)
    tensors = [
        {
            "name": name,
            "group": group_of(name),
            "shape": list(shapes[name]),
            **dict(zip(COUNT_KEYS, _count_changes(ours.get(name), theirs.get(name)), strict=True)),
        }
        for name in names
    ]
    return {
        "same_base": len({delta.base for delta in (*left, *right)}) <= 1,
        "groups": {group: _sum_group(tensors, group) for group in GROUPS},
        "overlap": count_overlap([*left, *right]),
        "tensors": tensors,
    }


def count_overlap(deltas: Sequence[Delta]) -> dict[str, Any]:
    """Return how many entries each two deltas share, and how many of them they set differently."""
    distinct = [
        delta
        for number, delta in enumerate(deltas)
        if not any(_is_same_delta(delta, earlier) for earlier in deltas[:number])
    ]
    pairs = [[_count_pair(left, right) for right in distinct] for left in distinct]
    return {
        "tasks": [delta.task for delta in distinct],
        "entries": [[entries for entries, _ in row] for row in pairs],
        "conflicts": [[conflicts for _, conflicts in row] for row in pairs],
    }


def _count_pair(left: Delta, right: Delta) -> tuple[int, int]:
    entries = sum(len(find_shared_entries(left, right, name)[0]) for name in left.indices)
    return entries, sum(len(find_conflicts(left, right, name)) for name in left.indices)


def _is_same_delta(left: Delta, right: Delta) -> bool:
    """Tell whether two deltas are one: their files would be equal."""
    if (left.task, left.base, left.parent) != (right.task, right.base, right.parent):
        return False
    return left.before == right.before and all(
        torch.equal(index, right.indices[name])
        and torch.equal(view_bits(left.values[name]), view_bits(right.values[name]))
        for name, index in left.indices.items()
    )


def _require_same_kind(left: Sequence[Delta], right: Sequence[Delta]) -> None:
    kinds: dict[str, tuple[Any, ...]] = {}
    for delta in (*left, *right):
        for name, shape in delta.shapes.items():
            kind = shape, delta.values[name].dtype
            if kinds.setdefault(name, kind) != kind:
                raise MismatchError(f"{name} is {kinds[name]} on one side, {kind} on the other")


def _count_changes(
    left: tuple[Tensor, Tensor] | None, right: tuple[Tensor, Tensor] | None
) -> tuple[int, int, int, int]:
    if left is None or right is None:
        return len(left[0]) if left else 0, len(right[0]) if right else 0, 0, 0
    both = torch.isin(left[0], right[0], assume_unique=True)
    back = torch.isin(right[0], left[0], assume_unique=True)
    same = int((view_bits(left[1])[both] == view_bits(right[1])[back]).sum())
    count = int(both.sum())
    return len(both) - count, len(back) - count, same, count - same


def _sum_group(tensors: Sequence[dict[str, Any]], group: str) -> dict[str, int]:
    rows = [tensor for tensor in tensors if tensor["group"] == group]
    return {key: sum(row[key] for row in rows) for key in COUNT_KEYS}
