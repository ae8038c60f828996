"""Entries of tensors at flat indices, read and written bit for bit.

The tensors lie on this process as a whole. `distributed` has the same for weights that may be
partitioned over several processes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from mm_piece.dtypes import view_bits

EntryWrite = tuple[Tensor, Tensor, Tensor]  # a tensor, flat indices, values


def read_entries(
    tensor: Tensor,
    indices: Tensor,
) -> Tensor:
    """Return a copy of the entries at flat `indices`, in the tensor's dtype, on its device."""
    bits = view_bits(tensor)
    indices = indices.to(tensor.device)
    selected = bits.index_select(0, indices)
    return selected.view(tensor.dtype)


def write_entries(writes: Iterable[EntryWrite]) -> None:
    """Write values at flat indices in place, bit for bit: all of them or none.

    Every step that may still fail, as an allocation on another device may, comes before the first
    write.
    """
    staged: list[EntryWrite] = []
    for tensor, indices, values in writes:
        device = tensor.device
        patterns = view_bits(values)
        staged_write = (
            view_bits(tensor),
            indices.to(device),
            patterns.to(device),
        )
        staged.append(staged_write)

    # `index_copy_` takes int64. On the CPU the indices of one tensor at a time are widened, which
    # keeps the extra memory small; elsewhere all of them are, before the first write.
    device_types = {target.device.type for target, _, _ in staged}
    if device_types - {"cpu"}:
        staged = [_widen_indices(write) for write in staged]
    for write in staged:
        target, positions, patterns = _widen_indices(write)
        target.index_copy_(0, positions, patterns)


def _widen_indices(write: EntryWrite) -> EntryWrite:
    target, indices, patterns = write
    return target, indices.to(torch.int64), patterns
