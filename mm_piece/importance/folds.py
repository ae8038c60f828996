"""Sums over folds of the examples, at a random sample of entries: what parts of them would give.

A whole second set of scores would cost what the first one does. A random sample of entries has the
same distribution of scores, and its sums are read off the running ones after each batch.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mm_piece import distributed
from mm_piece.importance.accumulators import Sums
from mm_piece.importance.rows import entries_of

_FOLDS = 16
_ENTRIES = 2**18  # of the sample, at most


class Folds:
    """Sums at sampled units (entries or rows) of tensors, apart for each fold of the batches."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        widths: Mapping[str, int],
        kinds: Sequence[str],
        *,
        windows: Sequence[int],
        room: int,
        seed: int,
    ) -> None:
        """`sizes` counts units, `widths` their entries; all sums fit in `room` bytes.

        `windows` numbers, for each batch, the random part of the examples that it comes from.
        """
        random = torch.Generator().manual_seed(seed)
        self.number, self.widths = min(_FOLDS, len(set(windows))), widths
        self._fold = [window % self.number for window in windows]
        entries = min(_ENTRIES, room // (4 * len(kinds) * (self.number + 1) + 8))
        self.units = _sampled(sizes, widths, entries, random)
        self.entries = {name: entries_of(u, widths[name]) for name, u in self.units.items()}
        self._starts = _starts({name: len(found) for name, found in self.entries.items()})
        total = sum(map(len, self.entries.values()))
        self.sums = {kind: torch.zeros(self.number, total) for kind in kinds}
        self._before = {kind: torch.zeros(total) for kind in kinds}
        self.counts = [0] * self.number

    @property
    def nbytes(self) -> int:
        """What all of it takes."""
        held = (*self.sums.values(), *self._before.values(), *self.entries.values())
        return sum(tensor.nbytes for tensor in held)

    def begin(self, sums: Sums) -> None:
        """A pass over all batches begins, which adds to these sums."""
        self.counts, self._seen = [0] * self.number, 0
        self._places: list[tuple[str, Tensor, slice]] = []
        for run in sums.runs.values():
            entries, ends = self.entries[run.name], torch.tensor([run.start, run.stop])
            low, high = torch.searchsorted(entries, ends).tolist()
            start = self._starts[run.name]
            self._places.append((run.name, entries[low:high], slice(start + low, start + high)))
        for kind in self.sums:
            for _, _, place in self._places:
                self.sums[kind][:, place] = 0
                self._before[kind][place] = 0

    def take(self, batch: int, sums: Sums) -> None:
        """What a batch has added to the sums."""
        fold = self._fold[batch]
        self.counts[fold] += sums.examples - self._seen
        self._seen = sums.examples
        for name, entries, place in self._places:
            for kind, now in sums.at(name, entries).items():
                self.sums[kind][fold, place] += now - self._before[kind][place]
                self._before[kind][place] = now

    def share(self) -> None:
        """Bring together what every process has summed, each for tensors of its own."""
        self.sums = {kind: distributed.summed(sums) for kind, sums in self.sums.items()}

    def means(self, times: Tensor) -> tuple[dict[str, Tensor], int]:
        """Mean of each kind over folds, each so many `times`, and how many examples that are."""
        count = int((times * torch.tensor(self.counts)).sum())
        return {kind: times.float() @ sums / count for kind, sums in self.sums.items()}, count

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """What belongs to each tensor of something that has one number for each sampled entry."""
        sizes = [len(found) for found in self.entries.values()]
        return dict(zip(self.entries, flat.split(sizes), strict=True))


def _sampled(
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


def _starts(sizes: Mapping[str, int]) -> dict[str, int]:
    return dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
