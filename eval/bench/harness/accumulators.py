"""Bytes of importance's accumulators, as they were allocated and freed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from mm_piece.importance.accumulators import Sums


@contextmanager
def allocated() -> Iterator[list[int]]:
    """Yield a list that gets, at the beginning of every pass, the bytes of all that live."""
    made, held, living = Sums.__init__, [], WeakSet()

    def watched(self: Sums, *given: Any) -> None:
        made(self, *given)
        living.add(self)
        held.append(sum(t.nbytes for s in living for t in (*s.first.values(), *s.second.values())))

    Sums.__init__ = watched  # type: ignore[method-assign]
    try:
        yield held
    finally:
        Sums.__init__ = made  # type: ignore[method-assign]
