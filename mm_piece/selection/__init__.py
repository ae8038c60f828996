"""From scores to a mask: an exact top-k over a stream of scores, in bounded memory.

Ties go to the earliest tensor, then to the lowest index, so that the same scores always give the
same mask, however they are cut into pieces.

mask             `select`: scores in, sorted flat indices out
budgets          who competes for how many places; auto_density
topk             the highest of a stream
task             a task's mask, through a recipe
cache            masks on disk
stability        what fresh examples would share
"""

from mm_piece.selection.budgets import Budgets, Contest, Density, Part, contests, count
from mm_piece.selection.mask import Mask, choose, select, select_stream, units_of
from mm_piece.selection.topk import TopK

__all__ = [
    "Budgets",
    "Contest",
    "Density",
    "Mask",
    "Part",
    "TopK",
    "choose",
    "contests",
    "count",
    "select",
    "select_stream",
    "units_of",
]
