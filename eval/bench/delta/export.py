"""Section `export`: an ordinary checkpoint of a position, against copying the base's files.

    export              mm_piece.export
    copyfile            shutil.copyfile of the base's files
    load + save         mm_piece.load, then the model's save_pretrained

Each is a process of its own, what it wrote is on disk when its time ends, and both checkpoints must
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

LAYERS = {True: 2, False: 8}
SHARD = {True: 20_000_000, False: 1_000_000_000}  # bytes
POSITIONS = 2


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure the three, and compare what they wrote."""
    bench.show_progress("a checkpoint and a store")
    size = run_in_process(_make_base_and_store, bench.folder, bench.quick, bench.seed)
    writers = {"export": _export_store, "copyfile": _copy_base, "load + save": _load_and_save}
    candidates = {
        name: partial(_measure_writer, bench, name, writer) for name, writer in writers.items()
    }
    found = measure_interleaved(candidates, 1 if bench.quick else 3)
    bench.show_progress("compare")
    equal = _digest_tensors(bench.folder / "export") == _digest_tensors(
        bench.folder / "load + save"
    )
    changed = _digest_tensors(bench.folder / "export") != _digest_tensors(bench.folder / "copyfile")
    return {
        "bytes": size,
        "positions": POSITIONS,
        "equal": equal and changed,
        "ways": found,
        "goals": [
            make_goal("peak memory of export, GB", found["export"]["done_total_peak_B"] / 1e9, 2),
            make_goal("export equals load + save", equal and changed, 1, "at least"),
        ],
    }


def _make_base_and_store(folder: Path, quick: bool, seed: int) -> int:
    make_base(folder / "tiny", make_model(TINY, 1, seed), 10**9)
    model = make_model(SMALL if quick else LARGE, LAYERS[quick], seed)
    make_store(folder / "store", model, make_base(folder / "base", model, SHARD[quick]), POSITIONS)
    return sum(row.nbytes for row in tensors(model).values())


def _measure_writer(
    bench: BenchContext, name: str, writer: Callable[..., None]
) -> dict[str, float]:
    bench.show_progress(name)
    shutil.rmtree(bench.folder / name, ignore_errors=True)
    os.sync()
    return run_in_process(
        _meter_writer, writer, bench.folder, bench.folder / name, SHARD[bench.quick]
    )


def _meter_writer(
    writer: Callable[..., None], folder: Path, to: Path, shard: int
) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
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
    mm_piece.export(folder / "store", None, to, shard_size=shard)


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
            sha = hashlib.sha256(repr((place.dtype, place.shape)).encode())
            for _, piece in place.iter_slices():
                sha.update(view_bits(piece).numpy().data)
            found[name] = sha.hexdigest()
    return found


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    same = "equal tensors" if result["equal"] else "DIFFERENT tensors"
    title = f"Export {result['bytes'] / 1e9:.2f} GB at {result['positions']}: {same}"
    table = Table("", title=title, title_justify="left")
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
        cells = (f"{row[key] / unit:.2f}" for key, unit in columns.values())
        table.add_row(name, *cells, f"{row['synced_wall_s'] / copied:.2f}")
    return [table]
