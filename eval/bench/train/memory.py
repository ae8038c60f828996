"""What a training holds for each selected entry beside the frozen model.

Counted are all tensors of the process, each storage once, that a mask and a step of AdamW bring:
mask, values, gradients, moments, what stood there before, and what the products keep.
"""

import gc
import warnings
from typing import Any

import torch
from rich.table import Table

from eval.bench.harness.isolation import run_in_process
from eval.bench.harness.models import make_batch, make_mask, make_stack
from eval.bench.harness.timing import BenchContext, make_goal
from mm_piece.sparse.tuning import sparse_tuning

DENSITIES = (0.0001, 0.001, 0.01, 0.05)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMIT = 28  # bytes an entry


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Count at each density and dtype."""
    rows = []
    for dtype in DTYPES:
        for density in DENSITIES:
            bench.show_progress(f"{dtype}, {density:.2%}")
            entries, training_bytes = run_in_process(
                count_training_bytes, dtype, density, bench.quick
            )
            rows.append(
                {"dtype": dtype, "density": density, "entries": entries, "held_B": training_bytes}
            )
    goals = [
        make_goal(f"{row['dtype']}, {row['density']:.1%}: bytes an entry", entry_bytes(row), LIMIT)
        for row in rows
        if row["density"] == 0.001
    ]
    return {"rows": rows, "goals": goals}


def count_training_bytes(dtype: str, density: float, quick: bool) -> tuple[int, int]:
    """Return how many entries train and how many bytes are held for them."""
    torch.set_num_threads(1)
    model, inputs = make_stack(2, DTYPES[dtype], quick), make_batch(16)
    before = _storage_sizes()
    chosen = {name: index.int() for name, index in make_mask(model, "uniform", density).items()}
    with sparse_tuning(model, chosen) as tuning:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-4)
        model(**inputs).loss.backward()
        optimizer.step()
        storages_after = _storage_sizes()
    return sum(map(len, chosen.values())), sum(
        storages_after[key] for key in storages_after.keys() - before.keys()
    )


def entry_bytes(row: dict[str, Any]) -> float:
    """Return the bytes of one entry."""
    return row["held_B"] / row["entries"]


def _storage_sizes() -> dict[int, int]:
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


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    table = Table(title="Held for a selected entry, bytes", title_justify="left")
    table.add_column("")
    for density in DENSITIES:
        table.add_column(f"{density:.2%}", justify="right")
    for dtype in DTYPES:
        cells = [f"{entry_bytes(row):.1f}" for row in result["rows"] if row["dtype"] == dtype]
        table.add_row(dtype, *cells)
    return [table]
