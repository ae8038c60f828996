"""Time of a training step and memory of training, beside rivals and the floor.

Forward and backward are what the ratios are about; a whole step, with AdamW
and the writing back, is timed too. Peaks are those of a process that does nothing else.
"""

from typing import Any

import torch
from rich.table import Table

from eval.bench.harness.isolation import Meter, fresh
from eval.bench.harness.models import batch, mask, stack
from eval.bench.harness.timing import Bench, goal, interleaved
from eval.bench.harness.tuners import TUNERS, Tuner

DENSITY = 0.001
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("uniform", "clustered", "few layers", "top half")
LIMITS = {  # of forward + backward, uniform mask, over each rival's
    "fp32": {"full": 0.70, "LoRA r=8": 0.95, "floor": 1.05},
    "bf16": {"full": 0.76, "LoRA r=8": 0.85, "floor": 1.05},
}
PART_LIMITS = {"few layers": 0.67, "top half": 0.52}  # over full, fp32


def measure(bench: Bench) -> dict[str, Any]:
    """Measure everything at one size: rivals, kinds of masks, peaks."""
    layers, tokens = (2, 64) if bench.quick else (8, 512)
    found: dict[str, Any] = {"density": DENSITY, "goals": []}
    for dtype in DTYPES:
        # A CPU without units for bf16 takes minutes for a pass of the larger stack.
        sizes = (2, 64) if dtype == "bf16" else (layers, tokens)
        found[dtype] = _side_by_side(bench, dtype, *sizes)
        found["goals"] += _time_goals(found[dtype], dtype)
    found["memory"] = {
        name: fresh(peak, name, layers, tokens, bench.quick) for name in (*TUNERS, "nothing")
    }
    found["goals"] += _memory_goals(found["memory"])
    return found


def _side_by_side(bench: Bench, dtype: str, layers: int, tokens: int) -> dict[str, Any]:
    tuners: dict[str, Tuner] = {}
    names = [name for name in TUNERS if dtype == "bf16" or name != "LoRA r=8, its dtype"]
    for name in names:
        model = stack(layers, DTYPES[dtype], bench.quick)
        tuners[name] = TUNERS[name](model, mask(model, "uniform", DENSITY))
    for kind in KINDS[1:]:
        model = stack(layers, DTYPES[dtype], bench.quick)
        tuners[f"ours, {kind}"] = TUNERS["ours"](model, mask(model, kind, DENSITY))
    inputs = batch(tokens)
    bench.say(f"{dtype}: {len(tuners)} ways, forward + backward")
    rounds = 2 if bench.quick else 5 if dtype == "fp32" else 3
    backward = interleaved({n: _backward(t, inputs) for n, t in tuners.items()}, rounds)
    bench.say(f"{dtype}: whole steps")
    whole = interleaved({n: _step(t, inputs) for n, t in tuners.items()}, rounds // 2)
    trained = {name: sum(p.numel() for p in tuner.parameters) for name, tuner in tuners.items()}
    sizes = {"layers": layers, "tokens": tokens}
    return {**sizes, "backward": backward, "step": whole, "trained": trained}


def _backward(tuner: Tuner, inputs: dict[str, Any]) -> Any:
    return lambda: tuner.backward(inputs)


def _step(tuner: Tuner, inputs: dict[str, Any]) -> Any:
    return lambda: tuner.step(inputs)


def peak(name: str, layers: int, tokens: int, quick: bool) -> dict[str, float]:
    """Return the peak of two training steps in fp32 above the process before there was a model."""
    torch.set_num_threads(1)
    meter = Meter()
    model = stack(layers, quick=quick)
    if name != "nothing":
        chosen = mask(model, "uniform", DENSITY)
        tuner = TUNERS[name](model, chosen)
        for _ in range(2):
            tuner.step(batch(tokens))
    meter.mark("training")
    return {"peak_B": meter.marks["training_peak_B"], "kept_B": _kept(name, layers, tokens, quick)}


def _kept(name: str, layers: int, tokens: int, quick: bool) -> int:
    """Bytes that the forward pass keeps for the backward pass, without weights, each once."""
    if name == "nothing":
        return 0
    model = stack(layers, quick=quick)
    tuner = TUNERS[name](model, mask(model, "uniform", DENSITY))
    own = {p.untyped_storage().data_ptr() for p in tuner.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for storage in (part.untyped_storage() for part in parts):
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = tuner.model(**batch(tokens)).loss
    del loss
    return sum(kept.values())


def ratio(times: dict[str, Any], one: str, other: str) -> float:
    """Return the CPU time of one over another's."""
    return times[one]["cpu_s"] / times[other]["cpu_s"]


def _time_goals(found: dict[str, Any], dtype: str) -> list[dict[str, Any]]:
    times = found["backward"]
    goals = [
        goal(f"{dtype}: forward + backward / {rival}", ratio(times, "ours", rival), limit)
        for rival, limit in LIMITS[dtype].items()
    ]
    if dtype == "fp32":
        goals += [
            goal(f"{dtype}, {kind}: / full", ratio(times, f"ours, {kind}", "full"), limit)
            for kind, limit in PART_LIMITS.items()
        ]
    return goals


def _memory_goals(memory: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    ours = memory["ours"]["peak_B"]
    return [
        goal("peak memory / LoRA r=8", ours / memory["LoRA r=8"]["peak_B"], 1.0),
        goal("peak memory / floor", ours / memory["floor"]["peak_B"], 1.10),
    ]


def tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    return [*(_times(result, dtype) for dtype in DTYPES), _memory(result["memory"])]


def _times(result: dict[str, Any], dtype: str) -> Table:
    found = result[dtype]
    size = f"{found['layers']} layers, {found['tokens']} tokens"
    title = f"{dtype}, {size}, density {result['density']:.1%}: CPU seconds"
    table = Table(title=title, title_justify="left")
    for column in ("", "trained", "forward + backward", "of full", "of the floor", "whole step"):
        table.add_column(column, justify="left" if not column else "right")
    times = found["backward"]
    for name, row in times.items():
        shares = (f"{ratio(times, name, other):.3f}" for other in ("full", "floor"))
        whole = f"{found['step'][name]['cpu_s']:.3f}"
        table.add_row(name, f"{found['trained'][name]:,}", f"{row['cpu_s']:.3f}", *shares, whole)
    return table


def _memory(memory: dict[str, dict[str, float]]) -> Table:
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
