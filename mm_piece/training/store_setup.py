"""A recipe's store: a new one if everything works, or the one that a run goes on with."""

from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_piece import distributed
from mm_piece.data import Example, ExampleDataset, encode_truncated, tokenizer_of
from mm_piece.data.special_tokens import require_no_visual_tokens
from mm_piece.distributed import ZeroConfig, shape_of
from mm_piece.distributed.progress import print_line
from mm_piece.dtypes import as_dtype, dtype_name
from mm_piece.errors import BaseError, ModelError, PieceError, StoreError
from mm_piece.evaluation.answers import pad_token_of
from mm_piece.families import weights
from mm_piece.importance.backward import frozen_model, loss_of
from mm_piece.models.base import load_base, pick_reading_options, tensors
from mm_piece.models.checkpoint import Checkpoint, fetch_checkpoint
from mm_piece.recipe import Recipe, parse_recipe
from mm_piece.selection.task import find_selectable_names, require_selectable
from mm_piece.store.base_record import describe_base, locate_base, trained_dtype
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.manifest import require_folders_inside
from mm_piece.training.base_parts import BaseParts
from mm_piece.training.dry_run import dry_run_step

# What may lie there before there is a manifest.
_START_LEFTOVERS = (".lock", "recipe.yaml", "answers", "work", "logs")

_RESOURCE_SETTINGS = {"memory", "accumulators", "cache"}  # of a selection: they change no result

_BATCH_SETTINGS = {  # of a step's examples: as long as there are as many
    *("per_device_train_batch_size", "gradient_accumulation_steps", *distributed.PROCESS_SETTINGS),
}


def open_or_create_store(
    recipe: Recipe,
    train_rows: dict[str, ExampleDataset],
    test_rows: dict[str, ExampleDataset],
    zero: ZeroConfig,
) -> DeltaStore:
    """The store of a recipe, opened or made.

    Raises StoreError if it is another run's, and whatever a rehearsal of the training finds.
    """
    path = Path(recipe.store)
    if distributed.broadcast((path / "store.json").exists()):
        store = DeltaStore.open(path)
        if len(store) or store.recipe == recipe.to_yaml():
            _require_files(store)
            _require_same_recipe(store, recipe)
            return store
    elif distributed.is_main():
        _require_unused_folder(path)
    checkpoint = base_checkpoint_of(recipe, as_dtype(recipe.model.get("dtype", "float32")))
    with zero.loading_context():
        model, processor = load_base(recipe.base, recipe.revision, **recipe.model)
    checkpoint.require_same_weights(tensors(model))
    if distributed.is_main():
        checkpoint.require_finite()
    require_selectable(recipe, {name: tuple(shape_of(p)) for name, p in weights(model).items()})
    _dry_run_recipe(recipe, model, processor, train_rows, test_rows)
    with zero.engine_context(model):
        _require_finite_losses(recipe, model, processor, train_rows)
    base = (
        describe_base(model, recipe.base, recipe.revision, path) | checkpoint.make_reading_record()
    )
    if distributed.is_main():
        DeltaStore.create(path, base, recipe.to_yaml(), over_empty=True)
    distributed.barrier()
    require_folders_inside(path)
    return DeltaStore.open(path)


def base_checkpoint_of(recipe: Recipe, dtype: torch.dtype) -> Checkpoint:
    """The files of a recipe's base, fetched if need be."""
    files = pick_reading_options(recipe.model)
    return Checkpoint(fetch_checkpoint(recipe.base, recipe.revision, **files), dtype, **files)


def _dry_run_recipe(
    recipe: Recipe,
    model: nn.Module,
    processor: Any,
    train_rows: dict[str, ExampleDataset],
    test_rows: dict[str, ExampleDataset],
) -> None:
    """Raise unless data, settings and the parts of the base work together."""
    parts = BaseParts(recipe.base, recipe.revision, processor, **pick_reading_options(recipe.model))
    pad = pad_token_of(tokenizer_of(processor))
    for measured_task in (*recipe.tasks, *recipe.general):
        questions = test_rows[measured_task.name]
        parts.require_tokens(questions, generation=True)
        for first in _sample_examples(questions):
            parts.require_fit(
                first, encode_truncated(first, processor, measured_task.max_length, True)[0]
            )
    shapes = {name: tuple(shape_of(p)) for name, p in weights(model).items()}
    for task in recipe.tasks:
        examples, trained_names = (
            train_rows[task.name],
            find_selectable_names(recipe.select_of(task), shapes),
        )
        for example in examples:
            require_no_visual_tokens(example, processor)
        parts.require_tokens(examples)
        for first in _sample_examples(examples):
            inputs, _ = encode_truncated(first, processor, task.max_length)
            parts.require_fit(first, inputs)
            dry_run_step(model, [inputs] * len(examples), recipe.train, pad, trained_names)
    for note in parts.notes:
        print_line(note)


@torch.no_grad()
def _require_finite_losses(
    recipe: Recipe, model: nn.Module, processor: Any, train_rows: dict[str, ExampleDataset]
) -> None:
    """Raise ModelError if finite weights and inputs give a loss that is no number.

    Training would fail with a store left behind, and blame the learning rate.
    """
    with frozen_model(model):
        for task in recipe.tasks:
            for example in _sample_examples(train_rows[task.name]):
                inputs, _ = encode_truncated(example, processor, task.max_length)
                loss = float(loss_of(model, inputs))
                if not isfinite(loss):
                    raise ModelError(
                        f"{recipe.base}: its loss on {example.source} row {example.row} is {loss}, "
                        "though its weights and inputs are finite; another `model: {dtype: …}` "
                        "may hold what they give"
                    )


def _sample_examples(examples: ExampleDataset) -> list[Example]:
    """One of the first examples with an image and one without, as there are."""
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
    """Raise what `verify` finds of the deltas' files: one that is missing, or not what is listed.

    A finished run reads none of them otherwise.
    """
    for position in range(1, len(store) + 1):
        try:
            store.data(position)
        except PieceError as error:
            raise type(error)(f"position {position}: {error}") from error


def _require_same_recipe(store: DeltaStore, recipe: Recipe) -> None:
    """A store belongs to one recipe, to which further tasks may be added at the end."""
    require_folders_inside(store.path)
    if {**store.base, **locate_base(recipe.base, recipe.revision, store.path)} != store.base:
        _require_same_base(store, recipe)
    recipes = (parse_recipe(store.recipe, f"{store.path}/recipe.yaml"), recipe)
    ignored_keys = {"select": _RESOURCE_SETTINGS, "train": _BATCH_SETTINGS}
    before, after = (r.model_dump(exclude=ignored_keys) for r in recipes)
    after["tasks"] = after["tasks"][: len(before["tasks"])]
    for key in before:
        if key not in ("store", "base", "revision", "cache") and after[key] != before[key]:
            raise StoreError(
                f"store {store.path} was made by a recipe with another {key!r}; "
                "only tasks at the end may be added: use a new store"
            )
    now = batch_size_of(recipe)
    if len(store) and (batch := store.delta(len(store)).info.get("batch", now)) != now:
        raise StoreError(
            f"store {store.path} learns {batch} examples a step, here it would be {now}: processes "
            "times per_device_train_batch_size times gradient_accumulation_steps"
        )
    if distributed.is_main():
        store.write_recipe(recipe.to_yaml())


def _require_same_base(store: DeltaStore, recipe: Recipe) -> None:
    """Raise unless the base has the store's weights, wherever the two lie by now."""
    base = base_checkpoint_of(recipe, trained_dtype(store.base, store.path))
    if base.compute_fingerprint() != store.base["fingerprint"]:
        raise BaseError(f"store {store.path} was made on another base than {recipe.base}")


def batch_size_of(recipe: Recipe) -> int:
    """How many examples a step learns, on all processes together."""
    per_process = recipe.train.get("per_device_train_batch_size", 8)
    return (
        per_process * recipe.train.get("gradient_accumulation_steps", 1) * distributed.world_size()
    )


def recipe_zero_config(recipe: Recipe) -> ZeroConfig:
    """How the recipe divides its model between processes."""
    dtype = as_dtype(recipe.model.get("dtype", "float32"))
    return distributed.zero_config(recipe.train, dtype_name(dtype))
