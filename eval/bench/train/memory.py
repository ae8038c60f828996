"""What a training holds for each selected entry beside the frozen model.

Counted are all tensors of the process, each storage once, that a mask and a step of AdamW bring:
mask, values, gradients, moments, what stood there before, and what the products keep.
"""

import gc
import warnings
from typing import Any

import torch
from rich.table import Table

from eval.bench.harness.isolation import fresh
from eval.bench.harness.models import batch, mask, stack
from eval.bench.harness.timing import Bench, goal
from mm_piece.sparse.tuning import sparse_tuning

DENSITIES = (0.0001, 0.001, 0.01, 0.05)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMIT = 28  # bytes an entry


def measure(bench: Bench) -> dict[str, Any]:
    """Count at each density and dtype."""
    rows = []
    for dtype in DTYPES:
        for density in DENSITIES:
            bench.say(f"{dtype}, {density:.2%}")
            entries, held = fresh(count, dtype, density, bench.quick)
            rows.append({"dtype": dtype, "density": density, "entries": entries, "held_B": held})
    goals = [
        goal(f"{row['dtype']}, {row['density']:.1%}: bytes an entry", each(row), LIMIT)
        for row in rows
        if row["density"] == 0.001
    ]
    return {"rows": rows, "goals": goals}


def count(dtype: str, density: float, quick: bool) -> tuple[int, int]:
    """Return how many entries train and how many bytes are held for them."""
    torch.set_num_threads(1)
    model, inputs = stack(2, DTYPES[dtype], quick), batch(16)
    before = _storages()
    chosen = {name: index.int() for name, index in mask(model, "uniform", density).items()}
    with sparse_tuning(model, chosen) as tuning:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-4)
        model(**inputs).loss.backward()
        optimizer.step()
        held = _storages()
    return sum(map(len, chosen.values())), sum(held[key] for key in held.keys() - before.keys())


def each(row: dict[str, Any]) -> float:
    """Return the bytes of one entry."""
    return row["held_B"] / row["entries"]


def _storages() -> dict[int, int]:
    """Return the bytes of every tensor's storage, by its address."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old names that complain when they are looked at
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    table = Table(title="Held for a selected entry, bytes", title_justify="left")
    table.add_column("")
    for density in DENSITIES:
        table.add_column(f"{density:.2%}", justify="right")
    for dtype in DTYPES:
        cells = [f"{each(row):.1f}" for row in result["rows"] if row["dtype"] == dtype]
        table.add_row(dtype, *cells)
    return [table]
