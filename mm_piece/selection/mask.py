"""`select`: scores in, sorted flat indices out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from mm_piece import distributed
from mm_piece.errors import SelectionError, short
from mm_piece.importance.rows import Piece, entries_of, row_scores, width_of
from mm_piece.selection.auto_density import knee
from mm_piece.selection.budgets import Budgets, Contest, Density, Part, contests
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
        raise SelectionError(f"scores must map names to tensors, not {short(scores)}")
    for name, tensor in scores.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.is_complex():
            raise SelectionError(f"scores of {name!r} must be a tensor of numbers")


def select_stream(
    pieces: Iterable[Piece],
    shapes: Mapping[str, Sequence[int]],
    budgets: Budgets,
    apart: bool = False,
) -> Mask:
    """`select` for scores that come in pieces, in the order of `shapes`, never held as a whole.

    With `apart` every process gives the pieces of other tensors, and all get the same mask.
    """
    sizes, widths = units_of(shapes, budgets)
    if budgets.unit == "row":
        pieces = row_scores(pieces, widths)
    mask = choose(pieces, sizes, contests(sizes, budgets), budgets.squares, apart)
    if budgets.unit == "row":
        mask = {name: entries_of(rows, widths[name]) for name, rows in mask.items()}
    return {name: _narrow(index, sizes[name] * widths[name]) for name, index in mask.items()}


def units_of(
    shapes: Mapping[str, Sequence[int]], budgets: Budgets
) -> tuple[dict[str, int], dict[str, int]]:
    """How many units each tensor has, and the entries in each of them."""
    entry = budgets.unit == "entry"
    widths = {name: 1 if entry else width_of(shape) for name, shape in shapes.items()}
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return {name: counts[name] // widths[name] for name in shapes}, widths


def choose(
    pieces: Iterable[Piece],
    sizes: Mapping[str, int],
    rounds: Sequence[Contest],
    squares: bool,
    apart: bool = False,
) -> Mask:
    """The units that win their contests; int64 indices, tensors in the order of `sizes`."""
    races = [(contest, _seats(contest, sizes)) for contest in rounds]
    of = {name: seat for _, seats in races for seat in seats for name in seat.part.names}
    for name, offset, flat in pieces:
        if name in of:
            of[name].top.add(flat, of[name].starts[name] + offset)
    chosen: Mask = {}
    for contest, seats in races:
        for seat in seats if apart else ():
            _share(seat.top)
        chosen |= _local(_winners(contest, seats, squares), seats[0].starts, sizes)
    return {name: chosen[name] for name in sizes if name in chosen}


@dataclass(frozen=True)
class _Seat:
    """The running top-k of one part of a contest."""

    part: Part
    starts: dict[str, int]  # of the tensors in the contest's own numbering
    top: TopK


def _share(top: TopK) -> None:
    """Bring the candidates of all processes together."""
    positions, scores = top.candidates()
    top.merge(distributed.joined(positions), distributed.joined(scores))


def _seats(contest: Contest, sizes: Mapping[str, int]) -> list[_Seat]:
    members, starts, total = set(contest.names), {}, 0
    for name in (name for name in sizes if name in members):
        starts[name], total = total, total + sizes[name]
    return [_Seat(part, starts, TopK(min(part.high, contest.k))) for part in contest.parts]


def _winners(contest: Contest, seats: Sequence[_Seat], squares: bool) -> Tensor:
    """The chosen positions of a contest, sorted: every part's floor, then the highest of all."""
    if len(seats) == 1 and not contest.auto:
        return seats[0].top.indices()
    bests = [seat.top.best() for seat in seats]
    positions, scores = (torch.cat(column) for column in zip(*bests, strict=True))
    k = knee(scores, squares) if contest.auto else contest.k
    sure = torch.cat(
        [_highest(best, seat.part.low) for best, seat in zip(bests, seats, strict=True)]
    )
    order = numpy.lexsort((positions.numpy(), -scores.numpy(), ~sure.numpy()))
    return positions[torch.from_numpy(order[:k])].sort().values


def _highest(best: tuple[Tensor, Tensor], low: int) -> Tensor:
    """Which candidates are the `low` first ones, by score and then by position."""
    positions, scores = best
    sure = torch.zeros(len(scores), dtype=torch.bool)
    sure[torch.from_numpy(numpy.lexsort((positions.numpy(), -scores.numpy()))[:low])] = True
    return sure


def _local(chosen: Tensor, starts: Mapping[str, int], sizes: Mapping[str, int]) -> Mask:
    """A contest's positions as indices of the tensors that have any."""
    found = {}
    for name, start in starts.items():
        low, high = torch.searchsorted(chosen, torch.tensor([start, start + sizes[name]])).tolist()
        if high > low:
            found[name] = chosen[low:high] - start
    return found


def _narrow(index: Tensor, entries: int) -> Tensor:
    return index.to(torch.int32) if entries < 2**31 else index
