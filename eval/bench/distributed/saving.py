"""Memory of a process to gather and write a task's delta under ZeRO-3: for entries alone.

No process may gather anything of the model's size. The peak above the memory of training is
measured for one number of entries in models of two sizes, and for ten times as many entries.
"""

from pathlib import Path
from typing import Any

from rich.table import Table

from eval.bench.distributed.launch import run_on_processes
from eval.bench.distributed.setup import (
    DENSITY,
    load_stack,
    make_engine,
    make_rank_batch,
    prepare_stack,
    read_mask,
)
from eval.bench.harness.isolation import ResourceMeter
from eval.bench.harness.timing import BenchContext, make_goal
from mm_piece import distributed
from mm_piece.sparse.change_measurement import measure_changes
from mm_piece.sparse.tuning import sparse_tuning

PER_WEIGHT = 0.02  # share of a weight's four bytes
PER_ENTRY = 64  # bytes: index, values before and after, the file, and a copy of each


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure in two processes."""
    low, high = (1, 2) if bench.quick else (2, 8)
    # "small" and "large" have equally many entries
    cases = {
        "small": (low, DENSITY * 10),
        "large": (high, DENSITY * 10 * low / high),
        "large, more": (high, DENSITY * 100 * low / high),
    }
    rows = {}
    for name, (depth, density) in cases.items():
        folder = bench.folder / name
        sizes = prepare_stack(folder, depth, bench.quick, density)
        bench.show_progress(f"{sizes['parameters']:,} weights, {sizes['k']:,} entries")
        peaks = run_on_processes(2, _measure_saving, str(folder))
        rows[name] = {**sizes, "peak_B": max(peaks)}

    # differences leave out what is the same in all cases
    small, large, more = rows.values()
    weight_bytes = 4 * (large["parameters"] - small["parameters"])
    entries = more["k"] - large["k"]
    per_byte = (large["peak_B"] - small["peak_B"]) / weight_bytes
    per_entry = (more["peak_B"] - large["peak_B"]) / entries
    goals = [
        make_goal("peak per byte of weights", per_byte, PER_WEIGHT),
        make_goal("peak per entry, bytes", per_entry, PER_ENTRY),
    ]
    return {"rows": rows, "goals": goals}


def _measure_saving(folder: str) -> float:
    """Return a process's peak bytes from the last step of a training to the file on disk."""
    path = Path(folder)
    model = load_stack(3, path)
    with sparse_tuning(model, read_mask(path)) as tuning:
        engine = make_engine(3, model, tuning.parameters())
        batch = make_rank_batch(16)
        engine.backward(engine(**batch).loss)
        engine.step()
        tuning.write_back()
        # free what the engine has gathered: the peak must not begin above it
        engine.empty_partition_cache()
        distributed.barrier()

        meter = ResourceMeter()
        sizes = {
            name: distributed.shape_of(patch.weight).numel()
            for name, patch in tuning.patches.items()
        }
        delta = tuning.delta("task", groups=measure_changes(tuning, sizes))
        if distributed.is_main():
            delta.save(path / "delta.safetensors")
        meter.record_mark("saving")
        engine.destroy()
    return meter.marks["saving_peak_B"]


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    table = Table(title="Gathering and writing a delta under ZeRO-3", title_justify="left")
    for column in ("", "weights, MB", "entries", "peak, MB"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        weights = 4 * row["parameters"] / 1e6
        peak = row["peak_B"] / 1e6
        table.add_row(name, f"{weights:,.1f}", f"{row['k']:,}", f"{peak:,.2f}")
    return [table]
