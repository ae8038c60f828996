"""Several examples in one pass: which modules keep them apart, and their gradients.

A module is batch-separable if it does to a batch what it does to its examples one after the other.
Then the rows of its output's gradient belong to one example each. A trial run finds these modules;
nothing needs to be known about their code.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_piece.importance.accumulators import GradientSums
from mm_piece.importance.backward import (
    IGNORE_INDEX,
    Batch,
    iter_examples,
    loss_of,
)
from mm_piece.importance.hooks import (
    ModuleCall,
    ModuleObserver,
    Observation,
)

_TOLERANCE = 1e-2  # relative: sums in bf16 differ by less, another example's values by far more

# Of each batch-separable module: which of its input tensors are split by the examples. The others
# (position ids of one row, a shared mask) are the same for all of them.
SeparableModules = dict[nn.Module, tuple[bool, ...]]


class Recompute(ModuleObserver):
    """Weights whose gradients come from running their module again, example by example.

    Let f be the module, x_n the inputs of example n and G_n the gradient of its output f(x_n; w).
    By the chain rule g_n = (df(x_n; w)/dw)^T G_n, a vector-Jacobian product. In the batch's own
    graph autograd would sum it over the examples; a small graph of f(x_n; w) alone gives it for
    one. It costs one more forward pass of the module, and no formula for it.
    """

    def __init__(
        self,
        module: nn.Module,
        split_flags: Sequence[bool],
        named: Mapping[str, nn.Parameter],
        sums: GradientSums,
        observation: Observation,
    ) -> None:
        """`split_flags`: as in SeparableModules; `named`: the weights, anywhere in the module."""
        super().__init__(named, module, sums)
        self.split_flags = split_flags
        self.parameters = list(named.values())
        self.observation = observation

    def add_gradients(self, call: ModuleCall, gradient: Tensor) -> None:
        num_examples = len(self.scales)
        example_gradients = gradient.chunk(num_examples)

        for number, scale in enumerate(self.scales):
            example_tensors = []
            for tensor, is_split in zip(call.tensors, self.split_flags, strict=True):
                if is_split:
                    tensor = tensor.chunk(num_examples)[number]
                example_tensors.append(tensor.detach())

            found = self._recompute_gradients(
                call,
                example_tensors,
                example_gradients[number],
            )
            for name, weight_gradient in zip(self.names, found, strict=True):
                if weight_gradient is not None:
                    scaled = weight_gradient * scale
                    self.sums.add_gradient(name, 0, scaled)

    def _recompute_gradients(
        self,
        call: ModuleCall,
        tensors: Sequence[Tensor],
        gradient: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Return the weights' gradients for one example; None for a weight that it does not use.

        Observers of modules inside this one pause: they have seen this call in the batch's pass.
        """
        with (
            self.observation.paused_observation(),
            torch.enable_grad(),
            _requiring_gradients(self.parameters),
        ):
            output = call.rerun_module(self.module, tensors)
            return torch.autograd.grad(
                output,
                self.parameters,
                grad_outputs=gradient,
                allow_unused=True,  # an expert that none of the example's tokens is routed to
            )


def scales_of(batch: Batch) -> list[float]:
    """Return for each example what its share of the batch's gradient is to be multiplied by.

    With T_n answer tokens in example n and T in all, the batch's loss is sum_n (T_n / T) L_n, so
    the scales are T / T_n. An example without answer tokens adds zeros, whatever its scale.
    """
    # The first label is never predicted: no token stands before it.
    is_answer = batch["labels"][:, 1:] != IGNORE_INDEX
    counts = is_answer.sum(1)  # (examples,)
    total = counts.sum()
    scales = total / counts.clamp(min=1)
    return scales.tolist()


@torch.no_grad()
def find_separable_modules(model: nn.Module, batch: Batch) -> SeparableModules:
    """Return the modules that keep the examples of this batch apart.

    The batch runs once as a whole and once example by example. A module counts if it runs once in
    each of these passes and its tensors in the batch are those of the examples, one after the
    other. None counts if the loss is not the mean over all answer tokens: scales would be wrong.
    """
    examples = list(iter_examples(batch))
    batch_calls, batch_loss = _record_calls(model, batch, len(examples))
    example_runs = [_record_calls(model, example, 1) for example in examples]

    # L = sum_n L_n / scale_n must hold.
    scales = scales_of(batch)
    loss_shares = []
    for (_, example_loss), scale in zip(example_runs, scales, strict=True):
        loss_shares.append(example_loss / scale)
    if not _is_close(batch_loss, sum(loss_shares)):
        return {}

    found: SeparableModules = {}
    for module, calls in batch_calls.items():
        all_calls = [calls]
        for example_calls, _ in example_runs:
            all_calls.append(example_calls.get(module, []))

        # Two calls show two terms of a gradient, whose sum is to be squared: see `per_example`.
        if any(len(calls) != 1 for calls in all_calls):
            continue

        batch_call, *per_example = [calls[0] for calls in all_calls]
        split_flags = _find_split_tensors(batch_call, *per_example)
        if not split_flags:
            continue

        *input_flags, is_output_split = split_flags
        if is_output_split:
            found[module] = tuple(input_flags)
    return found


_Summary = tuple[int, float]  # first dimension and norm of a tensor


@dataclass(frozen=True)
class _TensorSummary:
    """Summaries of a tensor and of the pieces that each example would get.

    Two numbers stand for a tensor, so that a trial run holds no activations.
    """

    full: _Summary
    pieces: list[_Summary]  # empty if the first dimension cannot be divided

    @classmethod
    def from_tensor(cls, tensor: Tensor, size: int) -> "_TensorSummary":
        """Summarise a tensor, whose pieces are for `size` examples."""
        num_rows = len(tensor) if tensor.dim() else 0
        full = (num_rows, _norm_of(tensor))
        if num_rows == 0 or num_rows % size != 0:
            return cls(full, [])

        pieces = []
        for chunk in tensor.chunk(size):
            pieces.append((len(chunk), _norm_of(chunk)))
        return cls(full, pieces)


# Of each module and each of its calls: the tensors that went in, and the output as the last.
_Calls = dict[nn.Module, list[list[_TensorSummary]]]


def _record_calls(
    model: nn.Module,
    batch: Batch,
    size: int,
) -> tuple[_Calls, float]:
    """Return the calls of every module during a forward pass, and the loss.

    A call is empty, and so its module not separable, unless its only output is a tensor and no
    tensor hides in a tuple or a list.
    """
    calls: _Calls = {}

    def record_call(
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        out: object,
    ) -> None:
        inputs = [*args, *kwargs.values()]
        has_nested = any(isinstance(value, tuple | list) for value in inputs)

        summaries: list[_TensorSummary] = []
        if isinstance(out, Tensor) and not has_nested:
            for value in (*inputs, out):
                if isinstance(value, Tensor):
                    summary = _TensorSummary.from_tensor(value, size)
                    summaries.append(summary)

        calls_of_module = calls.setdefault(module, [])
        calls_of_module.append(summaries)

    handles = []
    for module in model.modules():
        handle = module.register_forward_hook(record_call, with_kwargs=True)
        handles.append(handle)
    try:
        loss = loss_of(model, batch)
        return calls, float(loss)
    finally:
        for handle in handles:
            handle.remove()


def _find_split_tensors(
    batched: list[_TensorSummary], *per_example: list[_TensorSummary]
) -> tuple[bool, ...]:
    """Return for each tensor of a call whether it is split by the examples, or shared by them.

    `per_example`: the same module's calls for each example. Empty if a tensor is neither.
    """
    if any(len(summaries) != len(batched) for summaries in per_example):
        return ()

    split_flags = []
    for number, in_batch in enumerate(batched):
        alone = [summaries[number].full for summaries in per_example]

        is_split = False
        if len(in_batch.pieces) == len(alone):
            is_split = all(map(_is_same_summary, in_batch.pieces, alone))
        if not is_split:
            is_shared = all(_is_same_summary(in_batch.full, summary) for summary in alone)
            if not is_shared:
                return ()

        split_flags.append(is_split)
    return tuple(split_flags)


def _norm_of(tensor: Tensor) -> float:
    norm = torch.linalg.vector_norm(tensor.float())
    return float(norm)


def _is_same_summary(one: _Summary, other: _Summary) -> bool:
    num_rows, norm = one
    other_rows, other_norm = other
    return num_rows == other_rows and _is_close(norm, other_norm)


def _is_close(one: float, other: float) -> bool:
    largest = max(abs(one), abs(other))
    return abs(one - other) <= _TOLERANCE * largest


@contextmanager
def _requiring_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep otherwise frozen weights differentiable while the block runs."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
