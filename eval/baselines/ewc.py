"""EWC (arXiv 1612.00796): a quadratic penalty on moving weights that matter to earlier tasks.

What matters is measured by the diagonal empirical Fisher information of a task's own rows, images
included, example by example. It is summed over tasks, and the penalty is centred where the last
task ended (online EWC, arXiv 1805.06370, without decay).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from eval.baselines.baseline import Baseline, Count, Strength
from mm_piece import importance
from mm_piece.data import EncodedList, LengthGroupedBatches
from mm_piece.families import weights


class Ewc(Baseline):
    """Baseline with the penalty `strength` / 2 times the sum of F (w - w*) ** 2."""

    def __init__(self, *args: Any, strength: Strength, samples: Count = 250) -> None:
        """`samples`: how many rows of a task its Fisher is estimated on."""
        super().__init__(*args)
        self.strength = strength
        self.samples = samples
        self.fisher: dict[str, Tensor] = {}
        self.anchor_weights: dict[str, Tensor] = {}

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Train on the task, then add its Fisher."""
        super().learn_task(number, args)

        examples = self.tasks[number]
        generator = torch.manual_seed(number)
        order = torch.randperm(len(examples), generator=generator)
        sampled = [examples[place] for place in order[: self.samples].tolist()]
        batches = LengthGroupedBatches(EncodedList(sampled, self.pad), 8)

        estimated = importance.estimate(self.model, batches)
        for name, found in estimated.items():
            before = self.fisher.get(name, torch.zeros(()))
            self.fisher[name] = before + found

        self.anchor_weights = {}
        for name, weight in weights(self.model).items():
            self.anchor_weights[name] = weight.detach().clone()

    def compute_penalty(
        self, model: Any, inputs: dict[str, Tensor], logits: Tensor
    ) -> Tensor | float:
        """Return the penalty on the distance from the weights that the last task left."""
        named = weights(model)
        total = 0
        for name, fisher in self.fisher.items():
            moved = named[name] - self.anchor_weights[name]
            total = total + (fisher * moved.square()).sum()
        return self.strength / 2 * total
