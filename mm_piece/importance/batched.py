"""Several examples in one pass: which modules keep them apart, found by looking.

A module carries a batch if what it is given for the batch is what it is given for the examples, one
after the other, and if so is its output. Then the rows of its output's gradient belong to one
example each. A weight without such a module sees its batches taken apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.importance.accumulators import GradientSums
from mm_piece.importance.backward import IGNORE_INDEX, Batch, iter_examples, loss_of
from mm_piece.importance.hooks import ModuleCall, ModuleObserver, Observation

_TOLERANCE = 1e-2  # relative: sums in bf16 differ by less, another example's values by far more


SeparableModules = dict[
    nn.Module, tuple[bool, ...]
]  # of its tensors, which ones are cut by the examples


class Recompute(ModuleObserver):
    """Weights whose gradients come from running their module again, example by example."""

    def __init__(
        self,
        module: nn.Module,
        split_flags: Sequence[bool],
        named: Mapping[str, nn.Parameter],
        sums: GradientSums,
        observation: Observation,
    ) -> None:
        super().__init__(named, module, sums)
        self.split_flags, self.parameters, self.observation = (
            split_flags,
            [*named.values()],
            observation,
        )

    def add_gradients(self, call: ModuleCall, gradient: Tensor) -> None:
        size = len(self.scales)
        for number, scale in enumerate(self.scales):
            given = [
                (tensor.chunk(size)[number] if is_split else tensor).detach()
                for tensor, is_split in zip(call.tensors, self.split_flags, strict=True)
            ]
            found = self._recompute_gradients(call, given, gradient.chunk(size)[number])
            for name, weight_gradient in zip(self.names, found, strict=True):
                if weight_gradient is not None:
                    self.sums.add_gradient(name, 0, weight_gradient * scale)

    def _recompute_gradients(
        self, call: ModuleCall, given: Sequence[Tensor], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The weights' gradients for one example; other watchers inside the module look away."""
        with (
            self.observation.paused_observation(),
            torch.enable_grad(),
            _requiring_gradients(self.parameters),
        ):
            output = call.rerun_module(self.module, given)
            return torch.autograd.grad(output, self.parameters, gradient, allow_unused=True)


def scales_of(batch: Batch) -> list[float]:
    """What takes each example's share of the batch's mean loss to its own mean loss."""
    answered = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1)
    return (answered.sum() / answered.clamp(min=1)).tolist()


@torch.no_grad()
def find_separable_modules(model: nn.Module, batch: Batch) -> SeparableModules:
    """The modules that carry this batch; none if its loss is not the mean over answers' tokens."""
    examples = list(iter_examples(batch))
    batch_calls, loss = _record_calls(model, batch, len(examples))
    example_runs = [_record_calls(model, example, 1) for example in examples]
    shares = [
        example_loss / scale
        for (_, example_loss), scale in zip(example_runs, scales_of(batch), strict=True)
    ]
    if not _is_close(loss, sum(shares)):
        return {}
    found = {}
    for module, calls in batch_calls.items():
        all_calls = [calls, *(example_calls.get(module, []) for example_calls, _ in example_runs)]
        if all(len(calls) == 1 for calls in all_calls):
            split_flags = _find_split_tensors(*(calls[0] for calls in all_calls))
            if split_flags and split_flags[-1]:  # the output is cut too
                found[module] = split_flags[:-1]
    return found


@dataclass(frozen=True)
class _TensorSummary:
    """First dimension and norm of a tensor, and of the parts that each example would get."""

    full: tuple[int, float]
    pieces: list[tuple[int, float]]

    @classmethod
    def from_tensor(cls, tensor: Tensor, size: int) -> "_TensorSummary":
        rows = len(tensor) if tensor.dim() else 0
        chunks = tensor.chunk(size) if rows and rows % size == 0 else ()
        return cls((rows, _norm_of(tensor)), [(len(chunk), _norm_of(chunk)) for chunk in chunks])


_Calls = dict[
    nn.Module, list[list[_TensorSummary]]
]  # per module and call: its tensors, the output last


def _record_calls(model: nn.Module, batch: Batch, size: int) -> tuple[_Calls, float]:
    """What every module was called with and gave, and the loss."""
    calls: _Calls = {}

    def record_call(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        values = (*args, *kwargs.values())
        plain = isinstance(out, Tensor) and not any(isinstance(v, tuple | list) for v in values)
        tensors = [v for v in (*values, out) if isinstance(v, Tensor)] if plain else []
        calls.setdefault(module, []).append(
            [_TensorSummary.from_tensor(tensor, size) for tensor in tensors]
        )

    handles = [m.register_forward_hook(record_call, with_kwargs=True) for m in model.modules()]
    try:
        return calls, float(loss_of(model, batch))
    finally:
        for handle in handles:
            handle.remove()


def _find_split_tensors(
    batched: list[_TensorSummary], *per_example: list[_TensorSummary]
) -> tuple[bool, ...]:
    """For each tensor whether it is cut (or shared) by the examples; empty if one is neither."""
    if any(len(tensors) != len(batched) for tensors in per_example):
        return ()
    split_flags = []
    for number, summary in enumerate(batched):
        example_summaries = [tensors[number].full for tensors in per_example]
        is_split = len(summary.pieces) == len(example_summaries) and all(
            map(_is_same_summary, summary.pieces, example_summaries)
        )
        if not is_split and not all(
            _is_same_summary(summary.full, example_summary) for example_summary in example_summaries
        ):
            return ()
        split_flags.append(is_split)
    return tuple(split_flags)


def _norm_of(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.float()))


def _is_same_summary(one: tuple[int, float], other: tuple[int, float]) -> bool:
    return one[0] == other[0] and _is_close(one[1], other[1])


def _is_close(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other))


@contextmanager
def _requiring_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
