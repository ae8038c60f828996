"""Bytes of importance's accumulators, as the library allocates and frees them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from mm_piece.importance.accumulators import GradientSums


@contextmanager
def recorded_allocations() -> Iterator[list[int]]:
    """Record, while the block runs, the bytes of all live accumulators as each pass begins."""
    original_init = GradientSums.__init__
    allocated_bytes = []
    # weak references: what the library frees must not count, nor be kept alive here
    living = WeakSet()

    def recording_init(self: GradientSums, *given: Any) -> None:
        original_init(self, *given)
        living.add(self)
        total = 0
        for sums in living:
            for tensor in (*sums.gradient_sums.values(), *sums.square_sums.values()):
                total += tensor.nbytes
        allocated_bytes.append(total)

    GradientSums.__init__ = recording_init  # type: ignore[method-assign]
    try:
        yield allocated_bytes
    finally:
        GradientSums.__init__ = original_init  # type: ignore[method-assign]
