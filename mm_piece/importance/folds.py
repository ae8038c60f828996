"""Sums over folds of the examples, at a random sample of entries.

Sums of some folds give the scores on these examples alone, and so tell how far scores depend on
which examples were drawn. At every entry they would take as much memory again for each fold. A
random sample of entries has the same distribution of scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_piece import distributed
from mm_piece.importance.accumulators import BlockRange, GradientSums
from mm_piece.importance.rows import entries_of

_FOLDS = 16
_ENTRIES = 2**18  # of the sample, at most


@dataclass(frozen=True)
class _Span:
    """Sampled entries of a tensor that lie in one range of a block."""

    name: str
    entries: Tensor  # flat indices in the tensor, sorted
    positions: slice  # of their sums in the vector of all sampled entries


class FoldSums:
    """Sums at sampled units (entries or output rows) of tensors, one for each fold of the batches.

    The running sums S(t) after batch t cover all batches up to t. A batch adds the difference
    S(t) - S(t - 1) to its own fold.
    """

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
        """`sizes` counts a tensor's units, `widths` the entries of one; `kinds` as GradientSums.

        `windows` numbers for each batch the random part of the examples that it comes from. Windows
        are dealt to folds in turn. All of it takes `max_bytes` at most, or about as much where
        units differ in width: they are drawn at random.
        """
        random = torch.Generator()
        random.manual_seed(seed)
        num_windows = len(set(windows))
        self.num_folds = min(_FOLDS, num_windows)
        self.widths = widths
        self._fold_of_batch = []
        for window in windows:
            fold = window % self.num_folds
            self._fold_of_batch.append(fold)

        # An entry takes an fp32 sum of each kind in each fold, another one for the running sum, and
        # its int64 index.
        num_sums = len(kinds) * (self.num_folds + 1)
        bytes_per_entry = 4 * num_sums + 8
        max_entries = min(_ENTRIES, max_bytes // bytes_per_entry)
        self.units = _sample_units(sizes, widths, max_entries, random)

        # The sampled entries of all tensors lie one after the other in one vector.
        self.entries: dict[str, Tensor] = {}
        self._offsets: dict[str, int] = {}
        total = 0
        for name, units in self.units.items():
            entries = entries_of(units, widths[name])
            self.entries[name] = entries
            self._offsets[name] = total
            total += len(entries)

        self.sums: dict[str, Tensor] = {}
        self._previous: dict[str, Tensor] = {}  # the running sums after the last batch
        for kind in kinds:
            self.sums[kind] = torch.zeros(self.num_folds, total)
            self._previous[kind] = torch.zeros(total)
        self.counts = [0] * self.num_folds  # examples of each fold

        # of the pass that `begin_pass` began
        self._examples_seen = 0
        self._spans: list[_Span] = []

    @property
    def nbytes(self) -> int:
        """Number of bytes of all sums and indices."""
        tensors = [
            *self.sums.values(),
            *self._previous.values(),
            *self.entries.values(),
        ]
        return sum(tensor.nbytes for tensor in tensors)

    def begin_pass(self, sums: GradientSums) -> None:
        """Begin a pass over all batches, which adds to `sums`: those of one block of entries.

        Forgets what an earlier attempt at the same block has added.
        """
        self.counts = [0] * self.num_folds
        self._examples_seen = 0

        self._spans = []
        for block_range in sums.ranges.values():
            span = self._locate_range(block_range)
            self._spans.append(span)

        for kind, fold_sums in self.sums.items():
            previous = self._previous[kind]
            for span in self._spans:
                fold_sums[:, span.positions] = 0
                previous[span.positions] = 0

    def record_batch(
        self,
        batch: int,
        sums: GradientSums,
    ) -> None:
        """Add to a batch's fold what the batch has added to the running sums."""
        fold = self._fold_of_batch[batch]
        num_examples = sums.examples - self._examples_seen
        self.counts[fold] += num_examples
        self._examples_seen = sums.examples

        for span in self._spans:
            positions = span.positions
            running_sums = sums.sums_at(span.name, span.entries)
            for kind, running in running_sums.items():
                fold_sums = self.sums[kind]
                previous = self._previous[kind]
                added = running - previous[positions]
                fold_sums[fold, positions] += added
                previous[positions] = running

    def all_reduce_sums(self) -> None:
        """All-reduce the sums of all processes, each of which has scored entries of its own."""
        for kind, sums in self.sums.items():
            self.sums[kind] = distributed.all_reduce_sum(sums)

    def compute_means(self, times: Tensor) -> tuple[dict[str, Tensor], int]:
        """Return the mean of each kind at all sampled entries, and over how many examples it is.

        `times` (folds,) are integers: how often each fold counts.
        """
        example_counts = times * torch.tensor(self.counts)
        count = int(example_counts.sum())
        fold_weights = times.float()

        means: dict[str, Tensor] = {}
        for kind, sums in self.sums.items():
            total = fold_weights @ sums  # (sampled entries,)
            means[kind] = total / count
        return means, count

    def split_by_tensor(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a vector with one number for each sampled entry into those of each tensor."""
        counts = [len(entries) for entries in self.entries.values()]
        pieces = flat.split(counts)
        return dict(zip(self.entries, pieces, strict=True))

    def _locate_range(self, block_range: BlockRange) -> _Span:
        """Return the sampled entries that lie in a range of a block."""
        name = block_range.name
        entries = self.entries[name]
        low, high = _find_edges(
            entries,
            block_range.start,
            block_range.stop,
        )
        offset = self._offsets[name]
        return _Span(
            name,
            entries=entries[low:high],
            positions=slice(offset + low, offset + high),
        )


def _sample_units(
    sizes: Mapping[str, int],
    widths: Mapping[str, int],
    max_entries: int,
    random: torch.Generator,
) -> dict[str, Tensor]:
    """Draw units of all tensors uniformly, about as many as have `max_entries` entries together.

    Returns sorted int64 units by tensor. Units that are drawn twice count once.
    """
    total = sum(sizes.values())
    total_entries = 0
    for name, size in sizes.items():
        total_entries += size * widths[name]
    mean_width = total_entries / max(total, 1)
    wanted = int(max_entries / mean_width)
    if wanted >= total:
        chosen = torch.arange(total)
    else:
        drawn = torch.randint(
            total,
            (wanted,),
            generator=random,
        )
        chosen = drawn.unique()  # sorted

    # Units are numbered through all tensors; each tensor's are those from `start` on.
    found: dict[str, Tensor] = {}
    start = 0
    for name, size in sizes.items():
        end = start + size
        low, high = _find_edges(chosen, start, end)
        own_units = chosen[low:high]
        found[name] = own_units - start
        start = end
    return found


def _find_edges(
    numbers: Tensor,
    start: int,
    stop: int,
) -> tuple[int, int]:
    """Return the range of indices at which sorted numbers lie from `start` to `stop` - 1."""
    low = torch.searchsorted(numbers, start)
    high = torch.searchsorted(numbers, stop)
    return int(low), int(high)
