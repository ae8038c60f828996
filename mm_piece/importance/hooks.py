"""Gradients where they arise, example by example: from a module's inputs and its output's gradient.

The weights stay frozen, so no gradient of the size of the model ever exists. A linear layer's is
computed in blocks of rows, each of which is added to the sums at once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.importance.accumulators import Sums
from mm_piece.modules import Owner, Reader, intercept_reads, is_running, track_calls

_CPU_ROWS = 256  # of a weight's gradient at once; fewer make slow products of few tokens
_GPU_ENTRIES = 2**24  # of a weight's gradient at once: enough to fill an accelerator


class CalledAgain(Exception):
    """A weight is used more than once for one example: no call shows the whole of its gradient.

    Its watched module ran twice, or the weight was read while that module did not run.

    `watched` are the weights that it was watched for, each with the module.
    """

    def __init__(self, watched: Iterable[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.watched = frozenset(watched)


class Observation:
    """What the watchers of a model share: what asks for gradients, and whether they look."""

    def __init__(self) -> None:
        # With every weight frozen, nothing below the first of them asks for a gradient: this does.
        self.anchor = torch.zeros((), requires_grad=True)
        self.on = True
        self.outside: set[tuple[str, nn.Module]] = set()  # weights read where no watcher looks

    def require_inside(self) -> None:
        """Raise CalledAgain for weights that were read while their watched modules did not run."""
        if self.outside:
            raise CalledAgain(self.outside)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs in here is not seen, forward or backward: a watcher runs it once more."""
        self.on = False
        try:
            yield
        finally:
            self.on = True


class Watcher:
    """What is told of the call of a module, and of the gradient of its output."""

    def __init__(self, names: Iterable[str], module: nn.Module, sums: Sums) -> None:
        """`names`: the weights whose gradients it adds."""
        self.names, self.module, self.sums = tuple(names), module, sums
        self.scales: Sequence[float] = ()

    def begin(self, scales: Sequence[float]) -> None:
        """A batch of as many examples begins; each one's gradient counts times its scale."""
        self.scales, self.seen = scales, False

    def see(self, call: "Call", gradient: Tensor) -> None:
        """Add what a call gives, the only one of the batch; CalledAgain if it is not."""
        if self.seen:
            raise CalledAgain((name, self.module) for name in self.names)
        self.seen = True
        self.add(call, gradient)

    def add(self, call: "Call", gradient: Tensor) -> None:
        """Add every example's gradient; what was called and given has one part for each."""
        raise NotImplementedError


class Tap(Watcher):
    """The weight of a linear layer."""

    def __init__(self, name: str, module: nn.Linear, sums: Sums) -> None:
        super().__init__([name], module, sums)
        self.name, self.run, self.rows = name, sums.runs[name], module.out_features
        self.scratch: Tensor | None = None

    def add(self, call: "Call", gradient: Tensor) -> None:
        if self.run.start == self.run.stop:
            return
        # Autocast has two dtypes; a CPU multiplies fp32 faster and better than halves.
        dtype = torch.float32 if gradient.device.type == "cpu" else gradient.dtype
        x, gradient = call.tensors[0].to(dtype), gradient.to(dtype)
        columns = x.shape[-1]
        inputs = x.reshape(len(self.scales), -1, columns)
        outputs = gradient.reshape(len(self.scales), -1, gradient.shape[-1])
        for low, high in self._row_blocks(columns, x.device):
            for scale, one, out in zip(self.scales, inputs, outputs, strict=True):
                rows = torch.mm(out[:, low:high].t(), one, out=self._scratch(x, high - low))
                self.sums.add(self.name, low * columns, rows if scale == 1.0 else rows * scale)
        self.scratch = None

    def _row_blocks(self, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
        """Row ranges that cover the run, on one grid: the same products whatever the budget."""
        step = _CPU_ROWS if device.type == "cpu" else max(1, _GPU_ENTRIES // columns)
        first = self.run.start // columns // step * step
        for low in range(first, -(-self.run.stop // columns), step):
            yield low, min(low + step, self.rows)

    def _scratch(self, x: Tensor, rows: int) -> Tensor:
        """Room for a block; memory that is asked for anew would be cleared anew each time."""
        if self.scratch is None:
            self.scratch = x.new_empty(rows, x.shape[-1])
        return self.scratch[:rows]


class BiasTap(Watcher):
    """The bias of a linear layer."""

    def __init__(self, name: str, module: nn.Module, sums: Sums) -> None:
        super().__init__([name], module, sums)
        self.name = name

    def add(self, call: "Call", gradient: Tensor) -> None:
        parts = gradient.reshape(len(self.scales), -1, gradient.shape[-1])
        for scale, part in zip(self.scales, parts, strict=True):
            self.sums.add(self.name, 0, part.sum(0) * scale)


@dataclass
class Call:
    """What a module was called with: its tensors apart from all else."""

    tensors: tuple[Tensor, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """The call with a `_Place` wherever a tensor stood."""
        tensors: list[Tensor] = []

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            tensors.append(value)
            return _Place(len(tensors) - 1)

        places = tuple(map(place, args)), {key: place(value) for key, value in kwargs.items()}
        return cls(tuple(tensors), *places)

    def again(self, module: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """What the module gives for other tensors in the same places."""

        def fill(value: Any) -> Any:
            return tensors[value.number] if isinstance(value, _Place) else value

        filled = {key: fill(value) for key, value in self.kwargs.items()}
        return module.forward(*map(fill, self.args), **filled)


@dataclass(frozen=True)
class _Place:
    number: int


class _Show(torch.autograd.Function):
    """An output, unchanged; its gradient is shown to a watcher, with the module's call."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, output: Tensor, anchor: Tensor, watcher: Watcher, call: Call, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)  # not an attribute: gradient checkpointing takes these over
        ctx.shown = watcher, Call((), call.args, call.kwargs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        watcher, call = ctx.shown
        tensors = ctx.saved_tensors  # once: recomputed ones are given out once
        watcher.see(replace(call, tensors=tensors), gradient)
        return gradient, *(None,) * (3 + len(tensors))


@contextmanager
def watching(
    watchers: Sequence[Watcher], observation: Observation, owners: Mapping[str, Owner]
) -> Iterator[None]:
    """Every gradient that reaches a watched module is shown to its watcher.

    `owners`: of the watched weights. Where one is read outside of its watched module, as a
    functional layer reads it, `observation` takes it down.
    """
    readers: dict[nn.Module, dict[str, Reader]] = {}
    for watcher in watchers:
        for name in watcher.names:
            owner = owners[name]
            reader = _reader(name, owner.attribute, watcher.module, observation)
            readers.setdefault(owner.module, {})[owner.attribute] = reader

    with ExitStack() as stack:
        for watcher in watchers:
            # Before others' hooks, and so after theirs on the way back: weights are gathered then.
            handle = watcher.module.register_forward_hook(
                _hook(watcher, observation), with_kwargs=True, prepend=True
            )
            stack.callback(handle.remove)
        for module in dict.fromkeys(watcher.module for watcher in watchers):
            stack.enter_context(track_calls(module))
        for module, of_module in readers.items():
            stack.enter_context(intercept_reads(module, of_module))
        yield


def _reader(name: str, attribute: str, watched: nn.Module, observation: Observation) -> Reader:
    def read(module: nn.Module) -> Tensor:
        if observation.on and not is_running(watched):
            observation.outside.add((name, watched))
        return module._parameters[attribute]  # type: ignore[return-value]

    return read


def _hook(watcher: Watcher, observation: Observation) -> Callable[..., Tensor]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not observation.on:
            return output
        call = Call.of(args, kwargs)
        return _Show.apply(output, observation.anchor, watcher, call, *call.tensors)  # type: ignore

    return hook
