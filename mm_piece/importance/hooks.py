"""Gradient hooks: weights' gradients for each example, from a module's inputs and output gradient.

An observer watches one module. When the backward pass arrives at the module's output, the observer
gets the gradient there and what the module was called with, and computes the gradients of its
weights. The weights themselves stay frozen, so autograd makes no gradient of their size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mm_piece.importance.accumulators import GradientSums
from mm_piece.modules import (
    Reader,
    WeightOwner,
    intercepting_reads,
    is_running,
    tracking_calls,
)

_CPU_ROWS = 256  # of a weight's gradient at once; fewer make slow products of few tokens
_GPU_ENTRIES = 2**24  # of a weight's gradient at once: enough to fill an accelerator


class ModuleReused(Exception):
    """A weight is used more than once for one example: no call shows the whole of its gradient.

    Either its observed module ran twice, or the weight was read while that module did not run.
    `reused` are the weights that the module was observed for, each with the module.
    """

    def __init__(self, reused: Iterable[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.reused = frozenset(reused)


class Observation:
    """What all observers of a model share: an anchor in the graph, and whether they observe."""

    def __init__(self) -> None:
        # With every weight frozen no activation requires a gradient, and autograd builds no graph.
        # Observed outputs depend on this scalar as well, so that the graph begins with them.
        self.anchor = torch.zeros((), requires_grad=True)
        self.is_active = True

        # Weights that were read while their observed module did not run.
        self.outside_reads: set[tuple[str, nn.Module]] = set()

    def require_no_outside_reads(self) -> None:
        """Raise ModuleReused for weights that were read while their module did not run."""
        if self.outside_reads:
            raise ModuleReused(self.outside_reads)

    @contextmanager
    def paused_observation(self) -> Iterator[None]:
        """Keep all observers blind while the block runs: an observer recomputes its module there.

        They see neither the forward pass nor its backward pass.
        """
        self.is_active = False
        try:
            yield
        finally:
            self.is_active = True


class ModuleObserver:
    """The receiver of a module's call and of the gradient of its output."""

    def __init__(
        self,
        names: Iterable[str],
        module: nn.Module,
        sums: GradientSums,
    ) -> None:
        """`names`: the weights whose gradients it adds to `sums`."""
        self.names = tuple(names)
        self.module = module
        self.sums = sums
        self.scales: Sequence[float] = ()
        self.was_called = False  # in this batch

    def begin_batch(self, scales: Sequence[float]) -> None:
        """Expect a batch of as many examples as scales; each gradient counts times its scale."""
        self.scales = scales
        self.was_called = False

    def observe_call(self, call: "ModuleCall", gradient: Tensor) -> None:
        """Add the gradients from the only call in this batch; ModuleReused if it is the second."""
        if self.was_called:
            raise ModuleReused((name, self.module) for name in self.names)
        self.was_called = True
        self.add_gradients(call, gradient)

    def add_gradients(self, call: "ModuleCall", gradient: Tensor) -> None:
        """Add every example's gradient of the weights.

        `gradient` is that of the module's output. Its first dimension is the examples', in order,
        or can be divided by their number.
        """
        raise NotImplementedError


class GradientHook(ModuleObserver):
    """The weight W of a linear layer, y_t = W x_t + b for every token t.

    The gradient of example n is the sum of (dL/dy_t) x_t^T over its tokens, which is the matrix
    product G_n^T X_n of the output gradients G_n (tokens, out) and the inputs X_n (tokens, in). It
    is computed for a block of output rows at a time and added to the sums at once, so that no
    gradient of the size of a large weight exists, not even for one example.
    """

    def __init__(
        self,
        name: str,
        module: nn.Linear,
        sums: GradientSums,
    ) -> None:
        super().__init__([name], module, sums)
        self.name = name
        self.block_range = sums.ranges[name]
        self.out_features = module.out_features
        self.scratch: Tensor | None = None

    def add_gradients(self, call: "ModuleCall", gradient: Tensor) -> None:
        if self.block_range.start == self.block_range.stop:
            return

        # Autocast has two dtypes; a CPU multiplies fp32 faster and better than halves.
        is_on_cpu = gradient.device.type == "cpu"
        dtype = torch.float32 if is_on_cpu else gradient.dtype
        x = call.tensors[0].to(dtype)
        gradient = gradient.to(dtype)

        num_examples = len(self.scales)
        in_features = x.shape[-1]
        out_features = gradient.shape[-1]
        inputs = x.reshape(num_examples, -1, in_features)  # (examples, tokens, in)
        outputs = gradient.reshape(num_examples, -1, out_features)  # (examples, tokens, out)

        for low, high in self._iter_row_blocks(in_features, x.device):
            for scale, x_n, g_n in zip(self.scales, inputs, outputs, strict=True):
                scratch = self._reserve_scratch(x, high - low)
                g_block = g_n[:, low:high]  # (tokens, high - low)
                block = torch.mm(g_block.t(), x_n, out=scratch)  # (high - low, in)
                if scale != 1.0:
                    block = block * scale
                self.sums.add_gradient(self.name, low * in_features, block)
        self.scratch = None

    def _iter_row_blocks(
        self,
        columns: int,
        device: torch.device,
    ) -> Iterator[tuple[int, int]]:
        """Iterate over blocks of output rows that cover the range of entries to sum.

        Every block begins at a multiple of the same step, wherever the range begins. The products
        thus have the same shapes, and round the same, whatever the memory budget.
        """
        gpu_rows = max(1, _GPU_ENTRIES // columns)
        step = _CPU_ROWS if device.type == "cpu" else gpu_rows
        first_row = self.block_range.start // columns
        end_row = -(-self.block_range.stop // columns)  # rounded up

        first_block = first_row // step * step
        for low in range(first_block, end_row, step):
            high = min(low + step, self.out_features)
            yield low, high

    def _reserve_scratch(self, x: Tensor, rows: int) -> Tensor:
        """Return memory for a block, the same for all blocks of a call.

        A new tensor for each product would be memory from the system, cleared anew each time. No
        block has more rows than the first.
        """
        if self.scratch is None:
            self.scratch = x.new_empty(rows, x.shape[-1])
        return self.scratch[:rows]


class BiasGradientHook(ModuleObserver):
    """The bias b of a linear layer: the gradient is the sum of dL/dy_t over an example's tokens."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        sums: GradientSums,
    ) -> None:
        super().__init__([name], module, sums)
        self.name = name

    def add_gradients(self, call: "ModuleCall", gradient: Tensor) -> None:
        num_examples = len(self.scales)
        out_features = gradient.shape[-1]
        outputs = gradient.reshape(num_examples, -1, out_features)  # (examples, tokens, out)

        for scale, g_n in zip(self.scales, outputs, strict=True):
            bias_gradient = g_n.sum(0) * scale
            self.sums.add_gradient(self.name, 0, bias_gradient)


@dataclass
class ModuleCall:
    """The arguments of a module's call, its tensors apart from all else."""

    tensors: tuple[Tensor, ...]
    args: tuple[object, ...]
    kwargs: dict[str, object]

    @classmethod
    def from_arguments(
        cls,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> "ModuleCall":
        """Build a call from its arguments, with a `_Placeholder` in place of every tensor."""
        tensors: list[Tensor] = []

        def replace_tensor(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            tensors.append(value)
            return _Placeholder(len(tensors) - 1)

        plain_args = tuple(map(replace_tensor, args))
        plain_kwargs = {key: replace_tensor(value) for key, value in kwargs.items()}
        return cls(tuple(tensors), plain_args, plain_kwargs)

    def rerun_module(self, module: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Return the module's output for other tensors in the place of this call's."""

        def fill_placeholder(value: object) -> object:
            if isinstance(value, _Placeholder):
                return tensors[value.number]
            return value

        args = map(fill_placeholder, self.args)
        kwargs = {key: fill_placeholder(value) for key, value in self.kwargs.items()}
        # `forward` alone: the module's hooks, ours among them, have run for this call.
        return module.forward(*args, **kwargs)


@dataclass(frozen=True)
class _Placeholder:
    """The place of a tensor among the arguments of a call."""

    number: int


class _ObserverContext(Protocol):
    """What autograd keeps from a forward pass for its backward pass."""

    observer: ModuleObserver
    call: ModuleCall

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that were saved."""
        ...

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Save tensors."""
        ...


class _ObservedOutput(torch.autograd.Function):
    """An output, unchanged; on the way back an observer gets its gradient and the module's call.

    A function of its own, not a tensor hook: autograd saves the module's inputs with it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: _ObserverContext,
        output: Tensor,
        anchor: Tensor,
        observer: ModuleObserver,
        call: ModuleCall,
        *tensors: Tensor,
    ) -> Tensor:
        # Gradient checkpointing frees and recomputes what is saved in this way, and only that: as
        # attributes of `ctx` the inputs of all modules would live until the backward pass.
        ctx.save_for_backward(*tensors)
        ctx.observer = observer
        ctx.call = ModuleCall((), call.args, call.kwargs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: _ObserverContext, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # Once only: torch.utils.checkpoint refuses a second read of what it has recomputed.
        tensors = ctx.saved_tensors
        call = replace(ctx.call, tensors=tensors)
        ctx.observer.observe_call(call, gradient)

        # One for each argument of `forward`: the output's own, and nothing for the others.
        return gradient, None, None, None, *(None for _ in tensors)


@contextmanager
def observing_modules(
    observers: Sequence[ModuleObserver],
    observation: Observation,
    owners: Mapping[str, WeightOwner],
) -> Iterator[None]:
    """Keep observers attached to their modules while the block runs.

    `owners`: of the observers' weights, at least. Where one of these weights is read while its
    observed module does not run, as by torch.nn.functional, `observation` notes it.
    """
    readers: dict[nn.Module, dict[str, Reader]] = {}
    for observer in observers:
        for name in observer.names:
            owner = owners[name]
            reader = _make_reader(name, owner.attribute, observer.module, observation)
            module_readers = readers.setdefault(owner.module, {})
            module_readers[owner.attribute] = reader

    with ExitStack() as stack:
        for observer in observers:
            # Before others' hooks, and so after theirs on the way back: ZeRO-3's have gathered the
            # module's weights then.
            handle = observer.module.register_forward_hook(
                _make_forward_hook(observer, observation),
                with_kwargs=True,
                prepend=True,
            )
            stack.callback(handle.remove)

        # Several observers may share a module, which is tracked once.
        observed_modules = dict.fromkeys(observer.module for observer in observers)
        for module in observed_modules:
            stack.enter_context(tracking_calls(module))
        for module, module_readers in readers.items():
            stack.enter_context(intercepting_reads(module, module_readers))
        yield


def _make_reader(
    name: str,
    attribute: str,
    observed: nn.Module,
    observation: Observation,
) -> Reader:
    """Return a reader of a weight that notes reads outside of the observed module."""

    def fetch_parameter(module: nn.Module) -> Tensor:
        if observation.is_active and not is_running(observed):
            observation.outside_reads.add((name, observed))
        return module._parameters[attribute]  # type: ignore[return-value]

    return fetch_parameter


def _make_forward_hook(
    observer: ModuleObserver,
    observation: Observation,
) -> Callable[..., Tensor]:
    """Return a forward hook that puts `_ObservedOutput` behind a module's output."""

    def observe_output(
        _: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: Tensor,
    ) -> Tensor:
        if not observation.is_active:
            return output

        call = ModuleCall.from_arguments(args, kwargs)
        observed_output: Any = _ObservedOutput.apply(
            output,
            observation.anchor,
            observer,
            call,
            *call.tensors,
        )
        return observed_output

    return observe_output
