"""What commands share: options and arguments, and the only way to the terminal.

Whatever is printed goes through `echo`, `echo_lines`, `echo_json` or `show_rows`: files, stores,
models and data are others' words, and none of them may speak to the terminal.
"""

import json
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from mm_piece.errors import PieceError
from mm_piece.plaintext import make_printable

PATH = click.Path(path_type=Path)
AT = click.option(
    "--at", type=int, default=None, help="Position: 0 is the base, t after task t. [last]"
)
BASE = click.option("--base", default=None, help="Folder or hub id of the base. [the store's own]")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
STORE = click.argument("store", type=PATH)
TO = click.argument("to", type=PATH)
NEW_FILE = click.argument("to", type=PATH, callback=lambda _, __, path: _require_absent(path))
TASK = click.option("--task", default=None, help="Name of the new delta's task.")


def _require_absent(path: Path) -> Path:
    """Return a path where nothing is: what a command makes never replaces what it is made of."""
    if path.exists() or path.is_symlink():
        raise PieceError(f"{path} exists; name a new file")
    return path


def echo(text: str, err: bool = False) -> None:
    """Print one line, whatever the text holds."""
    click.echo(make_printable(text), err=err)


def echo_lines(text: str) -> None:
    """Print a text that may have several lines."""
    click.echo(make_printable(text, lines=True))


def echo_tokens(tokens: Iterable[tuple[str, bool]]) -> None:
    """Print parts of a text, indented; supervised ones between ⟦ and ⟧, in colour on a terminal.

    Brackets of that kind that the text itself holds are escaped.
    """
    click.echo("  ", nl=False)
    for text, supervised in tokens:
        shown = make_printable(text, lines=True).replace("\n", "\n  ")
        shown = shown.replace("⟦", r"\u27e6").replace("⟧", r"\u27e7")
        colour = "green" if supervised else None
        click.secho(f"⟦{shown}⟧" if supervised else shown, nl=False, fg=colour)
    click.echo("")


def echo_json(content: Any) -> None:
    """Print content as JSON; a number that is not finite, which JSON does not have, is null."""
    text = json.dumps(_replace_non_finite(content), indent=2, allow_nan=False)
    click.echo(text.replace("\x7f", "\\u007f"))  # the one control that json leaves as it is


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_non_finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_table(
    content: Any, header: Sequence[str], rows: Sequence[Sequence[object]], as_json: bool
) -> None:
    """Print rows under a header, or `content` as JSON."""
    if as_json:
        echo_json(content)
    else:
        show_rows(header, rows)


def show_rows(
    header: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None
) -> None:
    """Print a table; numbers get separators and stand on the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=title and _plain_text_cell(title), title_justify="left")
    for number, name in enumerate(header):
        numeric = bool(rows) and isinstance(rows[0][number], int)
        table.add_column(_plain_text_cell(name), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*map(_plain_text_cell, row))
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file shortens no names
    console.print(table)


def _plain_text_cell(content: object) -> Any:
    """A cell that is text and nothing else: no markup, no links, no emoji codes."""
    from rich.text import Text

    return Text(f"{content:,}" if isinstance(content, int) else make_printable(str(content)))


def format_error(error: PieceError | OSError) -> str:
    """Return what an error says, in words; what the system says of a file begins with its name."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


@contextmanager
def printable_messages() -> Iterator[None]:
    """Make printable what libraries log and warn of, and the traceback of an unforeseen error."""
    format_warning, factory = warnings.formatwarning, logging.getLogRecordFactory()
    warnings.formatwarning = lambda *args, **kwargs: make_printable(
        format_warning(*args, **kwargs), lines=True
    )
    logging.setLogRecordFactory(_PrintableRecord)
    try:
        yield
    except Exception:
        sys.excepthook = _print_traceback
        raise
    finally:
        warnings.formatwarning = format_warning
        logging.setLogRecordFactory(factory)


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 - logging's own name
        return make_printable(super().getMessage(), lines=True)


def _print_traceback(*error: Any) -> None:
    sys.stderr.write(make_printable("".join(traceback.format_exception(*error)), lines=True))
