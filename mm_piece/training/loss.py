"""The loss of a training step: the mean over all answer tokens of the step.

A step may have several batches on several processes. Trainer counts the tokens of them all
(`num_items_in_batch`), and each batch divides its sum by that count.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from mm_piece.data import IGNORE_INDEX


def make_loss_function(smoothing: float) -> Callable[..., Tensor]:
    """Build a loss for Trainer's `compute_loss_func`: cross entropy, label smoothing if any."""
    if not smoothing:
        return _token_mean_loss
    return partial(_smoothed_loss, smoothing)


def _token_mean_loss(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Any = None,
) -> Tensor:
    """Return the loss of families that do not divide by a whole step's tokens themselves."""
    logits = outputs["logits"]
    vocabulary_size = logits.shape[-1]
    return ForCausalLMLoss(logits, labels, vocabulary_size, num_items_in_batch)


def _smoothed_loss(
    smoothing: float,
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Any = None,
) -> Tensor:
    """Return (1 - smoothing) * cross entropy + smoothing * its mean over the vocabulary.

    This is what transformers' LabelSmoother computes, on the labels of the next tokens, for every
    family.
    """
    all_logits = outputs["logits"]
    # a position predicts the token after it
    logits = all_logits[:, :-1]  # (batch, length - 1, vocabulary)
    next_labels = labels[:, 1:].to(all_logits.device)  # (batch, length - 1)

    counted = next_labels != IGNORE_INDEX
    # a softmax in half precision would lose the small probabilities that smoothing averages
    counted_logits = logits[counted].float()  # (tokens, vocabulary)
    negative_log_probs = -torch.log_softmax(counted_logits, dim=-1)
    counted_labels = next_labels[counted][:, None]  # (tokens, 1)

    label_losses = negative_log_probs.gather(1, counted_labels)[:, 0]  # (tokens,)
    uniform_losses = negative_log_probs.mean(dim=-1)  # (tokens,)
    smoothed_losses = (1 - smoothing) * label_losses + smoothing * uniform_losses
    total = smoothed_losses.sum()

    if num_items_in_batch is None:
        return total / counted.sum()
    return total / num_items_in_batch
