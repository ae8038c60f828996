"""A-GEM (arXiv 1812.00420): a step may not raise the loss on a memory of earlier tasks.

Where the step's gradient points against that of a batch from memory, the part that does is removed.
"""

import random
from typing import Any

import torch
from transformers import TrainingArguments

from eval.baselines.replay import Replay


class AGem(Replay):
    """Keeps a share of the rows of earlier tasks, like replay, and trains on none of them."""

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Train on the task alone, beside the memory of the earlier ones."""
        self.memory = [example for memory in self.task_memories[:number] for example in memory]
        self.sampler, self.memory_batch_size = (
            random.Random(number),
            args.per_device_train_batch_size,
        )
        self.model.requires_grad_(True)
        self.train(self.model, self.tasks[number], args)

    def adjust_gradients(self, model: Any) -> None:
        """Remove from the gradients what would raise the loss on a batch from memory."""
        if not self.memory:
            return
        trained = [weight for weight in model.parameters() if weight.grad is not None]
        step = [weight.grad for weight in trained]
        model.zero_grad()
        sampled = self.sampler.sample(self.memory, min(self.memory_batch_size, len(self.memory)))
        model(**self.collate_batch(sampled)).loss.backward()
        memory_gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in trained]
        along = sum(float((g * k).sum()) for g, k in zip(step, memory_gradients, strict=True))
        norm = sum(float(k.square().sum()) for k in memory_gradients)
        for weight, g, k in zip(trained, step, memory_gradients, strict=True):
            weight.grad = g - along / norm * k if along < 0 < norm else g
