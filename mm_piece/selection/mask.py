"""`select`: scores in, sorted flat indices out.

The scores of a tensor go into the running top-k of its subgroup, piece by piece. At the end each
top-k group chooses among the candidates of its subgroups. See `budgets` for these terms.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from mm_piece import distributed
from mm_piece.errors import SelectionError, format_value
from mm_piece.importance.rows import (
    ScorePiece,
    entries_of,
    iter_output_row_sums,
    width_of,
)
from mm_piece.selection.auto_density import count_auto_selected
from mm_piece.selection.budgets import (
    Budgets,
    Density,
    Subgroup,
    TopKGroup,
    build_topk_groups,
)
from mm_piece.selection.topk import TopK, find_highest

Mask = dict[str, Tensor]  # name -> sorted flat indices
Shapes = Mapping[str, Sequence[int]]


def select(
    scores: Mapping[str, Tensor],
    density: Density = 0.001,
    **budgets: Any,
) -> Mask:
    """Return the `floor(density * N)` highest of N scores, as sorted flat indices per tensor.

    `scores` maps names to tensors of any shape. `density` may also map groups (vision, projector,
    language, embedding, head) and patterns of names to their own shares, or be `auto`. The other
    arguments are those of `Budgets`: scope, unit, floor, ceiling, squares. Raises SelectionError
    for a density out of (0, 1], NaN scores, or a selection of nothing.
    """
    _require_mapping(scores)
    for name, tensor in scores.items():
        _require_numbers(name, tensor)

    shapes = {name: tensor.shape for name, tensor in scores.items()}
    pieces = _iter_whole_tensors(scores)
    return select_stream(pieces, shapes, Budgets(density, **budgets))


def _require_mapping(scores: object) -> None:
    """Raise SelectionError unless `scores` is a mapping."""
    if not isinstance(scores, Mapping):
        raise SelectionError(f"scores must map names to tensors, not {format_value(scores)}")


def _require_numbers(name: str, scores: object) -> None:
    """Raise SelectionError unless the scores of a tensor are a tensor of real numbers."""
    is_tensor = isinstance(scores, Tensor)
    if not is_tensor or scores.is_meta or scores.is_complex():
        raise SelectionError(f"scores of {name!r} must be a tensor of numbers")


def _iter_whole_tensors(scores: Mapping[str, Tensor]) -> Iterator[ScorePiece]:
    for name, tensor in scores.items():
        yield name, 0, tensor.reshape(-1)


def select_stream(
    pieces: Iterable[ScorePiece],
    shapes: Shapes,
    budgets: Budgets,
    sharded: bool = False,
) -> Mask:
    """Return what `select` does, for scores that come in pieces and are never in memory at once.

    The pieces come in the order of `shapes`. With `sharded` every process gives the scores of
    other entries, and all processes get the same mask.
    """
    sizes, widths = count_units(shapes, budgets)
    groups = build_topk_groups(sizes, budgets)
    by_row = budgets.unit == "row"

    # The top-k sees units only: scores are summed over rows before, and rows widened after.
    if by_row:
        pieces = iter_output_row_sums(pieces, widths)
    units = select_units(
        pieces,
        sizes,
        groups,
        budgets.squares,
        sharded,
    )

    mask: Mask = {}
    for name, index in units.items():
        width = widths[name]
        if by_row:
            index = entries_of(index, width)
        num_entries = sizes[name] * width
        mask[name] = _narrow_index(index, num_entries)
    return mask


def select_all(shapes: Shapes, budgets: Budgets) -> Mask | None:
    """Return the mask of budgets that leave no choice, whatever the scores; None for others.

    Budgets leave no choice where every top-k group takes all of its units.
    """
    sizes, widths = count_units(shapes, budgets)
    names: set[str] = set()
    for group in build_topk_groups(sizes, budgets):
        total = sum(sizes[name] for name in group.names)
        if group.auto or group.k < total:
            return None
        names.update(group.names)

    mask: Mask = {}
    for name, size in sizes.items():
        if name in names:
            num_entries = size * widths[name]
            mask[name] = _narrow_index(torch.arange(num_entries), num_entries)
    return mask


def count_units(
    shapes: Shapes,
    budgets: Budgets,
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of units of each tensor, and the number of entries in each unit."""
    sizes: dict[str, int] = {}
    widths: dict[str, int] = {}
    for name, shape in shapes.items():
        num_entries = torch.Size(shape).numel()
        width = 1 if budgets.unit == "entry" else width_of(shape)
        sizes[name] = num_entries // width
        widths[name] = width
    return sizes, widths


def select_units(
    pieces: Iterable[ScorePiece],
    sizes: Mapping[str, int],
    groups: Sequence[TopKGroup],
    squares: bool,
    sharded: bool = False,
) -> Mask:
    """Return the units that each top-k group chooses: int64 indices per tensor.

    `sizes` counts the units of each tensor. It sets the order of the tensors, in the mask and
    where scores are equal. `squares` is that of `Budgets`, `sharded` that of `select_stream`.
    """
    running_by_group: list[list[_RunningTopK]] = []
    running_of: dict[str, _RunningTopK] = {}
    for group in groups:
        running_topks = _make_running_topks(group, sizes)
        running_by_group.append(running_topks)
        for running in running_topks:
            running_of |= dict.fromkeys(running.subgroup.names, running)

    # The only pass over the scores: a piece goes to the running top-k of its tensor's subgroup.
    for name, offset, flat in pieces:
        running = running_of.get(name)
        if running is None:  # no density covers this tensor
            continue
        start = running.offsets[name] + offset
        running.topk.add_scores(flat, start)

    # Each process has the best of its own scores, among which are all its scores in the mask.
    if sharded:
        for running_topks in running_by_group:
            _merge_across_ranks(running_topks)

    mask: Mask = {}
    for group, running_topks in zip(groups, running_by_group, strict=True):
        positions = _select_positions(group, running_topks, squares)
        offsets = running_topks[0].offsets  # all subgroups of a group share them
        mask |= _split_by_tensor(positions, offsets, sizes)

    # Groups come in the order of the density's keys, the mask in that of the model.
    return {name: mask[name] for name in sizes if name in mask}


@dataclass(frozen=True)
class _RunningTopK:
    """The running top-k of one subgroup.

    A unit's position is its index in the concatenation of all tensors of the top-k group, in model
    order. `offsets` maps each tensor to the position of its first unit.
    """

    subgroup: Subgroup
    offsets: dict[str, int]
    topk: TopK


def _make_running_topks(
    group: TopKGroup,
    sizes: Mapping[str, int],
) -> list[_RunningTopK]:
    """Return an empty running top-k for each subgroup of a group."""
    # Numbered over the tensors of the whole group, so that a position is unique in it.
    members = set(group.names)
    offsets: dict[str, int] = {}
    total = 0
    for name, size in sizes.items():
        if name in members:
            offsets[name] = total
            total += size

    running_topks: list[_RunningTopK] = []
    for subgroup in group.subgroups:
        k = min(subgroup.max_quota, group.k)
        running = _RunningTopK(subgroup, offsets, TopK(k))
        running_topks.append(running)
    return running_topks


def _merge_across_ranks(running_topks: Sequence[_RunningTopK]) -> None:
    """Replace the candidates of every process by the best candidates of all."""
    for running in running_topks:
        positions, scores = running.topk.list_candidates()
        all_positions = distributed.all_gather(positions)
        all_scores = distributed.all_gather(scores)
        running.topk.replace_candidates(all_positions, all_scores)


def _select_positions(
    group: TopKGroup,
    running_topks: Sequence[_RunningTopK],
    squares: bool,
) -> Tensor:
    """Return the positions that a group chooses, sorted.

    Each subgroup first gets the `min_quota` highest of its own; the rest goes to the highest
    scores of all. No subgroup can exceed its `max_quota`: it has no more candidates than that.
    """
    if len(running_topks) == 1 and not group.auto:
        only = running_topks[0]
        return only.topk.select_indices()

    position_parts: list[Tensor] = []
    score_parts: list[Tensor] = []
    guaranteed_parts: list[Tensor] = []
    for running in running_topks:
        positions, scores = running.topk.select_best()
        min_quota = running.subgroup.min_quota
        is_guaranteed = _mark_highest(positions, scores, min_quota)
        position_parts.append(positions)
        score_parts.append(scores)
        guaranteed_parts.append(is_guaranteed)

    positions = torch.cat(position_parts)
    scores = torch.cat(score_parts)
    guaranteed = torch.cat(guaranteed_parts)
    k = group.k
    if group.auto:
        k = count_auto_selected(scores, squares)

    # lexsort's last key counts most: the guaranteed ones, then high scores, then low positions.
    # A tie within a group thus goes to the earliest tensor, then to the lowest index.
    sort_keys = (
        positions.numpy(),
        -scores.numpy(),
        ~guaranteed.numpy(),
    )
    by_rank = numpy.lexsort(sort_keys)
    chosen = torch.as_tensor(by_rank[:k])
    return positions[chosen].sort().values


def _mark_highest(
    positions: Tensor,
    scores: Tensor,
    quota: int,
) -> Tensor:
    """Return which of the candidates are the `quota` first ones, by score and then by position."""
    highest = find_highest(positions, scores, quota)
    is_highest = torch.zeros(len(scores), dtype=torch.bool)
    is_highest[highest] = True
    return is_highest


def _split_by_tensor(
    chosen: Tensor,
    offsets: Mapping[str, int],
    sizes: Mapping[str, int],
) -> Mask:
    """Return a group's chosen positions as indices of the tensors that have any."""
    found: Mask = {}
    for name, start in offsets.items():
        end = start + sizes[name]
        low = int(torch.searchsorted(chosen, start))
        high = int(torch.searchsorted(chosen, end))
        if high > low:
            found[name] = chosen[low:high] - start
    return found


def _narrow_index(index: Tensor, size: int) -> Tensor:
    """Return the indices of a tensor of `size` entries as int32, where int32 can hold them all."""
    if size < 2**31:
        return index.to(torch.int32)
    return index
