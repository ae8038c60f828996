"""One patched weight: its selected entries, their trainable values, and the modules that own it.

The weight stays in its module, under its name and in its order among the parameters. Only the
module's class changes: whoever reads the weight gets one whose gradient goes to the values of the
selected entries. A linear layer computes that gradient from its inputs instead, so that no
gradient of the size of the weight is made.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

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
from mm_piece.modules import (
    Reader,
    WeightOwner,
    intercepting_reads,
    is_running,
    tracking_calls,
)
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

        All patches of a model share its `forward_state`.
        """
        self.weight = weight
        self.owners = owners
        self.forward_state = forward_state
        self.shape = tuple(shape_of(weight))
        self.index = index.to(weight.device).contiguous()

        self.entries_before = self.copy_entries()
        self.values = nn.Parameter(self.entries_before.to(torch.float32, copy=True))
        self.received_gradient = False  # by a backward pass since the values were written
        self._written_version = self._version_of_values()

        # Without a product, the gradient is gathered from a dense one.
        self.product: GradientProduct | None = None
        if all(owner.is_linear("weight") for owner in owners):
            rows, columns = self.shape
            self.product = choose_product(self.index, (rows, columns))

    def copy_entries(self) -> Tensor:
        """Return a copy of the selected entries in the weight's dtype."""
        return gather_entries(self.weight, self.index)

    def count_changed(self) -> int:
        """Return how many of the selected entries have other bits than before."""
        now = view_bits(self.copy_entries())
        before = view_bits(self.entries_before)
        changed = now != before
        return int(changed.sum())

    def count_rounded(self) -> int:
        """Return how many values moved by less than the weight's dtype can show."""
        with gathered_parameters([self.values]):
            moved = self.values.detach() != self.entries_before.float()

        now = view_bits(self.copy_entries())
        before = view_bits(self.entries_before)
        rounded = moved & (now == before)
        return int(rounded.sum())

    def build_write(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is to be written: the weight, flat entries, and values in its dtype."""
        values = self.values.detach()
        return self.weight, self.index, values.to(self.weight.dtype)

    def mark_written(self) -> None:
        """Note that the weight has the values as they are now."""
        self.received_gradient = False
        self._written_version = self._version_of_values()

    def is_behind(self) -> bool:
        """Return whether the weight may have other bits than its values give.

        Partitioned values may after any backward pass. To compare them would cost as much as to
        write them, and only an engine changes them.
        """
        if self._is_partitioned():
            return self.received_gradient

        weight, index, values = self.build_write()
        entries = gather_entries(weight, index)
        return not torch.equal(view_bits(entries), view_bits(values))

    def catch_up(self) -> None:
        """Write values that changed since they were written, as in a loop without an optimizer.

        For a weight that is read by itself, outside of its model's forward pass.
        """
        if torch.compiler.is_compiling() or self._is_partitioned():
            return

        # Within a pass, forward or backward, the version of the values is enough: to compare them
        # would make a GPU wait.
        in_a_pass = self.forward_state.is_active or is_in_backward()
        if in_a_pass and self._version_of_values() == self._written_version:
            return
        if not self.is_behind():
            return

        scatter_entries([self.build_write()])
        self.mark_written()

    def _is_partitioned(self) -> bool:
        return is_partitioned(self.values) or is_partitioned(self.weight)

    def _version_of_values(self) -> tuple[int, int]:
        """Return a mark that changes whenever the values are written, unless through `.data`."""
        return self.values._version, self.values.data_ptr()


def is_in_backward() -> bool:
    """Return whether autograd runs at the moment: a module that runs then is recomputed."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def patched_module(
    module: nn.Module,
    patches: Mapping[str, Patch],
) -> Iterator[None]:
    """Keep a module patched while the block runs: `patches` are of its weights, by attribute.

    The values are parameters of the module meanwhile, so that engines that move or partition
    parameters see them.
    """
    readers: dict[str, Reader] = {}
    for attribute, patch in patches.items():
        readers[attribute] = _make_reader(attribute, patch)

    with ExitStack() as stack:
        interception = stack.enter_context(intercepting_reads(module, readers))
        for attribute, patch in patches.items():
            name = _values_name(attribute)
            module.register_parameter(name, patch.values)
            stack.callback(delattr, module, name)
            interception.parameters.append(name)

            if patch.product is not None:
                hooked = _hooked_linear(module, attribute, patch)
                interception.hooks += stack.enter_context(hooked)
        yield


def _make_reader(attribute: str, patch: Patch) -> Reader:
    """Return a reader of a weight, for wherever it is read from.

    Outside of its linear layer the weight's dense gradient is gathered at the selected entries.
    """

    def fetch_weight(module: nn.Module) -> Tensor:
        patch.catch_up()
        weight = module._parameters[attribute]

        # A linear layer reads its weight while it runs: `_LinearOutput` has the gradient then.
        if patch.product is not None and is_running(module):
            return weight  # type: ignore[return-value]

        values = module._parameters[_values_name(attribute)]
        return _DenseWeight.apply(weight, values, patch)  # type: ignore[return-value]

    return fetch_weight


@contextmanager
def _hooked_linear(
    module: nn.Module,
    attribute: str,
    patch: Patch,
) -> Iterator[list[int]]:
    """Keep a linear layer computing its entries' gradient while the block runs.

    The layer's own product stays as it is, also autocast, quantised, compiled or offloaded. Yields
    the ids of the layer's hooks.
    """

    @torch.compiler.disable  # a compiled model breaks its graph here
    def attach_gradient(
        linear: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: Mapping[str, Tensor],
        output: Tensor,
    ) -> Tensor:
        x = args[0] if args else kwargs["input"]
        values = linear._parameters[_values_name(attribute)]
        return _LinearOutput.apply(output, values, x, patch)  # type: ignore[return-value]

    # First of all hooks: another one may change the output.
    handle = module.register_forward_hook(
        attach_gradient,  # type: ignore
        prepend=True,
        with_kwargs=True,
    )
    with tracking_calls(module) as hooks:
        try:
            yield [handle.id, *hooks]
        finally:
            handle.remove()


def _values_name(attribute: str) -> str:
    """Return the name under which a module has the values of one of its weights."""
    return f"{attribute}_values"


class _PatchContext(Protocol):
    """What autograd keeps from a forward pass for its backward pass."""

    patch: Patch
    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that were saved."""
        ...

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Save tensors."""
        ...


class _LinearOutput(torch.autograd.Function):
    """An output, unchanged; from its gradient comes that of the selected entries."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: _PatchContext,
        output: Tensor,
        values: Tensor,
        x: Tensor,
        patch: Patch,
    ) -> Tensor:
        # Only linear layers with a product are hooked.
        product = cast(GradientProduct, patch.product)
        # Autocast computes in the output's dtype: what it saw is saved, not what it was given.
        saved = product.save_inputs(x.to(output.dtype))
        ctx.save_for_backward(saved)
        ctx.patch = patch
        return output.view_as(output)

    @staticmethod
    def backward(ctx: _PatchContext, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        ctx.patch.received_gradient = True
        product = cast(GradientProduct, ctx.patch.product)
        values_gradient = product.compute_gradient(saved, gradient)
        return gradient, values_gradient, None, None


class _DenseWeight(torch.autograd.Function):
    """The weight itself; its gradient is gathered at the selected entries."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: _PatchContext,
        weight: Tensor,
        values: Tensor,
        patch: Patch,
    ) -> Tensor:
        ctx.patch = patch
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: _PatchContext, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.patch.received_gradient = True
        flat = gradient.reshape(-1)
        entries = flat.index_select(0, ctx.patch.index)
        # Another weight may stand in its place, as in torch.func.functional_call: it gets its own.
        dense = gradient if ctx.needs_input_grad[0] else None
        return dense, entries.float(), None
