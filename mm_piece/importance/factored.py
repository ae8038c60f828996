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
from torch.nn.functional import pad

from mm_piece import distributed
from mm_piece.importance.rows import ScorePiece, iter_output_row_sums, width_of

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

    def scores_at(
        self,
        name: str,
        entries: Tensor,
    ) -> Tensor:
        """Return the scores at flat entries of a weight, fp32; zeros if it has none."""
        if name not in self.rows:
            return torch.zeros(len(entries))

        rows = self.rows[name].float()
        columns = self.columns[name].float()
        width = len(columns)

        indices = entries.long()
        row_numbers = indices // width
        column_numbers = indices % width
        return rows[row_numbers] * columns[column_numbers]


class RetentionImportance:
    """The retention importance of a model's weights: a sum of factored importances.

    Each of them is relative to its own mean, so that all count the same.
    """

    def __init__(self, components: Sequence[FactoredImportance]) -> None:
        self.components = components

    def scores_at(
        self,
        name: str,
        entries: Tensor,
    ) -> Tensor:
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
    sums = _sum_scores(pieces, shapes)
    mean = _compute_mean(sums, shapes)

    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for name, weight_sums in sums.items():
        width = len(weight_sums.columns)

        # `or 1`: scores that are all zero stay so.
        row_unit = width * mean or 1
        row_factors = weight_sums.rows / row_unit
        rows[name] = row_factors.bfloat16()

        column_unit = weight_sums.columns.mean() or 1
        column_factors = weight_sums.columns / column_unit
        columns[name] = column_factors.bfloat16()
    return FactoredImportance(rows, columns)


@dataclass
class _WeightSums:
    """Sums of a weight's scores over each of its output rows, fp32, and each column, float64."""

    rows: Tensor
    columns: Tensor


def _sum_scores(
    pieces: Iterable[ScorePiece],
    shapes: Shapes,
) -> dict[str, _WeightSums]:
    """Return the sums of each weight's scores over all processes."""
    widths: dict[str, int] = {}
    sums: dict[str, _WeightSums] = {}
    for name, shape in shapes.items():
        width = width_of(shape)
        height = prod(shape) // width
        widths[name] = width
        sums[name] = _WeightSums(
            rows=torch.zeros(height),
            # In float64: the order of a sum, which depends on the pieces, is lost in rounding to
            # bf16.
            columns=torch.zeros(width, dtype=torch.float64),
        )

    noted_pieces = _iter_with_column_sums(pieces, sums)
    for name, first, row_sums in iter_output_row_sums(noted_pieces, widths):
        end = first + len(row_sums)
        rows = sums[name].rows
        rows[first:end] = row_sums

    # Entries that other processes have scored are zeros here.
    for weight_sums in sums.values():
        weight_sums.rows = distributed.all_reduce_sum(weight_sums.rows)
        weight_sums.columns = distributed.all_reduce_sum(weight_sums.columns)
    return sums


def _iter_with_column_sums(
    pieces: Iterable[ScorePiece],
    sums: Mapping[str, _WeightSums],
) -> Iterator[ScorePiece]:
    """Iterate over the pieces as they are, adding each to the sums of its weight's columns."""
    for name, start, flat in pieces:
        # A piece may begin and end within an output row: zeros complete these rows.
        columns = sums[name].columns
        width = len(columns)
        before = start % width
        end = before + len(flat)
        after = -end % width
        padded = pad(flat, (before, after))
        rows = padded.view(-1, width)  # (rows, width)
        columns += rows.sum(0, dtype=torch.float64)
        yield name, start, flat


def _compute_mean(
    sums: Mapping[str, _WeightSums],
    shapes: Shapes,
) -> float:
    """Return the mean score of all entries of all weights."""
    totals: list[float] = []
    sizes: list[int] = []
    for name, shape in shapes.items():
        total = sums[name].columns.sum()
        totals.append(float(total))
        sizes.append(prod(shape))
    return sum(totals) / sum(sizes)
