"""One row of the accuracy matrix: a model at a position, measured on every task of a recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from mm_piece import distributed
from mm_piece.data import Example, Rows, read
from mm_piece.distributed.progress import say
from mm_piece.errors import RecipeError
from mm_piece.evaluation.answers import Answer, by_kind, evaluate, mean_score, on_accelerator
from mm_piece.evaluation.divergence import divergence
from mm_piece.recipe import GeneralTask, Recipe, parse_recipe
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import as_store, load

Answers = dict[str, list[Answer]]


def rows_of(task: GeneralTask, source: str) -> Rows:
    """The rows of a task's train or test source, read as the recipe says."""
    return read(source, task.images, task.columns, task.prompt)


def absent_columns(task: GeneralTask, parts: Sequence[Rows]) -> list[str]:
    """What is wrong with a task's `columns`: those that no row of its sources has."""
    absent = set.intersection(*(set(part.absent) for part in parts)) if parts else set()
    return [f"task {task.name!r}: columns: no row has {name!r}" for name in sorted(absent)]


def answer(
    model: nn.Module, processor: Any, examples: Sequence[Example], recipe: Recipe, task: GeneralTask
) -> list[Answer]:
    """A model's answers to a task's rows, scored by its metric.

    Batches have `per_device_eval_batch_size` rows, a setting of Trainer's.
    """
    return evaluate(
        model,
        processor,
        examples,
        task.metric,
        max_new_tokens=task.max_new_tokens,
        max_length=task.max_length,
        batch_size=recipe.train.get("per_device_eval_batch_size", 8),
        title=task.name,
    )


def measure(
    store: DeltaStore,
    recipe: Recipe,
    model: nn.Module,
    processor: Any,
    *,
    position: int,
    test: Mapping[str, Sequence[Example]],
) -> None:
    """Evaluate every task and the base ability; the main process writes row and answers."""
    measured = (*recipe.tasks, *recipe.general)
    answers = {t.name: answer(model, processor, test[t.name], recipe, t) for t in measured}
    if not distributed.is_main():
        return
    row = {name: mean_score(given) for name, given in answers.items()}
    store.write_answers(position, answers)
    store.write_results(_results(store, recipe, position, row, answers))
    with SummaryWriter(str(store.path / "logs")) as board:
        for name, score in row.items():
            board.add_scalar(f"score/{name}", score, position)
    scores = "  ".join(f"{name} {score:.1%}" for name, score in row.items())
    say(f"position {position}  {scores}")


def measure_at(
    store: str | Path, at: int | None = None, base: str | None = None, names: Sequence[str] = ()
) -> dict[str, float]:
    """Scores of the model at a position on the tasks of the store's recipe (or on those named)."""
    distributed.start()
    recipe, opened, chosen = chosen_of(store, names)
    test = {task.name: rows_of(task, task.test) for task in chosen}
    model, processor = load(base, opened, at)
    model = on_accelerator(model)
    return {
        task.name: mean_score(answer(model, processor, test[task.name], recipe, task))
        for task in chosen
    }


def divergences_at(
    store: str | Path, at: int | None = None, base: str | None = None, names: Sequence[str] = ()
) -> dict[str, float]:
    """How far the model at a position is from the base, by task, in nats a token."""
    distributed.start()
    recipe, opened, chosen = chosen_of(store, names)
    position = opened.position(at)
    model, processor = load(base, opened, 0)
    return divergences_of(on_accelerator(model), processor, recipe, chosen, position)


def divergences_of(
    model: nn.Module,
    processor: Any,
    recipe: Recipe,
    tasks: Sequence[GeneralTask],
    position: int,
) -> dict[str, float]:
    """How far a model at a position of its store is from the base, by task, in nats a token."""
    return {
        task.name: divergence(
            model,
            processor,
            rows_of(task, task.test),
            position,
            max_new_tokens=task.max_new_tokens,
            max_length=task.max_length,
            batch_size=recipe.train.get("per_device_eval_batch_size", 8),
        )
        for task in tasks
    }


def chosen_of(
    store: str | Path, names: Sequence[str]
) -> tuple[Recipe, DeltaStore, list[GeneralTask]]:
    """A store's recipe, the store, and those of its tasks that are named; all without names."""
    opened = as_store(store)
    recipe = parse_recipe(opened.recipe, f"{store}/recipe.yaml")
    tasks = {task.name: task for task in (*recipe.tasks, *recipe.general)}
    if unknown := set(names) - set(tasks):
        raise RecipeError(f"unknown task {sorted(unknown)[0]!r}; the store has {', '.join(tasks)}")
    return recipe, opened, [tasks[name] for name in names or tasks]


def measured(store: DeltaStore, recipe: Recipe) -> int:
    """Rows of the matrix; none of them counts once the recipe has got a further task."""
    results = store.results()
    same = results.get("tasks") == [task.name for task in recipe.tasks]
    return len(results["matrix"]) if same and "matrix" in results else 0


def _results(
    store: DeltaStore, recipe: Recipe, position: int, row: dict[str, float], answers: Answers
) -> dict[str, Any]:
    tasks = [task.name for task in recipe.tasks]
    general = [task.name for task in recipe.general]
    before = store.results()
    results: dict[str, Any] = {**before, "tasks": tasks, "general": general}
    results["matrix"] = [*before.get("matrix", [])[:position], [row[name] for name in tasks]]
    if general:
        ability = sum(row[name] for name in general) / len(general)
        results["base_ability"] = [*before.get("base_ability", [])[:position], ability]
        results["base_ability_name"] = ", ".join(general)
        kinds = by_kind([given for name in general for given in answers[name]])
        old = before.get("base_kinds", {})
        results["base_kinds"] = {k: [*old.get(k, [])[:position], v] for k, v in kinds.items()}
    return results
