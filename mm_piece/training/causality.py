"""Whether a model answers token by token: what it says may not depend on what comes after.

Some families let every token of a question see the whole question, and tell question and answer
apart by an input of their own. Without it an answer would see itself, and training would teach the
model to copy.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.errors import ModelError
from mm_piece.families import has_own_rules, inner_model

_TOLERANCE = 1e-3  # of the largest logit: shapes are the same, so that rounding hardly differs


@torch.no_grad()
def require_causal(model: nn.Module, example: dict[str, Tensor]) -> None:
    """Raise ModelError if what a model says before an example's last token depends on that token.

    `example` is one encoded example with labels, batch dimension 1. Families with rules of our own
    are known to be causal.
    """
    config: Any = inner_model(model).config
    if has_own_rules(config):
        return

    changed_example = dict(example)
    ids = example["input_ids"]  # (1, tokens)
    labels = example["labels"]
    token = _choose_other_token(ids[0], labels[0])
    changed_example["input_ids"] = ids.clone()
    changed_example["input_ids"][0, -1] = token

    was_training = model.training
    model.eval()
    try:
        original = _compute_logits(model, example)
        changed = _compute_logits(model, changed_example)
    finally:
        model.train(was_training)

    # what the last token itself leads to may differ
    difference = original - changed
    before_last = difference[:, :-1]
    largest = before_last.abs().max()
    scale = original.abs().max()
    if largest > _TOLERANCE * scale:
        raise ModelError(
            f"model family {config.model_type!r}: what it says depends on the tokens that follow, "
            "so that an answer would be shown to itself; such families cannot be trained yet"
        )


def _compute_logits(
    model: nn.Module,
    example: dict[str, Tensor],
) -> Tensor:
    """Return the logits of an example, (1, tokens, vocabulary)."""
    device = next(model.parameters()).device
    inputs = {}
    for key, value in example.items():
        inputs[key] = value.to(device)
    return model(**inputs).logits.float()


def _choose_other_token(
    ids: Tensor,
    labels: Tensor,
) -> int:
    """Return a token of a row's answer or question that is not its last one, nor an image's."""
    last = int(ids[-1])
    is_supervised = labels == ids
    supervised = ids[is_supervised]
    for token in torch.cat([supervised, ids]).tolist():
        if token != last:
            return token
    return last
