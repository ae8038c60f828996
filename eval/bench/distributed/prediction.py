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
    ModelSizes,
    ProcessSpeed,
    count_gatherings,
    count_step_flops,
    predict_memory,
    predict_sent_bytes,
    predict_step_seconds,
)
from eval.bench.distributed.launch import run_on_processes
from eval.bench.distributed.setup import ProcessTraining, load_stack, prepare_stack
from eval.bench.distributed.setup import read_anonymous_bytes as holding
from eval.bench.distributed.setup import read_sent_bytes as counted
from eval.bench.harness.models import QUICK, SIZES, VOCABULARY
from eval.bench.harness.timing import BenchContext, make_goal
from mm_piece import distributed

STAGES = {"DDP": 0, "ZeRO-3": 3}
FITTED = [(1, False), (2, False), (4, False), (2, True), (8, True)]  # layers, small ones
LENGTHS = (64, 256)  # tokens
PREDICTED = {"larger": (2, 6, False, 128), "four processes": (4, 3, False, 128)}
WITHIN = 0.25  # of the measured time
BYTES_WITHIN = 0.05


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure, fit, and ask."""
    fitted_cases = [(1, True), (3, True)] if bench.quick else FITTED
    predicted_cases = {"larger": (2, 5, True, 32)} if bench.quick else PREDICTED
    lengths, rounds = ((16, 64), 2) if bench.quick else (LENGTHS, 7)
    points = [
        row
        for layers, small in fitted_cases
        for row in _measure_stack(bench, 2, layers, small, lengths, rounds)
    ]
    speed = _fit_speed(points)
    checks = []
    for name, (processes, layers, small, tokens) in predicted_cases.items():
        shared = processes / 2  # of the processes have one processor
        slower = ProcessSpeed(
            speed.flops / shared, speed.bandwidth / shared, speed.latency, speed.call
        )
        for row in _measure_stack(bench, processes, layers, small, (tokens,), rounds):
            model = _make_model_sizes(row)
            predicted = sum(predict_step_seconds(model, row["engine"], processes, slower))
            checks.append({"name": name, **row, "told_s": predicted})
    for row in (*points, *checks):
        row["told_loaded_B"] = predict_memory(
            _make_model_sizes(row), row["engine"], row["processes"]
        )["weights"]
        row["told_B"] = predict_sent_bytes(_make_model_sizes(row), row["engine"], row["processes"])
    goals = [
        make_goal(
            f"{c['name']}, {c['engine']}: time told / measured, off by",
            _relative_error(c, "s"),
            WITHIN,
        )
        for c in checks
    ]
    partitioned = [row for row in (*points, *checks) if row["engine"] == "ZeRO-3"]
    worst = max(_relative_error(row, "B") for row in partitioned)
    goals.append(make_goal("ZeRO-3: bytes told / measured, off by at most", worst, BYTES_WITHIN))
    loaded = max(
        _relative_error(row, "loaded_B") for row in partitioned if row.get("name") == "larger"
    )
    goals.append(make_goal("larger, ZeRO-3: memory of weights, off by", loaded, WITHIN))
    return {"speed": vars(speed), "points": points, "checks": checks, "goals": goals}


def _measure_stack(
    bench: BenchContext,
    processes: int,
    layers: int,
    small: bool,
    lengths: tuple[int, ...],
    rounds: int,
) -> list[dict[str, Any]]:
    """Rows of one stack, for each engine and length."""
    bench.show_progress(f"{layers} {'small ' if small else ''}layers on {processes} processes")
    folder = bench.folder / f"{layers} {small}"
    sizes = {**prepare_stack(folder, layers, small), "layers": layers, "small": small}
    rows = []
    for engine, stage in STAGES.items():
        found = run_on_processes(processes, _time_steps, stage, str(folder), list(lengths), rounds)
        for tokens, *trainings in zip(lengths, *found, strict=True):
            row = {"engine": engine, "processes": processes, "tokens": tokens, **sizes}
            each = statistics.mean(training["measured_B"] for training in trainings)
            rows.append({**row, **trainings[0], "measured_B": each})
    return rows


def _time_steps(stage: int, folder: str, lengths: list[int], rounds: int) -> list[dict[str, float]]:
    load_stack(stage, Path(folder))  # what comes with the first one is no weights
    rows = []
    for tokens in lengths:
        before = holding()
        training = ProcessTraining(stage, Path(folder), "ours", tokens)
        loaded = training.loaded - before
        runs = []
        for number in range(rounds + 2):
            distributed.barrier()
            begun, bytes_before = time.perf_counter(), counted()
            training.step()
            distributed.barrier()
            if number > 1:
                runs.append((time.perf_counter() - begun, counted() - bytes_before))
        wall, bytes_sent = (statistics.median(column) for column in zip(*runs, strict=True))
        rows.append({"measured_s": wall, "measured_B": bytes_sent, "measured_loaded_B": loaded})
    return rows


def _make_model_sizes(row: dict[str, Any]) -> ModelSizes:
    """The sizes of a stack of `stacks`: embedding, head, a norm; nine modules in a layer."""
    hidden = (QUICK if row["small"] else SIZES)["hidden_size"]
    embedding = VOCABULARY * hidden
    return ModelSizes(
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


def _fit_speed(points: list[dict[str, Any]]) -> ProcessSpeed:
    """Least squares of the relative errors of the sum of all four costs."""
    costs = np.array(
        [
            [
                count_step_flops(_make_model_sizes(row)),
                predict_sent_bytes(_make_model_sizes(row), row["engine"], row["processes"]),
                count_gatherings(_make_model_sizes(row), row["engine"]),
                _make_model_sizes(row).modules,
            ]
            for row in points
        ]
    )
    measured = np.array([row["measured_s"] for row in points])
    found, *_ = np.linalg.lstsq(costs / measured[:, None], np.ones(len(points)), rcond=None)
    flop, byte, latency, call = (max(float(cost), 1e-15) for cost in found)
    return ProcessSpeed(1 / flop, 1 / byte, latency, call)


def _relative_error(row: dict[str, Any], unit: str) -> float:
    return abs(row[f"told_{unit}"] / row[f"measured_{unit}"] - 1)


def make_tables(result: dict[str, Any]) -> list[Table]:
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
    speed = ProcessSpeed(**speed)
    for row in (*result["points"], *result["checks"]):
        predicted = row.get(
            "told_s", sum(predict_step_seconds(_make_model_sizes(row), row["engine"], 2, speed))
        )
        table.add_row(
            *(row.get("name", "fitted"), row["engine"], str(row["processes"])),
            *(f"{row['parameters']:,}", str(row["tokens"])),
            *(f"{row['measured_B'] / 1e6:,.2f}", f"{row['told_B'] / 1e6:,.2f}"),
            *(f"{row['measured_s']:.3f}", f"{predicted:.3f}"),
        )
    return [table]
