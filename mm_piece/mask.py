"""From scores to a mask: an exact global top-k over a stream of scores, in bounded memory.

Ties go to the earliest tensor, then to the lowest index, so that the same scores always give the
same mask, however they are cut into pieces.
"""

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from math import floor

import numpy
import torch
from torch import Tensor

from mm_piece.errors import SelectionError
from mm_piece.names import Group, group_of

Piece = tuple[str, int, Tensor]  # tensor name, offset of the piece in the flat tensor, flat scores
Mask = dict[str, Tensor]  # name -> sorted flat indices
Density = float | Mapping[Group, float]  # of all entries, or of each group's

_CHUNK = 2**18  # scores looked at in one go: bounds the scratch memory
_BLOCK = 32  # scores of which only the highest is compared first


def select(scores: Mapping[str, Tensor], density: Density = 0.001) -> Mask:
    """The `floor(density * N)` highest of N scores, as sorted flat indices per tensor.

    `scores` maps names to tensors of any shape. A mapping of densities gives each group (vision,
    projector, language, embedding, head) its own budget; groups it leaves out get nothing. Raises
    SelectionError for a density out of (0, 1], NaN scores, or a selection of nothing.
    """
    sizes = {name: tensor.numel() for name, tensor in scores.items()}
    pieces = ((name, 0, tensor.reshape(-1)) for name, tensor in scores.items())
    return select_stream(pieces, sizes, density)


def select_stream(pieces: Iterable[Piece], sizes: Mapping[str, int], density: Density) -> Mask:
    """`select` for scores that arrive in pieces, in the order of `sizes`, never held as a whole."""
    members = _members(sizes, density)
    tops = {group: TopK(k) for group, k in budgets(sizes, density).items()}
    starts = {g: _starts(sizes, names) for g, names in members.items()}
    group_by_name = {name: group for group, names in members.items() for name in names}
    for name, offset, flat in pieces:
        if name in group_by_name:
            group = group_by_name[name]
            tops[group].add(flat, starts[group][name] + offset)
    chosen: Mask = {}
    for g, top in tops.items():
        chosen |= _split(top.indices(), members[g], sizes)
    return {name: chosen[name] for name in sizes if name in chosen}


def budgets(sizes: Mapping[str, int], density: Density) -> dict[str, int]:
    """How many entries each group of its own budget gets; one group, `all`, for a single density.

    Raises SelectionError for a density out of (0, 1] or one that selects nothing.
    """
    shares = dict(density) if isinstance(density, Mapping) else {"all": density}
    members = _members(sizes, density)
    return {g: count(share, sum(sizes[n] for n in members[g]), g) for g, share in shares.items()}


def count(density: float, total: int, what: str = "all") -> int:
    """`floor(density * total)`, exact for the decimal number as written; SelectionError if 0."""
    if not 0 < density <= 1:
        raise SelectionError(f"density {density} is out of (0, 1]")
    k = floor(Decimal(repr(float(density))) * total)
    if k == 0:
        hint = "" if total else "; is the group excluded, or does the model not have it?"
        raise SelectionError(
            f"density {density} of {total} patchable entries ({what}) selects none{hint}"
        )
    return k


class TopK:
    """The k highest of a stream of scores; holds about 2 k candidates and one chunk."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.threshold = -float("inf")
        self._scores: list[Tensor] = []
        self._indices: list[Tensor] = []
        self._held = 0

    def add(self, scores: Tensor, start: int) -> None:
        """Offer flat fp32 scores whose global positions begin at `start`; positions must ascend."""
        for offset in range(0, scores.numel(), _CHUNK):
            self._offer(scores[offset : offset + _CHUNK].float().cpu(), start + offset)

    def indices(self) -> Tensor:
        """The chosen global positions, sorted, int64."""
        self._compact()
        if self._held < self.k:
            raise SelectionError(f"{self._held} scores were given, {self.k} are to be selected")
        return torch.cat(self._indices)

    def _offer(self, scores: Tensor, start: int) -> None:
        # A later entry that equals the threshold loses the tie once k candidates stand before it.
        full = self._held >= self.k and self.threshold > -float("inf")
        keep = _above(scores, self.threshold) if full else torch.arange(len(_finite(scores)))
        self._scores.append(scores[keep])
        self._indices.append(keep + start)
        self._held += len(keep)
        if self._held >= 2 * self.k:
            self._compact()

    def _compact(self) -> None:
        if self._held <= self.k:
            return
        scores, indices = torch.cat(self._scores), torch.cat(self._indices)
        # numpy's selection takes a tenth of the time of torch's.
        place = self._held - self.k
        self.threshold = float(numpy.partition(scores.numpy(), place)[place])
        keep = (scores >= self.threshold).nonzero().view(-1)
        scores, indices = scores[keep], indices[keep]
        if len(keep) > self.k:  # of the entries at the threshold, the last ones lose the tie
            ties = (scores == self.threshold).nonzero().view(-1)
            stays = torch.ones(len(keep), dtype=torch.bool)
            stays[ties[self.k - len(keep) :]] = False
            scores, indices = scores[stays], indices[stays]
        self._scores, self._indices, self._held = [scores], [indices], self.k


def _above(scores: Tensor, threshold: float) -> Tensor:
    """Positions of scores over a threshold, ascending; most blocks are judged by their highest."""
    whole = len(scores) // _BLOCK * _BLOCK
    blocks, tail = scores[:whole].view(-1, _BLOCK), _finite(scores[whole:])
    hit = (_finite(blocks.amax(1)) > threshold).nonzero().view(-1)
    row, column = (blocks[hit] > threshold).nonzero(as_tuple=True)
    return torch.cat([hit[row] * _BLOCK + column, (tail > threshold).nonzero().view(-1) + whole])


def _finite(scores: Tensor) -> Tensor:
    """The scores, if none is NaN (as the highest of a block is where any of it is)."""
    if torch.isnan(scores).any():
        raise SelectionError("the scores hold NaN; the model or its data gives no finite gradient")
    return scores


def _members(sizes: Mapping[str, int], density: Density) -> dict[str, list[str]]:
    if not isinstance(density, Mapping):
        return {"all": list(sizes)}
    return {group: [name for name in sizes if group_of(name) == group] for group in density}


def _starts(sizes: Mapping[str, int], names: list[str]) -> dict[str, int]:
    starts, total = {}, 0
    for name in names:
        starts[name], total = total, total + sizes[name]
    return starts


def _split(chosen: Tensor, names: list[str], sizes: Mapping[str, int]) -> Mask:
    return {name: index for name, index in _local(chosen, names, sizes) if len(index)}


def _local(
    chosen: Tensor, names: list[str], sizes: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    for name, start in _starts(sizes, names).items():
        low, high = torch.searchsorted(chosen, torch.tensor([start, start + sizes[name]])).tolist()
        narrow = torch.int32 if sizes[name] < 2**31 else torch.int64
        yield name, (chosen[low:high] - start).to(narrow)
