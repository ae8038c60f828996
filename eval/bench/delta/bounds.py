"""What no code can beat: information in masks, and in values whose bytes are coded one by one.

All in bits. `mask_bits` is exact for masks of which only size and count are known; a clustered mask
holds less, and a code that finds the clusters may go below.
"""

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from mm_piece.deltas.delta import Delta, gather_entries
from mm_piece.dtypes import view_bits


def choose_bits(size: int, count: int) -> float:
    """Return log2 of the number of ways to choose `count` of `size`."""
    ways = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    return ways / math.log(2)


def mask_bits(delta: Delta) -> float:
    """Return what the indices hold, tensor by tensor."""
    return sum(
        choose_bits(math.prod(delta.shapes[name]), len(index))
        for name, index in delta.indices.items()
    )


def mask_bits_given(delta: Delta, known: Mapping[str, Tensor]) -> float:
    """Return what the indices hold for a reader who has another mask: inside and outside of it."""
    total = 0.0
    for name, index in delta.indices.items():
        size, other = math.prod(delta.shapes[name]), known.get(name, index[:0])
        inside = len(np.intersect1d(index.numpy(), other.numpy(), assume_unique=True))
        total += choose_bits(len(other), inside)
        total += choose_bits(size - len(other), len(index) - inside)
    return total


def value_bits(rows: Mapping[str, Tensor]) -> float:
    """Return the zeroth-order entropy of the bytes, for each plane of each tensor by itself."""
    return sum(_plane_bits(view_bits(row).numpy()) for row in rows.values())


def difference_bits(delta: Delta, old: Mapping[str, Tensor]) -> float:
    """Return that entropy for differences of bit patterns, small ones of either sign small."""
    total = 0.0
    for name, values in delta.values.items():
        step = (
            view_bits(values).numpy() - view_bits(old[name]).numpy()
        )  # wraps around, as its inverse does
        total += _plane_bits((step << 1) ^ (step >> (8 * step.itemsize - 1)))
    return total


def previous_values(deltas: list[Delta], base: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the values that each delta replaces, and move `base` to the last position."""
    found = []
    for delta in deltas:
        found.append(
            {name: gather_entries(base[name], index) for name, index in delta.indices.items()}
        )
        delta.apply(base)
    return found


def _plane_bits(patterns: np.ndarray) -> float:
    planes = np.ascontiguousarray(patterns).view(np.uint8).reshape(patterns.size, -1).T
    total = 0.0
    for plane in planes:
        counts = np.bincount(plane)
        counts = counts[counts > 0]
        total -= float(np.sum(counts * np.log2(counts / plane.size)))
    return total
