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
from mm_piece.importance.rules import GRADIENT_SUMS, rule_of
from mm_piece.recipe import Recipe, SelectionSettings, parse_bytes
from mm_piece.selection import (
    Budgets,
    Mask,
    build_topk_groups,
    cache,
    count_units,
    select_stream,
)
from mm_piece.selection.stability import build_sampled_groups, estimate_overlaps

Shapes = dict[str, tuple[int, ...]]

_FOLD_MEMORY_DIVISOR = 8  # the share of the budget that sums of parts of the examples may take


@dataclass(frozen=True)
class TaskSelection:
    """What was selected for a task, out of what, and how much of it other examples would give."""

    mask: Mask
    sizes: dict[str, int]  # entries per weight that could be selected
    samples: int  # examples that were scored
    stability: dict[str, float]  # examples -> overlap of the masks of two sets of so many

    @property
    def num_selected(self) -> int:
        """Number of selected entries."""
        return sum(len(index) for index in self.mask.values())

    def __str__(self) -> str:
        """Return in one line how much was selected, and how sure that is."""
        total = sum(self.sizes.values())
        density = self.num_selected / total
        text = f"selected {self.num_selected:,} of {total:,} entries ({density:.3g})"
        if not self.stability:
            return text

        *fewer, (examples, overlap) = self.stability.items()
        text += f"; masks of two sets of {examples} examples share {overlap:.0%}"
        beside = ", ".join(f"{count}: {share:.0%}" for count, share in reversed(fewer))
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
    """Return the selection for a task's examples, read from the cache where an equal one is.

    folder           where the mask is cached, unless the recipe names a folder
    seeds            of the run, which samples the examples, and of the task
    cache_key        identifies the model and the data
    make_retention   estimates retention importance; called if the method uses it
    """
    rule = rule_of(select.method)
    sample = encoded.sample(select.samples, seeds[0])
    batches = LengthGroupedBatches(sample, select.batch_size, pad_token_id, rule.per_example)

    names = importance.find_scorable_names(model, batches, select.method, select.exclude)
    named = weights(model)
    shapes = {name: tuple(shape_of(named[name])) for name in names}
    sizes = {name: prod(shape) for name, shape in shapes.items()}

    facts = {**cache_key, "seeds": seeds, "samples": len(sample)}
    file = cache.locate_mask_file(select, folder, facts)
    cached = distributed.broadcast(cache.read_mask(file))
    if cached is not None:
        mask, stability = cached
    else:
        retention = make_retention() if rule.uses_retention else RetentionImportance([])
        estimator = _MaskEstimator(model, batches, select, shapes, seeds[1], retention)
        mask = estimator.select_mask()
        stability = estimator.estimate_stability(mask)
        if distributed.is_main():
            cache.write_mask(file, mask, stability)

    in_model_order = {name: mask[name] for name in names if name in mask}  # files sort by name
    return TaskSelection(in_model_order, sizes, len(sample), stability)


def budgets_of(select: SelectionSettings) -> Budgets:
    """Return the budgets that a recipe asks for."""
    return Budgets(
        select.density,
        scope=select.scope,
        unit=select.unit,
        floor=select.floor,
        ceiling=select.ceiling,
        squares=rule_of(select.method).squared,
    )


def require_selectable(recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise SelectionError if the budgets of a task select nothing of a model, or do not fit it."""
    cache.require_writable_folder(recipe.select)
    for task in recipe.tasks:
        find_selectable_names(recipe.select_of(task), shapes)


def find_selectable_names(
    select: SelectionSettings, shapes: Mapping[str, Sequence[int]]
) -> set[str]:
    """Return the names of the weights that a selection may choose from; SelectionError for none."""
    eligible = {n: s for n, s in shapes.items() if group_of(n) not in select.exclude}
    budgets = budgets_of(select)
    num_units, _ = count_units(eligible, budgets)
    groups = build_topk_groups(num_units, budgets)
    return {name for group in groups for name in group.names}


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
        self.model = model
        self.batches = batches
        self.select = select
        self.retention = retention
        self.shapes = shapes
        self.seed = seed
        self.memory = parse_bytes(select.memory)

        self.rule = importance.resolve_rule(select.method)
        self.budgets = _drop_absent_groups(budgets_of(select), shapes)
        self.sizes, self.widths = count_units(shapes, self.budgets)
        self.folds = self._make_folds() if GRADIENT_SUMS & {*self.rule.needs} else None

    def select_mask(self) -> Mask:
        """Return the mask, in as many passes over the batches as the memory asks for."""
        # What needs no data is scored alike by every process, with nothing to divide.
        sharded = distributed.world_size() > 1 and not self.rule.is_data_free
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
        return select_stream(pieces, self.shapes, self.budgets, sharded)

    def estimate_stability(self, mask: Mask) -> dict[str, float]:
        """Return the overlap of two masks by number of examples; nothing where no data are scored.

        `mask` is what `select_mask` returned, whose passes filled the folds.
        """
        if self.folds is None:
            return {}

        self.folds.all_reduce_sums()
        num_chosen = {name: len(index) // self.widths[name] for name, index in mask.items()}
        groups = build_topk_groups(self.sizes, self.budgets)
        sampled = build_sampled_groups(self.folds, groups, self.sizes, num_chosen)
        found = estimate_overlaps(self.folds, self._make_score_function(), sampled, self.seed)
        return {str(count): round(share, 4) for count, share in found.items()}

    def _assign_entry_ranges(self) -> dict[str, EntryRange]:
        """Return what this process scores of every weight.

        Output rows stay whole where rows are chosen, and where a row's entries share one score.
        """
        by_row = self.budgets.unit == "row" or self.rule.needs_outputs
        return {
            name: distributed.assign_entry_range(prod(shape), width_of(shape) if by_row else 1)
            for name, shape in self.shapes.items()
        }

    def _make_folds(self) -> FoldSums:
        return FoldSums(
            self.sizes,
            self.widths,
            self.rule.needs,
            windows=self.batches.windows,
            max_bytes=self.memory // _FOLD_MEMORY_DIVISOR,
            seed=self.seed,
        )

    def _make_score_function(self) -> Callable[[Mapping[str, Tensor], int], Tensor]:
        """Return a function that applies the rule to means at the sampled entries."""
        assert self.folds is not None
        sampled = self.folds.entries.items()
        size = sum(len(index) for _, index in sampled)

        retention = torch.cat([self.retention.scores_at(name, index) for name, index in sampled])
        weight = torch.zeros(size)
        if self.rule.reads_weights:
            named = weights(self.model)
            entries = [gather_entries(named[name], index) for name, index in sampled]
            weight = torch.cat([values.float().cpu() for values in entries])
        generator = torch.Generator().manual_seed(self.seed)

        def score_entries(means: Mapping[str, Tensor], count: int) -> Tensor:
            known = {"mean": torch.zeros(size), "square": torch.zeros(size), **means}
            moments = Moments(
                **known,
                weight=weight.clone(),  # a rule may compute in place
                retention=retention,
                count=count,
                xi=self.select.xi,
                generator=generator,
            )
            return importance.apply_rule(self.select.method, self.rule, moments)

        return score_entries


def _drop_absent_groups(budgets: Budgets, shapes: Shapes) -> Budgets:
    """Return budgets without the groups that receive no gradient: texts train no vision tower."""
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
