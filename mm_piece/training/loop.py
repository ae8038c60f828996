"""`train`: the loop over a recipe's tasks, resumable at any instant.

Each task goes through the same steps: estimate and select, train and store, estimate what its
examples need (for methods and penalties that ask for it), measure. What a step leaves on disk is
whole or not there, so a run that was stopped goes on with the step it was in. All processes
compute; the main one alone writes to the store.
"""

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import rmtree
from typing import Any

from mm_piece import distributed
from mm_piece.data import EncodedDataset, ExamplesDigest
from mm_piece.deltas.delta import Delta
from mm_piece.deltas.file_layout import LAYOUT_KEY, layout_of
from mm_piece.distributed.progress import print_line, progress_bar
from mm_piece.evaluation.matrix import count_measured_rows, measure_position
from mm_piece.importance.factored import RetentionImportance
from mm_piece.recipe import (
    Recipe,
    SelectionSettings,
    Task,
    as_recipe,
    parse_bytes,
)
from mm_piece.selection.task import TaskSelection, select_for_task
from mm_piece.sparse.change_measurement import measure_changes
from mm_piece.sparse.change_report import format_rounding_warning
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.store.attachment import checkout
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.results import Results, add_task_facts
from mm_piece.training import retention
from mm_piece.training.arguments import arguments
from mm_piece.training.preflight import preflight
from mm_piece.training.retention_run import (
    PenaltyStrengths,
    estimate_retention,
    has_retention,
    make_penalty_strengths,
    needs_retention,
    save_retention,
)
from mm_piece.training.run_setup import Run, open_run, read_splits
from mm_piece.training.step_losses import average_losses, mean_of_finite
from mm_piece.training.stopping import GracefulStop
from mm_piece.training.store_setup import batch_size_of, find_store, is_finished
from mm_piece.training.trainer import fit
from mm_piece.training.values import require_values
from mm_piece.training.write_errors import translate_write_errors


def train(recipe: str | Path | Recipe, *overrides: str) -> DeltaStore:
    """Train a recipe's tasks in order and return the store.

    `overrides` (KEY=VALUE) change a recipe's file. A second run of the same recipe goes on where
    the first one stopped. Everything that can be wrong with the recipe, its data or its base is
    found before anything is written. Raises RecipeError, DataError, ModelError, SelectionError and
    StoreError.
    """
    recipe = as_recipe(recipe, overrides)

    # first: with a wrong timeout the other processes would wait for this one
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
        number = len(recipe.tasks)
        tasks = "the task is" if number == 1 else f"all {number} tasks are"
        print_line(f"{tasks} learned already")
        return store

    with open_run(plan, data, store, stop) as run:
        _catch_up(run)
        num_learned = len(run.store)
        if num_learned:
            print_line(f"{num_learned} of {len(recipe.tasks)} tasks are learned already")
        for position, task in enumerate(recipe.tasks[num_learned:], start=num_learned + 1):
            run.progress.begin_task(position, task)
            _learn_task(run, task, position)
            _measure(run, position)
        return run.store


def _catch_up(run: Run) -> None:
    """Measure every learned position that has no row yet, and estimate missing importance.

    A run may have been stopped after it stored a task and before it measured it. The model stands
    at the last position afterwards.
    """
    for position in range(count_measured_rows(run.store, run.recipe), len(run.store) + 1):
        checkout(run.model, position)
        _measure(run, position)

    if len(run.store) < len(run.recipe.tasks):
        _fill_missing_retention(run)
    checkout(run.model, len(run.store))


def _measure(run: Run, position: int) -> None:
    """Write a row of the accuracy matrix; the model stands at `position`."""
    started = time.monotonic()
    # a partitioned model can be called in an engine alone; training brings its own
    with run.zero.engine_context(run.model):
        measure_position(
            run.store,
            run.recipe,
            run.model,
            run.processor,
            position=position,
            test=run.data.test,
        )
    run.progress.note_measuring(time.monotonic() - started)


@dataclass(frozen=True)
class _TaskInputs:
    """What every step of learning one task needs."""

    task: Task
    select: SelectionSettings
    encoded: EncodedDataset
    facts: dict[str, Any]  # for the delta: the examples' digest, and how many lost text
    parent: str  # SHA-256 of the delta before; empty at the base
    seed: int  # of all draws but the sample of examples, which the run's seed draws
    work: Path  # a folder for this task, removed at its end


def _learn_task(run: Run, task: Task, position: int) -> None:
    """Learn the task that leads to a position, and store its delta.

    The model's weights are then those of the position. Its attachment to the store is not moved
    along, so that it cannot be checked out to another position in this run.
    """
    started = time.monotonic()
    encoded = _make_encoded_dataset(run, task, position)
    inputs = _TaskInputs(
        task,
        run.recipe.select_of(task),
        encoded,
        facts=_digest_examples(encoded, task),
        parent=_parent_digest(run.store),
        seed=run.recipe.seed + position - 1,
        work=run.store.work_folder(position),
    )

    with run.zero.engine_context(run.model):
        selection, penalty_strengths = _select_entries(run, inputs)
        examples = _build_training_examples(run, inputs)
    print_line(f"{run.progress.title}: {selection}")

    select_seconds = time.monotonic() - started
    delta = _train_entries(run, inputs, selection, examples, penalty_strengths, select_seconds)
    if needs_retention(run.recipe):
        # after the last task too: another one may be added later
        save_retention(run, encoded, task, position)

    if distributed.is_main():
        # a run that is killed before this leaves the folder to `gc`
        rmtree(inputs.work, ignore_errors=True)
    for line in _format_changes(delta):
        print_line(f"{task.name}: {line}")


def _select_entries(
    run: Run,
    inputs: _TaskInputs,
) -> tuple[TaskSelection, PenaltyStrengths | None]:
    """Select the entries that a task may change, and how strongly each is penalised."""

    @cache  # generated answers and an estimate over them: once, and only if something asks
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
    penalty_strengths: PenaltyStrengths | None,
    select_seconds: float,
) -> Delta:
    """Train the selected entries and store what they became.

    Between the last step and the stored delta nothing is on disk that a stop could go on with, so
    a stop waits until the delta is there.
    """
    started = time.monotonic()
    task = inputs.task
    args = arguments(run.recipe.train_of(task), inputs.work, inputs.seed)
    logs = run.store.log_folder(len(run.store) + 1)

    with run.stop.deferring_stop(), sparse_tuning(run.model, selection.mask) as tuning:
        losses = fit(tuning, examples, args, logs, penalty_strengths, run.stop, run.progress)
        delta = tuning.delta(
            task.name,
            base=run.store.base.fingerprint,
            parent=inputs.parent,
            **_describe_training(run, inputs.select, selection),
            **inputs.facts,
            rehearsal=len(examples) - len(inputs.encoded),
            batch=batch_size_of(run.recipe, task),
            groups=measure_changes(tuning, selection.sizes),
        )
        cost = {
            "select": select_seconds,  # encoding and rehearsal included; of the last run alone
            "train": time.monotonic() - started,
        }
        mean_loss = mean_of_finite(losses)
        if mean_loss is not None:
            cost["loss"] = mean_loss
        _record_task(run, task, cost, average_losses(losses), selection.stability)

        # last: a run that is killed before this trains, and records, once more
        _append_delta(run.store, delta)
    return delta


def _build_training_examples(run: Run, inputs: _TaskInputs) -> EncodedDataset:
    """Return a task's examples and, as the recipe asks, self-generated rehearsal beside them."""
    encoded = inputs.encoded
    num_answers = round(run.recipe.rehearsal * len(encoded))
    if num_answers == 0:
        return encoded

    # drawn anew: retention importance has another number of answers of its own
    rehearsal = retention.generate_rehearsal(
        run.model,
        encoded,
        inputs.select,
        inputs.seed,
        num_answers,
    )
    print_line(f"{len(rehearsal)} rehearsal examples are trained beside {len(encoded)} of the task")
    return encoded.with_examples([*encoded.examples, *rehearsal.examples])


def _fill_missing_retention(run: Run) -> None:
    """Estimate learned tasks' importance where it is missing: a run may have ended before it."""
    if not needs_retention(run.recipe):
        return

    for position, task in enumerate(run.recipe.tasks[: len(run.store)], start=1):
        if has_retention(run, position):
            continue

        checkout(run.model, position)
        encoded = _make_encoded_dataset(run, task, position)
        save_retention(run, encoded, task, position)
        if distributed.is_main():
            rmtree(run.store.work_folder(position), ignore_errors=True)


def _make_encoded_dataset(run: Run, task: Task, position: int) -> EncodedDataset:
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
    """Encode every example once; return their digest, and how many lost text to `max_length`.

    Every process encodes all: each trains on some of them and must know the digest.
    """
    digest = ExamplesDigest()
    num_truncated = 0
    for number in progress_bar(range(len(encoded)), f"{task.name}: encode", "example"):
        example, is_truncated = encoded.encode_truncated(number)
        digest.add_example(example)
        num_truncated += is_truncated

    facts: dict[str, Any] = {"data": digest.hexdigest()}
    if task.max_length is not None:
        print_line(
            f"{task.name}: {num_truncated} of {len(encoded)} examples lost text to "
            f"max_length {task.max_length}"
        )
        facts["truncated"] = num_truncated
    return facts


def _format_changes(delta: Delta) -> list[str]:
    """Return in one line what a task changed in each group; in a second what rounding undid."""
    groups = delta.info["groups"]
    changes = [
        f"{row['changed']:,} entries of {group} ({row['share']:.2%} of its norm)"
        for group, row in groups.items()
        if row["changed"]
    ]
    lines = [f"changed {', '.join(changes) or 'nothing'}"]
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
    cost: dict[str, float],
    losses: dict[str, float],
    stability: dict[str, float],
) -> None:
    """Write what a task took, its losses, and how stable its mask is, to the results.

    Equal runs differ in seconds: in the delta, they would make unequal files.
    """
    if not distributed.is_main():
        return

    def add_facts(results: Results) -> Results:
        results = add_task_facts(results, "seconds", task.name, cost)
        results = add_task_facts(results, "losses", task.name, losses)
        return add_task_facts(results, "stability", task.name, stability)

    run.store.update_results(add_facts)
