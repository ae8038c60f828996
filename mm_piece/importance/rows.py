"""Rows: the entries of a weight that make one output, scored and chosen together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

Piece = tuple[str, int, Tensor]  # tensor name, offset of the piece in the flat tensor, flat scores


def width_of(shape: Sequence[int]) -> int:
    """Entries of one row: what a linear layer (or an expert, stacked) or a convolution sums over.

    Vectors (biases, norms) have rows of one entry.
    """
    if len(shape) < 2:
        return 1
    return shape[-1] if len(shape) <= 3 else prod(shape[1:])  # 4 and 5: convolutions


def row_scores(pieces: Iterable[Piece], widths: Mapping[str, int]) -> Iterator[Piece]:
    """Sums over rows of scores that arrive in pieces, however these cut the rows.

    A tensor's first piece begins with a row.
    """
    name, rest, done = "", torch.empty(0), 0
    for piece_name, start, flat in pieces:
        width = widths[piece_name]
        if piece_name != name:
            name, rest, done = piece_name, flat[:0], start // width
        joined = torch.cat([rest, flat])
        whole = len(joined) // width
        rest = joined[whole * width :]
        if whole:
            # In float64, so that the sum of a row does not depend on how many are summed with it.
            rows = joined[: whole * width].view(whole, width).sum(1, dtype=torch.float64)
            yield name, done, rows.float()
            done += whole


def entries_of(rows: Tensor, width: int) -> Tensor:
    """Flat indices of all entries of some rows, sorted like them; dtype kept where it is enough."""
    wide = rows.long()[:, None] * width + torch.arange(width)
    return wide.view(-1)
