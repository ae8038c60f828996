"""Delta stores of made-up deltas, without a base."""

import json
from pathlib import Path

import torch

from mm_piece.deltas.delta import Delta
from mm_piece.store.delta_store import DeltaStore

BASE = {"fingerprint": "ab" * 32, "source": "some/base", "parameters": 12}
RECIPE = "base: some/base  # é\n"


def delta_for(store: DeltaStore, task: str = "ocr", entries: int = 4, **fields) -> Delta:
    """The next delta of a store; position t writes t."""
    position = len(store) + 1
    before, after = torch.zeros(entries), torch.full((entries,), float(position))
    parent = store.entries[-1].sha256 if len(store) else ""
    fields = {"base": BASE["fingerprint"], "parent": parent, "info": {}, **fields}
    where, shapes = {"w": torch.arange(entries)}, {"w": (entries + 1,)}
    return Delta.from_change(where, {"w": before}, {"w": after}, shapes, task=task, **fields)


def make(path: Path, deltas: int = 0) -> DeltaStore:
    store = DeltaStore.create(path, BASE, RECIPE)
    for position in range(1, deltas + 1):
        store.append(delta_for(store, f"Task {position}!"))
    return store


def rewrite(store: DeltaStore, change) -> None:
    manifest = json.loads((store.path / "store.json").read_text())
    change(manifest)
    (store.path / "store.json").write_text(json.dumps(manifest))


def write_forever(path: str, acknowledged) -> None:
    """Append deltas and results until somebody kills the process; send each position."""
    store = DeltaStore.open(path)
    while True:
        entry = store.append(delta_for(store, entries=20_000))
        tasks = [str(position) for position in range(entry.position)]
        matrix = [[0.5] * entry.position] * entry.position
        store.write_results({"tasks": tasks, "matrix": matrix})
        acknowledged.send(entry.position)
