"""`train`: the loop over a recipe's tasks, resumable at any instant.

Each task goes through the same steps: estimate and select, train, record, measure. What a step
leaves on disk is whole or not there, so a run that was stopped goes on with the step it was in.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import rmtree
from typing import Any

from torch import Tensor

from mm_piece import distributed
from mm_piece.data import EncodedDataset, digest_of
from mm_piece.deltas.delta import Delta
from mm_piece.deltas.file_layout import LAYOUT_KEY, layout_of
from mm_piece.distributed.progress import print_line, progress_bar
from mm_piece.evaluation.matrix import count_measured_rows, measure_position
from mm_piece.importance.factored import RetentionImportance
from mm_piece.recipe import (
    Recipe,
    SelectionSettings,
    Task,
    load_recipe,
    parse_bytes,
)
from mm_piece.selection import Mask
from mm_piece.selection.task import TaskSelection, select_for_task
from mm_piece.sparse.change_report import format_rounding_warning, measure_changes
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.store.attachment import checkout
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.results import Results, add_task_facts
from mm_piece.training import retention
from mm_piece.training.arguments import arguments
from mm_piece.training.preflight import preflight
from mm_piece.training.retention_run import (
    estimate_retention,
    make_penalty_strengths,
    needs_retention,
    save_retention,
)
from mm_piece.training.run_setup import Run, open_run, read_splits
from mm_piece.training.stopping import GracefulStop
from mm_piece.training.store_setup import batch_size_of, find_store, is_finished
from mm_piece.training.trainer import fit
from mm_piece.training.values import require_values
from mm_piece.training.write_errors import translate_write_errors


def train(recipe: str | Path | Recipe, *overrides: str) -> DeltaStore:
    """Train a recipe's tasks in order and return the store.

    A second run of the same recipe goes on where the first one stopped. Everything that can be
    wrong with the recipe, its data or its base is found before anything is written. Raises
    RecipeError, DataError, ModelError, SelectionError and StoreError.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)

    require_values(recipe.train)
    timeout = recipe.train.get("ddp_timeout", distributed.DEFAULT_TIMEOUT)
    distributed.join_process_group(float(timeout))
    with (
        distributed.translate_errors(),
        translate_write_errors(Path(recipe.store)),
        GracefulStop() as stop,
    ):
        return _train_recipe(recipe, stop)


def _train_recipe(recipe: Recipe, stop: GracefulStop) -> DeltaStore:
    """Train what is missing of a recipe, and measure it."""
    plan = preflight(recipe)
    data = read_splits(recipe)
    store = find_store(plan)
    if store is not None and is_finished(store, recipe):
        return store

    with open_run(plan, data, store, stop) as run:
        _measure_missing(run)
        for task in recipe.tasks[len(run.store) :]:
            learn_task(run, task)
            _measure(run, len(run.store))
        return run.store


def _measure_missing(run: Run) -> None:
    """Measure every learned position that has no row yet, and estimate missing importance.

    A run may have been stopped after it stored a task and before it measured it.
    """
    for position in range(count_measured_rows(run.store, run.recipe), len(run.store) + 1):
        checkout(run.model, position)
        _measure(run, position)

    if len(run.store) < len(run.recipe.tasks):
        fill_missing_retention(run)
    checkout(run.model, len(run.store))


def _measure(run: Run, position: int) -> None:
    """Write a row of the accuracy matrix; the model stands at `position`."""
    with run.zero.engine_context(run.model):
        measure_position(
            run.store,
            run.recipe,
            run.model,
            run.processor,
            position=position,
            test=run.data.test,
        )


@dataclass(frozen=True)
class _TaskInputs:
    """What every step of learning one task needs."""

    task: Task
    select: SelectionSettings
    encoded: EncodedDataset
    facts: dict[str, Any]  # of the encoded examples, for the delta: their digest, and cuts
    parent: str  # SHA-256 of the delta before; empty at the base
    seed: int
    work: Path  # a folder for this task, removed at its end


def learn_task(run: Run, task: Task) -> Delta:
    """Learn one task and store its delta; the model stands behind it afterwards."""
    started = time.monotonic()
    position = len(run.store) + 1
    encoded = make_encoded_dataset(run, task, position)
    inputs = _TaskInputs(
        task,
        run.recipe.select_of(task),
        encoded,
        facts=_digest_examples(encoded, task),
        parent=_parent_digest(run.store),
        seed=run.recipe.seed + len(run.store),
        work=run.store.work_folder(position),
    )

    with run.zero.engine_context(run.model):
        selection, penalty_strengths = _select_entries(run, inputs)
        examples = build_training_examples(run, inputs)
    print_line(f"{task.name}: {selection}")

    select_seconds = time.monotonic() - started
    delta = _train_entries(run, inputs, selection, examples, penalty_strengths, select_seconds)
    if needs_retention(run.recipe, task):
        save_retention(run, encoded, task, position)

    if distributed.is_main():
        rmtree(inputs.work, ignore_errors=True)
    for line in _format_changes(delta):
        print_line(f"{task.name}: {line}")
    return delta


def _select_entries(run: Run, inputs: _TaskInputs) -> tuple[TaskSelection, Mask | None]:
    """Select the entries that a task may change, and how strongly each is penalised."""

    @cache  # two more estimates: made once, and only if the method or the penalty asks
    def make_retention() -> RetentionImportance:
        return estimate_retention(run, inputs.encoded, inputs.select, inputs.seed)

    selection = select_for_task(
        run.model,
        inputs.encoded,
        inputs.select,
        inputs.work,
        seeds=(run.recipe.seed, inputs.seed),
        cache_key={
            "base": run.store.base.digest or run.store.base.fingerprint,
            "parent": inputs.parent,
            "data": inputs.facts["data"],
        },
        make_retention=make_retention,
    )
    strengths = make_penalty_strengths(run.recipe, selection.mask, make_retention)
    return selection, strengths


def _train_entries(
    run: Run,
    inputs: _TaskInputs,
    selection: TaskSelection,
    examples: EncodedDataset,
    penalty_strengths: Mask | None,
    select_seconds: float,
) -> Delta:
    """Train the selected entries and store what they became.

    Between the last step and the stored delta nothing is on disk that a stop could go on with, so
    a stop waits until the delta is there.
    """
    started = time.monotonic()
    task = inputs.task
    args = arguments(run.recipe.train, inputs.work, inputs.seed)
    logs = run.store.logs / inputs.work.name

    with run.stop.deferring_stop(), sparse_tuning(run.model, selection.mask) as tuning:
        metrics = fit(tuning, examples, args, logs, penalty_strengths, run.stop)
        delta = tuning.delta(
            task.name,
            base=run.store.base.fingerprint,
            parent=inputs.parent,
            **_describe_training(run, inputs.select, selection),
            **inputs.facts,
            rehearsal=len(examples) - len(inputs.encoded),
            batch=batch_size_of(run.recipe),
            groups=measure_changes(tuning, selection.sizes),
        )
        _append_delta(run.store, delta)

        seconds = {
            "select": select_seconds,
            "train": time.monotonic() - started,
            "loss": metrics["train_loss"],
        }
        _record_task(run, task, seconds, selection.stability)
    return delta


def build_training_examples(run: Run, inputs: _TaskInputs) -> EncodedDataset:
    """Return a task's examples and, as the recipe asks, self-generated rehearsal beside them."""
    encoded = inputs.encoded
    num_answers = round(run.recipe.rehearsal * len(encoded))
    if num_answers == 0:
        return encoded

    rehearsal = retention.generate_rehearsal(
        run.model,
        encoded,
        inputs.select,
        inputs.seed,
        num_answers,
    )
    print_line(f"{len(rehearsal)} rehearsal examples are trained beside {len(encoded)} of the task")
    return encoded.with_examples([*encoded.examples, *rehearsal.examples])


def fill_missing_retention(run: Run) -> None:
    """Estimate learned tasks' importance where it is missing: a run may have ended before it."""
    for position, task in enumerate(run.recipe.tasks[: len(run.store)], start=1):
        if not needs_retention(run.recipe, task):
            continue

        checkout(run.model, position)
        encoded = make_encoded_dataset(run, task, position)
        save_retention(run, encoded, task, position)
        if distributed.is_main():
            rmtree(run.store.work_folder(position), ignore_errors=True)


def make_encoded_dataset(run: Run, task: Task, position: int) -> EncodedDataset:
    """Return a task's training examples as model inputs, cached on disk while it is learned."""
    return EncodedDataset(
        run.data.train[task.name],
        run.processor,
        run.store.work_folder(position) / "encoded",
        task.max_length,
        parse_bytes(run.recipe.cache),
    )


def _append_delta(store: DeltaStore, delta: Delta) -> None:
    """Append a task's delta: the main process writes, then every process has seen it."""
    if distributed.is_main():
        store.append(delta)
    distributed.barrier()
    if not distributed.is_main():
        store.reload()


def _digest_examples(encoded: EncodedDataset, task: Task) -> dict[str, Any]:
    """Encode every example once; return their digest, and how many lost text to `max_length`."""
    truncations: list[bool] = []
    digest = digest_of(_iter_encoded(encoded, truncations, f"{task.name}: encode"))
    if task.max_length is None:
        return {"data": digest}

    num_truncated = sum(truncations)
    print_line(
        f"{task.name}: {num_truncated} of {len(encoded)} examples lost text to "
        f"max_length {task.max_length}"
    )
    return {"data": digest, "truncated": num_truncated}


def _iter_encoded(
    encoded: EncodedDataset,
    truncations: list[bool],
    title: str,
) -> Iterator[dict[str, Tensor]]:
    """Yield all examples, and append to `truncations` whether each lost text."""
    for position in progress_bar(range(len(encoded)), title, "example"):
        inputs, is_truncated = encoded.encode_truncated(position)
        truncations.append(is_truncated)
        yield inputs


def _format_changes(delta: Delta) -> list[str]:
    """Return in one line what a task changed in each group; in a second what rounding undid."""
    groups = delta.info["groups"]
    changes = (
        f"{group} {row['changed']:,} of {row['entries']:,} ({row['share']:.2%} of norm)"
        for group, row in groups.items()
    )
    lines = [f"changed {', '.join(changes)}"]
    if warning := format_rounding_warning(groups):
        lines.append(warning)
    return lines


def _parent_digest(store: DeltaStore) -> str:
    """Return the SHA-256 of the delta that the next one starts from; empty at the base."""
    return store.entries[-1].sha256 if len(store) else ""


def _describe_training(
    run: Run,
    select: SelectionSettings,
    selection: TaskSelection,
) -> dict[str, Any]:
    """Return what a delta's header says of how it was trained."""
    return {
        "method": select.method,
        "density": select.density,
        "patchable": sum(selection.sizes.values()),
        "k": selection.num_selected,
        "samples": selection.samples,
        "penalty": run.recipe.penalty,
        "seed": run.recipe.seed,
        **layout_of(selection.mask, run.store.base.facts.get(LAYOUT_KEY, {})),
    }


def _record_task(
    run: Run,
    task: Task,
    seconds: dict[str, float],
    stability: dict[str, float],
) -> None:
    """Write what a delta must not hold: equal runs differ in it, and still make equal files."""
    if not distributed.is_main():
        return

    def add_facts(results: Results) -> Results:
        results = add_task_facts(results, "seconds", task.name, seconds)
        return add_task_facts(results, "stability", task.name, stability)

    run.store.update_results(add_facts)
