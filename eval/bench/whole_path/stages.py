"""The whole path on one model in bf16, stage by stage: estimate, select, train, delta, checkout.

Each stage's seconds and its peak memory: of the process on a CPU, of the device's allocator on a
GPU. Physical limits stand beside it: the model's bytes read once, at the bandwidth of a copy.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from eval.bench.harness.accumulators import recorded_allocations
from eval.bench.harness.isolation import ResourceMeter
from eval.bench.whole_path.models import SHAPES, build_model, make_example
from mm_piece import importance
from mm_piece.deltas.delta import Delta, compute_fingerprint, gather_entries, scatter_entries
from mm_piece.families import weights
from mm_piece.models.base import tensors
from mm_piece.selection import Budgets, select_stream
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.store.attachment import attach_base, checkout
from mm_piece.store.delta_store import DeltaStore

DENSITY = 0.001
EXCLUDED = ("embedding", "head")


class StageRecorder:
    """Seconds and peak of each stage, on the device that does the work."""

    def __init__(self, device: str) -> None:
        self.device, self.rows = device, {}  # type: dict[str, dict[str, float]]

    def run_stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Return what the work returns; note what it took."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        meter, started = ResourceMeter(), time.perf_counter()
        found = work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        meter.record_mark("stage")
        peak = meter.marks["stage_total_peak_B"]
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        self.rows[name] = {"seconds": seconds, "peak_B": peak}
        return found


def run_whole_path(shape: str, folder: Path, device: str, **sizes: Any) -> dict[str, Any]:
    """Return every stage's numbers for one shape.

    `sizes`: toy (bool), text (tokens beside the image's), samples, steps, memory (bytes).
    """
    stages = StageRecorder(device)
    config = SHAPES[shape](sizes["toy"])
    model = stages.run_stage("build", lambda: build_model(config, device))
    total = sum(weight.numel() for weight in weights(model).values())
    examples = [make_example(config, sizes["text"], seed) for seed in range(sizes["samples"])]
    copy_speed = _measure_copy_speed(model)
    names = stages.run_stage(
        "reach", lambda: importance.find_patchable_names(model, examples[:1], EXCLUDED)
    )
    shapes = {name: weights(model)[name].shape for name in names}
    with recorded_allocations() as allocated_bytes:
        scores = importance.stream_scores(model, examples, names=names, memory=sizes["memory"])
        mask = stages.run_stage(
            "estimate, select", lambda: select_stream(scores, shapes, Budgets(DENSITY))
        )
    base = {name: gather_entries(tensors(model)[name], index) for name, index in mask.items()}
    identity = compute_fingerprint(tensors(model))
    store = DeltaStore.create(folder / "store", {"fingerprint": identity, "dtype": "bfloat16"}, "")
    delta = stages.run_stage(
        "train", lambda: _train_mask(model, mask, examples, sizes["steps"], identity)
    )
    learned = {name: gather_entries(tensors(model)[name], index) for name, index in mask.items()}
    stages.run_stage("delta", lambda: store.append(delta))
    _write_values(model, mask, base)
    attach_base(model, store)
    stages.run_stage("checkout 1", lambda: checkout(model, 1))
    exact = _has_values(model, mask, learned)
    stages.run_stage("checkout 0", lambda: checkout(model, 0))
    exact = exact and _has_values(model, mask, base)
    file = folder / "store" / store.entries[0].file
    stages.run_stage("load a delta", lambda: Delta.load(file))
    return {
        **{
            "shape": shape,
            "parameters": total,
            "eligible": sum(shape.numel() for shape in shapes.values()),
        },
        **{"trained": sum(map(len, mask.values())), "changed": delta.entries, "exact": exact},
        **{
            "delta_B": file.stat().st_size,
            "copy_B_per_s": copy_speed,
            "tokens": _count_tokens(examples[0]),
        },
        **{"device": _device_name(device), "stages": stages.rows, **sizes},
        **{"accumulators_B": max(allocated_bytes), "passes": len(allocated_bytes)},
    }


def _train_mask(
    model: Any, mask: dict[str, Tensor], examples: list[dict[str, Tensor]], steps: int, base: str
) -> Delta:
    with sparse_tuning(model, mask) as tuning:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-3)
        for step in range(steps):
            moved = {k: v.to(model.device) for k, v in examples[step % len(examples)].items()}
            model(**moved).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return tuning.delta("made-up", base=base)


def _write_values(model: Any, mask: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    live = tensors(model)
    scatter_entries((live[name], index, values[name]) for name, index in mask.items())


def _has_values(model: Any, mask: dict[str, Tensor], values: dict[str, Tensor]) -> bool:
    live = tensors(model)
    return all(
        torch.equal(gather_entries(live[name], index), values[name]) for name, index in mask.items()
    )


def _count_tokens(inputs: dict[str, Tensor]) -> int:
    return inputs["input_ids"].shape[1]


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _measure_copy_speed(model: Any) -> float:
    """Bytes a second at which the device copies: what nothing can read its weights faster than."""
    largest = max(tensors(model).values(), key=torch.numel)
    target = torch.empty_like(largest)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        target.copy_(largest)
        if largest.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * largest.nbytes / min(times)


def make_stage_table(row: dict[str, Any]) -> Table:
    """Return one shape's stages, with what each would take at the least."""
    size = 2 * row["parameters"]
    title = (
        f"{row['shape']}, {row['parameters'] / 1e6:,.0f} M parameters in bf16 "
        f"({size / 1e9:.1f} GB), {row['tokens']} tokens, {row['device']}"
    )
    found = Table(title=title, title_justify="left")
    for column in (
        "stage",
        "seconds",
        "peak, GB",
        "over the weights, GB",
        "reading the weights, s",
    ):
        found.add_column(column, justify="left" if column == "stage" else "right")
    for name, stage in row["stages"].items():
        over = (stage["peak_B"] - size) / 1e9
        reads = READS.get(name, lambda _: 0.0)(row) * size / row["copy_B_per_s"]
        limit = f"{reads:.3f}" if reads else ""
        cells = (f"{stage['seconds']:.3f}", f"{stage['peak_B'] / 1e9:.2f}", f"{over:.2f}", limit)
        found.add_row(name, *cells)
    return found


# How often a stage must read all weights: forward and backward, for each example or step.
READS: dict[str, Callable[[dict[str, Any]], float]] = {
    "reach": lambda row: 2.0,
    "estimate, select": lambda row: 2.0 * row["samples"],
    "train": lambda row: 2.0 * row["steps"],
}
