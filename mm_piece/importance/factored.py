"""Importance of whole weights in little space: one number for each row and one for each column.

Entry (i, j) of a weight's scores is taken as r_i c_j / s, with the sums over its row, its column
and all entries: of all matrices of rank one the nearest by generalised Kullback-Leibler divergence,
and how Adafactor (arXiv 1804.04235) keeps second moments. Vectors stay as they are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mm_piece import distributed
from mm_piece.importance.rows import ScorePiece, iter_output_row_sums, width_of

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class FactoredImportance:
    """Scores of some weights, relative to the mean of all of them; bf16, by published name.

    `rows` holds the mean of each row, `columns` that of each column over the mean of the weight.
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]

    def scores_at(self, name: str, entries: Tensor) -> Tensor:
        """The scores of some flat entries, fp32; zeros for a weight that has none."""
        if name not in self.rows:
            return torch.zeros(len(entries))
        rows, columns = self.rows[name].float(), self.columns[name].float()
        indices = entries.long()
        return rows[indices // len(columns)] * columns[indices % len(columns)]


class RetentionImportance:
    """What is to be kept of a model's weights: the sum of compact stakes."""

    def __init__(self, components: Sequence[FactoredImportance]) -> None:
        self.components = components

    def scores_at(self, name: str, entries: Tensor) -> Tensor:
        """What is at stake at some flat entries, fp32; each part is relative to its mean."""
        return sum(
            (found.scores_at(name, entries) for found in self.components), torch.zeros(len(entries))
        )


def factor_scores(pieces: Iterable[ScorePiece], shapes: Shapes) -> FactoredImportance:
    """The compact form of scores that come in pieces, never held as a whole.

    Of several processes each gives whole rows of its own; all get the same. Sums are made in
    float64, so that their order hardly ever shows in what is kept.
    """
    widths = {name: width_of(shape) for name, shape in shapes.items()}
    rows = {n: torch.zeros(prod(shape) // widths[n]) for n, shape in shapes.items()}
    columns = {name: torch.zeros(widths[name], dtype=torch.float64) for name in shapes}
    for name, first, sums in iter_output_row_sums(_iter_with_column_sums(pieces, columns), widths):
        rows[name][first : first + len(sums)] = sums
    rows = {name: distributed.all_reduce_sum(sums) for name, sums in rows.items()}
    columns = {name: distributed.all_reduce_sum(sums) for name, sums in columns.items()}
    total = sum(float(sums.sum()) for sums in columns.values())
    mean = total / sum(prod(shape) for shape in shapes.values())
    return FactoredImportance(
        {n: (sums / (widths[n] * mean or 1)).bfloat16() for n, sums in rows.items()},
        {n: (sums / (sums.mean() or 1)).bfloat16() for n, sums in columns.items()},
    )


def _iter_with_column_sums(
    pieces: Iterable[ScorePiece], columns: dict[str, Tensor]
) -> Iterator[ScorePiece]:
    """The pieces as they are; what they add to each column is noted on the way."""
    for name, start, flat in pieces:
        width = len(columns[name])
        before = start % width
        after = -(before + len(flat)) % width
        padded = torch.nn.functional.pad(flat, (before, after)).view(-1, width)
        columns[name] += padded.sum(0, dtype=torch.float64)
        yield name, start, flat
