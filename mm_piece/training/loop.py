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
from mm_piece.data import Encoded, Rows, digest_of, tokenizer_of
from mm_piece.deltas.delta import Delta
from mm_piece.deltas.file_layout import LAYOUT, layout_of
from mm_piece.distributed import Zero
from mm_piece.distributed.progress import bar, say
from mm_piece.errors import DataError
from mm_piece.evaluation.answers import pad_of
from mm_piece.evaluation.matrix import absent_columns, measure, measured, rows_of
from mm_piece.metrics.answers import METRICS
from mm_piece.recipe import Recipe, Select, Task, load_recipe, parse_bytes
from mm_piece.selection import Mask
from mm_piece.selection.task import Selection, selection_of
from mm_piece.sparse.change_report import changes, rounding_warning
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.store.attachment import checkout
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import load
from mm_piece.training import retention
from mm_piece.training.arguments import arguments
from mm_piece.training.retention import Kept
from mm_piece.training.stopping import Stop
from mm_piece.training.store_setup import batch_of, store_of, zero_of
from mm_piece.training.trainer import fit
from mm_piece.training.values import require_values
from mm_piece.training.write_errors import reported_writes


@dataclass(frozen=True)
class Run:
    """What stays the same over the whole sequence."""

    recipe: Recipe
    store: DeltaStore
    train: dict[str, Rows]
    test: dict[str, Rows]  # of the tasks and of the general ones
    zero: Zero
    stop: Stop


def train(recipe: str | Path | Recipe, *overrides: str) -> DeltaStore:
    """Train a recipe's tasks in order and return the store; a second run goes on where one stopped.

    Everything that can be wrong with the recipe, its data or its base is found before anything is
    written. Raises RecipeError, DataError, ModelError, SelectionError, StoreError.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    require_values(recipe.train)
    distributed.start(float(recipe.train.get("ddp_timeout", distributed.PATIENCE)))
    with distributed.lost(), reported_writes(Path(recipe.store)), Stop() as stop:
        return _train(recipe, stop)


def _train(recipe: Recipe, stop: Stop) -> DeltaStore:
    data, zero = _read_all(recipe), zero_of(recipe)
    zero.require_launcher()
    arguments(recipe.train, Path(recipe.store) / "work", recipe.seed)
    importance.resolve(recipe.select.method)
    for task in (*recipe.tasks, *recipe.general):
        METRICS[task.metric]([], [])  # its library is there
    store = store_of(recipe, *data, zero)
    with store.writing() if distributed.is_main() else nullcontext():
        run = Run(recipe, store, *data, zero, stop)
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
    if len(store) < len(recipe.tasks):
        keep_learned(run, model, processor)
    checkout(model, len(store))
    for task in recipe.tasks[len(store) :]:
        learn(run, model, processor, task)
        measure_here(len(store))


def learn(run: Run, model: nn.Module, processor: Any, task: Task) -> Delta:
    """One task: scores, mask, sparse training, delta; the model stands there afterwards."""
    recipe, started = run.recipe, time.monotonic()
    position, seed = len(run.store) + 1, recipe.seed + len(run.store)
    work, encoded = _work(run, position), encoded_of(run, processor, task, position)
    data = _look_through(encoded, task)
    pad, logs = pad_of(tokenizer_of(processor)), run.store.path / "logs" / work.name
    select, parent = recipe.selecting(task), _parent(run.store)
    standing = {"base": run.store.base["digest"], "parent": parent, "data": data["data"]}
    facts = {"pad": pad, "seeds": (recipe.seed, seed), "standing": standing}
    keep = cache(partial(kept_before, run, model, encoded, select))
    with run.zero.running(model):
        selection = selection_of(model, encoded, select, work, **facts, keep=keep)
        pulls = pulls_of(recipe, selection.mask, keep)
        examples = taught(run, model, encoded, select)
    say(f"{task.name}: {selection}")
    scored = time.monotonic()
    with run.stop.held(), sparse_tuning(model, selection.mask) as tuning:
        args = arguments(recipe.train, work, seed)
        metrics = fit(tuning, examples, pad, args, logs, pulls, run.stop)
        delta = tuning.delta(
            task.name,
            base=run.store.base["fingerprint"],
            parent=parent,
            **_facts(run, select, selection),
            **data,
            own_answers=len(examples) - len(encoded),
            batch=batch_of(recipe),
            groups=changes(tuning, selection.sizes),
        )
        _append(run.store, delta)
        timing = {"select": scored - started, "train": time.monotonic() - scored}
        _note_task(run, task, {**timing, "loss": metrics["train_loss"]}, selection.stability)
    if keeps(recipe, task):
        note_kept(run, model, encoded, task, position)
    if distributed.is_main():
        rmtree(work, ignore_errors=True)
    for line in _summary(delta):
        say(f"{task.name}: {line}")
    return delta


def taught(
    run: Run, model: nn.Module, encoded: Encoded, select: Select
) -> Sequence[dict[str, Tensor]]:
    """A task's examples and, as the recipe asks for, the model's own answers beside them."""
    number, seed = round(run.recipe.own_answers * len(encoded)), run.recipe.seed + len(run.store)
    if number == 0:
        return encoded
    own = retention.own_answers(model, encoded, select, seed, number)
    say(f"{len(own)} own answers are trained beside {len(encoded)} examples")
    return ConcatDataset([encoded, own])  # type: ignore[return-value] - it can be indexed


def pulls_of(recipe: Recipe, mask: Mask, keep: Callable[[], Kept]) -> Mask | None:
    """How hard each selected entry is pulled back to where it stood; None without a penalty."""
    if recipe.penalty == 0:
        return None
    return {name: recipe.penalty * keep().at(name, index) for name, index in mask.items()}


def keeps(recipe: Recipe, task: Task) -> bool:
    """Whether a later task will ask what this one is to be kept by."""
    return recipe.penalty > 0 or recipe.selecting(task).method in importance.KEEPING


def keep_learned(run: Run, model: nn.Module, processor: Any) -> None:
    """Estimate what is missing of learned tasks' importance: a run may have ended before it."""
    for position, task in enumerate(run.recipe.tasks[: len(run.store)], start=1):
        if keeps(run.recipe, task):
            checkout(model, position)
            note_kept(run, model, encoded_of(run, processor, task, position), task, position)
            if distributed.is_main():
                rmtree(_work(run, position), ignore_errors=True)


def kept_before(run: Run, model: nn.Module, encoded: Encoded, select: Select) -> Kept:
    """What the model is to keep while it learns its next task."""
    files = [_kept_file(run, position) for position in range(1, len(run.store) + 1)]
    pairs = zip(files, run.store.entries, strict=True)
    earlier = [retention.read(file, entry.sha256) for file, entry in pairs]
    return retention.kept_by(model, encoded, select, run.recipe.seed + len(run.store), earlier)


def note_kept(run: Run, model: nn.Module, encoded: Encoded, task: Task, position: int) -> None:
    """Estimate what a learned task is to be kept by, once; the model stands after it."""
    file, delta = _kept_file(run, position), run.store.entries[position - 1].sha256
    if distributed.told(retention.read(file, delta) is not None):
        return
    select = run.recipe.selecting(task)
    with run.zero.running(model):
        sample = encoded.drawn(select.samples, run.recipe.seed)
        found = retention.importance_of(model, sample, select)
    if distributed.is_main():
        retention.write(file, found, delta)
    distributed.wait()


def encoded_of(run: Run, processor: Any, task: Task, position: int) -> Encoded:
    """A task's training examples as model inputs, kept on disk while the task is learned."""
    room, folder = parse_bytes(run.recipe.cache), _work(run, position) / "encoded"
    return Encoded(run.train[task.name], processor, folder, task.max_length, room)


def _work(run: Run, position: int) -> Path:
    return run.store.work / f"{position:04d}"


def _kept_file(run: Run, position: int) -> Path:
    """Where the importance of a learned task lies."""
    return run.store.path / "kept" / f"{position:04d}.safetensors"


def _append(store: DeltaStore, delta: Delta) -> None:
    """The main process writes; every process has seen it and needs no file of the task any more."""
    if distributed.is_main():
        store.append(delta)
    distributed.wait()
    if not distributed.is_main():
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


def _summary(delta: Delta) -> list[str]:
    """What the task changed in each group, in one line; another one if most of it was lost."""
    groups = delta.info["groups"]
    moved = (
        f"{group} {row['changed']:,} of {row['entries']:,} ({row['share']:.2%} of norm)"
        for group, row in groups.items()
    )
    lost = rounding_warning(groups)
    return [f"changed {', '.join(moved)}", *([lost] if lost else [])]


def _parent(store: DeltaStore) -> str:
    """The SHA-256 of the delta that the next one starts from; empty at the base."""
    return store.entries[-1].sha256 if len(store) else ""


def _facts(run: Run, select: Select, selection: Selection) -> dict[str, Any]:
    return {
        "method": select.method,
        "density": select.density,
        "patchable": sum(selection.sizes.values()),
        "k": selection.k,
        "samples": selection.samples,
        "penalty": run.recipe.penalty,
        "seed": run.recipe.seed,
        **layout_of(selection.mask, run.store.base.get(LAYOUT, {})),
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


def _load_options(recipe: Recipe) -> dict[str, Any]:
    options = {key: value for key, value in recipe.model.items() if key != "dtype"}
    return {**options, "revision": recipe.revision}


def _note_task(
    run: Run, task: Task, seconds: dict[str, float], stability: dict[str, float]
) -> None:
    """Write what a delta must not hold: equal runs differ in it and make equal files."""
    if not distributed.is_main():
        return
    results = run.store.results()
    for what, facts in (("seconds", seconds), ("stability", stability)):
        results[what] = {**results.get(what, {}), task.name: facts}
    run.store.write_results(results)
