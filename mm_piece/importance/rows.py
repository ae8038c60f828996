"""Rows: the entries of a weight that make one output, scored and chosen together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

ScorePiece = tuple[
    str, int, Tensor
]  # tensor name, offset of the piece in the flat tensor, flat scores


def width_of(shape: Sequence[int]) -> int:
    """Entries of one row: what a linear layer (or an expert, stacked) or a convolution sums over.

    Vectors (biases, norms) have rows of one entry.
    """
    if len(shape) < 2:
        return 1
    return shape[-1] if len(shape) <= 3 else prod(shape[1:])  # 4 and 5: convolutions


def iter_output_row_sums(
    pieces: Iterable[ScorePiece], widths: Mapping[str, int]
) -> Iterator[ScorePiece]:
    """Sums over rows of scores that arrive in pieces, however these cut the rows.

    A tensor's first piece begins with a row.
    """
    name, remainder, next_row = "", torch.empty(0), 0
    for piece_name, start, flat in pieces:
        width = widths[piece_name]
        if piece_name != name:
            name, remainder, next_row = piece_name, flat[:0], start // width
        buffered = torch.cat([remainder, flat])
        num_complete = len(buffered) // width
        remainder = buffered[num_complete * width :]
        if num_complete:
            # In float64, so that the sum of a row does not depend on how many are summed with it.
            rows = (
                buffered[: num_complete * width]
                .view(num_complete, width)
                .sum(1, dtype=torch.float64)
            )
            yield name, next_row, rows.float()
            next_row += num_complete


def entries_of(rows: Tensor, width: int) -> Tensor:
    """Flat indices of all entries of some rows, sorted like them; dtype kept where it is enough."""
    wide = rows.long()[:, None] * width + torch.arange(width)
    return wide.view(-1)
