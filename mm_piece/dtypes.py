"""Dtypes: their names in torch, recipes and safetensors files, and their bits as integers."""

import torch
from torch import Tensor

from mm_piece.errors import ModelError
from mm_piece.stored_dtypes import STORED_DTYPES

# In the order of safetensors' own writer.
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    key: getattr(torch, stored.name) for key, stored in STORED_DTYPES.items()
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

TRAINABLE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# By bytes of an entry.
INTEGER_DTYPES = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}


def view_bits(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as a flat row of same-size integers, sharing its memory."""
    integer = INTEGER_DTYPES[tensor.itemsize]
    flat = tensor.detach().view(-1)
    return flat.view(integer)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as recipes and configurations write it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype that a base is loaded and trained in, by name or as it is.

    Raises ModelError for a name that is not in `TRAINABLE_DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        return dtype

    if not isinstance(dtype, str) or dtype not in TRAINABLE_DTYPES:
        allowed = ", ".join(TRAINABLE_DTYPES)
        raise ModelError(f"unknown dtype {dtype!r}; allowed: {allowed}")
    return TRAINABLE_DTYPES[dtype]
