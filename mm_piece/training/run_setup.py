"""A recipe's run: its store, its data, and the model at the store's last position.

`open_run` loads the base once. A new store is created last, after everything else was tried: the
files, the parts of the base, every row, one training step and the first losses.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import nn

from mm_piece import distributed
from mm_piece.data import (
    EncodedList,
    Example,
    ExampleDataset,
    encode_truncated,
    find_absent_columns,
    require_sound_rows,
)
from mm_piece.data.processor import Processor, pad_token_of, tokenizer_of
from mm_piece.data.special_tokens import require_no_visual_tokens
from mm_piece.distributed import ZeroConfig, shape_of
from mm_piece.distributed.progress import print_line
from mm_piece.errors import (
    DataError,
    ModelError,
)
from mm_piece.evaluation.matrix import open_task_source
from mm_piece.families import weights
from mm_piece.importance.backward import frozen_model, loss_of
from mm_piece.models.base import (
    load_base,
    pick_reading_options,
    tensors,
)
from mm_piece.recipe import Recipe, Task
from mm_piece.selection.task import find_selectable_names, require_selectable
from mm_piece.store.attachment import attach_base
from mm_piece.store.base_record import describe_base
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import load
from mm_piece.store.manifest import require_folders_inside
from mm_piece.training.arguments import arguments
from mm_piece.training.base_parts import BaseParts
from mm_piece.training.causality import require_causal
from mm_piece.training.dry_run import dry_run_step
from mm_piece.training.preflight import Plan, base_checkpoint_of
from mm_piece.training.run_progress import RunProgress, count_steps
from mm_piece.training.stopping import GracefulStop
from mm_piece.training.store_setup import batch_size_of


@dataclass(frozen=True)
class Splits:
    """The rows of a recipe's tasks, by name; `test` also has those of the general tasks."""

    train: dict[str, ExampleDataset]
    test: dict[str, ExampleDataset]


@dataclass(frozen=True)
class Run:
    """What stays the same over the whole sequence; the model moves from position to position."""

    recipe: Recipe
    store: DeltaStore
    model: nn.Module
    processor: Processor
    data: Splits
    zero: ZeroConfig
    stop: GracefulStop
    progress: RunProgress


def read_splits(recipe: Recipe) -> Splits:
    """Read the rows of all tasks; DataError for the first thing that is wrong with them."""
    splits = Splits({}, {})
    for task in (*recipe.tasks, *recipe.general):
        sources = []
        if isinstance(task, Task):
            splits.train[task.name] = open_task_source(task, task.train)
            sources.append(splits.train[task.name])
        splits.test[task.name] = open_task_source(task, task.test)
        sources.append(splits.test[task.name])

        absent_columns = find_absent_columns(sources)
        if absent_columns:
            raise DataError(f"task {task.name!r}: {absent_columns}")
        for rows in sources:
            require_sound_rows(rows)
    return splits


@contextmanager
def open_run(
    plan: Plan,
    data: Splits,
    store: DeltaStore | None,
    stop: GracefulStop,
) -> Iterator[Run]:
    """Open a recipe's run: it is the store's only writer while the block runs.

    `store` is what `find_store` found. Raises what is wrong with the data, the base or the
    settings, before a new store exists.
    """
    if store is None:
        store, model, processor = _create_store(plan, data)
        with _exclusive_writing(store):
            yield _make_run(plan, data, store, model, processor, stop)
        return

    with _exclusive_writing(store):
        model, processor = _load_model(plan, store)
        yield _make_run(plan, data, store, model, processor, stop)


def _make_run(
    plan: Plan,
    data: Splits,
    store: DeltaStore,
    model: nn.Module,
    processor: Processor,
    stop: GracefulStop,
) -> Run:
    """Return the run, with its model where Trainer would put it: scores come before Trainer."""
    recipe = plan.recipe
    is_placed = "device_map" in recipe.model or plan.zero.stage == 3
    if not is_placed:
        args = arguments(recipe.train, store.path, recipe.seed)
        model.to(args.device)
    progress = _plan_progress(recipe, data, num_learned=len(store))
    return Run(recipe, store, model, processor, data, plan.zero, stop, progress)


def _plan_progress(recipe: Recipe, data: Splits, num_learned: int) -> RunProgress:
    """Return the progress of a run, which has counted the steps of the tasks to learn."""
    steps_by_position = {}
    for position, task in enumerate(recipe.tasks, start=1):
        if position <= num_learned:
            continue
        num_examples = len(data.train[task.name])
        batch_size = batch_size_of(recipe, task)
        steps_by_position[position] = count_steps(recipe, task, num_examples, batch_size)
    return RunProgress(len(recipe.tasks), steps_by_position)


def _exclusive_writing(store: DeltaStore) -> AbstractContextManager[None]:
    """Return a context in which the main process is the store's only writer."""
    if distributed.is_main():
        return store.writing()
    return nullcontext()


def _load_model(plan: Plan, store: DeltaStore) -> tuple[nn.Module, Processor]:
    """Load the model at a store's last position, and its processor."""
    recipe = plan.recipe
    print_line(f"loading the model at position {len(store)}")
    options = {key: value for key, value in recipe.model.items() if key != "dtype"}
    with plan.zero.loading_context():
        return load(
            recipe.base,
            store,
            at=len(store),
            revision=recipe.revision,
            **options,
        )


def _create_store(plan: Plan, data: Splits) -> tuple[DeltaStore, nn.Module, Processor]:
    """Create a recipe's store once everything works; return it with its model and processor."""
    recipe = plan.recipe
    path = Path(recipe.store)

    print_line(f"loading the base {recipe.base}")
    checkpoint = base_checkpoint_of(recipe, plan.dtype)
    with plan.zero.loading_context():
        model, processor = load_base(recipe.base, recipe.revision, **recipe.model)
    checkpoint.require_same_weights(tensors(model))
    if distributed.is_main():
        checkpoint.require_finite()
    require_selectable(recipe, _shapes_of(model))

    print_line("trying one step of each task before anything is written")
    _dry_run_recipe(recipe, model, processor, data)
    with plan.zero.engine_context(model):
        _require_finite_losses(recipe, model, processor, data)

    described = describe_base(model, recipe.base, recipe.revision, path)
    base_record = described.with_facts(checkpoint.make_reading_record())
    if distributed.is_main():
        DeltaStore.create(path, base_record.facts, recipe.to_yaml(), over_empty=True)
    distributed.barrier()

    require_folders_inside(path)
    store = DeltaStore.open(path)
    model.eval()  # the dry run left it in training mode
    attach_base(model, store)
    return store, model, processor


def _shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's weights, also of partitioned ones."""
    shapes = {}
    for name, weight in weights(model).items():
        shapes[name] = tuple(shape_of(weight))
    return shapes


def _dry_run_recipe(
    recipe: Recipe,
    model: nn.Module,
    processor: Processor,
    data: Splits,
) -> None:
    """Raise unless data, settings and the parts of the base work together.

    Every row is looked at as text. Of each source, one row with an image and one without are
    encoded; of each train source they also go through a training step.
    """
    files = pick_reading_options(recipe.model)
    parts = BaseParts(recipe.base, recipe.revision, processor, **files)
    for task in (*recipe.tasks, *recipe.general):
        questions = data.test[task.name]
        parts.require_tokens(questions, generation=True)
        for example in _sample_examples(questions):
            inputs, _ = encode_truncated(example, processor, task.max_length, True)
            parts.require_fit(example, inputs)

    pad_token_id = pad_token_of(tokenizer_of(processor))
    shapes = _shapes_of(model)
    for task in recipe.tasks:
        examples = data.train[task.name]
        for example in examples:
            require_no_visual_tokens(example, processor)
        parts.require_tokens(examples)

        trained_names = find_selectable_names(recipe.select_of(task), shapes)
        for example in _sample_examples(examples):
            inputs, _ = encode_truncated(example, processor, task.max_length)
            parts.require_fit(example, inputs)
            require_causal(model, inputs)
            # as many as there are: the settings may leave no step for so few
            alike = EncodedList([inputs] * len(examples), pad_token_id)
            dry_run_step(
                model,
                alike,
                recipe.train_of(task),
                trained_names,
            )

    for note in parts.notes:
        print_line(note)


@torch.no_grad()
def _require_finite_losses(
    recipe: Recipe, model: nn.Module, processor: Processor, data: Splits
) -> None:
    """Raise ModelError if finite weights and inputs give a loss that is no number.

    Training would fail with a store left behind, and blame the learning rate.
    """
    for task in recipe.tasks:
        for example in _sample_examples(data.train[task.name]):
            inputs, _ = encode_truncated(example, processor, task.max_length)
            with frozen_model(model):
                loss = float(loss_of(model, inputs))
            if isfinite(loss):
                continue

            raise ModelError(
                f"{recipe.base}: its loss on {example.source} row {example.row} is {loss}, "
                "though its weights and inputs are finite; another `model: {dtype: …}` "
                "may hold what they give"
            )


def _sample_examples(examples: ExampleDataset) -> list[Example]:
    """Return one of the first examples with an image and one without, as there are."""
    sampled: dict[bool, Example] = {}
    for example in examples[:100]:
        has_images = bool(example.images)
        sampled[has_images] = example
    return list(sampled.values())
