"""One recipe on every engine: are the masks those of one process, and how far apart the values?

The recipe trains the tiny base of `pipelines/tiny.yaml` on two of its
tasks with the shipped DeepSpeed configurations. A batch that is divided otherwise adds up in
another order, so that values differ by rounding, which later steps carry on.
"""

import json
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import mm_piece
from eval.bench.distributed.launch import run_on_processes
from eval.bench.distributed.steps import STAGES
from eval.bench.harness.timing import BenchContext, make_goal
from mm_piece.families import weights
from mm_piece.store.delta_store import DeltaStore

ROOT = Path(__file__).parents[3]
TASKS = ("digits", "words")


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Train on one process, then with every engine on two and on four."""
    mm_piece.train(_write_recipe(bench, "plain", 1, 0))
    single = DeltaStore.open(bench.folder / "plain")
    rows = []
    for processes in (2,) if bench.quick else (2, 4):
        bench.show_progress(f"{', '.join(STAGES)} on {processes} processes")
        recipes = {
            engine: _write_recipe(bench, f"{engine} {processes}", processes, stage)
            for engine, stage in STAGES.items()
        }
        run_on_processes(processes, _train_all, [str(recipe) for recipe in recipes.values()])
        for engine in recipes:
            other = DeltaStore.open(bench.folder / f"{engine} {processes}")
            row = {"engine": engine, "processes": processes}
            rows.append({**row, **_compare_stores(bench.folder, single, other)})
    same = min(row["masks_equal"] for row in rows)
    return {"rows": rows, "goals": [make_goal("masks equal to one process's", same, 1, "at least")]}


def _write_recipe(bench: BenchContext, name: str, processes: int, stage: int) -> Path:
    count, steps = (16, 2) if bench.quick else (192, 12)
    content = {
        "base": str(ROOT / "checkpoints" / "tiny" / "base"),
        "store": str(bench.folder / name),
        "tasks": [
            {
                "name": task,
                "train": f"scenes:{task}/train[:{count}]",
                "test": f"scenes:{task}/test[:{count // 4}]",
                "max_new_tokens": 8,
            }
            for task in TASKS
        ],
        "select": {
            **{"method": "piece-s", "density": 0.001, "samples": count // 2},
            "cache": str(bench.folder / f"masks {name}"),
        },
        "train": {
            **{"learning_rate": 1e-3, "max_steps": steps, "disable_tqdm": True},
            "per_device_train_batch_size": 8 // processes,
        },
        "seed": bench.seed,
    }
    if stage:
        content["train"]["deepspeed"] = str(ROOT / "pipelines" / "deepspeed" / f"zero{stage}.json")
    file = bench.folder / f"{name}.yaml"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def _train_all(recipes: list[str]) -> None:
    for recipe in recipes:
        mm_piece.train(recipe)


def _compare_stores(folder: Path, single: DeltaStore, other: DeltaStore) -> dict[str, Any]:
    """Masks as chosen; every weight of the models after each task; answers at every position."""
    max_difference, ulps = 0.0, 0
    for position in range(1, len(single) + 1):
        one, two = (_load_weights(store, position) for store in (single, other))
        max_difference = max(
            max_difference, *(float((w - two[name]).abs().max()) for name, w in one.items())
        )
        ulps = max(ulps, *(_count_ulps(weight, two[name]) for name, weight in one.items()))
    ours, theirs = (_read_masks(folder / f"masks {store.path.name}") for store in (single, other))
    positions = range(len(single) + 1)
    return {
        "masks_equal": ours == theirs,
        "answers_equal": all(single.answers(n) == other.answers(n) for n in positions),
        "entries": sum(single.delta(n).entries for n in positions[1:]),
        "apart": max_difference,
        "ulps": ulps,
    }


def _load_weights(store: DeltaStore, position: int) -> dict[str, Tensor]:
    model, _ = mm_piece.load(store=store, at=position)
    return {name: weight.detach() for name, weight in weights(model).items()}


def _read_masks(folder: Path) -> list[dict[str, list[int]]]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    return [{name: index.tolist() for name, index in load_file(f).items()} for f in files]


def _count_ulps(one: Tensor, other: Tensor) -> int:
    """How many fp32 numbers lie between two at most."""
    return int((_float_order(one) - _float_order(other)).abs().max())


def _float_order(values: Tensor) -> Tensor:
    """The place of fp32 numbers among all of them."""
    patterns = values.contiguous().view(torch.int32).long()
    return torch.where(patterns < 0, -(patterns & 0x7FFFFFFF), patterns)


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    table = Table(title="Beside one process", title_justify="left")
    for column in ("", "processes", "masks", "answers", "entries", "values apart", "ulps"):
        table.add_column(column, justify="right" if column else "left")
    for row in result["rows"]:
        same = ("equal" if row[what] else "differ" for what in ("masks_equal", "answers_equal"))
        values = (f"{row['entries']:,}", f"{row['apart']:.2g}", f"{row['ulps']:,}")
        table.add_row(row["engine"], str(row["processes"]), *same, *values)
    return [table]
