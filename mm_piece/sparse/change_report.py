"""The change report: what a task changed in each group of weights.

It shows whether a vision tower trained or stayed as it was. Every group of the model has a row,
even one whose weights could not be selected.
"""

from collections.abc import Mapping
from math import hypot

from torch import Tensor

from mm_piece.distributed import norm_of, shape_of
from mm_piece.families import GROUPS, group_of
from mm_piece.sparse.tuning import sparse_tuning

COLUMNS = (
    "entries",
    "patchable",
    "selected",
    "changed",
    "rounded",
    "norm",
    "share",
)


def measure_changes(
    tuning: sparse_tuning,
    patchable: Mapping[str, int],
) -> dict[str, dict[str, float]]:
    """Return a row of numbers for each group, in the order of `GROUPS`.

    `patchable` maps the weights that a task may change to their number of entries. Columns:
    `entries` of the group, `patchable` ones, `selected` ones, `changed` ones (other bits than
    before), `rounded` ones (trained values that the weights' dtype rounds back to what was there),
    `norm` of the change, and `share`: that norm over the norm of the group's weights.
    """
    tuning.write_back()
    named = tuning.weights
    names_by_group: dict[str, list[str]] = {}
    for name in named:
        names = names_by_group.setdefault(group_of(name), [])
        names.append(name)

    report: dict[str, dict[str, float]] = {}
    for group in GROUPS:
        if group in names_by_group:
            names = names_by_group[group]
            report[group] = _measure_group(tuning, names, named, patchable)
    return report


def format_rounding_warning(groups: Mapping[str, Mapping[str, float]]) -> str:
    """Return a warning if a task lost more than half of its changes to its dtype, else "".

    Values that never moved do not count: they got no gradient, and no dtype would help them.
    """
    rows = groups.values()
    rounded = int(sum(row["rounded"] for row in rows))
    changed = int(sum(row["changed"] for row in rows))
    moved = rounded + changed
    if rounded <= moved / 2:
        return ""
    return (
        f"warning: of {moved:,} values that moved, {rounded:,} were rounded back to what was there "
        "by the model's dtype; model: {dtype: float32} in a new store, or a larger "
        "learning_rate, would keep them"
    )


def find_change_rows(info: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """Return the change report in a delta's info; empty if there is none, or something else.

    A delta may come from anywhere: unknown groups and columns, and values that are no numbers, are
    left out.
    """
    groups = info.get("groups")
    if not isinstance(groups, dict):
        return {}

    found: dict[str, dict[str, float]] = {}
    for group, row in groups.items():
        if group not in GROUPS or not isinstance(row, dict):
            continue

        found[group] = {}
        for column in COLUMNS:
            if column in row and _is_number(row[column]):
                found[group][column] = row[column]
    return found


def _is_number(value: object) -> bool:
    """Return whether a value is a number that can be shown; JSON's may have any size."""
    # `type`, not isinstance: True is no number
    if type(value) is int or type(value) is float:
        return abs(value) < 2**63
    return False


def _measure_group(
    tuning: sparse_tuning,
    names: list[str],
    named: Mapping[str, Tensor],
    patchable: Mapping[str, int],
) -> dict[str, float]:
    """Return the row of one group, whose weights are `names`."""
    num_entries = 0
    norms = []  # of whole weights
    patches = []
    for name in names:
        weight = named[name]
        num_entries += shape_of(weight).numel()
        norms.append(norm_of(weight))
        if name in tuning.patches:
            patches.append(tuning.patches[name])

    changes = []
    change_norms = []
    for patch in patches:
        after = patch.copy_entries().double()
        before = patch.entries_before.double()
        change = after - before
        changes.append(change)
        change_norms.append(float(change.norm()))

    # The norm of norms is that of all entries together.
    norm = hypot(*change_norms)
    total_norm = hypot(*norms)
    share = norm / total_norm if total_norm else 0.0
    return {
        "entries": num_entries,
        "patchable": sum(patchable.get(name, 0) for name in names),
        "selected": sum(len(change) for change in changes),
        "changed": sum(patch.count_changed() for patch in patches),
        "rounded": sum(patch.count_rounded() for patch in patches),
        "norm": _round_digits(norm),
        "share": _round_digits(share),
    }


def _round_digits(value: float) -> float:
    """Round to six digits, which the order of additions in a sum leaves alone."""
    return float(f"{value:.6g}")
