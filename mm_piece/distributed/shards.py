"""A weight that ZeRO-3 partitions into equal shards, one on each process: read and write entries.

A weight that is not partitioned is treated as one shard, so that callers need not tell the two
apart. A function that reads a partitioned weight is a collective: all processes call it, for the
same entries in the same order.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed

from mm_piece.dtypes import view_bits
from mm_piece.entries import EntryWrite, read_entries, write_entries


def is_partitioned(weight: Tensor) -> bool:
    """Return whether only a shard of the weight is on this process."""
    return "ds_tensor" in vars(weight)


def shape_of(weight: Tensor) -> torch.Size:
    """Return the shape of the gathered weight."""
    if is_partitioned(weight):
        return torch.Size(weight.ds_shape)  # type: ignore[attr-defined]
    return weight.shape


def local_shard(weight: Tensor) -> tuple[int, Tensor]:
    """Return the first entry of this process's shard, and the shard: 1-D, sharing its memory."""
    if not is_partitioned(weight):
        flat = weight.detach().reshape(-1)
        return 0, flat

    padded = weight.ds_tensor.detach()  # type: ignore[attr-defined]
    group = _process_group_of(weight)
    group_rank = distributed.get_rank(group)
    first = group_rank * len(padded)

    # Shards are equally long. The last ones end in padding, or are nothing else.
    num_entries = prod(shape_of(weight))
    num_left = max(0, num_entries - first)
    return first, padded[:num_left]


def slice_to_shard(
    weight: Tensor,
    flat: Tensor,
) -> Tensor:
    """Return this process's shard of one number for each entry of a partitioned weight, padded."""
    first, shard = local_shard(weight)
    padded_length = len(weight.ds_tensor)  # type: ignore[attr-defined]
    own = flat.new_zeros(padded_length)
    length = len(shard)
    end = first + length
    own[:length] = flat[first:end]
    return own


def gather_entries(
    weight: Tensor,
    indices: Tensor,
) -> Tensor:
    """Return a copy of the entries at flat `indices`, in the weight's dtype, on its device."""
    if not is_partitioned(weight):
        return read_entries(weight, indices)

    shard, is_local, positions = _locate_in_shard(weight, indices)
    num_indices = len(indices)
    found = shard.new_zeros(num_indices)
    found[is_local] = shard[positions]

    # One process has an entry and all others have zeros: a sum of bytes carries nothing over, and
    # is exact for every dtype. A sum of the numbers themselves would turn -0.0 into 0.0.
    found = found.to(weight.device)
    found_bytes = found.view(torch.uint8)
    group = _process_group_of(weight)
    distributed.all_reduce(found_bytes, group=group)
    return found_bytes.view(weight.dtype)


def scatter_entries(writes: Iterable[EntryWrite]) -> None:
    """Write weights' entries at flat indices in place, bit for bit: all of them or none."""
    local_writes = (part for write in writes for part in _iter_local_writes(*write))
    write_entries(local_writes)


def norm_of(weight: Tensor) -> float:
    """Return the Euclidean norm of the gathered weight, computed in fp32."""
    _, shard = local_shard(weight)
    own = torch.linalg.vector_norm(shard, dtype=torch.float32)
    if not is_partitioned(weight):
        return float(own)

    own = own.to(weight.device)
    square = own.square()
    group = _process_group_of(weight)
    distributed.all_reduce(square, group=group)
    return float(square.sqrt())


@contextmanager
def gathered_parameters(weights: Sequence[Tensor]) -> Iterator[None]:
    """Keep the weights gathered on every process while the block runs."""
    has_partitioned = any(map(is_partitioned, weights))
    if not has_partitioned:
        yield
        return

    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(list(weights)):
        yield


def _process_group_of(weight: Tensor) -> Any:
    """Return the process group over which a weight is partitioned."""
    return weight.ds_process_group  # type: ignore[attr-defined]


def _iter_local_writes(
    weight: Tensor,
    indices: Tensor,
    values: Tensor,
) -> Iterator[EntryWrite]:
    """Yield the writes to memory of this process that make up one write."""
    if not is_partitioned(weight):
        yield weight, indices, values
        return

    # DeepSpeed may have the weight gathered beside its shard: at the moment, or for good because
    # it is small. Both copies must change.
    if weight.numel():
        yield weight, indices, values
    shard, is_local, positions = _locate_in_shard(weight, indices)
    patterns = view_bits(values).to(shard.device)
    yield shard, positions, patterns[is_local]


def _locate_in_shard(
    weight: Tensor,
    indices: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bit patterns of this process's shard, which indices lie in it, and where."""
    first, shard = local_shard(weight)
    wide_indices = indices.to(shard.device, torch.int64)
    positions = wide_indices - first
    is_after_start = positions >= 0
    is_before_end = positions < len(shard)
    is_local = is_after_start & is_before_end
    return view_bits(shard), is_local, positions[is_local]
