"""What a process needs to gather and write a task's delta under ZeRO-3: memory for entries alone.

Nothing of the model's size may come together anywhere: the peak, over
what training holds already, is measured for one number of entries in models of two sizes, and for
ten times as many entries.
"""

from pathlib import Path
from typing import Any

from rich.table import Table

from eval.bench.distributed.launch import together
from eval.bench.distributed.setup import DENSITY, batch_of, engine_of, load, mask_of, prepare
from eval.bench.harness.isolation import Meter
from eval.bench.harness.timing import Bench, goal
from mm_piece import distributed
from mm_piece.sparse.change_report import changes
from mm_piece.sparse.tuning import sparse_tuning

PER_WEIGHT = 0.02  # of a weight's four bytes
PER_ENTRY = 64  # bytes: index, values before and after, the file, and a copy of each


def measure(bench: Bench) -> dict[str, Any]:
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
        sizes = prepare(folder, depth, bench.quick, density)
        bench.say(f"{sizes['parameters']:,} weights, {sizes['k']:,} entries")
        rows[name] = {**sizes, "peak_B": max(together(2, _saved, str(folder)))}
    small, large, more = rows.values()
    weights = 4 * (large["parameters"] - small["parameters"])
    entries = more["k"] - large["k"]
    goals = [
        goal("peak per byte of weights", (large["peak_B"] - small["peak_B"]) / weights, PER_WEIGHT),
        goal("peak per entry, bytes", (more["peak_B"] - large["peak_B"]) / entries, PER_ENTRY),
    ]
    return {"rows": rows, "goals": goals}


def _saved(folder: str) -> float:
    """Peak bytes of one process from the last step of a training to the file on disk."""
    model = load(3, Path(folder))
    with sparse_tuning(model, mask_of(Path(folder))) as tuning:
        engine = engine_of(3, model, tuning.parameters())
        engine.backward(engine(**batch_of(16)).loss)
        engine.step()
        tuning.write_back()
        engine.empty_partition_cache()
        distributed.wait()
        meter = Meter()
        sizes = {name: patch.weight.ds_numel for name, patch in tuning.patches.items()}
        delta = tuning.delta("task", groups=changes(tuning, sizes))
        if distributed.is_main():
            delta.save(Path(folder) / "delta.safetensors")
        meter.mark("saving")
        engine.destroy()
    return meter.marks["saving_peak_B"]


def tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    table = Table(title="Gathering and writing a delta under ZeRO-3", title_justify="left")
    for column in ("", "weights, MB", "entries", "peak, MB"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        sizes = (f"{4 * row['parameters'] / 1e6:,.1f}", f"{row['k']:,}")
        table.add_row(name, *sizes, f"{row['peak_B'] / 1e6:,.2f}")
    return [table]
