"""What `estimate` may be given: a model with its own weights, batches with answers, a memory."""

from collections.abc import Mapping, Sized
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.errors import ModelError, SelectionError, format_value
from mm_piece.families import inner_model, is_transformers, make_translator, weights, why_fixed
from mm_piece.importance.backward import IGNORE_INDEX
from mm_piece.modules import is_intercepted
from mm_piece.sizes import parse_bytes


def require_weights(model: nn.Module) -> None:
    """Raise ModelError unless a model has the weights of its class, as numbers with gradients.

    Adapters (PEFT) and quantisation in place put others where those were; `sparse_tuning` and
    torch.inference_mode() let these have no gradients.
    """
    if torch.is_inference_mode_enabled():
        raise ModelError("torch.inference_mode() allows no gradients; estimate outside of it")
    inner = inner_model(model)
    names = {name for name, _ in inner.named_parameters(remove_duplicate=False)}
    if missing := [name for name in _class_parameter_names(inner) if name not in names]:
        raise ModelError(
            f"{type(inner).__name__} has no {make_translator(inner)(missing[0])}: its layers were "
            "replaced, as by PEFT or by quantisation in place; merge or unload what was put there"
        )
    for name, weight in weights(model).items():
        if reason := why_fixed(weight):
            raise ModelError(f"{name} {reason}")
        if weight.is_inference():
            raise ModelError(f"{name} was made in torch.inference_mode(); load the model outside")
    if is_intercepted(inner):
        raise ModelError("the model is being tuned; leave sparse_tuning before estimating")


def require_batches(batches: Any) -> None:
    """Raise SelectionError unless `batches` can be gone through again and again, with answers."""
    if not isinstance(batches, Sized) or isinstance(batches, Mapping | str | Tensor):
        raise SelectionError(
            "batches must be a list of what the model's forward takes (it is gone through several "
            f"times), not {type(batches).__name__}"
        )
    for number, batch in enumerate(batches):  # type: ignore[arg-type] - what has a length
        if not isinstance(batch, Mapping):
            raise SelectionError(
                f"batch {number} must map names to tensors, not {format_value(batch)}"
            )
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2 and not _has_answers(labels):
            raise SelectionError(f"batch {number}: a row has no answer: none of its labels counts")


def parse_memory(memory: Any) -> int:
    """A number of bytes, which a text says as recipes do (`8GiB`); SelectionError for others."""
    if isinstance(memory, int) and not isinstance(memory, bool):
        return memory
    try:
        return parse_bytes(memory if isinstance(memory, str) else format_value(memory))
    except ValueError as error:
        raise SelectionError(f"memory: {error}") from error


def _has_answers(labels: Tensor) -> bool:
    """Whether there are rows and each has a label to predict: the first token follows nothing."""
    return len(labels) > 0 and bool((labels[:, 1:] != IGNORE_INDEX).any(1).all())


def _class_parameter_names(model: nn.Module) -> list[str]:
    """The parameters that a transformers model was made with; none are known of another module."""
    if not is_transformers(model):
        return []
    with torch.device("meta"):
        made = type(model)(deepcopy(model.config))  # type: ignore[operator]
    return [name for name, _ in made.named_parameters()]
