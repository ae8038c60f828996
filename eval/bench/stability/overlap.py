"""Overlaps of masks: told from one set of examples, and found with a fresh one of equal size.

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
    """Tell and find the overlaps of each task and method at each density."""
    model, processor = load_base(BASE)
    half, pairs = (64, 1) if bench.quick else (500, 3)
    rows = []
    for task in TASKS[:1] if bench.quick else TASKS:
        examples = EncodedDataset(read(f"scenes:{task}/train"), processor, bench.folder / task)
        halves = [_split_halves(examples, half, pair) for pair in range(pairs)]
        for method in METHODS:
            bench.show_progress(f"{task}, {method}")
            rows += _measure_overlaps(model, halves, {"task": task, "method": method}, bench)
    errors = [abs(row["told"] - row["found"]) for row in rows]
    goals = [make_goal("mean of |told - found|", _mean_or_zero(errors), 0.05)]
    return {"rows": rows, "goals": goals}


def _split_halves(
    examples: EncodedDataset, half: int, pair: int
) -> tuple[EncodedDataset, EncodedDataset]:
    """Two disjoint random parts of the examples: as they come, they are balanced."""
    order = randperm(len(examples), generator=Generator().manual_seed(pair)).tolist()
    return examples.select_positions(order[:half]), examples.select_positions(
        order[half : 2 * half]
    )


def _measure_overlaps(
    model: nn.Module,
    pairs: list[tuple[EncodedDataset, EncodedDataset]],
    case: dict[str, str],
    bench: BenchContext,
) -> list[dict[str, Any]]:
    method = case["method"]
    predicted = {
        density: _predict_stability(model, pairs[0][0], method, density, bench)
        for density in DENSITIES
    }
    rows = []
    for size in map(int, predicted[DENSITIES[0]]):
        scores = [[_estimate_scores(model, half[:size], method) for half in pair] for pair in pairs]
        for density in DENSITIES:
            found = [shared_fraction(*(select(s, density) for s in pair)) for pair in scores]
            facts = {"density": density, "examples": size, "told": predicted[density][str(size)]}
            rows.append({**case, **facts, "found": _mean_or_zero(found), "pairs": len(found)})
    return rows


def _predict_stability(
    model: nn.Module, examples: EncodedDataset, method: str, density: float, bench: BenchContext
) -> dict[str, float]:
    """The stability that a training would print."""
    wanted = SelectionSettings(
        method=method, density=density, samples=len(examples), exclude=EXCLUDED
    )
    seeds = (bench.seed, bench.seed)
    return select_for_task(
        model,
        examples,
        wanted,
        bench.folder,
        pad_token_id=0,
        seeds=seeds,
        cache_key={"data": str(id(examples))},
    ).stability


def _estimate_scores(model: nn.Module, examples: EncodedDataset, method: str) -> dict[str, Tensor]:
    batches = LengthGroupedBatches(examples, 8, 0)
    return estimate(
        model, batches, method, names=find_scorable_names(model, batches, method, EXCLUDED)
    )


def shared_fraction(first: Mask, second: Mask) -> float:
    """What part of the entries of a mask another one has too."""
    shared = sum(int(isin(first[name], second[name]).sum()) for name in first if name in second)
    return shared / sum(map(len, first.values()))


def _mean_or_zero(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    header = ("task", "method", "density", "examples", "told", "found")
    table = Table(*header, title="Overlap of two masks", title_justify="left")
    for row in result["rows"]:
        shares = [f"{row[key]:.2f}" for key in ("told", "found")]
        cells = (row["task"], row["method"], f"{row['density']:g}", str(row["examples"]))
        table.add_row(*cells, *shares)
    return [table]
