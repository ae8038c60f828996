"""Progress for people: one bar and one line at a time, from the main process alone."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

from mm_piece import distributed
from mm_piece.plaintext import make_printable, wrap_words

Item = TypeVar("Item")


def progress_bar(
    items: Iterable[Item],
    title: str,
    unit: str,
    total: int | None = None,
) -> Iterable[Item]:
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
    if not distributed.is_main():
        return

    line = make_printable(text)
    if sys.stdout.isatty():
        line = wrap_words(line)
    tqdm.write(line)
