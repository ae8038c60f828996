"""The scoring rules: one table, and what a rule of one's own has to say.

A rule is pure arithmetic on tensors: from the moments of some entries to their scores. To add one,
write its function and one entry of `RULES`; recipes then know its name, and everything that asks
for gradients, outputs or weights reads from the same entry what to provide.

This module does not import torch, so that recipes are read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mm_piece.errors import SelectionError

if TYPE_CHECKING:
    from torch import Tensor

    from mm_piece.importance.moments import Moments

GRADIENT_SUMS = frozenset({"mean", "square"})
OUTPUT_SUMS = frozenset({"output"})


@dataclass(frozen=True)
class Rule:
    """A scoring rule, and what it needs to be given.

    Raises ValueError for needs that cannot be provided together.
    """

    # From `Moments` of n entries to n scores; higher ones are selected.
    function: Callable[[Moments], Tensor]
    # What is summed over the examples: "mean" and "square" of gradients cost four bytes an entry
    # each, "output" costs four bytes an output row. A rule that needs nothing reads no data.
    needs: tuple[str, ...] = ("mean", "square")
    # Every example's gradient counts by itself; else a batch's gradient counts as one.
    per_example: bool = True
    # Scores are squares of gradients: automatic density weighs their roots.
    squared: bool = False
    # The rule looks at the weights themselves.
    reads_weights: bool = False
    # The rule looks at retention importance, which takes two more estimates a task.
    uses_retention: bool = False
    # Settings of a recipe's `select` where the recipe says nothing: what the rule's paper has.
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError for needs that are unknown or cannot be provided together."""
        needs = frozenset(self.needs)
        needs_only_gradients = needs <= GRADIENT_SUMS
        if not needs_only_gradients and needs != OUTPUT_SUMS:
            raise ValueError(
                f"needs {sorted(needs)}; allowed: mean and square of gradients, or output alone"
            )

        needs_gradients = bool(needs & GRADIENT_SUMS)
        if not self.per_example and not needs_gradients:
            raise ValueError("per_example is about gradients, and the rule needs none")

    @property
    def is_data_free(self) -> bool:
        """Whether the rule needs no example."""
        return not self.needs

    @property
    def needs_outputs(self) -> bool:
        """Whether the rule needs outputs of linear layers, and so scores their weights alone."""
        return "output" in self.needs


def piece_f(moments: Moments) -> Tensor:
    """Return PIECE-F's scores (arXiv 2511.15375): the diagonal Fisher, E_n[g_n ** 2]."""
    return moments.square


def piece_s(moments: Moments) -> Tensor:
    """Return PIECE-S's scores (arXiv 2511.15375): |E_n[g_n]| / sqrt(F + xi).

    They are a first-order signal, normalised by curvature.
    """
    signal = moments.mean.abs()
    curvature = moments.square + moments.xi
    return signal / curvature.sqrt()


def piece_r(moments: Moments) -> Tensor:
    """Return PIECE-R's scores, √F / (K + xi): an entry's gain on the task over its importance K.

    An adaptive optimizer moves every entry about as far, by d. That gains |g| d on the task, here
    with √F for |g|, and costs K d ** 2 of what the model should retain.
    """
    gain = moments.square.sqrt()
    importance = moments.retention + moments.xi
    return gain / importance


def piece_f_official(moments: Moments) -> Tensor:
    """Return the public code's Fisher: the sum of the squares of micro-batch gradients."""
    return moments.square * moments.count


def piece_s_official(moments: Moments) -> Tensor:
    """Return the public code's PIECE-S, on sums over micro-batches: |Σ g| / sqrt(Σ g ** 2 + 1)."""
    gradient_sum = moments.mean * moments.count
    square_sum = moments.square * moments.count
    curvature = square_sum + 1
    return gradient_sum.abs() / curvature.sqrt()


def gradient(moments: Moments) -> Tensor:
    """Return gradient magnitudes, |E_n[g_n]|, by which SIFT (arXiv 2312.11875) selects."""
    return moments.mean.abs()


def snip(moments: Moments) -> Tensor:
    """Return SNIP's scores (arXiv 1810.02340): |E_n[g_n] w|.

    To first order, the loss changes by as much where the entry is set to zero.
    """
    change = moments.mean * moments.weight
    return change.abs()


def migu(moments: Moments) -> Tensor:
    """Return MIGU's scores: the mean absolute output of the entry's output row."""
    return moments.output


def magnitude(moments: Moments) -> Tensor:
    """Return the entries' absolute values."""
    return moments.weight.abs()


def random(moments: Moments) -> Tensor:
    """Return uniform numbers from the seed: the baseline of equal density."""
    scores = moments.weight.clone()
    scores.uniform_(generator=moments.generator)
    return scores


def rule_of(method: str) -> Rule:
    """Return the rule of a method's name, or of a dotted path to a `Rule` or a function.

    A plain function gets both sums of gradients and the weights. Raises SelectionError for a method
    that is unknown, and for a rule with defaults of its own that is not in the table: a recipe is
    read without importing what it names.
    """
    if method in RULES:
        return RULES[method]

    module, _, name = str(method).rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # a user's module may fail in any way
        known = f"allowed: {', '.join(RULES)}, or a dotted path to a rule"
        raise SelectionError(
            f"unknown method {method!r} ({describe_error(error)}); {known}"
        ) from error

    if not isinstance(found, Rule):
        return Rule(found, reads_weights=True)
    if found.defaults:
        raise SelectionError(
            f"method {method!r}: defaults of a rule outside of the table are not read; "
            f"write {', '.join(found.defaults)} into the recipe, under select"
        )
    return found


def describe_error(error: Exception) -> str:
    """Return the kind and the text of what a user's code raised, in one line."""
    kind = type(error).__name__
    words = f"{kind}: {error}".split()
    return " ".join(words)


# Whole output rows, each weight for itself, 30 %: as FGGM and MIGU select.
_OUTPUT_ROWS = {
    "unit": "row",
    "scope": "tensor",
    "density": 0.3,
}

RULES: dict[str, Rule] = {
    "piece-f": Rule(piece_f, needs=("square",), squared=True),
    "piece-s": Rule(piece_s),
    "piece-r": Rule(
        piece_r,
        needs=("square",),
        uses_retention=True,
        defaults={"xi": 0.1},
    ),
    "piece-f-official": Rule(
        piece_f_official,
        needs=("square",),
        per_example=False,
        squared=True,
    ),
    "piece-s-official": Rule(piece_s_official, per_example=False),
    "gradient": Rule(gradient, needs=("mean",)),
    "snip": Rule(snip, needs=("mean",), reads_weights=True),
    # FGGM is the Fisher, summed over output rows by the selection.
    "fggm": Rule(
        piece_f,
        needs=("square",),
        squared=True,
        defaults=_OUTPUT_ROWS,
    ),
    "migu": Rule(migu, needs=("output",), defaults=_OUTPUT_ROWS),
    "magnitude": Rule(magnitude, needs=(), reads_weights=True),
    "random": Rule(random, needs=()),
}
