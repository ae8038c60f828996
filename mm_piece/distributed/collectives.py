"""Other processes: join them, communicate with them, divide work.

A launcher (torchrun, deepspeed, accelerate) starts the same command several times;
`join_process_group` connects the processes. Without a launcher there is one process, for which all
functions here are trivial. The processes share a file system: one process writes a file, and the
others read it.
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

# Words in the errors of torch's backends when a connection breaks.
_TRANSPORT_MARKERS = (
    "gloo",
    "NCCL",
    "ProcessGroup",
    "Connection closed by peer",
    "Connection reset",
)


def join_process_group(timeout_seconds: float = DEFAULT_TIMEOUT) -> None:
    """Join the processes that a launcher started, if it started more than this one.

    Each of them gives up after waiting `timeout_seconds` for another one.
    """
    has_accelerator = torch.accelerator.is_available()
    if not has_accelerator:
        # Without this DeepSpeed searches for an accelerator, and logs what it finds.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    atexit.register(_destroy_process_group)

    if world_size() > 1 and not distributed.is_initialized():
        from accelerate import PartialState

        limit = timedelta(seconds=timeout_seconds)
        PartialState(cpu=not has_accelerator, timeout=limit)


def _destroy_process_group() -> None:
    """End the communication: threads that still listen at exit would abort a finished run."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def exit_process(status: int) -> None:
    """End this process, one of several, at once.

    In an orderly exit, threads of torch's backends were seen to abort processes whose work was
    done and on disk. A launcher reports that as a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raise ProcessError for every error that another process's end causes in the block.

    torch's backends have many errors for it.
    """
    try:
        yield
    except RuntimeError as error:
        message = " ".join(str(error).split())
        has_marker = any(marker in message for marker in _TRANSPORT_MARKERS)
        is_transport = isinstance(error, distributed.DistError) or has_marker
        if world_size() == 1 or not is_transport:
            raise

        raise ProcessError(
            f"another process ended or did not answer in time ({message[:160]}); "
            "the same command goes on from the last checkpoint"
        ) from error


def rank() -> int:
    """Return the number of this process, from 0 on."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Return whether this process is the main one, which writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        distributed.barrier()


def broadcast(item: Item) -> Item:
    """Return the main process's item, on all processes."""
    if world_size() == 1:
        return item

    items = [item]
    distributed.broadcast_object_list(items)
    return items[0]


def all_gather_items(
    items: Sequence[Item],
    positions: Sequence[int],
    total: int,
) -> list[Item]:
    """Return a list of `total` items, of which every process has those at its `positions`."""
    own = (list(positions), list(items))
    contributions: list[Any] = [own]
    if world_size() > 1:
        contributions = [None] * world_size()
        distributed.all_gather_object(contributions, own)

    found: dict[int, Item] = {}
    for rank_positions, rank_items in contributions:
        found |= dict(zip(rank_positions, rank_items, strict=True))
    return [found[position] for position in range(total)]


def all_gather(vector: Tensor) -> Tensor:
    """Return the vectors of all processes, one after the other.

    They are 1-D, on the CPU, of one dtype, and may differ in length.
    """
    if world_size() == 1:
        return vector

    gathered_lengths = all_gather_items([len(vector)], [rank()], world_size())
    lengths = [int(length) for length in gathered_lengths]

    # torch's all_gather takes tensors of one length: pad to the longest, and cut off after it.
    padded = torch.zeros(max(lengths), dtype=vector.dtype)
    padded[: len(vector)] = vector
    mine = padded.to(_backend_device())

    vectors = [torch.empty_like(mine) for _ in lengths]
    distributed.all_gather(vectors, mine)

    unpadded = []
    for collected, length in zip(vectors, lengths, strict=True):
        unpadded.append(collected[:length].cpu())
    return torch.cat(unpadded)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over all processes of tensors of equal shape, on the CPU."""
    if world_size() == 1:
        return tensor

    total = tensor.to(_backend_device(), copy=True)
    distributed.all_reduce(total)
    return total.cpu()


def any_rank(flag: bool) -> bool:
    """Return whether the flag is true on any process."""
    if world_size() == 1:
        return flag

    count = all_reduce_sum(torch.tensor([int(flag)]))
    return bool(count)


@dataclass(frozen=True)
class EntryRange:
    """Entries `start` to `stop` - 1 of a tensor; no process has more than `max_size` of them."""

    start: int
    stop: int
    max_size: int


def assign_entry_range(entries: int, step: int = 1) -> EntryRange:
    """Return this process's share of a tensor's entries.

    It is a multiple of `step`, except for the last one.
    """
    # Division of the negative number, and the sign back: rounded up.
    num_steps = -(-entries // (step * world_size()))
    max_size = num_steps * step

    start = min(rank() * max_size, entries)
    stop = min(start + max_size, entries)
    return EntryRange(start, stop, max_size)


def schedule_items(
    kinds: Sequence[Hashable],
    in_lockstep: bool,
) -> list[tuple[int, bool]]:
    """Return the items that this process works on, in order, and whether each is its own.

    Every item is some process's own. With `in_lockstep` all processes have equally many items, and
    at any time items of one kind, as collectives within the work need. An item that is not the
    process's own only keeps it in step.
    """
    if not in_lockstep:
        return [(item, True) for item in range(rank(), len(kinds), world_size())]

    schedule = []
    for kind in dict.fromkeys(kinds):
        items = [item for item, other in enumerate(kinds) if other == kind]
        for low in range(0, len(items), world_size()):
            mine = low + rank()
            is_own = mine < len(items)
            item = items[mine] if is_own else items[-1]
            schedule.append((item, is_own))
    return schedule


def _backend_device() -> torch.device:
    """Return the device on which the backend takes tensors."""
    if distributed.get_backend() == "gloo":
        return torch.device("cpu")

    from accelerate import PartialState

    device = PartialState().device
    assert device is not None
    return device
