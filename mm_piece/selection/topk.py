"""The k highest scores of a stream: exact, deterministic, in bounded memory.

The *position* of a score is its index in the stream as a whole. Of equal scores the one at the
lower position wins, so that the result does not depend on how the stream is cut into pieces.
"""

import numpy
import torch
from torch import Tensor

from mm_piece.errors import SelectionError

_CHUNK = 2**18  # scores compared at a time: bounds the scratch memory
_BLOCK = 32  # scores of which only the highest is compared first
_LOWEST = float("-inf")


class TopK:
    """A running top-k: the k highest scores so far, in the memory of 2 k scores and one chunk.

    Scores that may still win are the *candidates*. Once there are 2 k of them, all but the k
    highest are dropped. The lowest score that is left becomes the *threshold*, which every later
    score must exceed.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.threshold = _LOWEST

        # The candidates, in pieces. Positions ascend from piece to piece and within each.
        self._scores: list[Tensor] = []
        self._indices: list[Tensor] = []
        self._num_candidates = 0

    def add_scores(
        self,
        scores: Tensor,
        start: int,
    ) -> None:
        """Add flat scores, compared as fp32, at positions from `start` on; positions must ascend.

        Raises SelectionError for a NaN.
        """
        total = scores.numel()
        for first in range(0, total, _CHUNK):
            end = first + _CHUNK
            chunk = scores[first:end].detach()
            chunk = chunk.float().cpu()
            self._add_chunk(chunk, start + first)

    def select_indices(self) -> Tensor:
        """Return the positions of the k highest scores: sorted, int64.

        Raises SelectionError as `select_best` does.
        """
        positions, _ = self.select_best()
        return positions

    def select_best(self) -> tuple[Tensor, Tensor]:
        """Return the positions of the k highest scores, sorted, int64, and the scores, fp32.

        Raises SelectionError for a stream of fewer than k scores.
        """
        if self._num_candidates < self.k:
            raise SelectionError(
                f"{self._num_candidates} scores were given, {self.k} are to be selected"
            )
        return self.list_candidates()

    def list_candidates(self) -> tuple[Tensor, Tensor]:
        """Return the best so far, k at most, as `select_best` does."""
        self._drop_excess()

        # The empty tensors set the dtypes where nothing was added.
        no_positions = torch.empty(0, dtype=torch.int64)
        no_scores = torch.empty(0)
        positions = torch.cat([no_positions, *self._indices])
        scores = torch.cat([no_scores, *self._scores])
        return positions, scores

    def replace_candidates(
        self,
        positions: Tensor,
        scores: Tensor,
    ) -> None:
        """Replace the candidates by the best of these, which come in any order."""
        best = find_highest(positions, scores, self.k)
        by_position = positions[best].argsort()
        selected = best[by_position]

        self._indices = [positions[selected]]
        self._scores = [scores[selected]]
        self._num_candidates = len(selected)

    def _add_chunk(
        self,
        scores: Tensor,
        start: int,
    ) -> None:
        """Add the scores of a chunk that may still win to the candidates."""
        # Once k candidates come before it, a score that only equals the threshold loses the tie.
        # A threshold of -inf, the initial one, rules nothing out.
        is_full = self._num_candidates >= self.k
        if is_full and self.threshold > _LOWEST:
            selected = _find_above(scores, self.threshold)
        else:
            _require_finite(scores)
            num_scores = len(scores)
            selected = torch.arange(num_scores)

        self._scores.append(scores[selected])
        self._indices.append(selected + start)
        self._num_candidates += len(selected)

        # At 2 k and not at once: each drop looks at k new candidates at least, so that the cost
        # for each of them is constant.
        if self._num_candidates >= 2 * self.k:
            self._drop_excess()

    def _drop_excess(self) -> None:
        """Drop all candidates but the k best, and raise the threshold to the last of these."""
        if self._num_candidates <= self.k:
            return

        scores = torch.cat(self._scores)
        indices = torch.cat(self._indices)

        # The k-th highest score. numpy finds it in a tenth of torch's time.
        rank = self._num_candidates - self.k
        partitioned = numpy.partition(scores.numpy(), rank)
        self.threshold = float(partitioned[rank])

        reaches_threshold = scores >= self.threshold
        selected = reaches_threshold.nonzero().view(-1)

        # Of several candidates at the threshold, the last ones lose the tie.
        num_excess = len(selected) - self.k
        if num_excess > 0:
            is_tie = scores[selected] == self.threshold
            ties = is_tie.nonzero().view(-1)
            losers = ties[-num_excess:]
            is_left = torch.ones(len(selected), dtype=torch.bool)
            is_left[losers] = False
            selected = selected[is_left]

        self._scores = [scores[selected]]
        self._indices = [indices[selected]]
        self._num_candidates = self.k


def find_highest(
    positions: Tensor,
    scores: Tensor,
    count: int,
) -> Tensor:
    """Return the indices of the `count` highest scores; of equal ones the lower position wins."""
    # lexsort's last key counts most.
    sort_keys = (
        positions.numpy(),
        -scores.numpy(),
    )
    by_rank = numpy.lexsort(sort_keys)
    return torch.as_tensor(by_rank[:count])


def _find_above(scores: Tensor, threshold: float) -> Tensor:
    """Return the indices of the scores over a threshold, ascending; SelectionError for a NaN.

    Few scores of a long stream exceed the threshold. Most blocks are ruled out by their highest
    score, and only the others are compared score by score.
    """
    num_in_blocks = len(scores) // _BLOCK * _BLOCK
    blocks = scores[:num_in_blocks].view(-1, _BLOCK)  # (blocks, scores in each)
    tail = scores[num_in_blocks:]

    block_maxima = blocks.amax(1)
    _require_finite(block_maxima)  # the maximum of a block with a NaN is NaN
    _require_finite(tail)

    # numpy compares and counts in two thirds of torch's time.
    is_hit_block = block_maxima.numpy() > threshold
    hit_blocks = numpy.flatnonzero(is_hit_block)
    candidates = blocks.numpy()[hit_blocks]  # (hit blocks, scores in each)
    hits = numpy.flatnonzero(candidates > threshold)

    # `hits` are indices in the hit blocks, laid end to end. Turn them into indices in `scores`.
    hit_numbers = hits // _BLOCK
    offsets = hits % _BLOCK
    block_starts = hit_blocks[hit_numbers] * _BLOCK
    in_blocks = torch.as_tensor(block_starts + offsets)

    is_tail_hit = tail > threshold
    tail_hits = is_tail_hit.nonzero().view(-1)
    in_tail = tail_hits + num_in_blocks
    return torch.cat([in_blocks, in_tail])


def _require_finite(scores: Tensor) -> None:
    """Raise SelectionError if a score is NaN."""
    if torch.isnan(scores).any():
        raise SelectionError("the scores hold NaN; the model or its data gives no finite gradient")
