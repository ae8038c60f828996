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

from mm_piece.importance.accumulators import GradientSums
from mm_piece.modules import Reader, WeightOwner, intercepting_reads, is_running, tracking_calls

_CPU_ROWS = 256  # of a weight's gradient at once; fewer make slow products of few tokens
_GPU_ENTRIES = 2**24  # of a weight's gradient at once: enough to fill an accelerator


class ModuleReused(Exception):
    """A weight is used more than once for one example: no call shows the whole of its gradient.

    Its watched module ran twice, or the weight was read while that module did not run.

    `watched` are the weights that it was watched for, each with the module.
    """

    def __init__(self, reused: Iterable[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.reused = frozenset(reused)


class Observation:
    """What the watchers of a model share: what asks for gradients, and whether they look."""

    def __init__(self) -> None:
        # With every weight frozen, nothing below the first of them asks for a gradient: this does.
        self.anchor = torch.zeros((), requires_grad=True)
        self.is_active = True
        self.outside_reads: set[tuple[str, nn.Module]] = (
            set()
        )  # weights read where no watcher looks

    def require_no_outside_reads(self) -> None:
        """Raise CalledAgain for weights that were read while their watched modules did not run."""
        if self.outside_reads:
            raise ModuleReused(self.outside_reads)

    @contextmanager
    def paused_observation(self) -> Iterator[None]:
        """What runs in here is not seen, forward or backward: a watcher runs it once more."""
        self.is_active = False
        try:
            yield
        finally:
            self.is_active = True


class ModuleObserver:
    """What is told of the call of a module, and of the gradient of its output."""

    def __init__(self, names: Iterable[str], module: nn.Module, sums: GradientSums) -> None:
        """`names`: the weights whose gradients it adds."""
        self.names, self.module, self.sums = tuple(names), module, sums
        self.scales: Sequence[float] = ()

    def begin_batch(self, scales: Sequence[float]) -> None:
        """A batch of as many examples begins; each one's gradient counts times its scale."""
        self.scales, self.was_called = scales, False

    def observe_call(self, call: "ModuleCall", gradient: Tensor) -> None:
        """Add what a call gives, the only one of the batch; CalledAgain if it is not."""
        if self.was_called:
            raise ModuleReused((name, self.module) for name in self.names)
        self.was_called = True
        self.add_gradients(call, gradient)

    def add_gradients(self, call: "ModuleCall", gradient: Tensor) -> None:
        """Add every example's gradient; what was called and given has one part for each."""
        raise NotImplementedError


class GradientHook(ModuleObserver):
    """The weight of a linear layer."""

    def __init__(self, name: str, module: nn.Linear, sums: GradientSums) -> None:
        super().__init__([name], module, sums)
        self.name, self.block_range, self.out_features = (
            name,
            sums.ranges[name],
            module.out_features,
        )
        self.scratch: Tensor | None = None

    def add_gradients(self, call: "ModuleCall", gradient: Tensor) -> None:
        if self.block_range.start == self.block_range.stop:
            return
        # Autocast has two dtypes; a CPU multiplies fp32 faster and better than halves.
        dtype = torch.float32 if gradient.device.type == "cpu" else gradient.dtype
        x, gradient = call.tensors[0].to(dtype), gradient.to(dtype)
        columns = x.shape[-1]
        inputs = x.reshape(len(self.scales), -1, columns)
        outputs = gradient.reshape(len(self.scales), -1, gradient.shape[-1])
        for low, high in self._iter_row_blocks(columns, x.device):
            for scale, example_inputs, example_outputs in zip(
                self.scales, inputs, outputs, strict=True
            ):
                rows = torch.mm(
                    example_outputs[:, low:high].t(),
                    example_inputs,
                    out=self._reserve_scratch(x, high - low),
                )
                self.sums.add_gradient(
                    self.name, low * columns, rows if scale == 1.0 else rows * scale
                )
        self.scratch = None

    def _iter_row_blocks(self, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
        """Row ranges that cover the run, on one grid: the same products whatever the budget."""
        step = _CPU_ROWS if device.type == "cpu" else max(1, _GPU_ENTRIES // columns)
        first = self.block_range.start // columns // step * step
        for low in range(first, -(-self.block_range.stop // columns), step):
            yield low, min(low + step, self.out_features)

    def _reserve_scratch(self, x: Tensor, rows: int) -> Tensor:
        """Room for a block; memory that is asked for anew would be cleared anew each time."""
        if self.scratch is None:
            self.scratch = x.new_empty(rows, x.shape[-1])
        return self.scratch[:rows]


class BiasGradientHook(ModuleObserver):
    """The bias of a linear layer."""

    def __init__(self, name: str, module: nn.Module, sums: GradientSums) -> None:
        super().__init__([name], module, sums)
        self.name = name

    def add_gradients(self, call: "ModuleCall", gradient: Tensor) -> None:
        example_gradients = gradient.reshape(len(self.scales), -1, gradient.shape[-1])
        for scale, example_gradient in zip(self.scales, example_gradients, strict=True):
            self.sums.add_gradient(self.name, 0, example_gradient.sum(0) * scale)


@dataclass
class ModuleCall:
    """What a module was called with: its tensors apart from all else."""

    tensors: tuple[Tensor, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def from_arguments(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "ModuleCall":
        """The call with a `_Place` wherever a tensor stood."""
        tensors: list[Tensor] = []

        def replace_tensor(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            tensors.append(value)
            return _Placeholder(len(tensors) - 1)

        placeholders = (
            tuple(map(replace_tensor, args)),
            {key: replace_tensor(value) for key, value in kwargs.items()},
        )
        return cls(tuple(tensors), *placeholders)

    def rerun_module(self, module: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """What the module gives for other tensors in the same places."""

        def fill_placeholder(value: Any) -> Any:
            return tensors[value.number] if isinstance(value, _Placeholder) else value

        filled = {key: fill_placeholder(value) for key, value in self.kwargs.items()}
        return module.forward(*map(fill_placeholder, self.args), **filled)


@dataclass(frozen=True)
class _Placeholder:
    number: int


class _ObservedOutput(torch.autograd.Function):
    """An output, unchanged; its gradient is shown to a watcher, with the module's call."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        output: Tensor,
        anchor: Tensor,
        observer: ModuleObserver,
        call: ModuleCall,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)  # not an attribute: gradient checkpointing takes these over
        ctx.shown = observer, ModuleCall((), call.args, call.kwargs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        observer, call = ctx.shown
        tensors = ctx.saved_tensors  # once: recomputed ones are given out once
        observer.observe_call(replace(call, tensors=tensors), gradient)
        return gradient, *(None,) * (3 + len(tensors))


@contextmanager
def observing_modules(
    observers: Sequence[ModuleObserver], observation: Observation, owners: Mapping[str, WeightOwner]
) -> Iterator[None]:
    """Every gradient that reaches a watched module is shown to its watcher.

    `owners`: of the watched weights. Where one is read outside of its watched module, as a
    functional layer reads it, `observation` takes it down.
    """
    readers: dict[nn.Module, dict[str, Reader]] = {}
    for observer in observers:
        for name in observer.names:
            owner = owners[name]
            reader = _make_reader(name, owner.attribute, observer.module, observation)
            readers.setdefault(owner.module, {})[owner.attribute] = reader

    with ExitStack() as stack:
        for observer in observers:
            # Before others' hooks, and so after theirs on the way back: weights are gathered then.
            handle = observer.module.register_forward_hook(
                _make_forward_hook(observer, observation), with_kwargs=True, prepend=True
            )
            stack.callback(handle.remove)
        for module in dict.fromkeys(observer.module for observer in observers):
            stack.enter_context(tracking_calls(module))
        for module, of_module in readers.items():
            stack.enter_context(intercepting_reads(module, of_module))
        yield


def _make_reader(
    name: str, attribute: str, observed: nn.Module, observation: Observation
) -> Reader:
    def fetch_parameter(module: nn.Module) -> Tensor:
        if observation.is_active and not is_running(observed):
            observation.outside_reads.add((name, observed))
        return module._parameters[attribute]  # type: ignore[return-value]

    return fetch_parameter


def _make_forward_hook(observer: ModuleObserver, observation: Observation) -> Callable[..., Tensor]:
    def observe_output(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if not observation.is_active:
            return output
        call = ModuleCall.from_arguments(args, kwargs)
        return _ObservedOutput.apply(output, observation.anchor, observer, call, *call.tensors)  # type: ignore

    return observe_output
