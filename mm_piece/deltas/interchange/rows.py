"""Rows of a foreign safetensors file: by name, each of its kind, indices inside of their tensor."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import safetensors
import torch
from torch import Tensor

from mm_piece.deltas.delta import Entries
from mm_piece.dtypes import dtype_name
from mm_piece.errors import DamageError, FormatError, MismatchError
from mm_piece.files.safetensors import open_tensors

BaseTensors = Mapping[str, Tensor]  # published name -> tensor
Rename = Callable[[str], str]  # a name in a file -> the published name


class RowKind(TypedDict):
    """A row's shape and dtype, as files and messages give them."""

    shape: list[int]
    dtype: str


# What a broken file raises: a bad layout, a shape that overflows, a dtype torch does not have.
FILE_ERRORS = (
    safetensors.SafetensorError,
    KeyError,
    TypeError,
    RuntimeError,
)


def load_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a safetensors file.

    Raises FormatError where it cannot be read, DamageError where it is not sound.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
            for key in list(file.keys()):
                tensors[key] = file.get_tensor(key)
    except OSError as error:
        raise FormatError(f"{path.name} cannot be read: {error}") from error
    except FILE_ERRORS as error:
        raise DamageError(f"{path.name} is not a sound safetensors file: {error}") from error
    return metadata, tensors


def pair_rows(
    tensors: Mapping[str, Tensor],
    first: str,
    second: str,
) -> Entries:
    """Group the rows NAME.first and NAME.second by NAME; raise FormatError if there are others."""
    # names may hold points themselves; a dict keeps the file's order
    names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    expected: set[str] = set()
    for name in names:
        expected |= {f"{name}.{first}", f"{name}.{second}"}

    stray = tensors.keys() - expected
    missing = expected - tensors.keys()
    if stray or missing:
        found = min(stray) if stray else f"no {min(missing)}"
        raise FormatError(f"expected rows NAME.{first} with NAME.{second}, found {found}")

    pairs: Entries = {}
    for name in names:
        pairs[name] = (
            tensors[f"{name}.{first}"],
            tensors[f"{name}.{second}"],
        )
    return pairs


def rename_rows(
    rows: Entries,
    base: BaseTensors,
    rename: Rename,
) -> Entries:
    """Return rows under published names; raise MismatchError unless the base has them all."""
    renamed = {rename(name): row for name, row in rows.items()}
    missing = [name for name in renamed if name not in base]
    if missing:
        count = f"{len(missing)} of {len(renamed)} names"
        raise MismatchError(f"expected names of the base, found {missing[0]} ({count} not there)")

    # two names in the file may have become one
    if len(renamed) != len(rows):
        raise MismatchError(f"expected {len(rows)} names in the base, found {len(renamed)}")
    return renamed


def kind_of(
    shape: Sequence[int],
    dtype: torch.dtype,
) -> RowKind:
    """Return shape and dtype as files and messages give them: {"shape": …, "dtype": …}."""
    return {
        "shape": list(shape),
        "dtype": dtype_name(dtype),
    }


def require_row_kind(
    what: str,
    row: Tensor,
    dtypes: Sequence[torch.dtype],
    *shape: int,
) -> None:
    """Raise DamageError unless a row is of this shape and one of these dtypes."""
    expected = [kind_of(shape, dtype) for dtype in dtypes]
    found = kind_of(row.shape, row.dtype)
    if found not in expected:
        known = " or ".join(map(str, expected))
        raise DamageError(f"{what}: expected {known}, found {found}")


def to_flat_indices(
    name: str,
    coords: Tensor,
    shape: Sequence[int],
) -> Tensor:
    """Return flat indices [entries] of coordinates [ndim, entries].

    Raises DamageError unless all of them lie inside `shape`.
    """
    flat = torch.zeros(coords.shape[1], dtype=torch.int64)
    wide = coords.to(torch.int64)
    for row, length in zip(wide, shape, strict=True):
        if len(row) and (row.min() < 0 or row.max() >= length):
            found = f"{int(row.min())} to {int(row.max())}"
            raise DamageError(f"{name}: expected indices from 0 to {length - 1}, found {found}")

        flat = flat * length + row  # row-major
    return flat
