"""A-GEM (arXiv 1812.00420): a step may not raise the loss on a memory of earlier tasks.

Where a step's gradient g points against the gradient k of a batch from memory (g·k < 0), A-GEM
removes the component along k.
"""

import random
from typing import Any

import torch
from transformers import TrainingArguments

from eval.baselines.replay import Replay


class AGem(Replay):
    """Baseline that stores earlier tasks' rows, like replay, but never trains on them."""

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Train on the task alone, beside the memory of the earlier ones."""
        self.memory = [example for memory in self.task_memories[:number] for example in memory]
        self.sampler = random.Random(number)
        self.memory_batch_size = args.per_device_train_batch_size
        self.model.requires_grad_(True)
        self.train(self.model, self.tasks[number], args)

    def adjust_gradients(self, model: Any) -> None:
        """Remove from the gradients what would raise the loss on a batch from memory."""
        if not self.memory:
            return

        trained = []
        step_gradients = []
        for weight in model.parameters():
            if weight.grad is not None:
                trained.append(weight)
                step_gradients.append(weight.grad)

        # the model's gradients become those of the memory's loss
        model.zero_grad()
        size = min(self.memory_batch_size, len(self.memory))
        sampled = self.sampler.sample(self.memory, size)
        batch = self.collate_batch(sampled)
        model(**batch).loss.backward()
        memory_gradients = []
        for weight in trained:
            gradient = weight.grad
            if gradient is None:
                gradient = torch.zeros_like(weight)
            memory_gradients.append(gradient)

        along = 0
        norm = 0
        for g, k in zip(step_gradients, memory_gradients, strict=True):
            along += float((g * k).sum())
            norm += float(k.square().sum())

        # eq. 11: g - (g·k / k·k) k, over all weights as one vector
        conflicts = along < 0 < norm
        for weight, g, k in zip(trained, step_gradients, memory_gradients, strict=True):
            weight.grad = g - along / norm * k if conflicts else g
