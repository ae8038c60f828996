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
    model = make_stack(layers, quick=bench.quick)
    weight_bytes = 4 * sum(p.numel() for p in model.parameters())
    rows = []
    for part in (1, 3, 10):
        budget = weight_bytes // part
        rows.append(run_in_process(measure_budget, layers, budget, bench.quick))

    largest = max(row["held_B"] / row["budget_B"] for row in rows)
    digests = {row["scores"] for row in rows}
    goals = [
        make_goal("accumulators over the budget", largest, 1.0),
        make_goal("same scores under every budget", len(digests) == 1, 1, "at least"),
    ]
    return {"rows": rows, "goals": goals}


def measure_budget(layers: int, budget: int, quick: bool) -> dict[str, Any]:
    """Return memory, passes and time of PIECE-F under a budget, and a digest of its scores."""
    torch.set_num_threads(1)
    model = make_stack(layers, quick=quick)
    batch = make_batch(16 if quick else 64, 2)
    examples = list(iter_examples(batch))
    names = importance.find_patchable_names(model, examples)

    meter = ResourceMeter()
    sha = hashlib.sha256()
    with recorded_allocations() as allocated_bytes:
        stream = importance.stream_scores(model, examples, names=names, memory=budget)
        # scores come in one order under every budget, so that digests can be compared
        for _, _, scores in stream:
            sha.update(scores.numpy().tobytes())
    meter.record_mark("passes")
    return {
        "budget_B": budget,
        "held_B": max(allocated_bytes),
        "passes": len(allocated_bytes),
        "peak_B": meter.marks["passes_peak_B"],
        "cpu_s": meter.marks["passes_cpu_s"],
        "scores": sha.hexdigest(),
    }


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    table = Table(title="PIECE-F under a budget", title_justify="left")
    columns = (
        "budget, MB",
        "accumulators, MB",
        "passes",
        "peak, MB",
        "CPU s",
        "scores",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            f"{row['budget_B'] / 1e6:.3f}",
            f"{row['held_B'] / 1e6:.3f}",
            str(row["passes"]),
            f"{row['peak_B'] / 1e6:.0f}",
            f"{row['cpu_s']:.2f}",
            row["scores"][:12],
        )
    return [table]
