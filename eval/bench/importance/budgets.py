"""Accumulators under a budget: bytes, passes, peak, scores."""

import hashlib
from typing import Any

import torch
from rich.table import Table

from eval.bench.harness.accumulators import recorded_allocations
from eval.bench.harness.isolation import ResourceMeter, run_in_process
from eval.bench.harness.models import make_batch, make_stack
from eval.bench.harness.timing import BenchContext, make_goal
from mm_piece import importance
from mm_piece.importance.backward import iter_examples


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure three budgets, each in a process of its own."""
    layers = 1 if bench.quick else 4
    weight_bytes = 4 * sum(p.numel() for p in make_stack(layers, quick=bench.quick).parameters())
    rows = [
        run_in_process(measure_budget, layers, weight_bytes // part, bench.quick)
        for part in (1, 3, 10)
    ]
    goals = [
        make_goal(
            "accumulators over the budget", max(r["held_B"] / r["budget_B"] for r in rows), 1.0
        ),
        make_goal(
            "same scores under every budget", len({r["scores"] for r in rows}) == 1, 1, "at least"
        ),
    ]
    return {"rows": rows, "goals": goals}


def measure_budget(layers: int, budget: int, quick: bool) -> dict[str, Any]:
    """Return what PIECE-F takes under a budget, and a digest of its scores."""
    torch.set_num_threads(1)
    model = make_stack(layers, quick=quick)
    examples = list(iter_examples(make_batch(16 if quick else 64, 2)))
    names = importance.find_patchable_names(model, examples)
    meter, sha = ResourceMeter(), hashlib.sha256()
    with recorded_allocations() as allocated_bytes:
        for _, _, scores in importance.stream_scores(model, examples, names=names, memory=budget):
            sha.update(scores.numpy().tobytes())
    meter.record_mark("passes")
    return {
        **{"budget_B": budget, "held_B": max(allocated_bytes), "passes": len(allocated_bytes)},
        **{"peak_B": meter.marks["passes_peak_B"], "cpu_s": meter.marks["passes_cpu_s"]},
        "scores": sha.hexdigest(),
    }


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    table = Table(title="PIECE-F under a budget", title_justify="left")
    for column in ("budget, MB", "accumulators, MB", "passes", "peak, MB", "CPU s", "scores"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        sizes = [f"{row[key] / 1e6:.3f}" for key in ("budget_B", "held_B")]
        peak = f"{row['peak_B'] / 1e6:.0f}"
        shown = (*sizes, str(row["passes"]), peak, f"{row['cpu_s']:.2f}", row["scores"][:12])
        table.add_row(*shown)
    return [table]
