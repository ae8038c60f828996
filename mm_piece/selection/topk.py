"""The k highest of a stream of scores: exact, deterministic, in bounded memory."""

import numpy
import torch
from torch import Tensor

from mm_piece.errors import SelectionError

_CHUNK = 2**18  # scores looked at in one go: bounds the scratch memory
_BLOCK = 32  # scores of which only the highest is compared first


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
            piece = scores[offset : offset + _CHUNK].detach()
            self._offer(piece.float().cpu(), start + offset)

    def indices(self) -> Tensor:
        """The chosen global positions, sorted, int64."""
        return self.best()[0]

    def best(self) -> tuple[Tensor, Tensor]:
        """The chosen global positions, sorted, int64, and their scores, fp32."""
        if self._held < self.k:
            raise SelectionError(f"{self._held} scores were given, {self.k} are to be selected")
        return self.candidates()

    def candidates(self) -> tuple[Tensor, Tensor]:
        """The best so far: at most k global positions, sorted, int64, and their scores, fp32."""
        self._compact()
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0)
        return torch.cat([nothing[0], *self._indices]), torch.cat([nothing[1], *self._scores])

    def merge(self, positions: Tensor, scores: Tensor) -> None:
        """Take candidates, in any order, in place of those held."""
        order = numpy.lexsort((positions.numpy(), -scores.numpy()))[: self.k]
        kept = torch.from_numpy(order)
        kept = kept[positions[kept].argsort()]
        self._indices, self._scores, self._held = [positions[kept]], [scores[kept]], len(kept)

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
    # numpy compares and counts in two thirds of torch's time.
    hit = numpy.flatnonzero(_finite(blocks.amax(1)).numpy() > threshold)
    inside = numpy.flatnonzero(blocks.numpy()[hit] > threshold)
    found = torch.from_numpy(hit[inside // _BLOCK] * _BLOCK + inside % _BLOCK)
    return torch.cat([found, (tail > threshold).nonzero().view(-1) + whole])


def _finite(scores: Tensor) -> Tensor:
    """The scores, if none is NaN (as the highest of a block is where any of it is)."""
    if torch.isnan(scores).any():
        raise SelectionError("the scores hold NaN; the model or its data gives no finite gradient")
    return scores
