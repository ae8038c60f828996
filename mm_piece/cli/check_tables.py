"""The tables of `check`: all columns where there is room, the needed ones on a narrow terminal."""

import shutil
import sys
from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import Any

from mm_piece.cli.options import cut_middle, echo, format_cell, show_rows

_BARS = " ▁▂▃▄▅▆▇█"  # by height, in eighths
_BINS = 20  # of a histogram, at most
_MIN_CUT_LENGTH = 12  # that names and answers are cut to on a narrow terminal
_READABLE_LENGTH = 24  # that names are cut to before a column is left out
_MAX_ANSWER_LENGTH = 40

# Columns of the first table that a narrow terminal does without, the least needed first.
_LENGTHS = "tokens: least, median, 95 %, most"
_HISTOGRAM = ""  # the lengths as bars; it stands behind them without a header
_LEAST_NEEDED = (_HISTOGRAM, "text only", "repeated", _LENGTHS)

Row = dict[str, Any]  # cells by the name of their column


def show_splits(tasks: Sequence[dict[str, Any]]) -> None:
    """Print what is in the train and test set of each task."""
    rows: list[Row] = []
    for task in tasks:
        for kind in ("train", "test"):
            split = task[kind]
            if split:  # a general task has no train set
                row = {
                    "task": task["name"],
                    "split": kind,
                    **_format_split(split),
                }
                rows.append(row)

    width = _find_terminal_width()
    shown = [name for name in rows[0] if name != "most tokens"]
    left_out = []
    _fit_column(
        rows,
        shown,
        "task",
        width,
        cut_middle,
        at_least=_READABLE_LENGTH,
    )
    for name in _LEAST_NEEDED:
        if _measure_width(rows, shown) <= width:
            break
        shown.remove(name)
        left_out.append(name)
        if name == _LENGTHS:
            place = shown.index("cut")
            shown.insert(place, "most tokens")

    _show_columns(rows, shown, width)
    named = [name for name in left_out if name]
    if named:
        listed = "; ".join(named)
        echo(f"  Left out at {width} columns: {listed}")


def show_floors(tasks: Sequence[dict[str, Any]]) -> None:
    """Print each task's score of the commonest answer, and the rows that train and test share."""
    rows: list[Row] = []
    for task in tasks:
        words = task["commonest"].split()
        answer = " ".join(words)
        row = {
            "task": task["name"],
            "metric": task["metric"],
            "commonest answer": _cut_end(answer, _MAX_ANSWER_LENGTH),
            "it scores": f"{task['floor']:.1%}",
            "also in train": _format_shared(task),
        }
        rows.append(row)

    width = _find_terminal_width()
    names = [*rows[0]]
    # an answer first: it tells less than the name of a task
    _fit_column(rows, names, "commonest answer", width, _cut_end)
    _show_columns(rows, names, width)


def _find_terminal_width() -> int:
    """Return how many columns a table may take: any number where no terminal shows it."""
    if not sys.stdout.isatty():
        return sys.maxsize
    return shutil.get_terminal_size().columns


def _measure_width(rows: Sequence[Row], names: Sequence[str]) -> int:
    """Return how wide a table of some columns is, with its margins."""
    from rich.cells import cell_len

    width = 1
    for name in names:
        cells = [format_cell(row[name]) for row in rows]
        cell_widths = map(cell_len, [name, *cells])
        width += 3 + max(cell_widths)
    return width


def _fit_column(
    rows: Sequence[Row],
    names: Sequence[str],
    column: str,
    width: int,
    cut: Callable[[str, int], str],
    *,
    at_least: int = _MIN_CUT_LENGTH,
) -> None:
    """Cut the texts of a column as far as the width of the table asks for.

    No text is cut to less than `at_least` characters.
    """
    texts = [str(row[column]) for row in rows]
    surplus = max(0, _measure_width(rows, names) - width)
    longest = max(map(len, texts))
    length = max(at_least, longest - surplus)
    for row, text in zip(rows, texts, strict=True):
        row[column] = cut(text, length)


def _show_columns(
    rows: Sequence[Row],
    names: Sequence[str],
    width: int,
) -> None:
    """Print some columns of a table; names of tasks are cut where they do not fit."""
    _fit_column(rows, names, "task", width, cut_middle)
    cells = []
    for row in rows:
        shown = [row[name] for name in names]
        cells.append(shown)
    show_rows(names, cells)


def _cut_end(text: str, length: int) -> str:
    """Return a text of at most `length` characters."""
    if len(text) <= length:
        return text
    return f"{text[: length - 1]}…"


def _format_shared(task: dict[str, Any]) -> str:
    """Return how many test questions are also in the train set."""
    if not task["train"]:
        return ""
    return f"{task['shared']} of {task['test']['rows']}"


def _format_split(split: dict[str, Any]) -> Row:
    """Return the cells of a train or test set, by column; errors are last."""
    truncated = ""
    if split["encoded"]:
        share = split["truncated"] / split["encoded"]
        truncated = f"{share:.1%}"

    lengths = split["lengths"]
    return {
        "rows": split["rows"],
        "images": split["images"],
        "text only": split["text_only"],
        "repeated": split["repeated"],
        _LENGTHS: _format_range(lengths),
        _HISTOGRAM: _format_histogram(lengths),
        "most tokens": max(lengths, default=0),
        "cut": truncated,
        "errors": len(split["errors"]),
    }


def _format_range(lengths: Sequence[int]) -> str:
    """Return minimum, median, 95th percentile and maximum."""
    if len(lengths) < 2:  # too few for quantiles
        return ", ".join(map(str, lengths))

    twentieths = quantiles(lengths, n=20, method="inclusive")
    middle = round(twentieths[9])
    high = round(twentieths[18])
    return f"{min(lengths)} · {middle} · {high} · {max(lengths)}"


def _format_histogram(lengths: Sequence[int]) -> str:
    """Return a line of bars for the lengths from the minimum to the maximum."""
    if not lengths:
        return ""

    low = min(lengths)
    span = max(lengths) - low + 1
    counts = [0] * min(_BINS, span)
    for length in lengths:
        bin_number = (length - low) * len(counts) // span
        counts[bin_number] += 1

    highest = max(counts)
    # rounded up, so that a bin with anything in it shows a bar
    heights = [-(-count * 8 // highest) for count in counts]
    return "".join(_BARS[height] for height in heights)
