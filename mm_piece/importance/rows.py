"""Output rows: the entries of a weight that make one output, scored and selected together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

# Tensor name, offset of the piece in the flat tensor, flat scores.
ScorePiece = tuple[str, int, Tensor]


def width_of(shape: Sequence[int]) -> int:
    """Return the number of entries of one output row.

    That is what a linear layer (or an expert, stacked) or a convolution sums over. Vectors (biases,
    norms) have rows of one entry.
    """
    if len(shape) < 2:
        return 1
    if len(shape) <= 3:
        return shape[-1]
    return prod(shape[1:])  # convolutions, with two or three dimensions of space


def iter_output_row_sums(
    pieces: Iterable[ScorePiece],
    widths: Mapping[str, int],
) -> Iterator[ScorePiece]:
    """Iterate over sums over output rows of scores, wherever the pieces divide the rows.

    Offsets count rows. The first piece of a tensor must begin with a row.
    """
    name = ""
    remainder = torch.empty(0)  # of a row that the last piece has begun
    next_row = 0

    for piece_name, start, flat in pieces:
        width = widths[piece_name]
        if piece_name != name:
            name = piece_name
            remainder = flat[:0]
            next_row = start // width

        buffered = torch.cat([remainder, flat])
        num_complete = len(buffered) // width
        end = num_complete * width
        remainder = buffered[end:]
        if num_complete == 0:
            continue

        # In float64, so that the sum of a row does not depend on how many are summed with it.
        rows = buffered[:end].view(num_complete, width)
        sums = rows.sum(1, dtype=torch.float64)
        yield name, next_row, sums.float()
        next_row += num_complete


def entries_of(rows: Tensor, width: int) -> Tensor:
    """Return the flat indices (int64) of all entries of some rows, in the order of the rows."""
    first_entries = rows.long() * width
    entries = first_entries[:, None] + torch.arange(width)  # (rows, width)
    return entries.view(-1)
