"""Commands that look at stores: log, show, results, diff, verify, report."""

import json
from pathlib import Path
from typing import Any

import click

from mm_piece.cli.options import AT, JSON, PATH, STORE, echo, echo_json, show_rows, show_table


@click.command()
@STORE
@JSON
def log(store: Path, as_json: bool) -> None:
    """List the deltas of STORE."""
    from mm_piece.store.delta_store import DeltaStore

    content = DeltaStore.open(store).log()
    rows = [
        (
            str(d["position"]),
            d["task"],
            f"{d['entries']:,}",
            f"{d['bytes']:,}",
            d["sha256"][:12],
            d["file"],
        )
        for d in content["deltas"]
    ]
    show_table(content, ("position", "task", "entries", "bytes", "sha256", "file"), rows, as_json)


@click.command()
@STORE
@AT
@JSON
def show(store: Path, at: int | None, as_json: bool) -> None:
    """Show what one delta holds: one of STORE, or a delta file."""
    from mm_piece.sparse.change_report import COLUMNS, find_change_rows
    from mm_piece.store.loading import describe_delta

    content = describe_delta(store, at)
    rows = [
        (t["name"], t["group"], "x".join(map(str, t["shape"])), f"{t['entries']:,}")
        for t in content["tensors"]
    ]
    if not as_json:
        changes = find_change_rows(content["info"])
        other_info = {
            key: value for key, value in content["info"].items() if key != "groups" or not changes
        }
        facts = {key: value for key, value in content.items() if key not in ("info", "tensors")}
        facts |= {f"info.{key}": value for key, value in other_info.items()}
        width = max(map(len, facts))
        for key, value in facts.items():
            echo(f"{key:>{width}}  {value if isinstance(value, str) else json.dumps(value)}")
        show_rows(
            ("group", *COLUMNS),
            [(g, *map(_format_change, row)) for g, row in _fill_columns(changes)],
        )
    show_table(content, ("tensor", "group", "shape", "entries"), rows, as_json)


def _fill_columns(changes: dict[str, dict[str, float]]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """A change report with every column; older deltas lack some."""
    from mm_piece.sparse.change_report import COLUMNS

    return [(group, [(c, row.get(c)) for c in COLUMNS]) for group, row in changes.items()]


def _format_change(cell: tuple[str, Any]) -> str:
    column, value = cell
    if value is None:
        return "–"
    return (
        f"{value:.3%}"
        if column == "share"
        else f"{value:,.6g}"
        if column == "norm"
        else f"{value:,}"
    )


@click.command()
@STORE
@JSON
def results(store: Path, as_json: bool) -> None:
    """Show the accuracy matrix of STORE."""
    from mm_piece.store.delta_store import DeltaStore

    opened = DeltaStore.open(store)
    if as_json:
        echo_json(opened.results())
    else:
        print_results(opened)


@click.command()
@click.argument("left")
@click.argument("right")
@JSON
def diff(left: str, right: str, as_json: bool) -> None:
    """Compare two positions, stores or delta files.

    LEFT and RIGHT are each STORE (its last position), STORE@T or a delta file. Counts entries that
    only one side changes, and those that both change, to equal or to different values; then what
    each two deltas share.
    """
    from mm_piece.store.deriving import diff_positions

    content = diff_positions(left, right)
    counts = ("left", "right", "equal", "different")
    groups = [(name, *row.values()) for name, row in content["groups"].items() if any(row.values())]
    tensors = [(row["name"], *(row[key] for key in counts)) for row in content["tensors"]]
    header = ("only left", "only right", "both, equal", "both, different")
    if as_json:
        echo_json(content)
        return
    if not content["same_base"]:
        echo("The two sides belong to different bases.")
    show_rows(("tensor", *header), tensors)
    show_rows(("group", *header), groups)
    shared = content["overlap"]
    pairs = zip(shared["tasks"], shared["entries"], shared["conflicts"], strict=True)
    rows = [
        (task, *(f"{entries:,} ({clash:,})" for entries, clash in zip(*row, strict=True)))
        for task, *row in pairs
    ]
    show_rows(("shared entries (set differently)", *shared["tasks"]), rows)


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
def verify(store: Path, base: str | None, as_json: bool) -> None:
    """Check all files of STORE, or one delta file.

    Their hashes, the chain from delta to delta, and that each one decodes.
    """
    from mm_piece.deltas.delta import Delta
    from mm_piece.store.delta_store import DeltaStore

    if store.is_file() and base is None:
        Delta.load(store)
        _echo_verified({"deltas": 1, "ok": True}, as_json)
        return
    opened = DeltaStore.open(store)
    opened.verify()
    content: dict[str, Any] = {"deltas": len(opened), "ok": True}
    if base is not None:
        from mm_piece.store.exporting import verify_base

        content["base"] = verify_base(opened, base or None)
    _echo_verified(content, as_json)


def _echo_verified(content: dict[str, Any], as_json: bool) -> None:
    if as_json:
        echo_json(content)
        return
    number = content["deltas"]
    base = ", and the base" if "base" in content else ""
    echo(f"{number} delta{'' if number == 1 else 's'} verified{base}")


@click.command()
@click.argument("stores", type=PATH, nargs=-1, required=True, metavar="STORE...")
@click.option(
    "--to", type=PATH, default=None, help="File. [STORE/report.html; of several: comparison.html]"
)
def report(stores: tuple[Path, ...], to: Path | None) -> None:
    """Write an HTML page about STORE, or one that compares several."""
    from mm_piece.report import report_comparison, report_store

    page = report_store(stores[0], to) if len(stores) == 1 else report_comparison(stores, to)
    echo(f"wrote {page}")


def print_results(store: Any) -> None:
    from mm_piece.metrics.continual import CONVENTIONS, summarise_matrix

    content = store.results()
    if not content:
        echo("no results yet")
        return
    ability = content.get("base_ability")
    columns = [*content["tasks"], *(["base ability"] if ability else [])]
    names = ["base", *(entry.task for entry in store.entries)]
    rows = []
    for position, row in enumerate(content["matrix"]):
        cells = [*row, ability[position]] if ability else row
        rows.append((f"{position} {names[position]}", *(f"{100 * score:.1f}" for score in cells)))
    show_rows(("after", *columns), rows, title="accuracy, %")
    for name, value in summarise_matrix(content["matrix"]).items():
        if value is not None:
            echo(f"{name:>10}  {value:+7.1%}   {CONVENTIONS[name]}")


COMMANDS = (log, show, results, diff, verify, report)
