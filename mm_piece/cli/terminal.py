"""What commands share: options and arguments, and how a table or JSON is printed."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mm_piece.errors import PieceError

PATH = click.Path(path_type=Path)
AT = click.option(
    "--at", type=int, default=None, help="Position: 0 is the base, t after task t. [last]"
)
BASE = click.option("--base", default=None, help="Folder or hub id of the base. [the store's own]")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
STORE = click.argument("store", type=PATH)
TO = click.argument("to", type=PATH)
NEW_FILE = click.argument("to", type=PATH, callback=lambda _, __, path: _absent(path))
TASK = click.option("--task", default=None, help="Name of the new delta's task.")


def _absent(path: Path) -> Path:
    """Return a path where nothing is: what a command makes never replaces what it is made of."""
    if path.exists() or path.is_symlink():
        raise PieceError(f"{path} exists; name a new file")
    return path


def show_table(
    content: Any, header: Sequence[str], rows: Sequence[Sequence[object]], as_json: bool
) -> None:
    """Print rows under a header, or `content` as JSON."""
    if as_json:
        click.echo(json.dumps(content, indent=2))
    else:
        show_rows(header, rows)


def show_rows(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers get separators and stand on the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for number, title in enumerate(header):
        numeric = bool(rows) and isinstance(rows[0][number], int)
        table.add_column(escape(title), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(f"{c:,}" if isinstance(c, int) else escape(str(c)) for c in row))
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file shortens no names
    console.print(table)
