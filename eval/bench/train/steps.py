"""Time of a training step and memory of training, beside baselines and the floor.

Ratios compare forward and backward; a complete step, with AdamW and the writing back, is timed too.
Peaks are those of a process that does nothing else.
"""

from typing import Any

import torch
from rich.table import Table

from eval.bench.harness.isolation import ResourceMeter, run_in_process
from eval.bench.harness.models import make_batch, make_mask, make_stack
from eval.bench.harness.timing import BenchContext, make_goal, time_interleaved
from eval.bench.harness.tuners import TUNERS, Tuner

DENSITY = 0.001
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = (
    "uniform",
    "clustered",
    "few layers",
    "top half",
)
LIMITS = {  # of forward + backward, uniform mask, over each baseline's
    "fp32": {
        "full": 0.70,
        "LoRA r=8": 0.95,
        "floor": 1.05,
    },
    "bf16": {
        "full": 0.76,
        "LoRA r=8": 0.85,
        "floor": 1.05,
    },
}
PART_LIMITS = {  # over full, fp32
    "few layers": 0.67,
    "top half": 0.52,
}


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure everything at one size: baselines, kinds of masks, peaks."""
    layers, tokens = (2, 64) if bench.quick else (8, 512)
    found: dict[str, Any] = {"density": DENSITY, "goals": []}
    for dtype in DTYPES:
        # a CPU without units for bf16 takes minutes for a pass of the larger stack
        sizes = (2, 64) if dtype == "bf16" else (layers, tokens)
        found[dtype] = _time_side_by_side(bench, dtype, *sizes)
        found["goals"] += _time_goals(found[dtype], dtype)

    memory = {}
    for name in (*TUNERS, "nothing"):
        memory[name] = run_in_process(measure_peak, name, layers, tokens, bench.quick)
    found["memory"] = memory
    found["goals"] += _memory_goals(memory)
    return found


def _time_side_by_side(bench: BenchContext, dtype: str, layers: int, tokens: int) -> dict[str, Any]:
    tuners: dict[str, Tuner] = {}
    for name in TUNERS:
        # in fp32 its dtype is the usual one
        if dtype == "bf16" or name != "LoRA r=8, its dtype":
            tuners[name] = _make_tuner(name, dtype, layers, "uniform", bench.quick)
    for kind in KINDS[1:]:
        tuners[f"ours, {kind}"] = _make_tuner("ours", dtype, layers, kind, bench.quick)

    rounds = 5 if dtype == "fp32" else 3
    if bench.quick:
        rounds = 2
    inputs = make_batch(tokens)
    bench.show_progress(f"{dtype}: {len(tuners)} tuners, forward + backward")
    backwards = {name: _make_backward(tuner, inputs) for name, tuner in tuners.items()}
    backward_times = time_interleaved(backwards, rounds)
    bench.show_progress(f"{dtype}: complete steps")
    steps = {name: _make_step(tuner, inputs) for name, tuner in tuners.items()}
    step_times = time_interleaved(steps, rounds // 2)

    trained = {}
    for name, tuner in tuners.items():
        trained[name] = sum(p.numel() for p in tuner.parameters)
    return {
        "layers": layers,
        "tokens": tokens,
        "backward": backward_times,
        "step": step_times,
        "trained": trained,
    }


def _make_tuner(name: str, dtype: str, layers: int, kind: str, quick: bool) -> Tuner:
    """Return a tuner on a model of its own."""
    model = make_stack(layers, DTYPES[dtype], quick)
    mask = make_mask(model, kind, DENSITY)
    return TUNERS[name](model, mask)


def _make_backward(tuner: Tuner, inputs: dict[str, Any]) -> Any:
    return lambda: tuner.backward(inputs)


def _make_step(tuner: Tuner, inputs: dict[str, Any]) -> Any:
    return lambda: tuner.step(inputs)


def measure_peak(name: str, layers: int, tokens: int, quick: bool) -> dict[str, float]:
    """Return the peak of two training steps in fp32 above the process without a model."""
    torch.set_num_threads(1)
    meter = ResourceMeter()
    model = make_stack(layers, quick=quick)
    if name != "nothing":
        chosen = make_mask(model, "uniform", DENSITY)
        tuner = TUNERS[name](model, chosen)
        # two: the optimizer's state comes with the first and counts in the second
        for _ in range(2):
            tuner.step(make_batch(tokens))
    meter.record_mark("training")
    return {
        "peak_B": meter.marks["training_peak_B"],
        "kept_B": _measure_saved_bytes(name, layers, tokens, quick),
    }


def _measure_saved_bytes(name: str, layers: int, tokens: int, quick: bool) -> int:
    """Return the bytes that forward saves for backward, without weights, each storage once."""
    if name == "nothing":
        return 0

    tuner = _make_tuner(name, "fp32", layers, "uniform", quick)
    own = {p.untyped_storage().data_ptr() for p in tuner.model.parameters()}
    saved_bytes: dict[int, int] = {}

    def pack_tensor(tensor: torch.Tensor) -> torch.Tensor:
        # a sparse tensor has no storage of its own
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for part in parts:
            storage = part.untyped_storage()
            address = storage.data_ptr()
            if address not in own:
                saved_bytes[address] = storage.nbytes()
        return tensor

    inputs = make_batch(tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        # the graph lives as long as the loss: no address is used twice
        loss = tuner.model(**inputs).loss
    del loss
    return sum(saved_bytes.values())


def time_ratio(times: dict[str, Any], one: str, other: str) -> float:
    """Return the CPU time of one over another's."""
    return times[one]["cpu_s"] / times[other]["cpu_s"]


def _time_goals(found: dict[str, Any], dtype: str) -> list[dict[str, Any]]:
    times = found["backward"]
    goals = []
    for baseline, limit in LIMITS[dtype].items():
        ratio = time_ratio(times, "ours", baseline)
        goals.append(make_goal(f"{dtype}: forward + backward / {baseline}", ratio, limit))

    if dtype == "fp32":
        for kind, limit in PART_LIMITS.items():
            ratio = time_ratio(times, f"ours, {kind}", "full")
            goals.append(make_goal(f"{dtype}, {kind}: / full", ratio, limit))
    return goals


def _memory_goals(memory: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    ours = memory["ours"]["peak_B"]
    lora = memory["LoRA r=8"]["peak_B"]
    floor = memory["floor"]["peak_B"]
    return [
        make_goal("peak memory / LoRA r=8", ours / lora, 1.0),
        make_goal("peak memory / floor", ours / floor, 1.10),
    ]


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of this section."""
    tables = [_make_times_table(result, dtype) for dtype in DTYPES]
    tables.append(_make_memory_table(result["memory"]))
    return tables


def _make_times_table(result: dict[str, Any], dtype: str) -> Table:
    found = result[dtype]
    size = f"{found['layers']} layers, {found['tokens']} tokens"
    title = f"{dtype}, {size}, density {result['density']:.1%}: CPU seconds"
    table = Table(title=title, title_justify="left")
    columns = (
        "",
        "trained",
        "forward + backward",
        "of full",
        "of the floor",
        "whole step",
    )
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    times = found["backward"]
    for name, row in times.items():
        step = found["step"][name]["cpu_s"]
        table.add_row(
            name,
            f"{found['trained'][name]:,}",
            f"{row['cpu_s']:.3f}",
            f"{time_ratio(times, name, 'full'):.3f}",
            f"{time_ratio(times, name, 'floor'):.3f}",
            f"{step:.3f}",
        )
    return table


def _make_memory_table(memory: dict[str, dict[str, float]]) -> Table:
    title = "fp32: peak memory of training, and kept for backward"
    table = Table(title=title, title_justify="left")
    for column in ("", "peak, MB", "of the floor", "kept, MB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in memory.items():
        peak = row["peak_B"]
        share = peak / memory["floor"]["peak_B"]
        saved = row["kept_B"]
        table.add_row(name, f"{peak / 1e6:,.0f}", f"{share:.3f}", f"{saved / 1e6:,.0f}")
    return table
