"""Three published models on 1 to 512 GPUs, as `cost_model` would have it.

Nothing is measured here. Sizes are those of the published
configurations, counted from models without memory. What a GPU does is stated, not fitted: it has
to be measured before anyone relies on the seconds.
"""

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
EXAMPLES, TOKENS, STEP_EXAMPLES = (
    1000,
    1024,
    4,
)  # scored; of an example; examples of a process in a step
TASK_EXAMPLES = 10_000  # examples of a task
PROCESSES = (1, 8, 64, 512)
BUDGET = 8 * 2**30  # bytes of accumulators on a process
GPU = {  # H100 SXM: NVIDIA's data sheet, and the share of it that is assumed to be reached
    "memory": 0.9 * 80e9,
    "flops": 0.4 * 989e12,
    "in_node": 0.8 * 450e9,  # NVLink, one direction
    "between_nodes": 0.8 * 50e9,  # one 400 Gb/s port each
    "latency": 20e-6,  # of a gathering, for each doubling of the processes
    "call": 50e-6,  # of a module's kernels
}
MODELS = [
    ModelSizes(
        **{"name": "LLaVA-1.5-7B", "weights": 7_063_427_072, "looked_up": 131_334_144},
        **{"active": 6_932_092_928, "layers": 32, "hidden": 4096},
        **{"modules": 32 * 9 + 24 * 8 + 6, "largest": 131_334_144},
    ),
    ModelSizes(
        **{"name": "Qwen2.5-VL-72B", "weights": 73_406_351_360, "looked_up": 1_245_708_288},
        **{"active": 72_160_643_072, "layers": 80, "hidden": 8192},
        **{"modules": 80 * 9 + 32 * 9 + 6, "largest": 1_245_708_288},
    ),
    # Each token passes 8 of 128 experts, which are 227,096,395,776 of the weights.
    ModelSizes(
        **{"name": "Qwen3-VL-235B-A22B", "weights": 235_670_022_896, "looked_up": 622_329_856},
        **{"active": 22_144_822_000, "layers": 94, "hidden": 4096},
        **{"modules": 94 * 10 + 27 * 8 + 6, "largest": 2_415_919_104},
    ),
]


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Return the rows of the plan."""
    rows = [
        _predict_row(_with_step_sizes(model), processes)
        for model in MODELS
        for processes in PROCESSES
    ]
    return {"gpu": GPU, "rows": rows, "goals": []}


def _with_step_sizes(model: ModelSizes) -> ModelSizes:
    sizes = {"tokens": TOKENS * STEP_EXAMPLES, "k": round(DENSITY * model.weights)}
    return ModelSizes(**{**vars(model), **sizes})


def _predict_row(model: ModelSizes, processes: int) -> dict[str, Any]:
    """The first engine that fits, from the one that sends least."""
    fitting = [e for e in ENGINES if fits_memory(model, e, processes, GPU["memory"], BUDGET)]
    engine = fitting[0] if fitting else "ZeRO-3"
    doublings = processes.bit_length() - 1
    bandwidth = GPU["in_node"] if processes <= 8 else GPU["between_nodes"]
    speed = ProcessSpeed(GPU["flops"], bandwidth, GPU["latency"] * doublings, GPU["call"])
    computing, sending = predict_step_seconds(model, engine, processes, speed)
    passes = count_passes(model, processes, 1, BUDGET)
    steps = TASK_EXAMPLES / (STEP_EXAMPLES * processes)
    batches = EXAMPLES // STEP_EXAMPLES
    scoring = predict_scoring_seconds(model, engine, processes, speed, batches, passes)
    return {
        **{"model": model.name, "processes": processes, "engine": engine, "fits": bool(fitting)},
        "held_B": sum(predict_memory(model, engine, processes, BUDGET).values()),
        "sent_B": predict_sent_bytes(model, engine, processes),
        "computing_s": computing,
        "sending_s": sending,
        "training_s": [steps * time for time in _time_range(computing, sending)],
        "passes": passes,
        "importance_s": _time_range(*scoring),
    }


def _time_range(computing: float, sending: float) -> list[float]:
    """Seconds if one hides the other, and if neither does."""
    return [max(computing, sending), computing + sending]


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    table = Table(title="Told, not measured: bf16, density 0.1 %, H100", title_justify="left")
    names = ("GPUs", "engine", "each holds", "sends a step", "a step", "a task", "importance")
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    for row in result["rows"]:
        table.add_row(row["model"], *format_cells(row))
    return [table]


def format_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row, from the number of GPUs on."""
    memory = f"{row['held_B'] / 1e9:,.0f} GB"
    if not row["fits"]:
        return (str(row["processes"]), "none fits", memory, "", "", "", "")
    return (
        *(str(row["processes"]), row["engine"], memory, f"{row['sent_B'] / 1e9:,.2f} GB"),
        _format_seconds(_time_range(row["computing_s"], row["sending_s"])),
        _format_seconds(row["training_s"]),
        f"{_format_seconds(row['importance_s'])}, {row['passes']} "
        f"pass{'es' if row['passes'] > 1 else ''}",
    )


def _format_seconds(both: list[float]) -> str:
    low, high = (f"{time:,.2f}" if time < 10 else f"{time:,.0f}" for time in both)
    return f"{low} s" if low == high else f"{low} to {high} s"
