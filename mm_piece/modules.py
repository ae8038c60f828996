"""Which modules own a weight, and interception of reads of it.

A weight may lie in several modules (tied weights), and code outside of its own layer may read it
(functional layers). To intercept every read, a module's class is replaced for some time by a
subclass in which the weight is a property.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

Reader = Callable[[nn.Module], Tensor]

_INTERCEPTION = "_interception"  # of a module whose class `intercepting_reads` has changed
_RUNNING = "_is_running"  # of a module that `tracking_calls` tracks and that runs at the moment


@dataclass
class Interception:
    """What a module has only while reads of its parameters are intercepted."""

    readers: dict[str, Reader]  # by attribute
    parameters: list[str] = field(default_factory=list)  # registered besides its own
    hooks: list[int] = field(default_factory=list)  # the ids of their handles


class Intercepted:
    """A mark of modules whose class `intercepting_reads` has changed; a copy is a plain module."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Copying goes through here (`copy`, and whatever serialises a module). From protocol 2 on
        # the second item has the class alone, before that other arguments too.
        protocol = max(2, protocol)
        reduced: tuple[Any, ...] = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        create, _, state, *rest = reduced

        plain_class = type(self).__bases__[0]
        plain_state = _drop_interception(dict(state))
        return create, (plain_class,), plain_state, *rest


def is_intercepted(model: nn.Module) -> bool:
    """Return whether reads of any parameter are intercepted: the model is being tuned or scored."""
    modules = model.modules()
    return any(isinstance(module, Intercepted) for module in modules)


@contextmanager
def intercepting_reads(
    module: nn.Module,
    readers: Mapping[str, Reader],
) -> Iterator[Interception]:
    """Keep reads of some of a module's parameters returning what their reader returns.

    The parameters stay where they are, under their names and in their order. Parameters and hooks
    that a caller adds to the module meanwhile belong in the Interception: copies leave them out.
    """
    # Python looks up a property on the class only: hence a subclass, of the same name.
    original_class = type(module)
    interception = Interception(dict(readers))
    attributes = tuple(readers)
    subclass = _make_subclass(original_class, attributes)
    vars(module)[_INTERCEPTION] = interception
    module.__class__ = subclass
    try:
        yield interception
    finally:
        module.__class__ = original_class
        del vars(module)[_INTERCEPTION]


def _drop_interception(state: dict[str, Any]) -> dict[str, Any]:
    """Return a module's attributes without what it has only while its reads are intercepted."""
    interception: Interception = state.pop(_INTERCEPTION)
    state.pop(_RUNNING, None)

    # torch has a dict by id for the hooks of each kind, and further ones for their options.
    dropped: dict[str, Collection[object]] = {
        "_parameters": interception.parameters,
    }
    for attribute in state:
        if "_hooks" in attribute:
            dropped[attribute] = interception.hooks

    # New dicts: those of `state` are the module's own.
    for attribute, keys in dropped.items():
        original = state[attribute]
        remaining = type(original)()
        for key, value in original.items():
            if key not in keys:
                remaining[key] = value
        state[attribute] = remaining
    return state


@cache
def _make_subclass(
    kind: type[nn.Module],
    attributes: tuple[str, ...],
) -> type[nn.Module]:
    """Return a subclass whose attributes are read through a module's Interception.

    It is the same for the same arguments, so that modules of one class still have one class.
    """
    members: dict[str, object] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    for attribute in attributes:
        getter = partial(_call_reader, attribute)
        members[attribute] = property(getter)

    base_classes = (kind, Intercepted)
    return type(kind.__name__, base_classes, members)


def _call_reader(
    attribute: str,
    module: nn.Module,
) -> Tensor:
    """Return what the module's reader of an attribute returns."""
    interception: Interception = vars(module)[_INTERCEPTION]
    reader = interception.readers[attribute]
    return reader(module)


@contextmanager
def tracking_calls(module: nn.Module) -> Iterator[list[int]]:
    """Keep `is_running` up to date for a module while the block runs. Yields the ids of its hooks.

    Hooks see calls of the module as such, not of its `forward` method.
    """
    before = module.register_forward_pre_hook(_mark_running)
    # `always_call`: a call that fails has ended, too.
    after = module.register_forward_hook(
        _mark_stopped,
        prepend=True,
        always_call=True,
    )
    try:
        yield [before.id, after.id]
    finally:
        before.remove()
        after.remove()
        vars(module).pop(_RUNNING, None)


def is_running(module: nn.Module) -> bool:
    """Return whether a tracked module runs at the moment."""
    return vars(module).get(_RUNNING, False)


def _mark_running(module: nn.Module, _: object) -> None:
    setattr(module, _RUNNING, True)


def _mark_stopped(module: nn.Module, *_: object) -> None:
    setattr(module, _RUNNING, False)


@dataclass(frozen=True)
class WeightOwner:
    """A module that owns a weight, under this attribute, and the modules around it."""

    attribute: str
    module_chain: tuple[nn.Module, ...]  # the module itself, the one around it, … up to the model

    @property
    def module(self) -> nn.Module:
        """The module that owns the weight."""
        return self.module_chain[0]

    def is_linear(self, attribute: str) -> bool:
        """Return whether this is that attribute (weight, bias) of a linear layer.

        A subclass of one may compute something else with it, and does not count.
        """
        is_linear_layer = type(self.module) is nn.Linear
        return is_linear_layer and self.attribute == attribute


def owners_of(model: nn.Module) -> dict[int, list[WeightOwner]]:
    """Return all modules that own each weight, by the weight's `id`."""
    owners: dict[int, list[WeightOwner]] = {}
    modules = dict(model.named_modules())

    for path, module in modules.items():
        # The path `a.b.c` lies in `a.b`, in `a`, and in the model, whose path is empty.
        enclosing_path = path
        module_chain = [module]
        while enclosing_path:
            enclosing_path, _, _ = enclosing_path.rpartition(".")
            enclosing_module = modules[enclosing_path]
            module_chain.append(enclosing_module)

        own_weights = module.named_parameters(recurse=False)
        for attribute, weight in own_weights:
            weight_owners = owners.setdefault(id(weight), [])
            owner = WeightOwner(attribute, tuple(module_chain))
            weight_owners.append(owner)
    return owners
