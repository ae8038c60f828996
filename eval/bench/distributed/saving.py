"""What a process needs to gather and write a task's delta under ZeRO-3: memory for entries alone.

Nothing of the model's size may come together anywhere: the peak, over
what training holds already, is measured for one number of entries in models of two sizes, and for
ten times as many entries.
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
from mm_piece.sparse.change_report import measure_changes
from mm_piece.sparse.tuning import sparse_tuning

PER_WEIGHT = 0.02  # of a weight's four bytes
PER_ENTRY = 64  # bytes: index, values before and after, the file, and a copy of each


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure in two processes."""
    layers = (1, 2) if bench.quick else (2, 8)
    cases = {
        "small": (layers[0], DENSITY * 10),
        "large": (layers[1], DENSITY * 10 * layers[0] / layers[1]),
        "large, more": (layers[1], DENSITY * 100 * layers[0] / layers[1]),
    }
    rows = {}
    for name, (depth, density) in cases.items():
        folder = bench.folder / name
        sizes = prepare_stack(folder, depth, bench.quick, density)
        bench.show_progress(f"{sizes['parameters']:,} weights, {sizes['k']:,} entries")
        rows[name] = {**sizes, "peak_B": max(run_on_processes(2, _measure_saving, str(folder)))}
    small, large, more = rows.values()
    weights = 4 * (large["parameters"] - small["parameters"])
    entries = more["k"] - large["k"]
    goals = [
        make_goal(
            "peak per byte of weights", (large["peak_B"] - small["peak_B"]) / weights, PER_WEIGHT
        ),
        make_goal("peak per entry, bytes", (more["peak_B"] - large["peak_B"]) / entries, PER_ENTRY),
    ]
    return {"rows": rows, "goals": goals}


def _measure_saving(folder: str) -> float:
    """Peak bytes of one process from the last step of a training to the file on disk."""
    model = load_stack(3, Path(folder))
    with sparse_tuning(model, read_mask(Path(folder))) as tuning:
        engine = make_engine(3, model, tuning.parameters())
        engine.backward(engine(**make_rank_batch(16)).loss)
        engine.step()
        tuning.write_back()
        engine.empty_partition_cache()
        distributed.barrier()
        meter = ResourceMeter()
        sizes = {name: patch.weight.ds_numel for name, patch in tuning.patches.items()}
        delta = tuning.delta("task", groups=measure_changes(tuning, sizes))
        if distributed.is_main():
            delta.save(Path(folder) / "delta.safetensors")
        meter.record_mark("saving")
        engine.destroy()
    return meter.marks["saving_peak_B"]


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    table = Table(title="Gathering and writing a delta under ZeRO-3", title_justify="left")
    for column in ("", "weights, MB", "entries", "peak, MB"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        sizes = (f"{4 * row['parameters'] / 1e6:,.1f}", f"{row['k']:,}")
        table.add_row(name, *sizes, f"{row['peak_B'] / 1e6:,.2f}")
    return [table]
