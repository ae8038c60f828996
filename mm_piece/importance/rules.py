"""Scoring rules: from the moments of a run of entries to their scores. Pure tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from mm_piece.errors import SelectionError


@dataclass(frozen=True)
class Moments:
    """What a scoring rule may see of a run of flat entries: fp32 tensors of equal length."""

    mean: Tensor  # mean over examples of the gradient
    square: Tensor  # mean over examples of the squared gradient: the diagonal empirical Fisher
    weight: Tensor  # the entries themselves, for rules that look at them (`weighs`)
    xi: float
    generator: torch.Generator
    count: int = 1  # how many gradients were averaged: examples, or batches
    output: Tensor = torch.zeros(1)  # mean over examples of what the entry's row gives out
    retention: Tensor = torch.zeros(1)  # stake of what the model is to keep, relative to its mean


Rule = Callable[[Moments], Tensor]


def piece_f(moments: Moments) -> Tensor:
    """PIECE-F: the diagonal Fisher, E_n[g_n ** 2]."""
    return moments.square


def piece_s(moments: Moments) -> Tensor:
    """PIECE-S: |E_n[g_n]| / sqrt(F + xi), a first-order signal normalised by curvature."""
    return moments.mean.abs() / (moments.square + moments.xi).sqrt()


def piece_r(moments: Moments) -> Tensor:
    """PIECE-R: what an entry moves of the task over what is at stake, sqrt(F) / (K + xi).

    An adaptive optimizer moves every entry about as far, by d: that gains |g| d on the task, here
    with sqrt(F) for |g|, and risks K d ** 2 of what the model is to keep.
    """
    return moments.square.sqrt() / (moments.retention + moments.xi)


def piece_f_official(moments: Moments) -> Tensor:
    """The public code's Fisher: the sum of the squares of micro-batch gradients."""
    return moments.square * moments.count


def piece_s_official(moments: Moments) -> Tensor:
    """The public code's PIECE-S on sums over micro-batches: |sum g| / sqrt(sum g ** 2 + 1)."""
    return (moments.mean * moments.count).abs() / (moments.square * moments.count + 1).sqrt()


def gradient(moments: Moments) -> Tensor:
    """Gradient magnitude: |E_n[g_n]|, what SIFT (arXiv 2312.11875) selects by."""
    return moments.mean.abs()


def snip(moments: Moments) -> Tensor:
    """SNIP (arXiv 1810.02340): |E_n[g_n] w|, what the loss would change by without the entry."""
    return (moments.mean * moments.weight).abs()


def migu(moments: Moments) -> Tensor:
    """MIGU: the sum over tokens of the absolute output of the entry's row."""
    return moments.output


def magnitude(moments: Moments) -> Tensor:
    """The entry's absolute value; needs no data."""
    return moments.weight.abs()


def random(moments: Moments) -> Tensor:
    """Uniform numbers from the seed: the control of equal density."""
    return torch.rand(moments.weight.shape, generator=moments.generator)


def resolve_method(method: str) -> Rule:
    """The scoring rule of a method's name or dotted path; SelectionError names the known ones."""
    if method in METHODS:
        return METHODS[method]
    module, _, function = str(method).rpartition(".")
    try:
        rule = getattr(import_module(module), function)
    except Exception as error:  # a module of the user's may fail in any way
        known = f"allowed: {', '.join(METHODS)}, or a dotted path to a rule"
        raise SelectionError(
            f"unknown method {method!r} ({_format_error(error)}); {known}"
        ) from error
    mean, square, weight = torch.zeros(3, 7)
    apply_rule(method, rule, Moments(mean, square, weight, 1.0, torch.Generator()))
    return rule


def apply_rule(method: str, rule: Rule, moments: Moments) -> Tensor:
    """What a rule gives, fp32; SelectionError unless it is one number for each entry."""
    try:
        scores = rule(moments)
    except Exception as error:
        raise SelectionError(
            f"method {method!r} fails: {_format_error(error)}; "
            "a dotted path to a rule names a function from Moments to scores"
        ) from error
    wanted = moments.weight.shape
    if not isinstance(scores, Tensor) or scores.shape != wanted or scores.is_complex():
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise SelectionError(
            f"method {method!r} gives {shape}, not scores of shape {tuple(wanted)}"
        )
    return scores.detach().float()


def _format_error(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def moments_of(method: str) -> tuple[str, ...]:
    """Which sums a method needs: of gradients each costs four bytes an entry, outputs a row.

    A rule of the user's gets both of gradients.
    """
    return REQUIRED_SUMS.get(method, ("mean", "square"))


def needs_weights(method: str) -> bool:
    """Whether a rule looks at the weights themselves, as a rule of the user's may."""
    return method in ("magnitude", "snip") or method not in METHODS


METHODS: dict[str, Rule] = {
    "piece-f": piece_f,
    "piece-s": piece_s,
    "piece-r": piece_r,
    "piece-f-official": piece_f_official,
    "piece-s-official": piece_s_official,
    "gradient": gradient,
    "snip": snip,
    "fggm": piece_f,  # summed over rows by the selection
    "migu": migu,
    "magnitude": magnitude,
    "random": random,
}

REQUIRED_SUMS: dict[str, tuple[str, ...]] = {
    "piece-f": ("square",),
    "piece-r": ("square",),
    "piece-f-official": ("square",),
    "gradient": ("mean",),
    "snip": ("mean",),
    "fggm": ("square",),
    "migu": ("output",),
    "magnitude": (),
    "random": (),
}

# Scores that are squares of gradients.
SQUARED_METHODS = ("piece-f", "piece-f-official", "fggm")

# The rules that look at what the model is to keep.
RETENTION_METHODS = ("piece-r",)

# The rules that see the gradient of a batch as one; for all others every example counts by itself.
BATCH_METHODS = ("piece-f-official", "piece-s-official")

# The rules that look at what linear layers give out, and at nothing else.
OUTPUT_METHODS = ("migu",)

# The rules that look at the weights alone: no example is run for them.
DATA_FREE_METHODS = tuple(method for method, needed in REQUIRED_SUMS.items() if not needed)
