"""From scores to a mask: an exact top-k over a stream of scores, in bounded memory.

Ties go to the earliest tensor, then to the lowest index, so that the same scores always give the
same mask, however they are cut into pieces.
"""

from mm_piece.mask.budgets import Budgets, Contest, Density, Part, contests, count
from mm_piece.mask.rows import Piece, row_scores, width_of
from mm_piece.mask.selecting import Mask, choose, select, select_stream, units_of
from mm_piece.mask.topk import TopK

__all__ = [
    "Budgets",
    "Contest",
    "Density",
    "Mask",
    "Part",
    "Piece",
    "TopK",
    "choose",
    "contests",
    "count",
    "select",
    "row_scores",
    "select_stream",
    "units_of",
    "width_of",
]
