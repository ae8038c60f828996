"""A delta as the fields of vLLM's classes for new values at flat indices."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from mm_piece.deltas.delta import Delta
from mm_piece.errors import DeltaError, FormatError


class CheckpointPatch(TypedDict):
    """The fields of a vLLM `CheckpointWeightPatch`."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor


class SparsePatch(TypedDict):
    """The fields of a vLLM `SparseWeightPatch`."""

    name: str
    indices: Tensor
    values: Tensor
    full_shape: Sequence[int]


def make_patches(delta: Delta) -> list[CheckpointPatch]:
    """Return the fields of vLLM's patches for a delta in the layout of files."""
    # all values first: nothing is made of a delta that is refused
    for name, values in delta.values.items():
        require_patchable(name, values, FormatError)

    patches: list[CheckpointPatch] = []
    for name, values in delta.values.items():
        patches.append(
            {
                "name": name,
                "shape": delta.shapes[name],
                "dtype": values.dtype,
                "values": values.contiguous(),
                "indices": delta.indices[name].contiguous(),
            }
        )
    return patches


def require_patchable(
    name: str,
    values: Tensor,
    error: type[DeltaError],
) -> None:
    """Raise `error` for integers and NaN, which vLLM reads as "unchanged"."""
    if not values.is_floating_point() or values.isnan().any():
        raise error(f"{name}: expected floating numbers for vLLM, found integers or NaN")
