"""Margin sensitivity: how easily a change of weights changes the tokens that a model answers with.

The logit margin m of an answer token is its logit less the highest other one. The token changes
when m falls to zero. PIECE-R takes a weight's margin sensitivity, the mean over answer tokens of
(dm/dw / m) ** 2, as the importance K of the weight for what the model already does.
"""

from zlib import crc32

import torch
from torch import Tensor, nn

from mm_piece.importance.backward import (
    IGNORE_INDEX,
    Batch,
    to_model_device,
)

# Why (dm/dw / m) ** 2. Let the weights change by d_i, independent of each other and with mean zero.
# To first order a margin then changes by sum_i (dm/dw_i) d_i, with mean zero and with the variance
# sum_i (dm/dw_i) ** 2 E[d_i ** 2]. By Chebyshev's inequality
#     P(the token changes) <= P(|change of m| >= m) <= sum_i (dm/dw_i / m) ** 2 E[d_i ** 2],
# so (dm/dw_i / m) ** 2 is what weight i adds to the bound, for each unit of its squared change.
#
# Why not the Fisher of the same token. Its gradient is that of log p, and with one other token
# d(log p)/dm = 1 - p, about exp(-m). Squared, it vanishes like exp(-2 m): for an answer that the
# model is sure of, the Fisher says that every weight is free to change.
#
# Why random signs. A sum of squared gradients over tokens t would take a backward pass for each
# token. With independent signs s_t = +-1, E[s_t s_u] = 0 for t != u, and so
#     E[(d/dw sum_t s_t a_t m_t) ** 2] = sum_t (a_t dm_t/dw) ** 2.
# The squared gradient of one signed sum is thus an unbiased estimate, in one backward pass
# (Hutchinson's estimator of a diagonal).

_MIN_MARGIN = 1.0  # nats: smaller margins count as this one, or one token would outweigh all


def margin_sensitivity(model: nn.Module, batch: Batch) -> Tensor:
    """Return a scalar whose squared gradient is in expectation each weight's margin sensitivity.

    For one example that is the mean over its answer tokens of (dm/dw / max(m, 1)) ** 2, where
    tokens whose margin is not positive count as zero: the model would not answer with them. A batch
    gives the sum of its examples' scalars, each times its share of the answer tokens, as a loss
    does.
    """
    inputs = to_model_device(batch, model)
    labels = inputs.pop("labels")
    next_tokens = labels[:, 1:]  # the first token follows nothing
    is_answer = next_tokens != IGNORE_INDEX  # (examples, tokens - 1)

    outputs = model(**inputs)
    next_logits = outputs.logits[:, :-1]  # (examples, tokens - 1, vocabulary)
    answer_logits = next_logits[is_answer].float()  # (answer tokens, vocabulary)
    answer_tokens = next_tokens[is_answer]  # (answer tokens,)
    margins = _compute_margins(answer_logits, answer_tokens)

    # The denominator is detached: the gradient of m / m would be zero.
    denominators = margins.detach().clamp(min=_MIN_MARGIN)
    is_leading = margins > 0
    inverse_margins = is_leading / denominators

    # With T_n answer tokens in example n and T in all, a token weighs sqrt(T_n) / T. For an example
    # alone (T_n = T) that is 1 / sqrt(T_n), whose square makes the mean over the tokens. In a batch
    # it is T_n / T of that, a share which `scales_of` makes up for as it does for a loss.
    counts = is_answer.sum(1)  # (examples,)
    roots = counts.clamp(min=1).sqrt()
    total = counts.sum()
    example_weights = roots / total
    token_weights = example_weights.repeat_interleave(counts)

    signs = _draw_signs(next_tokens, is_answer)
    signs = signs.to(margins)
    coefficients = signs * token_weights * inverse_margins
    signed_margins = coefficients * margins
    return signed_margins.sum()


def _compute_margins(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the logit of each token less the highest one of all other tokens.

    `logits` (tokens, vocabulary) and `tokens` (tokens,) are those of the answers.
    """
    columns = tokens.unsqueeze(-1)  # (tokens, 1)
    own = logits.gather(-1, columns)  # (tokens, 1)
    others = logits.scatter(
        -1,
        columns,
        float("-inf"),  # so that a token's own logit is never the highest
    )
    highest_other = others.amax(-1)
    return own.squeeze(-1) - highest_other


def _draw_signs(labels: Tensor, is_answer: Tensor) -> Tensor:
    """Return a random sign for each answer token, in the order of the tokens.

    The seed is a checksum of the answer's own tokens, so that an example has the same signs in
    whatever batch it stands.
    """
    label_rows = labels.cpu()
    masks = is_answer.cpu()
    signs = [torch.empty(0)]  # a batch without answers has none

    for row, mask in zip(label_rows, masks, strict=True):
        answer = row[mask]
        content = answer.numpy().tobytes()
        seed = crc32(content)
        generator = torch.Generator()
        generator.manual_seed(seed)

        bits = torch.randint(
            0,
            2,
            answer.shape,
            generator=generator,
        )
        example_signs = 2.0 * bits - 1  # 0 or 1 to -1 or 1
        signs.append(example_signs)
    return torch.cat(signs)
