"""Dtypes: their names in torch, recipes and safetensors files, and their bits as integers."""

import torch
from torch import Tensor

from mm_piece.errors import ModelError

# In the order of safetensors' own writer: it lays wider numbers first, so that all are aligned.
SAFETENSORS_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
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
    flat = tensor.detach().view(-1)
    return flat.view(INTEGER_DTYPES[tensor.itemsize])


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
        raise ModelError(f"unknown dtype {dtype!r}; allowed: {', '.join(TRAINABLE_DTYPES)}")
    return TRAINABLE_DTYPES[dtype]
