"""Bytes, seconds and memory of a step on every engine: full, LoRA and ours.

Bytes are the kernel's count for a process's own connections, the mean of all processes. Memory is
that of a process between steps beside the loaded weights: values, gradients, buffers of the engine,
the optimizer's state.
"""

import statistics
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.bench.distributed.launch import run_on_processes
from eval.bench.distributed.setup import ProcessTraining, prepare_stack, read_sent_bytes
from eval.bench.harness.timing import BenchContext, make_goal
from mm_piece import distributed

STAGES = {
    "DDP": 0,
    "ZeRO-1": 1,
    "ZeRO-2": 2,
    "ZeRO-3": 3,
}
CANDIDATES = ("full", "LoRA r=8", "ours")
LIMIT = 0.005  # of the bytes that dense DDP sends


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure every engine on two and on four processes."""
    sizes = prepare_stack(bench.folder, 2, bench.quick)
    tokens, rounds = (16, 2) if bench.quick else (256, 7)
    process_counts = (2,) if bench.quick else (2, 4)
    rows = []
    for processes in process_counts:
        for engine, stage in STAGES.items():
            bench.show_progress(f"{engine} on {processes} processes")
            arguments = (stage, str(bench.folder), tokens, rounds)
            results = run_on_processes(processes, _measure_candidates, *arguments)
            rows.append(
                {
                    "engine": engine,
                    "processes": processes,
                    "ways": _merge_processes(results),
                }
            )

    goals = []
    for row in rows:
        if row["engine"] == "DDP":
            ours = row["ways"]["ours"]["sent_B"]
            dense = row["ways"]["full"]["sent_B"]
            title = f"{row['processes']} processes, DDP: bytes a step / full"
            goals.append(make_goal(title, ours / dense, LIMIT))
    return {**sizes, "tokens": tokens, "rows": rows, "goals": goals}


def _measure_candidates(
    stage: int, folder: str, tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Measure one process's side: all candidates in turn, each with a model of its own."""
    trainings = {}
    found: dict[str, dict[str, float]] = {}
    for candidate in CANDIDATES:
        training = ProcessTraining(stage, Path(folder), candidate, tokens)
        # two steps: the optimizer's state comes with the first
        for _ in range(2):
            training.step()
        trainings[candidate] = training
        found[candidate] = {"held_B": training.count_training_bytes()}

    runs: dict[str, list[tuple[float, int]]] = {candidate: [] for candidate in CANDIDATES}
    for _ in range(rounds):
        for candidate, training in trainings.items():
            distributed.barrier()
            begun = time.perf_counter()
            before = read_sent_bytes()
            training.step()
            distributed.barrier()
            seconds = time.perf_counter() - begun
            runs[candidate].append((seconds, read_sent_bytes() - before))

    for candidate, pairs in runs.items():
        times, sizes = zip(*pairs, strict=True)
        found[candidate]["wall_s"] = statistics.median(times)
        found[candidate]["sent_B"] = statistics.median(sizes)
    return found


def _merge_processes(results: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the largest time and memory of each candidate, and the mean bytes of a process."""
    merged = {}
    for candidate in CANDIDATES:
        rows = [result[candidate] for result in results]
        merged[candidate] = {key: max(row[key] for row in rows) for key in rows[0]}
        merged[candidate]["sent_B"] = statistics.mean(row["sent_B"] for row in rows)
    return merged


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    title = (
        f"{result['parameters']:,} weights, {result['k']:,} trained by ours, "
        f"{result['tokens']} tokens: each process, each step"
    )
    table = Table(title=title, title_justify="left")
    numbers = ("sent, kB", "of full", "seconds", "of LoRA", "held, MB", "of full")
    for column in ("engine", "processes", "", *numbers):
        table.add_column(column, justify="right" if column in numbers else "left")
    for row in result["rows"]:
        candidates = row["ways"]
        for candidate, found in candidates.items():
            table.add_row(
                row["engine"],
                str(row["processes"]),
                candidate,
                f"{found['sent_B'] / 1e3:,.0f}",
                _format_share(candidates, candidate, "full", "sent_B"),
                f"{found['wall_s']:.3f}",
                _format_share(candidates, candidate, "LoRA r=8", "wall_s"),
                f"{found['held_B'] / 1e6:,.1f}",
                _format_share(candidates, candidate, "full", "held_B"),
            )
    return [table]


def _format_share(
    candidates: dict[str, dict[str, float]], candidate: str, other: str, key: str
) -> str:
    share = candidates[candidate][key] / candidates[other][key]
    return f"{share:.4f}"
