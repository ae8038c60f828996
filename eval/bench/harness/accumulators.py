"""Bytes of importance's accumulators, as they were allocated and freed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from mm_piece.importance.accumulators import GradientSums


@contextmanager
def recorded_allocations() -> Iterator[list[int]]:
    """Yield a list that gets, at the beginning of every pass, the bytes of all that live."""
    original_init, allocated_bytes, living = GradientSums.__init__, [], WeakSet()

    def recording_init(self: GradientSums, *given: Any) -> None:
        original_init(self, *given)
        living.add(self)
        allocated_bytes.append(
            sum(
                t.nbytes
                for s in living
                for t in (*s.gradient_sums.values(), *s.square_sums.values())
            )
        )

    GradientSums.__init__ = recording_init  # type: ignore[method-assign]
    try:
        yield allocated_bytes
    finally:
        GradientSums.__init__ = original_init  # type: ignore[method-assign]
