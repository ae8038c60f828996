"""Section `export`: an ordinary checkpoint of a position, against copying the base's files.

    export              mm_piece.export
    copyfile            shutil.copyfile of the base's files
    load + save         mm_piece.load, then the model's save_pretrained

Each is a process of its own, and its time ends when its files are on disk. Both checkpoints must
hold the same tensors. Peak memory is that of the whole process, imports included.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

import mm_piece
from eval.bench.delta.stores import LARGE, SMALL, TINY, make_base, make_model, make_store
from eval.bench.harness.isolation import ResourceMeter, measure_interleaved, run_in_process
from eval.bench.harness.timing import BenchContext, make_goal
from mm_piece.dtypes import view_bits
from mm_piece.files.safetensors import read_tensor_locations
from mm_piece.models.base import load_base, tensors

LAYERS = {True: 2, False: 8}  # by --quick
SHARD = {True: 20_000_000, False: 1_000_000_000}  # bytes, by --quick
POSITIONS = 2


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure the three candidates, and compare their files."""
    bench.show_progress("a checkpoint and a store")
    size = run_in_process(_make_base_and_store, bench.folder, bench.quick, bench.seed)
    writers = {
        "export": _export_store,
        "copyfile": _copy_base,
        "load + save": _load_and_save,
    }
    candidates = {}
    for name, writer in writers.items():
        candidates[name] = partial(_measure_writer, bench, name, writer)
    rounds = 1 if bench.quick else 3
    found = measure_interleaved(candidates, rounds)

    bench.show_progress("compare")
    digests = {name: _digest_tensors(bench.folder / name) for name in writers}
    equal = digests["export"] == digests["load + save"]
    # or both might have written the base
    changed = digests["export"] != digests["copyfile"]
    same = equal and changed
    peak = found["export"]["done_total_peak_B"]
    return {
        "bytes": size,
        "positions": POSITIONS,
        "equal": same,
        "ways": found,
        "goals": [
            make_goal("peak memory of export, GB", peak / 1e9, 2),
            make_goal("export equals load + save", same, 1, "at least"),
        ],
    }


def _make_base_and_store(folder: Path, quick: bool, seed: int) -> int:
    """Write a base, a store on it, and a tiny base; return the bytes of the model."""
    tiny = make_model(TINY, 1, seed)
    make_base(folder / "tiny", tiny, 10**9)

    sizes = SMALL if quick else LARGE
    model = make_model(sizes, LAYERS[quick], seed)
    base = make_base(folder / "base", model, SHARD[quick])
    make_store(folder / "store", model, base, POSITIONS)
    return sum(row.nbytes for row in tensors(model).values())


def _measure_writer(
    bench: BenchContext, name: str, writer: Callable[..., None]
) -> dict[str, float]:
    bench.show_progress(name)
    target = bench.folder / name
    shutil.rmtree(target, ignore_errors=True)
    # what earlier runs have not written yet must not cost this one time
    os.sync()
    shard = SHARD[bench.quick]
    return run_in_process(_meter_writer, writer, bench.folder, target, shard)


def _meter_writer(
    writer: Callable[..., None], folder: Path, to: Path, shard: int
) -> dict[str, float]:
    """Write in this process, and return its marks."""
    import torch

    torch.set_num_threads(1)
    # what a process does only the first time is not measured
    load_base(folder / "tiny", dtype="bfloat16")
    meter = ResourceMeter()
    writer(folder, to, shard)
    meter.record_mark("done")

    for file in to.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    meter.record_mark("synced")
    return meter.marks


def _export_store(folder: Path, to: Path, shard: int) -> None:
    mm_piece.export(folder / "store", to, shard_size=shard)


def _copy_base(folder: Path, to: Path, shard: int) -> None:
    to.mkdir()
    for file in (folder / "base").iterdir():
        shutil.copyfile(file, to / file.name)


def _load_and_save(folder: Path, to: Path, shard: int) -> None:
    model, processor = mm_piece.load(store=folder / "store")
    model.save_pretrained(to, max_shard_size=shard)
    processor.save_pretrained(to)


def _digest_tensors(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each tensor, read slice by slice."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, place in read_tensor_locations(file).items():
            header = repr((place.dtype, place.shape))
            sha = hashlib.sha256(header.encode())
            for _, piece in place.iter_slices():
                sha.update(view_bits(piece).numpy().data)
            found[name] = sha.hexdigest()
    return found


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    same = "equal tensors" if result["equal"] else "DIFFERENT tensors"
    title = f"Export {result['bytes'] / 1e9:.2f} GB at {result['positions']}: {same}"
    table = Table("", title=title, title_justify="left")
    # key of the result, and the unit to show it in
    columns = {
        "wall s": ("done_wall_s", 1),
        "CPU s": ("done_cpu_s", 1),
        "and on disk, wall s": ("synced_wall_s", 1),
        "peak MB": ("done_total_peak_B", 1e6),
        "above imports MB": ("done_peak_B", 1e6),
    }
    for column in (*columns, "/ copyfile, on disk"):
        table.add_column(column, justify="right")
    copied = result["ways"]["copyfile"]["synced_wall_s"]
    for name, row in result["ways"].items():
        cells = [f"{row[key] / unit:.2f}" for key, unit in columns.values()]
        ratio = row["synced_wall_s"] / copied
        table.add_row(name, *cells, f"{ratio:.2f}")
    return [table]
