"""How far a model has gone from its base, whatever it is asked: a gauge without right answers.

What a model forgets follows its Kullback-Leibler divergence from the base (RL's Razor, 2025), which
moves before any score does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.data import IGNORED, Example, batches, collate, fitted, tokenizer_of
from mm_piece.distributed.progress import bar
from mm_piece.evaluation.answers import pad_of, with_own_answers
from mm_piece.store.attachment import checkout

_ROWS = 64  # whose distributions are held before the model moves to its other position


def divergence(
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
    own = with_own_answers(
        model, processor, examples, batch_size=batch_size, title="base", **limits
    )
    total, tokens = 0.0, 0
    for rows in bar([*batches(own, _ROWS)], "divergence", "part"):
        encoded = [fitted(example, processor, max_length)[0] for example in rows]
        parts = [collate(b, pad_of(tokenizer_of(processor))) for b in batches(encoded, batch_size)]
        checkout(model, 0)
        before = [_distributions(model, part) for part in parts]
        checkout(model, at)
        for part, then in zip(parts, before, strict=True):
            apart = (then.exp() * (then - _distributions(model, part))).sum(-1)
            total, tokens = total + float(apart.double().sum()), tokens + len(apart)
    checkout(model, at)
    return total / max(tokens, 1)


@torch.no_grad()
def _distributions(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of the next token (tokens, vocabulary), fp32, before each answer token."""
    moved = {key: value.to(model.device) for key, value in inputs.items()}
    moved = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in moved.items()}
    logits = model(**moved).logits[:, :-1]
    return logits[moved["labels"][:, 1:] != IGNORED].float().log_softmax(-1).cpu()
