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

from eval.bench.distributed.launch import together
from eval.bench.distributed.setup import Party, prepare, sent
from eval.bench.harness.timing import Bench, goal
from mm_piece import distributed

STAGES = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}
WAYS = ("full", "LoRA r=8", "ours")
LIMIT = 0.005  # of what dense DDP sends


def measure(bench: Bench) -> dict[str, Any]:
    """Measure every engine on two and on four processes."""
    sizes = prepare(bench.folder, 2, bench.quick)
    tokens, rounds = (16, 2) if bench.quick else (256, 7)
    rows = []
    for processes in (2,) if bench.quick else (2, 4):
        for engine, stage in STAGES.items():
            bench.say(f"{engine} on {processes} processes")
            parties = together(processes, _parties, stage, str(bench.folder), tokens, rounds)
            rows.append({"engine": engine, "processes": processes, "ways": _merged(parties)})
    goals = []
    for row in rows:
        if row["engine"] == "DDP":
            ours, dense = (row["ways"][way]["sent_B"] for way in ("ours", "full"))
            what = f"{row['processes']} processes, DDP: bytes a step / full"
            goals.append(goal(what, ours / dense, LIMIT))
    return {**sizes, "tokens": tokens, "rows": rows, "goals": goals}


def _parties(stage: int, folder: str, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """One process's side: all ways in turn, each with a model of its own."""
    parties, found = {}, {}
    for way in WAYS:
        parties[way] = Party(stage, Path(folder), way, tokens)
        for _ in range(2):
            parties[way].step()
        found[way] = {"held_B": parties[way].held()}
    runs: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, party in parties.items():
            distributed.wait()
            begun, before = time.perf_counter(), sent()
            party.step()
            distributed.wait()
            runs[way].append((time.perf_counter() - begun, sent() - before))
    for way, pairs in runs.items():
        seconds, bytes_sent = (statistics.median(column) for column in zip(*pairs, strict=True))
        found[way] |= {"wall_s": seconds, "sent_B": bytes_sent}
    return found


def _merged(parties: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The slowest and the largest process of each way, and what a process sends on average."""
    merged = {}
    for way in WAYS:
        columns = {key: [party[way][key] for party in parties] for key in parties[0][way]}
        merged[way] = {key: max(column) for key, column in columns.items()}
        merged[way]["sent_B"] = statistics.mean(columns["sent_B"])
    return merged


def tables(result: dict[str, Any]) -> list[Table]:
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
        ways = row["ways"]
        for way, found in ways.items():
            table.add_row(
                *(row["engine"], str(row["processes"]), way),
                *(f"{found['sent_B'] / 1e3:,.0f}", _share(ways, way, "full", "sent_B")),
                *(f"{found['wall_s']:.3f}", _share(ways, way, "LoRA r=8", "wall_s")),
                *(f"{found['held_B'] / 1e6:,.1f}", _share(ways, way, "full", "held_B")),
            )
    return [table]


def _share(ways: dict[str, dict[str, float]], way: str, other: str, key: str) -> str:
    return f"{ways[way][key] / ways[other][key]:.4f}"
