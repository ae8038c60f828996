"""Importance scores on batches: exact per-example moments of the gradient, in bounded memory.

One pass over the data per block of entries whose accumulators fit the budget; no weight is changed.
Sources of the rules: PIECE (arXiv 2511.15375); the empirical Fisher uses the data's own answers as
labels.

rules, moments     the table of rules; what a rule may see of some entries
estimation         the passes over the data; inputs: what it may be given
per_example        each example's gradients; batched: where whole batches do
hooks, backward    gradients where they arise; what a backward pass reaches
accumulators       sums of a block of entries; folds: of parts of the examples
activations        what layers give out, for MIGU
margins            what answers stand on, for PIECE-R
factored, rows     importance as rows and columns; entries of one output
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm_piece.importance.backward import find_patchable_names
    from mm_piece.importance.estimation import estimate, find_scorable_names, stream_scores
    from mm_piece.importance.factored import FactoredImportance, factor_scores
    from mm_piece.importance.folds import FoldSums
    from mm_piece.importance.margins import margin_sensitivity
    from mm_piece.importance.moments import Moments, apply_rule, resolve_rule
    from mm_piece.importance.rules import RULES, Rule, piece_f, piece_s, rule_of

# Imported on first use, so that recipes read the table of rules without torch.
_HOMES = {
    "FactoredImportance": "factored",
    "FoldSums": "folds",
    "Moments": "moments",
    "RULES": "rules",
    "Rule": "rules",
    "apply_rule": "moments",
    "estimate": "estimation",
    "factor_scores": "factored",
    "find_patchable_names": "backward",
    "find_scorable_names": "estimation",
    "margin_sensitivity": "margins",
    "piece_f": "rules",
    "piece_s": "rules",
    "resolve_rule": "moments",
    "rule_of": "rules",
    "stream_scores": "estimation",
}

__all__ = [
    "RULES",
    "FactoredImportance",
    "FoldSums",
    "Moments",
    "Rule",
    "apply_rule",
    "estimate",
    "factor_scores",
    "find_patchable_names",
    "find_scorable_names",
    "margin_sensitivity",
    "piece_f",
    "piece_s",
    "resolve_rule",
    "rule_of",
    "stream_scores",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"mm_piece.importance.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mm_piece.importance' has no attribute {name!r}")
