"""What a model's answers stand on: how much the lead of each token it would say can be moved.

An answer token changes when its lead, the logit of the token less the highest other one, is used
up. Moves d_i of weights i, independent and with mean zero, change a lead m by sum (dm/dw_i) d_i,
and by Chebyshev's inequality use it up with a probability of at most the sum of
(dm/dw_i / m) ** 2 d_i ** 2. The Fisher of the same token would vanish with the error that is left
(like exp(-2 m)): of a sure answer it says that every weight is free.
"""

from zlib import crc32

import torch
from torch import Tensor, nn

from mm_piece.importance.backward import IGNORE_INDEX, Batch, to_model_device

_MIN_MARGIN = 1.0  # nats: smaller leads count as this one, or a single token would outweigh all


def margin_sensitivity(model: nn.Module, batch: Batch) -> Tensor:
    """A sum whose squared gradient is, in expectation over random signs, the weights' stake.

    For each example the mean over its answer tokens of (dm/dw / max(m, 1)) ** 2; tokens that others
    lead have nothing at stake. Of several examples, by their shares of the answer tokens, as the
    loss has them. The signs depend on the answer alone. Returns a scalar.
    """
    inputs = to_model_device(batch, model)
    labels = inputs.pop("labels")[:, 1:]
    answered = labels != IGNORE_INDEX
    logits = model(**inputs).logits[:, :-1][answered].float()
    tokens = labels[answered].unsqueeze(-1)
    others = logits.scatter(-1, tokens, float("-inf")).amax(-1)
    margins = logits.gather(-1, tokens).squeeze(-1) - others
    inverse_margins = (margins > 0) / margins.detach().clamp(min=_MIN_MARGIN)
    counts = answered.sum(1)
    weights = (counts.clamp(min=1).sqrt() / counts.sum()).repeat_interleave(counts)
    return (_draw_signs(labels, answered).to(margins) * weights * inverse_margins * margins).sum()


def _draw_signs(labels: Tensor, answered: Tensor) -> Tensor:
    """A random sign for each answer token, the same in whatever batch an example stands."""
    found = [torch.empty(0)]
    for row, mask in zip(labels.cpu(), answered.cpu(), strict=True):
        answer = row[mask]
        generator = torch.Generator().manual_seed(crc32(answer.numpy().tobytes()))
        found.append(2.0 * torch.randint(0, 2, answer.shape, generator=generator) - 1)
    return torch.cat(found)
