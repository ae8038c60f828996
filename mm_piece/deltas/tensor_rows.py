"""A delta's rows as torch tensors and as numpy arrays, each in the memory of the other."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm_piece.deltas.rows import (
    Indices,
    RowType,
    ValueRow,
    index_dtype_name,
)
from mm_piece.dtypes import (
    INTEGER_DTYPES,
    SAFETENSORS_DTYPES,
    SAFETENSORS_NAMES,
    dtype_name,
)

_INDEX_DTYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
}


def index_dtype(size: int) -> torch.dtype:
    """Return the dtype of flat indices into a tensor of `size` entries."""
    return _INDEX_DTYPES[index_dtype_name(size)]


def type_of(tensor: Tensor) -> RowType:
    """Return the dtype and the shape of a tensor."""
    return RowType(dtype_name(tensor.dtype), tuple(tensor.shape))


def to_value_row(values: Tensor) -> ValueRow:
    """Return values of a sound delta as bit patterns, in the same memory."""
    signed = values.detach().view(INTEGER_DTYPES[values.itemsize]).numpy()
    return ValueRow(
        dtype=SAFETENSORS_NAMES[values.dtype],
        bits=signed.view(f"u{values.itemsize}"),
    )


def tensors_of(
    indices: Indices,
    values: ValueRow,
) -> tuple[Tensor, Tensor]:
    """Return rows as tensors, in the same memory."""
    # as signed integers: torch supports unsigned ones of two bytes and more only in part
    bits = _to_tensor(values.bits, f"i{values.bits.itemsize}")
    return (
        _to_tensor(indices, indices.dtype.name),
        bits.view(SAFETENSORS_DTYPES[values.dtype]),
    )


def _to_tensor(row: NDArray[np.integer], dtype: str) -> Tensor:
    """Return a row of integers as a tensor, in the same memory."""
    # an empty array of numpy's has strides of zero, with which torch views no other dtype
    contiguous = np.ascontiguousarray(row)
    return torch.as_tensor(np.frombuffer(contiguous.data, dtype))
