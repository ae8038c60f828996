"""Every error that a user can cause.

PieceError
├── RecipeError          an unknown key, a value out of range, a recipe that contradicts itself
├── DataError            a row, an image or a conversation that cannot be used
├── ModelError           a base that cannot be loaded or is not of a known family
├── SelectionError       a density, a method or a budget that selects nothing sensible
├── ProcessError         a process of this run that has ended, or does not answer
├── DeltaError           a delta file that must not be applied
│   ├── FormatError      not a delta, or of a version or codec this library does not know
│   ├── DamageError      altered or hostile content
│   │   └── TruncatedError   a file that ends before what it promises
│   ├── MismatchError    a sound delta for another base, another parent or another position
│   │   ├── BaseError    another base
│   │   └── OrderError   another position: a delta before it is missing, or one too many is there
│   └── ConflictError    deltas that change the same entries and must not
└── StoreError           a store that cannot be opened, read or written
    ├── PositionError    a position outside 0…T
    └── LockedError      a store that another writer has locked

Each message is one line that names the thing and what would have been allowed. The command line
prints it and exits with status 2.
"""

import os
from pathlib import Path


def format_value(value: object, max_length: int = 60) -> str:
    """Return a value as a message may show it: one line of at most `max_length` characters."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a very large {type(value).__name__}"

    # one character more than allowed shows whether the text was longer
    start = text[: max_length + 1]
    line = "".join(char if char.isprintable() else " " for char in start)
    if len(line) <= max_length:
        return line
    return f"{line[: max_length - 1]}…"


def format_error(error: Exception, max_length: int = 300) -> str:
    """Return a library's error in one line, with its kind where the text alone is vague.

    The text of a KeyError is only a key, that of a TypeError or an AttributeError often only a name
    inside of the library.
    """
    message = " ".join(str(error).split())
    line = format_value(Exception(message), max_length)
    kind = type(error).__name__
    if not line:
        return kind

    vague = (
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        NameError,
    )
    if isinstance(error, vague):
        return f"{kind}: {line}"
    return line


def as_path(value: object, what: str) -> Path:
    """Return a path; raise PieceError, with `what` it should have been, for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise PieceError(f"{what} must be a path, not {format_value(value)}")
    return Path(value)


class PieceError(Exception):
    """Base class of every error that a user can cause."""


class RecipeError(PieceError):
    """A recipe that this library cannot run."""


class DataError(PieceError):
    """Data of a task that cannot be used as they are."""


class ModelError(PieceError):
    """A base that cannot be loaded, or whose parameters are not those expected."""


class SelectionError(PieceError):
    """A selection that is impossible or empty."""


class ProcessError(PieceError):
    """A process of this run that has ended, or does not answer in time."""


class DeltaError(PieceError):
    """A delta that must not be applied."""


class FormatError(DeltaError):
    """A file that is no delta, or a delta of an unknown version or codec."""


class DamageError(DeltaError):
    """A file that is truncated, altered or hostile."""


class TruncatedError(DamageError):
    """A file that ends before what it promises."""


class MismatchError(DeltaError):
    """A sound delta that belongs to another base, parent or position."""


class BaseError(MismatchError):
    """A delta or a store that belongs to another base."""


class OrderError(MismatchError):
    """A delta of another position: it continues another delta than the last one."""


class ConflictError(DeltaError):
    """Deltas that change the same entries where they must not."""


class StoreError(PieceError):
    """A delta store that cannot be opened, read or written."""


class PositionError(StoreError):
    """A position outside 0…T."""


class LockedError(StoreError):
    """A store that another writer has locked."""
