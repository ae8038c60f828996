"""One model, the whole path, under a budget of 2 GiB. Section `cpu`."""

from typing import Any

from rich.table import Table

from eval.bench.harness.isolation import run_in_process
from eval.bench.harness.timing import BenchContext, make_goal
from eval.bench.whole_path.stages import make_stage_table, run_whole_path

SHAPE = "llava-1.7b"


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure in a process of its own."""
    row = run_in_process(_measure_path, str(bench.folder), bench.quick)
    peak = max(stage["peak_B"] for stage in row["stages"].values())
    goals = [
        make_goal("parameters, billions", row["parameters"] / 1e9, 1.5, "at least"),
        make_goal("peak of any stage, GB", peak / 1e9, 20),
        make_goal("accumulators, GiB", row["accumulators_B"] / 2**30, 2),
        make_goal("exact there and back", row["exact"], 1, "at least"),
    ]
    return {"row": row, "goals": goals}


def _measure_path(folder: str, quick: bool) -> dict[str, Any]:
    from pathlib import Path

    import torch

    torch.set_num_threads(1)
    return run_whole_path(
        SHAPE,
        Path(folder),
        "cpu",
        toy=quick,
        text=24 if quick else 8,
        samples=2,
        steps=3 if quick else 10,
        memory=100_000 if quick else 2 * 2**30,
    )


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    return [make_stage_table(result["row"])]
