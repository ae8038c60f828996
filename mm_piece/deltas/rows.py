"""The two rows that a delta has of a tensor, indices and values, and what makes them sound.

A delta has its rows as torch tensors (`deltas.delta`) or as numpy arrays (`deltas.arrays`). Both
are checked by these functions, and by no others.
"""

from collections.abc import Generator, Set
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm_piece.deltas.header import DELTA_DTYPES
from mm_piece.errors import DamageError, format_value
from mm_piece.stored_dtypes import STORED_DTYPES

Indices = NDArray[np.signedinteger]

_DTYPE_NAMES = {dtype.name for dtype in DELTA_DTYPES.values()}


class RowType(NamedTuple):
    """Dtype, by its name in torch, and shape of a row."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        shape = format_value(list(self.shape))
        return f"{self.dtype} {shape}"


class ValueRow(NamedTuple):
    """Values as bit patterns: numpy has no numbers of some dtypes, such as bfloat16."""

    dtype: str  # as safetensors files call it
    bits: NDArray[np.unsignedinteger]  # of the dtype's width

    @property
    def type(self) -> RowType:
        """What the row is."""
        stored = STORED_DTYPES[self.dtype]
        return RowType(stored.name, self.bits.shape)


def index_dtype_name(size: int) -> str:
    """Return the dtype, by name, of flat indices into a tensor of `size` entries."""
    if size < 2**31:
        return "int32"
    return "int64"


def require_same_names(*names: Set[str]) -> None:
    """Raise DamageError unless all parts of a delta name the same tensors."""
    if any(other != names[0] for other in names):
        raise DamageError("indices, values, shapes and digests name different tensors")


@contextmanager
def naming_tensor(name: str) -> Generator[None]:
    """Make DamageErrors name a tensor while the block runs."""
    try:
        yield
    except DamageError as error:
        raise DamageError(f"{name}: {error}") from error


def require_index_type(
    found: RowType,
    size: int,
) -> None:
    """Raise DamageError unless a row has the type of flat indices into `size` entries."""
    expected = index_dtype_name(size)
    if len(found.shape) != 1 or found.dtype != expected:
        raise DamageError(f"{found} is no row of torch.{expected} indices")


def require_value_type(
    found: RowType,
    indices: RowType,
) -> None:
    """Raise DamageError unless a row has the type of values for a row of indices."""
    if found.shape != indices.shape or found.dtype not in _DTYPE_NAMES:
        (count,) = indices.shape
        raise DamageError(f"{found} are no values for {count} indices")


def require_ascending(
    indices: Indices,
    size: int,
) -> None:
    """Raise DamageError unless indices are sorted, unique and inside of `size` entries."""
    # the two ends are enough: where they lie inside and the row ascends, all of it lies inside
    is_inside = True
    if len(indices):
        is_inside = bool(indices[0] >= 0 and indices[-1] < size)

    is_descending = indices[1:] <= indices[:-1]
    if not is_inside or is_descending.any():
        raise DamageError(f"indices must be sorted, unique and below {size}")
