"""Random edits of a small model."""

import torch
from hypothesis import strategies as st

from mm_piece.deltas.delta import Delta, compute_fingerprint, find_changed_indices
from mm_piece.entries import read_entries


def base_of(dtype=torch.float32, seed=0, size=40):
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return {"a": noise.to(dtype), "b": (noise[: size // 2] * 3).to(dtype).view(2, -1)}


def change(base, edits, task="t", parent=""):
    """The delta that sets {name: {index: value}} on a base."""
    after = {name: tensor.clone() for name, tensor in base.items()}
    for name, places in edits.items():
        for index, value in places.items():
            after[name].view(-1)[index] = value
    index = {name: find_changed_indices(base[name], after[name]) for name in edits}
    before = {name: read_entries(base[name], at) for name, at in index.items()}
    new = {name: read_entries(after[name], at) for name, at in index.items()}
    shapes = {name: base[name].shape for name in index}
    return Delta.from_change(
        index,
        before,
        new,
        shapes,
        task=task,
        base=compute_fingerprint(base),
        info={},
        parent=parent,
    )


EDITS = st.dictionaries(
    st.sampled_from(["a", "b"]),
    st.dictionaries(st.integers(0, 19), st.floats(-2, 2, width=16), max_size=12),
    max_size=2,
)
