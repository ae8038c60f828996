"""Commands that make new files out of stores, deltas and checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mm_piece.cli.options import (
    AT,
    BASE,
    NEW_FILE,
    PATH,
    STORE,
    TASK,
    TO,
    echo,
)

if TYPE_CHECKING:
    from mm_piece.deltas.delta import Delta


@click.command()
@STORE
@TO
@AT
@BASE
@click.option(
    "--shard-size",
    default="5GB",
    show_default=True,
    help="Most bytes of one file.",
)
def export(
    store: Path,
    to: Path,
    *,
    at: int | None,
    base: str | None,
    shard_size: str,
) -> None:
    """Write an ordinary checkpoint folder TO.

    Of a position of STORE, or of a delta file on its --base.
    """
    from mm_piece.store.exporting import export as write

    folder = write(store, to, at, base=base, shard_size=shard_size)
    echo(f"wrote {folder}")


@click.command()
@STORE
@NEW_FILE
@AT
@BASE
@TASK
def squash(
    store: Path,
    to: Path,
    *,
    at: int | None,
    base: str | None,
    task: str | None,
) -> None:
    """Write a position of STORE as one delta file TO."""
    from mm_piece.store.squashing import squash as make

    squashed = make(store, at, task=task, base=base)
    _save_delta(squashed, to)


@click.command()
@click.argument("base")
@click.argument("tuned")
@NEW_FILE
@TASK
@click.option("--dtype", default=None, help="Cast both to this dtype. [TUNED's own]")
def extract(
    base: str,
    tuned: str,
    to: Path,
    *,
    task: str | None,
    dtype: str | None,
) -> None:
    """Write the delta TO between two checkpoints.

    BASE and TUNED are ordinary ones of any size, folders or hub ids.
    """
    from mm_piece.store.deriving import extract as make

    found = make(base, tuned, to, task=task, dtype=dtype)
    entries = found["entries"]
    share = entries / max(found["of"], 1)  # `of`: all entries of the weights
    echo(f"wrote {to}: {entries:,} entries ({share:.3%}), {found['bytes']:,} bytes")


@click.command()
@click.argument("base")
@NEW_FILE
@click.argument("deltas", nargs=-1, required=True, type=PATH)
@click.option(
    "--rule",
    default="error",
    show_default=True,
    help="Where they conflict: error, last, first, sum, ties.",
)
@TASK
def merge(
    base: str,
    to: Path,
    deltas: tuple[Path, ...],
    *,
    rule: str,
    task: str | None,
) -> None:
    """Write one delta TO out of several.

    Each of DELTAS starts from BASE.
    """
    from mm_piece.deltas.delta import Delta
    from mm_piece.store.deriving import merge as make

    # all are read before anything is computed
    loaded = [Delta.load(delta) for delta in deltas]
    merged = make(loaded, base, rule, task=task)
    _save_delta(merged, to)


@click.command()
@STORE
@click.argument("task")
@TO
def without(
    store: Path,
    task: str,
    to: Path,
) -> None:
    """Make a store TO of STORE without one TASK.

    Only where no other task changes its entries.
    """
    from mm_piece.store.deriving import remove_task as make

    made = make(store, task, to)
    echo(f"made {to} with {len(made)} deltas")


@click.command()
@click.argument("delta", type=PATH)
@NEW_FILE
@click.option(
    "--format",
    "form",
    required=True,
    help="vllm, coo; gap or raw: our own codecs.",
)
@click.option("--base", default=None, help="Base whose files are meant. [the delta's own]")
def convert(
    delta: Path,
    to: Path,
    form: str,
    base: str | None,
) -> None:
    """Write a delta in another program's format."""
    from mm_piece.store.conversion import convert_delta

    converted = convert_delta(delta, to, form, base)
    echo(f"wrote {to}: {converted.entries:,} entries, {to.stat().st_size:,} bytes")


@click.command(name="import")
@click.argument("source", type=PATH)
@click.argument("base")
@NEW_FILE
@click.option(
    "--format",
    "form",
    required=True,
    help="vllm, coo, shira (a PEFT adapter's folder).",
)
@click.option("--dtype", default=None, help="What the base is cast to. [its own]")
@TASK
def import_delta(
    source: Path,
    base: str,
    to: Path,
    form: str,
    dtype: str | None,
    task: str | None,
) -> None:
    """Make a delta TO of another program's file.

    SOURCE holds changes of BASE.
    """
    from mm_piece.store import conversion

    delta = conversion.import_delta(
        source,
        base,
        form,
        task=task or to.stem,
        dtype=dtype,
    )
    _save_delta(delta, to)


def _save_delta(delta: "Delta", to: Path) -> None:
    """Write a delta, and print its size."""
    delta.save(to)
    size = to.stat().st_size
    echo(f"wrote {to}: {delta.entries:,} entries, {size:,} bytes")


COMMANDS = (
    export,
    squash,
    extract,
    merge,
    without,
    convert,
    import_delta,
)
