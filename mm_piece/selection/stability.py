"""How far a mask depends on the examples that were drawn, estimated without drawing others.

Two disjoint parts of the examples are two fresh sets. Each part gives scores at a sample of the
entries and, by the same budgets, a mask among them. The two masks overlap as much as those of any
two fresh sets of as many examples would. The parts hold half of all examples at most.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mm_piece.importance import FoldSums
from mm_piece.importance.rows import ScorePiece
from mm_piece.selection import Mask, Subgroup, TopKGroup, select_units

# From means of the gradients by kind, and the number of examples in them, to scores.
ScoreFunction = Callable[[Mapping[str, Tensor], int], Tensor]

_NUM_PAIRS = 16  # of disjoint parts for each number of examples
_MIN_QUOTA = 10  # units chosen in the sample: an overlap of fewer says little
_FOLD_DIVISORS = (8, 4, 2)  # an eighth of the examples, a quarter, a half


def estimate_overlaps(
    folds: FoldSums,
    score: ScoreFunction,
    groups: Sequence[TopKGroup],
    seed: int,
) -> dict[int, float]:
    """Return the mean share of a mask that a second one has too, by number of examples, ascending.

    `score` gives the entries of `folds` their scores; `groups` come from `build_sampled_groups`.
    The result is empty for fewer than two folds, and for too few chosen units to tell a share.
    """
    if sum(group.k for group in groups) < _MIN_QUOTA:
        return {}

    random = torch.Generator().manual_seed(seed)
    num_examples = sum(folds.counts)

    # Few folds give the same size, or none, for several divisors.
    sizes = dict.fromkeys(folds.num_folds // divisor for divisor in _FOLD_DIVISORS)
    overlaps: dict[int, float] = {}
    for size in sizes:
        if size == 0:
            continue

        pair_overlaps: list[float] = []
        for _ in range(_NUM_PAIRS):
            overlap = _compare_disjoint_masks(folds, score, groups, size, random)
            pair_overlaps.append(overlap)

        examples = round(num_examples * size / folds.num_folds)
        overlaps[examples] = sum(pair_overlaps) / _NUM_PAIRS
    return overlaps


def build_sampled_groups(
    folds: FoldSums,
    groups: Sequence[TopKGroup],
    sizes: Mapping[str, int],
    chosen: Mapping[str, int],
) -> list[TopKGroup]:
    """Build the top-k groups of the sampled units, at the densities of the mask of all units.

    `sizes` counts all units of each tensor, `chosen` those in the mask. A group with too few
    sampled units is left out.
    """
    sampled_groups: list[TopKGroup] = []
    for group in groups:
        num_units = _sum_sizes(sizes, group.names)
        num_chosen = 0
        for name in group.names:
            num_chosen += chosen.get(name, 0)
        density = num_chosen / num_units  # with `auto`, known only now

        subgroups = tuple(
            _scale_subgroup(subgroup, group, folds, sizes) for subgroup in group.subgroups
        )
        total_quota = sum(subgroup.max_quota for subgroup in subgroups)
        if total_quota == 0:
            continue

        # Out of one or two sampled units any two masks would choose the same one. A complete
        # sample has no such error, however small it is.
        is_complete = total_quota == num_units
        expected = density * total_quota
        if not is_complete and expected < _MIN_QUOTA:
            continue

        k = min(total_quota, max(1, round(expected)))
        sampled_group = replace(
            group,
            subgroups=subgroups,
            k=k,
            auto=False,
        )
        sampled_groups.append(sampled_group)
    return sampled_groups


def _scale_subgroup(
    subgroup: Subgroup,
    group: TopKGroup,
    folds: FoldSums,
    sizes: Mapping[str, int],
) -> Subgroup:
    """Return a subgroup with its quotas scaled to the units that were sampled of it."""
    sampled = sum(len(folds.units[name]) for name in subgroup.names)
    size = _sum_sizes(sizes, subgroup.names)
    return replace(
        subgroup,
        min_quota=int(subgroup.min_quota * sampled / size),
        max_quota=_scale_max_quota(subgroup, group, sampled, size),
    )


def _scale_max_quota(
    subgroup: Subgroup,
    group: TopKGroup,
    sampled: int,
    size: int,
) -> int:
    """Return the largest quota among the sampled units: all of them, unless a ceiling bounds it."""
    is_bounded = subgroup.max_quota < group.k
    if not is_bounded:
        return sampled
    return round(subgroup.max_quota * sampled / size)


def _compare_disjoint_masks(
    folds: FoldSums,
    score: ScoreFunction,
    groups: Sequence[TopKGroup],
    size: int,
    random: torch.Generator,
) -> float:
    """Return the overlap of the masks of two disjoint sets of `size` folds."""
    order = torch.randperm(folds.num_folds, generator=random)
    end = 2 * size
    one_part = order[:size]
    other_part = order[size:end]
    one = _select_from_folds(folds, score, groups, one_part)
    other = _select_from_folds(folds, score, groups, other_part)

    num_shared = 0
    for name, index in one.items():
        if name in other:
            is_shared = torch.isin(index, other[name])
            num_shared += int(is_shared.sum())
    num_selected = sum(len(index) for index in one.values())
    return num_shared / num_selected


def _select_from_folds(
    folds: FoldSums,
    score: ScoreFunction,
    groups: Sequence[TopKGroup],
    fold_indices: Tensor,
) -> Mask:
    """Return the mask among the sampled units when only some of the folds count."""
    times = torch.bincount(fold_indices, minlength=folds.num_folds)
    means, count = folds.compute_means(times)
    flat = score(means, count)

    unit_scores: dict[str, Tensor] = {}
    for name, entry_scores in folds.split_by_tensor(flat).items():
        by_unit = entry_scores.view(-1, folds.widths[name])  # (units, entries in each)
        unit_scores[name] = by_unit.sum(1)

    pieces: list[ScorePiece] = []
    sizes: dict[str, int] = {}
    for name, scores in unit_scores.items():
        pieces.append((name, 0, scores))
        sizes[name] = len(scores)
    return select_units(pieces, sizes, groups, squares=False)


def _sum_sizes(sizes: Mapping[str, int], names: Sequence[str]) -> int:
    return sum(sizes[name] for name in names)
