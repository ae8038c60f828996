"""The command that checks a recipe and its data before training: check."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mm_piece.cli.check_tables import show_floors, show_splits
from mm_piece.cli.options import (
    JSON,
    PATH,
    announce_loading,
    echo,
    echo_json,
    echo_tokens,
)
from mm_piece.cli.repeated_errors import group_errors

if TYPE_CHECKING:
    from mm_piece.training.data_check import TokenText

_MAX_ERRORS = 50  # that are printed
# Characters of an example that a terminal shows: of its start, and of its end with the answer.
_EXAMPLE_START = 700
_EXAMPLE_END = 500


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
    from mm_piece.recipe import load_recipe

    # before torch and transformers, which take seconds to load
    loaded = load_recipe(recipe, overrides)
    announce_loading()

    from mm_piece.distributed.progress import progress_bar
    from mm_piece.training.recipe_check import check as run

    found = run(
        loaded,
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
    if found.errors:
        _show_errors(found.errors)
        raise click.exceptions.Exit(2)
    number = len(found.notes)
    plural = "" if number == 1 else "s"
    verdict = f"no errors; {number} note{plural} above" if number else "nothing wrong was found"
    echo(f"{recipe}: {verdict}", err=as_json)


def _show_errors(errors: Sequence[str]) -> None:
    """Print each mistake once, with the number of the other rows that have it."""
    mistakes = group_errors(errors)
    for first, num_others in mistakes[:_MAX_ERRORS]:
        more = ""
        if num_others:
            rows = "row" if num_others == 1 else "rows"
            more = f" … and {num_others:,} more {rows}"
        echo(f"Error: {first}{more}", err=True)

    if len(mistakes) > _MAX_ERRORS:
        echo(f"… and {len(mistakes) - _MAX_ERRORS} more (--json has all)", err=True)


def _show_check(content: dict[str, Any]) -> None:
    """Print the tables of a check, and an example of each task."""
    show_splits(content["tasks"])
    show_floors(content["tasks"])
    for task in content["tasks"]:
        if task["example"]:
            _show_example(task["name"], task["example"])


def _show_example(name: str, tokens: "Sequence[TokenText]") -> None:
    """Print one example as text, with supervised tokens between ⟦ and ⟧.

    On a terminal, the middle of a long one is left out.
    """
    echo("")
    echo(f"{name}, as the model sees it (⟦supervised⟧):")

    folded = []
    for text, supervised in tokens:
        # an image is hundreds of placeholders such as <image> in a row
        short = re.sub(r"(<[^<>\s]+>)\1{3,}", _fold_repeats, text)
        folded.append((short, supervised))
    if sys.stdout.isatty():
        folded = _leave_out_middle(folded)
    echo_tokens(folded)


def _leave_out_middle(tokens: "Sequence[TokenText]") -> "list[TokenText]":
    """Return tokens of which only the start and the end of a long text are left."""
    length = sum(len(text) for text, _ in tokens)
    num_left_out = length - _EXAMPLE_START - _EXAMPLE_END
    if num_left_out <= 0:
        return list(tokens)

    return [
        *_slice_tokens(tokens, 0, _EXAMPLE_START),
        (f"\n… {num_left_out:,} characters left out …\n", False),
        *_slice_tokens(tokens, length - _EXAMPLE_END, length),
    ]


def _slice_tokens(
    tokens: "Sequence[TokenText]",
    start: int,
    stop: int,
) -> "list[TokenText]":
    """Return the tokens between two positions of their whole text."""
    sliced = []
    offset = 0  # of the token in the whole text
    for text, supervised in tokens:
        inside = text[max(0, start - offset) : max(0, stop - offset)]
        if inside:
            sliced.append((inside, supervised))
        offset += len(text)
    return sliced


def _fold_repeats(repeated: re.Match[str]) -> str:
    """Return `token×number` for a match of one token several times."""
    token = repeated[1]
    number = len(repeated[0]) // len(token)
    return f"{token}×{number}"


COMMANDS = (check,)
