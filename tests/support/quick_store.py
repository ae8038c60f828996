"""A store of a real base whose deltas are random: what moving a model needs, without training."""

from pathlib import Path

import torch

from mm_piece.families import weights
from mm_piece.models.base import load_base
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.store.base_record import describe_base
from mm_piece.store.delta_store import DeltaStore


def make_store(base: Path, path: Path, positions: int = 3, dtype: str = "float32") -> DeltaStore:
    """Write a store whose deltas overlap, in tower, projector and language model."""
    model, _ = load_base(base, dtype=dtype)
    store = DeltaStore.create(path, describe_base(model, base, None, path).facts, f"base: {base}\n")
    chance = torch.Generator().manual_seed(7)
    for position in range(1, positions + 1):
        names = [n for n in weights(model) if "layers" in n or "projector" in n]
        mask = {
            name: torch.randperm(weights(model)[name].numel(), generator=chance)[:9].sort().values
            for name in names[position % 2 :: 2] + names[:3]
        }
        with sparse_tuning(model, mask) as tuning:
            with torch.no_grad():
                for values in tuning.parameters():
                    values.add_(torch.randn(values.shape, generator=chance))
            tuning.write_back()
            parent = store.entries[-1].sha256 if len(store) else ""
            facts = {"base": store.base.fingerprint, "parent": parent}
            store.append(tuning.delta(f"task {position}", **facts))
    return store
