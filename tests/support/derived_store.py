"""A store of a tiny base whose deltas are random."""

import torch

from mm_piece.deltas.delta import Delta
from mm_piece.entries import read_entries
from mm_piece.models.base import load_base, tensors
from mm_piece.store.base_record import describe_base
from mm_piece.store.delta_store import DeltaStore

RECIPE = "base: b\nstore: s\ntasks: [{tasks}]\n"


def step(live, base, share, seed, parent="", task="t"):
    """Change a share of every weight of a live model; the delta that says so."""
    torch.manual_seed(seed)
    masks = {name: torch.rand(t.numel()) < share for name, t in live.items()}
    index = {name: torch.nonzero(mask).view(-1) for name, mask in masks.items()}
    before = {name: read_entries(live[name], at) for name, at in index.items()}
    after = {name: torch.randn(len(at)).to(live[name].dtype) for name, at in index.items()}
    shapes = {name: live[name].shape for name in index}
    delta = Delta.from_change(
        index, before, after, shapes, task=task, base=base, info={}, parent=parent
    )
    delta.apply(live)
    return delta


def made_store(path, base, dtype="float32", share=0.05, count=3):
    model, _ = load_base(base, dtype=dtype)
    live, described = tensors(model), describe_base(model, base, None, path)
    names = [f"task{number}" for number in range(1, count + 1)]
    rows = ", ".join(f"{{name: {name}, train: x, test: x}}" for name in names)
    store = DeltaStore.create(path, described.facts, RECIPE.format(tasks=rows))
    states = [{name: tensor.clone() for name, tensor in live.items()}]
    for number, name in enumerate(names):
        parent = store.entries[-1].sha256 if len(store) else ""
        store.append(step(live, described.fingerprint, share, number, parent, name))
        states.append({key: tensor.clone() for key, tensor in live.items()})
    return store, states
