"""Blocks of entries whose accumulators fit a budget, and the accumulators of one block."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_piece.distributed import EntryRange
from mm_piece.errors import SelectionError


@dataclass(frozen=True)
class BlockRange:
    """Flat entries `start` to `stop` - 1 of one weight, perhaps none."""

    name: str
    start: int
    stop: int


Block = list[BlockRange]

_BYTES = 4  # of one fp32 sum
_PIECE = 2**20  # entries that leave in one go: bounds the copies on the way out


def split_into_blocks(shares: Mapping[str, EntryRange], memory: int, num_sums: int) -> list[Block]:
    """Runs whose `sums` fp32 accumulators an entry take at most `memory` bytes together.

    In order, cutting weights where needed; one block if nothing is accumulated. Every process has
    equally many blocks, of runs of the same weights, some of which may be empty. Raises
    SelectionError if the budget holds no entry.
    """
    if not num_sums:
        return [[BlockRange(name, share.start, share.stop) for name, share in shares.items()]]
    capacity = memory // (_BYTES * num_sums)
    if capacity < 1:
        raise SelectionError(
            f"memory: {memory} bytes hold not even one entry ({_BYTES * num_sums})"
        )
    found: list[Block] = [[]]
    room = capacity
    for name, share in shares.items():
        first = 0
        while first < share.max_size:
            if room == 0:
                found.append([])
                room = capacity
            end = min(share.max_size, first + room)
            edges = (min(share.start + offset, share.stop) for offset in (first, end))
            found[-1].append(BlockRange(name, *edges))
            room -= end - first
            first = end
    return [block for block in found if block]


class GradientSums:
    """Running fp32 sums of gradients and of their squares over one block of entries."""

    def __init__(self, block: Block, kinds: Sequence[str], devices: Mapping[str, torch.device]):
        """`kinds`: "mean" and "square", or one of them; `devices`: where each weight's sums lie."""
        self.ranges = {run.name: run for run in block}
        self.gradient_sums = self._make_zeros("mean" in kinds, devices)
        self.square_sums = self._make_zeros("square" in kinds, devices)
        self.examples = 0

    def reset_sums(self) -> None:
        """Forget everything."""
        self.examples = 0
        for sums in (*self.gradient_sums.values(), *self.square_sums.values()):
            sums.zero_()

    def add_gradient(self, name: str, start: int, gradient: Tensor) -> None:
        """One example's gradient at the flat entries from `start` on, in any floating dtype."""
        block_range = self.ranges[name]
        low, high = max(start, block_range.start), min(start + gradient.numel(), block_range.stop)
        if low >= high:
            return
        values = gradient.reshape(-1)[low - start : high - start].float()
        span = slice(low - block_range.start, high - block_range.start)
        if name in self.gradient_sums:
            self.gradient_sums[name][span].add_(values)
        if name in self.square_sums:
            self.square_sums[name][span].addcmul_(values, values)

    def iter_means(self, block_range: BlockRange) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Pieces of a run: first entry, mean and mean square on the CPU (zero if not summed)."""
        for start in range(block_range.start, block_range.stop, _PIECE):
            span = slice(
                start - block_range.start, min(start + _PIECE, block_range.stop) - block_range.start
            )
            yield (
                start,
                self._compute_mean(self.gradient_sums, block_range, span),
                self._compute_mean(self.square_sums, block_range, span),
            )

    def sums_at(self, name: str, entries: Tensor) -> dict[str, Tensor]:
        """The sums at flat entries of a run, on the CPU, by kind."""
        sums_by_kind = {"mean": self.gradient_sums.get(name), "square": self.square_sums.get(name)}
        offsets = entries - self.ranges[name].start
        return {
            kind: s[offsets.to(s.device)].cpu() for kind, s in sums_by_kind.items() if s is not None
        }

    def _compute_mean(
        self, sums: dict[str, Tensor], block_range: BlockRange, span: slice
    ) -> Tensor:
        if block_range.name not in sums:
            return torch.zeros(1).expand(span.stop - span.start)
        return (sums[block_range.name][span] / max(self.examples, 1)).cpu()

    def _make_zeros(self, wanted: bool, devices: Mapping[str, torch.device]) -> dict[str, Tensor]:
        if not wanted:
            return {}
        return {
            name: torch.zeros(run.stop - run.start, device=devices[name])
            for name, run in self.ranges.items()
        }
