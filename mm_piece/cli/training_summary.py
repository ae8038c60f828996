"""What `train` prints at its end: what was learned, what it cost, and what to do next."""

from statistics import fmean
from typing import TYPE_CHECKING

from mm_piece.cli.options import echo, show_rows
from mm_piece.report.formats import format_size

if TYPE_CHECKING:
    from mm_piece.store.delta_store import DeltaStore


def print_summary(store: "DeltaStore") -> None:
    """Print the scores of a store's tasks, its base ability and sizes, and further commands."""
    _print_scores(store)
    _print_base_ability(store)
    _print_sizes(store)

    last = len(store)
    echo("")
    echo("Next:")
    echo(f"  mm-piece report {store.path}           a page about all of it")
    echo(f"  mm-piece results {store.path}          every task after every task")
    echo(f"  mm-piece export {store.path} TO --at {last}   a checkpoint as it stood after task {last}")


def _print_scores(store: "DeltaStore") -> None:
    """Print each task's score at the base, at its own position and at the last one."""
    results = store.results()
    matrix = results["matrix"]

    columns = []
    rows = []
    for position, name in enumerate(results["tasks"], start=1):
        scores = (matrix[0][position - 1], matrix[position][position - 1], matrix[-1][position - 1])
        columns.append(scores)
        rows.append((str(position), name, *map(_format_score, scores)))

    means = [fmean(column) for column in zip(*columns, strict=True)]
    rows.append(("", "mean", *map(_format_score, means)))
    header = ("position", "task", "at the base", "at its position", f"now, at {len(store)}")
    show_rows(header, rows, title="scores, %")


def _format_score(score: float) -> str:
    return f"{100 * score:.1f}"


def _print_base_ability(store: "DeltaStore") -> None:
    """Print how much of the base's ability is left, where a recipe has general tasks."""
    results = store.results()
    ability = results.get("base_ability")
    if not ability:
        return

    name = results["base_ability_name"]
    echo(f"base ability ({name}): {ability[0]:.1%} before, {ability[-1]:.1%} now")


def _print_sizes(store: "DeltaStore") -> None:
    """Print how large the deltas are beside full checkpoints of the same positions."""
    entries = store.entries
    delta_bytes = sum(entry.bytes for entry in entries)
    checkpoint_bytes = len(entries) * store.base.facts["bytes"]
    deltas = f"{len(entries)} deltas" if len(entries) > 1 else "1 delta"
    echo(
        f"{deltas}: {format_size(delta_bytes)}; "
        f"checkpoints of these positions would take {format_size(checkpoint_bytes)}"
    )
