"""Memory of a training for each selected entry, beside the frozen model.

It is the sum of all tensors of the process, each storage once, that come with a mask and a step of
AdamW: mask, values, gradients, moments, previous values, and saved tensors of the products.
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
            arguments = (dtype, density, bench.quick)
            entries, training_bytes = run_in_process(count_training_bytes, *arguments)
            rows.append(
                {
                    "dtype": dtype,
                    "density": density,
                    "entries": entries,
                    "held_B": training_bytes,
                }
            )

    goals = []
    for row in rows:
        if row["density"] == 0.001:
            title = f"{row['dtype']}, {row['density']:.1%}: bytes an entry"
            goals.append(make_goal(title, entry_bytes(row), LIMIT))
    return {"rows": rows, "goals": goals}


def count_training_bytes(dtype: str, density: float, quick: bool) -> tuple[int, int]:
    """Return the number of entries that train and the bytes of their tensors."""
    torch.set_num_threads(1)
    model = make_stack(2, DTYPES[dtype], quick)
    inputs = make_batch(16)
    before = _storage_sizes()

    mask = make_mask(model, "uniform", density)
    chosen = {name: index.int() for name, index in mask.items()}
    del mask  # int64 indices are this bench's, not the training's
    with sparse_tuning(model, chosen) as tuning:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-4)
        model(**inputs).loss.backward()
        optimizer.step()
        # inside the block, while the training's tensors are alive
        after = _storage_sizes()

    entries = sum(map(len, chosen.values()))
    new_bytes = sum(after[address] for address in after.keys() - before.keys())
    return entries, new_bytes


def entry_bytes(row: dict[str, Any]) -> float:
    """Return the bytes of one entry."""
    return row["held_B"] / row["entries"]


def _storage_sizes() -> dict[int, int]:
    """Return the bytes of every tensor's storage, by its address."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        # isinstance makes deprecated names warn
        warnings.simplefilter("ignore")
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    table = Table(title="Held for a selected entry, bytes", title_justify="left")
    table.add_column("")
    for density in DENSITIES:
        table.add_column(f"{density:.2%}", justify="right")
    for dtype in DTYPES:
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        cells = [f"{entry_bytes(row):.1f}" for row in rows]
        table.add_row(dtype, *cells)
    return [table]
