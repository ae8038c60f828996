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

Thing = TypeVar("Thing")

PATIENCE = 1800  # seconds that processes wait for each other, as Trainer's `ddp_timeout`


def start(patience: float = PATIENCE) -> None:
    """Join the processes that a launcher started, if it started more than this one.

    Each of them gives up after waiting `patience` seconds for another one.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed would search, and say so
    atexit.register(_part)
    if size() > 1 and not distributed.is_initialized():
        from accelerate import PartialState

        limit = timedelta(seconds=patience)
        PartialState(cpu=not torch.accelerator.is_available(), timeout=limit)


def _part() -> None:
    """End the talk between processes: threads that still listen would abort a finished run."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def end(status: int) -> None:
    """End this process, one of several, at once.

    Taken down in order, threads of torch's backends were seen to abort processes whose work was
    done and on disk, and a launcher calls that a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def lost() -> Iterator[None]:
    """Context that turns the many ways in which a process notices another's death into one.

    Raises ProcessError.
    """
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        talk = isinstance(error, distributed.DistError) or any(w in said for w in _TRANSPORTS)
        if size() == 1 or not talk:
            raise
        raise ProcessError(
            f"another process ended or did not answer in time ({said[:160]}); "
            "the same command goes on from the last checkpoint"
        ) from error


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


def agreed(flag: bool) -> bool:
    """Whether the flag is up on any process."""
    if size() == 1:
        return flag
    return bool(summed(torch.tensor([int(flag)])))


@dataclass(frozen=True)
class Share:
    """Entries `start` to `stop` - 1 of a tensor, of which no process has more than `most`."""

    start: int
    stop: int
    most: int


def share(entries: int, step: int = 1) -> Share:
    """This process's share of a tensor's entries, a multiple of `step` but for the last one."""
    most = -(-entries // (step * size())) * step
    start = min(rank() * most, entries)
    return Share(start, min(start + most, entries), most)


def rounds(kinds: Sequence[Hashable], level: bool) -> list[tuple[int, bool]]:
    """Which items this process works on, in order, and whether each is its own.

    Every item is some process's own. With `level` all processes have equally many items, and at any
    time items of one kind: an item that is not a process's own only keeps it in step.
    """
    if not level:
        return [(item, True) for item in range(rank(), len(kinds), size())]
    found = []
    for kind in dict.fromkeys(kinds):
        items = [item for item, other in enumerate(kinds) if other == kind]
        for low in range(0, len(items), size()):
            mine = low + rank()
            found.append((items[min(mine, len(items) - 1)], mine < len(items)))
    return found


# What torch's backends say of themselves when a connection breaks.
_TRANSPORTS = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset")


def _device() -> torch.device:
    """Where the backend wants its tensors."""
    if distributed.get_backend() == "gloo":
        return torch.device("cpu")
    from accelerate import PartialState

    device = PartialState().device
    assert device is not None
    return device
