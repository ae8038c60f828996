"""The batches of each process, and what fills them up.

All processes together train on what one process alone would: the same examples in the same order,
divided into as many batches. Where batches are unequal, a dummy example fills up: it has nothing to
learn and adds exactly nothing to a gradient. It also joins a batch without images, which would
otherwise leave the vision encoder out of the backward pass on one process only.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from mm_piece import distributed
from mm_piece.data import IGNORE_INDEX, EncodedExamples, collate, has_image


class DistributedBatchSampler:
    """Batches of one process, as numbers of examples."""

    def __init__(
        self,
        num_examples: int,
        examples_per_process: int,
        seed: int,
        drop_last: bool,
    ) -> None:
        """Have each process take `examples_per_process` examples at a time.

        With `drop_last` an epoch leaves out the examples that do not fill a batch of all processes.
        """
        self.num_examples = num_examples
        self.examples_per_process = examples_per_process
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    @property
    def dummy_index(self) -> int:
        """Number of the dummy example: the one after all examples."""
        return self.num_examples

    @property
    def _global_batch_size(self) -> int:
        return self.examples_per_process * distributed.world_size()

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on; every epoch has its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        num_full = self.num_examples // self._global_batch_size
        num_left = self.num_examples % self._global_batch_size
        has_rest = num_left > 0
        if has_rest and not self.drop_last:
            return num_full + 1
        return num_full

    def __iter__(self) -> Iterator[list[int]]:
        # every process draws the same order, so no message is needed to divide it
        random = torch.Generator()
        random.manual_seed(self.seed + self.epoch)
        permutation = torch.randperm(self.num_examples, generator=random)
        order = permutation.tolist()

        global_batch_size = self._global_batch_size
        own_start = distributed.rank() * self.examples_per_process
        own_end = own_start + self.examples_per_process

        for step in range(len(self)):
            start = step * global_batch_size
            global_batch = order[start : start + global_batch_size]
            own_batch = global_batch[own_start:own_end]

            if distributed.world_size() > 1:
                # every process must take part in every step, with a batch of full size
                num_missing = self.examples_per_process - len(own_batch)
                own_batch += [self.dummy_index] * num_missing
            yield own_batch


class PaddedDataset(Sequence[dict[str, Tensor]]):
    """A task's examples, the dummy example at their end, and how they become batches."""

    def __init__(self, examples: EncodedExamples) -> None:
        """Take the examples, without reading any."""
        self.examples = examples

    @cached_property
    def dummy_example(self) -> dict[str, Tensor]:
        """The first example with an image, if any has one, without its labels."""
        example = self.examples[0]
        for position in range(len(self.examples)):
            candidate = self.examples[position]
            if has_image(candidate):
                example = candidate
                break

        no_labels = torch.full_like(example["labels"], IGNORE_INDEX)
        return {**example, "labels": no_labels}

    def __len__(self) -> int:
        """Return the number of examples, without the dummy."""
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, Tensor]:  # type: ignore[override]
        """Return one example, or the dummy for the number after the last."""
        if number == len(self.examples):
            return self.dummy_example
        return self.examples[number]

    def collate(self, batch: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Collate one batch.

        With several processes, every batch has an image if any example of the task has one.
        """
        if distributed.world_size() > 1:
            lacks_image = not any(map(has_image, batch))
            if lacks_image and has_image(self.dummy_example):
                # adds exactly nothing to the loss, and a gradient of zero to the encoder
                batch = [*batch, self.dummy_example]
        return collate(batch, self.examples.pad_token_id)
