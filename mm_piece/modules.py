"""Which modules hold a weight, and what happens where one of them reads it.

A weight may lie in several modules (tied weights), and be read outside of its own layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

Reader = Callable[[nn.Module], Tensor]

_INTERCEPTION = "_interception"  # of a module whose class `intercept_reads` has changed
_RUNNING = "_is_running"  # a tracked module that runs at the moment


@dataclass
class Interception:
    """What a module has for the time in which its parameters' reads are intercepted."""

    readers: dict[str, Reader]  # by attribute
    parameters: list[str] = field(default_factory=list)  # registered besides its own
    hooks: list[int] = field(default_factory=list)  # the ids of their handles


class Intercepted:
    """Marks a module whose class `intercept_reads` has changed; a copy of it is a plain module."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: tuple[Any, ...] = super().__reduce_ex__(max(2, protocol))  # type: ignore[assignment]
        create, _, state, *rest = reduced
        return create, (type(self).__bases__[0],), _drop_interception(dict(state)), *rest


def is_intercepted(model: nn.Module) -> bool:
    """Whether reads of any parameter of a model are intercepted: it is being tuned or scored."""
    return any(isinstance(module, Intercepted) for module in model.modules())


@contextmanager
def intercepting_reads(module: nn.Module, readers: Mapping[str, Reader]) -> Iterator[Interception]:
    """Context in which reading one of a module's parameters gives what its reader returns.

    The parameters stay where they are, under their names and in their order: the module's class
    is a subclass of the same name, with a property for each reader. What is added to the module
    meanwhile is to be taken down in the Interception: copies do without it.
    """
    kind, interception = type(module), Interception(dict(readers))
    vars(module)[_INTERCEPTION] = interception
    module.__class__ = _make_subclass(kind, tuple(readers))
    try:
        yield interception
    finally:
        module.__class__ = kind
        del vars(module)[_INTERCEPTION]


def _drop_interception(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module without what is there while its reads are intercepted."""
    interception: Interception = state.pop(_INTERCEPTION)
    state.pop(_RUNNING, None)
    dropped = {"_parameters": interception.parameters}
    dropped |= dict.fromkeys((name for name in state if "_hooks" in name), interception.hooks)

    for name, keys in dropped.items():
        remaining = {key: value for key, value in state[name].items() if key not in keys}
        state[name] = type(state[name])(remaining)
    return state


@cache
def _make_subclass(kind: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    members |= {attribute: property(partial(_call_reader, attribute)) for attribute in attributes}
    return type(kind.__name__, (kind, Intercepted), members)


def _call_reader(attribute: str, module: nn.Module) -> Tensor:
    return vars(module)[_INTERCEPTION].readers[attribute](module)


@contextmanager
def tracking_calls(module: nn.Module) -> Iterator[list[int]]:
    """Context in which `is_running` tells whether a module is running, called as a module is.

    Gives the ids of its hooks.
    """
    before = module.register_forward_pre_hook(_mark_running)
    after = module.register_forward_hook(_mark_stopped, prepend=True, always_call=True)
    try:
        yield [before.id, after.id]
    finally:
        before.remove()
        after.remove()
        vars(module).pop(_RUNNING, None)


def is_running(module: nn.Module) -> bool:
    """Whether a tracked module runs at the moment."""
    return vars(module).get(_RUNNING, False)


def _mark_running(module: nn.Module, _: Any) -> None:
    setattr(module, _RUNNING, True)


def _mark_stopped(module: nn.Module, *_: Any) -> None:
    setattr(module, _RUNNING, False)


@dataclass(frozen=True)
class WeightOwner:
    """A module that holds a weight under this attribute, and what the module lies in."""

    attribute: str
    module_chain: tuple[nn.Module, ...]  # the module itself, the one around it, … up to the model

    @property
    def module(self) -> nn.Module:
        """The module that holds the weight."""
        return self.module_chain[0]

    def is_linear(self, attribute: str) -> bool:
        """Whether this is that attribute (weight, bias) of a linear layer and nothing derived."""
        return type(self.module) is nn.Linear and self.attribute == attribute


def owners_of(model: nn.Module) -> dict[int, list[WeightOwner]]:
    """Every module that holds a given weight, by the weight's `id`."""
    found: dict[int, list[WeightOwner]] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        steps = path.split(".") if path else []
        enclosing = [modules[".".join(steps[:end])] for end in range(len(steps) - 1, -1, -1)]
        for attribute, weight in module.named_parameters(recurse=False):
            found.setdefault(id(weight), []).append(WeightOwner(attribute, (module, *enclosing)))
    return found
