"""The change report: what a task changed in each group of weights.

It shows whether a vision tower trained or stayed as it was. Every group of the model has a row,
even one whose weights could not be selected. Columns:

    entries     of the group
    patchable   entries that the task may change
    selected    entries that it trained
    changed     entries with other bits than before
    rounded     trained values that the weights' dtype rounds back to what was there
    norm        of the change
    share       that norm over the norm of the group's weights

`sparse.change_measurement` makes a report. This module reads it from a delta, without torch.
"""

from collections.abc import Mapping

from mm_piece.families import GROUPS

COLUMNS = (
    "entries",
    "patchable",
    "selected",
    "changed",
    "rounded",
    "norm",
    "share",
)


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
