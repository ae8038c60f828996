"""Both 7B shapes, the whole path. Section `gpu`."""

from typing import Any

import click
import torch
from rich.table import Table

from eval.bench.harness.timing import Bench, goal
from eval.bench.whole_path.stages import table, whole_path

PATHS = ("llava-1.5-7b", "qwen2.5-vl-7b")


def measure(bench: Bench) -> dict[str, Any]:
    """Measure on the GPU; --quick takes toys on whatever is there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not bench.quick:
        raise click.ClickException("there is no GPU; --quick runs toys of these models on a CPU")
    sizes = {"toy": bench.quick, "text": 24 if bench.quick else 96}
    sizes |= {"samples": 3 if bench.quick else 32, "steps": 3 if bench.quick else 20}
    sizes |= {"memory": 200_000 if bench.quick else 8 * 2**30}
    rows = []
    for shape in PATHS:
        bench.say(shape)
        rows.append(whole_path(shape, bench.folder / shape, device, **sizes))
    goals = [
        goal(f"{row['shape']}: exact there and back", row["exact"], 1, "at least") for row in rows
    ]
    return {"rows": rows, "goals": goals}


def tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    return [table(row) for row in result["rows"]]
