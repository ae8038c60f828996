"""Bytes, seconds and memory of a step on every engine: full, LoRA and ours.

What was sent is the kernel's count of the processes' own connections,
a process's mean of all. Memory is what a process holds between steps beside the
weights that it was given: values, gradients, buffers of the engine, the optimizer's state.
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

STAGES = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}
CANDIDATES = ("full", "LoRA r=8", "ours")
LIMIT = 0.005  # of what dense DDP sends


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure every engine on two and on four processes."""
    sizes = prepare_stack(bench.folder, 2, bench.quick)
    tokens, rounds = (16, 2) if bench.quick else (256, 7)
    rows = []
    for processes in (2,) if bench.quick else (2, 4):
        for engine, stage in STAGES.items():
            bench.show_progress(f"{engine} on {processes} processes")
            results = run_on_processes(
                processes, _measure_candidates, stage, str(bench.folder), tokens, rounds
            )
            rows.append(
                {"engine": engine, "processes": processes, "ways": _merge_processes(results)}
            )
    goals = []
    for row in rows:
        if row["engine"] == "DDP":
            ours, dense = (row["ways"][candidate]["sent_B"] for candidate in ("ours", "full"))
            what = f"{row['processes']} processes, DDP: bytes a step / full"
            goals.append(make_goal(what, ours / dense, LIMIT))
    return {**sizes, "tokens": tokens, "rows": rows, "goals": goals}


def _measure_candidates(
    stage: int, folder: str, tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """One process's side: all ways in turn, each with a model of its own."""
    trainings, found = {}, {}
    for candidate in CANDIDATES:
        trainings[candidate] = ProcessTraining(stage, Path(folder), candidate, tokens)
        for _ in range(2):
            trainings[candidate].step()
        found[candidate] = {"held_B": trainings[candidate].held()}
    runs: dict[str, list[tuple[float, int]]] = {candidate: [] for candidate in CANDIDATES}
    for _ in range(rounds):
        for candidate, training in trainings.items():
            distributed.barrier()
            begun, before = time.perf_counter(), read_sent_bytes()
            training.step()
            distributed.barrier()
            runs[candidate].append((time.perf_counter() - begun, read_sent_bytes() - before))
    for candidate, pairs in runs.items():
        seconds, bytes_sent = (statistics.median(column) for column in zip(*pairs, strict=True))
        found[candidate] |= {"wall_s": seconds, "sent_B": bytes_sent}
    return found


def _merge_processes(results: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The slowest and the largest process of each way, and what a process sends on average."""
    merged = {}
    for candidate in CANDIDATES:
        columns = {
            key: [result[candidate][key] for result in results] for key in results[0][candidate]
        }
        merged[candidate] = {key: max(column) for key, column in columns.items()}
        merged[candidate]["sent_B"] = statistics.mean(columns["sent_B"])
    return merged


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
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
                *(row["engine"], str(row["processes"]), candidate),
                *(
                    f"{found['sent_B'] / 1e3:,.0f}",
                    _format_share(candidates, candidate, "full", "sent_B"),
                ),
                *(
                    f"{found['wall_s']:.3f}",
                    _format_share(candidates, candidate, "LoRA r=8", "wall_s"),
                ),
                *(
                    f"{found['held_B'] / 1e6:,.1f}",
                    _format_share(candidates, candidate, "full", "held_B"),
                ),
            )
    return [table]


def _format_share(
    candidates: dict[str, dict[str, float]], candidate: str, other: str, key: str
) -> str:
    return f"{candidates[candidate][key] / candidates[other][key]:.4f}"
