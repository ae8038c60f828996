"""Masks of sums in bf16, as in the public code, beside masks of sums in fp32.

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
Moments = dict[str, tuple[Tensor, Tensor]]  # sums of gradients, and of their squares


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Compare the masks of each task, method and density."""
    model, processor = load_base(BASE)
    count = 16 if bench.quick else 1000
    tasks = TASKS[:1] if bench.quick else TASKS
    rows = []
    for task in tasks:
        bench.show_progress(task)
        source = read(f"scenes:{task}/train")[:count]
        examples = [encode(example, processor) for example in source]
        full, half = _sum_gradients(model, examples)
        for method, score in SCORES.items():
            full_scores = {name: score(*sums) for name, sums in full.items()}
            half_scores = {name: score(*sums) for name, sums in half.items()}
            for density in DENSITIES:
                full_mask = select(full_scores, density)
                half_mask = select(half_scores, density)
                shared = shared_fraction(full_mask, half_mask)
                rows.append(
                    {
                        "task": task,
                        "method": method,
                        "density": density,
                        "examples": count,
                        "shared": round(shared, 4),
                    }
                )
    return {"rows": rows, "goals": []}


def _sum_gradients(model: nn.Module, examples: list[Named]) -> tuple[Moments, ...]:
    """Return sums of gradients and of their squares by weight: in fp32, and all of it in bf16."""
    full: Moments = {}
    half: Moments = {}
    for name, gradient in _iter_gradients(model, examples):
        _add_moments(full, name, gradient)
        _add_moments(half, name, gradient.bfloat16())
    return full, half


def _add_moments(moments: Moments, name: str, gradient: Tensor) -> None:
    first, second = moments.get(name, (0, 0))
    moments[name] = (first + gradient, second + gradient.square())


def _iter_gradients(model: nn.Module, examples: list[Named]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and gradient of each micro-batch and each patchable weight that receives one."""
    for rows in iter_batches(examples, _MICRO_BATCH):
        model.zero_grad()
        batch = collate(rows, pad=0)
        model(**batch).loss.backward()
        for name, weight in weights(model).items():
            if weight.grad is not None and group_of(name) not in EXCLUDED:
                yield name, weight.grad


SCORES = {
    "piece-f-official": lambda first, second: second.float(),
    # the root is taken in the dtype of the sums, as in the public code
    "piece-s-official": lambda first, second: first.float().abs() / (second + 1).sqrt().float(),
}


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    header = ("task", "method", "density", "examples", "shared")
    title = "Overlap of masks of sums in fp32 and in bf16"
    table = Table(*header, title=title, title_justify="left")
    for row in result["rows"]:
        table.add_row(
            row["task"],
            row["method"],
            f"{row['density']:g}",
            str(row["examples"]),
            f"{row['shared']:.2f}",
        )
    return [table]
