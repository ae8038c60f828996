"""Which examples a process trains on in each step, and in what company.

All processes together see what one process alone would: the same examples in the same order, cut
into as many parts. Where parts are unequal, or one of them has no image and so would leave the
tower out, a blank stands in: an example without anything to learn, which adds exactly nothing.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from mm_piece import distributed
from mm_piece.data import IGNORED, collate, pictured


class Feed:
    """The batches of one process, as numbers of examples; `blank` fills up the last ones."""

    def __init__(self, examples: int, batch: int, seed: int, drop_last: bool) -> None:
        """Each process takes `batch` examples at a time; `drop_last` leaves out what is too few."""
        self.examples, self.batch, self.seed, self.drop_last = examples, batch, seed, drop_last
        self.epoch = 0

    @property
    def blank(self) -> int:
        """The number that stands for no example."""
        return self.examples

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has an order of its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        together = self.batch * distributed.size()
        return self.examples // together if self.drop_last else -(-self.examples // together)

    def __iter__(self) -> Iterator[list[int]]:
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.examples, generator=random).tolist()
        together = self.batch * distributed.size()
        for step in range(len(self)):
            everyone = order[step * together : (step + 1) * together]
            mine = everyone[distributed.rank() * self.batch :][: self.batch]
            if distributed.size() > 1:
                mine += [self.blank] * (self.batch - len(mine))
            yield mine


class Company(Sequence[dict[str, Tensor]]):
    """A task's examples, the blank at their end, and how they are put into batches."""

    def __init__(self, examples: Sequence[dict[str, Tensor]], pad: int) -> None:
        """`examples` are encoded ones, batch dimension 1 each; `pad` is the padding token."""
        self.examples, self.pad = examples, pad

    @cached_property
    def blank(self) -> dict[str, Tensor]:
        """The first example with a picture, if any has one, without its labels."""
        first = next(filter(pictured, self.examples), self.examples[0])
        return {**first, "labels": torch.full_like(first["labels"], IGNORED)}

    def __len__(self) -> int:
        """The number of examples; the blank is one more."""
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, Tensor]:  # type: ignore[override]
        """One example, or the blank."""
        return self.blank if number == len(self.examples) else self.examples[number]

    def collate(self, batch: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One batch; of several processes each has a picture in it, or none ever has."""
        if distributed.size() > 1 and pictured(self.blank) and not any(map(pictured, batch)):
            batch = [*batch, self.blank]
        return collate(batch, self.pad)
