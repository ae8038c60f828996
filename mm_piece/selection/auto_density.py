"""`density: auto`: where a further entry adds less than half of what the chosen ones do.

A diagonal second-order model. Optimizers of Adam's kind move every chosen entry by about the same
step s, so that choosing the k highest amplitudes a_1 ≥ a_2 ≥ … lowers the task's loss by
s · A_k, with A_k their sum, at a price of ½ c s² for every entry that is moved off what earlier
tasks rely on. With the best step, s = A_k / (c k), what is left is A_k² / (2 c k). Its maximum does
not depend on c: entries are taken as long as the next one exceeds half the mean of those taken.
"""

import torch
from torch import Tensor


def count_auto_selected(scores: Tensor, squares: bool) -> int:
    """How many of the highest scores to take, at least one; any order, fp32.

    `squares`: the scores are squares of amplitudes.
    """
    amplitudes = scores.double().clamp(min=0).sort(descending=True).values
    if squares:
        amplitudes = amplitudes.sqrt()
    gain = amplitudes.cumsum(0)
    return int((gain**2 / torch.arange(1, len(gain) + 1)).argmax()) + 1
