"""Options and arguments that commands share, and everything that prints.

Commands print through `echo`, `echo_lines`, `echo_tokens`, `echo_json` or `show_rows` only. Texts
from files, stores, models and data may hold control characters: these functions escape them, so
that none of them controls the terminal.
"""

import json
import logging
import math
import select
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import click

from mm_piece.errors import PieceError
from mm_piece.plaintext import make_printable, wrap_words

if TYPE_CHECKING:
    from rich.text import Text

_COLUMN_PADDING = 3  # columns between two cells
_SHORTEST_NAME = 12  # characters; a narrower terminal wraps them
_UNLIMITED_WIDTH = 10**6  # columns; a table takes no more than it needs

PATH = click.Path(path_type=Path)
AT = click.option(
    "--at", type=int, default=None, help="Position: 0 is the base, t after task t. [last]"
)
BASE = click.option(
    "--base",
    default=None,
    help="Folder or hub id of the base. [the store's own]",
)
JSON = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON.",
)
STORE = click.argument("store", type=PATH)
TENSORS = click.option(
    "--tensors",
    is_flag=True,
    help="List every tensor too.",
)
TO = click.argument("to", type=PATH)
NEW_FILE = click.argument(
    "to",
    type=PATH,
    callback=lambda _, __, path: _require_absent(path),
)
TASK = click.option(
    "--task",
    default=None,
    help="Name of the new delta's task.",
)


def _require_absent(path: Path) -> Path:
    """Return the path; raise PieceError if anything is there.

    What a command makes must never replace what it is made of.
    """
    # a broken link does not exist, yet it is in the way
    if path.exists() or path.is_symlink():
        raise PieceError(f"{path} exists; name a new file")
    return path


def echo(text: str, err: bool = False) -> None:
    """Print a text as one line, whatever it holds; a terminal breaks it between words."""
    stream = sys.stderr if err else sys.stdout
    line = make_printable(text)
    if stream.isatty():
        line = wrap_words(line)
    click.echo(line, err=err)


def announce_loading() -> None:
    """Tell whoever waits at a terminal what takes the first seconds of a command."""
    if sys.stderr.isatty():
        echo("loading torch and transformers", err=True)


def echo_lines(text: str) -> None:
    """Print a text and keep its line breaks."""
    click.echo(make_printable(text, lines=True))


def echo_tokens(tokens: Iterable[tuple[str, bool]]) -> None:
    """Print parts of a text, indented; supervised ones between ⟦ and ⟧, in colour on a terminal.

    Brackets of that kind that the text itself holds are escaped.
    """
    click.echo("  ", nl=False)
    for text, supervised in tokens:
        shown = make_printable(text, lines=True)
        shown = shown.replace("\n", "\n  ")
        # brackets of the text itself must not look like ours
        shown = shown.replace("⟦", r"\u27e6")
        shown = shown.replace("⟧", r"\u27e7")

        if supervised:
            click.secho(f"⟦{shown}⟧", nl=False, fg="green")
        else:
            click.secho(shown, nl=False)
    click.echo("")


def echo_json(content: object) -> None:
    """Print content as JSON; a number that is not finite, which JSON does not have, is null."""
    finite = _replace_non_finite(content)
    text = json.dumps(finite, indent=2, allow_nan=False)
    click.echo(text.replace("\x7f", "\\u007f"))  # the one control that json leaves as it is


def _replace_non_finite(value: object) -> object:
    """Return a value in which None stands for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def show_table(
    content: object,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    as_json: bool,
) -> None:
    """Print rows under a header, or `content` as JSON."""
    if as_json:
        echo_json(content)
    else:
        show_rows(header, rows)


def show_rows(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    title: str | None = None,
) -> None:
    """Print a table; numbers get separators and stand on the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    # rich reads markup in plain strings: every cell becomes a Text
    table = Table(
        box=SIMPLE_HEAD,
        title=title and _plain_text_cell(title),
        title_justify="left",
    )
    for number, name in enumerate(header):
        is_numeric = bool(rows) and isinstance(rows[0][number], int)
        justify = "right" if is_numeric else "left"
        table.add_column(_plain_text_cell(name), justify=justify)

    # in a file or a pipe, rich would cut names at 80 columns
    width = None if sys.stdout.isatty() else _UNLIMITED_WIDTH
    console = Console(width=width)

    texts = [[format_cell(cell) for cell in row] for row in rows]
    for row in _fit_into_width([header, *texts], console.width)[1:]:
        cells = map(_plain_text_cell, row)
        table.add_row(*cells)
    console.print(table)


def _fit_into_width(
    rows: Sequence[Sequence[str]],
    width: int,
) -> list[list[str]]:
    """Cut the longest column's texts in the middle, as far as a terminal's width asks for.

    Names differ at both ends: `tower.layers.0.weight` from `tower.layers.1.weight`.
    """
    columns = list(zip(*rows, strict=True))
    lengths = [max(map(len, column)) for column in columns]
    needed = sum(lengths) + _COLUMN_PADDING * len(lengths) + _COLUMN_PADDING
    longest = lengths.index(max(lengths))
    names = columns[longest]
    if needed > width:
        room = max(lengths[longest] - (needed - width), _SHORTEST_NAME)
        names = _cut_names(names, room)

    shortened = []
    for row, name in zip(rows, names, strict=True):
        cells = list(row)
        cells[longest] = name
        shortened.append(cells)
    return shortened


def _cut_names(names: Sequence[str], length: int) -> Sequence[str]:
    """Cut names in the middle, so that as many as possible can still be told apart."""
    candidates = []
    for quarters in (1, 2, 3):
        shortened = [cut_middle(name, length, quarters) for name in names]
        candidates.append(shortened)
    return max(candidates, key=lambda shortened: len(set(shortened)))


def cut_middle(text: str, length: int, quarters: int = 1) -> str:
    """Return a text of at most `length` characters, an ellipsis in place of some in the middle.

    `quarters` of four are kept of the start. The end of a weight's name tells more.
    """
    if len(text) <= length:
        return text

    num_kept = length - 1
    num_first = num_kept * quarters // 4
    num_last = num_kept - num_first
    return f"{text[:num_first]}…{text[len(text) - num_last :]}"


def format_cell(content: object) -> str:
    """Return a cell as a table shows it: a whole number with separators, a text on one line."""
    if isinstance(content, int):
        return f"{content:,}"
    return make_printable(str(content))


def _plain_text_cell(text: str) -> "Text":
    """Build a cell of plain text, in which rich finds no markup, links or emoji codes."""
    from rich.text import Text

    return Text(make_printable(text))


def is_output_closed() -> bool:
    """Return whether nobody reads any more what is printed, as after `| head -1`."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), select.POLLOUT)
    closed = select.POLLERR | select.POLLHUP
    return any(event & closed for _, event in pipe.poll(0))


def format_error(error: PieceError | OSError) -> str:
    """Return an error's message; that of the system about a file begins with the file's name."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if error.filename:
        return f"{error.filename}: {error.strerror}"
    return error.strerror


@contextmanager
def printable_messages() -> Iterator[None]:
    """Make log messages, warnings and tracebacks printable while the block runs.

    A traceback is printed after the block: its hook stays.
    """
    # both are global: put back afterwards
    format_warning = warnings.formatwarning
    factory = logging.getLogRecordFactory()
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


def _print_traceback(
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    lines = traceback.format_exception(kind, error, trace)
    text = make_printable("".join(lines), lines=True)
    sys.stderr.write(text)
