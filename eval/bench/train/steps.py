"""Time of a training step and memory of training, beside rivals and the floor.

Forward and backward are what the ratios are about; a whole step, with AdamW
and the writing back, is timed too. Peaks are those of a process that does nothing else.
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
KINDS = ("uniform", "clustered", "few layers", "top half")
LIMITS = {  # of forward + backward, uniform mask, over each rival's
    "fp32": {"full": 0.70, "LoRA r=8": 0.95, "floor": 1.05},
    "bf16": {"full": 0.76, "LoRA r=8": 0.85, "floor": 1.05},
}
PART_LIMITS = {"few layers": 0.67, "top half": 0.52}  # over full, fp32


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure everything at one size: rivals, kinds of masks, peaks."""
    layers, tokens = (2, 64) if bench.quick else (8, 512)
    found: dict[str, Any] = {"density": DENSITY, "goals": []}
    for dtype in DTYPES:
        # A CPU without units for bf16 takes minutes for a pass of the larger stack.
        sizes = (2, 64) if dtype == "bf16" else (layers, tokens)
        found[dtype] = _time_side_by_side(bench, dtype, *sizes)
        found["goals"] += _time_goals(found[dtype], dtype)
    found["memory"] = {
        name: run_in_process(measure_peak, name, layers, tokens, bench.quick)
        for name in (*TUNERS, "nothing")
    }
    found["goals"] += _memory_goals(found["memory"])
    return found


def _time_side_by_side(bench: BenchContext, dtype: str, layers: int, tokens: int) -> dict[str, Any]:
    tuners: dict[str, Tuner] = {}
    names = [name for name in TUNERS if dtype == "bf16" or name != "LoRA r=8, its dtype"]
    for name in names:
        model = make_stack(layers, DTYPES[dtype], bench.quick)
        tuners[name] = TUNERS[name](model, make_mask(model, "uniform", DENSITY))
    for kind in KINDS[1:]:
        model = make_stack(layers, DTYPES[dtype], bench.quick)
        tuners[f"ours, {kind}"] = TUNERS["ours"](model, make_mask(model, kind, DENSITY))
    inputs = make_batch(tokens)
    bench.show_progress(f"{dtype}: {len(tuners)} ways, forward + backward")
    rounds = 2 if bench.quick else 5 if dtype == "fp32" else 3
    backward = time_interleaved({n: _make_backward(t, inputs) for n, t in tuners.items()}, rounds)
    bench.show_progress(f"{dtype}: whole steps")
    step_times = time_interleaved(
        {n: _make_step(t, inputs) for n, t in tuners.items()}, rounds // 2
    )
    trained = {name: sum(p.numel() for p in tuner.parameters) for name, tuner in tuners.items()}
    sizes = {"layers": layers, "tokens": tokens}
    return {**sizes, "backward": backward, "step": step_times, "trained": trained}


def _make_backward(tuner: Tuner, inputs: dict[str, Any]) -> Any:
    return lambda: tuner.backward(inputs)


def _make_step(tuner: Tuner, inputs: dict[str, Any]) -> Any:
    return lambda: tuner.step(inputs)


def measure_peak(name: str, layers: int, tokens: int, quick: bool) -> dict[str, float]:
    """Return the peak of two training steps in fp32 above the process before there was a model."""
    torch.set_num_threads(1)
    meter = ResourceMeter()
    model = make_stack(layers, quick=quick)
    if name != "nothing":
        chosen = make_mask(model, "uniform", DENSITY)
        tuner = TUNERS[name](model, chosen)
        for _ in range(2):
            tuner.step(make_batch(tokens))
    meter.record_mark("training")
    return {
        "peak_B": meter.marks["training_peak_B"],
        "kept_B": _measure_saved_bytes(name, layers, tokens, quick),
    }


def _measure_saved_bytes(name: str, layers: int, tokens: int, quick: bool) -> int:
    """Bytes that the forward pass keeps for the backward pass, without weights, each once."""
    if name == "nothing":
        return 0
    model = make_stack(layers, quick=quick)
    tuner = TUNERS[name](model, make_mask(model, "uniform", DENSITY))
    own = {p.untyped_storage().data_ptr() for p in tuner.model.parameters()}
    saved_bytes: dict[int, int] = {}

    def pack_tensor(tensor: torch.Tensor) -> torch.Tensor:
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for storage in (part.untyped_storage() for part in parts):
            if storage.data_ptr() not in own:
                saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        loss = tuner.model(**make_batch(tokens)).loss
    del loss
    return sum(saved_bytes.values())


def time_ratio(times: dict[str, Any], one: str, other: str) -> float:
    """Return the CPU time of one over another's."""
    return times[one]["cpu_s"] / times[other]["cpu_s"]


def _time_goals(found: dict[str, Any], dtype: str) -> list[dict[str, Any]]:
    times = found["backward"]
    goals = [
        make_goal(
            f"{dtype}: forward + backward / {baseline}", time_ratio(times, "ours", baseline), limit
        )
        for baseline, limit in LIMITS[dtype].items()
    ]
    if dtype == "fp32":
        goals += [
            make_goal(f"{dtype}, {kind}: / full", time_ratio(times, f"ours, {kind}", "full"), limit)
            for kind, limit in PART_LIMITS.items()
        ]
    return goals


def _memory_goals(memory: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    ours = memory["ours"]["peak_B"]
    return [
        make_goal("peak memory / LoRA r=8", ours / memory["LoRA r=8"]["peak_B"], 1.0),
        make_goal("peak memory / floor", ours / memory["floor"]["peak_B"], 1.10),
    ]


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    return [
        *(_make_times_table(result, dtype) for dtype in DTYPES),
        _make_memory_table(result["memory"]),
    ]


def _make_times_table(result: dict[str, Any], dtype: str) -> Table:
    found = result[dtype]
    size = f"{found['layers']} layers, {found['tokens']} tokens"
    title = f"{dtype}, {size}, density {result['density']:.1%}: CPU seconds"
    table = Table(title=title, title_justify="left")
    for column in ("", "trained", "forward + backward", "of full", "of the floor", "whole step"):
        table.add_column(column, justify="left" if not column else "right")
    times = found["backward"]
    for name, row in times.items():
        shares = (f"{time_ratio(times, name, other):.3f}" for other in ("full", "floor"))
        step_text = f"{found['step'][name]['cpu_s']:.3f}"
        table.add_row(
            name, f"{found['trained'][name]:,}", f"{row['cpu_s']:.3f}", *shares, step_text
        )
    return table


def _make_memory_table(memory: dict[str, dict[str, float]]) -> Table:
    table = Table(
        title="fp32: peak memory of training, and kept for backward", title_justify="left"
    )
    for column in ("", "peak, MB", "of the floor", "kept, MB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in memory.items():
        share = row["peak_B"] / memory["floor"]["peak_B"]
        table.add_row(
            name, f"{row['peak_B'] / 1e6:,.0f}", f"{share:.3f}", f"{row['kept_B'] / 1e6:,.0f}"
        )
    return table
