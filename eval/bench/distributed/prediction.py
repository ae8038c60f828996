"""The cost model of `cost_model`, predicted and measured: fitted to small stacks, tried on others.

The fit finds a processor's speed, its bandwidth, the cost of a gathering beside its bytes, and the
cost of any module, all on two processes. Bytes have nothing to fit. Predictions are for a larger
stack on two processes, and for one on four, which share the two processors of this machine: half
the speed, half the bandwidth.
"""

import statistics
import time
from dataclasses import replace
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
FITTED = [  # layers, and whether they are small
    (1, False),
    (2, False),
    (4, False),
    (2, True),
    (8, True),
]
LENGTHS = (64, 256)  # tokens
PREDICTED = {  # processes, layers, whether they are small, tokens
    "larger": (2, 6, False, 128),
    "four processes": (4, 3, False, 128),
}
WITHIN = 0.25  # of the measured time
BYTES_WITHIN = 0.05  # of the measured bytes


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure, fit, and predict."""
    fitted_cases = [(1, True), (3, True)] if bench.quick else FITTED
    predicted_cases = {"larger": (2, 5, True, 32)} if bench.quick else PREDICTED
    lengths, rounds = ((16, 64), 2) if bench.quick else (LENGTHS, 7)

    points = []
    for layers, small in fitted_cases:
        points += _measure_stack(bench, 2, layers, small, lengths, rounds)
    speed = _fit_speed(points)

    checks = []
    for name, (processes, layers, small, tokens) in predicted_cases.items():
        slower = _share_processors(speed, processes)
        for row in _measure_stack(bench, processes, layers, small, (tokens,), rounds):
            model = _make_model_sizes(row)
            times = predict_step_seconds(model, row["engine"], processes, slower)
            checks.append({"name": name, **row, "told_s": sum(times)})

    for row in (*points, *checks):
        model = _make_model_sizes(row)
        memory = predict_memory(model, row["engine"], row["processes"])
        row["told_loaded_B"] = memory["weights"]
        row["told_B"] = predict_sent_bytes(model, row["engine"], row["processes"])
    return {
        "speed": vars(speed),
        "points": points,
        "checks": checks,
        "goals": _make_goals(points, checks),
    }


def _share_processors(speed: ProcessSpeed, processes: int) -> ProcessSpeed:
    """Return the speed of one of several processes on this machine's two processors."""
    shared = processes / 2
    return replace(
        speed,
        flops=speed.flops / shared,
        bandwidth=speed.bandwidth / shared,
    )


def _make_goals(
    points: list[dict[str, Any]],
    checks: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    goals = []
    for row in checks:
        title = f"{row['name']}, {row['engine']}: time told / measured, off by"
        goals.append(make_goal(title, _relative_error(row, "s"), WITHIN))

    # formulas have nothing to fit for bytes: all rows are judged, fitted ones too
    partitioned = [row for row in (*points, *checks) if row["engine"] == "ZeRO-3"]
    worst = max(_relative_error(row, "B") for row in partitioned)
    goals.append(make_goal("ZeRO-3: bytes told / measured, off by at most", worst, BYTES_WITHIN))

    # memory is judged on the larger stack alone
    larger = [row for row in partitioned if row.get("name") == "larger"]
    loaded = max(_relative_error(row, "loaded_B") for row in larger)
    goals.append(make_goal("larger, ZeRO-3: memory of weights, off by", loaded, WITHIN))
    return goals


def _measure_stack(
    bench: BenchContext,
    processes: int,
    layers: int,
    small: bool,
    lengths: tuple[int, ...],
    rounds: int,
) -> list[dict[str, Any]]:
    """Return the rows of one stack, for each engine and length."""
    bench.show_progress(f"{layers} {'small ' if small else ''}layers on {processes} processes")
    folder = bench.folder / f"{layers} {small}"
    sizes = {
        **prepare_stack(folder, layers, small),
        "layers": layers,
        "small": small,
    }
    rows = []
    for engine, stage in STAGES.items():
        found = run_on_processes(processes, _time_steps, stage, str(folder), list(lengths), rounds)
        for tokens, *trainings in zip(lengths, *found, strict=True):
            # times and memory of the first process, bytes of a process on average
            sent = statistics.mean(training["measured_B"] for training in trainings)
            rows.append(
                {
                    "engine": engine,
                    "processes": processes,
                    "tokens": tokens,
                    **sizes,
                    **trainings[0],
                    "measured_B": sent,
                }
            )
    return rows


def _time_steps(stage: int, folder: str, lengths: list[int], rounds: int) -> list[dict[str, float]]:
    """Return one process's medians for each length, after two steps to warm up."""
    # memory that comes with the first model is not that of weights
    load_stack(stage, Path(folder))
    rows = []
    for tokens in lengths:
        before = holding()
        training = ProcessTraining(stage, Path(folder), "ours", tokens)
        loaded = training.loaded - before

        times = []
        sizes = []
        for number in range(rounds + 2):
            distributed.barrier()
            begun = time.perf_counter()
            bytes_before = counted()
            training.step()
            distributed.barrier()
            seconds = time.perf_counter() - begun
            if number > 1:
                times.append(seconds)
                sizes.append(counted() - bytes_before)

        rows.append(
            {
                "measured_s": statistics.median(times),
                "measured_B": statistics.median(sizes),
                "measured_loaded_B": loaded,
            }
        )
    return rows


def _make_model_sizes(row: dict[str, Any]) -> ModelSizes:
    """Return the sizes of a stack: embedding, head, a norm; nine modules in a layer."""
    widths = QUICK if row["small"] else SIZES
    hidden = widths["hidden_size"]
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
    """Return the speed with the least squares of relative errors of the sum of all four costs."""
    rows = []
    for point in points:
        model = _make_model_sizes(point)
        engine = point["engine"]
        rows.append(
            [
                count_step_flops(model),
                predict_sent_bytes(model, engine, point["processes"]),
                count_gatherings(model, engine),
                model.modules,
            ]
        )
    costs = np.array(rows)  # (points, 4)
    measured = np.array([point["measured_s"] for point in points])

    # costs · x / measured ≈ 1, where x is the time of one unit of each cost
    targets = np.ones(len(points))
    found, *_ = np.linalg.lstsq(costs / measured[:, None], targets, rcond=None)
    # noise may make a cost negative, and its inverse is a speed
    flop, byte, latency, call = (max(float(cost), 1e-15) for cost in found)
    return ProcessSpeed(1 / flop, 1 / byte, latency, call)


def _relative_error(row: dict[str, Any], unit: str) -> float:
    return abs(row[f"told_{unit}"] / row[f"measured_{unit}"] - 1)


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    speed = ProcessSpeed(**result["speed"])
    title = (
        f"{speed.flops / 1e9:.1f} GFLOP/s, {speed.bandwidth / 1e9:.2f} GB/s sent, "
        f"{1e3 * speed.latency:.2f} ms a gathering, {1e3 * speed.call:.2f} ms a module"
    )
    table = Table(title=title, title_justify="left")
    names = ("", "processes", "weights", "tokens", "sent, MB", "told", "seconds", "told")
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    for row in (*result["points"], *result["checks"]):
        # a fitted point has no prediction of its own: show the fit's
        fit_seconds = sum(predict_step_seconds(_make_model_sizes(row), row["engine"], 2, speed))
        predicted = row.get("told_s", fit_seconds)
        table.add_row(
            row.get("name", "fitted"),
            row["engine"],
            str(row["processes"]),
            f"{row['parameters']:,}",
            str(row["tokens"]),
            f"{row['measured_B'] / 1e6:,.2f}",
            f"{row['told_B'] / 1e6:,.2f}",
            f"{row['measured_s']:.3f}",
            f"{predicted:.3f}",
        )
    return [table]
