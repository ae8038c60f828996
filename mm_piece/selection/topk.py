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
        self._num_candidates = 0

    def add_scores(self, scores: Tensor, start: int) -> None:
        """Offer flat fp32 scores whose global positions begin at `start`; positions must ascend."""
        for offset in range(0, scores.numel(), _CHUNK):
            piece = scores[offset : offset + _CHUNK].detach()
            self._add_chunk(piece.float().cpu(), start + offset)

    def select_indices(self) -> Tensor:
        """The chosen global positions, sorted, int64."""
        return self.select_best()[0]

    def select_best(self) -> tuple[Tensor, Tensor]:
        """The chosen global positions, sorted, int64, and their scores, fp32."""
        if self._num_candidates < self.k:
            raise SelectionError(
                f"{self._num_candidates} scores were given, {self.k} are to be selected"
            )
        return self.list_candidates()

    def list_candidates(self) -> tuple[Tensor, Tensor]:
        """The best so far: at most k global positions, sorted, int64, and their scores, fp32."""
        self._drop_excess()
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0)
        return torch.cat([nothing[0], *self._indices]), torch.cat([nothing[1], *self._scores])

    def replace_candidates(self, positions: Tensor, scores: Tensor) -> None:
        """Take candidates, in any order, in place of those held."""
        order = numpy.lexsort((positions.numpy(), -scores.numpy()))[: self.k]
        selected = torch.from_numpy(order)
        selected = selected[positions[selected].argsort()]
        self._indices, self._scores, self._num_candidates = (
            [positions[selected]],
            [scores[selected]],
            len(selected),
        )

    def _add_chunk(self, scores: Tensor, start: int) -> None:
        # A later entry that equals the threshold loses the tie once k candidates stand before it.
        full = self._num_candidates >= self.k and self.threshold > -float("inf")
        selected = (
            _find_above(scores, self.threshold)
            if full
            else torch.arange(len(_require_finite(scores)))
        )
        self._scores.append(scores[selected])
        self._indices.append(selected + start)
        self._num_candidates += len(selected)
        if self._num_candidates >= 2 * self.k:
            self._drop_excess()

    def _drop_excess(self) -> None:
        if self._num_candidates <= self.k:
            return
        scores, indices = torch.cat(self._scores), torch.cat(self._indices)
        # numpy's selection takes a tenth of the time of torch's.
        cutoff = self._num_candidates - self.k
        self.threshold = float(numpy.partition(scores.numpy(), cutoff)[cutoff])
        selected = (scores >= self.threshold).nonzero().view(-1)
        scores, indices = scores[selected], indices[selected]
        if len(selected) > self.k:  # of the entries at the threshold, the last ones lose the tie
            ties = (scores == self.threshold).nonzero().view(-1)
            is_selected = torch.ones(len(selected), dtype=torch.bool)
            is_selected[ties[self.k - len(selected) :]] = False
            scores, indices = scores[is_selected], indices[is_selected]
        self._scores, self._indices, self._num_candidates = [scores], [indices], self.k


def _find_above(scores: Tensor, threshold: float) -> Tensor:
    """Positions of scores over a threshold, ascending; most blocks are judged by their highest."""
    num_in_blocks = len(scores) // _BLOCK * _BLOCK
    blocks, tail = scores[:num_in_blocks].view(-1, _BLOCK), _require_finite(scores[num_in_blocks:])
    # numpy compares and counts in two thirds of torch's time.
    hit = numpy.flatnonzero(_require_finite(blocks.amax(1)).numpy() > threshold)
    inside = numpy.flatnonzero(blocks.numpy()[hit] > threshold)
    found = torch.from_numpy(hit[inside // _BLOCK] * _BLOCK + inside % _BLOCK)
    return torch.cat([found, (tail > threshold).nonzero().view(-1) + num_in_blocks])


def _require_finite(scores: Tensor) -> Tensor:
    """The scores, if none is NaN (as the highest of a block is where any of it is)."""
    if torch.isnan(scores).any():
        raise SelectionError("the scores hold NaN; the model or its data gives no finite gradient")
    return scores
