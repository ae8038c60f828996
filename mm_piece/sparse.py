"""Training of the selected entries only: compact fp32 values and their gradients.

A patched weight stays where it is and what it is. Beside it stands a vector of fp32 values, the
only thing that an optimizer sees; after each step the values are written into the weight. Every
other weight is frozen: it gets no gradient, so no optimizer, weight decay or sharding can move it.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mm_piece.delta import Delta, fingerprint
from mm_piece.errors import SelectionError, short
from mm_piece.names import weights, why_fixed
from mm_piece.owners import owners_of
from mm_piece.parameter_reads import Intercepted
from mm_piece.patches import Patch, patched
from mm_piece.sharding import is_cut, put_all, shape_of, whole


class sparse_tuning:  # noqa: N801 - used as a function, in a `with` statement
    """Context in which only the entries of `mask` train; the model keeps what was learned.

    `mask` maps published names to sorted flat indices. Any optimizer over `parameters()` trains
    them: after each of its steps the values are in the weights. A value that a step's gradient
    does not reach, as a vision tower's in a step without images, has the gradient zero.

    Raises SelectionError for an unknown name, indices that are out of range or not sorted and
    unique, or an empty mask.
    """

    def __init__(self, model: nn.Module, mask: Mapping[str, Tensor]) -> None:
        self.model = model
        if not isinstance(mask, Mapping):
            raise SelectionError(f"a mask maps names to flat indices; this is {short(mask)}")
        for name, index in mask.items():
            if not isinstance(index, Tensor) or index.is_meta:
                raise SelectionError(f"mask of {name!r}: indices are a tensor, not {short(index)}")

        chosen = {name: index.cpu() for name, index in mask.items() if index.numel()}
        named = weights(model)
        if any(isinstance(module, Intercepted) for module in model.modules()):
            raise SelectionError("the model is being tuned already; leave that context first")
        _check(chosen, named)
        self.mask = {name: chosen[name] for name in named if name in chosen}

    def __enter__(self) -> "sparse_tuning":
        self.weights = named = weights(self.model)  # while the values are not among them
        self._base = fingerprint(named)
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        owners = owners_of(self.model)
        self.patches = {
            name: Patch(named[name], index, owners[id(named[name])])
            for name, index in self.mask.items()
        }
        self._values = {id(values) for values in self.parameters()}

        with ExitStack() as stack:
            stack.callback(_restore_flags, flags)
            self.model.requires_grad_(False)
            for module, attributes in self._by_module().items():
                stack.enter_context(patched(module, attributes))
            handles = (
                register_optimizer_step_pre_hook(self._before_step),
                register_optimizer_step_post_hook(self._after_step),
                self.model.register_forward_pre_hook(_before_forward(self)),
            )
            for handle in handles:
                stack.callback(handle.remove)
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._leave:
            self.write_back()

    def parameters(self) -> list[nn.Parameter]:
        """The compact fp32 values, one vector per patched weight, in the model's order."""
        return [patch.values for patch in self.patches.values()]

    def named(self) -> dict[str, nn.Parameter]:
        """The trained parameters under published names."""
        return {name: patch.values for name, patch in self.patches.items()}

    def values(self) -> dict[str, Tensor]:
        """The compact fp32 values under published names, detached.

        Not copied, unless they lie in parts on several processes.
        """
        with whole(self.parameters()):
            return {
                name: values.detach().clone() if is_cut(values) else values.detach()
                for name, values in self.named().items()
            }

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Take up values saved earlier and write them into the model."""
        for name, patch in self.patches.items():
            patch.values.copy_(values[name])
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the values into the weights, rounded to their dtype; optimizers' steps do it."""
        with whole(self.parameters()):
            put_all(patch.write() for patch in self.patches.values())
        for patch in self.patches.values():
            patch.reached = False

    def delta(self, task: str, base: str | None = None, parent: str = "", **info: Any) -> Delta:
        """What was learned, as a delta against the model as it stood on entering.

        `base` is the fingerprint of position 0; without it, of the model as it stood on entering.
        """
        self.write_back()
        return Delta.from_change(
            self.mask,
            {name: patch.before for name, patch in self.patches.items()},
            {name: patch.entries() for name, patch in self.patches.items()},
            {name: patch.shape for name, patch in self.patches.items()},
            task=task,
            base=self._base if base is None else base,
            parent=parent,
            info=info,
        )

    def _by_module(self) -> dict[nn.Module, dict[str, Patch]]:
        """The patches of each module that holds patched weights, by attribute."""
        found: dict[nn.Module, dict[str, Patch]] = {}
        for patch in self.patches.values():
            for owner in patch.owners:
                found.setdefault(owner.module, {})[owner.attribute] = patch
        return found

    def _stepped(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """The values that an optimizer steps."""
        every = (one for group in optimizer.param_groups for one in group["params"])
        return [one for one in every if id(one) in self._values]

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Give unreached values the gradient zero, which they have on several processes too.

        Without it an optimizer would skip them, state and decay included; DDP and ZeRO cannot.
        """
        stepped = self._stepped(optimizer)
        if any(values.grad is not None for values in stepped):
            for values in stepped:
                if values.grad is None:
                    values.grad = torch.zeros_like(values)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Write what was learned; an engine that steps parts of its own hands it on later."""
        if self._stepped(optimizer):
            self.write_back()

    def _catch_up(self) -> None:
        """Write what was learned by an engine, or by a loop without one of torch's optimizers.

        Nothing is written where nothing changed: a backward pass may still need the weights.
        """
        patches = self.patches.values()
        if any(patch.reached for patch in patches):
            if any(patch.is_behind() for patch in patches):
                self.write_back()
            for patch in patches:
                patch.reached = False


def _before_forward(tuning: sparse_tuning) -> Callable[..., None]:
    """The hook for it; a function, so that a copy of the model does not copy the tuning."""

    @torch.compiler.disable
    def catch_up(*_: Any) -> None:
        tuning._catch_up()

    return catch_up  # type: ignore[return-value] - disable hides its form


def _restore_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _check(mask: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
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
        size = shape_of(weight).numel()
        ascending = bool((index[1:] > index[:-1]).all())
        if not ascending or int(index[0]) < 0 or int(index[-1]) >= size:
            raise SelectionError(f"mask of {name!r}: indices must ascend within 0…{size - 1}")
