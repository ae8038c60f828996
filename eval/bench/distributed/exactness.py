"""One recipe on every engine: whether masks equal those of one process, how far values differ.

The recipe trains the tiny base of `pipelines/tiny.yaml` on two of its tasks with the shipped
DeepSpeed configurations. Another division of a batch adds up in another order, so that values
differ by rounding, and later steps carry the difference on.
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
    process_counts = (2,) if bench.quick else (2, 4)
    mm_piece.train(_write_recipe(bench, "plain", 1, 0))
    single = DeltaStore.open(bench.folder / "plain")

    rows = []
    for processes in process_counts:
        bench.show_progress(f"{', '.join(STAGES)} on {processes} processes")
        recipes = []
        for engine, stage in STAGES.items():
            recipe = _write_recipe(bench, f"{engine} {processes}", processes, stage)
            recipes.append(str(recipe))
        # all engines in one launch: processes take seconds to start
        run_on_processes(processes, _train_all, recipes)

        for engine in STAGES:
            other = DeltaStore.open(bench.folder / f"{engine} {processes}")
            differences = _compare_stores(bench.folder, single, other)
            rows.append({"engine": engine, "processes": processes, **differences})

    same = min(row["masks_equal"] for row in rows)
    goal = make_goal("masks equal to one process's", same, 1, "at least")
    return {"rows": rows, "goals": [goal]}


def _write_recipe(bench: BenchContext, name: str, processes: int, stage: int) -> Path:
    """Write a recipe whose batch of all processes together has eight examples."""
    count, steps = (16, 2) if bench.quick else (192, 12)
    tasks = []
    for task in TASKS:
        tasks.append(
            {
                "name": task,
                "train": f"scenes:{task}/train[:{count}]",
                "test": f"scenes:{task}/test[:{count // 4}]",
                "max_new_tokens": 8,
            }
        )

    train = {
        "learning_rate": 1e-3,
        "max_steps": steps,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8 // processes,
    }
    if stage:
        config = ROOT / "pipelines" / "deepspeed" / f"zero{stage}.json"
        train["deepspeed"] = str(config)

    content = {
        "base": str(ROOT / "checkpoints" / "tiny" / "base"),
        "store": str(bench.folder / name),
        "tasks": tasks,
        "select": {
            "method": "piece-s",
            "density": 0.001,
            "samples": count // 2,
            "cache": str(bench.folder / f"masks {name}"),
        },
        "train": train,
        "seed": bench.seed,
    }
    file = bench.folder / f"{name}.yaml"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def _train_all(recipes: list[str]) -> None:
    for recipe in recipes:
        mm_piece.train(recipe)


def _compare_stores(folder: Path, single: DeltaStore, other: DeltaStore) -> dict[str, Any]:
    """Compare the masks, every weight of the models after each task, and all answers."""
    positions = range(len(single) + 1)
    max_difference = 0.0
    max_ulps = 0
    for position in positions[1:]:
        ours = _load_weights(single, position)
        theirs = _load_weights(other, position)
        for name, weight in ours.items():
            difference = float((weight - theirs[name]).abs().max())
            max_difference = max(max_difference, difference)
            max_ulps = max(max_ulps, _count_ulps(weight, theirs[name]))

    single_masks = _read_masks(folder / f"masks {single.path.name}")
    other_masks = _read_masks(folder / f"masks {other.path.name}")
    return {
        "masks_equal": single_masks == other_masks,
        "answers_equal": all(single.answers(n) == other.answers(n) for n in positions),
        "entries": sum(single.delta(n).entries for n in positions[1:]),
        "apart": max_difference,
        "ulps": max_ulps,
    }


def _load_weights(store: DeltaStore, position: int) -> dict[str, Tensor]:
    model, _ = mm_piece.load(store=store, at=position)
    return {name: weight.detach() for name, weight in weights(model).items()}


def _read_masks(folder: Path) -> list[dict[str, list[int]]]:
    """Return the cached masks in the order of the tasks."""
    from safetensors.torch import load_file

    # by time: the order in which the tasks were learned
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    masks = []
    for file in files:
        rows = load_file(file)
        masks.append({name: index.tolist() for name, index in rows.items()})
    return masks


def _count_ulps(one: Tensor, other: Tensor) -> int:
    """Return the largest number of fp32 steps between two values."""
    steps = _float_order(one) - _float_order(other)
    return int(steps.abs().max())


def _float_order(values: Tensor) -> Tensor:
    """Return the position of fp32 numbers in the order of all of them."""
    patterns = values.contiguous().view(torch.int32).long()
    # patterns of negative numbers are sign and magnitude: they run downwards
    return torch.where(patterns < 0, -(patterns & 0x7FFFFFFF), patterns)


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    table = Table(title="Beside one process", title_justify="left")
    for column in ("", "processes", "masks", "answers", "entries", "values apart", "ulps"):
        table.add_column(column, justify="right" if column else "left")
    for row in result["rows"]:
        table.add_row(
            row["engine"],
            str(row["processes"]),
            "equal" if row["masks_equal"] else "differ",
            "equal" if row["answers_equal"] else "differ",
            f"{row['entries']:,}",
            f"{row['apart']:.2g}",
            f"{row['ulps']:,}",
        )
    return [table]
