"""How far a mask depends on which examples were drawn: masks of disjoint parts of them, compared.

Two disjoint parts of the examples are two fresh sets. Each gives scores at a sample of entries, and
by the same budgets a mask among them; what the two masks share is what any two fresh sets of as
many examples would share, half of all examples at most.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mm_piece.importance import FoldSums
from mm_piece.selection import Mask, Subgroup, TopKGroup, select_units

ScoreFunction = Callable[
    [Mapping[str, Tensor], int], Tensor
]  # means by kind, their count -> scores

_NUM_PAIRS = 16  # of disjoint parts for each number of examples
_MIN_QUOTA = 10  # places among the sampled entries
_FOLD_DIVISORS = (8, 4, 2)  # an eighth of the examples, a quarter, a half


def estimate_overlaps(
    folds: FoldSums, score: ScoreFunction, groups: Sequence[TopKGroup], seed: int
) -> dict[int, float]:
    """The mean share of a mask that a second one has too, by number of examples (ascending).

    `score` gives the entries of `folds` their scores, `rounds` are the contests among them, see
    `among`. Empty where there are fewer than two folds, or too few places to tell a share.
    """
    random = torch.Generator().manual_seed(seed)
    examples, found = sum(folds.counts), {}
    enough = sum(group.k for group in groups) >= _MIN_QUOTA
    for size in dict.fromkeys(folds.num_folds // divisor for divisor in _FOLD_DIVISORS):
        if size and enough:
            pairs = [
                _compare_disjoint_masks(folds, score, groups, size, random)
                for _ in range(_NUM_PAIRS)
            ]
            found[round(examples * size / folds.num_folds)] = sum(pairs) / _NUM_PAIRS
    return found


def parse_overlaps(results: Mapping[str, Any], task: str) -> list[tuple[int, float]]:
    """Examples and overlap, ascending, that a store's results tell of a task, if they do."""
    found = results.get("stability", {}).get(task, {})
    plain = {k: v for k, v in found.items() if k.isdecimal() and type(v) in (int, float)}
    return sorted((int(count), share) for count, share in plain.items())


def build_sampled_groups(
    folds: FoldSums,
    groups: Sequence[TopKGroup],
    sizes: Mapping[str, int],
    chosen: Mapping[str, int],
) -> list[TopKGroup]:
    """The contests among sampled units, at the densities that came out among all of them.

    `sizes` counts all units of each tensor, `chosen` those that were selected.
    """
    found = []
    for group in groups:
        share = sum(chosen.get(name, 0) for name in group.names) / _sum_sizes(sizes, group.names)
        subgroups = [
            replace(
                subgroup,
                min_quota=int(
                    subgroup.min_quota
                    * _count_sampled(folds, subgroup.names)
                    / _sum_sizes(sizes, subgroup.names)
                ),
                max_quota=_scale_max_quota(
                    subgroup,
                    group,
                    _count_sampled(folds, subgroup.names),
                    _sum_sizes(sizes, subgroup.names),
                ),
            )
            for subgroup in group.subgroups
        ]
        total_quota = sum(subgroup.max_quota for subgroup in subgroups)
        complete = total_quota == _sum_sizes(sizes, group.names)
        # One place of the one or two units that were drawn would always be the same.
        if total_quota and (complete or share * total_quota >= _MIN_QUOTA):
            k = min(total_quota, max(1, round(share * total_quota)))
            found.append(replace(group, subgroups=tuple(subgroups), k=k, auto=False))
    return found


def _compare_disjoint_masks(
    folds: FoldSums,
    score: ScoreFunction,
    groups: Sequence[TopKGroup],
    size: int,
    random: torch.Generator,
) -> float:
    """The overlap of the masks of two disjoint sets of `size` folds."""
    order = torch.randperm(folds.num_folds, generator=random)
    one, other = (
        _select_from_folds(folds, score, groups, fold_indices)
        for fold_indices in order[: 2 * size].split(size)
    )
    shared = sum(int(torch.isin(one[name], other[name]).sum()) for name in one if name in other)
    return shared / sum(len(index) for index in one.values())


def _select_from_folds(
    folds: FoldSums, score: ScoreFunction, groups: Sequence[TopKGroup], fold_indices: Tensor
) -> Mask:
    """The sampled units that win when only a part of the folds counts."""
    flat = score(*folds.compute_means(torch.bincount(fold_indices, minlength=folds.num_folds)))
    units = {
        name: scores.view(-1, folds.widths[name]).sum(1)
        for name, scores in folds.split_by_tensor(flat).items()
    }
    pieces = ((name, 0, scores) for name, scores in units.items())
    return select_units(pieces, {name: len(s) for name, s in units.items()}, groups, squares=False)


def _scale_max_quota(subgroup: Subgroup, group: TopKGroup, sampled: int, size: int) -> int:
    """The ceiling among sampled units; there is none where a part may have all places."""
    return sampled if subgroup.max_quota >= group.k else round(subgroup.max_quota * sampled / size)


def _count_sampled(folds: FoldSums, names: Sequence[str]) -> int:
    return sum(len(folds.units[name]) for name in names)


def _sum_sizes(sizes: Mapping[str, int], names: Sequence[str]) -> int:
    return sum(sizes[name] for name in names)
