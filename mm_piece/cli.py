"""The command line: parse, call one function, print. Torch is imported inside commands only."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mm_piece.errors import PieceError

_AT = click.option(
    "--at", type=int, default=None, help="Position: 0 is the base, t after task t. [last]"
)
_BASE = click.option("--base", default=None, help="Folder or hub id of the base. [the store's own]")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_STORE = click.argument("store", type=click.Path(path_type=Path))


class _Commands(click.Group):
    """Prints a user's mistake as one line and exits with status 2; --debug shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (PieceError, OSError) as error:
            if ctx.params["debug"]:
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mm-piece")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Teach a vision-language model a sequence of tasks; load it at any point of the sequence."""


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key."
)
def train(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Learn the tasks of RECIPE, one after another.

    Run it again and it goes on where it stopped.
    """
    from mm_piece.training import train as run

    store = run(recipe, *overrides)
    _print_results(store)
    click.echo(f"store: {store.path}  (mm-piece report {store.path} writes a page about it)")


@main.command(name="eval")
@_STORE
@_AT
@_BASE
@click.option(
    "--task", "names", multiple=True, help="Only these tasks of the store's recipe. [all]"
)
@_JSON
def evaluate(
    store: Path, at: int | None, base: str | None, names: tuple[str, ...], as_json: bool
) -> None:
    """Measure the model at a position of STORE.

    On the test sets of its recipe, or on those of the named tasks.
    """
    from mm_piece.training import measure_at

    scores = measure_at(store, at, base, names)
    rows = [(name, f"{score:.1%}") for name, score in scores.items()]
    _show(scores, ("task", "score"), rows, as_json)


@main.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("question")
@click.option("--store", type=click.Path(path_type=Path), default=None, help="Delta store.")
@click.option("--delta", type=click.Path(path_type=Path), default=None, help="A single delta file.")
@_AT
@_BASE
@click.option("--max-new-tokens", default=32, show_default=True, type=click.IntRange(min=1))
def ask(image: Path, question: str, **options: Any) -> None:
    """Ask a QUESTION about an IMAGE."""
    from mm_piece.evaluation import ask as answer
    from mm_piece.loading import load

    limit = options.pop("max_new_tokens")
    model, processor = load(**options)
    click.echo(answer(model, processor, image, question, limit))


@main.command()
@_STORE
@_JSON
def log(store: Path, as_json: bool) -> None:
    """List the deltas of STORE."""
    from mm_piece.store import DeltaStore

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
    _show(content, ("position", "task", "entries", "bytes", "sha256", "file"), rows, as_json)


@main.command()
@_STORE
@_AT
@_JSON
def show(store: Path, at: int | None, as_json: bool) -> None:
    """Show what one delta of STORE holds."""
    from mm_piece.loading import outline

    content = outline(store, at)
    rows = [
        (t["name"], t["group"], "x".join(map(str, t["shape"])), f"{t['entries']:,}")
        for t in content["tensors"]
    ]
    if not as_json:
        facts = {key: value for key, value in content.items() if key != "tensors"}
        for key, value in facts.items():
            click.echo(f"{key:>10}  {value if isinstance(value, str) else json.dumps(value)}")
    _show(content, ("tensor", "group", "shape", "entries"), rows, as_json)


@main.command()
@_STORE
@_JSON
def results(store: Path, as_json: bool) -> None:
    """Show the accuracy matrix of STORE."""
    from mm_piece.store import DeltaStore

    opened = DeltaStore.open(store)
    if as_json:
        click.echo(json.dumps(opened.results(), indent=2))
    else:
        _print_results(opened)


@main.command()
@_STORE
@_JSON
def verify(store: Path, as_json: bool) -> None:
    """Check all files of STORE.

    Their hashes, the chain from delta to delta, and that each one decodes.
    """
    from mm_piece.store import DeltaStore

    opened = DeltaStore.open(store)
    opened.verify()
    _show({"deltas": len(opened), "ok": True}, (f"{len(opened)} deltas verified",), [], as_json)


@main.command()
@_STORE
@click.argument("to", type=click.Path(path_type=Path))
@_AT
@_BASE
def export(store: Path, to: Path, at: int | None, base: str | None) -> None:
    """Write an ordinary checkpoint folder TO."""
    from mm_piece.loading import export as write

    click.echo(f"wrote {write(store, at, to, base)}")


@main.command()
@_STORE
@click.option(
    "--to", type=click.Path(path_type=Path), default=None, help="File. [STORE/report.html]"
)
def report(store: Path, to: Path | None) -> None:
    """Write an HTML page about STORE."""
    from mm_piece.report import report_store

    click.echo(f"wrote {report_store(store, to)}")


def _print_results(store: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from mm_piece.metrics import CONVENTIONS, summary

    content = store.results()
    if not content:
        click.echo("no results yet")
        return
    ability = content.get("base_ability")
    columns = [*content["tasks"], *(["base ability"] if ability else [])]
    table = Table("after", *columns, box=SIMPLE_HEAD, title="accuracy, %", title_justify="left")
    names = ["base", *(entry.task for entry in store.entries)]
    for position, row in enumerate(content["matrix"]):
        cells = [*row, ability[position]] if ability else row
        table.add_row(f"{position} {names[position]}", *(f"{100 * score:.1f}" for score in cells))
    console = Console()
    console.print(table)
    for name, value in summary(content["matrix"]).items():
        if value is not None:
            click.echo(f"{name:>10}  {value:+7.1%}   {CONVENTIONS[name]}")


def _show(
    content: Any, header: Sequence[str], rows: Sequence[Sequence[str]], as_json: bool
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    if as_json:
        click.echo(json.dumps(content, indent=2))
        return
    table = Table(*header, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file shortens no names
    console.print(table if rows else header[0])
