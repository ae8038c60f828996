"""Time and memory of the top-k over scores that arrive in pieces."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
from rich.table import Table
from torch import Tensor

from eval.bench.harness.isolation import ResourceMeter, run_in_process
from eval.bench.harness.timing import BenchContext, make_goal, time_interleaved
from mm_piece.selection import TopK

DENSITIES = (0.0001, 0.001, 0.01, 0.05)
PIECE = 2**20  # scores in one piece


def select_by_pieces(scores: Tensor, k: int) -> Tensor:
    """Return the positions of the k highest scores, read piece by piece."""
    top = TopK(k)
    for start in range(0, len(scores), PIECE):
        piece = scores[start : start + PIECE]
        top.add_scores(piece, start)
    return top.select_indices()


def select_by_torch(scores: Tensor, k: int) -> Tensor:
    """Return the positions that torch.topk finds in one tensor; ties go anywhere."""
    indices = scores.topk(k, sorted=False).indices
    return indices.sort().values


def select_by_numpy(scores: Tensor, k: int) -> Tensor:
    """Return the positions that numpy.argpartition finds in one array; ties go anywhere."""
    order = numpy.argpartition(scores.numpy(), -k)
    indices = torch.from_numpy(order[-k:])
    return indices.sort().values


CANDIDATES: dict[str, Callable[[Tensor, int], Any]] = {
    "ours": select_by_pieces,
    "torch.topk": select_by_torch,
    "numpy.argpartition": select_by_numpy,
    "one read (max)": lambda scores, k: scores.max(),
}


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure each candidate at each density, and its memory at one."""
    size = 10**6 if bench.quick else 10**8
    rounds = 2 if bench.quick else 3
    scores = make_scores(size, bench.seed)
    rows = []
    for density in DENSITIES:
        bench.show_progress(f"density {density:.2%}")
        k = int(density * size)
        work = {name: partial(candidate, scores, k) for name, candidate in CANDIDATES.items()}
        times = time_interleaved(work, rounds)
        rows.append(
            {
                "density": density,
                "k": k,
                "times": times,
                "same_scores": _has_same_scores(scores, k),
            }
        )

    memory = {}
    for name in CANDIDATES:
        memory[name] = run_in_process(measure_peak, name, size, int(0.001 * size))

    seconds = rows[1]["times"]["ours"]["cpu_s"]
    same = min(row["same_scores"] for row in rows)
    goals = [
        make_goal("seconds, density 0.1 %", seconds, 0.3),
        make_goal("peak memory beside the scores, MiB", memory["ours"] / 2**20, 32),
        make_goal("same scores as torch.topk", same, 1, "at least"),
    ]
    return {"scores": size, "rows": rows, "memory_B": memory, "goals": goals}


def _has_same_scores(scores: Tensor, k: int) -> bool:
    """Whether ours selects the scores that torch.topk selects: positions may differ by ties."""
    ours = scores[select_by_pieces(scores, k)]
    expected = scores.topk(k).values  # falling
    return torch.equal(ours.sort().values, expected.flip(0))


def make_scores(size: int, seed: int) -> Tensor:
    """Return scores of many magnitudes, like squared gradients."""
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, generator=random)
    return normal.pow_(4)


def measure_peak(name: str, size: int, k: int) -> int:
    """Return the peak memory of one candidate above the process with the scores."""
    torch.set_num_threads(1)
    scores = make_scores(size, 0)
    candidate = CANDIDATES[name]
    # a small run first: what the first call loads is not measured
    candidate(scores[:1000], 10)
    meter = ResourceMeter()
    candidate(scores, k)
    meter.record_mark("select")
    return int(meter.marks["select_peak_B"])


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    title = f"Top-k of {result['scores']:,} scores: CPU seconds"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for row in result["rows"]:
        table.add_column(f"{row['density']:.2%}", justify="right")
    table.add_column("peak at 0.1 %, MiB", justify="right")
    for name in CANDIDATES:
        cells = [f"{row['times'][name]['cpu_s']:.3f}" for row in result["rows"]]
        mebibytes = result["memory_B"][name] / 2**20
        table.add_row(name, *cells, f"{mebibytes:,.1f}")
    return [table]
