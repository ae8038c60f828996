"""Other processes: the only module that knows there may be any.

A launcher (torchrun, accelerate) starts the same command several times; `start` joins them. Without
a launcher everything here is what it is for one process. What one process writes is read by the
others, so that they share a file system.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

Thing = TypeVar("Thing")


def start() -> None:
    """Join the processes that a launcher started, if it started more than this one."""
    if size() > 1 and not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available())


def rank() -> int:
    """The number of this process, from 0 on."""
    return int(os.environ.get("RANK", 0))


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return rank() == 0


def wait() -> None:
    """Until every process has come here."""
    if size() > 1:
        distributed.barrier()


def told(thing: Thing) -> Thing:
    """What the main process has, for all."""
    if size() == 1:
        return thing
    things = [thing]
    distributed.broadcast_object_list(things)
    return things[0]


def gathered(things: Sequence[Thing], places: Sequence[int], total: int) -> list[Thing]:
    """A list of `total` things, of which every process has some at its `places`."""
    parts: list[Any] = [(list(places), list(things))]
    if size() > 1:
        parts = [None] * size()
        distributed.all_gather_object(parts, (list(places), list(things)))
    found: dict[int, Thing] = {}
    for numbers, part in parts:
        found |= dict(zip(numbers, part, strict=True))
    return [found[place] for place in range(total)]


def joined(part: Tensor) -> Tensor:
    """The vectors (1-D, on the CPU, of one dtype) of all processes, one after the other."""
    if size() == 1:
        return part
    lengths = [int(length) for length in gathered([len(part)], [rank()], size())]
    longest = max(lengths)
    padded = torch.zeros(longest, dtype=part.dtype)
    padded[: len(part)] = part
    mine = padded.to(_device())
    parts = [torch.empty_like(mine) for _ in lengths]
    distributed.all_gather(parts, mine)
    return torch.cat([p[:n].cpu() for p, n in zip(parts, lengths, strict=True)])


def summed(part: Tensor) -> Tensor:
    """The sum over all processes of tensors of equal shape, on the CPU."""
    if size() == 1:
        return part
    total = part.to(_device(), copy=True)
    distributed.all_reduce(total)
    return total.cpu()


def own(sizes: Mapping[str, int]) -> list[str]:
    """The tensors that are this process's share: neighbours, of about equally many entries."""
    total, before, found = sum(sizes.values()), 0, []
    for name, entries in sizes.items():
        if min(size() - 1, (before + entries // 2) * size() // max(total, 1)) == rank():
            found.append(name)
        before += entries
    return found


def _device() -> torch.device:
    """Where the backend wants its tensors."""
    if distributed.get_backend() == "gloo":
        return torch.device("cpu")
    from accelerate import PartialState

    device = PartialState().device
    assert device is not None
    return device
