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
from mm_piece.data import IGNORE_INDEX, collate, has_image


class DistributedBatchSampler:
    """The batches of one process, as numbers of examples; `blank` fills up the last ones."""

    def __init__(
        self, num_examples: int, examples_per_process: int, seed: int, drop_last: bool
    ) -> None:
        """Each process takes `batch` examples at a time; `drop_last` leaves out what is too few."""
        self.num_examples, self.examples_per_process, self.seed, self.drop_last = (
            num_examples,
            examples_per_process,
            seed,
            drop_last,
        )
        self.epoch = 0

    @property
    def dummy_index(self) -> int:
        """The number that stands for no example."""
        return self.num_examples

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has an order of its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        global_batch_size = self.examples_per_process * distributed.world_size()
        return (
            self.num_examples // global_batch_size
            if self.drop_last
            else -(-self.num_examples // global_batch_size)
        )

    def __iter__(self) -> Iterator[list[int]]:
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_examples, generator=random).tolist()
        global_batch_size = self.examples_per_process * distributed.world_size()
        for step in range(len(self)):
            everyone = order[step * global_batch_size : (step + 1) * global_batch_size]
            mine = everyone[distributed.rank() * self.examples_per_process :][
                : self.examples_per_process
            ]
            if distributed.world_size() > 1:
                mine += [self.dummy_index] * (self.examples_per_process - len(mine))
            yield mine


class PaddedDataset(Sequence[dict[str, Tensor]]):
    """A task's examples, the blank at their end, and how they are put into batches."""

    def __init__(self, examples: Sequence[dict[str, Tensor]], pad: int) -> None:
        """`examples` are encoded ones, batch dimension 1 each; `pad` is the padding token."""
        self.examples, self.pad = examples, pad

    @cached_property
    def dummy_example(self) -> dict[str, Tensor]:
        """The first example with a picture, if any has one, without its labels."""
        first = next(filter(has_image, self.examples), self.examples[0])
        return {**first, "labels": torch.full_like(first["labels"], IGNORE_INDEX)}

    def __len__(self) -> int:
        """The number of examples; the blank is one more."""
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, Tensor]:  # type: ignore[override]
        """One example, or the blank."""
        return self.dummy_example if number == len(self.examples) else self.examples[number]

    def collate(self, batch: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One batch; of several processes each has a picture in it, or none ever has."""
        if (
            distributed.world_size() > 1
            and has_image(self.dummy_example)
            and not any(map(has_image, batch))
        ):
            batch = [*batch, self.dummy_example]
        return collate(batch, self.pad)
