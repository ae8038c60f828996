"""What `train` prints at its end: what was learned, what it cost, and what to do next."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from mm_piece.cli.options import echo, show_rows
from mm_piece.sizes import format_bytes

if TYPE_CHECKING:
    from mm_piece.store.delta_store import DeltaStore


def print_summary(store: "DeltaStore") -> None:
    """Print the scores of a store's tasks, its base ability and sizes, and further commands."""
    _print_scores(store)
    _print_base_ability(store)
    _print_sizes(store)

    path = store.path
    echo("")
    echo("Next:")
    echo(f"  mm-piece report {path}        a page about all of it")
    echo(f"  mm-piece results {path}       each task after each task")
    echo(f"  mm-piece export {path} TO     an ordinary checkpoint; --at 1: as it was after task 1")


def _print_scores(store: "DeltaStore") -> None:
    """Print each task's score at the base, at its own position and at the last one."""
    results = store.results()
    matrix = results.get("matrix", [])

    at_base = matrix[0]
    at_last = matrix[-1]
    at_own = []
    rows = []
    for task, entry in enumerate(store.entries):
        own_score = matrix[task + 1][task]
        at_own.append(own_score)
        row = (
            str(task + 1),
            entry.task,
            _format_score(at_base[task]),
            _format_score(own_score),
            _format_score(at_last[task]),
        )
        rows.append(row)

    means = [fmean(scores) for scores in (at_base, at_own, at_last)]
    rows.append(("", "mean", *map(_format_score, means)))

    header = (
        "position",
        "task",
        "at the base",
        "at its position",
        f"now, at {len(store)}",
    )
    show_rows(header, rows, title="scores, %")
    _point_out_unlearned(store, matrix)


def _point_out_unlearned(store: "DeltaStore", matrix: Sequence[Sequence[float]]) -> None:
    """Name the tasks that score no better at their own position than just before it."""
    unlearned = []
    for task, entry in enumerate(store.entries):
        before = matrix[task][task]
        after = matrix[task + 1][task]
        # at 100 % there was nothing to learn
        if after <= before < 1:
            unlearned.append(entry.task)

    if unlearned:
        names = ", ".join(unlearned)
        echo(
            f"Note: training did not raise the score of {names}: look at the answers in the "
            "report; a higher train.learning_rate, more train.num_train_epochs or a higher "
            "select.density may help"
        )


def _format_score(score: float) -> str:
    return f"{100 * score:.1f}"


def _print_base_ability(store: "DeltaStore") -> None:
    """Print how much of the base's ability is left, where a recipe has general tasks."""
    results = store.results()
    ability = results.get("base_ability")
    if not ability:
        return

    names = ", ".join(results.get("general", []))
    before = f"{ability[0]:.1%}"
    now = f"{ability[-1]:.1%}"
    echo(f"base ability ({names}): {before} before, {now} now")


def _print_sizes(store: "DeltaStore") -> None:
    """Print how large the deltas are beside full checkpoints of the same positions."""
    sizes = [entry.bytes for entry in store.entries]
    number = len(sizes)
    plural = "" if number == 1 else "s"
    checkpoints_size = number * store.base.facts["bytes"]

    deltas = f"{number} delta{plural}: {format_bytes(sum(sizes))}"
    checkpoints = f"checkpoints of these positions would take {format_bytes(checkpoints_size)}"
    echo(f"{deltas}; {checkpoints}")
