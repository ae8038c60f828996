"""Importance scores on batches: exact per-example moments of the gradient, in bounded memory.

One pass over the data per block of entries whose accumulators fit the budget; no weight is changed.
Sources of the rules: PIECE (arXiv 2511.15375); the empirical Fisher uses the data's own answers as
labels.

rules              the table of rules, from moments to scores
estimation         the passes over the data; inputs: what it may be given
per_example        each example's gradients; batched: where whole batches do
hooks, backward    gradients where they arise; what a backward pass reaches
accumulators       sums of a block of entries; folds: of parts of the examples
activations        what layers give out, for MIGU
margins            what answers stand on, for PIECE-R
factored, rows     importance as rows and columns; entries of one output
"""

from mm_piece.importance.backward import patchable
from mm_piece.importance.estimation import estimate, scorable, stream
from mm_piece.importance.factored import Compact, compact
from mm_piece.importance.folds import Folds
from mm_piece.importance.margins import stakes
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
