"""`train`: the loop over a recipe's tasks, resumable at any instant."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from mm_piece import importance
from mm_piece.checkpoint import Checkpoint, fetch
from mm_piece.delta import Delta
from mm_piece.errors import BaseError, RecipeError, StoreError
from mm_piece.evaluation import Answer, by_kind, evaluate, mean_score, pad_of
from mm_piece.loading import as_store, checkout, load
from mm_piece.mask import Mask, budgets, select_stream
from mm_piece.models import describe, load_base, locate, trained_dtype
from mm_piece.names import group_of, weights
from mm_piece.recipe import GeneralTask, Recipe, Task, load_recipe, parse_bytes, parse_recipe
from mm_piece.sparse import sparse_tuning
from mm_piece.store import DeltaStore
from mm_piece.tasks import Example, digest_of, encode, read, tokenizer_of
from mm_piece.trainer import arguments, fit, rehearse


@dataclass(frozen=True)
class Run:
    """What stays the same over the whole sequence."""

    recipe: Recipe
    store: DeltaStore
    train: dict[str, list[Example]]
    test: dict[str, list[Example]]  # of the tasks and of the general ones


def train(recipe: str | Path | Recipe, *overrides: str) -> DeltaStore:
    """Train a recipe's tasks in order and return the store; a second run goes on where one stopped.

    Everything that can be wrong with the recipe, its data or its base is found before anything is
    written. Raises RecipeError, DataError, ModelError, SelectionError, StoreError.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    data = _read_all(recipe)
    arguments(recipe.train, Path(recipe.store) / "work", recipe.seed)
    importance.resolve(recipe.select.method)
    store = _open_or_create(recipe, data[0])
    with store.writing():
        run = Run(recipe, store, *data)
        if min(len(store), _measured(run) - 1) < len(recipe.tasks):
            _go_on(run)
    return store


def _go_on(run: Run) -> None:
    """Measure what was learned but not measured, then learn what is missing."""
    recipe, store = run.recipe, run.store
    model, processor = load(recipe.base, store, at=len(store), **_load_options(recipe))
    for position in range(_measured(run), len(store) + 1):
        checkout(model, position)
        measure(run, model, processor, position)
    checkout(model, len(store))
    for task in recipe.tasks[len(store) :]:
        learn(run, model, processor, task)
        measure(run, model, processor, len(store))


def learn(run: Run, model: nn.Module, processor: Any, task: Task) -> Delta:
    """One task: scores, mask, sparse training, delta; the model stands there afterwards."""
    started = time.monotonic()
    work = run.store.work / f"{len(run.store) + 1:04d}"
    examples = run.train[task.name]
    encoded = [
        encode(example, processor)
        for example in tqdm(examples, f"{task.name}: encode", leave=False, disable=None)
    ]
    mask, facts = _mask_of(run, model, encoded, work, task.name)
    scored = time.monotonic()
    args = arguments(run.recipe.train, work, run.recipe.seed + len(run.store))
    pad, logs = pad_of(tokenizer_of(processor)), run.store.path / "logs" / work.name
    with sparse_tuning(model, mask) as tuning:
        metrics = fit(tuning, encoded, pad, args, logs)
        delta = tuning.delta(
            task.name,
            base=run.store.base["fingerprint"],
            parent=run.store.entries[-1].sha256 if len(run.store) else "",
            **facts,
            data=digest_of(encoded),
            groups=_changes(tuning),
        )
    run.store.append(delta)
    # Not in the delta: what differs between equal runs would give the same task different files.
    timing = {"select": scored - started, "train": time.monotonic() - scored}
    _note(run, task.name, {**timing, "loss": metrics["train_loss"]})
    rmtree(work, ignore_errors=True)
    return delta


def measure(run: Run, model: nn.Module, processor: Any, position: int) -> None:
    """Evaluate every task and the base ability; write row `position` and the answers."""
    row, answers = {}, {}
    for task in (*run.recipe.tasks, *run.recipe.general):
        title, examples = f"position {position}: {task.name}", run.test[task.name]
        answers[task.name] = _evaluate(model, processor, examples, task, title)
        row[task.name] = mean_score(answers[task.name])
    run.store.write_answers(position, answers)
    run.store.write_results(_results(run, position, row, answers))
    with SummaryWriter(str(run.store.path / "logs")) as board:
        for name, score in row.items():
            board.add_scalar(f"score/{name}", score, position)
    tqdm.write(_line(position, row))


def measure_at(
    store: str | Path, at: int | None = None, base: str | None = None, names: Sequence[str] = ()
) -> dict[str, float]:
    """Scores of the model at a position on the tasks of the store's recipe (or on those named)."""
    opened = as_store(store)
    recipe = parse_recipe(opened.recipe, f"{store}/recipe.yaml")
    tasks = {task.name: task for task in (*recipe.tasks, *recipe.general)}
    if unknown := set(names) - set(tasks):
        raise RecipeError(f"unknown task {sorted(unknown)[0]!r}; the store has {', '.join(tasks)}")
    model, processor = load(base, opened, at)
    chosen = [tasks[name] for name in names or tasks]
    return {
        task.name: mean_score(
            _evaluate(model, processor, read(task.test, task.images), task, task.name)
        )
        for task in chosen
    }


def _evaluate(
    model: nn.Module, processor: Any, examples: Sequence[Example], task: GeneralTask, title: str
) -> list[Answer]:
    options = {"max_new_tokens": task.max_new_tokens, "title": title}
    return evaluate(model, processor, examples, task.metric, **options)


def _mask_of(
    run: Run, model: nn.Module, encoded: list[dict[str, Tensor]], work: Path, title: str
) -> tuple[Mask, dict[str, Any]]:
    """The task's mask, kept in the work folder so that a resumed run trains the same entries."""
    select, file = run.recipe.select, work / "mask.safetensors"
    sample = _sample(encoded, select.samples, run.recipe.seed)
    names = importance.patchable(model, sample, select.exclude)
    sizes = {name: weights(model)[name].numel() for name in names}
    if file.is_file():
        stored = load_file(
            file
        )  # which sorts by name; the optimizer's order must be the first run's
        mask: Mask = {name: stored[name] for name in names if name in stored}
    else:
        pieces = importance.stream(
            model,
            sample,
            select.method,
            names=names,
            memory=parse_bytes(select.memory),
            xi=select.xi,
            seed=run.recipe.seed + len(run.store),
            progress=lambda items, what: tqdm(
                items, f"{title}: {what}", unit="example", leave=False, disable=None
            ),
        )
        mask = select_stream(pieces, sizes, select.density)
        work.mkdir(parents=True, exist_ok=True)
        save_file(mask, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return mask, _facts(run, mask, sizes, len(sample))


def _facts(run: Run, mask: Mask, sizes: dict[str, int], samples: int) -> dict[str, Any]:
    select = run.recipe.select
    return {
        "method": select.method,
        "density": select.density,
        "patchable": sum(sizes.values()),
        "k": sum(len(index) for index in mask.values()),
        "samples": samples,
        "seed": run.recipe.seed,
    }


def _changes(tuning: sparse_tuning) -> dict[str, dict[str, float]]:
    """Per group: entries selected, entries whose bits changed, and the norm of the change."""
    report: dict[str, dict[str, float]] = {}
    for name, patch in tuning.patches.items():
        entry = report.setdefault(group_of(name), {"selected": 0, "changed": 0, "norm": 0.0})
        change = patch.entries().double() - patch.before.double()
        entry["selected"] += len(change)
        entry["changed"] += int((change != 0).sum())
        entry["norm"] = (entry["norm"] ** 2 + float(change.square().sum())) ** 0.5
    return report


def _sample(encoded: list[dict[str, Tensor]], samples: int, seed: int) -> list[dict[str, Tensor]]:
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed))
    return [encoded[position] for position in order[:samples].tolist()]


def _read_all(recipe: Recipe) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    measured = (*recipe.tasks, *recipe.general)
    return (
        {task.name: read(task.train, task.images) for task in recipe.tasks},
        {task.name: read(task.test, task.images) for task in measured},
    )


def _load_options(recipe: Recipe) -> dict[str, Any]:
    options = {key: value for key, value in recipe.model.items() if key != "dtype"}
    return {**options, "revision": recipe.revision}


def _open_or_create(recipe: Recipe, train_rows: dict[str, list[Example]]) -> DeltaStore:
    path = Path(recipe.store)
    if (path / "store.json").exists():
        store = DeltaStore.open(path)
        _same_run(store, recipe)
        return store
    model, processor = load_base(recipe.base, recipe.revision, **recipe.model)
    budgets(_eligible(model, recipe.select.exclude), recipe.select.density)
    pad = pad_of(tokenizer_of(processor))
    for examples in train_rows.values():  # data and settings work before a byte is written
        first = encode(examples[0], processor)
        rehearse(model, [first] * len(examples), recipe.train, pad)
    return DeltaStore.create(
        path, describe(model, recipe.base, recipe.revision, path), recipe.text()
    )


def _eligible(model: nn.Module, exclude: Sequence[str]) -> dict[str, int]:
    named = weights(model)
    return {name: p.numel() for name, p in named.items() if group_of(name) not in exclude}


def _same_run(store: DeltaStore, recipe: Recipe) -> None:
    """A store belongs to one recipe, to which further tasks may be added at the end."""
    if {**store.base, **locate(recipe.base, recipe.revision, store.path)} != store.base:
        _same_base(store, recipe)
    before = parse_recipe(store.recipe, f"{store.path}/recipe.yaml").model_dump()
    after = recipe.model_dump()
    after["tasks"] = after["tasks"][: len(before["tasks"])]
    for key in before:
        if key not in ("store", "base", "revision") and after[key] != before[key]:
            raise StoreError(
                f"store {store.path} was made by a recipe with another {key!r}; "
                "only tasks at the end may be added: use a new store"
            )
    store.write_recipe(recipe.text())


def _same_base(store: DeltaStore, recipe: Recipe) -> None:
    """Raise unless the base has the store's weights, wherever the two lie by now."""
    dtype = trained_dtype(store.base, store.path)
    base = Checkpoint(fetch(recipe.base, recipe.revision), dtype)
    if base.fingerprint() != store.base["fingerprint"]:
        raise BaseError(f"store {store.path} was made on another base than {recipe.base}")


def _measured(run: Run) -> int:
    """Rows of the matrix; none of them counts once the recipe has got a further task."""
    results = run.store.results()
    same = results.get("tasks") == [task.name for task in run.recipe.tasks]
    return len(results["matrix"]) if same and "matrix" in results else 0


def _results(
    run: Run, position: int, row: dict[str, float], answers: dict[str, list[Answer]]
) -> dict[str, Any]:
    tasks = [task.name for task in run.recipe.tasks]
    general = [task.name for task in run.recipe.general]
    before = run.store.results()
    results: dict[str, Any] = {**before, "tasks": tasks, "general": general}
    results["matrix"] = [*before.get("matrix", [])[:position], [row[name] for name in tasks]]
    if general:
        ability = sum(row[name] for name in general) / len(general)
        results["base_ability"] = [*before.get("base_ability", [])[:position], ability]
        results["base_ability_name"] = ", ".join(general)
        kinds = by_kind([answer for name in general for answer in answers[name]])
        old = before.get("base_kinds", {})
        results["base_kinds"] = {k: [*old.get(k, [])[:position], v] for k, v in kinds.items()}
    return results


def _note(run: Run, task: str, facts: dict[str, float]) -> None:
    before = run.store.results()
    run.store.write_results({**before, "seconds": {**before.get("seconds", {}), task: facts}})


def _line(position: int, row: dict[str, float]) -> str:
    return f"position {position}  " + "  ".join(
        f"{name} {score:.1%}" for name, score in row.items()
    )
