"""Accumulators under a budget: bytes, passes, peak, scores."""

import hashlib
from typing import Any

import torch
from rich.table import Table

from eval.bench.harness.accumulators import allocated
from eval.bench.harness.isolation import Meter, fresh
from eval.bench.harness.models import batch, stack
from eval.bench.harness.timing import Bench, goal
from mm_piece import importance
from mm_piece.importance.backward import singles


def measure(bench: Bench) -> dict[str, Any]:
    """Measure three budgets, each in a process of its own."""
    layers = 1 if bench.quick else 4
    whole = 4 * sum(p.numel() for p in stack(layers, quick=bench.quick).parameters())
    rows = [fresh(under, layers, whole // part, bench.quick) for part in (1, 3, 10)]
    goals = [
        goal("accumulators over the budget", max(r["held_B"] / r["budget_B"] for r in rows), 1.0),
        goal(
            "same scores under every budget", len({r["scores"] for r in rows}) == 1, 1, "at least"
        ),
    ]
    return {"rows": rows, "goals": goals}


def under(layers: int, budget: int, quick: bool) -> dict[str, Any]:
    """Return what PIECE-F takes under a budget, and a digest of its scores."""
    torch.set_num_threads(1)
    model = stack(layers, quick=quick)
    examples = list(singles(batch(16 if quick else 64, 2)))
    names = importance.patchable(model, examples)
    meter, sha = Meter(), hashlib.sha256()
    with allocated() as held:
        for _, _, scores in importance.stream(model, examples, names=names, memory=budget):
            sha.update(scores.numpy().tobytes())
    meter.mark("passes")
    return {
        **{"budget_B": budget, "held_B": max(held), "passes": len(held)},
        **{"peak_B": meter.marks["passes_peak_B"], "cpu_s": meter.marks["passes_cpu_s"]},
        "scores": sha.hexdigest(),
    }


def tables(result: dict[str, Any]) -> list[Table]:
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
