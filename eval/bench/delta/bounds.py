"""Lower bounds of any code, in bits: information in masks, and in values coded byte by byte.

`mask_bits` is exact for masks of which only size and count are known. A clustered mask holds less
information, and a code that finds the clusters may go below.
"""

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from mm_piece.deltas.delta import Delta
from mm_piece.dtypes import view_bits
from mm_piece.entries import read_entries


def choose_bits(size: int, count: int) -> float:
    """Return log2 of the number of ways to choose `count` of `size`."""
    # log of the binomial coefficient, n! as gamma(n + 1)
    ways = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    return ways / math.log(2)


def mask_bits(delta: Delta) -> float:
    """Return the information in the indices, tensor by tensor."""
    total = 0
    for name, index in delta.indices.items():
        size = math.prod(delta.shapes[name])
        total += choose_bits(size, len(index))
    return total


def mask_bits_given(delta: Delta, known: Mapping[str, Tensor]) -> float:
    """Return the information in the indices for a reader who has another mask."""
    total = 0.0
    for name, index in delta.indices.items():
        size = math.prod(delta.shapes[name])
        other = known.get(name, index[:0])
        shared = np.intersect1d(index.numpy(), other.numpy(), assume_unique=True)
        # inside and outside of the known mask are coded by themselves
        inside = len(shared)
        total += choose_bits(len(other), inside)
        total += choose_bits(size - len(other), len(index) - inside)
    return total


def value_bits(rows: Mapping[str, Tensor]) -> float:
    """Return the zeroth-order entropy of the bytes, for each plane of each tensor by itself."""
    return sum(_plane_bits(view_bits(row).numpy()) for row in rows.values())


def difference_bits(delta: Delta, old: Mapping[str, Tensor]) -> float:
    """Return that entropy for differences of bit patterns, in zigzag coding."""
    total = 0.0
    for name, values in delta.values.items():
        after = view_bits(values).numpy()
        before = view_bits(old[name]).numpy()
        step = after - before  # wraps around, as its inverse does
        # zigzag: small steps of either sign become small numbers
        sign = step >> (8 * step.itemsize - 1)
        total += _plane_bits((step << 1) ^ sign)
    return total


def previous_values(deltas: list[Delta], base: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the values that each delta replaces, and move `base` to the last position."""
    found = []
    for delta in deltas:
        replaced = {}
        for name, index in delta.indices.items():
            replaced[name] = read_entries(base[name], index)
        found.append(replaced)
        delta.apply(base)
    return found


def _plane_bits(patterns: np.ndarray) -> float:
    """Return the zeroth-order entropy of each byte plane, summed."""
    data = np.ascontiguousarray(patterns).view(np.uint8)
    planes = data.reshape(patterns.size, -1).T  # (bytes of a value, values)
    total = 0.0
    for plane in planes:
        counts = np.bincount(plane)
        counts = counts[counts > 0]
        frequencies = counts / plane.size
        total -= float(np.sum(counts * np.log2(frequencies)))
    return total
