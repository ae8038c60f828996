"""Importance scores on batches: exact per-example moments of the gradient, in bounded memory.

One pass over the data per block of entries whose accumulators fit the budget; no weight is changed.
Sources of the rules: PIECE (arXiv 2511.15375); the empirical Fisher uses the data's own answers as
labels.
"""

from mm_piece.importance.compact import Compact, compact
from mm_piece.importance.estimation import estimate, scorable, stream
from mm_piece.importance.reach import patchable
from mm_piece.importance.resampling import Folds
from mm_piece.importance.rules import (
    DATA_FREE,
    KEEPING,
    METHODS,
    OF_BATCHES,
    OF_OUTPUTS,
    SQUARES,
    Moments,
    moments_of,
    piece_f,
    piece_s,
    resolve,
    scored,
    weighs,
)
from mm_piece.importance.stakes import stakes

__all__ = [
    "DATA_FREE",
    "KEEPING",
    "METHODS",
    "OF_BATCHES",
    "OF_OUTPUTS",
    "SQUARES",
    "Compact",
    "Folds",
    "Moments",
    "compact",
    "estimate",
    "moments_of",
    "patchable",
    "piece_f",
    "piece_s",
    "resolve",
    "scorable",
    "scored",
    "stakes",
    "stream",
    "weighs",
]
