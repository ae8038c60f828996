"""Training of the selected entries only: compact fp32 values and their gradients.

A patched weight stays where it is and what it is. Beside it stands a vector of fp32 values, the
only thing that an optimizer sees; after each step the values are written into the weight. Every
other weight is frozen: it gets no gradient, so no optimizer, weight decay or sharding can move it.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from mm_piece.deltas.delta import Delta, compute_fingerprint
from mm_piece.distributed import gathered_parameters, is_partitioned, scatter_entries, shape_of
from mm_piece.errors import SelectionError, format_value
from mm_piece.families import weights, why_fixed
from mm_piece.modules import is_intercepted, owners_of
from mm_piece.sparse.patches import ForwardState, Patch, is_in_backward, patched_module

# Dtypes whose numbers fp32 values hold exactly.
PATCHABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class sparse_tuning:  # noqa: N801 - used as a function, in a `with` statement
    """Context in which only the entries of `mask` train; the model keeps what was learned.

    `mask` maps published names to sorted flat indices. Any optimizer over `parameters()` trains
    them: after each of its steps the values are in the weights. A value that a step's gradient
    does not reach, as a vision tower's in a step without images, has the gradient zero. What the
    model saves meanwhile holds the values too, as NAME_values; a copy of it is a plain model.

    Raises SelectionError for an unknown name, indices that are out of range or not sorted and
    unique, or an empty mask.
    """

    def __init__(self, model: nn.Module, mask: Mapping[str, Tensor]) -> None:
        self.model = model
        if not isinstance(mask, Mapping):
            raise SelectionError(f"a mask maps names to flat indices; this is {format_value(mask)}")
        for name, index in mask.items():
            if not isinstance(index, Tensor) or index.is_meta:
                raise SelectionError(
                    f"mask of {name!r}: indices are a tensor, not {format_value(index)}"
                )

        chosen = {name: index.cpu() for name, index in mask.items() if index.numel()}
        named = weights(model)
        _require_untuned(model)
        _require_valid_mask(chosen, named)
        self.mask = {name: chosen[name] for name in named if name in chosen}
        self.patches: dict[str, Patch] = {}
        self._forward_state = ForwardState()
        self._is_open = False

    def __enter__(self) -> "sparse_tuning":
        _require_untuned(self.model)
        self.weights = named = weights(self.model)  # while the values are not among them
        self._base_fingerprint = compute_fingerprint(named)
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        owners = owners_of(self.model)
        self.patches = {
            name: Patch(named[name], index, owners[id(named[name])], self._forward_state)
            for name, index in self.mask.items()
        }
        self._value_ids = {id(values) for values in self.parameters()}

        with ExitStack() as stack:
            stack.callback(_restore_flags, flags)
            self.model.requires_grad_(False)
            for module, attributes in self._group_by_module().items():
                stack.enter_context(patched_module(module, attributes))
            handles = (
                register_optimizer_step_pre_hook(self._before_step),
                register_optimizer_step_post_hook(self._after_step),
                *_register_forward_hooks(self),
            )
            for handle in handles:
                stack.callback(handle.remove)
            self._exit_stack = stack.pop_all()
        self._is_open = True
        return self

    def __exit__(self, *_: Any) -> None:
        with self._exit_stack:
            try:
                self.write_back()
            finally:
                self._is_open = False

    def parameters(self) -> list[nn.Parameter]:
        """The compact fp32 values, one vector per patched weight, in the model's order."""
        return list(self.named_values().values())

    def named_values(self) -> dict[str, nn.Parameter]:
        """The trained parameters under published names."""
        if not self.patches:
            raise SelectionError("there are no values yet: they are there inside of `with`")
        return {name: patch.values for name, patch in self.patches.items()}

    def detach_values(self) -> dict[str, Tensor]:
        """The compact fp32 values under published names, detached.

        Not copied, unless they lie in parts on several processes.
        """
        with gathered_parameters(self.parameters()):
            return {
                name: values.detach().clone() if is_partitioned(values) else values.detach()
                for name, values in self.named_values().items()
            }

    @torch.no_grad()
    def restore_values(self, values: Mapping[str, Tensor]) -> None:
        """Take up values saved earlier and write them into the model.

        Raises SelectionError outside of the context, and for values of another mask.
        """
        if not self._is_open:
            raise SelectionError("values are restored inside of `with`")
        expected = {name: len(patch.index) for name, patch in self.patches.items()}
        if {name: len(row) for name, row in values.items()} != expected:
            raise SelectionError("these values belong to another mask")
        for name, patch in self.patches.items():
            patch.values.copy_(values[name])
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the values into the weights, rounded to their dtype; optimizers' steps do it.

        Nothing is left to write once the context is left: the weights are others' then.
        """
        if self._is_open:
            self._scatter_values(self.patches.values())

    def delta(self, task: str, base: str | None = None, parent: str = "", **info: Any) -> Delta:
        """What was learned, as a delta against the model as it stood on entering.

        `base` is the fingerprint of position 0; without it, of the model as it stood on entering.
        """
        self.write_back()
        learned = self.detach_values()
        return Delta.from_change(
            self.mask,
            {name: patch.entries_before for name, patch in self.patches.items()},
            {
                name: learned[name].to(patch.entries_before.dtype)
                for name, patch in self.patches.items()
            },
            {name: patch.shape for name, patch in self.patches.items()},
            task=task,
            base=self._base_fingerprint if base is None else base,
            parent=parent,
            info=info,
        )

    def _scatter_values(self, patches: Collection[Patch]) -> None:
        with gathered_parameters([patch.values for patch in patches]):
            scatter_entries(patch.build_write() for patch in patches)
        for patch in patches:
            patch.mark_written()

    def _group_by_module(self) -> dict[nn.Module, dict[str, Patch]]:
        """The patches of each module that holds patched weights, by attribute."""
        found: dict[nn.Module, dict[str, Patch]] = {}
        for patch in self.patches.values():
            for owner in patch.owners:
                found.setdefault(owner.module, {})[owner.attribute] = patch
        return found

    def _find_stepped_values(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """The values that an optimizer steps."""
        every = (one for group in optimizer.param_groups for one in group["params"])
        return [one for one in every if id(one) in self._value_ids]

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Give unreached values the gradient zero, which they have on several processes too.

        Without it an optimizer would skip them, state and decay included; DDP and ZeRO cannot.
        """
        stepped = self._find_stepped_values(optimizer)
        if any(values.grad is not None for values in stepped):
            for values in stepped:
                if values.grad is None:
                    values.grad = torch.zeros_like(values)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Write what was learned; an engine that steps parts of its own hands it on later.

        Later too where each value is stepped as soon as it has its gradient: the rest of the
        backward pass needs the weights as they were.
        """
        stepped = {id(values) for values in self._find_stepped_values(optimizer)}
        if stepped and not is_in_backward():
            self._scatter_values([p for p in self.patches.values() if id(p.values) in stepped])

    @torch.no_grad()
    def _catch_up(self) -> None:
        """Write what was learned by an engine, or by a loop without one of torch's optimizers.

        Nothing is written where nothing changed: a backward pass may still need the weights.
        """
        patches = self.patches.values()
        if any(patch.is_behind() for patch in patches):
            self._scatter_values(patches)


def _register_forward_hooks(tuning: sparse_tuning) -> tuple[RemovableHandle, RemovableHandle]:
    """Have a tuning catch up when a pass of its model begins; a copy of the model does not."""

    @torch.compiler.disable
    def begin_forward(model: nn.Module, *_: Any) -> None:
        if model is tuning.model and tuning._is_open:
            tuning._catch_up()
            tuning._forward_state.is_active = True

    @torch.compiler.disable
    def end_forward(model: nn.Module, *_: Any) -> None:
        if model is tuning.model:
            tuning._forward_state.is_active = False

    before = tuning.model.register_forward_pre_hook(begin_forward)  # type: ignore[arg-type]
    return before, tuning.model.register_forward_hook(end_forward, always_call=True)  # type: ignore[arg-type]


def _restore_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _require_untuned(model: nn.Module) -> None:
    if is_intercepted(model):
        raise SelectionError("the model is being tuned already; leave that context first")


def _require_valid_mask(mask: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
    if not mask:
        raise SelectionError("the mask selects no entry")
    for name, index in mask.items():
        if name not in named:
            raise SelectionError(f"the mask names {name!r}, which the model does not have")
        if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
            raise SelectionError(f"mask of {name!r}: indices are a vector of int32 or int64")
        weight = named[name]
        if reason := why_fixed(weight):
            raise SelectionError(f"{name} {reason}")
        if weight.dtype not in PATCHABLE_DTYPES:
            raise SelectionError(
                f"{name} is {weight.dtype}; trained are {', '.join(map(str, PATCHABLE_DTYPES))}"
            )
        size = shape_of(weight).numel()
        ascending = bool((index[1:] > index[:-1]).all())
        if not ascending or int(index[0]) < 0 or int(index[-1]) >= size:
            raise SelectionError(f"mask of {name!r}: indices must ascend within 0…{size - 1}")
