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

from mm_piece.selection.budgets import (
    Budgets,
    Density,
    Subgroup,
    TopKGroup,
    build_topk_groups,
    count_selected,
)
from mm_piece.selection.mask import Mask, count_units, select, select_stream, select_units
from mm_piece.selection.topk import TopK

__all__ = [
    "Budgets",
    "TopKGroup",
    "Density",
    "Mask",
    "Subgroup",
    "TopK",
    "select_units",
    "build_topk_groups",
    "count_selected",
    "select",
    "select_stream",
    "count_units",
]
