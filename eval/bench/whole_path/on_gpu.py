"""Both 7B shapes, the whole path. Section `gpu`."""

from typing import Any

import click
import torch
from rich.table import Table

from eval.bench.harness.timing import BenchContext, make_goal
from eval.bench.whole_path.stages import make_stage_table, run_whole_path

PATHS = ("llava-1.5-7b", "qwen2.5-vl-7b")


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure on the GPU; --quick takes toys, without a GPU on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not bench.quick:
        raise click.ClickException("there is no GPU; --quick runs toys of these models on a CPU")

    sizes = {
        "toy": bench.quick,
        "text": 24 if bench.quick else 96,
        "samples": 3 if bench.quick else 32,
        "steps": 3 if bench.quick else 20,
        "memory": 200_000 if bench.quick else 8 * 2**30,
    }
    rows = []
    for shape in PATHS:
        bench.show_progress(shape)
        rows.append(run_whole_path(shape, bench.folder / shape, device, **sizes))

    goals = []
    for row in rows:
        title = f"{row['shape']}: exact there and back"
        goals.append(make_goal(title, row["exact"], 1, "at least"))
    return {"rows": rows, "goals": goals}


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return a table for each model."""
    return [make_stage_table(row) for row in result["rows"]]
