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

from mm_piece.importance.backward import find_patchable_names
from mm_piece.importance.estimation import estimate, find_scorable_names, stream_scores
from mm_piece.importance.factored import FactoredImportance, factor_scores
from mm_piece.importance.folds import FoldSums
from mm_piece.importance.margins import margin_sensitivity
from mm_piece.importance.rules import (
    BATCH_METHODS,
    DATA_FREE_METHODS,
    METHODS,
    OUTPUT_METHODS,
    RETENTION_METHODS,
    SQUARED_METHODS,
    Moments,
    apply_rule,
    moments_of,
    needs_weights,
    piece_f,
    piece_s,
    resolve_method,
)

__all__ = [
    "DATA_FREE_METHODS",
    "RETENTION_METHODS",
    "METHODS",
    "BATCH_METHODS",
    "OUTPUT_METHODS",
    "SQUARED_METHODS",
    "FactoredImportance",
    "FoldSums",
    "Moments",
    "factor_scores",
    "estimate",
    "moments_of",
    "find_patchable_names",
    "piece_f",
    "piece_s",
    "resolve_method",
    "find_scorable_names",
    "apply_rule",
    "margin_sensitivity",
    "stream_scores",
    "needs_weights",
]
