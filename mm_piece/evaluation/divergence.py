"""Kullback-Leibler divergence of a model from its base: a measure that needs no right answers.

How much a model forgets follows this divergence (RL's Razor, 2025), which moves before any score
does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.data import (
    IGNORE_INDEX,
    Example,
    collate,
    encode_truncated,
    iter_batches,
)
from mm_piece.data.processor import Processor, pad_token_of, tokenizer_of
from mm_piece.distributed.progress import progress_bar
from mm_piece.evaluation.answers import relabel_examples
from mm_piece.store.attachment import checkout

# The base's distributions of so many examples stay in memory while the model is at `at`.
_EXAMPLES_PER_CHUNK = 64


def measure_divergence(
    model: nn.Module,
    processor: Processor,
    examples: Sequence[Example],
    at: int,
    *,
    max_new_tokens: int = 32,
    max_length: int | None = None,
    batch_size: int = 8,
) -> float:
    """Return KL(base || position `at`) in nats a token, over the base's own greedy answers.

    `load` made `model` from a store. The model is at position `at` afterwards.
    """
    checkout(model, 0)
    relabelled = relabel_examples(
        model,
        processor,
        examples,
        batch_size=batch_size,
        title="base",
        max_new_tokens=max_new_tokens,
        max_length=max_length,
    )
    chunks = [*iter_batches(relabelled, _EXAMPLES_PER_CHUNK)]

    total = 0.0
    num_tokens = 0
    for chunk in progress_bar(chunks, "divergence", "part"):
        batches = _encode_batches(chunk, processor, max_length, batch_size)

        checkout(model, 0)
        base_outputs = [_predict_log_probs(model, batch) for batch in batches]

        checkout(model, at)
        for batch, base_log_probs in zip(batches, base_outputs, strict=True):
            log_probs = _predict_log_probs(model, batch)
            # KL(p || q) = sum of p * (log p - log q) over the vocabulary
            terms = base_log_probs.exp() * (base_log_probs - log_probs)
            token_divergences = terms.sum(-1)  # (tokens,)
            total += float(token_divergences.double().sum())
            num_tokens += len(token_divergences)

    checkout(model, at)
    return total / max(num_tokens, 1)


def _encode_batches(
    examples: Sequence[Example],
    processor: Processor,
    max_length: int | None,
    batch_size: int,
) -> list[dict[str, Tensor]]:
    """Encode examples with their answers, and collate them into batches."""
    # padded positions have no labels, and so do not count
    pad = pad_token_of(tokenizer_of(processor))

    encoded = []
    for example in examples:
        inputs, _ = encode_truncated(example, processor, max_length)
        encoded.append(inputs)
    return [collate(batch, pad) for batch in iter_batches(encoded, batch_size)]


@torch.no_grad()
def _predict_log_probs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the model's log-probabilities at each answer token: (tokens, vocabulary), fp32."""
    moved = {}
    for key, value in inputs.items():
        moved[key] = value.to(model.device)
        if value.is_floating_point():
            moved[key] = moved[key].to(model.dtype)

    # a position predicts the token after it
    logits = model(**moved).logits[:, :-1]  # (batch, length - 1, vocabulary)
    labels = moved["labels"][:, 1:]  # (batch, length - 1)
    answer_logits = logits[labels != IGNORE_INDEX]  # (tokens, vocabulary)
    return answer_logits.float().log_softmax(-1).cpu()
