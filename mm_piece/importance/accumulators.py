"""Blocks of entries whose accumulators fit a memory budget, and the accumulators of one block.

The gradients of all weights are summed entry by entry. If the sums of all entries take more memory
than allowed, the entries are divided into blocks, and each block gets a pass over the data.
"""

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


def split_into_blocks(
    shares: Mapping[str, EntryRange],
    memory: int,
    num_sums: int,
) -> list[Block]:
    """Divide entries into blocks whose `num_sums` fp32 sums an entry fit in `memory` bytes.

    Blocks follow the order of `shares` and may divide a weight. Without sums there is one block.
    Every process has equally many blocks, with ranges of the same weights, some of which may be
    empty. Raises SelectionError if the memory is too small for one entry.
    """
    if not num_sums:
        only_block = []
        for name, share in shares.items():
            only_block.append(BlockRange(name, share.start, share.stop))
        return [only_block]

    bytes_per_entry = _BYTES * num_sums
    capacity = memory // bytes_per_entry
    if capacity < 1:
        raise SelectionError(f"memory: {memory} bytes hold not even one entry ({bytes_per_entry})")

    blocks: list[Block] = [[]]
    room = capacity
    for name, share in shares.items():
        # Offsets count up to the largest share of any process: so all processes divide alike.
        first = 0
        while first < share.max_size:
            if room == 0:
                blocks.append([])
                room = capacity

            # Past the end of this process's share, ranges are empty.
            end = min(share.max_size, first + room)
            block_range = BlockRange(
                name,
                start=min(share.start + first, share.stop),
                stop=min(share.start + end, share.stop),
            )
            blocks[-1].append(block_range)
            room -= end - first
            first = end
    return [block for block in blocks if block]


class GradientSums:
    """Running fp32 sums of gradients and of their squares over one block of entries."""

    def __init__(
        self,
        block: Block,
        kinds: Sequence[str],
        devices: Mapping[str, torch.device],
    ) -> None:
        """`kinds`: "mean" and "square", or one of them; `devices`: where each weight's sums lie."""
        self.ranges = {block_range.name: block_range for block_range in block}
        self.gradient_sums = self._make_zeros("mean" in kinds, devices)
        self.square_sums = self._make_zeros("square" in kinds, devices)
        self.examples = 0

    def reset_sums(self) -> None:
        """Set all sums and the count of examples to zero."""
        self.examples = 0
        for sums in self.gradient_sums.values():
            sums.zero_()
        for sums in self.square_sums.values():
            sums.zero_()

    def add_gradient(
        self,
        name: str,
        start: int,
        gradient: Tensor,
    ) -> None:
        """Add one example's gradient at the flat entries from `start` on, in any floating dtype.

        Entries outside of the block are ignored.
        """
        block_range = self.ranges[name]
        low = max(start, block_range.start)
        high = min(start + gradient.numel(), block_range.stop)
        if low >= high:
            return

        # Positions count from the first entry of the gradient, and from that of the range.
        flat = gradient.reshape(-1)
        values = flat[low - start : high - start].float()
        span = slice(low - block_range.start, high - block_range.start)
        if name in self.gradient_sums:
            sums = self.gradient_sums[name]
            sums[span].add_(values)
        if name in self.square_sums:
            squares = self.square_sums[name]
            squares[span].addcmul_(values, values)

    def iter_means(self, block_range: BlockRange) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Iterate over pieces of a range: the first entry, mean and mean square of the entries.

        Both are on the CPU, and zeros if they were not summed.
        """
        for start in range(block_range.start, block_range.stop, _PIECE):
            stop = min(start + _PIECE, block_range.stop)
            # Sums count from the first entry of the range.
            span = slice(start - block_range.start, stop - block_range.start)
            mean = self._compute_mean(self.gradient_sums, block_range, span)
            square = self._compute_mean(self.square_sums, block_range, span)
            yield start, mean, square

    def sums_at(self, name: str, entries: Tensor) -> dict[str, Tensor]:
        """Return the sums at flat entries of the block, on the CPU, by kind."""
        offsets = entries - self.ranges[name].start
        sums_by_kind = {
            "mean": self.gradient_sums.get(name),
            "square": self.square_sums.get(name),
        }

        found: dict[str, Tensor] = {}
        for kind, sums in sums_by_kind.items():
            if sums is not None:
                selected = sums[offsets.to(sums.device)]
                found[kind] = selected.cpu()
        return found

    def _compute_mean(
        self,
        sums: dict[str, Tensor],
        block_range: BlockRange,
        span: slice,
    ) -> Tensor:
        """Return the mean over examples at a span of a range."""
        if block_range.name not in sums:
            size = span.stop - span.start
            return torch.zeros(1).expand(size)  # takes no memory

        count = max(self.examples, 1)
        mean = sums[block_range.name][span] / count
        return mean.cpu()

    def _make_zeros(
        self,
        wanted: bool,
        devices: Mapping[str, torch.device],
    ) -> dict[str, Tensor]:
        """Return a zero for each entry of the block, none unless they are wanted."""
        if not wanted:
            return {}

        zeros: dict[str, Tensor] = {}
        for name, block_range in self.ranges.items():
            size = block_range.stop - block_range.start
            zeros[name] = torch.zeros(size, device=devices[name])
        return zeros
