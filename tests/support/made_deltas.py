"""A made-up model as plain tensors, and deltas of it."""

import math

import torch

from mm_piece.deltas.delta import Delta
from mm_piece.dtypes import INTEGER_DTYPES, view_bits
from mm_piece.entries import read_entries, write_entries

BASE = "0" * 64


def noise(shape, dtype, seed: int) -> torch.Tensor:
    """A tensor of random bit patterns, NaNs and denormals included."""
    pattern = INTEGER_DTYPES[dtype.itemsize]
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator)
    return raw.to(torch.uint8).view(pattern).view(dtype).reshape(shape)


def same(first, second) -> bool:
    return first.dtype == second.dtype and torch.equal(view_bits(first), view_bits(second))


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def change(tensors, indices, seed, **fields) -> tuple[Delta, dict[str, torch.Tensor]]:
    """A delta that writes noise at `indices`, and the tensors after it."""
    after = clones(tensors)
    for number, (name, index) in enumerate(indices.items()):
        values = noise((len(index),), after[name].dtype, 1000 * seed + number)
        write_entries([(after[name], index, values)])
    delta = Delta.from_change(
        indices,
        {name: read_entries(tensors[name], index) for name, index in indices.items()},
        {name: read_entries(after[name], index) for name, index in indices.items()},
        {name: tensor.shape for name, tensor in tensors.items()},
        **{"task": "ocr", "base": BASE, "info": {"density": 0.001}, **fields},
    )
    return delta, after


def small():
    tensors = {
        "a.weight": noise((8, 16), torch.bfloat16, 1),
        "b.weight": noise((40,), torch.bfloat16, 2),
    }
    indices = {
        "a.weight": torch.arange(0, 120, 3, dtype=torch.int32),
        "b.weight": torch.tensor([0, 7, 39], dtype=torch.int32),
    }
    return tensors, indices
