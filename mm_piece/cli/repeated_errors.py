"""One and the same mistake in many rows: its first row, and how many others there are."""

import re
from collections.abc import Sequence

_ROW = re.compile(r"^(.*?) row \d+(?=: )")
# What differs from row to row in the message of one mistake.
_VARYING = re.compile(
    r"""
      (?<=:\ image\ ).+?(?=\ (?:does|cannot|is|has)\ )  # the name of an image
    | \(looked\ for\ as\ .*\)
    | '[^'\[\],]*[/.][^'\[\],]*'                        # a quoted file or URL
    | (?<=the\ answer\ )(?:'.*?'|".*?")(?=\ is)          # an answer and all accepted ones
    | \[.*?\](?=[;\s]|$)
    | (?<=,\ not\ ).*                                     # a value of the wrong kind
    | \d+
    """,
    re.VERBOSE,
)


def group_errors(errors: Sequence[str]) -> list[tuple[str, int]]:
    """Return the first error of each mistake, and in how many more rows of its source it stands.

    Two errors of a source are one mistake if they differ in numbers, in names of files and in what
    a row holds in a wrong place. Errors of no row stay by themselves.
    """
    first_errors: dict[str, str] = {}
    counts: dict[str, int] = {}
    for error in errors:
        key = _find_mistake(error)
        first_errors.setdefault(key, error)
        counts[key] = counts.get(key, 0) + 1
    return [(first, counts[key] - 1) for key, first in first_errors.items()]


def _find_mistake(error: str) -> str:
    """Return an error's message without what differs from row to row; all of it for no row's."""
    row = _ROW.match(error)
    if not row:
        return error
    message = error[row.end() :]
    return f"{row[1]}: {_VARYING.sub('…', message)}"
