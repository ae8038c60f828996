"""One model, the whole path, under a budget of 2 GiB. Section `cpu`."""

from typing import Any

from rich.table import Table

from eval.bench.harness.isolation import fresh
from eval.bench.harness.timing import Bench, goal
from eval.bench.whole_path.stages import table, whole_path

SHAPE = "llava-1.7b"


def measure(bench: Bench) -> dict[str, Any]:
    """Measure in a process of its own."""
    row = fresh(_path, str(bench.folder), bench.quick)
    peak = max(stage["peak_B"] for stage in row["stages"].values())
    goals = [
        goal("parameters, billions", row["parameters"] / 1e9, 1.5, "at least"),
        goal("peak of any stage, GB", peak / 1e9, 20),
        goal("accumulators, GiB", row["accumulators_B"] / 2**30, 2),
        goal("exact there and back", row["exact"], 1, "at least"),
    ]
    return {"row": row, "goals": goals}


def _path(folder: str, quick: bool) -> dict[str, Any]:
    from pathlib import Path

    import torch

    torch.set_num_threads(1)
    sizes = {"toy": quick, "text": 24 if quick else 8, "samples": 2, "steps": 3 if quick else 10}
    memory = 100_000 if quick else 2 * 2**30
    return whole_path(SHAPE, Path(folder), "cpu", **sizes, memory=memory)


def tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    return [table(result["row"])]
