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

from mm_piece.distributed import (
    gather_entries,
    gathered_parameters,
    is_partitioned,
    scatter_entries,
    shape_of,
)
from mm_piece.dtypes import view_bits
from mm_piece.modules import Reader, WeightOwner, intercepting_reads, is_running, tracking_calls
from mm_piece.sparse.gradients import GradientProduct, choose_product


@dataclass
class ForwardState:
    """Whether a forward pass of the tuned model runs at the moment."""

    is_active: bool = False


class Patch:
    """A weight's selected flat entries and their trainable values."""

    def __init__(
        self,
        weight: nn.Parameter,
        index: Tensor,
        owners: list[WeightOwner],
        forward_state: ForwardState,
    ) -> None:
        """`index`: sorted flat entries, int32 where that is enough, as the mask has them.

        When a `forward` pass begins, all patches of its model catch up.
        """
        self.weight, self.owners, self.forward_state = weight, owners, forward_state
        self.shape = tuple(shape_of(weight))
        self.index = index.to(weight.device).contiguous()

        self.entries_before = self.copy_entries()
        self.values = nn.Parameter(self.entries_before.to(torch.float32, copy=True))
        self.mark_written()

        self.product: GradientProduct | None = None
        if all(owner.is_linear("weight") for owner in owners):
            rows, columns = self.shape
            self.product = choose_product(self.index, (rows, columns))

    def copy_entries(self) -> Tensor:
        """A copy of the selected entries in the weight's dtype."""
        return gather_entries(self.weight, self.index)

    def count_changed(self) -> int:
        """How many of the selected entries have other bits than before."""
        return int((view_bits(self.copy_entries()) != view_bits(self.entries_before)).sum())

    def count_rounded(self) -> int:
        """How many values moved by less than the weight's dtype can show."""
        with gathered_parameters([self.values]):
            moved = self.values.detach() != self.entries_before.float()
        return int(
            (moved & (view_bits(self.copy_entries()) == view_bits(self.entries_before))).sum()
        )

    def build_write(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is to be written into the weight: itself, flat entries, values in its dtype."""
        return self.weight, self.index, self.values.detach().to(self.weight.dtype)

    def mark_written(self) -> None:
        """Take down that the weight holds the values as they are now."""
        self.received_gradient = False  # by a backward pass since
        self._written_version = self._version_of_values()

    def is_behind(self) -> bool:
        """Whether the weight may hold other bits than its values give.

        Of values in parts that is so after a backward pass: to compare them would cost as much as
        to write them, and only an engine moves them.
        """
        if self._is_partitioned():
            return self.received_gradient
        weight, index, values = self.build_write()
        return not torch.equal(view_bits(gather_entries(weight, index)), view_bits(values))

    def catch_up(self) -> None:
        """Write the values that moved since they were written, as a loop by hand moves them.

        For a weight that is read by itself. Within a pass, forward or backward, it is enough that
        nobody has touched the values: comparing them would make a GPU wait.
        """
        if torch.compiler.is_compiling() or self._is_partitioned():
            return
        in_a_pass = self.forward_state.is_active or is_in_backward()
        if (
            in_a_pass and self._version_of_values() == self._written_version
        ) or not self.is_behind():
            return
        scatter_entries([self.build_write()])
        self.mark_written()

    def _is_partitioned(self) -> bool:
        return is_partitioned(self.values) or is_partitioned(self.weight)

    def _version_of_values(self) -> tuple[int, int]:
        """What changes when the values are written, but for what hides it behind `.data`."""
        return self.values._version, self.values.data_ptr()


def is_in_backward() -> bool:
    """Whether autograd runs at the moment: a module that runs then is computed again."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def patched_module(module: nn.Module, patches: Mapping[str, Patch]) -> Iterator[None]:
    """Context in which a module reads the given attributes with their entries' gradient behind.

    The values are parameters of the module, so that engines that move or divide parameters see
    them. Leaving restores the class and the parameters.
    """
    readers = {attribute: _make_reader(attribute, patch) for attribute, patch in patches.items()}
    with ExitStack() as stack:
        interception = stack.enter_context(intercepting_reads(module, readers))
        for attribute, patch in patches.items():
            name = _values_name(attribute)
            module.register_parameter(name, patch.values)
            stack.callback(delattr, module, name)
            interception.parameters.append(name)
            if patch.product is not None:
                interception.hooks += stack.enter_context(_hooked_linear(module, attribute, patch))
        yield


def _make_reader(attribute: str, patch: Patch) -> Reader:
    """Read a weight from anywhere: its dense gradient is gathered at the entries."""

    def fetch_weight(module: nn.Module) -> Tensor:
        patch.catch_up()
        weight = module._parameters[attribute]
        if patch.product is not None and is_running(module):
            return weight  # type: ignore[return-value]
        values = module._parameters[_values_name(attribute)]
        return _DenseWeight.apply(weight, values, patch)  # type: ignore[return-value]

    return fetch_weight


@contextmanager
def _hooked_linear(module: nn.Module, attribute: str, patch: Patch) -> Iterator[list[int]]:
    """Context in which a linear layer's entries get their gradient beside its own product.

    The layer itself runs as it is, also autocast, quantised, compiled or offloaded. Gives the ids
    of its hooks.
    """

    @torch.compiler.disable  # a compiled model breaks its graph here
    def attach_gradient(linear: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        values = linear._parameters[_values_name(attribute)]
        return _LinearOutput.apply(output, values, x, patch)  # type: ignore[return-value]

    # First of all hooks: another one may change the output.
    handle = module.register_forward_hook(attach_gradient, prepend=True, with_kwargs=True)  # type: ignore
    with tracking_calls(module) as hooks:
        try:
            yield [handle.id, *hooks]
        finally:
            handle.remove()


def _values_name(attribute: str) -> str:
    """The name under which a module has the values of one of its weights."""
    return f"{attribute}_values"


class _LinearOutput(torch.autograd.Function):
    """An output, unchanged; from its gradient comes that of the selected entries."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, output: Tensor, values: Tensor, x: Tensor, patch: Patch
    ) -> Tensor:
        product = cast(GradientProduct, patch.product)  # it is watched because there is one
        # Autocast computes in the output's dtype: what it saw is kept, not what it was given.
        ctx.save_for_backward(product.save_inputs(x.to(output.dtype)))
        ctx.patch = patch
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        ctx.patch.received_gradient = True
        return gradient, ctx.patch.product.compute_gradient(saved, gradient), None, None


class _DenseWeight(torch.autograd.Function):
    """The weight itself; its gradient is gathered at the selected entries."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, patch: Patch) -> Tensor:  # type: ignore[override]
        ctx.patch = patch
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.patch.received_gradient = True
        entries = gradient.reshape(-1).index_select(0, ctx.patch.index)
        # Another weight may have been put in its place, as functional calls do.
        dense = gradient if ctx.needs_input_grad[0] else None
        return dense, entries.float(), None
