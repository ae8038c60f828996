"""Overlaps of masks: predicted from one set of examples, measured with a fresh one of equal size.

The tiny base, two of its tasks, their 1,000 rows in random halves.
"""

from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Generator, Tensor, isin, nn, randperm

from eval.bench.harness.timing import BenchContext, make_goal
from mm_piece.data import EncodedDataset, LengthGroupedBatches, read
from mm_piece.importance import estimate, find_scorable_names
from mm_piece.models.base import load_base
from mm_piece.recipe import SelectionSettings
from mm_piece.selection import Mask, select
from mm_piece.selection.task import select_for_task

BASE = Path(__file__).parents[3] / "checkpoints" / "tiny" / "base"
METHODS = ("piece-f", "piece-s")
TASKS = ("digits", "words")
DENSITIES = (0.001, 0.01, 0.1)
EXCLUDED = ("embedding", "head")


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Predict and measure the overlaps of each task and method at each density."""
    model, processor = load_base(BASE)
    half, pairs = (64, 1) if bench.quick else (500, 3)
    tasks = TASKS[:1] if bench.quick else TASKS
    rows = []
    for task in tasks:
        source = read(f"scenes:{task}/train")
        examples = EncodedDataset(source, processor, bench.folder / task)
        halves = [_split_halves(examples, half, pair) for pair in range(pairs)]
        for method in METHODS:
            bench.show_progress(f"{task}, {method}")
            case = {"task": task, "method": method}
            rows += _measure_overlaps(model, halves, case, bench)

    errors = [abs(row["told"] - row["found"]) for row in rows]
    goal = make_goal("mean of |told - found|", _mean_or_zero(errors), 0.05)
    return {"rows": rows, "goals": [goal]}


def _split_halves(
    examples: EncodedDataset, half: int, pair: int
) -> tuple[EncodedDataset, EncodedDataset]:
    """Return two disjoint random parts of the examples: in their own order they are balanced."""
    generator = Generator().manual_seed(pair)
    order = randperm(len(examples), generator=generator).tolist()
    first = examples.select_positions(order[:half])
    second = examples.select_positions(order[half : 2 * half])
    return first, second


def _measure_overlaps(
    model: nn.Module,
    pairs: list[tuple[EncodedDataset, EncodedDataset]],
    case: dict[str, str],
    bench: BenchContext,
) -> list[dict[str, Any]]:
    """Return a row for each number of examples and density."""
    method = case["method"]
    first_half = pairs[0][0]
    densities = DENSITIES[-1:] if bench.quick else DENSITIES
    predicted = {}
    for density in densities:
        predicted[density] = _predict_stability(model, first_half, method, density, bench)

    # the numbers of examples are those that the prediction has, the same at every density
    sizes = [int(size) for size in predicted[densities[0]]]
    rows = []
    for size in sizes:
        scores = []
        for one, other in pairs:
            one_scores = _estimate_scores(model, one[:size], method)
            other_scores = _estimate_scores(model, other[:size], method)
            scores.append((one_scores, other_scores))

        for density in densities:
            found = []
            for one_scores, other_scores in scores:
                first = select(one_scores, density)
                second = select(other_scores, density)
                found.append(shared_fraction(first, second))
            rows.append(
                {
                    **case,
                    "density": density,
                    "examples": size,
                    "told": predicted[density][str(size)],
                    "found": _mean_or_zero(found),
                    "pairs": len(found),
                }
            )
    return rows


def _predict_stability(
    model: nn.Module, examples: EncodedDataset, method: str, density: float, bench: BenchContext
) -> dict[str, float]:
    """Return the stability that a training would print, by number of examples."""
    settings = SelectionSettings(
        method=method,
        density=density,
        samples=len(examples),
        exclude=EXCLUDED,
    )
    selection = select_for_task(
        model,
        examples,
        settings,
        bench.folder,
        seeds=(bench.seed, bench.seed),
        cache_key={"data": str(id(examples))},
    )
    return selection.stability


def _estimate_scores(model: nn.Module, examples: EncodedDataset, method: str) -> dict[str, Tensor]:
    batches = LengthGroupedBatches(examples, 8)
    names = find_scorable_names(model, batches, method, EXCLUDED)
    return estimate(model, batches, method, names=names)


def shared_fraction(first: Mask, second: Mask) -> float:
    """Return the share of a mask's entries that another mask has too."""
    shared = 0
    for name, index in first.items():
        if name in second:
            shared += int(isin(index, second[name]).sum())
    return shared / sum(map(len, first.values()))


def _mean_or_zero(values: list[float]) -> float:
    if not values:
        return 0.0
    return sum(values) / len(values)


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    header = ("task", "method", "density", "examples", "told", "found")
    table = Table(*header, title="Overlap of two masks", title_justify="left")
    for row in result["rows"]:
        table.add_row(
            row["task"],
            row["method"],
            f"{row['density']:g}",
            str(row["examples"]),
            f"{row['told']:.2f}",
            f"{row['found']:.2f}",
        )
    return [table]
