"""Progress for people: one bar and one line at a time, from the main process alone."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

from mm_piece import distributed
from mm_piece.plaintext import make_printable


def progress_bar(
    items: Iterable[Any],
    title: str,
    unit: str,
    total: int | None = None,
) -> Any:
    """Return the items, with a bar on a terminal."""
    # None leaves it to tqdm, which shows a bar on a terminal only.
    silent = None if distributed.is_main() else True
    return tqdm(
        items,
        make_printable(title),
        total,
        unit=unit,
        leave=False,
        disable=silent,
    )


def print_line(text: str) -> None:
    """Print a line above the bar, if there is one; control characters in it are escaped."""
    if distributed.is_main():
        tqdm.write(make_printable(text))
