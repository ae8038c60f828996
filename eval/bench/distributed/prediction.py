"""The cost model of `cost_model`: fitted to small stacks, and asked for what it was not fitted on.

Fitted are a processor's speed, what it sends in a second, what a
gathering costs beside its bytes, and what any module costs, all on two processes; bytes have
nothing to fit. Asked for are a larger stack on two processes, and one on four, which share
the two processors of this machine: half the speed, half the bandwidth.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from eval.bench.distributed.cost_model import (
    Model,
    Speed,
    computing,
    gatherings,
    held,
    seconds,
    sent,
)
from eval.bench.distributed.launch import together
from eval.bench.distributed.setup import Party, load, prepare
from eval.bench.distributed.setup import held as holding
from eval.bench.distributed.setup import sent as counted
from eval.bench.harness.models import QUICK, SIZES, VOCABULARY
from eval.bench.harness.timing import Bench, goal
from mm_piece import distributed

STAGES = {"DDP": 0, "ZeRO-3": 3}
FITTED = [(1, False), (2, False), (4, False), (2, True), (8, True)]  # layers, small ones
LENGTHS = (64, 256)  # tokens
ASKED = {"larger": (2, 6, False, 128), "four processes": (4, 3, False, 128)}
WITHIN = 0.25  # of the measured time
BYTES_WITHIN = 0.05


def measure(bench: Bench) -> dict[str, Any]:
    """Measure, fit, and ask."""
    fitted = [(1, True), (3, True)] if bench.quick else FITTED
    asked = {"larger": (2, 5, True, 32)} if bench.quick else ASKED
    lengths, rounds = ((16, 64), 2) if bench.quick else (LENGTHS, 7)
    points = [
        row
        for layers, small in fitted
        for row in _measured(bench, 2, layers, small, lengths, rounds)
    ]
    speed = _fit(points)
    checks = []
    for name, (processes, layers, small, tokens) in asked.items():
        shared = processes / 2  # of the processes have one processor
        slower = Speed(speed.flops / shared, speed.bandwidth / shared, speed.latency, speed.call)
        for row in _measured(bench, processes, layers, small, (tokens,), rounds):
            model = _model(row)
            told = sum(seconds(model, row["engine"], processes, slower))
            checks.append({"name": name, **row, "told_s": told})
    for row in (*points, *checks):
        row["told_loaded_B"] = held(_model(row), row["engine"], row["processes"])["weights"]
        row["told_B"] = sent(_model(row), row["engine"], row["processes"])
    goals = [
        goal(f"{c['name']}, {c['engine']}: time told / measured, off by", _off(c, "s"), WITHIN)
        for c in checks
    ]
    cut = [row for row in (*points, *checks) if row["engine"] == "ZeRO-3"]
    worst = max(_off(row, "B") for row in cut)
    goals.append(goal("ZeRO-3: bytes told / measured, off by at most", worst, BYTES_WITHIN))
    loaded = max(_off(row, "loaded_B") for row in cut if row.get("name") == "larger")
    goals.append(goal("larger, ZeRO-3: memory of weights, off by", loaded, WITHIN))
    return {"speed": vars(speed), "points": points, "checks": checks, "goals": goals}


def _measured(
    bench: Bench, processes: int, layers: int, small: bool, lengths: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """Rows of one stack, for each engine and length."""
    bench.say(f"{layers} {'small ' if small else ''}layers on {processes} processes")
    folder = bench.folder / f"{layers} {small}"
    sizes = {**prepare(folder, layers, small), "layers": layers, "small": small}
    rows = []
    for engine, stage in STAGES.items():
        found = together(processes, _run, stage, str(folder), list(lengths), rounds)
        for tokens, *parties in zip(lengths, *found, strict=True):
            row = {"engine": engine, "processes": processes, "tokens": tokens, **sizes}
            each = statistics.mean(party["measured_B"] for party in parties)
            rows.append({**row, **parties[0], "measured_B": each})
    return rows


def _run(stage: int, folder: str, lengths: list[int], rounds: int) -> list[dict[str, float]]:
    load(stage, Path(folder))  # what comes with the first one is no weights
    rows = []
    for tokens in lengths:
        before = holding()
        party = Party(stage, Path(folder), "ours", tokens)
        loaded = party.loaded - before
        runs = []
        for number in range(rounds + 2):
            distributed.wait()
            begun, bytes_before = time.perf_counter(), counted()
            party.step()
            distributed.wait()
            if number > 1:
                runs.append((time.perf_counter() - begun, counted() - bytes_before))
        wall, bytes_sent = (statistics.median(column) for column in zip(*runs, strict=True))
        rows.append({"measured_s": wall, "measured_B": bytes_sent, "measured_loaded_B": loaded})
    return rows


def _model(row: dict[str, Any]) -> Model:
    """The sizes of a stack of `stacks`: embedding, head, a norm; nine modules in a layer."""
    hidden = (QUICK if row["small"] else SIZES)["hidden_size"]
    embedding = VOCABULARY * hidden
    return Model(
        name="stack",
        weights=row["parameters"],
        looked_up=embedding,
        active=row["parameters"] - embedding,
        layers=row["layers"],
        hidden=hidden,
        modules=9 * row["layers"] + 3,
        largest=embedding,
        width=4,
        tokens=row["tokens"],
        k=row["k"],
    )


def _fit(points: list[dict[str, Any]]) -> Speed:
    """Least squares of the relative errors of the sum of all four costs."""
    costs = np.array(
        [
            [
                computing(_model(row)),
                sent(_model(row), row["engine"], row["processes"]),
                gatherings(_model(row), row["engine"]),
                _model(row).modules,
            ]
            for row in points
        ]
    )
    measured = np.array([row["measured_s"] for row in points])
    found, *_ = np.linalg.lstsq(costs / measured[:, None], np.ones(len(points)), rcond=None)
    flop, byte, latency, call = (max(float(cost), 1e-15) for cost in found)
    return Speed(1 / flop, 1 / byte, latency, call)


def _off(row: dict[str, Any], unit: str) -> float:
    return abs(row[f"told_{unit}"] / row[f"measured_{unit}"] - 1)


def tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    speed = result["speed"]
    title = (
        f"{speed['flops'] / 1e9:.1f} GFLOP/s, {speed['bandwidth'] / 1e9:.2f} GB/s sent, "
        f"{1e3 * speed['latency']:.2f} ms a gathering, {1e3 * speed['call']:.2f} ms a module"
    )
    table = Table(title=title, title_justify="left")
    names = ("", "processes", "weights", "tokens", "sent, MB", "told", "seconds", "told")
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    speed = Speed(**speed)
    for row in (*result["points"], *result["checks"]):
        told = row.get("told_s", sum(seconds(_model(row), row["engine"], 2, speed)))
        table.add_row(
            *(row.get("name", "fitted"), row["engine"], str(row["processes"])),
            *(f"{row['parameters']:,}", str(row["tokens"])),
            *(f"{row['measured_B'] / 1e6:,.2f}", f"{row['told_B'] / 1e6:,.2f}"),
            *(f"{row['measured_s']:.3f}", f"{told:.3f}"),
        )
    return [table]
