"""What happens where a module's parameter is read, by whomever: in its layer or outside of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

Reader = Callable[[nn.Module], Tensor]

_READERS = "_readers"  # of a module whose class `intercept_reads` has changed, by attribute
_RUNNING = "_is_running"  # a tracked module that runs at the moment


class Intercepted:
    """Marks a module whose class `intercept_reads` has changed."""

    __slots__ = ()


@contextmanager
def intercept_reads(module: nn.Module, readers: Mapping[str, Reader]) -> Iterator[None]:
    """Context in which reading one of a module's parameters gives what its reader returns.

    The parameters stay where they are, under their names and in their order: the module's class
    is a subclass of the same name, with a property for each reader.
    """
    kind = type(module)
    vars(module)[_READERS] = dict(readers)
    module.__class__ = _subclass_of(kind, tuple(readers))
    try:
        yield
    finally:
        module.__class__ = kind
        del vars(module)[_READERS]


@cache
def _subclass_of(kind: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    members |= {attribute: property(partial(_read, attribute)) for attribute in attributes}
    return type(kind.__name__, (kind, Intercepted), members)


def _read(attribute: str, module: nn.Module) -> Tensor:
    return vars(module)[_READERS][attribute](module)


@contextmanager
def track_calls(module: nn.Module) -> Iterator[None]:
    """Context in which `is_running` tells whether a module is running, called as a module is."""
    before = module.register_forward_pre_hook(_enter)
    after = module.register_forward_hook(_leave, prepend=True, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        vars(module).pop(_RUNNING, None)


def is_running(module: nn.Module) -> bool:
    """Whether a tracked module runs at the moment."""
    return vars(module).get(_RUNNING, False)


def _enter(module: nn.Module, _: Any) -> None:
    setattr(module, _RUNNING, True)


def _leave(module: nn.Module, *_: Any) -> None:
    setattr(module, _RUNNING, False)
