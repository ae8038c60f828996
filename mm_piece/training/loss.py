"""The loss of a step: the mean over the tokens of its answers, on however many processes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from mm_piece.data import IGNORE_INDEX


def make_loss_function(smoothing: float) -> Callable[..., Tensor]:
    """A loss for Trainer's `compute_loss_func`: cross entropy, with label smoothing if any."""
    return partial(_smoothed_loss, smoothing) if smoothing else _token_mean_loss


def _token_mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The loss of families that would not divide by a whole step's tokens themselves."""
    logits = outputs["logits"]
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch)


def _smoothed_loss(
    smoothing: float, outputs: Any, labels: Tensor, num_items_in_batch: Any = None
) -> Tensor:
    """(1 - smoothing) * cross entropy + smoothing * its mean over the vocabulary, per token.

    What transformers' LabelSmoother has, on the labels of the next tokens, whatever the family.
    """
    logits, following = outputs["logits"][:, :-1], labels[:, 1:].to(outputs["logits"].device)
    counted = following != IGNORE_INDEX
    negative_log_probs = -torch.log_softmax(logits[counted].float(), dim=-1)  # (tokens, vocabulary)

    label_losses = negative_log_probs.gather(1, following[counted][:, None])[:, 0]
    total = ((1 - smoothing) * label_losses + smoothing * negative_log_probs.mean(dim=-1)).sum()
    return total / (counted.sum() if num_items_in_batch is None else num_items_in_batch)
