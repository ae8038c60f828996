"""Every error that a user can cause.

PieceError
├── RecipeError          an unknown key, a value out of range, a recipe that contradicts itself
├── DataError            a row, an image or a conversation that cannot be used
├── ModelError           a base that cannot be loaded or is not of a known family
├── SelectionError       a density, a method or a budget that selects nothing sensible
├── ProcessError         another process of this run has ended, or does not answer
├── DeltaError           a delta file that must not be applied
│   ├── FormatError      not a delta, or of a version or codec this library does not know
│   ├── DamageError      altered or hostile content
│   │   └── TruncatedError   the file ends before what it promises
│   ├── MismatchError    a sound delta for another base, another parent or another position
│   │   ├── BaseError    another base
│   │   └── OrderError   another position: a delta before it is missing, or one too many is there
│   └── ConflictError    deltas that change the same entries and must not
└── StoreError           a store that cannot be opened, read or written
    ├── PositionError    a position outside 0…T
    └── LockedError      another writer holds the store

Each message is one line that names the thing and what would have been allowed. The command line
prints it and exits with status 2.
"""

import os
from pathlib import Path


def format_value(value: object, max_length: int = 60) -> str:
    """Return a value as a message may show it: one line, whatever it holds, and not a long one."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a very large {type(value).__name__}"
    line = "".join(c if c.isprintable() else " " for c in text[: max_length + 1])
    return line if len(line) <= max_length else f"{line[: max_length - 1]}…"


def format_error(error: Exception, max_length: int = 300) -> str:
    """Return what a library's error says, in one line; its kind too where the text alone is vague.

    A KeyError says a key, a TypeError or an AttributeError what the library tripped over.
    """
    message = " ".join(str(error).split())
    line = format_value(Exception(message), max_length)
    vague = (LookupError, TypeError, AttributeError, AssertionError, NameError)
    if line and not isinstance(error, vague):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def as_path(value: object, what: str) -> Path:
    """Return a path; PieceError that says `what` it should have been for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise PieceError(f"{what} must be a path, not {format_value(value)}")
    return Path(value)


class PieceError(Exception):
    """Base class of every error that a user can cause."""


class RecipeError(PieceError):
    """The recipe is not one this library can run."""


class DataError(PieceError):
    """A task's data cannot be used as it is."""


class ModelError(PieceError):
    """The base cannot be loaded, or its parameters are not what was expected."""


class SelectionError(PieceError):
    """The selection asked for is impossible or empty."""


class ProcessError(PieceError):
    """Another process of this run has ended, or does not answer in time."""


class DeltaError(PieceError):
    """The delta must not be applied."""


class FormatError(DeltaError):
    """The file is no delta, or its version or codec is unknown."""


class DamageError(DeltaError):
    """The file is truncated, altered or hostile."""


class TruncatedError(DamageError):
    """The file ends before what it promises."""


class MismatchError(DeltaError):
    """The delta is sound but belongs to another base, parent or position."""


class BaseError(MismatchError):
    """The delta, or the store, belongs to another base."""


class OrderError(MismatchError):
    """The delta belongs to another position: it continues another delta than the last one."""


class ConflictError(DeltaError):
    """Deltas change the same entries where they must not."""


class StoreError(PieceError):
    """The delta store cannot be opened, read or written."""


class PositionError(StoreError):
    """The position lies outside 0…T."""


class LockedError(StoreError):
    """Another writer holds the store."""
