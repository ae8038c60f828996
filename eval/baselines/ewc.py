"""EWC (arXiv 1612.00796): a quadratic price on moving what earlier tasks' Fisher holds dear.

The diagonal empirical Fisher of the task's own rows, images included, example by example; summed
over tasks, around where the last one ended (online EWC, arXiv 1805.06370, without decay).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from eval.baselines.baseline import Baseline, Count, Strength
from mm_piece import importance
from mm_piece.data import LengthGroupedBatches
from mm_piece.families import weights


class Ewc(Baseline):
    """The price is `strength` / 2 times the sum of F (w - w*) ** 2."""

    def __init__(self, *args: Any, strength: Strength, samples: Count = 250) -> None:
        """`samples`: how many rows of a task its Fisher is estimated on."""
        super().__init__(*args)
        self.strength, self.samples = strength, samples
        self.fisher: dict[str, Tensor] = {}
        self.anchor_weights: dict[str, Tensor] = {}

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Train on the task, then add its Fisher."""
        super().learn_task(number, args)
        order = torch.randperm(len(self.tasks[number]), generator=torch.manual_seed(number))
        sampled = [self.tasks[number][place] for place in order[: self.samples].tolist()]
        for name, found in importance.estimate(
            self.model, LengthGroupedBatches(sampled, 8, self.pad)
        ).items():
            self.fisher[name] = self.fisher.get(name, torch.zeros(())) + found
        self.anchor_weights = {
            name: weight.detach().clone() for name, weight in weights(self.model).items()
        }

    def compute_penalty(
        self, model: Any, inputs: dict[str, Tensor], logits: Tensor
    ) -> Tensor | float:
        """How far the weights went from where the last task left them."""
        named = weights(model)
        moved = (
            (f * (named[name] - self.anchor_weights[name]).square()).sum()
            for name, f in self.fisher.items()
        )
        return self.strength / 2 * sum(moved)
