"""Training of the selected entries only: compact fp32 values and their gradients.

A patched weight stays where it is and what it is. Beside it stands a vector of fp32 values, the
only thing that an optimizer sees; after each step the values are written into the weight. Every
other weight is frozen: it gets no gradient, so no optimizer, weight decay or sharding can move it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mm_piece.delta import Delta, fingerprint
from mm_piece.errors import SelectionError
from mm_piece.names import weights
from mm_piece.owners import Owner, owners_of
from mm_piece.products import Product, product_for
from mm_piece.sharding import is_cut, put_all, shape_of, take, whole
from mm_piece.tensorfile import bits

_VALUES = "weight_values"  # the trainable parameter that a patched Linear carries


class sparse_tuning:  # noqa: N801 - used as a function, in a `with` statement
    """Context in which only the entries of `mask` train; the model keeps what was learned.

    `mask` maps published names to sorted flat indices. Raises SelectionError for an unknown name,
    indices that are out of range or not sorted and unique, or an empty mask.
    """

    def __init__(self, model: nn.Module, mask: Mapping[str, Tensor]) -> None:
        self.model = model
        for name, index in mask.items():
            if not isinstance(index, Tensor):
                raise SelectionError(f"mask of {name!r}: indices are a tensor, not {index!r}")
        self.mask = {name: index.cpu() for name, index in mask.items() if index.numel()}
        if any(isinstance(m, _Gathered) or _VALUES in m._parameters for m in model.modules()):
            raise SelectionError("the model is being tuned already; leave that context first")
        _check(self.mask, weights(model))

    def __enter__(self) -> "sparse_tuning":
        self.weights = named = weights(self.model)  # while every weight still has its own name
        self._base = fingerprint(named)
        self._flags = [
            (parameter, parameter.requires_grad) for parameter in self.model.parameters()
        ]
        self.model.requires_grad_(False)
        owners = owners_of(self.model)
        self.patches = {
            name: Patch(named[name], index, owners[id(named[name])])
            for name, index in self.mask.items()
        }
        return self

    def __exit__(self, *_: Any) -> None:
        self.write_back()
        for patch in self.patches.values():
            patch.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def parameters(self) -> list[nn.Parameter]:
        """The compact fp32 values, one vector per patched weight: what an optimizer gets."""
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
        """Write the values into the weights, rounded to their dtype; call it after each step."""
        with whole(self.parameters()):
            put_all(patch.write() for patch in self.patches.values())

    def delta(self, task: str, base: str | None = None, parent: str = "", **info: Any) -> Delta:
        """What was learned, as a delta against the model as it stood on entering.

        `base` is the fingerprint of position 0; without it, of the model as it stood on entering.
        """
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


class Patch:
    """One patched weight: its selected flat entries and their trainable values."""

    def __init__(self, weight: nn.Parameter, index: Tensor, owners: list[Owner]) -> None:
        self.weight, self.shape = weight, tuple(shape_of(weight))
        self.index = index.to(
            weight.device
        ).contiguous()  # int32 where that is enough, as the mask has it
        self.before = self.entries()
        self.values = nn.Parameter(self.before.to(torch.float32, copy=True))
        sampled = all(owner.is_linear("weight") for owner in owners)
        patch = _patch_linear if sampled else _patch_any
        self._undo = [patch(owner, self) for owner in owners]

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

    def remove(self) -> None:
        for undo in self._undo:
            undo()


class _Watched(torch.autograd.Function):
    """An output, unchanged; from its gradient comes that of the selected entries."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, output: Tensor, values: Tensor, x: Tensor, product: Product
    ) -> Tensor:
        # Autocast computes in the output's dtype: what it saw is kept, not what it was given.
        ctx.save_for_backward(product.keep(x.to(output.dtype)))
        ctx.product = product
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return gradient, ctx.product.gradient(kept, gradient), None, None


class _Gather(torch.autograd.Function):
    """The weight itself; its gradient is gathered at the selected entries."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return None, gradient.reshape(-1).index_select(0, index).float(), None


class _Gathered(nn.Module):
    """The parametrization that puts `_Gather` in front of a weight, whatever its module does."""

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self.values = patch.values
        self.index = patch.index  # a plain attribute: as a buffer, DDP would broadcast it

    def forward(self, weight: Tensor) -> Tensor:
        return _Gather.apply(weight, self.values, self.index)  # type: ignore[return-value]


def _patch_linear(owner: Owner, patch: Patch) -> Callable[[], None]:
    """Beside the layer's own product, which its frozen weight leaves without a weight gradient."""
    linear = owner.module
    rows, columns = patch.shape
    product = product_for(patch.index, (rows, columns))
    linear.register_parameter(_VALUES, patch.values)

    @torch.compiler.disable  # a compiled model breaks its graph here
    def watch(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _Watched.apply(output, patch.values, inputs[0], product)  # type: ignore

    handle = linear.register_forward_hook(watch)  # type: ignore[arg-type] - disable hides its form

    def undo() -> None:
        handle.remove()
        delattr(linear, _VALUES)

    return undo


def _patch_any(owner: Owner, patch: Patch) -> Callable[[], None]:
    """Universal fallback: the dense gradient, gathered."""
    module, attribute = owner.module, owner.attribute
    parametrize.register_parametrization(module, attribute, _Gathered(patch), unsafe=True)

    def undo() -> None:
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)

    return undo


def _check(mask: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
    if not mask:
        raise SelectionError("the mask selects no entry")
    for name, index in mask.items():
        if name not in named:
            raise SelectionError(f"the mask names {name!r}, which the model does not have")
        if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
            raise SelectionError(f"mask of {name!r}: indices are a vector of int32 or int64")
        size = shape_of(named[name]).numel()
        ascending = bool((index[1:] > index[:-1]).all())
        if not ascending or int(index[0]) < 0 or int(index[-1]) >= size:
            raise SelectionError(f"mask of {name!r}: indices must ascend within 0…{size - 1}")
