"""Section `load`: the model at a position, read from disk, against the base alone.

Each measurement is a process of its own. "used" is after a sum of every weight: a loader may map
files into memory and read nothing until then. Cold: the files are pushed out of the page cache
before; storage below this machine may still cache them. "cast" is a base published in float16 and
trained in bfloat16, as LLaVA-1.5 is: its weights are in memory of their own. A base in the dtype of
training is mapped, and the kernel copies a page that a delta writes to, nine in ten at 0.1 %:
"base, copied" has all of them in memory of its own. Memory is counted above the imports. "extra" is
a position's memory above the base, in multiples of the deltas in memory: resident memory at its
peak includes the mapped file, anonymous memory at the end leaves it out.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from eval.bench.delta.stores import (
    LARGE,
    SMALL,
    TINY,
    bytes_in_memory,
    layer_matrices,
    make_base,
    make_model,
    make_store,
)
from eval.bench.harness.isolation import (
    ResourceMeter,
    evict_page_cache,
    measure_interleaved,
    run_in_process,
)
from eval.bench.harness.timing import BenchContext, make_goal
from mm_piece.deltas.delta import compute_fingerprint
from mm_piece.entries import write_entries
from mm_piece.models.base import load_base, tensors
from mm_piece.store.delta_store import DeltaStore

POSITIONS = (1, 8)
BASE, COPIED = 0, -1  # no store: the base alone, and a copy of it
KINDS = {"": "bfloat16", "cast ": "float16"}  # what the files hold; all train in bfloat16
LAYERS = {True: 2, False: 3}  # by --quick
SHARD = {True: 20_000_000, False: 500_000_000}  # bytes, by --quick


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure loading at position 0, 1 and 8, warm and cold."""
    warm_rounds, cold_rounds = (2, 1) if bench.quick else (7, 3)

    bench.show_progress("a checkpoint and a store")
    stores = [
        run_in_process(_make_base_and_store, bench.folder, bench.quick, bench.seed, kind)
        for kind in KINDS
    ]
    # both stores have the same sizes
    sizes = stores[0]

    candidates: dict[str, Callable[[], dict[str, float]]] = {
        "base, copied": partial(_load_in_process, bench, "", COPIED)
    }
    for kind in KINDS:
        candidates[f"{kind}base"] = partial(_load_in_process, bench, kind, BASE)
        for position in POSITIONS:
            name = f"{kind}at {position}"
            candidates[name] = partial(_load_in_process, bench, kind, position)
    cold = {f"{name}, cold": partial(_run_cold, bench, work) for name, work in candidates.items()}

    found = measure_interleaved(candidates, warm_rounds)
    found |= measure_interleaved(cold, cold_rounds)
    measure_phases = partial(run_in_process, _measure_phases, bench.folder)
    phases = measure_interleaved({"phases": measure_phases}, cold_rounds)
    return {
        **sizes,
        "loads": found,
        "phases": _step_differences(phases["phases"]),
        "goals": _make_goals(found, sizes["delta_bytes_in_memory"]),
    }


def _make_base_and_store(folder: Path, quick: bool, seed: int, kind: str) -> dict[str, Any]:
    """Write base and store; a tiny base too, for what a process does only the first time."""
    tiny = make_model(TINY, 1, seed)
    make_base(folder / "tiny", tiny, 10**9)

    sizes = SMALL if quick else LARGE
    model = make_model(sizes, LAYERS[quick], seed)
    published = model.to(getattr(torch, KINDS[kind]))
    base = make_base(folder / f"{kind}base", published, SHARD[quick])
    # through the published dtype and back: the values that a load finds
    model = published.to(torch.bfloat16)
    store = make_store(folder / f"{kind}store", model, base, max(POSITIONS))

    live = tensors(model)
    on_disk = {}
    in_memory = {}
    for position in POSITIONS:
        on_disk[position] = sum(entry.bytes for entry in store.entries[:position])
        in_memory[position] = bytes_in_memory(store.deltas(position))
    return {
        "bytes": sum(row.nbytes for row in live.values()),
        "patchable_bytes": sum(row.nbytes for row in layer_matrices(live).values()),
        "delta_bytes_on_disk": on_disk,
        "delta_bytes_in_memory": in_memory,
    }


def _run_cold(bench: BenchContext, work: Callable[[], dict[str, float]]) -> dict[str, float]:
    evict_page_cache([bench.folder])
    return work()


def _load_in_process(bench: BenchContext, kind: str, at: int) -> dict[str, float]:
    bench.show_progress(f"{kind}position {max(at, 0)}")
    return run_in_process(_measure_load, bench.folder, kind, at)


def _measure_load(folder: Path, kind: str, at: int) -> dict[str, float]:
    """Load in this process, use the weights, and return the marks."""
    import mm_piece

    _warm_up(folder)
    meter = ResourceMeter()
    if at > 0:
        model, _ = mm_piece.load(store=folder / f"{kind}store", at=at)
    else:
        model, _ = load_base(folder / f"{kind}base", dtype="bfloat16")
    if at == COPIED:
        for weight in model.parameters():
            weight.data = weight.data.clone()

    meter.record_mark("loaded")
    _read_weights(model)
    meter.record_mark("used")
    return meter.marks


def _measure_phases(folder: Path) -> dict[str, float]:
    """Follow the steps of `mm_piece.load` one by one, at the last position."""
    _warm_up(folder)
    meter = ResourceMeter()
    model, _ = load_base(folder / "base", dtype="bfloat16")
    meter.record_mark("base")

    live = tensors(model)
    compute_fingerprint(live)
    meter.record_mark("fingerprint")
    store = DeltaStore.open(folder / "store")
    deltas = store.deltas()
    meter.record_mark("read, decode, verify")

    for number, delta in enumerate(deltas, 1):
        delta.require_applicable(live)
        meter.record_mark(f"check {number}")
        entries = ((live[name], row, delta.values[name]) for name, row in delta.indices.items())
        write_entries(entries)
        meter.record_mark(f"write {number}")

    _read_weights(model)
    meter.record_mark("use")
    return meter.marks


def _warm_up(folder: Path) -> None:
    torch.set_num_threads(1)
    load_base(folder / "tiny", dtype="bfloat16")


def _read_weights(model: Any) -> None:
    for weight in tensors(model).values():
        weight.sum()


def _step_differences(marks: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return the time and memory that each step added: marks are cumulative."""
    names = [key.removesuffix("_wall_s") for key in marks if key.endswith("_wall_s")]
    kinds = (
        "wall_s",
        "cpu_s",
        "thread_s",
        "resident_B",
        "anonymous_B",
    )
    found = {}
    before = dict.fromkeys(kinds, 0.0)
    for name in names:
        now = {kind: marks[f"{name}_{kind}"] for kind in kinds}
        found[name] = {kind: now[kind] - before[kind] for kind in kinds}
        before = now
    return found


def _make_goals(found: dict[str, dict[str, float]], deltas: dict[int, int]) -> list[dict[str, Any]]:
    # kind of a load, and the base that it is compared with
    pairs = (
        ("", "base"),
        ("", "base, copied"),
        ("cast ", "cast base"),
    )
    goals = []
    for at in POSITIONS:
        for how in ("", ", cold"):
            for kind, base in pairs:
                ours = found[f"{kind}at {at}{how}"]
                theirs = found[f"{base}{how}"]
                ratio = _time_ratios(ours, theirs)["used_wall_s"]
                title = f"load at {at} and use / {base}{how or ', warm'}, wall"
                goals.append(make_goal(title, ratio, 1.05))

        for kind in KINDS:
            extra = _extra_memory(found, kind, at, "peak") / deltas[at]
            goals.append(make_goal(f"{kind}extra peak at {at} / deltas", extra, 3))
    return goals


def _time_ratios(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    return {key: ours[key] / theirs[key] for key in ours if key.endswith("_s")}


def _extra_memory(found: dict[str, dict[str, float]], kind: str, at: int, what: str) -> float:
    """Return the bytes of memory that a position takes above the base, at most or at the end."""
    key = f"used_{what}_B"
    position = found[f"{kind}at {at}"][key]
    base = found[f"{kind}base"][key]
    return position - base


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of this section."""
    in_memory = result["delta_bytes_in_memory"]
    sizes = ", ".join(f"{at}: {size / 1e6:.1f}" for at, size in in_memory.items())
    title = f"Load {result['bytes'] / 1e9:.2f} GB; deltas in memory, MB, at {sizes}"
    table = Table("", title=title, title_justify="left")
    # key of the result, and the unit to show it in
    columns = {
        "load wall s": ("loaded_wall_s", 1),
        "load CPU s": ("loaded_cpu_s", 1),
        "and use wall s": ("used_wall_s", 1),
        "and use CPU s": ("used_cpu_s", 1),
        "peak MB": ("used_peak_B", 1e6),
        "anonymous MB": ("used_anonymous_B", 1e6),
    }
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in result["loads"].items():
        cells = (f"{row[key] / unit:.3f}" for key, unit in columns.values())
        table.add_row(name, *cells)
    return [table, _phase_table(result["phases"])]


def _phase_table(phases: dict[str, dict[str, float]]) -> Table:
    title = f"Where the time goes at {max(POSITIONS)}, warm"
    table = Table("step", title=title, title_justify="left")
    for column in ("wall ms", "CPU ms", "resident + MB", "anonymous + MB"):
        table.add_column(column, justify="right")
    for name, row in phases.items():
        times = (f"{1000 * row[key]:.1f}" for key in ("wall_s", "cpu_s"))
        sizes = (f"{row[key] / 1e6:.1f}" for key in ("resident_B", "anonymous_B"))
        table.add_row(name, *times, *sizes)
    return table
