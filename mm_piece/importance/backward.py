"""What a backward pass needs and reaches: single examples, their loss, the weights with a gradient.

Gradients are looked at one weight at a time and freed at once, so that they never stand beside each
other as a second model would.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.distributed import repartition, translate_errors
from mm_piece.errors import SelectionError, format_value
from mm_piece.families import group_of, weights

Batch = Mapping[str, Any]  # what the model's forward takes, labels included
IGNORE_INDEX = -100  # the label of what is not supervised
Objective = Callable[[nn.Module, Batch], Tensor]  # a mean over a batch's answer tokens


def find_patchable_names(
    model: nn.Module, batches: Sequence[Batch], exclude: Sequence[str] = ()
) -> list[str]:
    """Published names of the weights that receive a gradient, in model order, less excluded groups.

    One backward pass per kind of batch (with and without images): what is not reached can never
    train.
    """
    kinds = {frozenset(batch): batch for batch in batches}
    trainable_names: set[str] = set()
    with (
        frozen_model(model),
        collecting_gradients(weights(model), lambda name, _: trainable_names.add(name)),
    ):
        for batch in kinds.values():
            loss_of(model, next(iter_examples(batch))).backward()
    return [
        name for name in weights(model) if name in trainable_names and group_of(name) not in exclude
    ]


@contextmanager
def frozen_model(model: nn.Module) -> Iterator[None]:
    """No weight takes a gradient, evaluation mode; everything is put back afterwards.

    Layers that recompute their activations (gradient checkpointing) go on doing so: what they do
    in training mode is nothing else, as long as what they contain stays in evaluation mode. torch's
    attention layers do not take their fast path: it calls none of their parts, so that nobody could
    watch these, and whether it is taken, and how it rounds, rests on who asks for a gradient.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval().requires_grad_(False)
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    for parameter, _, _ in flags:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fast)
        repartition(model)


@contextmanager
def collecting_gradients(
    named: Mapping[str, nn.Parameter], on_gradient: Callable[[str, Tensor], Any]
) -> Iterator[None]:
    """Weights whose gradients go to `take(name, gradient)` once whole, and no further.

    A tied weight, or one used twice, has one gradient.
    """

    def make_hook(name: str) -> Callable[[Tensor], None]:
        def hand_over_gradient(weight: Tensor) -> None:
            assert weight.grad is not None
            on_gradient(name, weight.grad)
            weight.grad = None

        return hand_over_gradient

    handles = []
    for name, weight in named.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(make_hook(name)))
    try:
        yield
    finally:
        for handle, weight in zip(handles, named.values(), strict=True):
            handle.remove()
            weight.requires_grad_(False)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch, moved to where the model is; SelectionError if it has none."""
    try:
        with translate_errors():
            loss = model(**to_model_device(batch, model)).loss
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise SelectionError(
            f"the model does not take a batch: {format_value(error, 200)}"
        ) from error
    if loss is None:
        raise SelectionError(f"a batch of {', '.join(batch)} has no loss: it needs `labels`")
    return loss


def to_model_device(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """A batch where the model is."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def iter_examples(batch: Batch) -> Iterator[Batch]:
    """The examples of a batch, whose tensors must agree on their first dimension."""
    labels = batch.get("labels")
    size = len(labels) if isinstance(labels, Tensor) else 1
    if size == 1:
        yield batch
        return
    rows = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    if odd := [f"{len(value)} {key}" for key, value in rows.items() if len(value) != size]:
        raise SelectionError(
            f"a batch of {size} examples holds {odd[0]}; give batches of one example"
        )
    for row in range(size):
        yield {key: value[row : row + 1] for key, value in rows.items()}
