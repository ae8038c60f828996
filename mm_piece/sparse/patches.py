"""One patched weight: its selected entries, their trainable values, and the modules that hold it.

A module that holds a patched weight keeps it where it is, under its name and in its place among
the module's parameters. Only its class changes: reading the weight gives the weight with the
selected entries' gradient behind it, wherever it is read from, and a linear layer computes that
gradient from its inputs, without a gradient of the whole weight.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mm_piece.distributed import is_cut, put_all, shape_of, take, whole
from mm_piece.dtypes import bits
from mm_piece.modules import Owner, Reader, intercept_reads, is_running, track_calls
from mm_piece.sparse.gradients import Product, product_for


@dataclass
class Pass:
    """Whether a forward pass of the tuned model runs at the moment."""

    runs: bool = False


class Patch:
    """A weight's selected flat entries and their trainable values."""

    def __init__(
        self, weight: nn.Parameter, index: Tensor, owners: list[Owner], forward: Pass
    ) -> None:
        """`index`: sorted flat entries, int32 where that is enough, as the mask has them.

        When a `forward` pass begins, all patches of its model catch up.
        """
        self.weight, self.owners, self.forward = weight, owners, forward
        self.shape = tuple(shape_of(weight))
        self.index = index.to(weight.device).contiguous()

        self.before = self.entries()
        self.values = nn.Parameter(self.before.to(torch.float32, copy=True))
        self.note_written()

        self.product: Product | None = None
        if all(owner.is_linear("weight") for owner in owners):
            rows, columns = self.shape
            self.product = product_for(self.index, (rows, columns))

    def entries(self) -> Tensor:
        """A copy of the selected entries in the weight's dtype."""
        return take(self.weight, self.index)

    def changed(self) -> int:
        """How many of the selected entries have other bits than before."""
        return int((bits(self.entries()) != bits(self.before)).sum())

    def rounded(self) -> int:
        """How many values moved by less than the weight's dtype can show."""
        with whole([self.values]):
            moved = self.values.detach() != self.before.float()
        return int((moved & (bits(self.entries()) == bits(self.before))).sum())

    def write(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is to be written into the weight: itself, flat entries, values in its dtype."""
        return self.weight, self.index, self.values.detach().to(self.weight.dtype)

    def note_written(self) -> None:
        """Take down that the weight holds the values as they are now."""
        self.reached = False  # by a backward pass since
        self._written = self._touched()

    def is_behind(self) -> bool:
        """Whether the weight may hold other bits than its values give.

        Of values in parts that is so after a backward pass: to compare them would cost as much as
        to write them, and only an engine moves them.
        """
        if self._is_in_parts():
            return self.reached
        weight, index, values = self.write()
        return not torch.equal(bits(take(weight, index)), bits(values))

    def catch_up(self) -> None:
        """Write the values that moved since they were written, as a loop by hand moves them.

        For a weight that is read by itself. Within a pass, forward or backward, it is enough that
        nobody has touched the values: comparing them would make a GPU wait.
        """
        if torch.compiler.is_compiling() or self._is_in_parts():
            return
        in_a_pass = self.forward.runs or is_in_backward()
        if (in_a_pass and self._touched() == self._written) or not self.is_behind():
            return
        put_all([self.write()])
        self.note_written()

    def _is_in_parts(self) -> bool:
        return is_cut(self.values) or is_cut(self.weight)

    def _touched(self) -> tuple[int, int]:
        """What changes when the values are written, but for what hides it behind `.data`."""
        return self.values._version, self.values.data_ptr()


def is_in_backward() -> bool:
    """Whether autograd runs at the moment: a module that runs then is computed again."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def patched(module: nn.Module, patches: Mapping[str, Patch]) -> Iterator[None]:
    """Context in which a module reads the given attributes with their entries' gradient behind.

    The values are parameters of the module, so that engines that move or divide parameters see
    them. Leaving restores the class and the parameters.
    """
    readers = {attribute: _reader(attribute, patch) for attribute, patch in patches.items()}
    with ExitStack() as stack:
        interception = stack.enter_context(intercept_reads(module, readers))
        for attribute, patch in patches.items():
            name = _values_name(attribute)
            module.register_parameter(name, patch.values)
            stack.callback(delattr, module, name)
            interception.parameters.append(name)
            if patch.product is not None:
                interception.hooks += stack.enter_context(_watched(module, attribute, patch))
        yield


def _reader(attribute: str, patch: Patch) -> Reader:
    """Read a weight from anywhere: its dense gradient is gathered at the entries."""

    def read(module: nn.Module) -> Tensor:
        patch.catch_up()
        weight = module._parameters[attribute]
        if patch.product is not None and is_running(module):
            return weight  # type: ignore[return-value]
        values = module._parameters[_values_name(attribute)]
        return _Gathered.apply(weight, values, patch)  # type: ignore[return-value]

    return read


@contextmanager
def _watched(module: nn.Module, attribute: str, patch: Patch) -> Iterator[list[int]]:
    """Context in which a linear layer's entries get their gradient beside its own product.

    The layer itself runs as it is, also autocast, quantised, compiled or offloaded. Gives the ids
    of its hooks.
    """

    @torch.compiler.disable  # a compiled model breaks its graph here
    def watch(linear: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        values = linear._parameters[_values_name(attribute)]
        return _Watched.apply(output, values, x, patch)  # type: ignore[return-value]

    # First of all hooks: another one may change the output.
    handle = module.register_forward_hook(watch, prepend=True, with_kwargs=True)  # type: ignore
    with track_calls(module) as hooks:
        try:
            yield [handle.id, *hooks]
        finally:
            handle.remove()


def _values_name(attribute: str) -> str:
    """The name under which a module has the values of one of its weights."""
    return f"{attribute}_values"


class _Watched(torch.autograd.Function):
    """An output, unchanged; from its gradient comes that of the selected entries."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, output: Tensor, values: Tensor, x: Tensor, patch: Patch
    ) -> Tensor:
        product = cast(Product, patch.product)  # it is watched because there is one
        # Autocast computes in the output's dtype: what it saw is kept, not what it was given.
        ctx.save_for_backward(product.keep(x.to(output.dtype)))
        ctx.patch = patch
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        ctx.patch.reached = True
        return gradient, ctx.patch.product.gradient(kept, gradient), None, None


class _Gathered(torch.autograd.Function):
    """The weight itself; its gradient is gathered at the selected entries."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, patch: Patch) -> Tensor:  # type: ignore[override]
        ctx.patch = patch
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.patch.reached = True
        entries = gradient.reshape(-1).index_select(0, ctx.patch.index)
        # Another weight may have been put in its place, as functional calls do.
        dense = gradient if ctx.needs_input_grad[0] else None
        return dense, entries.float(), None
