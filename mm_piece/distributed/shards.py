"""A weight that ZeRO-3 has cut into equal parts, one on each process: entries in and out of it.

A weight that lies here as a whole is a weight with one part, so that callers need not know. What
reads a cut weight is a collective: all processes ask for the same entries in the same order.
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
    """Whether only a part of the weight lies on this process."""
    return "ds_tensor" in vars(weight)


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of the whole weight."""
    return torch.Size(weight.ds_shape) if is_partitioned(weight) else weight.shape  # type: ignore


def local_shard(weight: Tensor) -> tuple[int, Tensor]:
    """The first entry of this process's part, and the part: 1-D, sharing its memory."""
    if not is_partitioned(weight):
        return 0, weight.detach().reshape(-1)
    shard = weight.ds_tensor.detach()  # type: ignore[attr-defined]
    first = distributed.get_rank(_process_group_of(weight)) * len(shard)
    return first, shard[: max(0, prod(shape_of(weight)) - first)]  # the last ones end in padding


def slice_to_shard(weight: Tensor, flat: Tensor) -> Tensor:
    """This process's part of something with one number for each entry of a cut weight, padded."""
    first, shard = local_shard(weight)
    own = flat.new_zeros(len(weight.ds_tensor))  # type: ignore[attr-defined]
    own[: len(shard)] = flat[first : first + len(shard)]
    return own


def gather_entries(weight: Tensor, indices: Tensor) -> Tensor:
    """Copy the entries at flat `indices`, in the weight's dtype, on its device."""
    if not is_partitioned(weight):
        return view_bits(weight).index_select(0, indices.to(weight.device)).view(weight.dtype)
    positions, is_local, shard = _locate_in_shard(weight, indices)
    found = torch.zeros(len(indices), dtype=shard.dtype, device=shard.device)
    found[is_local] = shard[positions[is_local]]
    found = found.to(weight.device).view(torch.uint8)  # every byte is zero but on one process
    distributed.all_reduce(found, group=_process_group_of(weight))
    return found.view(weight.dtype)


def scatter_entries(writes: Iterable[EntryWrite]) -> None:
    """Write weights' entries at flat indices in place, bit for bit, all of them or none.

    What can still fail, memory on another device, happens before the first write; on the CPU one
    row of indices at a time is widened.
    """
    staged = [
        (target, positions.to(target.device), patterns.to(target.device))
        for weight, indices, values in writes
        for target, positions, patterns in _iter_local_writes(weight, indices, view_bits(values))
    ]
    if any(target.device.type != "cpu" for target, _, _ in staged):
        staged = [
            (target, positions.to(torch.int64), patterns) for target, positions, patterns in staged
        ]
    for target, positions, patterns in staged:
        target.index_copy_(0, positions.to(torch.int64), patterns)


def norm_of(weight: Tensor) -> float:
    """The Euclidean norm of the whole weight, computed in fp32."""
    _, shard = local_shard(weight)
    own = torch.linalg.vector_norm(shard, dtype=torch.float32)
    if not is_partitioned(weight):
        return float(own)
    square = own.to(weight.device).square()
    distributed.all_reduce(square, group=_process_group_of(weight))
    return float(square.sqrt())


@contextmanager
def gathered_parameters(weights: Sequence[Tensor]) -> Iterator[None]:
    """Weights that lie here as a whole until the context ends."""
    if not any(map(is_partitioned, weights)):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(list(weights)):
        yield


def _process_group_of(weight: Tensor) -> Any:
    """The processes that hold parts of a weight."""
    return weight.ds_process_group  # type: ignore[attr-defined]


def _iter_local_writes(weight: Tensor, indices: Tensor, patterns: Tensor) -> Iterator[EntryWrite]:
    """Where entries are to be written: bit patterns in flat memory, whichever holds them here."""
    if not is_partitioned(weight):
        yield view_bits(weight), indices, patterns
        return
    if weight.numel():  # gathered at the moment, or for good because it is small
        yield view_bits(weight), indices, patterns
    positions, is_local, shard = _locate_in_shard(weight, indices)
    yield shard, positions[is_local], patterns.to(shard.device)[is_local]


def _locate_in_shard(weight: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places in this process's part, which of them lie inside, and the part's bit patterns."""
    first, shard = local_shard(weight)
    positions = indices.to(shard.device, torch.int64) - first
    return positions, (positions >= 0) & (positions < len(shard)), view_bits(shard)
