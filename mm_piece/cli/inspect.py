"""Commands that look at stores: log, show, results, diff, verify, report."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mm_piece.cli.options import (
    AT,
    JSON,
    PATH,
    STORE,
    TENSORS,
    echo,
    echo_json,
    show_rows,
    show_table,
)
from mm_piece.errors import StoreError

# Columns of a change report that are shown -> how they are called; `--json` has all.
_SHOWN_CHANGES = {
    "entries": "entries",
    "selected": "selected",
    "changed": "changed",
    "rounded": "rounded away",
    "share": "moved, % of norm",
}

if TYPE_CHECKING:
    from mm_piece.deltas.comparison import Overlap
    from mm_piece.store.delta_store import DeltaStore


@click.command()
@STORE
@JSON
def log(store: Path, as_json: bool) -> None:
    """List the deltas of STORE."""
    from mm_piece.store.delta_store import DeltaStore

    content = DeltaStore.open(store).log()
    rows = []
    for delta in content["deltas"]:
        row = (
            str(delta["position"]),
            delta["task"],
            f"{delta['entries']:,}",
            f"{delta['bytes']:,}",
            delta["sha256"][:12],  # enough to tell deltas apart by eye
            delta["file"],
        )
        rows.append(row)

    header = ("position", "task", "entries", "bytes", "sha256", "file")
    show_table(content, header, rows, as_json)


@click.command()
@STORE
@AT
@TENSORS
@JSON
def show(
    store: Path,
    at: int | None,
    tensors: bool,
    as_json: bool,
) -> None:
    """Show what one delta holds: one of STORE, or a delta file."""
    from mm_piece.store.inspection import describe_delta

    content = describe_delta(store, at)
    if as_json:
        echo_json(content)
        return

    _show_facts(content)
    _show_changes(content["info"])

    if not tensors:
        number = len(content["tensors"])
        echo(f"{number} tensors are changed: --tensors lists them")
        return

    rows = []
    for tensor in content["tensors"]:
        shape = "x".join(map(str, tensor["shape"]))
        entries = f"{tensor['entries']:,}"
        rows.append((tensor["name"], tensor["group"], shape, entries))
    show_rows(("tensor", "group", "shape", "entries"), rows)


def _show_facts(content: dict[str, Any]) -> None:
    """Print what describes a delta as a whole, one fact a line."""
    from mm_piece.sparse.change_report import find_change_rows

    facts = {}
    for key, value in content.items():
        if key not in ("info", "tensors"):
            facts[key] = value

    # `info` comes from whoever wrote the delta: a prefix keeps it from posing as a fact
    has_changes = bool(find_change_rows(content["info"]))
    for key, value in content["info"].items():
        if key == "groups" and has_changes:  # shown as a table
            continue
        facts[f"info.{key}"] = value

    width = max(map(len, facts))
    for key, value in facts.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        echo(f"{key:>{width}}  {shown}")


def _show_changes(info: Mapping[str, object]) -> None:
    """Print a delta's change report: how much it changes in each group of weights."""
    from mm_piece.sparse.change_report import find_change_rows

    rows = []
    unchanged = []
    for group, row in find_change_rows(info).items():
        if row.get("changed") == 0:
            unchanged.append(group)
            continue
        cells = [_format_change(column, row.get(column)) for column in _SHOWN_CHANGES]
        rows.append((group, *cells))

    header = ("group", *_SHOWN_CHANGES.values())
    show_rows(header, rows)
    if unchanged:
        echo(f"nothing changed in {', '.join(unchanged)}")


def _format_change(column: str, value: float | None) -> object:
    """Return a column's value for a table: a share in percent, a count as it is."""
    if value is None:  # an older delta
        return "–"
    if column == "share":
        return f"{100 * value:.2f}"
    return value


@click.command()
@STORE
@click.option("--explain", is_flag=True, help="Show the formula of each metric.")
@JSON
def results(
    store: Path,
    explain: bool,
    as_json: bool,
) -> None:
    """Show the accuracy matrix of STORE."""
    from mm_piece.store.delta_store import DeltaStore

    if explain and as_json:
        raise click.UsageError("--explain is for people: leave it out, or --json")

    opened = DeltaStore.open(store)
    if as_json:
        echo_json(opened.results())
    else:
        print_results(opened, explain)


@click.command()
@click.argument("left")
@click.argument("right")
@TENSORS
@JSON
def diff(
    left: str,
    right: str,
    tensors: bool,
    as_json: bool,
) -> None:
    """Compare two positions, stores or delta files.

    LEFT and RIGHT are each STORE (its last position), STORE@T or a delta file. Counts entries that
    only one side changes, and those that both change, to equal or to different values; then what
    each two deltas share.
    """
    from mm_piece.store.inspection import diff_positions

    content = diff_positions(left, right)
    if as_json:
        echo_json(content)
        return

    # the same entry of two bases may have different values: their comparison means less
    if not content["same_base"]:
        echo("The two sides belong to different bases.")

    header = ("only left", "only right", "both, equal", "both, different")
    groups = []
    for name, row in content["groups"].items():
        if any(row.values()):
            groups.append((name, *row.values()))
    show_rows(("group", *header), groups)

    _show_overlap(content["overlap"])
    if not tensors:
        number = len(content["tensors"])
        echo(f"{number} tensors are changed: --tensors lists them")
        return

    rows = []
    for row in content["tensors"]:
        counts = (row["left"], row["right"], row["equal"], row["different"])
        rows.append((row["name"], *counts))
    show_rows(("tensor", *header), rows)


def _show_overlap(overlap: "Overlap") -> None:
    """Print how many entries each two deltas share, and how many of them they set differently."""
    tasks = _name_sides(overlap["tasks"])

    rows = []
    for first, second in combinations(range(len(tasks)), 2):
        shared = overlap["entries"][first][second]
        different = overlap["conflicts"][first][second]
        rows.append((tasks[first], tasks[second], shared, different))
    if rows:
        show_rows(("delta", "and delta", "shared entries", "set differently"), rows)


def _name_sides(tasks: Sequence[str]) -> list[str]:
    """Return the tasks of both sides' deltas; of two with one name, the left side's comes first."""
    names = []
    for position, task in enumerate(tasks):
        if tasks.count(task) == 1:
            names.append(task)
        else:
            side = "right" if task in tasks[:position] else "left"
            names.append(f"{task} ({side})")
    return names


@click.command()
@STORE
@click.option(
    "--base",
    is_flag=False,
    flag_value="",
    default=None,
    help="Compare every bit of the base too: the store's own, or this folder or hub id.",
)
@JSON
def verify(
    store: Path,
    base: str | None,
    as_json: bool,
) -> None:
    """Check all files of STORE, or one delta file.

    Their hashes, the chain from delta to delta, and that each one decodes.
    """
    from mm_piece.deltas.arrays import DeltaArrays
    from mm_piece.store.delta_store import DeltaStore

    if store.is_file():
        if base is not None:
            raise StoreError(f"{store} is one delta file: --base checks the base of a store")
        DeltaArrays.load(store)
        _echo_verified({"deltas": 1, "ok": True}, as_json)
        return

    opened = DeltaStore.open(store)
    opened.verify()
    content: dict[str, object] = {
        "deltas": len(opened),
        "ok": True,
    }
    if base is not None:
        from mm_piece.store.exporting import verify_base

        # the bare option, an empty text, means the store's own base
        content["base"] = verify_base(opened, base or None)
    _echo_verified(content, as_json)


def _echo_verified(content: Mapping[str, object], as_json: bool) -> None:
    """Print what has been verified."""
    if as_json:
        echo_json(content)
        return

    number = content["deltas"]
    plural = "" if number == 1 else "s"
    base = ", and the base" if "base" in content else ""
    echo(f"{number} delta{plural} verified{base}")


@click.command()
@click.argument("stores", type=PATH, nargs=-1, required=True, metavar="STORE...")
@click.option(
    "--to", type=PATH, default=None, help="File. [STORE/report.html; of several: comparison.html]"
)
def report(stores: tuple[Path, ...], to: Path | None) -> None:
    """Write an HTML page about STORE, or one that compares several."""
    from mm_piece.report import report_comparison, report_store

    is_single = len(stores) == 1
    page = report_store(stores[0], to) if is_single else report_comparison(stores, to)
    echo(f"wrote {page}")


def print_results(store: "DeltaStore", explain: bool = False) -> None:
    """Print the accuracy matrix of an open store, and the metrics of continual learning on it.

    `explain`: with their formulas.
    """
    from mm_piece.metrics.continual import CHANGES, CONVENTIONS, MEANINGS, summarise_matrix

    content = store.results()
    if not content:
        echo("no results yet")
        return

    matrix = content.get("matrix", [])
    columns = content.get("tasks", []).copy()
    ability = content.get("base_ability")
    if ability:
        columns.append("base ability")

    names = ["base", *(entry.task for entry in store.entries)]
    # the first row is the base, before any task
    rows = []
    for position, row in enumerate(matrix):
        scores = [*row, ability[position]] if ability else row
        cells = [f"{100 * score:.1f}" for score in scores]
        rows.append((f"{position} {names[position]}", *cells))
    show_rows(("after", *columns), rows, title="accuracy, %")

    for name, value in summarise_matrix(matrix).items():
        if value is None:  # it needs more tasks than there are
            continue
        shown = f"{value:+.1%}" if name in CHANGES else f"{value:.1%}"
        echo(f"{name:>10}  {shown:>7}   {MEANINGS[name]}")
        if explain:
            echo(f"{'':>21}{CONVENTIONS[name]}")


COMMANDS = (
    log,
    show,
    results,
    diff,
    verify,
    report,
)
