"""Savings of other codes on real deltas, as bounds in bits for each entry.

    mask_given_parent         the mask for a reader who has the one before: inside and outside of it
    mask_given_all_before     likewise, the union of all before
    values_minus_before       bit patterns as differences to the values they replace
    values_minus_base         likewise, to the base's

Not part of the format: measured so that nobody has to wonder.
"""

from pathlib import Path

import torch
from torch import Tensor

from eval.bench.delta.bounds import difference_bits, mask_bits, mask_bits_given, value_bits
from mm_piece.deltas.delta import Delta
from mm_piece.entries import read_entries
from mm_piece.models.base import tensors
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import load


def measure_ideas(path: Path) -> list[dict[str, float]]:
    """Return bits per entry for each delta of a store, plain and with each idea."""
    store = DeltaStore.open(path)
    base = _load_base_weights(store)
    live = _load_base_weights(store)  # moves from position to position
    found = []
    parent: dict[str, Tensor] = {}
    union: dict[str, Tensor] = {}
    for delta in store.deltas():
        previous = _replaced_values(delta, live)
        original = _replaced_values(delta, base)
        bits = {
            "mask": mask_bits(delta),
            "mask_given_parent": mask_bits_given(delta, parent),
            "mask_given_all_before": mask_bits_given(delta, union),
            "values": value_bits(delta.values),
            "values_minus_before": difference_bits(delta, previous),
            "values_minus_base": difference_bits(delta, original),
        }
        found.append({name: size / delta.entries for name, size in bits.items()})

        delta.apply(live)
        parent = delta.indices
        union = {name: _unite_indices(union.get(name), index) for name, index in parent.items()}
    return found


def _load_base_weights(store: DeltaStore) -> dict[str, Tensor]:
    model, _ = load(store=store, at=0)
    return {name: weight.clone() for name, weight in tensors(model).items()}


def _replaced_values(delta: Delta, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, index in delta.indices.items():
        found[name] = read_entries(weights[name], index)
    return found


def _unite_indices(known: Tensor | None, index: Tensor) -> Tensor:
    if known is None:
        return index
    return torch.cat([known, index]).unique()
