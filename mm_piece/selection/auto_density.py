"""Automatic density: entries are chosen as long as one adds over half of the mean of those chosen.

This is a diagonal second-order model. Optimizers of Adam's kind move every chosen entry by about
the same step s. Choosing the k entries with the highest amplitudes a_1 ≥ a_2 ≥ … then lowers the
task's loss by s · A_k, with A_k = a_1 + … + a_k, at a price of ½ c s² for every entry that moves
off what earlier tasks rely on: in all s · A_k - ½ k c s². The best step, s = A_k / (c k), leaves
A_k² / (2 c k). The k at which this is highest does not depend on c.
"""

import torch
from torch import Tensor


def count_auto_selected(
    scores: Tensor,
    squares: bool,
) -> int:
    """Return how many of the highest scores to choose, at least one.

    The scores are fp32, in any order; with `squares` they are squares of the amplitudes.
    """
    amplitudes = scores.double().clamp(min=0)
    amplitudes = amplitudes.sort(descending=True).values
    if squares:
        amplitudes = amplitudes.sqrt()

    sums = amplitudes.cumsum(0)  # A_k
    num_scores = len(sums)
    counts = torch.arange(1, num_scores + 1)  # k
    gains = sums**2 / counts  # up to the factor 1 / (2 c), which moves no maximum
    best = int(gains.argmax())
    return best + 1  # from an index to a number of scores
