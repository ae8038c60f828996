"""Training of the selected entries only: compact fp32 values and their gradients.

A patched weight stays where it is and what it is. Beside it stands a vector of fp32 values, the
only thing that an optimizer sees; after each step the values are written into the weight. Every
other weight is frozen: it gets no gradient, so no optimizer, weight decay or sharding can move it.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from mm_piece.deltas.delta import Delta, compute_fingerprint
from mm_piece.distributed import (
    gathered_parameters,
    is_partitioned,
    scatter_entries,
    shape_of,
)
from mm_piece.dtypes import TRAINABLE_DTYPES
from mm_piece.errors import SelectionError, format_value
from mm_piece.families import weights, why_fixed
from mm_piece.modules import is_intercepted, owners_of
from mm_piece.sparse.patches import (
    ForwardState,
    Patch,
    is_in_backward,
    patched_module,
)

# fp32 values hold the numbers of all of these exactly.
PATCHABLE_DTYPES = tuple(TRAINABLE_DTYPES.values())


class sparse_tuning:  # noqa: N801 - used as a function, in a `with` statement
    """Context in which only the entries of `mask` train; the model keeps what was learned.

    `mask` maps published names to sorted flat indices. Any optimizer over `parameters()` trains
    them: after each of its steps the values are in the weights. A value that receives no gradient
    in a step, as a vision tower's in a step without images, has the gradient zero. What the model
    saves meanwhile includes the values, as NAME_values; a copy of it is a plain model.

    Raises SelectionError for an unknown name, indices that are out of range or not sorted and
    unique, or an empty mask.
    """

    def __init__(self, model: nn.Module, mask: Mapping[str, Tensor]) -> None:
        self.model = model
        if not isinstance(mask, Mapping):
            raise SelectionError(f"a mask maps names to flat indices; this is {format_value(mask)}")

        selected: dict[str, Tensor] = {}
        for name, index in mask.items():
            if not isinstance(index, Tensor) or index.is_meta:
                raise SelectionError(
                    f"mask of {name!r}: indices are a tensor, not {format_value(index)}"
                )
            if index.numel():
                selected[name] = index.cpu()

        named = weights(model)
        _require_untuned(model)
        _require_valid_mask(selected, named)

        # In the model's order, whatever order the mask has.
        self.mask = {name: selected[name] for name in named if name in selected}
        # Filled on entering: the model may be another one by then.
        self.weights: dict[str, nn.Parameter] = {}
        self.patches: dict[str, Patch] = {}
        self._base_fingerprint = ""
        self._value_ids: set[int] = set()
        self._forward_state = ForwardState()
        self._exit_stack = ExitStack()
        self._is_open = False

    def __enter__(self) -> "sparse_tuning":
        _require_untuned(self.model)
        self.weights = weights(self.model)  # while the values are not among them
        self._base_fingerprint = compute_fingerprint(self.weights)
        flags = []
        for parameter in self.model.parameters():
            flag = (parameter, parameter.requires_grad)
            flags.append(flag)

        owners = owners_of(self.model)
        patches: dict[str, Patch] = {}
        for name, index in self.mask.items():
            weight = self.weights[name]
            weight_owners = owners[id(weight)]
            patches[name] = Patch(
                weight,
                index,
                weight_owners,
                self._forward_state,
            )
        self.patches = patches
        self._value_ids = {id(values) for values in self.parameters()}

        with ExitStack() as stack:
            stack.callback(_restore_flags, flags)
            self.model.requires_grad_(False)

            patches_by_module = self._group_by_module()
            for module, attributes in patches_by_module.items():
                stack.enter_context(patched_module(module, attributes))

            handles = (
                register_optimizer_step_pre_hook(self._before_step),
                register_optimizer_step_post_hook(self._after_step),
                *_register_forward_hooks(self),
            )
            for handle in handles:
                stack.callback(handle.remove)

            # All has been entered: it is left in `__exit__`, not here.
            self._exit_stack = stack.pop_all()
        self._is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        with self._exit_stack:
            try:
                self.write_back()
            finally:
                self._is_open = False

    def parameters(self) -> list[nn.Parameter]:
        """Return the compact fp32 values, one vector per patched weight, in the model's order."""
        named = self.named_values()
        values = named.values()
        return list(values)

    def named_values(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters under published names."""
        if not self.patches:
            raise SelectionError("there are no values yet: they are there inside of `with`")
        return {name: patch.values for name, patch in self.patches.items()}

    def detach_values(self) -> dict[str, Tensor]:
        """Return the compact fp32 values under published names, detached.

        Not copied, unless they are partitioned among several processes.
        """
        named = self.named_values()
        found: dict[str, Tensor] = {}
        with gathered_parameters(self.parameters()):
            for name, values in named.items():
                detached = values.detach()
                if is_partitioned(values):
                    # The memory of gathered values is freed with the context.
                    detached = detached.clone()
                found[name] = detached
        return found

    @torch.no_grad()
    def restore_values(self, values: Mapping[str, Tensor]) -> None:
        """Restore values saved earlier and write them into the model.

        Raises SelectionError outside of the context, and for values of another mask.
        """
        if not self._is_open:
            raise SelectionError("values are restored inside of `with`")

        expected_sizes: dict[str, int] = {}
        for name, patch in self.patches.items():
            expected_sizes[name] = len(patch.index)
        sizes = {name: len(vector) for name, vector in values.items()}
        if sizes != expected_sizes:
            raise SelectionError("these values belong to another mask")

        for name, patch in self.patches.items():
            patch.values.copy_(values[name])
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the values into the weights, rounded to their dtype, as optimizers' steps do.

        Do nothing outside of the context: others may write the weights then.
        """
        if self._is_open:
            self._scatter_values(self.patches.values())

    def delta(
        self,
        task: str,
        base: str | None = None,
        parent: str = "",
        **info: object,
    ) -> Delta:
        """Return what was learned, as a delta against the model as it stood on entering.

        `base` is the fingerprint of position 0; without it, of the model as it stood on entering.
        """
        if base is None:
            base = self._base_fingerprint
        self.write_back()
        learned = self.detach_values()

        before: dict[str, Tensor] = {}
        after: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, patch in self.patches.items():
            entries_before = patch.entries_before
            before[name] = entries_before
            after[name] = learned[name].to(entries_before.dtype)
            shapes[name] = patch.shape

        return Delta.from_change(
            self.mask,
            before,
            after,
            shapes,
            task=task,
            base=base,
            parent=parent,
            info=info,
        )

    def _scatter_values(self, patches: Collection[Patch]) -> None:
        """Write the values of some patches into their weights, all of them or none."""
        values = [patch.values for patch in patches]
        with gathered_parameters(values):
            scatter_entries(patch.build_write() for patch in patches)
        for patch in patches:
            patch.mark_written()

    def _group_by_module(self) -> dict[nn.Module, dict[str, Patch]]:
        """Return the patches of each module that has patched weights, by attribute."""
        found: dict[nn.Module, dict[str, Patch]] = {}
        for patch in self.patches.values():
            for owner in patch.owners:
                attributes = found.setdefault(owner.module, {})
                attributes[owner.attribute] = patch
        return found

    def _find_stepped_values(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Return the values that an optimizer steps."""
        found = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._value_ids:
                    found.append(parameter)
        return found

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        """Set the gradient of values that received none to zero, if others received one.

        Without it an optimizer skips them, their state and decay included. DDP and ZeRO cannot do
        that: their results would differ from those of one process.
        """
        stepped = self._find_stepped_values(optimizer)
        if all(values.grad is None for values in stepped):
            return

        for values in stepped:
            if values.grad is None:
                values.grad = torch.zeros_like(values)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        """Write the values that an optimizer has stepped into their weights.

        An engine that steps shards of its own does not get here: `_catch_up` writes for it.
        """
        # Some loops step each value as soon as it has its gradient. The rest of the backward pass
        # needs the weights as they were, so that these are written later.
        stepped_values = self._find_stepped_values(optimizer)
        if not stepped_values or is_in_backward():
            return

        stepped_ids = {id(values) for values in stepped_values}
        stepped = []
        for patch in self.patches.values():
            if id(patch.values) in stepped_ids:
                stepped.append(patch)
        self._scatter_values(stepped)

    @torch.no_grad()
    def _catch_up(self) -> None:
        """Write what was learned by an engine, or by a loop without one of torch's optimizers.

        Nothing is written where nothing changed: a backward pass may still need the weights.
        """
        patches = self.patches.values()
        if any(patch.is_behind() for patch in patches):
            self._scatter_values(patches)


def _register_forward_hooks(tuning: sparse_tuning) -> tuple[RemovableHandle, RemovableHandle]:
    """Register hooks by which a tuning catches up when a forward pass of its model begins.

    A copy of the model has these hooks too; in it they do nothing.
    """

    @torch.compiler.disable
    def begin_forward(model: nn.Module, *_: object) -> None:
        if model is tuning.model and tuning._is_open:
            tuning._catch_up()
            tuning._forward_state.is_active = True

    @torch.compiler.disable
    def end_forward(model: nn.Module, *_: object) -> None:
        if model is tuning.model:
            tuning._forward_state.is_active = False

    # `always_call`: a pass that fails has ended, too.
    model = tuning.model
    before = model.register_forward_pre_hook(begin_forward)  # type: ignore[arg-type]
    after = model.register_forward_hook(
        end_forward,  # type: ignore[arg-type]
        always_call=True,
    )
    return before, after


def _restore_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _require_untuned(model: nn.Module) -> None:
    if is_intercepted(model):
        raise SelectionError("the model is being tuned already; leave that context first")


def _require_valid_mask(
    mask: Mapping[str, Tensor],
    named: Mapping[str, nn.Parameter],
) -> None:
    """Raise SelectionError unless a mask fits the weights of a model."""
    if not mask:
        raise SelectionError("the mask selects no entry")

    for name, index in mask.items():
        if name not in named:
            raise SelectionError(f"the mask names {name!r}, which the model does not have")
        has_integers = index.dtype in (torch.int32, torch.int64)
        if not has_integers or index.dim() != 1:
            raise SelectionError(f"mask of {name!r}: indices are a vector of int32 or int64")

        weight = named[name]
        reason = why_fixed(weight)
        if reason:
            raise SelectionError(f"{name} {reason}")
        if weight.dtype not in PATCHABLE_DTYPES:
            allowed = ", ".join(map(str, PATCHABLE_DTYPES))
            raise SelectionError(f"{name} is {weight.dtype}; trained are {allowed}")

        # Ascending indices are within the bounds if the first and the last are.
        size = shape_of(weight).numel()
        first = int(index[0])
        last = int(index[-1])
        is_ascending = index[1:] > index[:-1]
        if not bool(is_ascending.all()) or first < 0 or last >= size:
            raise SelectionError(f"mask of {name!r}: indices must ascend within 0…{size - 1}")
