"""One backward pass: a batch's single examples, their loss, and the gradients of the weights.

Each weight's gradient is handed over and freed as soon as it is complete. All gradients at once
would take as much memory as a second model.
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
IGNORE_INDEX = -100  # the label of a token that is not supervised
Objective = Callable[[nn.Module, Batch], Tensor]  # a mean over a batch's answer tokens


def find_patchable_names(
    model: nn.Module,
    batches: Sequence[Batch],
    exclude: Sequence[str] = (),
) -> list[str]:
    """Return the published names of the weights that receive a gradient, in model order.

    Weights of the groups in `exclude` are left out. One backward pass for each kind of batch (with
    images, without) decides: a weight that receives no gradient from any kind can never train.
    """
    batch_by_kind = {frozenset(batch): batch for batch in batches}
    model_weights = weights(model)
    trainable_names: set[str] = set()

    def add_name(name: str, _: Tensor) -> None:
        trainable_names.add(name)

    with (
        frozen_model(model),
        collecting_gradients(model_weights, add_name),
    ):
        for batch in batch_by_kind.values():
            example = next(iter_examples(batch))
            loss = loss_of(model, example)
            loss.backward()

    found = []
    for name in model_weights:
        if name in trainable_names and group_of(name) not in exclude:
            found.append(name)
    return found


@contextmanager
def frozen_model(model: nn.Module) -> Iterator[None]:
    """Keep the model in evaluation mode and every weight frozen while the block runs.

    Gradients, flags and modes are put back afterwards.
    """
    # torch's attention layers have a fused fast path. It calls none of their submodules, so that
    # no hook sees these; and whether torch takes it, and so how the results round, depends on
    # which weights require a gradient.
    was_fastpath_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)

    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval().requires_grad_(False)

    # Layers with gradient checkpointing recompute their activations in training mode only. They go
    # on doing so, or memory would run out. The flag is set without `train()`, which would reach
    # their submodules: dropout in there must stay off.
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))

    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(was_fastpath_enabled)
        # ZeRO-3 leaves weights gathered after a backward pass that no step follows.
        repartition(model)


@contextmanager
def collecting_gradients(
    named: Mapping[str, nn.Parameter],
    on_gradient: Callable[[str, Tensor], object],
) -> Iterator[None]:
    """Keep these weights differentiable, and their gradients short-lived, while the block runs.

    A backward pass calls `on_gradient(name, gradient)` once for each weight, when its gradient is
    complete: a weight that is tied or used twice has one, the sum. It is freed right after.
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
        handle = weight.register_post_accumulate_grad_hook(make_hook(name))
        handles.append(handle)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight in named.values():
            weight.requires_grad_(False)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a batch, which is moved to the model's device.

    Raises SelectionError if the model does not take the batch or gives no loss.
    """
    try:
        with translate_errors():
            inputs = to_model_device(batch, model)
            loss = model(**inputs).loss
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but no fault of the batch
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        reason = format_value(error, 200)
        raise SelectionError(f"the model does not take a batch: {reason}") from error
    if loss is None:
        raise SelectionError(f"a batch of {', '.join(batch)} has no loss: it needs `labels`")
    return loss


def to_model_device(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """Return a batch with its tensors on the model's device."""
    device = next(model.parameters()).device
    moved: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            value = value.to(device)
        moved[key] = value
    return moved


def iter_examples(batch: Batch) -> Iterator[Batch]:
    """Iterate over the examples of a batch, each of them a batch of one.

    What is no tensor goes to each of them. Raises SelectionError unless all tensors of the batch
    agree on their first dimension.
    """
    labels = batch.get("labels")
    size = len(labels) if isinstance(labels, Tensor) else 1
    if size == 1:
        yield batch  # as it is: image patches may be packed along the first dimension
        return

    for key, value in batch.items():
        if isinstance(value, Tensor) and len(value) != size:
            raise SelectionError(
                f"a batch of {size} examples holds {len(value)} {key}; give batches of one example"
            )

    for row in range(size):
        example = dict(batch)
        for key, value in batch.items():
            if isinstance(value, Tensor):
                example[key] = value[row : row + 1]
        yield example
