"""A task's selection: scores of its examples streamed into a mask, and how sure the mask is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece import distributed, importance
from mm_piece.data import Alike, Encoded
from mm_piece.distributed import Share, shape_of, take
from mm_piece.distributed.progress import bar
from mm_piece.families import group_of, weights
from mm_piece.importance import Folds, Moments
from mm_piece.importance.factored import Kept
from mm_piece.importance.rows import width_of
from mm_piece.recipe import Recipe, Select, parse_bytes
from mm_piece.selection import Budgets, Mask, cache, contests, select_stream, units_of
from mm_piece.selection.stability import among, overlaps

Shapes = dict[str, tuple[int, ...]]

_ROOM = 8  # the part of the budget that sums of parts of the examples may take


@dataclass(frozen=True)
class Selection:
    """What was selected for a task, out of what, and how much of it other examples would give."""

    mask: Mask
    sizes: dict[str, int]  # entries per weight that could be selected
    samples: int
    stability: dict[str, float]  # examples -> overlap of the masks of two sets of so many

    @property
    def k(self) -> int:
        """How many entries are selected."""
        return sum(len(index) for index in self.mask.values())

    def __str__(self) -> str:
        """How much was selected and how sure that is, in one line."""
        total = sum(self.sizes.values())
        text = f"selected {self.k:,} of {total:,} entries ({self.k / total:.3g})"
        if not self.stability:
            return text
        *fewer, (examples, overlap) = self.stability.items()
        beside = ", ".join(f"{count}: {share:.0%}" for count, share in reversed(fewer))
        text += f"; masks of two sets of {examples} examples share {overlap:.0%}"
        return f"{text} ({beside})" if beside else text


def selection_of(
    model: nn.Module,
    encoded: Encoded,
    select: Select,
    folder: Path,
    *,
    pad: int,
    seeds: tuple[int, int],
    standing: Mapping[str, str],
    keep: Callable[[], Kept] = lambda: Kept([]),
) -> Selection:
    """The selection for a task's examples, from an earlier run where one had the same to do.

    It is kept in `folder`, or where the recipe says. `pad` is the padding token; `seeds`: of the
    run, which draws the examples, and of the task; `standing` tells apart the models and the data;
    `keep` finds what the model is to keep, if the method asks.
    """
    sample = encoded.drawn(select.samples, seeds[0])
    apart = select.method not in importance.OF_BATCHES
    batches = Alike(sample, select.batch_size, pad, apart)
    names = importance.scorable(model, batches, select.method, select.exclude)
    named = weights(model)
    shapes = {name: tuple(shape_of(named[name])) for name in names}
    facts = {**standing, "seeds": seeds, "samples": len(sample)}
    file = cache.place(select, folder, facts)
    kept = distributed.told(cache.read(file))
    if kept is None:
        known = keep() if select.method in importance.KEEPING else Kept([])
        estimate = _Estimate(model, batches, select, shapes, seeds[1], known)
        kept = estimate.mask(), estimate.stability()
        if distributed.is_main():
            cache.write(file, *kept)
    mask, stability = kept
    in_order = {name: mask[name] for name in names if name in mask}  # safetensors sorts by name
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    return Selection(in_order, sizes, len(sample), stability)


def budgets_of(select: Select) -> Budgets:
    """The budgets that a recipe asks for."""
    return Budgets(
        select.density,
        scope=select.scope,
        unit=select.unit,
        floor=select.floor,
        ceiling=select.ceiling,
        squares=select.method in importance.SQUARES,
    )


def require_places(recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise SelectionError if the budgets of a task select nothing of a model, or do not fit it."""
    cache.require_folder(recipe.select)
    for task in recipe.tasks:
        places_of(recipe.selecting(task), shapes)


def places_of(select: Select, shapes: Mapping[str, Sequence[int]]) -> set[str]:
    """Names of the weights that a selection may choose entries of; SelectionError for none."""
    eligible = {n: s for n, s in shapes.items() if group_of(n) not in select.exclude}
    budgets = budgets_of(select)
    found = contests(units_of(eligible, budgets)[0], budgets)
    return {name for contest in found for name in contest.names}


class _Estimate:
    """Scores of a model on batches, streamed into a mask, and sums over parts of the batches."""

    def __init__(
        self,
        model: nn.Module,
        batches: Alike,
        select: Select,
        shapes: Shapes,
        seed: int,
        kept: Kept,
    ) -> None:
        self.model, self.batches, self.select, self.kept = model, batches, select, kept
        self.shapes, self.seed, self.memory = shapes, seed, parse_bytes(select.memory)
        self.budgets = _reachable(budgets_of(select), shapes)
        self.sizes, self.widths = units_of(shapes, self.budgets)
        self.kinds = importance.moments_of(select.method)
        self.folds = self._folds() if {"mean", "square"} & set(self.kinds) else None

    def mask(self) -> Mask:
        """The mask, in as many passes over the batches as the memory asks for."""
        apart = distributed.size() > 1 and self.select.method not in importance.DATA_FREE
        pieces = importance.stream(
            self.model,
            self.batches,
            self.select.method,
            names=self._shares() if apart else [*self.shapes],
            memory=self.memory,
            host=self.select.accumulators == "host",
            xi=self.select.xi,
            seed=self.seed,
            folds=self.folds,
            kept=self.kept.at,
            progress=_batches,
        )
        self.found = select_stream(pieces, self.shapes, self.budgets, apart)
        return self.found

    def stability(self) -> dict[str, float]:
        """Overlaps by number of examples, once there is a mask; empty where no data are scored."""
        if self.folds is None:
            return {}
        self.folds.share()
        units = {name: len(index) // self.widths[name] for name, index in self.found.items()}
        rounds = among(self.folds, contests(self.sizes, self.budgets), self.sizes, units)
        found = overlaps(self.folds, self._score(), rounds, self.seed)
        return {str(count): round(share, 4) for count, share in found.items()}

    def _shares(self) -> dict[str, Share]:
        """What this process scores of every weight: rows where rows are chosen, or have scores."""
        rows = self.budgets.unit == "row" or self.select.method in importance.OF_OUTPUTS
        widths = {name: width_of(shape) if rows else 1 for name, shape in self.shapes.items()}
        return {n: distributed.share(prod(shape), widths[n]) for n, shape in self.shapes.items()}

    def _folds(self) -> Folds:
        return Folds(
            self.sizes,
            self.widths,
            self.kinds,
            windows=self.batches.windows,
            room=self.memory // _ROOM,
            seed=self.seed,
        )

    def _score(self) -> Callable[[Mapping[str, Tensor], int], Tensor]:
        """The method's rule at the sampled entries."""
        assert self.folds is not None
        rule, named = importance.resolve(self.select.method), weights(self.model)
        generator = torch.Generator().manual_seed(self.seed)
        xi, method = self.select.xi, self.select.method
        size = sum(map(len, self.folds.entries.values()))
        weight, places = torch.zeros(size), self.folds.entries.items()
        kept = torch.cat([self.kept.at(name, index) for name, index in places])
        if importance.weighs(method):
            weight = torch.cat([take(named[name], index).float().cpu() for name, index in places])

        def score(means: Mapping[str, Tensor], count: int) -> Tensor:
            known = {"mean": torch.zeros(size), "square": torch.zeros(size), **means}
            facts = {"weight": weight.clone(), "kept": kept, "count": count}
            seen = Moments(**known, **facts, xi=xi, generator=generator)
            return importance.scored(method, rule, seen)

        return score


def _reachable(budgets: Budgets, shapes: Shapes) -> Budgets:
    """The shares less those that no example reaches: a task of texts trains no tower."""
    groups = {group_of(name) for name in shapes}
    for bound in ("floor", "ceiling"):
        shares = getattr(budgets, bound)
        if isinstance(shares, dict):
            kept = {group: share for group, share in shares.items() if group in groups}
            budgets = replace(budgets, **{bound: kept})
    if not isinstance(budgets.density, dict):
        return budgets
    reached = {
        key: share
        for key, share in budgets.density.items()
        if key in groups or any(fnmatchcase(name, key) for name in shapes)
    }
    return replace(budgets, density=reached or budgets.density)


def _batches(items: Iterable[Any], title: str) -> Iterable[Any]:
    return bar(items, title, "batch")
