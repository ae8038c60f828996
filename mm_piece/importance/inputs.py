"""What `estimate` accepts: a model with its own weights, batches with answers, a memory budget."""

from collections.abc import Mapping, Sized
from copy import deepcopy

import torch
from torch import Tensor, nn

from mm_piece.errors import (
    ModelError,
    SelectionError,
    format_value,
)
from mm_piece.families import (
    inner_model,
    is_transformers,
    make_translator,
    weights,
    why_fixed,
)
from mm_piece.importance.backward import IGNORE_INDEX
from mm_piece.modules import is_intercepted
from mm_piece.sizes import parse_bytes


def require_weights(model: nn.Module) -> None:
    """Raise ModelError unless a model has the weights of its class, as numbers with gradients.

    Adapters (PEFT) and quantisation in place replace these weights by others. `sparse_tuning` and
    torch.inference_mode() let them have no gradients.
    """
    if torch.is_inference_mode_enabled():
        raise ModelError("torch.inference_mode() allows no gradients; estimate outside of it")

    # With duplicates: a tied weight is there under each of its names.
    inner = inner_model(model)
    names = {name for name, _ in inner.named_parameters(remove_duplicate=False)}
    missing = [name for name in _class_parameter_names(inner) if name not in names]
    if missing:
        translate = make_translator(inner)
        raise ModelError(
            f"{type(inner).__name__} has no {translate(missing[0])}: its layers were "
            "replaced, as by PEFT or by quantisation in place; merge or unload what was put there"
        )

    for name, weight in weights(model).items():
        reason = why_fixed(weight)
        if reason:
            raise ModelError(f"{name} {reason}")
        if weight.is_inference():
            raise ModelError(f"{name} was made in torch.inference_mode(); load the model outside")

    if is_intercepted(inner):
        raise ModelError("the model is being tuned; leave sparse_tuning before estimating")


def require_batches(batches: object) -> None:
    """Raise SelectionError unless `batches` can be iterated repeatedly, and all have answers."""
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


def parse_memory(memory: object) -> int:
    """Return a number of bytes, given as such or as in recipes (`8GiB`).

    Raises SelectionError for anything else.
    """
    if isinstance(memory, int) and not isinstance(memory, bool):
        return memory

    text = memory if isinstance(memory, str) else format_value(memory)
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise SelectionError(f"memory: {error}") from error


def _has_answers(labels: Tensor) -> bool:
    """Return whether there are rows and each of them has a label to predict."""
    if len(labels) == 0:
        return False

    # The first label is never predicted: no token stands before it.
    is_answer = labels[:, 1:] != IGNORE_INDEX
    return bool(is_answer.any(1).all())


def _class_parameter_names(model: nn.Module) -> list[str]:
    """Return the parameters that a transformers model's class makes; none for other modules."""
    if not is_transformers(model):
        return []

    # On the meta device a model takes no memory.
    config = deepcopy(model.config)
    with torch.device("meta"):
        made = type(model)(config)
    return [name for name, _ in made.named_parameters()]
