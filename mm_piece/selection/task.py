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
from mm_piece.data import EncodedDataset, LengthGroupedBatches
from mm_piece.distributed import EntryRange, gather_entries, shape_of
from mm_piece.distributed.progress import progress_bar
from mm_piece.families import group_of, weights
from mm_piece.importance import FoldSums, Moments
from mm_piece.importance.factored import RetentionImportance
from mm_piece.importance.rows import width_of
from mm_piece.recipe import Recipe, SelectionSettings, parse_bytes
from mm_piece.selection import Budgets, Mask, build_topk_groups, cache, count_units, select_stream
from mm_piece.selection.stability import build_sampled_groups, estimate_overlaps

Shapes = dict[str, tuple[int, ...]]

_FOLD_MEMORY_DIVISOR = 8  # the part of the budget that sums of parts of the examples may take


@dataclass(frozen=True)
class TaskSelection:
    """What was selected for a task, out of what, and how much of it other examples would give."""

    mask: Mask
    sizes: dict[str, int]  # entries per weight that could be selected
    samples: int
    stability: dict[str, float]  # examples -> overlap of the masks of two sets of so many

    @property
    def num_selected(self) -> int:
        """How many entries are selected."""
        return sum(len(index) for index in self.mask.values())

    def __str__(self) -> str:
        """How much was selected and how sure that is, in one line."""
        total = sum(self.sizes.values())
        text = (
            f"selected {self.num_selected:,} of {total:,} entries ({self.num_selected / total:.3g})"
        )
        if not self.stability:
            return text
        *fewer, (examples, overlap) = self.stability.items()
        beside = ", ".join(f"{count}: {share:.0%}" for count, share in reversed(fewer))
        text += f"; masks of two sets of {examples} examples share {overlap:.0%}"
        return f"{text} ({beside})" if beside else text


def select_for_task(
    model: nn.Module,
    encoded: EncodedDataset,
    select: SelectionSettings,
    folder: Path,
    *,
    pad_token_id: int,
    seeds: tuple[int, int],
    cache_key: Mapping[str, str],
    make_retention: Callable[[], RetentionImportance] = lambda: RetentionImportance([]),
) -> TaskSelection:
    """The selection for a task's examples, from an earlier run where one had the same to do.

    It is kept in `folder`, or where the recipe says. `pad` is the padding token; `seeds`: of the
    run, which draws the examples, and of the task; `standing` tells apart the models and the data;
    `keep` finds what the model is to keep, if the method asks.
    """
    sample = encoded.sample(select.samples, seeds[0])
    per_example = select.method not in importance.BATCH_METHODS
    batches = LengthGroupedBatches(sample, select.batch_size, pad_token_id, per_example)
    names = importance.find_scorable_names(model, batches, select.method, select.exclude)
    named = weights(model)
    shapes = {name: tuple(shape_of(named[name])) for name in names}
    facts = {**cache_key, "seeds": seeds, "samples": len(sample)}
    file = cache.locate_mask_file(select, folder, facts)
    cached = distributed.broadcast(cache.read_mask(file))
    if cached is None:
        retention = (
            make_retention()
            if select.method in importance.RETENTION_METHODS
            else RetentionImportance([])
        )
        estimator = _MaskEstimator(model, batches, select, shapes, seeds[1], retention)
        cached = estimator.select_mask(), estimator.estimate_stability()
        if distributed.is_main():
            cache.write_mask(file, *cached)
    mask, stability = cached
    in_order = {name: mask[name] for name in names if name in mask}  # safetensors sorts by name
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    return TaskSelection(in_order, sizes, len(sample), stability)


def budgets_of(select: SelectionSettings) -> Budgets:
    """The budgets that a recipe asks for."""
    return Budgets(
        select.density,
        scope=select.scope,
        unit=select.unit,
        floor=select.floor,
        ceiling=select.ceiling,
        squares=select.method in importance.SQUARED_METHODS,
    )


def require_selectable(recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise SelectionError if the budgets of a task select nothing of a model, or do not fit it."""
    cache.require_writable_folder(recipe.select)
    for task in recipe.tasks:
        find_selectable_names(recipe.select_of(task), shapes)


def find_selectable_names(
    select: SelectionSettings, shapes: Mapping[str, Sequence[int]]
) -> set[str]:
    """Names of the weights that a selection may choose entries of; SelectionError for none."""
    eligible = {n: s for n, s in shapes.items() if group_of(n) not in select.exclude}
    budgets = budgets_of(select)
    found = build_topk_groups(count_units(eligible, budgets)[0], budgets)
    return {name for group in found for name in group.names}


class _MaskEstimator:
    """Scores of a model on batches, streamed into a mask, and sums over parts of the batches."""

    def __init__(
        self,
        model: nn.Module,
        batches: LengthGroupedBatches,
        select: SelectionSettings,
        shapes: Shapes,
        seed: int,
        retention: RetentionImportance,
    ) -> None:
        self.model, self.batches, self.select, self.retention = model, batches, select, retention
        self.shapes, self.seed, self.memory = shapes, seed, parse_bytes(select.memory)
        self.budgets = _drop_absent_groups(budgets_of(select), shapes)
        self.sizes, self.widths = count_units(shapes, self.budgets)
        self.moment_kinds = importance.moments_of(select.method)
        self.folds = self._make_folds() if {"mean", "square"} & set(self.moment_kinds) else None

    def select_mask(self) -> Mask:
        """The mask, in as many passes over the batches as the memory asks for."""
        sharded = (
            distributed.world_size() > 1 and self.select.method not in importance.DATA_FREE_METHODS
        )
        pieces = importance.stream_scores(
            self.model,
            self.batches,
            self.select.method,
            names=self._assign_entry_ranges() if sharded else [*self.shapes],
            memory=self.memory,
            host=self.select.accumulators == "host",
            xi=self.select.xi,
            seed=self.seed,
            folds=self.folds,
            retention=self.retention.scores_at,
            progress=_show_batch_progress,
        )
        self.selected_mask = select_stream(pieces, self.shapes, self.budgets, sharded)
        return self.selected_mask

    def estimate_stability(self) -> dict[str, float]:
        """Overlaps by number of examples, once there is a mask; empty where no data are scored."""
        if self.folds is None:
            return {}
        self.folds.all_reduce_sums()
        units = {
            name: len(index) // self.widths[name] for name, index in self.selected_mask.items()
        }
        groups = build_sampled_groups(
            self.folds, build_topk_groups(self.sizes, self.budgets), self.sizes, units
        )
        found = estimate_overlaps(self.folds, self._make_score_function(), groups, self.seed)
        return {str(count): round(share, 4) for count, share in found.items()}

    def _assign_entry_ranges(self) -> dict[str, EntryRange]:
        """What this process scores of every weight: rows where rows are chosen, or have scores."""
        rows = self.budgets.unit == "row" or self.select.method in importance.OUTPUT_METHODS
        widths = {name: width_of(shape) if rows else 1 for name, shape in self.shapes.items()}
        return {
            n: distributed.assign_entry_range(prod(shape), widths[n])
            for n, shape in self.shapes.items()
        }

    def _make_folds(self) -> FoldSums:
        return FoldSums(
            self.sizes,
            self.widths,
            self.moment_kinds,
            windows=self.batches.windows,
            max_bytes=self.memory // _FOLD_MEMORY_DIVISOR,
            seed=self.seed,
        )

    def _make_score_function(self) -> Callable[[Mapping[str, Tensor], int], Tensor]:
        """The method's rule at the sampled entries."""
        assert self.folds is not None
        rule, named = importance.resolve_method(self.select.method), weights(self.model)
        generator = torch.Generator().manual_seed(self.seed)
        xi, method = self.select.xi, self.select.method
        size = sum(map(len, self.folds.entries.values()))
        weight, sampled_entries = torch.zeros(size), self.folds.entries.items()
        retention_scores = torch.cat(
            [self.retention.scores_at(name, index) for name, index in sampled_entries]
        )
        if importance.needs_weights(method):
            weight = torch.cat(
                [
                    gather_entries(named[name], index).float().cpu()
                    for name, index in sampled_entries
                ]
            )

        def score_entries(means: Mapping[str, Tensor], count: int) -> Tensor:
            known = {"mean": torch.zeros(size), "square": torch.zeros(size), **means}
            facts = {"weight": weight.clone(), "retention": retention_scores, "count": count}
            seen = Moments(**known, **facts, xi=xi, generator=generator)
            return importance.apply_rule(method, rule, seen)

        return score_entries


def _drop_absent_groups(budgets: Budgets, shapes: Shapes) -> Budgets:
    """The shares less those that no example reaches: a task of texts trains no tower."""
    groups = {group_of(name) for name in shapes}
    for bound in ("floor", "ceiling"):
        shares = getattr(budgets, bound)
        if isinstance(shares, dict):
            present_shares = {group: share for group, share in shares.items() if group in groups}
            budgets = replace(budgets, **{bound: present_shares})
    if not isinstance(budgets.density, dict):
        return budgets
    present_density = {
        key: share
        for key, share in budgets.density.items()
        if key in groups or any(fnmatchcase(name, key) for name in shapes)
    }
    return replace(budgets, density=present_density or budgets.density)


def _show_batch_progress(items: Iterable[Any], title: str) -> Iterable[Any]:
    return progress_bar(items, title, "batch")
