"""The whole path on one model in bf16, stage by stage: estimate, select, train, delta, checkout.

Each stage has its seconds and its peak memory: of the process on a CPU, of the device's allocator
on a GPU. Beside them stands the physical limit: the model's bytes, at the bandwidth of a copy.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from eval.bench.harness.accumulators import recorded_allocations
from eval.bench.harness.isolation import ResourceMeter
from eval.bench.whole_path.models import SHAPES, build_model, make_example
from mm_piece import importance
from mm_piece.deltas.delta import Delta, compute_fingerprint
from mm_piece.entries import read_entries, write_entries
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
        self.device = device
        self.rows: dict[str, dict[str, float]] = {}

    def run_stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Return the result of the work; record its seconds and its peak."""
        # kernels run asynchronously: wait for them before and after
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        meter = ResourceMeter()
        started = time.perf_counter()
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
    model = stages.run_stage("build", partial(build_model, config, device))
    total = sum(weight.numel() for weight in weights(model).values())
    examples = [make_example(config, sizes["text"], seed) for seed in range(sizes["samples"])]
    copy_speed = _measure_copy_speed(model)

    find_names = partial(importance.find_patchable_names, model, examples[:1], EXCLUDED)
    names = stages.run_stage("reach", find_names)
    shapes = {name: weights(model)[name].shape for name in names}
    with recorded_allocations() as allocated_bytes:
        # a generator: scores are computed while the selection reads them
        scores = importance.stream_scores(model, examples, names=names, memory=sizes["memory"])
        find_mask = partial(select_stream, scores, shapes, Budgets(DENSITY))
        mask = stages.run_stage("estimate, select", find_mask)

    base = _read_values(model, mask)
    identity = compute_fingerprint(tensors(model))
    record = {"fingerprint": identity, "dtype": "bfloat16"}
    store = DeltaStore.create(folder / "store", record, "")
    train = partial(_train_mask, model, mask, examples, sizes["steps"], identity)
    delta = stages.run_stage("train", train)
    learned = _read_values(model, mask)
    stages.run_stage("delta", partial(store.append, delta))

    exact = _check_out_both(stages, model, store, mask, base, learned)
    file = folder / "store" / store.entries[0].file
    stages.run_stage("load a delta", partial(Delta.load, file))
    return {
        "shape": shape,
        "parameters": total,
        "eligible": sum(shape.numel() for shape in shapes.values()),
        "trained": sum(map(len, mask.values())),
        "changed": delta.entries,
        "exact": exact,
        "delta_B": file.stat().st_size,
        "copy_B_per_s": copy_speed,
        "tokens": _count_tokens(examples[0]),
        "device": _device_name(device),
        "stages": stages.rows,
        **sizes,
        "accumulators_B": max(allocated_bytes),
        "passes": len(allocated_bytes),
    }


def _check_out_both(
    stages: StageRecorder,
    model: Any,
    store: DeltaStore,
    mask: dict[str, Tensor],
    base: dict[str, Tensor],
    learned: dict[str, Tensor],
) -> bool:
    """Go from the base to position 1 and back; whether the model has the right values at both."""
    # training left the learned values in the model
    _write_values(model, mask, base)
    attach_base(model, store)
    stages.run_stage("checkout 1", partial(checkout, model, 1))
    exact = _has_values(model, mask, learned)
    stages.run_stage("checkout 0", partial(checkout, model, 0))
    return exact and _has_values(model, mask, base)


def _train_mask(
    model: Any, mask: dict[str, Tensor], examples: list[dict[str, Tensor]], steps: int, base: str
) -> Delta:
    """Train the mask's entries, one example a step, and return the delta."""
    with sparse_tuning(model, mask) as tuning:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-3)
        for step in range(steps):
            example = examples[step % len(examples)]
            moved = {name: row.to(model.device) for name, row in example.items()}
            model(**moved).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return tuning.delta("made-up", base=base)


def _read_values(model: Any, mask: dict[str, Tensor]) -> dict[str, Tensor]:
    live = tensors(model)
    return {name: read_entries(live[name], index) for name, index in mask.items()}


def _write_values(model: Any, mask: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    live = tensors(model)
    write_entries((live[name], index, values[name]) for name, index in mask.items())


def _has_values(model: Any, mask: dict[str, Tensor], values: dict[str, Tensor]) -> bool:
    current = _read_values(model, mask)
    return all(torch.equal(current[name], values[name]) for name in mask)


def _count_tokens(inputs: dict[str, Tensor]) -> int:
    return inputs["input_ids"].shape[1]


def _device_name(device: str) -> str:
    if device != "cuda":
        return "CPU"
    return torch.cuda.get_device_name()


def _measure_copy_speed(model: Any) -> float:
    """Return the bytes a second at which the device copies: the limit of reading its weights."""
    largest = max(tensors(model).values(), key=torch.numel)
    target = torch.empty_like(largest)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        target.copy_(largest)
        if largest.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    # a copy reads and writes
    return 2 * largest.nbytes / min(times)


def make_stage_table(row: dict[str, Any]) -> Table:
    """Return one shape's stages, each with its lower bound in time."""
    size = 2 * row["parameters"]  # bytes in bf16
    title = (
        f"{row['shape']}, {row['parameters'] / 1e6:,.0f} M parameters in bf16 "
        f"({size / 1e9:.1f} GB), {row['tokens']} tokens, {row['device']}"
    )
    found = Table(title=title, title_justify="left")
    columns = (
        "stage",
        "seconds",
        "peak, GB",
        "over the weights, GB",
        "reading the weights, s",
    )
    for column in columns:
        found.add_column(column, justify="left" if column == "stage" else "right")
    for name, stage in row["stages"].items():
        peak = stage["peak_B"]
        limit = ""
        if name in READS:
            count = READS[name](row)
            seconds = count * size / row["copy_B_per_s"]
            limit = f"{seconds:.3f}"
        found.add_row(
            name,
            f"{stage['seconds']:.3f}",
            f"{peak / 1e9:.2f}",
            f"{(peak - size) / 1e9:.2f}",
            limit,
        )
    return found


# reads of all weights that a stage needs: forward and backward, for each example or step
READS: dict[str, Callable[[dict[str, Any]], float]] = {
    "reach": lambda row: 2.0,
    "estimate, select": lambda row: 2.0 * row["samples"],
    "train": lambda row: 2.0 * row["steps"],
}
