"""How far a model has gone from its base, whatever it is asked: a gauge without right answers.

What a model forgets follows its Kullback-Leibler divergence from the base (RL's Razor, 2025), which
moves before any score does.
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
    tokenizer_of,
)
from mm_piece.distributed.progress import progress_bar
from mm_piece.evaluation.answers import pad_token_of, relabel_examples
from mm_piece.store.attachment import checkout

_EXAMPLES_PER_CHUNK = (
    64  # whose distributions are held before the model moves to its other position
)


def measure_divergence(
    model: nn.Module,
    processor: Any,
    examples: Sequence[Example],
    at: int,
    *,
    max_new_tokens: int = 32,
    max_length: int | None = None,
    batch_size: int = 8,
) -> float:
    """KL(base, position `at`) in nats a token, over the base's own greedy answers to the examples.

    `model` was taken from a store by `load`; it stands at `at` afterwards.
    """
    checkout(model, 0)
    limits = {"max_new_tokens": max_new_tokens, "max_length": max_length}
    relabelled = relabel_examples(
        model, processor, examples, batch_size=batch_size, title="base", **limits
    )
    total, tokens = 0.0, 0
    for chunk in progress_bar(
        [*iter_batches(relabelled, _EXAMPLES_PER_CHUNK)], "divergence", "part"
    ):
        encoded = [encode_truncated(example, processor, max_length)[0] for example in chunk]
        chunk_batches = [
            collate(b, pad_token_of(tokenizer_of(processor)))
            for b in iter_batches(encoded, batch_size)
        ]
        checkout(model, 0)
        base_outputs = [_predict_log_probs(model, batch) for batch in chunk_batches]
        checkout(model, at)
        for batch, base_log_probs in zip(chunk_batches, base_outputs, strict=True):
            token_divergence = (
                base_log_probs.exp() * (base_log_probs - _predict_log_probs(model, batch))
            ).sum(-1)
            total, tokens = (
                total + float(token_divergence.double().sum()),
                tokens + len(token_divergence),
            )
    checkout(model, at)
    return total / max(tokens, 1)


@torch.no_grad()
def _predict_log_probs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of the next token (tokens, vocabulary), fp32, before each answer token."""
    moved = {key: value.to(model.device) for key, value in inputs.items()}
    moved = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in moved.items()}
    logits = model(**moved).logits[:, :-1]
    return logits[moved["labels"][:, 1:] != IGNORE_INDEX].float().log_softmax(-1).cpu()
