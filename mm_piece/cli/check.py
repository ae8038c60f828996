"""The command that looks at a recipe's data: check."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import click

from mm_piece.cli.options import JSON, PATH, echo, echo_json, echo_tokens, show_rows

_BARS = " ▁▂▃▄▅▆▇█"
_BINS = 20
_MAX_ERRORS = 50  # errors


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
def check(recipe: Path, overrides: tuple[str, ...], rows: int, as_json: bool) -> None:
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
        progress=lambda items, title: progress_bar(items, title, "row"),
    )
    if as_json:
        echo_json(found.to_dict())
    else:
        _show_check(found.to_dict())
    for note in found.notes:
        echo(f"Note: {note}", err=as_json)
    for error in found.errors[:_MAX_ERRORS]:
        echo(f"Error: {error}", err=True)
    if len(found.errors) > _MAX_ERRORS:
        echo(f"… and {len(found.errors) - _MAX_ERRORS} more (--json has all)", err=True)
    if found.errors:
        raise click.exceptions.Exit(2)
    echo(f"{recipe}: nothing wrong was found", err=as_json)


def _show_check(content: dict[str, Any]) -> None:
    splits = [
        (task["name"], kind, *_format_split(task[kind]))
        for task in content["tasks"]
        for kind in ("train", "test")
        if task[kind]
    ]
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
    )
    show_rows((*header, "errors"), splits)
    floors = [
        (
            task["name"],
            task["metric"],
            _shorten_text(task["commonest"]),
            f"{task['floor']:.1%}",
            _format_shared(task),
        )
        for task in content["tasks"]
    ]
    show_rows(
        ("task", "metric", "commonest answer", "it scores", "test rows also in train"), floors
    )
    for task in content["tasks"]:
        if task["example"]:
            _show_example(task["name"], task["example"])


def _format_shared(task: dict[str, Any]) -> str:
    """How many test questions stand in the train set."""
    return f"{task['shared']} of {task['test']['rows']}" if task["train"] else ""


def _format_split(split: dict[str, Any]) -> tuple[object, ...]:
    cut = f"{split['truncated'] / split['encoded']:.1%}" if split["encoded"] else ""
    counts = (split["rows"], split["images"], split["text_only"], split["repeated"])
    lengths = split["lengths"]
    return (*counts, _format_range(lengths), _format_histogram(lengths), cut, len(split["errors"]))


def _format_range(lengths: Sequence[int]) -> str:
    """Least, middle, 95th percentile and most."""
    if len(lengths) < 2:
        return ", ".join(map(str, lengths))
    twentieths = quantiles(lengths, n=20, method="inclusive")
    middle, high = round(twentieths[9]), round(twentieths[18])
    return f"{min(lengths)} · {middle} · {high} · {max(lengths)}"


def _format_histogram(lengths: Sequence[int]) -> str:
    """Lengths from the least to the most as a line of bars."""
    if not lengths:
        return ""
    low, span = min(lengths), max(lengths) - min(lengths) + 1
    counts = [0] * min(_BINS, span)
    for length in lengths:
        counts[(length - low) * len(counts) // span] += 1
    return "".join(_BARS[-(-count * 8 // max(counts))] for count in counts)


def _show_example(name: str, tokens: Sequence[tuple[str, bool]]) -> None:
    """One example as text; what is supervised stands between ⟦ and ⟧, in colour on a terminal."""
    echo("")
    echo(f"{name}, as the model sees it (⟦supervised⟧):")
    echo_tokens(
        (re.sub(r"(<[^<>\s]+>)\1{3,}", _fold_repeats, text), supervised)
        for text, supervised in tokens
    )


def _fold_repeats(repeated: Any) -> str:
    return f"{repeated[1]}×{len(repeated[0]) // len(repeated[1])}"


def _shorten_text(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else f"{line[:39]}…"


COMMANDS = (check,)
