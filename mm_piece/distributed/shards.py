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

EntryWrite = tuple[Tensor, Tensor, Tensor]  # a tensor, flat indices, values


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
        return 0, weight.detach().reshape(-1)

    padded = weight.ds_tensor.detach()  # type: ignore[attr-defined]
    group_rank = distributed.get_rank(_process_group_of(weight))
    first = group_rank * len(padded)

    # Shards are equally long. The last ones end in padding, or are nothing else.
    num_entries = prod(shape_of(weight))
    num_left = max(0, num_entries - first)
    return first, padded[:num_left]


def slice_to_shard(weight: Tensor, flat: Tensor) -> Tensor:
    """Return this process's shard of one number for each entry of a partitioned weight, padded."""
    first, shard = local_shard(weight)
    padded_length = len(weight.ds_tensor)  # type: ignore[attr-defined]
    own = flat.new_zeros(padded_length)
    end = first + len(shard)
    own[: len(shard)] = flat[first:end]
    return own


def gather_entries(weight: Tensor, indices: Tensor) -> Tensor:
    """Return a copy of the entries at flat `indices`, in the weight's dtype, on its device."""
    if not is_partitioned(weight):
        indices = indices.to(weight.device)
        bits = view_bits(weight).index_select(0, indices)
        return bits.view(weight.dtype)

    positions, is_local, shard = _locate_in_shard(weight, indices)
    found = shard.new_zeros(len(indices))
    found[is_local] = shard[positions[is_local]]

    # One process has an entry and all others have zeros: a sum of bytes carries nothing over, and
    # is exact for every dtype. A sum of the numbers themselves would turn -0.0 into 0.0.
    found = found.to(weight.device)
    found_bytes = found.view(torch.uint8)
    distributed.all_reduce(found_bytes, group=_process_group_of(weight))
    return found_bytes.view(weight.dtype)


def scatter_entries(writes: Iterable[EntryWrite]) -> None:
    """Write weights' entries at flat indices in place, bit for bit: all of them or none.

    Every step that may still fail, as an allocation on another device may, comes before the first
    write.
    """
    staged: list[EntryWrite] = []
    for weight, indices, values in writes:
        patterns = view_bits(values)
        for target, positions, local_patterns in _iter_local_writes(weight, indices, patterns):
            positions = positions.to(target.device)
            local_patterns = local_patterns.to(target.device)
            staged.append((target, positions, local_patterns))

    # `index_copy_` takes int64. On the CPU the indices of one weight at a time are widened, which
    # keeps the extra memory small; elsewhere all of them are, before the first write.
    if any(target.device.type != "cpu" for target, _, _ in staged):
        staged = [
            (target, positions.to(torch.int64), patterns) for target, positions, patterns in staged
        ]
    for target, positions, patterns in staged:
        wide_positions = positions.to(torch.int64)
        target.index_copy_(0, wide_positions, patterns)


def norm_of(weight: Tensor) -> float:
    """Return the Euclidean norm of the gathered weight, computed in fp32."""
    _, shard = local_shard(weight)
    own = torch.linalg.vector_norm(shard, dtype=torch.float32)
    if not is_partitioned(weight):
        return float(own)

    square = own.to(weight.device).square()
    distributed.all_reduce(square, group=_process_group_of(weight))
    return float(square.sqrt())


@contextmanager
def gathered_parameters(weights: Sequence[Tensor]) -> Iterator[None]:
    """Keep the weights gathered on every process while the block runs."""
    if not any(map(is_partitioned, weights)):
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
    patterns: Tensor,
) -> Iterator[EntryWrite]:
    """Yield the writes of bit patterns to flat memory of this process that make up one write."""
    if not is_partitioned(weight):
        yield view_bits(weight), indices, patterns
        return

    # DeepSpeed may have the weight gathered beside its shard: at the moment, or for good because
    # it is small. Both copies must change.
    if weight.numel():
        yield view_bits(weight), indices, patterns
    positions, is_local, shard = _locate_in_shard(weight, indices)
    local_patterns = patterns.to(shard.device)[is_local]
    yield shard, positions[is_local], local_patterns


def _locate_in_shard(
    weight: Tensor,
    indices: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions in this process's shard, which of them are inside, and its bit patterns."""
    first, shard = local_shard(weight)
    positions = indices.to(shard.device, torch.int64) - first
    is_after_start = positions >= 0
    is_before_end = positions < len(shard)
    return positions, is_after_start & is_before_end, view_bits(shard)
