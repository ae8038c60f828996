"""A recipe's run: its store, new or found, its data, and the model at the store's last position.

`open_run` loads the base once. A new store is created last, after everything else was tried: the
files, the parts of the base, every row, one training step and the first losses.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_piece import distributed
from mm_piece.data import EncodedList, Example, ExampleDataset, encode_truncated
from mm_piece.data.processor import Processor, pad_token_of, tokenizer_of
from mm_piece.data.special_tokens import require_no_visual_tokens
from mm_piece.distributed import ZeroConfig, shape_of
from mm_piece.distributed.progress import print_line
from mm_piece.errors import (
    BaseError,
    DataError,
    ModelError,
    PieceError,
    StoreError,
)
from mm_piece.evaluation.matrix import (
    count_measured_rows,
    find_absent_columns,
    read_task_source,
)
from mm_piece.families import weights
from mm_piece.importance.backward import frozen_model, loss_of
from mm_piece.models.base import (
    load_base,
    pick_reading_options,
    tensors,
)
from mm_piece.recipe import Recipe, parse_recipe
from mm_piece.selection.task import find_selectable_names, require_selectable
from mm_piece.store.attachment import attach_base
from mm_piece.store.base_record import describe_base, locate_base, trained_dtype
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import load
from mm_piece.store.manifest import require_folders_inside
from mm_piece.training.arguments import arguments
from mm_piece.training.base_parts import BaseParts
from mm_piece.training.dry_run import dry_run_step
from mm_piece.training.preflight import Plan, base_checkpoint_of
from mm_piece.training.stopping import GracefulStop

# What may lie in the folder before there is a manifest.
_START_LEFTOVERS = (".lock", "recipe.yaml", "answers", "work", "logs")

# Settings of a selection that change no result.
_RESOURCE_SETTINGS = {"memory", "accumulators", "cache"}

# Settings that divide a step's examples: they may change as long as a step has as many.
_BATCH_SETTINGS = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    *distributed.PROCESS_SETTINGS,
}

# Keys of a recipe that may differ from those of the run that made the store.
_FREE_KEYS = ("store", "base", "revision", "cache")


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


def read_splits(recipe: Recipe) -> Splits:
    """Read the rows of all tasks; DataError for a column that no row of a task has."""
    measured = (*recipe.tasks, *recipe.general)
    train = {task.name: read_task_source(task, task.train) for task in recipe.tasks}
    test = {task.name: read_task_source(task, task.test) for task in measured}

    for task in measured:
        sources = [rows[task.name] for rows in (train, test) if task.name in rows]
        for problem in find_absent_columns(task, sources):
            raise DataError(problem)
    return Splits(train, test)


def find_store(plan: Plan) -> DeltaStore | None:
    """Open the store that a recipe goes on with; None where a new one is to be created.

    A store without deltas takes any recipe, and then counts as new. Raises StoreError if the store
    is another run's, or if its folder holds something else, and what `verify` finds of its files.
    """
    path = Path(plan.recipe.store)
    if not distributed.broadcast((path / "store.json").exists()):
        if distributed.is_main():
            _require_unused_folder(path)
        return None

    store = DeltaStore.open(path)
    if not len(store) and store.recipe != plan.recipe.to_yaml():
        return None
    _require_files(store)
    _require_same_recipe(store, plan.recipe)
    return store


def is_finished(store: DeltaStore, recipe: Recipe) -> bool:
    """Whether a store has learned and measured every task of a recipe."""
    num_measured = count_measured_rows(store, recipe) - 1  # the first row is the base's
    return min(len(store), num_measured) >= len(recipe.tasks)


@contextmanager
def open_run(
    plan: Plan, data: Splits, store: DeltaStore | None, stop: GracefulStop
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
    if "device_map" not in recipe.model and plan.zero.stage < 3:
        model.to(arguments(recipe.train, store.work, recipe.seed).device)
    return Run(recipe, store, model, processor, data, plan.zero, stop)


def _exclusive_writing(store: DeltaStore) -> AbstractContextManager[None]:
    """Return a context in which the main process is the store's only writer."""
    return store.writing() if distributed.is_main() else nullcontext()


def _load_model(plan: Plan, store: DeltaStore) -> tuple[nn.Module, Any]:
    """Load the model at a store's last position, and its processor."""
    recipe = plan.recipe
    options = {key: value for key, value in recipe.model.items() if key != "dtype"}
    with plan.zero.loading_context():
        return load(
            recipe.base,
            store,
            at=len(store),
            revision=recipe.revision,
            **options,
        )


def _create_store(plan: Plan, data: Splits) -> tuple[DeltaStore, nn.Module, Any]:
    """Create a recipe's store once everything works; return it with its model and processor."""
    recipe = plan.recipe
    path = Path(recipe.store)

    checkpoint = base_checkpoint_of(recipe, plan.dtype)
    with plan.zero.loading_context():
        model, processor = load_base(recipe.base, recipe.revision, **recipe.model)
    checkpoint.require_same_weights(tensors(model))
    if distributed.is_main():
        checkpoint.require_finite()
    require_selectable(recipe, _shapes_of(model))

    _dry_run_recipe(recipe, model, processor, data)
    with plan.zero.engine_context(model):
        _require_finite_losses(recipe, model, processor, data)

    described = describe_base(model, recipe.base, recipe.revision, path)
    base_record = described | checkpoint.make_reading_record()
    if distributed.is_main():
        DeltaStore.create(path, base_record, recipe.to_yaml(), over_empty=True)
    distributed.barrier()

    require_folders_inside(path)
    store = DeltaStore.open(path)
    model.eval()  # the dry run left it in training mode
    attach_base(model, store)
    return store, model, processor


def _shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's weights, also of partitioned ones."""
    return {name: tuple(shape_of(weight)) for name, weight in weights(model).items()}


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
    parts = BaseParts(recipe.base, recipe.revision, processor, **pick_reading_options(recipe.model))
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
            dry_run_step(
                model,
                EncodedList([inputs] * len(examples), pad_token_id),
                recipe.train,
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
    with frozen_model(model):
        for task in recipe.tasks:
            for example in _sample_examples(data.train[task.name]):
                inputs, _ = encode_truncated(example, processor, task.max_length)
                loss = float(loss_of(model, inputs))
                if not isfinite(loss):
                    raise ModelError(
                        f"{recipe.base}: its loss on {example.source} row {example.row} is {loss}, "
                        "though its weights and inputs are finite; another `model: {dtype: …}` "
                        "may hold what they give"
                    )


def _sample_examples(examples: ExampleDataset) -> list[Example]:
    """Return one of the first examples with an image and one without, as there are."""
    return list({bool(example.images): example for example in examples[:100]}.values())


def _require_unused_folder(path: Path) -> None:
    """Raise StoreError for a folder that holds something else than what a crashed start left."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"store {path} is a file; name a folder")

    def is_leftover(name: str) -> bool:
        return name in _START_LEFTOVERS or name.startswith(".") and name.endswith(".tmp")

    strange = [f.name for f in path.iterdir() if not is_leftover(f.name)] if path.is_dir() else []
    if strange:
        raise StoreError(f"store {path} holds {sorted(strange)[0]!r} and is no store; name another")


def _require_files(store: DeltaStore) -> None:
    """Raise what `verify` finds of the deltas' files: one is missing, or not what is listed.

    A finished run reads none of them otherwise.
    """
    for position in range(1, len(store) + 1):
        try:
            store.data(position)
        except PieceError as error:
            raise type(error)(f"position {position}: {error}") from error


def _require_same_recipe(store: DeltaStore, recipe: Recipe) -> None:
    """Raise StoreError unless a store is this recipe's, to which tasks may be added at the end."""
    require_folders_inside(store.path)
    base_location = locate_base(recipe.base, recipe.revision, store.path)
    if {**store.base, **base_location} != store.base:
        _require_same_base(store, recipe)

    ignored_keys = {"select": _RESOURCE_SETTINGS, "train": _BATCH_SETTINGS}
    recorded = parse_recipe(store.recipe, f"{store.path}/recipe.yaml")
    before = recorded.model_dump(exclude=ignored_keys)
    after = recipe.model_dump(exclude=ignored_keys)
    after["tasks"] = after["tasks"][: len(before["tasks"])]
    for key in before:
        if key not in _FREE_KEYS and after[key] != before[key]:
            raise StoreError(
                f"store {store.path} was made by a recipe with another {key!r}; "
                "only tasks at the end may be added: use a new store"
            )

    _require_same_batch_size(store, recipe)
    if distributed.is_main():
        store.write_recipe(recipe.to_yaml())


def _require_same_batch_size(store: DeltaStore, recipe: Recipe) -> None:
    """Raise StoreError if a step of the store's last task had another number of examples."""
    if not len(store):
        return

    now = batch_size_of(recipe)
    batch = store.delta(len(store)).info.get("batch", now)
    if batch != now:
        raise StoreError(
            f"store {store.path} learns {batch} examples a step, here it would be {now}: processes "
            "times per_device_train_batch_size times gradient_accumulation_steps"
        )


def _require_same_base(store: DeltaStore, recipe: Recipe) -> None:
    """Raise BaseError unless the base has the store's weights, wherever the two lie by now."""
    base = base_checkpoint_of(recipe, trained_dtype(store.base, store.path))
    if base.compute_fingerprint() != store.base["fingerprint"]:
        raise BaseError(f"store {store.path} was made on another base than {recipe.base}")


def batch_size_of(recipe: Recipe) -> int:
    """Return how many examples a step learns, on all processes together."""
    per_process = recipe.train.get("per_device_train_batch_size", 8)
    accumulated = recipe.train.get("gradient_accumulation_steps", 1)
    return per_process * accumulated * distributed.world_size()
