"""Scaling estimates of three published models on 1 to 512 GPUs, by `cost_model`.

Nothing is measured here. Sizes are those of the published configurations, counted from models
without memory. A GPU's speed is stated, not fitted: measure it before you rely on the seconds.
"""

from dataclasses import replace
from typing import Any

from rich.table import Table

from eval.bench.distributed.cost_model import (
    ENGINES,
    ModelSizes,
    ProcessSpeed,
    count_passes,
    fits_memory,
    predict_memory,
    predict_scoring_seconds,
    predict_sent_bytes,
    predict_step_seconds,
)
from eval.bench.harness.timing import BenchContext

DENSITY = 0.001
EXAMPLES = 1000  # examples to score
TOKENS = 1024  # tokens of an example
STEP_EXAMPLES = 4  # examples of a process in a step
TASK_EXAMPLES = 10_000  # examples of a task
PROCESSES = (1, 8, 64, 512)
BUDGET = 8 * 2**30  # bytes of accumulators on a process
GPU = {  # H100 SXM: NVIDIA's data sheet, and an assumed share of it
    "memory": 0.9 * 80e9,
    "flops": 0.4 * 989e12,
    "in_node": 0.8 * 450e9,  # NVLink, one direction
    "between_nodes": 0.8 * 50e9,  # one 400 Gb/s port each
    "latency": 20e-6,  # of a gathering, for each doubling of the processes
    "call": 50e-6,  # of a module's kernels
}
MODELS = [
    ModelSizes(
        name="LLaVA-1.5-7B",
        weights=7_063_427_072,
        looked_up=131_334_144,
        active=6_932_092_928,
        layers=32,
        hidden=4096,
        modules=32 * 9 + 24 * 8 + 6,
        largest=131_334_144,
    ),
    ModelSizes(
        name="Qwen2.5-VL-72B",
        weights=73_406_351_360,
        looked_up=1_245_708_288,
        active=72_160_643_072,
        layers=80,
        hidden=8192,
        modules=80 * 9 + 32 * 9 + 6,
        largest=1_245_708_288,
    ),
    # a token uses 8 of 128 experts, which have 227,096,395,776 of the weights
    ModelSizes(
        name="Qwen3-VL-235B-A22B",
        weights=235_670_022_896,
        looked_up=622_329_856,
        active=22_144_822_000,
        layers=94,
        hidden=4096,
        modules=94 * 10 + 27 * 8 + 6,
        largest=2_415_919_104,
    ),
]


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Return the rows of the plan."""
    rows = []
    for model in MODELS:
        sized = _with_step_sizes(model)
        for processes in PROCESSES:
            rows.append(_predict_row(sized, processes))
    return {"gpu": GPU, "rows": rows, "goals": []}


def _with_step_sizes(model: ModelSizes) -> ModelSizes:
    return replace(
        model,
        tokens=TOKENS * STEP_EXAMPLES,
        k=round(DENSITY * model.weights),
    )


def _predict_row(model: ModelSizes, processes: int) -> dict[str, Any]:
    """Return the estimates for the first engine that fits, from the one that sends least."""
    fitting = [e for e in ENGINES if fits_memory(model, e, processes, GPU["memory"], BUDGET)]
    engine = fitting[0] if fitting else "ZeRO-3"
    speed = _gpu_speed(processes)

    computing, sending = predict_step_seconds(model, engine, processes, speed)
    steps = TASK_EXAMPLES / (STEP_EXAMPLES * processes)
    # all processes score all batches: their number does not fall with more of them
    batches = EXAMPLES // STEP_EXAMPLES
    passes = count_passes(model, processes, 1, BUDGET)
    scoring = predict_scoring_seconds(model, engine, processes, speed, batches, passes)
    memory = predict_memory(model, engine, processes, BUDGET)
    return {
        "model": model.name,
        "processes": processes,
        "engine": engine,
        "fits": bool(fitting),
        "held_B": sum(memory.values()),
        "sent_B": predict_sent_bytes(model, engine, processes),
        "computing_s": computing,
        "sending_s": sending,
        "training_s": [steps * time for time in _time_range(computing, sending)],
        "passes": passes,
        "importance_s": _time_range(*scoring),
    }


def _gpu_speed(processes: int) -> ProcessSpeed:
    """Return the speed of one of several GPUs, eight in a node."""
    bandwidth = GPU["in_node"] if processes <= 8 else GPU["between_nodes"]
    doublings = processes.bit_length() - 1
    latency = GPU["latency"] * doublings
    return ProcessSpeed(GPU["flops"], bandwidth, latency, GPU["call"])


def _time_range(computing: float, sending: float) -> list[float]:
    """Return the seconds if one hides the other, and if neither does."""
    return [max(computing, sending), computing + sending]


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of the plan."""
    table = Table(title="Told, not measured: bf16, density 0.1 %, H100", title_justify="left")
    names = ("GPUs", "engine", "each holds", "sends a step", "a step", "a task", "importance")
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    for row in result["rows"]:
        table.add_row(row["model"], *format_cells(row))
    return [table]


def format_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row, from the number of GPUs on."""
    processes = str(row["processes"])
    memory = f"{row['held_B'] / 1e9:,.0f} GB"
    if not row["fits"]:
        return (processes, "none fits", memory, "", "", "", "")

    step = _time_range(row["computing_s"], row["sending_s"])
    passes = "pass" if row["passes"] == 1 else "passes"
    return (
        processes,
        row["engine"],
        memory,
        f"{row['sent_B'] / 1e9:,.2f} GB",
        _format_seconds(step),
        _format_seconds(row["training_s"]),
        f"{_format_seconds(row['importance_s'])}, {row['passes']} {passes}",
    )


def _format_seconds(both: list[float]) -> str:
    """Return a range of seconds, or one number where both ends look the same."""
    low, high = (f"{time:,.2f}" if time < 10 else f"{time:,.0f}" for time in both)
    if low == high:
        return f"{low} s"
    return f"{low} to {high} s"
