"""Other processes: start them, talk to them, divide work.

A launcher (torchrun, deepspeed, accelerate) starts the same command several times; `start` joins
them. Without a launcher everything here is what it is for one process. What one process writes is
read by the others, so that they share a file system.
"""

import atexit
import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from mm_piece.errors import ProcessError

Item = TypeVar("Item")

DEFAULT_TIMEOUT = 1800  # seconds that processes wait for each other, as Trainer's `ddp_timeout`


def join_process_group(timeout_seconds: float = DEFAULT_TIMEOUT) -> None:
    """Join the processes that a launcher started, if it started more than this one.

    Each of them gives up after waiting `patience` seconds for another one.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed would search, and say so
    atexit.register(_destroy_process_group)
    if world_size() > 1 and not distributed.is_initialized():
        from accelerate import PartialState

        limit = timedelta(seconds=timeout_seconds)
        PartialState(cpu=not torch.accelerator.is_available(), timeout=limit)


def _destroy_process_group() -> None:
    """End the talk between processes: threads that still listen would abort a finished run."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def exit_process(status: int) -> None:
    """End this process, one of several, at once.

    Taken down in order, threads of torch's backends were seen to abort processes whose work was
    done and on disk, and a launcher calls that a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Context that turns the many ways in which a process notices another's death into one.

    Raises ProcessError.
    """
    try:
        yield
    except RuntimeError as error:
        message = " ".join(str(error).split())
        is_transport = isinstance(error, distributed.DistError) or any(
            w in message for w in _TRANSPORT_MARKERS
        )
        if world_size() == 1 or not is_transport:
            raise
        raise ProcessError(
            f"another process ended or did not answer in time ({message[:160]}); "
            "the same command goes on from the last checkpoint"
        ) from error


def rank() -> int:
    """The number of this process, from 0 on."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return rank() == 0


def barrier() -> None:
    """Until every process has come here."""
    if world_size() > 1:
        distributed.barrier()


def broadcast(item: Item) -> Item:
    """What the main process has, for all."""
    if world_size() == 1:
        return item
    items = [item]
    distributed.broadcast_object_list(items)
    return items[0]


def all_gather_items(items: Sequence[Item], positions: Sequence[int], total: int) -> list[Item]:
    """A list of `total` things, of which every process has some at its `places`."""
    contributions: list[Any] = [(list(positions), list(items))]
    if world_size() > 1:
        contributions = [None] * world_size()
        distributed.all_gather_object(contributions, (list(positions), list(items)))
    found: dict[int, Item] = {}
    for rank_positions, rank_items in contributions:
        found |= dict(zip(rank_positions, rank_items, strict=True))
    return [found[position] for position in range(total)]


def all_gather(vector: Tensor) -> Tensor:
    """The vectors (1-D, on the CPU, of one dtype) of all processes, one after the other."""
    if world_size() == 1:
        return vector
    lengths = [int(length) for length in all_gather_items([len(vector)], [rank()], world_size())]
    longest = max(lengths)
    padded = torch.zeros(longest, dtype=vector.dtype)
    padded[: len(vector)] = vector
    mine = padded.to(_backend_device())
    vectors = [torch.empty_like(mine) for _ in lengths]
    distributed.all_gather(vectors, mine)
    return torch.cat([p[:n].cpu() for p, n in zip(vectors, lengths, strict=True)])


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes of tensors of equal shape, on the CPU."""
    if world_size() == 1:
        return tensor
    total = tensor.to(_backend_device(), copy=True)
    distributed.all_reduce(total)
    return total.cpu()


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on any process."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_sum(torch.tensor([int(flag)])))


@dataclass(frozen=True)
class EntryRange:
    """Entries `start` to `stop` - 1 of a tensor, of which no process has more than `most`."""

    start: int
    stop: int
    max_size: int


def assign_entry_range(entries: int, step: int = 1) -> EntryRange:
    """This process's share of a tensor's entries, a multiple of `step` but for the last one."""
    max_size = -(-entries // (step * world_size())) * step
    start = min(rank() * max_size, entries)
    return EntryRange(start, min(start + max_size, entries), max_size)


def schedule_items(kinds: Sequence[Hashable], in_lockstep: bool) -> list[tuple[int, bool]]:
    """Which items this process works on, in order, and whether each is its own.

    Every item is some process's own. With `level` all processes have equally many items, and at any
    time items of one kind: an item that is not a process's own only keeps it in step.
    """
    if not in_lockstep:
        return [(item, True) for item in range(rank(), len(kinds), world_size())]
    found = []
    for kind in dict.fromkeys(kinds):
        items = [item for item, other in enumerate(kinds) if other == kind]
        for low in range(0, len(items), world_size()):
            mine = low + rank()
            found.append((items[min(mine, len(items) - 1)], mine < len(items)))
    return found


# What torch's backends say of themselves when a connection breaks.
_TRANSPORT_MARKERS = (
    "gloo",
    "NCCL",
    "ProcessGroup",
    "Connection closed by peer",
    "Connection reset",
)


def _backend_device() -> torch.device:
    """Where the backend wants its tensors."""
    if distributed.get_backend() == "gloo":
        return torch.device("cpu")
    from accelerate import PartialState

    device = PartialState().device
    assert device is not None
    return device
