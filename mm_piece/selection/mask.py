"""`select`: scores in, sorted flat indices out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from mm_piece import distributed
from mm_piece.errors import SelectionError, format_value
from mm_piece.importance.rows import ScorePiece, entries_of, iter_output_row_sums, width_of
from mm_piece.selection.auto_density import count_auto_selected
from mm_piece.selection.budgets import Budgets, Density, Subgroup, TopKGroup, build_topk_groups
from mm_piece.selection.topk import TopK

Mask = dict[str, Tensor]  # name -> sorted flat indices


def select(scores: Mapping[str, Tensor], density: Density = 0.001, **budgets: Any) -> Mask:
    """The `floor(density * N)` highest of N scores, as sorted flat indices per tensor.

    `scores` maps names to tensors of any shape. `density` may also map groups (vision, projector,
    language, embedding, head) and patterns of names to their own shares, or be `auto`; further
    arguments are those of `Budgets`: scope, unit, floor, ceiling, squares. Raises SelectionError
    for a density out of (0, 1], NaN scores, or a selection of nothing.
    """
    _require_scores(scores)
    shapes = {name: tuple(tensor.shape) for name, tensor in scores.items()}
    pieces = ((name, 0, tensor.reshape(-1)) for name, tensor in scores.items())
    return select_stream(pieces, shapes, Budgets(density, **budgets))


def _require_scores(scores: Any) -> None:
    if not isinstance(scores, Mapping):
        raise SelectionError(f"scores must map names to tensors, not {format_value(scores)}")
    for name, tensor in scores.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.is_complex():
            raise SelectionError(f"scores of {name!r} must be a tensor of numbers")


def select_stream(
    pieces: Iterable[ScorePiece],
    shapes: Mapping[str, Sequence[int]],
    budgets: Budgets,
    sharded: bool = False,
) -> Mask:
    """`select` for scores that come in pieces, in the order of `shapes`, never held as a whole.

    With `apart` every process gives the pieces of other tensors, and all get the same mask.
    """
    sizes, widths = count_units(shapes, budgets)
    if budgets.unit == "row":
        pieces = iter_output_row_sums(pieces, widths)
    mask = select_units(pieces, sizes, build_topk_groups(sizes, budgets), budgets.squares, sharded)
    if budgets.unit == "row":
        mask = {name: entries_of(rows, widths[name]) for name, rows in mask.items()}
    return {name: _narrow_index(index, sizes[name] * widths[name]) for name, index in mask.items()}


def count_units(
    shapes: Mapping[str, Sequence[int]], budgets: Budgets
) -> tuple[dict[str, int], dict[str, int]]:
    """How many units each tensor has, and the entries in each of them."""
    entry = budgets.unit == "entry"
    widths = {name: 1 if entry else width_of(shape) for name, shape in shapes.items()}
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return {name: counts[name] // widths[name] for name in shapes}, widths


def select_units(
    pieces: Iterable[ScorePiece],
    sizes: Mapping[str, int],
    groups: Sequence[TopKGroup],
    squares: bool,
    sharded: bool = False,
) -> Mask:
    """The units that win their contests; int64 indices, tensors in the order of `sizes`."""
    running_by_group = [(group, _make_running_topks(group, sizes)) for group in groups]
    running_of = {
        name: running
        for _, running_topks in running_by_group
        for running in running_topks
        for name in running.subgroup.names
    }
    for name, offset, flat in pieces:
        if name in running_of:
            running_of[name].topk.add_scores(flat, running_of[name].offsets[name] + offset)
    chosen: Mask = {}
    for group, running_topks in running_by_group:
        for running in running_topks if sharded else ():
            _merge_across_ranks(running.topk)
        chosen |= _split_by_tensor(
            _select_positions(group, running_topks, squares), running_topks[0].offsets, sizes
        )
    return {name: chosen[name] for name in sizes if name in chosen}


@dataclass(frozen=True)
class _RunningTopK:
    """The running top-k of one part of a contest."""

    subgroup: Subgroup
    offsets: dict[str, int]  # of the tensors in the contest's own numbering
    topk: TopK


def _merge_across_ranks(topk: TopK) -> None:
    """Bring the candidates of all processes together."""
    positions, scores = topk.list_candidates()
    topk.replace_candidates(distributed.all_gather(positions), distributed.all_gather(scores))


def _make_running_topks(group: TopKGroup, sizes: Mapping[str, int]) -> list[_RunningTopK]:
    members, offsets, total = set(group.names), {}, 0
    for name in (name for name in sizes if name in members):
        offsets[name], total = total, total + sizes[name]
    return [
        _RunningTopK(subgroup, offsets, TopK(min(subgroup.max_quota, group.k)))
        for subgroup in group.subgroups
    ]


def _select_positions(
    group: TopKGroup, running_topks: Sequence[_RunningTopK], squares: bool
) -> Tensor:
    """The chosen positions of a contest, sorted: every part's floor, then the highest of all."""
    if len(running_topks) == 1 and not group.auto:
        return running_topks[0].topk.select_indices()
    bests = [running.topk.select_best() for running in running_topks]
    positions, scores = (torch.cat(column) for column in zip(*bests, strict=True))
    k = count_auto_selected(scores, squares) if group.auto else group.k
    guaranteed = torch.cat(
        [
            _mark_highest(best, running.subgroup.min_quota)
            for best, running in zip(bests, running_topks, strict=True)
        ]
    )
    order = numpy.lexsort((positions.numpy(), -scores.numpy(), ~guaranteed.numpy()))
    return positions[torch.from_numpy(order[:k])].sort().values


def _mark_highest(best: tuple[Tensor, Tensor], quota: int) -> Tensor:
    """Which candidates are the `low` first ones, by score and then by position."""
    positions, scores = best
    guaranteed = torch.zeros(len(scores), dtype=torch.bool)
    guaranteed[torch.from_numpy(numpy.lexsort((positions.numpy(), -scores.numpy()))[:quota])] = True
    return guaranteed


def _split_by_tensor(chosen: Tensor, offsets: Mapping[str, int], sizes: Mapping[str, int]) -> Mask:
    """A contest's positions as indices of the tensors that have any."""
    found = {}
    for name, start in offsets.items():
        low, high = torch.searchsorted(chosen, torch.tensor([start, start + sizes[name]])).tolist()
        if high > low:
            found[name] = chosen[low:high] - start
    return found


def _narrow_index(index: Tensor, size: int) -> Tensor:
    return index.to(torch.int32) if size < 2**31 else index
