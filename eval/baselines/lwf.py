"""LwF (arXiv 1606.09282): answers stay close to those of the model before the task.

A language model has no heads of single tasks to preserve. Distilled are the next-token
distributions of the model before the task, on the new task's own images and texts.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainingArguments

from eval.baselines.baseline import Baseline, Strength
from mm_piece.data import IGNORE_INDEX


class LwF(Baseline):
    """Baseline with the penalty `strength` times the KL divergence at `temperature`, on answers."""

    def __init__(
        self,
        *args: Any,
        strength: Strength = 1.0,
        temperature: Strength = 2.0,
    ) -> None:
        super().__init__(*args)
        self.strength = strength
        self.temperature = temperature

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Train beside a copy of the model as it is now."""
        teacher = deepcopy(self.model)
        self.teacher = teacher.requires_grad_(False).eval()
        super().learn_task(number, args)

    def compute_penalty(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        logits: Tensor,
    ) -> Tensor:
        """Return how far the answers' distributions went from the copy's."""
        with torch.no_grad():
            before = self.teacher(**inputs).logits

        # logits at t predict token t + 1; supervised tokens are the answers'
        answers = inputs["labels"][:, 1:] != IGNORE_INDEX
        log_distributions = []
        for given in (logits, before):
            selected = given[:, :-1][answers]  # (tokens, vocabulary)
            scaled = selected.float() / self.temperature
            log_distributions.append(F.log_softmax(scaled, dim=-1))

        now, then = log_distributions
        divergence = F.kl_div(now, then, log_target=True, reduction="batchmean")
        # times T²: gradients of softened targets shrink with 1 / T² (Hinton et al. 2015)
        return self.strength * self.temperature**2 * divergence
