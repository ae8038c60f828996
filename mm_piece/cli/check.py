"""The command that checks a recipe and its data before training: check."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import click

from mm_piece.cli.options import (
    JSON,
    PATH,
    echo,
    echo_json,
    echo_tokens,
    show_rows,
)

_BARS = " ▁▂▃▄▅▆▇█"  # by height, in eighths
_BINS = 20  # of a histogram, at most
_MAX_ERRORS = 50  # that are printed


@click.command()
@click.argument("recipe", type=PATH)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key."
)
@click.option(
    "--rows",
    default=1000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Rows of each source to decode and tokenize.",
)
@JSON
def check(
    recipe: Path,
    overrides: tuple[str, ...],
    rows: int,
    as_json: bool,
) -> None:
    """Look at the data of RECIPE before training.

    Counts, images, lengths, rows that train and test share, the score of the commonest answer, and
    one example as the model sees it. Exits with status 2 if something is wrong.
    """
    from mm_piece.distributed.progress import progress_bar
    from mm_piece.training.preflight import check as run

    found = run(
        recipe,
        *overrides,
        rows=rows,
        # a bar shows on a terminal only
        progress=lambda items, title: progress_bar(items, title, "row"),
    )
    if as_json:
        echo_json(found.to_dict())
    else:
        _show_check(found.to_dict())

    # with --json, stdout is for the JSON alone
    for note in found.notes:
        echo(f"Note: {note}", err=as_json)
    for error in found.errors[:_MAX_ERRORS]:
        echo(f"Error: {error}", err=True)
    # a wrong column makes an error of every row
    if len(found.errors) > _MAX_ERRORS:
        echo(f"… and {len(found.errors) - _MAX_ERRORS} more (--json has all)", err=True)
    if found.errors:
        raise click.exceptions.Exit(2)
    echo(f"{recipe}: nothing wrong was found", err=as_json)


def _show_check(content: dict[str, Any]) -> None:
    """Print the tables of a check, and an example of each task."""
    _show_splits(content["tasks"])
    _show_floors(content["tasks"])
    for task in content["tasks"]:
        if task["example"]:
            _show_example(task["name"], task["example"])


def _show_splits(tasks: Sequence[dict[str, Any]]) -> None:
    """Print what is in the train and test set of each task."""
    rows = []
    for task in tasks:
        for kind in ("train", "test"):
            split = task[kind]
            if split:  # a general task has no train set
                rows.append((task["name"], kind, *_format_split(split)))

    header = (
        "task",
        "split",
        "rows",
        "images",
        "text only",
        "repeated",
        "tokens: least, median, 95 %, most",
        "",
        "cut",
        "errors",
    )
    show_rows(header, rows)


def _show_floors(tasks: Sequence[dict[str, Any]]) -> None:
    """Print each task's score of the commonest answer, and the rows that train and test share."""
    rows = []
    for task in tasks:
        row = (
            task["name"],
            task["metric"],
            _shorten_text(task["commonest"]),
            f"{task['floor']:.1%}",
            _format_shared(task),
        )
        rows.append(row)

    header = (
        "task",
        "metric",
        "commonest answer",
        "it scores",
        "test rows also in train",
    )
    show_rows(header, rows)


def _format_shared(task: dict[str, Any]) -> str:
    """Return how many test questions are also in the train set."""
    if not task["train"]:
        return ""
    return f"{task['shared']} of {task['test']['rows']}"


def _format_split(split: dict[str, Any]) -> tuple[object, ...]:
    """Return the cells of a train or test set."""
    truncated = ""
    if split["encoded"]:
        share = split["truncated"] / split["encoded"]
        truncated = f"{share:.1%}"

    lengths = split["lengths"]
    return (
        split["rows"],
        split["images"],
        split["text_only"],
        split["repeated"],
        _format_range(lengths),
        _format_histogram(lengths),
        truncated,
        len(split["errors"]),
    )


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


def _show_example(name: str, tokens: Sequence[tuple[str, bool]]) -> None:
    """Print one example as text, with supervised tokens between ⟦ and ⟧."""
    echo("")
    echo(f"{name}, as the model sees it (⟦supervised⟧):")

    folded = []
    for text, supervised in tokens:
        # an image is hundreds of placeholders such as <image> in a row
        short = re.sub(r"(<[^<>\s]+>)\1{3,}", _fold_repeats, text)
        folded.append((short, supervised))
    echo_tokens(folded)


def _fold_repeats(repeated: re.Match[str]) -> str:
    """Return `token×number` for a match of one token several times."""
    token = repeated[1]
    number = len(repeated[0]) // len(token)
    return f"{token}×{number}"


def _shorten_text(text: str) -> str:
    """Return a text as one line of at most 40 characters."""
    line = " ".join(text.split())
    if len(line) <= 40:
        return line
    return f"{line[:39]}…"


COMMANDS = (check,)
