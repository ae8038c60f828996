"""`Moments`: what a scoring rule may see of some entries; and a rule applied to it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mm_piece.errors import SelectionError
from mm_piece.importance.rules import RULES, Rule, describe_error, rule_of


@dataclass(frozen=True)
class Moments:
    """What a scoring rule may see of a run of flat entries: fp32 tensors of equal length."""

    mean: Tensor  # mean over examples of the gradient
    square: Tensor  # mean over examples of the squared gradient: the diagonal empirical Fisher
    weight: Tensor  # the entries themselves; zeros for a rule that does not read them
    xi: float  # damping
    generator: torch.Generator
    count: int = 1  # how many gradients were averaged: examples, or batches
    output: Tensor = torch.zeros(1)  # mean over examples of the output row's absolute output
    retention: Tensor = torch.zeros(1)  # importance K for what the model should retain; mean 1


def resolve_rule(method: str) -> Rule:
    """Return the rule of a method; SelectionError as `rule_of`, and if a user's own rule fails.

    A rule outside of the table is tried once, before anything is run for it.
    """
    rule = rule_of(method)
    if method in RULES:
        return rule

    mean, square, weight = torch.zeros(3, 7)
    apply_rule(method, rule, Moments(mean, square, weight, xi=1.0, generator=torch.Generator()))
    return rule


def apply_rule(method: str, rule: Rule, moments: Moments) -> Tensor:
    """Return a rule's scores, fp32; SelectionError unless they are one number for each entry."""
    try:
        scores = rule.function(moments)
    except Exception as error:  # a user's rule may fail in any way
        raise SelectionError(
            f"method {method!r} fails: {describe_error(error)}; "
            "a dotted path to a rule names a function from Moments to scores"
        ) from error

    wanted = moments.weight.shape
    if not isinstance(scores, Tensor) or scores.shape != wanted or scores.is_complex():
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise SelectionError(
            f"method {method!r} gives {shape}, not scores of shape {tuple(wanted)}"
        )
    return scores.detach().float()
