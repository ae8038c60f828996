"""Blocks of entries whose accumulators fit a budget, and the accumulators of one block."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_piece.distributed import Share
from mm_piece.errors import SelectionError


@dataclass(frozen=True)
class Run:
    """Flat entries `start` to `stop` - 1 of one weight, perhaps none."""

    name: str
    start: int
    stop: int


Block = list[Run]

_BYTES = 4  # of one fp32 sum
_PIECE = 2**20  # entries that leave in one go: bounds the copies on the way out


def blocks(shares: Mapping[str, Share], memory: int, sums: int) -> list[Block]:
    """Runs whose `sums` fp32 accumulators an entry take at most `memory` bytes together.

    In order, cutting weights where needed; one block if nothing is accumulated. Every process has
    equally many blocks, of runs of the same weights, some of which may be empty. Raises
    SelectionError if the budget holds no entry.
    """
    if not sums:
        return [[Run(name, share.start, share.stop) for name, share in shares.items()]]
    capacity = memory // (_BYTES * sums)
    if capacity < 1:
        raise SelectionError(f"memory: {memory} bytes hold not even one entry ({_BYTES * sums})")
    found: list[Block] = [[]]
    room = capacity
    for name, share in shares.items():
        first = 0
        while first < share.most:
            if room == 0:
                found.append([])
                room = capacity
            end = min(share.most, first + room)
            edges = (min(share.start + place, share.stop) for place in (first, end))
            found[-1].append(Run(name, *edges))
            room -= end - first
            first = end
    return [block for block in found if block]


class Sums:
    """Running fp32 sums of gradients and of their squares over one block of entries."""

    def __init__(self, block: Block, kinds: Sequence[str], devices: Mapping[str, torch.device]):
        """`kinds`: "mean" and "square", or one of them; `devices`: where each weight's sums lie."""
        self.runs = {run.name: run for run in block}
        self.first = self._zeros("mean" in kinds, devices)
        self.second = self._zeros("square" in kinds, devices)
        self.examples = 0

    def clear(self) -> None:
        """Forget everything."""
        self.examples = 0
        for sums in (*self.first.values(), *self.second.values()):
            sums.zero_()

    def add(self, name: str, start: int, gradient: Tensor) -> None:
        """One example's gradient at the flat entries from `start` on, in any floating dtype."""
        run = self.runs[name]
        low, high = max(start, run.start), min(start + gradient.numel(), run.stop)
        if low >= high:
            return
        part = gradient.reshape(-1)[low - start : high - start].float()
        place = slice(low - run.start, high - run.start)
        if name in self.first:
            self.first[name][place].add_(part)
        if name in self.second:
            self.second[name][place].addcmul_(part, part)

    def means(self, run: Run) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Pieces of a run: first entry, mean and mean square on the CPU (zero if not summed)."""
        for start in range(run.start, run.stop, _PIECE):
            place = slice(start - run.start, min(start + _PIECE, run.stop) - run.start)
            yield start, self._mean(self.first, run, place), self._mean(self.second, run, place)

    def at(self, name: str, entries: Tensor) -> dict[str, Tensor]:
        """The sums at flat entries of a run, on the CPU, by kind."""
        kept = {"mean": self.first.get(name), "square": self.second.get(name)}
        places = entries - self.runs[name].start
        return {kind: s[places.to(s.device)].cpu() for kind, s in kept.items() if s is not None}

    def _mean(self, sums: dict[str, Tensor], run: Run, place: slice) -> Tensor:
        if run.name not in sums:
            return torch.zeros(1).expand(place.stop - place.start)
        return (sums[run.name][place] / max(self.examples, 1)).cpu()

    def _zeros(self, wanted: bool, devices: Mapping[str, torch.device]) -> dict[str, Tensor]:
        if not wanted:
            return {}
        return {
            name: torch.zeros(run.stop - run.start, device=devices[name])
            for name, run in self.runs.items()
        }
