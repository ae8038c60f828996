"""The change report: what a task changed in each group, the proof that a tower trained or stayed.

Every group of the model has a row, also one that could not be selected.
"""

from collections.abc import Mapping
from math import hypot
from typing import Any

from torch import Tensor

from mm_piece.distributed import norm_of, shape_of
from mm_piece.families import GROUPS, group_of
from mm_piece.sparse.tuning import sparse_tuning

COLUMNS = ("entries", "patchable", "selected", "changed", "rounded", "norm", "share")


def measure_changes(
    tuning: sparse_tuning, patchable: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Per group, in the order of `GROUPS`: what there is, what could change and what did.

    `patchable` maps the weights that a task may change to their number of entries. Columns:
    `entries` of the group, `patchable` ones, `selected` ones, `changed` ones (other bits than
    before), `rounded` ones (trained values that the weights' dtype rounds back to what was there),
    `norm` of the change, and `share`: that norm over the norm of the group's weights.
    """
    tuning.write_back()
    named = tuning.weights
    rows: dict[str, list[str]] = {group_of(name): [] for name in named}
    for name in named:
        rows[group_of(name)].append(name)
    return {g: _measure_group(tuning, rows[g], named, patchable) for g in GROUPS if g in rows}


def format_rounding_warning(groups: Mapping[str, Mapping[str, float]]) -> str:
    """What to say of a task that lost more than half of its changes to its dtype; else nothing.

    Values that never moved do not count: they got no gradient, and no dtype would help them.
    """
    rounded = int(sum(row["rounded"] for row in groups.values()))
    moved = rounded + int(sum(row["changed"] for row in groups.values()))
    if rounded <= moved / 2:
        return ""
    return (
        f"warning: of {moved:,} values that moved, {rounded:,} were rounded back to what was there "
        "by the model's dtype; model: {dtype: float32} in a new store, or a larger "
        "learning_rate, would keep them"
    )


def find_change_rows(info: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The change report that a delta carries: none if it carries none, or something else."""
    groups = info.get("groups")
    if not isinstance(groups, dict):
        return {}
    rows = {g: row for g, row in groups.items() if g in GROUPS and isinstance(row, dict)}
    return {g: {c: row[c] for c in COLUMNS if _is_number(row.get(c))} for g, row in rows.items()}


def _is_number(value: Any) -> bool:
    """Whether a delta's own word is a number that can be shown; JSON's may have any size."""
    return type(value) in (int, float) and abs(value) < 2**63


def _measure_group(
    tuning: sparse_tuning,
    names: list[str],
    named: Mapping[str, Tensor],
    patchable: Mapping[str, int],
) -> dict[str, float]:
    patches = [tuning.patches[name] for name in names if name in tuning.patches]
    moved = [patch.copy_entries().double() - patch.entries_before.double() for patch in patches]
    norm = hypot(*(float(change.norm()) for change in moved))
    total_norm = hypot(*(norm_of(named[name]) for name in names))
    return {
        "entries": sum(shape_of(named[name]).numel() for name in names),
        "patchable": sum(patchable.get(name, 0) for name in names),
        "selected": sum(len(change) for change in moved),
        "changed": sum(patch.count_changed() for patch in patches),
        "rounded": sum(patch.count_rounded() for patch in patches),
        "norm": _round_digits(norm),
        "share": _round_digits(norm / total_norm) if total_norm else 0.0,
    }


def _round_digits(value: float) -> float:
    """Six digits: what a sum's order of addition leaves alone."""
    return float(f"{value:.6g}")
