"""Importance of whole weights in little space: one number for each output row and each column.

Scores with entries s_ij are stored as r_i c_j / s, with the sums r_i of a row, c_j of a column and
s of all entries. Of all matrices of rank one this is the nearest to them by generalised
Kullback-Leibler divergence; Adafactor (arXiv 1804.04235) keeps second moments in the same way.
Vectors (biases, norms) lose nothing by it: their columns are one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mm_piece import distributed
from mm_piece.importance.rows import (
    ScorePiece,
    iter_output_row_sums,
    width_of,
)

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class FactoredImportance:
    """Scores of some weights, relative to the mean of all of them; bf16, by published name.

    `rows` holds the mean score of each output row, over the mean of all weights' entries. `columns`
    holds the mean of each column, over the mean of its own weight. Their product at (i, j) is
    r_i c_j / s, over the mean of all weights' entries.
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]

    def scores_at(self, name: str, entries: Tensor) -> Tensor:
        """Return the scores at flat entries of a weight, fp32; zeros if it has none."""
        if name not in self.rows:
            return torch.zeros(len(entries))

        rows = self.rows[name].float()
        columns = self.columns[name].float()
        width = len(columns)

        indices = entries.long()
        row_factors = rows[indices // width]
        column_factors = columns[indices % width]
        return row_factors * column_factors


class RetentionImportance:
    """The retention importance of a model's weights: a sum of factored importances.

    Each of them is relative to its own mean, so that all count the same.
    """

    def __init__(self, components: Sequence[FactoredImportance]) -> None:
        self.components = components

    def scores_at(self, name: str, entries: Tensor) -> Tensor:
        """Return the retention importance at flat entries of a weight, fp32."""
        scores = torch.zeros(len(entries))
        for component in self.components:
            scores = scores + component.scores_at(name, entries)
        return scores


def factor_scores(
    pieces: Iterable[ScorePiece],
    shapes: Shapes,
) -> FactoredImportance:
    """Return the factored form of scores that arrive in pieces, and never exist as a whole.

    With several processes each passes pieces of its own, which consist of complete output rows; all
    of them return the same.
    """
    widths: dict[str, int] = {}
    row_sums: dict[str, Tensor] = {}
    column_sums: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        width = width_of(shape)
        height = prod(shape) // width
        widths[name] = width
        row_sums[name] = torch.zeros(height)
        # In float64: the order of a sum, which depends on the pieces, is lost in rounding to bf16.
        column_sums[name] = torch.zeros(width, dtype=torch.float64)

    noted_pieces = _iter_with_column_sums(pieces, column_sums)
    for name, first, sums in iter_output_row_sums(noted_pieces, widths):
        end = first + len(sums)
        row_sums[name][first:end] = sums

    # Entries that other processes have scored are zeros here.
    for name, sums in row_sums.items():
        row_sums[name] = distributed.all_reduce_sum(sums)
    for name, sums in column_sums.items():
        column_sums[name] = distributed.all_reduce_sum(sums)

    weight_sums = [float(sums.sum()) for sums in column_sums.values()]
    sizes = [prod(shape) for shape in shapes.values()]
    mean = sum(weight_sums) / sum(sizes)

    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for name in shapes:
        # `or 1`: scores that are all zero stay so.
        row_unit = widths[name] * mean or 1
        row_factors = row_sums[name] / row_unit
        rows[name] = row_factors.bfloat16()

        column_unit = column_sums[name].mean() or 1
        column_factors = column_sums[name] / column_unit
        columns[name] = column_factors.bfloat16()
    return FactoredImportance(rows, columns)


def _iter_with_column_sums(
    pieces: Iterable[ScorePiece],
    columns: dict[str, Tensor],
) -> Iterator[ScorePiece]:
    """Iterate over the pieces as they are, adding each to the sums of its weight's columns."""
    for name, start, flat in pieces:
        # A piece may begin and end within an output row: zeros complete these rows.
        width = len(columns[name])
        before = start % width
        end = before + len(flat)
        after = -end % width
        padded = torch.nn.functional.pad(flat, (before, after))
        rows = padded.view(-1, width)  # (rows, width)
        columns[name] += rows.sum(0, dtype=torch.float64)
        yield name, start, flat
