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
from mm_piece.families import Group, group_of, weights
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
    select_all,
    select_stream,
)
from mm_piece.selection.budgets import GroupShares
from mm_piece.selection.stability import (
    ScoreFunction,
    build_sampled_groups,
    estimate_overlaps,
)

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
        counts = [len(index) for index in self.mask.values()]
        return sum(counts)

    def __str__(self) -> str:
        """Return in one line how much was selected, and how sure that is."""
        total = sum(self.sizes.values())
        percent = 100 * self.num_selected / total
        text = f"selected {self.num_selected:,} of {total:,} entries ({percent:.3g}%)"
        if not self.stability:
            return text

        *fewer, most = self.stability.items()
        examples, overlap = most
        text += (
            f"; masks of {examples} examples and of {examples} others share {overlap:.0%} "
            "of their entries"
        )
        if not fewer:
            return text

        others: list[str] = []
        for examples, overlap in reversed(fewer):
            others.append(f"{examples}: {overlap:.0%}")
        return f"{text} ({', '.join(others)})"


def _assume_no_retention() -> RetentionImportance:
    return RetentionImportance([])


def select_for_task(
    model: nn.Module,
    encoded: EncodedDataset,
    select: SelectionSettings,
    folder: Path,
    *,
    seeds: tuple[int, int],
    cache_key: Mapping[str, str],
    make_retention: Callable[[], RetentionImportance] = _assume_no_retention,
) -> TaskSelection:
    """Return the selection for a task's examples, read from the cache where an equal one is.

    No example is scored where the budgets leave no choice.

    folder           where the mask is cached, unless the recipe names a folder
    seeds            of the run, which samples the examples, and of the task
    cache_key        identifies the model and the data
    make_retention   estimates retention importance; called if the method uses it
    """
    rule = rule_of(select.method)
    run_seed, task_seed = seeds
    sample = encoded.sample(select.samples, run_seed)
    batches = LengthGroupedBatches(sample, select.batch_size, windowed=rule.per_example)
    shapes = _find_scorable_shapes(model, batches, select)
    sizes = {name: prod(shape) for name, shape in shapes.items()}

    whole = select_all(shapes, _drop_absent_groups(budgets_of(select), shapes))
    if whole is not None:
        return TaskSelection(whole, sizes, samples=0, stability={})

    facts = {**cache_key, "seeds": seeds, "samples": len(sample)}
    file = cache.locate_mask_file(select, folder, facts)
    cached = distributed.broadcast(cache.read_mask(file))
    if cached is not None:
        mask, stability = cached
    else:
        retention = RetentionImportance([])
        if rule.uses_retention:
            retention = make_retention()
        estimator = _MaskEstimator(
            model,
            batches,
            select,
            shapes,
            task_seed,
            retention=retention,
        )
        mask = estimator.select_mask()
        stability = estimator.estimate_stability(mask)
        if distributed.is_main():
            cache.write_mask(file, mask, stability)
    return TaskSelection(
        _sort_by_model(mask, shapes),
        sizes,
        samples=len(sample),
        stability=stability,
    )


def _sort_by_model(mask: Mask, shapes: Shapes) -> Mask:
    """Return a mask in the order of the model, which files do not keep."""
    return {name: mask[name] for name in shapes if name in mask}


def _find_scorable_shapes(
    model: nn.Module,
    batches: LengthGroupedBatches,
    select: SelectionSettings,
) -> Shapes:
    """Return the shapes of the weights that the method scores, in model order."""
    names = importance.find_scorable_names(model, batches, select.method, select.exclude)
    named = weights(model)
    shapes: Shapes = {}
    for name in names:
        shape = shape_of(named[name])
        shapes[name] = tuple(shape)
    return shapes


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


def require_selectable(
    recipe: Recipe,
    shapes: Mapping[str, Sequence[int]],
) -> None:
    """Raise SelectionError if the budgets of a task select nothing of a model, or do not fit it."""
    cache.require_writable_folder(recipe.select)
    for task in recipe.tasks:
        select = recipe.select_of(task)
        find_selectable_names(select, shapes)


def find_selectable_names(
    select: SelectionSettings,
    shapes: Mapping[str, Sequence[int]],
) -> set[str]:
    """Return the names of the weights that a selection may choose from; SelectionError for none."""
    eligible: dict[str, Sequence[int]] = {}
    for name, shape in shapes.items():
        if group_of(name) not in select.exclude:
            eligible[name] = shape

    budgets = budgets_of(select)
    num_units, _ = count_units(eligible, budgets)
    selectable: set[str] = set()
    for group in build_topk_groups(num_units, budgets):
        selectable.update(group.names)
    return selectable


class _MaskEstimator:
    """Scores of a model on batches, streamed into a mask, and sums over parts of the batches."""

    def __init__(
        self,
        model: nn.Module,
        batches: LengthGroupedBatches,
        select: SelectionSettings,
        shapes: Shapes,
        seed: int,
        *,
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

        self.folds: FoldSums | None = None
        if GRADIENT_SUMS.intersection(self.rule.needs):
            self.folds = self._make_folds()

    def select_mask(self) -> Mask:
        """Return the mask, in as many passes over the batches as the memory asks for."""
        # What needs no data is scored alike by every process, with nothing to divide.
        is_alone = distributed.world_size() == 1
        sharded = not is_alone and not self.rule.is_data_free
        names = list(self.shapes)
        pieces = importance.stream_scores(
            self.model,
            self.batches,
            self.select.method,
            names=self._assign_entry_ranges() if sharded else names,
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
        num_chosen: dict[str, int] = {}
        for name, index in mask.items():
            num_chosen[name] = len(index) // self.widths[name]

        groups = build_topk_groups(self.sizes, self.budgets)
        sampled_groups = build_sampled_groups(
            self.folds,
            groups,
            self.sizes,
            num_chosen,
        )
        overlaps = estimate_overlaps(
            self.folds,
            self._make_score_function(self.folds),
            sampled_groups,
            self.seed,
        )
        return {str(count): round(share, 4) for count, share in overlaps.items()}

    def _assign_entry_ranges(self) -> dict[str, EntryRange]:
        """Return what this process scores of every weight.

        Output rows stay whole where rows are chosen, and where a row's entries share one score.
        """
        selects_rows = self.budgets.unit == "row"
        by_row = selects_rows or self.rule.needs_outputs

        ranges: dict[str, EntryRange] = {}
        for name, shape in self.shapes.items():
            step = width_of(shape) if by_row else 1
            ranges[name] = distributed.assign_entry_range(prod(shape), step)
        return ranges

    def _make_folds(self) -> FoldSums:
        return FoldSums(
            self.sizes,
            self.widths,
            self.rule.needs,
            windows=self.batches.windows,
            max_bytes=self.memory // _FOLD_MEMORY_DIVISOR,
            seed=self.seed,
        )

    def _make_score_function(self, folds: FoldSums) -> ScoreFunction:
        """Return a function that applies the rule to means at the sampled entries."""
        weight = self._read_sampled_weights(folds)
        size = len(weight)
        retention_parts: list[Tensor] = []
        for name, entries in folds.entries.items():
            scores = self.retention.scores_at(name, entries)
            retention_parts.append(scores)
        retention = torch.cat(retention_parts)
        generator = torch.Generator().manual_seed(self.seed)

        def score_entries(means: Mapping[str, Tensor], count: int) -> Tensor:
            known = {
                "mean": torch.zeros(size),
                "square": torch.zeros(size),
                **means,
            }
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

    def _read_sampled_weights(self, folds: FoldSums) -> Tensor:
        """Return the weights' own values at all sampled entries, fp32, on the CPU.

        They are zeros for a rule that does not read them.
        """
        if not self.rule.reads_weights:
            size = sum(len(entries) for entries in folds.entries.values())
            return torch.zeros(size)

        named = weights(self.model)
        parts: list[Tensor] = []
        for name, entries in folds.entries.items():
            values = gather_entries(named[name], entries)
            parts.append(values.float().cpu())
        return torch.cat(parts)


def _drop_absent_groups(budgets: Budgets, shapes: Shapes) -> Budgets:
    """Return budgets without the groups that receive no gradient: texts train no vision tower."""
    groups: set[Group] = {group_of(name) for name in shapes}
    floor = _select_groups(budgets.floor, groups)
    budgets = replace(budgets, floor=floor)
    if isinstance(budgets.ceiling, Mapping):
        ceiling = _select_groups(budgets.ceiling, groups)
        budgets = replace(budgets, ceiling=ceiling)
    if not isinstance(budgets.density, Mapping):
        return budgets

    present: dict[str, float] = {}
    for key, share in budgets.density.items():
        fits_name = any(fnmatchcase(name, key) for name in shapes)
        if key in groups or fits_name:
            present[key] = share
    return replace(budgets, density=present or budgets.density)


def _select_groups(shares: GroupShares, groups: set[Group]) -> GroupShares:
    """Return the shares of some of the groups."""
    selected: dict[Group, float] = {}
    for group, share in shares.items():
        if group in groups:
            selected[group] = share
    return selected


def _show_batch_progress(items: Iterable[Any], title: str) -> Iterable[Any]:
    return progress_bar(items, title, "batch")
