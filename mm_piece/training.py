"""`train`: the loop over a recipe's tasks, resumable at any instant."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from torch import Tensor, nn

from mm_piece import importance, sharding
from mm_piece.changes import changes
from mm_piece.checkpoint import Checkpoint, fetch
from mm_piece.delta import Delta
from mm_piece.errors import BaseError, DataError, StoreError
from mm_piece.evaluation import pad_of
from mm_piece.loading import checkout, load
from mm_piece.measuring import absent_columns, measure, measured, rows_of
from mm_piece.models import as_dtype, describe, load_base, locate, trained_dtype
from mm_piece.names import weights
from mm_piece.progress import bar, say
from mm_piece.recipe import Recipe, Select, Task, load_recipe, parse_bytes, parse_recipe
from mm_piece.scoring import METRICS
from mm_piece.selection import Selection, require_places, selection_of
from mm_piece.sharding import Zero, shape_of
from mm_piece.sparse import sparse_tuning
from mm_piece.store import DeltaStore
from mm_piece.tasks import Encoded, Rows, digest_of, fitted, tokenizer_of
from mm_piece.tasks.templates import require_no_visual_tokens
from mm_piece.trainer import arguments, fit, rehearse

# What may lie there before there is a manifest.
_LEFT = (".lock", "recipe.yaml", "answers", "work", "logs")

_RESOURCES = {"memory", "accumulators", "cache"}  # of a selection: they change no result


_DIVISION = {  # of a step's examples: as long as there are as many
    *("per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed", "ddp_timeout"),
}


@dataclass(frozen=True)
class Run:
    """What stays the same over the whole sequence."""

    recipe: Recipe
    store: DeltaStore
    train: dict[str, Rows]
    test: dict[str, Rows]  # of the tasks and of the general ones
    zero: Zero


def train(recipe: str | Path | Recipe, *overrides: str) -> DeltaStore:
    """Train a recipe's tasks in order and return the store; a second run goes on where one stopped.

    Everything that can be wrong with the recipe, its data or its base is found before anything is
    written. Raises RecipeError, DataError, ModelError, SelectionError, StoreError.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    sharding.start(float(recipe.train.get("ddp_timeout", sharding.PATIENCE)))
    with sharding.lost():
        return _train(recipe)


def _train(recipe: Recipe) -> DeltaStore:
    data, zero = _read_all(recipe), zero_of(recipe)
    zero.require_launcher()
    arguments(recipe.train, Path(recipe.store) / "work", recipe.seed)
    importance.resolve(recipe.select.method)
    for task in (*recipe.tasks, *recipe.general):
        METRICS[task.metric]([], [])  # its library is there
    store = _open_or_create(recipe, data[0], zero)
    with store.writing() if sharding.is_main() else nullcontext():
        run = Run(recipe, store, *data, zero)
        if min(len(store), measured(store, recipe) - 1) < len(recipe.tasks):
            _go_on(run)
    return store


def _go_on(run: Run) -> None:
    """Measure what was learned but not measured, then learn what is missing."""
    recipe, store, zero = run.recipe, run.store, run.zero
    with zero.entering():
        model, processor = load(recipe.base, store, at=len(store), **_load_options(recipe))
    if "device_map" not in recipe.model and zero.stage < 3:
        # Trainer would move it, but scores come before it.
        model.to(arguments(recipe.train, store.work, recipe.seed).device)

    def measure_here(position: int) -> None:
        with zero.running(model):
            measure(store, recipe, model, processor, position=position, test=run.test)

    for position in range(measured(store, recipe), len(store) + 1):
        checkout(model, position)
        measure_here(position)
    checkout(model, len(store))
    for task in recipe.tasks[len(store) :]:
        learn(run, model, processor, task)
        measure_here(len(store))


def learn(run: Run, model: nn.Module, processor: Any, task: Task) -> Delta:
    """One task: scores, mask, sparse training, delta; the model stands there afterwards."""
    started = time.monotonic()
    recipe, seed = run.recipe, run.recipe.seed + len(run.store)
    work = run.store.work / f"{len(run.store) + 1:04d}"
    examples, room = run.train[task.name], parse_bytes(recipe.cache)
    encoded = Encoded(examples, processor, work / "encoded", task.max_length, room)
    data = _look_through(encoded, task)
    pad, logs = pad_of(tokenizer_of(processor)), run.store.path / "logs" / work.name
    select, parent = recipe.selecting(task), _parent(run.store)
    standing = {"base": run.store.base["digest"], "parent": parent, "data": data["data"]}
    facts = {"pad": pad, "seeds": (recipe.seed, seed), "standing": standing}
    with run.zero.running(model):
        selection = selection_of(model, encoded, select, work, **facts)
    say(f"{task.name}: {selection}")
    scored = time.monotonic()
    args = arguments(recipe.train, work, seed)
    with sparse_tuning(model, selection.mask) as tuning:
        metrics = fit(tuning, encoded, pad, args, logs)
        delta = tuning.delta(
            task.name,
            base=run.store.base["fingerprint"],
            parent=parent,
            **_facts(select, selection, recipe.seed),
            **data,
            batch=batch_of(recipe),
            groups=changes(tuning, selection.sizes),
        )
    _append(run.store, delta)
    # Not in the delta: what differs between equal runs would give the same task different files.
    timing = {"select": scored - started, "train": time.monotonic() - scored}
    if sharding.is_main():
        _note(run, "seconds", task.name, {**timing, "loss": metrics["train_loss"]})
        _note(run, "stability", task.name, selection.stability)
        rmtree(work, ignore_errors=True)
    say(_summary(delta))
    return delta


def _append(store: DeltaStore, delta: Delta) -> None:
    """The main process writes; every process has seen it and needs no file of the task any more."""
    if sharding.is_main():
        store.append(delta)
    sharding.wait()
    if not sharding.is_main():
        store.reload()


def _look_through(encoded: Encoded, task: Task) -> dict[str, Any]:
    """Encode every example once: their digest, and how many lost text to the task's length."""
    cuts: list[bool] = []
    digest = digest_of(_noting(encoded, cuts, f"{task.name}: encode"))
    if task.max_length is None:
        return {"data": digest}
    cut, most = sum(cuts), task.max_length
    say(f"{task.name}: {cut} of {len(encoded)} examples lost text to max_length {most}")
    return {"data": digest, "truncated": cut}


def _noting(encoded: Encoded, cuts: list[bool], title: str) -> Iterator[dict[str, Tensor]]:
    for position in bar(range(len(encoded)), title, "example"):
        inputs, cut = encoded.fitted(position)
        cuts.append(cut)
        yield inputs


def _summary(delta: Delta) -> str:
    """What the task changed in each group, in one line."""
    moved = (
        f"{group} {row['changed']:,} of {row['entries']:,} ({row['share']:.2%} of norm)"
        for group, row in delta.info["groups"].items()
    )
    return f"{delta.task}: changed {', '.join(moved)}"


def _parent(store: DeltaStore) -> str:
    """The SHA-256 of the delta that the next one starts from; empty at the base."""
    return store.entries[-1].sha256 if len(store) else ""


def _facts(select: Select, selection: Selection, seed: int) -> dict[str, Any]:
    return {
        "method": select.method,
        "density": select.density,
        "patchable": sum(selection.sizes.values()),
        "k": selection.k,
        "samples": selection.samples,
        "seed": seed,
    }


def _read_all(recipe: Recipe) -> tuple[dict[str, Rows], dict[str, Rows]]:
    measured = (*recipe.tasks, *recipe.general)
    train = {task.name: rows_of(task, task.train) for task in recipe.tasks}
    test = {task.name: rows_of(task, task.test) for task in measured}
    for task in measured:
        parts = [rows[task.name] for rows in (train, test) if task.name in rows]
        for problem in absent_columns(task, parts):
            raise DataError(problem)
    return train, test


def batch_of(recipe: Recipe) -> int:
    """How many examples a step learns, on all processes together."""
    each = recipe.train.get("per_device_train_batch_size", 8)
    return each * recipe.train.get("gradient_accumulation_steps", 1) * sharding.size()


def zero_of(recipe: Recipe) -> Zero:
    """How the recipe's DeepSpeed configuration divides its model."""
    dtype = as_dtype(recipe.model.get("dtype", "float32"))
    return sharding.zero_of(recipe.train, str(dtype).removeprefix("torch."))


def _load_options(recipe: Recipe) -> dict[str, Any]:
    options = {key: value for key, value in recipe.model.items() if key != "dtype"}
    return {**options, "revision": recipe.revision}


def _open_or_create(recipe: Recipe, train_rows: dict[str, Rows], zero: Zero) -> DeltaStore:
    path = Path(recipe.store)
    if sharding.told((path / "store.json").exists()):
        store = DeltaStore.open(path)
        if len(store) or store.recipe == recipe.text():
            _same_run(store, recipe)
            return store
    elif sharding.is_main():
        _require_room(path)
    with zero.entering():
        model, processor = load_base(recipe.base, recipe.revision, **recipe.model)
    require_places(recipe, {name: tuple(shape_of(p)) for name, p in weights(model).items()})
    pad = pad_of(tokenizer_of(processor))
    for task in recipe.tasks:  # data and settings work before a byte is written
        examples = train_rows[task.name]
        for example in examples:
            require_no_visual_tokens(example, processor)
        for first in {bool(example.images): example for example in examples[:100]}.values():
            inputs, _ = fitted(first, processor, task.max_length)
            rehearse(model, [inputs] * len(examples), recipe.train, pad)
    base = describe(model, recipe.base, recipe.revision, path)
    if sharding.is_main():
        DeltaStore.create(path, base, recipe.text(), over_empty=True)
    sharding.wait()
    return DeltaStore.open(path)


def _require_room(path: Path) -> None:
    """Raise StoreError for a folder that holds something else than what a crashed start left."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"store {path} is a file; name a folder")

    def left_over(name: str) -> bool:
        return name in _LEFT or name.startswith(".") and name.endswith(".tmp")

    strange = [f.name for f in path.iterdir() if not left_over(f.name)] if path.is_dir() else []
    if strange:
        raise StoreError(f"store {path} holds {sorted(strange)[0]!r} and is no store; name another")


def _same_run(store: DeltaStore, recipe: Recipe) -> None:
    """A store belongs to one recipe, to which further tasks may be added at the end."""
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
    if sharding.is_main():
        store.write_recipe(recipe.text())


def _same_base(store: DeltaStore, recipe: Recipe) -> None:
    """Raise unless the base has the store's weights, wherever the two lie by now."""
    dtype = trained_dtype(store.base, store.path)
    base = Checkpoint(fetch(recipe.base, recipe.revision), dtype)
    if base.fingerprint() != store.base["fingerprint"]:
        raise BaseError(f"store {store.path} was made on another base than {recipe.base}")


def _note(run: Run, what: str, task: str, facts: dict[str, float]) -> None:
    before = run.store.results()
    run.store.write_results({**before, what: {**before.get(what, {}), task: facts}})
