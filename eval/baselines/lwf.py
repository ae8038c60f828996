"""LwF (arXiv 1606.09282): answers stay close to what the model said before the task.

There are no heads to keep apart in a language model: what is kept are the next-token distributions
of the model as it stood, on the new task's own images and texts.
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
    """The price is `strength` times the KL divergence at `temperature`, over answer tokens."""

    def __init__(self, *args: Any, strength: Strength = 1.0, temperature: Strength = 2.0) -> None:
        super().__init__(*args)
        self.strength, self.temperature = strength, temperature

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Train beside a copy of the model as it stands."""
        self.teacher = deepcopy(self.model).requires_grad_(False).eval()
        super().learn_task(number, args)

    def compute_penalty(self, model: Any, inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
        """How far the answers' distributions went from the copy's."""
        with torch.no_grad():
            before = self.teacher(**inputs).logits
        answers = inputs["labels"][:, 1:] != IGNORE_INDEX
        now, then = (
            F.log_softmax(given[:, :-1][answers].float() / self.temperature, dim=-1)
            for given in (logits, before)
        )
        divergence = F.kl_div(now, then, log_target=True, reduction="batchmean")
        return self.strength * self.temperature**2 * divergence
