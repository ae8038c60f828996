"""A recipe's store: a new one if everything works, or the one that a run goes on with."""

from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_piece import distributed
from mm_piece.data import Example, Rows, fitted, tokenizer_of
from mm_piece.data.special_tokens import require_no_visual_tokens
from mm_piece.distributed import Zero, shape_of
from mm_piece.distributed.progress import say
from mm_piece.dtypes import as_dtype, dtype_name
from mm_piece.errors import BaseError, ModelError, PieceError, StoreError
from mm_piece.evaluation.answers import pad_of
from mm_piece.families import weights
from mm_piece.importance.backward import frozen, loss_of
from mm_piece.models.base import load_base, reading, tensors
from mm_piece.models.checkpoint import Checkpoint, fetch
from mm_piece.recipe import Recipe, parse_recipe
from mm_piece.selection.task import places_of, require_places
from mm_piece.store.base_record import describe, locate, trained_dtype
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.manifest import require_folders_inside
from mm_piece.training.base_parts import Parts
from mm_piece.training.dry_run import rehearse

# What may lie there before there is a manifest.
_LEFT = (".lock", "recipe.yaml", "answers", "work", "logs")

_RESOURCES = {"memory", "accumulators", "cache"}  # of a selection: they change no result

_DIVISION = {  # of a step's examples: as long as there are as many
    *("per_device_train_batch_size", "gradient_accumulation_steps", *distributed.SETTINGS),
}


def store_of(
    recipe: Recipe, train_rows: dict[str, Rows], test_rows: dict[str, Rows], zero: Zero
) -> DeltaStore:
    """The store of a recipe, opened or made.

    Raises StoreError if it is another run's, and whatever a rehearsal of the training finds.
    """
    path = Path(recipe.store)
    if distributed.told((path / "store.json").exists()):
        store = DeltaStore.open(path)
        if len(store) or store.recipe == recipe.text():
            _require_files(store)
            _same_run(store, recipe)
            return store
    elif distributed.is_main():
        _require_room(path)
    checkpoint = checkpoint_of(recipe, as_dtype(recipe.model.get("dtype", "float32")))
    with zero.entering():
        model, processor = load_base(recipe.base, recipe.revision, **recipe.model)
    checkpoint.require_loaded(tensors(model))
    if distributed.is_main():
        checkpoint.require_finite()
    require_places(recipe, {name: tuple(shape_of(p)) for name, p in weights(model).items()})
    _rehearse(recipe, model, processor, train_rows, test_rows)
    with zero.running(model):
        _require_finite_losses(recipe, model, processor, train_rows)
    base = describe(model, recipe.base, recipe.revision, path) | checkpoint.record()
    if distributed.is_main():
        DeltaStore.create(path, base, recipe.text(), over_empty=True)
    distributed.wait()
    require_folders_inside(path)
    return DeltaStore.open(path)


def checkpoint_of(recipe: Recipe, dtype: torch.dtype) -> Checkpoint:
    """The files of a recipe's base, fetched if need be."""
    files = reading(recipe.model)
    return Checkpoint(fetch(recipe.base, recipe.revision, **files), dtype, **files)


def _rehearse(
    recipe: Recipe,
    model: nn.Module,
    processor: Any,
    train_rows: dict[str, Rows],
    test_rows: dict[str, Rows],
) -> None:
    """Raise unless data, settings and the parts of the base work together."""
    parts = Parts(recipe.base, recipe.revision, processor, **reading(recipe.model))
    pad = pad_of(tokenizer_of(processor))
    for asked in (*recipe.tasks, *recipe.general):
        questions = test_rows[asked.name]
        parts.require_tokens(questions, generation=True)
        for first in _samples(questions):
            parts.require_fit(first, fitted(first, processor, asked.max_length, True)[0])
    shapes = {name: tuple(shape_of(p)) for name, p in weights(model).items()}
    for task in recipe.tasks:
        examples, trained = train_rows[task.name], places_of(recipe.selecting(task), shapes)
        for example in examples:
            require_no_visual_tokens(example, processor)
        parts.require_tokens(examples)
        for first in _samples(examples):
            inputs, _ = fitted(first, processor, task.max_length)
            parts.require_fit(first, inputs)
            rehearse(model, [inputs] * len(examples), recipe.train, pad, trained)
    for note in parts.notes:
        say(note)


@torch.no_grad()
def _require_finite_losses(
    recipe: Recipe, model: nn.Module, processor: Any, train_rows: dict[str, Rows]
) -> None:
    """Raise ModelError if finite weights and inputs give a loss that is no number.

    Training would fail with a store left behind, and blame the learning rate.
    """
    with frozen(model):
        for task in recipe.tasks:
            for example in _samples(train_rows[task.name]):
                inputs, _ = fitted(example, processor, task.max_length)
                loss = float(loss_of(model, inputs))
                if not isfinite(loss):
                    raise ModelError(
                        f"{recipe.base}: its loss on {example.source} row {example.row} is {loss}, "
                        "though its weights and inputs are finite; another `model: {dtype: …}` "
                        "may hold what they give"
                    )


def _samples(examples: Rows) -> list[Example]:
    """One of the first examples with an image and one without, as there are."""
    return list({bool(example.images): example for example in examples[:100]}.values())


def _require_room(path: Path) -> None:
    """Raise StoreError for a folder that holds something else than what a crashed start left."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"store {path} is a file; name a folder")

    def left_over(name: str) -> bool:
        return name in _LEFT or name.startswith(".") and name.endswith(".tmp")

    strange = [f.name for f in path.iterdir() if not left_over(f.name)] if path.is_dir() else []
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


def _same_run(store: DeltaStore, recipe: Recipe) -> None:
    """A store belongs to one recipe, to which further tasks may be added at the end."""
    require_folders_inside(store.path)
    if {**store.base, **locate(recipe.base, recipe.revision, store.path)} != store.base:
        _same_base(store, recipe)
    recipes = (parse_recipe(store.recipe, f"{store.path}/recipe.yaml"), recipe)
    left_out = {"select": _RESOURCES, "train": _DIVISION}
    before, after = (r.model_dump(exclude=left_out) for r in recipes)
    after["tasks"] = after["tasks"][: len(before["tasks"])]
    for key in before:
        if key not in ("store", "base", "revision", "cache") and after[key] != before[key]:
            raise StoreError(
                f"store {store.path} was made by a recipe with another {key!r}; "
                "only tasks at the end may be added: use a new store"
            )
    now = batch_of(recipe)
    if len(store) and (batch := store.delta(len(store)).info.get("batch", now)) != now:
        raise StoreError(
            f"store {store.path} learns {batch} examples a step, here it would be {now}: processes "
            "times per_device_train_batch_size times gradient_accumulation_steps"
        )
    if distributed.is_main():
        store.write_recipe(recipe.text())


def _same_base(store: DeltaStore, recipe: Recipe) -> None:
    """Raise unless the base has the store's weights, wherever the two lie by now."""
    base = checkpoint_of(recipe, trained_dtype(store.base, store.path))
    if base.fingerprint() != store.base["fingerprint"]:
        raise BaseError(f"store {store.path} was made on another base than {recipe.base}")


def batch_of(recipe: Recipe) -> int:
    """How many examples a step learns, on all processes together."""
    each = recipe.train.get("per_device_train_batch_size", 8)
    return each * recipe.train.get("gradient_accumulation_steps", 1) * distributed.size()


def zero_of(recipe: Recipe) -> Zero:
    """How the recipe divides its model between processes."""
    dtype = as_dtype(recipe.model.get("dtype", "float32"))
    return distributed.zero_of(recipe.train, dtype_name(dtype))
