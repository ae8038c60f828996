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

from mm_piece.dtypes import bits

Write = tuple[Tensor, Tensor, Tensor]  # a tensor, flat indices, values


def is_cut(weight: Tensor) -> bool:
    """Whether only a part of the weight lies on this process."""
    return "ds_tensor" in vars(weight)


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of the whole weight."""
    return torch.Size(weight.ds_shape) if is_cut(weight) else weight.shape  # type: ignore


def part_of(weight: Tensor) -> tuple[int, Tensor]:
    """The first entry of this process's part, and the part: 1-D, sharing its memory."""
    if not is_cut(weight):
        return 0, weight.detach().reshape(-1)
    shard = weight.ds_tensor.detach()  # type: ignore[attr-defined]
    first = distributed.get_rank(_group(weight)) * len(shard)
    return first, shard[: max(0, prod(shape_of(weight)) - first)]  # the last ones end in padding


def own_part(weight: Tensor, flat: Tensor) -> Tensor:
    """This process's part of something with one number for each entry of a cut weight, padded."""
    first, part = part_of(weight)
    own = flat.new_zeros(len(weight.ds_tensor))  # type: ignore[attr-defined]
    own[: len(part)] = flat[first : first + len(part)]
    return own


def take(weight: Tensor, indices: Tensor) -> Tensor:
    """Copy the entries at flat `indices`, in the weight's dtype, on its device."""
    if not is_cut(weight):
        return bits(weight).index_select(0, indices.to(weight.device)).view(weight.dtype)
    places, mine, part = _mine(weight, indices)
    found = torch.zeros(len(indices), dtype=part.dtype, device=part.device)
    found[mine] = part[places[mine]]
    found = found.to(weight.device).view(torch.uint8)  # every byte is zero but on one process
    distributed.all_reduce(found, group=_group(weight))
    return found.view(weight.dtype)


def put_all(writes: Iterable[Write]) -> None:
    """Write weights' entries at flat indices in place, bit for bit, all of them or none.

    What can still fail, memory on another device, happens before the first write; on the CPU one
    row of indices at a time is widened.
    """
    staged = [
        (row, where.to(row.device), patterns.to(row.device))
        for weight, indices, values in writes
        for row, where, patterns in _rows(weight, indices, bits(values))
    ]
    if any(row.device.type != "cpu" for row, _, _ in staged):
        staged = [(row, where.to(torch.int64), patterns) for row, where, patterns in staged]
    for row, where, patterns in staged:
        row.index_copy_(0, where.to(torch.int64), patterns)


def norm_of(weight: Tensor) -> float:
    """The Euclidean norm of the whole weight, computed in fp32."""
    _, part = part_of(weight)
    own = torch.linalg.vector_norm(part, dtype=torch.float32)
    if not is_cut(weight):
        return float(own)
    square = own.to(weight.device).square()
    distributed.all_reduce(square, group=_group(weight))
    return float(square.sqrt())


@contextmanager
def whole(weights: Sequence[Tensor]) -> Iterator[None]:
    """Weights that lie here as a whole until the context ends."""
    if not any(map(is_cut, weights)):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(list(weights)):
        yield


def _group(weight: Tensor) -> Any:
    """The processes that hold parts of a weight."""
    return weight.ds_process_group  # type: ignore[attr-defined]


def _rows(weight: Tensor, indices: Tensor, patterns: Tensor) -> Iterator[Write]:
    """Where entries are to be written: bit patterns in flat memory, whichever holds them here."""
    if not is_cut(weight):
        yield bits(weight), indices, patterns
        return
    if weight.numel():  # gathered at the moment, or for good because it is small
        yield bits(weight), indices, patterns
    places, mine, part = _mine(weight, indices)
    yield part, places[mine], patterns.to(part.device)[mine]


def _mine(weight: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places in this process's part, which of them lie inside, and the part's bit patterns."""
    first, part = part_of(weight)
    places = indices.to(part.device, torch.int64) - first
    return places, (places >= 0) & (places < len(part)), bits(part)
