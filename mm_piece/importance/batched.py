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

from mm_piece.importance.accumulators import Sums
from mm_piece.importance.backward import IGNORED, Batch, loss_of, singles
from mm_piece.importance.hooks import Call, Observation, Watcher

_CLOSE = 1e-2  # relative: sums in bf16 differ by less, another example's values by far more


Carriers = dict[nn.Module, tuple[bool, ...]]  # of its tensors, which ones are cut by the examples


class Replay(Watcher):
    """Weights whose gradients come from running their module again, example by example."""

    def __init__(
        self,
        module: nn.Module,
        cut: Sequence[bool],
        named: Mapping[str, nn.Parameter],
        sums: Sums,
        observation: Observation,
    ) -> None:
        super().__init__(named, module, sums)
        self.cut, self.parameters, self.observation = cut, [*named.values()], observation

    def add(self, call: Call, gradient: Tensor) -> None:
        size = len(self.scales)
        for number, scale in enumerate(self.scales):
            given = [
                (tensor.chunk(size)[number] if cut else tensor).detach()
                for tensor, cut in zip(call.tensors, self.cut, strict=True)
            ]
            found = self._gradients(call, given, gradient.chunk(size)[number])
            for name, weight_gradient in zip(self.names, found, strict=True):
                if weight_gradient is not None:
                    self.sums.add(name, 0, weight_gradient * scale)

    def _gradients(
        self, call: Call, given: Sequence[Tensor], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The weights' gradients for one example; other watchers inside the module look away."""
        with self.observation.paused(), torch.enable_grad(), _requiring(self.parameters):
            output = call.again(self.module, given)
            return torch.autograd.grad(output, self.parameters, gradient, allow_unused=True)


def scales_of(batch: Batch) -> list[float]:
    """What takes each example's share of the batch's mean loss to its own mean loss."""
    answered = (batch["labels"][:, 1:] != IGNORED).sum(1)
    return (answered.sum() / answered.clamp(min=1)).tolist()


@torch.no_grad()
def carriers(model: nn.Module, batch: Batch) -> Carriers:
    """The modules that carry this batch; none if its loss is not the mean over answers' tokens."""
    apart = list(singles(batch))
    whole, loss = _look(model, batch, len(apart))
    parts = [_look(model, example, 1) for example in apart]
    shares = [part / scale for (_, part), scale in zip(parts, scales_of(batch), strict=True)]
    if not _close(loss, sum(shares)):
        return {}
    found = {}
    for module, calls in whole.items():
        once = [calls, *(calls_alone.get(module, []) for calls_alone, _ in parts)]
        if all(len(calls) == 1 for calls in once):
            cut = _cut(*(calls[0] for calls in once))
            if cut and cut[-1]:  # the output is cut too
                found[module] = cut[:-1]
    return found


@dataclass(frozen=True)
class _Glance:
    """First dimension and norm of a tensor, and of the parts that each example would get."""

    whole: tuple[int, float]
    parts: list[tuple[int, float]]

    @classmethod
    def at(cls, tensor: Tensor, size: int) -> "_Glance":
        rows = len(tensor) if tensor.dim() else 0
        chunks = tensor.chunk(size) if rows and rows % size == 0 else ()
        return cls((rows, _norm(tensor)), [(len(chunk), _norm(chunk)) for chunk in chunks])


_Calls = dict[nn.Module, list[list[_Glance]]]  # per module and call: its tensors, the output last


def _look(model: nn.Module, batch: Batch, size: int) -> tuple[_Calls, float]:
    """What every module was called with and gave, and the loss."""
    calls: _Calls = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        values = (*args, *kwargs.values())
        plain = isinstance(out, Tensor) and not any(isinstance(v, tuple | list) for v in values)
        tensors = [v for v in (*values, out) if isinstance(v, Tensor)] if plain else []
        calls.setdefault(module, []).append([_Glance.at(tensor, size) for tensor in tensors])

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in model.modules()]
    try:
        return calls, float(loss_of(model, batch))
    finally:
        for handle in handles:
            handle.remove()


def _cut(together: list[_Glance], *alone: list[_Glance]) -> tuple[bool, ...]:
    """For each tensor whether it is cut (or shared) by the examples; empty if one is neither."""
    if any(len(tensors) != len(together) for tensors in alone):
        return ()
    kinds = []
    for number, glance in enumerate(together):
        wholes = [tensors[number].whole for tensors in alone]
        cut = len(glance.parts) == len(wholes) and all(map(_same, glance.parts, wholes))
        if not cut and not all(_same(glance.whole, whole) for whole in wholes):
            return ()
        kinds.append(cut)
    return tuple(kinds)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.float()))


def _same(one: tuple[int, float], other: tuple[int, float]) -> bool:
    return one[0] == other[0] and _close(one[1], other[1])


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _CLOSE * max(abs(one), abs(other))


@contextmanager
def _requiring(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
