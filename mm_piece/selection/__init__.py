"""From scores to a mask: an exact top-k over a stream of scores, in bounded memory.

Of equal scores the one in the earliest tensor wins, then the one at the lowest index. The same
scores therefore give the same mask, however they are cut into pieces.

mask             `select`: from scores to sorted flat indices
budgets          how many units are chosen, and among which tensors
topk             the k highest scores of a stream
auto_density     the number that `density: auto` chooses
task             the mask of a task, as its recipe asks for it
cache            masks on disk
stability        how far a mask depends on the examples that were drawn
"""

from mm_piece.selection.budgets import (
    Budgets,
    Density,
    Subgroup,
    TopKGroup,
    build_topk_groups,
    count_selected,
)
from mm_piece.selection.mask import (
    Mask,
    count_units,
    select,
    select_all,
    select_stream,
    select_units,
)
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
    "select_all",
    "select_stream",
    "count_units",
]
