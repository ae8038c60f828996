"""Masks of sums in bf16, as the public code keeps them, beside masks of sums in fp32.

The tiny base, 1,000 rows of two tasks in micro-batches of 4.
"""

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from eval.bench.harness.timing import BenchContext
from eval.bench.stability.overlap import BASE, DENSITIES, EXCLUDED, TASKS, shared_fraction
from mm_piece.data import collate, encode, iter_batches, read
from mm_piece.families import group_of, weights
from mm_piece.models.base import load_base
from mm_piece.selection import select

_MICRO_BATCH = 4  # examples whose mean gradient is summed
Named = dict[str, Tensor]


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Compare the masks of each task, method and density."""
    model, processor = load_base(BASE)
    count = 64 if bench.quick else 1000
    rows = []
    for task in TASKS[:1] if bench.quick else TASKS:
        bench.show_progress(task)
        examples = [encode(example, processor) for example in read(f"scenes:{task}/train")[:count]]
        full, half = _sum_gradients(model, examples)
        for method, score in SCORES.items():
            scores = [{n: score(*moments[n]) for n in moments} for moments in (full, half)]
            for density in DENSITIES:
                shared = shared_fraction(*(select(found, density) for found in scores))
                facts = {"density": density, "examples": count, "shared": round(shared, 4)}
                rows.append({"task": task, "method": method, **facts})
    return {"rows": rows, "goals": []}


def _sum_gradients(
    model: nn.Module, examples: list[Named]
) -> tuple[dict[str, tuple[Tensor, Tensor]], ...]:
    """Sums of gradients and of their squares by weight: in fp32, and all of it in bf16."""
    full, half = {}, {}
    for name, gradient in _iter_gradients(model, examples):
        for moments, rounded in ((full, gradient), (half, gradient.bfloat16())):
            first, second = moments.get(name, (0, 0))
            moments[name] = first + rounded, second + rounded.square()
    return full, half


def _iter_gradients(model: nn.Module, examples: list[Named]) -> Iterator[tuple[str, Tensor]]:
    """Of each micro-batch and each weight that it reaches and that a mask may hold."""
    for rows in iter_batches(examples, _MICRO_BATCH):
        model.zero_grad()
        model(**collate(rows, pad=0)).loss.backward()
        for name, weight in weights(model).items():
            if weight.grad is not None and group_of(name) not in EXCLUDED:
                yield name, weight.grad


SCORES = {
    "piece-f-official": lambda first, second: second.float(),
    # The root is taken in the dtype of the sums, as the public code does.
    "piece-s-official": lambda first, second: first.float().abs() / (second + 1).sqrt().float(),
}


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    header = ("task", "method", "density", "examples", "shared")
    title = "Overlap of masks of sums in fp32 and in bf16"
    table = Table(*header, title=title, title_justify="left")
    for row in result["rows"]:
        cells = (row["task"], row["method"], f"{row['density']:g}", str(row["examples"]))
        table.add_row(*cells, f"{row['shared']:.2f}")
    return [table]
