"""Sums over folds of the examples, at a random sample of entries: what parts of them would give.

A whole second set of scores would cost what the first one does. A random sample of entries has the
same distribution of scores, and its sums are read off the running ones after each batch.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mm_piece import distributed
from mm_piece.importance.accumulators import GradientSums
from mm_piece.importance.rows import entries_of

_FOLDS = 16
_ENTRIES = 2**18  # of the sample, at most


class FoldSums:
    """Sums at sampled units (entries or rows) of tensors, apart for each fold of the batches."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        widths: Mapping[str, int],
        kinds: Sequence[str],
        *,
        windows: Sequence[int],
        max_bytes: int,
        seed: int,
    ) -> None:
        """`sizes` counts units, `widths` their entries; all sums fit in `room` bytes.

        `windows` numbers, for each batch, the random part of the examples that it comes from.
        """
        random = torch.Generator().manual_seed(seed)
        self.num_folds, self.widths = min(_FOLDS, len(set(windows))), widths
        self._fold_of_batch = [window % self.num_folds for window in windows]
        entries = min(_ENTRIES, max_bytes // (4 * len(kinds) * (self.num_folds + 1) + 8))
        self.units = _sample_units(sizes, widths, entries, random)
        self.entries = {name: entries_of(u, widths[name]) for name, u in self.units.items()}
        self._offsets = _compute_offsets({name: len(found) for name, found in self.entries.items()})
        total = sum(map(len, self.entries.values()))
        self.sums = {kind: torch.zeros(self.num_folds, total) for kind in kinds}
        self._previous = {kind: torch.zeros(total) for kind in kinds}
        self.counts = [0] * self.num_folds

    @property
    def nbytes(self) -> int:
        """What all of it takes."""
        tensors = (*self.sums.values(), *self._previous.values(), *self.entries.values())
        return sum(tensor.nbytes for tensor in tensors)

    def begin_pass(self, sums: GradientSums) -> None:
        """A pass over all batches begins, which adds to these sums."""
        self.counts, self._examples_seen = [0] * self.num_folds, 0
        self._spans: list[tuple[str, Tensor, slice]] = []
        for block_range in sums.ranges.values():
            entries, ends = (
                self.entries[block_range.name],
                torch.tensor([block_range.start, block_range.stop]),
            )
            low, high = torch.searchsorted(entries, ends).tolist()
            start = self._offsets[block_range.name]
            self._spans.append(
                (block_range.name, entries[low:high], slice(start + low, start + high))
            )
        for kind in self.sums:
            for _, _, span in self._spans:
                self.sums[kind][:, span] = 0
                self._previous[kind][span] = 0

    def record_batch(self, batch: int, sums: GradientSums) -> None:
        """What a batch has added to the sums."""
        fold = self._fold_of_batch[batch]
        self.counts[fold] += sums.examples - self._examples_seen
        self._examples_seen = sums.examples
        for name, entries, span in self._spans:
            for kind, now in sums.sums_at(name, entries).items():
                self.sums[kind][fold, span] += now - self._previous[kind][span]
                self._previous[kind][span] = now

    def all_reduce_sums(self) -> None:
        """Bring together what every process has summed, each for tensors of its own."""
        self.sums = {kind: distributed.all_reduce_sum(sums) for kind, sums in self.sums.items()}

    def compute_means(self, times: Tensor) -> tuple[dict[str, Tensor], int]:
        """Mean of each kind over folds, each so many `times`, and how many examples that are."""
        count = int((times * torch.tensor(self.counts)).sum())
        return {kind: times.float() @ sums / count for kind, sums in self.sums.items()}, count

    def split_by_tensor(self, flat: Tensor) -> dict[str, Tensor]:
        """What belongs to each tensor of something that has one number for each sampled entry."""
        sizes = [len(found) for found in self.entries.values()]
        return dict(zip(self.entries, flat.split(sizes), strict=True))


def _sample_units(
    sizes: Mapping[str, int], widths: Mapping[str, int], entries: int, random: torch.Generator
) -> dict[str, Tensor]:
    """About as many `entries` of whole units, evenly spread; per tensor sorted int64 units."""
    total = sum(sizes.values())
    per_unit = sum(sizes[name] * widths[name] for name in sizes) / max(total, 1)
    wanted = int(entries / per_unit)
    if wanted >= total:
        chosen = torch.arange(total)
    else:
        chosen = torch.randint(total, (wanted,), generator=random).unique()
    found, start = {}, 0
    for name, size in sizes.items():
        low, high = torch.searchsorted(chosen, torch.tensor([start, start + size])).tolist()
        found[name] = chosen[low:high] - start
        start += size
    return found


def _compute_offsets(sizes: Mapping[str, int]) -> dict[str, int]:
    return dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
