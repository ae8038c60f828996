"""What a task changed in each group of weights, measured while the model is tuned."""

from collections.abc import Mapping
from math import hypot

from torch import Tensor

from mm_piece.distributed import norm_of, shape_of
from mm_piece.families import GROUPS, group_of
from mm_piece.sparse.tuning import sparse_tuning


def measure_changes(
    tuning: sparse_tuning,
    patchable: Mapping[str, int],
) -> dict[str, dict[str, float]]:
    """Return a row of numbers for each group, in the order of `GROUPS`.

    `patchable` maps the weights that a task may change to their number of entries. Columns: see
    `sparse.change_report`.
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
            report[group] = _measure_group(
                tuning,
                names_by_group[group],
                named,
                patchable,
            )
    return report


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
