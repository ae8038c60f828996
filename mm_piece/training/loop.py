"""`train`: the loop over a recipe's tasks, resumable at any instant."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from shutil import rmtree
from typing import Any

from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from mm_piece import distributed, importance
from mm_piece.data import EncodedDataset, ExampleDataset, digest_of, tokenizer_of
from mm_piece.deltas.delta import Delta
from mm_piece.deltas.file_layout import LAYOUT_KEY, layout_of
from mm_piece.distributed import ZeroConfig
from mm_piece.distributed.progress import print_line, progress_bar
from mm_piece.errors import DataError
from mm_piece.evaluation.answers import pad_token_of
from mm_piece.evaluation.matrix import (
    count_measured_rows,
    find_absent_columns,
    measure_position,
    read_task_source,
)
from mm_piece.metrics.answers import ANSWER_METRICS
from mm_piece.recipe import Recipe, SelectionSettings, Task, load_recipe, parse_bytes
from mm_piece.selection import Mask
from mm_piece.selection.task import TaskSelection, select_for_task
from mm_piece.sparse.change_report import format_rounding_warning, measure_changes
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.store.attachment import checkout
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import load
from mm_piece.training import retention
from mm_piece.training.arguments import arguments
from mm_piece.training.retention import RetentionImportance
from mm_piece.training.stopping import GracefulStop
from mm_piece.training.store_setup import batch_size_of, open_or_create_store, recipe_zero_config
from mm_piece.training.trainer import fit
from mm_piece.training.values import require_values
from mm_piece.training.write_errors import translate_write_errors


@dataclass(frozen=True)
class TrainingRun:
    """What stays the same over the whole sequence."""

    recipe: Recipe
    store: DeltaStore
    train_rows: dict[str, ExampleDataset]
    test_rows: dict[str, ExampleDataset]  # of the tasks and of the general ones
    zero: ZeroConfig
    stop: GracefulStop


def train(recipe: str | Path | Recipe, *overrides: str) -> DeltaStore:
    """Train a recipe's tasks in order and return the store; a second run goes on where one stopped.

    Everything that can be wrong with the recipe, its data or its base is found before anything is
    written. Raises RecipeError, DataError, ModelError, SelectionError, StoreError.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    require_values(recipe.train)
    distributed.join_process_group(
        float(recipe.train.get("ddp_timeout", distributed.DEFAULT_TIMEOUT))
    )
    with (
        distributed.translate_errors(),
        translate_write_errors(Path(recipe.store)),
        GracefulStop() as stop,
    ):
        return _train_recipe(recipe, stop)


def _train_recipe(recipe: Recipe, stop: GracefulStop) -> DeltaStore:
    data, zero = _read_splits(recipe), recipe_zero_config(recipe)
    zero.require_launcher()
    arguments(recipe.train, Path(recipe.store) / "work", recipe.seed)
    importance.resolve_rule(recipe.select.method)
    for task in (*recipe.tasks, *recipe.general):
        ANSWER_METRICS[task.metric]([], [])  # its library is there
    store = open_or_create_store(recipe, *data, zero)
    with store.writing() if distributed.is_main() else nullcontext():
        run = TrainingRun(recipe, store, *data, zero, stop)
        if min(len(store), count_measured_rows(store, recipe) - 1) < len(recipe.tasks):
            _resume_training(run)
    return store


def _resume_training(run: TrainingRun) -> None:
    """Measure what was learned but not measured, then learn what is missing."""
    recipe, store, zero = run.recipe, run.store, run.zero
    with zero.loading_context():
        model, processor = load(recipe.base, store, at=len(store), **_load_options(recipe))
    if "device_map" not in recipe.model and zero.stage < 3:
        # Trainer would move it, but scores come before it.
        model.to(arguments(recipe.train, store.work, recipe.seed).device)

    def measure_here(position: int) -> None:
        with zero.engine_context(model):
            measure_position(store, recipe, model, processor, position=position, test=run.test_rows)

    for position in range(count_measured_rows(store, recipe), len(store) + 1):
        checkout(model, position)
        measure_here(position)
    if len(store) < len(recipe.tasks):
        fill_missing_retention(run, model, processor)
    checkout(model, len(store))
    for task in recipe.tasks[len(store) :]:
        learn_task(run, model, processor, task)
        measure_here(len(store))


def learn_task(run: TrainingRun, model: nn.Module, processor: Any, task: Task) -> Delta:
    """One task: scores, mask, sparse training, delta; the model stands there afterwards."""
    recipe, started = run.recipe, time.monotonic()
    position, seed = len(run.store) + 1, recipe.seed + len(run.store)
    work, encoded = (
        _work_folder(run, position),
        make_encoded_dataset(run, processor, task, position),
    )
    data = _digest_examples(encoded, task)
    pad, logs = pad_token_of(tokenizer_of(processor)), run.store.path / "logs" / work.name
    select, parent = recipe.select_of(task), _parent_digest(run.store)
    cache_key = {"base": run.store.base["digest"], "parent": parent, "data": data["data"]}
    facts = {"pad_token_id": pad, "seeds": (recipe.seed, seed), "cache_key": cache_key}
    make_retention = cache(partial(estimate_retention, run, model, encoded, select))
    with run.zero.engine_context(model):
        selection = select_for_task(
            model, encoded, select, work, **facts, make_retention=make_retention
        )
        penalty_strengths = make_penalty_strengths(recipe, selection.mask, make_retention)
        examples = build_training_examples(run, model, encoded, select)
    print_line(f"{task.name}: {selection}")
    scored = time.monotonic()
    with run.stop.deferring_stop(), sparse_tuning(model, selection.mask) as tuning:
        args = arguments(recipe.train, work, seed)
        metrics = fit(tuning, examples, pad, args, logs, penalty_strengths, run.stop)
        delta = tuning.delta(
            task.name,
            base=run.store.base["fingerprint"],
            parent=parent,
            **_describe_training(run, select, selection),
            **data,
            rehearsal=len(examples) - len(encoded),
            batch=batch_size_of(recipe),
            groups=measure_changes(tuning, selection.sizes),
        )
        _append_delta(run.store, delta)
        timing = {"select": scored - started, "train": time.monotonic() - scored}
        _record_task(run, task, {**timing, "loss": metrics["train_loss"]}, selection.stability)
    if needs_retention(recipe, task):
        save_retention(run, model, encoded, task, position)
    if distributed.is_main():
        rmtree(work, ignore_errors=True)
    for line in _format_changes(delta):
        print_line(f"{task.name}: {line}")
    return delta


def build_training_examples(
    run: TrainingRun, model: nn.Module, encoded: EncodedDataset, select: SelectionSettings
) -> Sequence[dict[str, Tensor]]:
    """A task's examples and, as the recipe asks for, the model's own answers beside them."""
    num_answers, seed = (
        round(run.recipe.rehearsal * len(encoded)),
        run.recipe.seed + len(run.store),
    )
    if num_answers == 0:
        return encoded
    rehearsal = retention.generate_rehearsal(model, encoded, select, seed, num_answers)
    print_line(f"{len(rehearsal)} rehearsal examples are trained beside {len(encoded)} of the task")
    return ConcatDataset([encoded, rehearsal])  # type: ignore[return-value] - it can be indexed


def make_penalty_strengths(
    recipe: Recipe, mask: Mask, make_retention: Callable[[], RetentionImportance]
) -> Mask | None:
    """How hard each selected entry is pulled back to where it stood; None without a penalty."""
    if recipe.penalty == 0:
        return None
    return {
        name: recipe.penalty * make_retention().scores_at(name, index)
        for name, index in mask.items()
    }


def needs_retention(recipe: Recipe, task: Task) -> bool:
    """Whether a later task will ask what this one is to be kept by."""
    return recipe.penalty > 0 or importance.rule_of(recipe.select_of(task).method).uses_retention


def fill_missing_retention(run: TrainingRun, model: nn.Module, processor: Any) -> None:
    """Estimate what is missing of learned tasks' importance: a run may have ended before it."""
    for position, task in enumerate(run.recipe.tasks[: len(run.store)], start=1):
        if needs_retention(run.recipe, task):
            checkout(model, position)
            save_retention(
                run, model, make_encoded_dataset(run, processor, task, position), task, position
            )
            if distributed.is_main():
                rmtree(_work_folder(run, position), ignore_errors=True)


def estimate_retention(
    run: TrainingRun, model: nn.Module, encoded: EncodedDataset, select: SelectionSettings
) -> RetentionImportance:
    """What the model is to keep while it learns its next task."""
    files = [_retention_file(run, position) for position in range(1, len(run.store) + 1)]
    pairs = zip(files, run.store.entries, strict=True)
    earlier = [retention.read_sensitivity(file, entry.sha256) for file, entry in pairs]
    return retention.make_retention_importance(
        model, encoded, select, run.recipe.seed + len(run.store), earlier
    )


def save_retention(
    run: TrainingRun, model: nn.Module, encoded: EncodedDataset, task: Task, position: int
) -> None:
    """Estimate what a learned task is to be kept by, once; the model stands after it."""
    file, delta = _retention_file(run, position), run.store.entries[position - 1].sha256
    if distributed.broadcast(retention.read_sensitivity(file, delta) is not None):
        return
    select = run.recipe.select_of(task)
    with run.zero.engine_context(model):
        sample = encoded.sample(select.samples, run.recipe.seed)
        sensitivity = retention.estimate_sensitivity(model, sample, select)
    if distributed.is_main():
        retention.write_sensitivity(file, sensitivity, delta)
    distributed.barrier()


def make_encoded_dataset(
    run: TrainingRun, processor: Any, task: Task, position: int
) -> EncodedDataset:
    """A task's training examples as model inputs, kept on disk while the task is learned."""
    max_bytes, folder = parse_bytes(run.recipe.cache), _work_folder(run, position) / "encoded"
    return EncodedDataset(run.train_rows[task.name], processor, folder, task.max_length, max_bytes)


def _work_folder(run: TrainingRun, position: int) -> Path:
    return run.store.work / f"{position:04d}"


def _retention_file(run: TrainingRun, position: int) -> Path:
    """Where the importance of a learned task lies."""
    return run.store.path / "kept" / f"{position:04d}.safetensors"


def _append_delta(store: DeltaStore, delta: Delta) -> None:
    """The main process writes; every process has seen it and needs no file of the task any more."""
    if distributed.is_main():
        store.append(delta)
    distributed.barrier()
    if not distributed.is_main():
        store.reload()


def _digest_examples(encoded: EncodedDataset, task: Task) -> dict[str, Any]:
    """Encode every example once: their digest, and how many lost text to the task's length."""
    truncations: list[bool] = []
    digest = digest_of(_iter_encoded(encoded, truncations, f"{task.name}: encode"))
    if task.max_length is None:
        return {"data": digest}
    cut, most = sum(truncations), task.max_length
    print_line(f"{task.name}: {cut} of {len(encoded)} examples lost text to max_length {most}")
    return {"data": digest, "truncated": cut}


def _iter_encoded(
    encoded: EncodedDataset, truncations: list[bool], title: str
) -> Iterator[dict[str, Tensor]]:
    for position in progress_bar(range(len(encoded)), title, "example"):
        inputs, cut = encoded.encode_truncated(position)
        truncations.append(cut)
        yield inputs


def _format_changes(delta: Delta) -> list[str]:
    """What the task changed in each group, in one line; another one if most of it was lost."""
    groups = delta.info["groups"]
    moved = (
        f"{group} {row['changed']:,} of {row['entries']:,} ({row['share']:.2%} of norm)"
        for group, row in groups.items()
    )
    rounding_note = format_rounding_warning(groups)
    return [f"changed {', '.join(moved)}", *([rounding_note] if rounding_note else [])]


def _parent_digest(store: DeltaStore) -> str:
    """The SHA-256 of the delta that the next one starts from; empty at the base."""
    return store.entries[-1].sha256 if len(store) else ""


def _describe_training(
    run: TrainingRun, select: SelectionSettings, selection: TaskSelection
) -> dict[str, Any]:
    return {
        "method": select.method,
        "density": select.density,
        "patchable": sum(selection.sizes.values()),
        "k": selection.num_selected,
        "samples": selection.samples,
        "penalty": run.recipe.penalty,
        "seed": run.recipe.seed,
        **layout_of(selection.mask, run.store.base.get(LAYOUT_KEY, {})),
    }


def _read_splits(recipe: Recipe) -> tuple[dict[str, ExampleDataset], dict[str, ExampleDataset]]:
    measured_tasks = (*recipe.tasks, *recipe.general)
    train = {task.name: read_task_source(task, task.train) for task in recipe.tasks}
    test = {task.name: read_task_source(task, task.test) for task in measured_tasks}
    for task in measured_tasks:
        parts = [rows[task.name] for rows in (train, test) if task.name in rows]
        for problem in find_absent_columns(task, parts):
            raise DataError(problem)
    return train, test


def _load_options(recipe: Recipe) -> dict[str, Any]:
    options = {key: value for key, value in recipe.model.items() if key != "dtype"}
    return {**options, "revision": recipe.revision}


def _record_task(
    run: TrainingRun, task: Task, seconds: dict[str, float], stability: dict[str, float]
) -> None:
    """Write what a delta must not hold: equal runs differ in it and make equal files."""
    if not distributed.is_main():
        return
    results = run.store.results()
    for section, facts in (("seconds", seconds), ("stability", stability)):
        results[section] = {**results.get(section, {}), task.name: facts}
    run.store.write_results(results)
