"""One row of the accuracy matrix: a model at a position, measured on every task of a recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from mm_piece import distributed
from mm_piece.data import Example, ExampleDataset, read
from mm_piece.distributed.progress import print_line
from mm_piece.errors import RecipeError
from mm_piece.evaluation.answers import (
    ScoredAnswer,
    evaluate,
    mean_score,
    move_to_accelerator,
    scores_by_kind,
)
from mm_piece.evaluation.divergence import measure_divergence
from mm_piece.recipe import GeneralTask, Recipe, parse_recipe
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import as_store, load

AnswersByTask = dict[str, list[ScoredAnswer]]


def read_task_source(task: GeneralTask, source: str) -> ExampleDataset:
    """The rows of a task's train or test source, read as the recipe says."""
    return read(source, task.images, task.columns, task.prompt)


def find_absent_columns(task: GeneralTask, sources: Sequence[ExampleDataset]) -> list[str]:
    """What is wrong with a task's `columns`: those that no row of its sources has."""
    absent = (
        set.intersection(*(set(source.absent_columns) for source in sources)) if sources else set()
    )
    return [f"task {task.name!r}: columns: no row has {name!r}" for name in sorted(absent)]


def answer_task(
    model: nn.Module, processor: Any, examples: Sequence[Example], recipe: Recipe, task: GeneralTask
) -> list[ScoredAnswer]:
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


def measure_position(
    store: DeltaStore,
    recipe: Recipe,
    model: nn.Module,
    processor: Any,
    *,
    position: int,
    test: Mapping[str, Sequence[Example]],
) -> None:
    """Evaluate every task and the base ability; the main process writes row and answers."""
    tasks = (*recipe.tasks, *recipe.general)
    answers = {t.name: answer_task(model, processor, test[t.name], recipe, t) for t in tasks}
    if not distributed.is_main():
        return
    row = {name: mean_score(given) for name, given in answers.items()}
    store.write_answers(position, answers)
    store.write_results(_update_results(store, recipe, position, row, answers))
    with SummaryWriter(str(store.path / "logs")) as board:
        for name, score in row.items():
            board.add_scalar(f"score/{name}", score, position)
    scores = "  ".join(f"{name} {score:.1%}" for name, score in row.items())
    print_line(f"position {position}  {scores}")


def measure_scores_at(
    store: str | Path, at: int | None = None, base: str | None = None, names: Sequence[str] = ()
) -> dict[str, float]:
    """Scores of the model at a position on the tasks of the store's recipe (or on those named)."""
    distributed.join_process_group()
    recipe, opened, chosen = choose_tasks(store, names)
    test = {task.name: read_task_source(task, task.test) for task in chosen}
    model, processor = load(base, opened, at)
    model = move_to_accelerator(model)
    return {
        task.name: mean_score(answer_task(model, processor, test[task.name], recipe, task))
        for task in chosen
    }


def measure_divergences_at(
    store: str | Path, at: int | None = None, base: str | None = None, names: Sequence[str] = ()
) -> dict[str, float]:
    """How far the model at a position is from the base, by task, in nats a token."""
    distributed.join_process_group()
    recipe, opened, chosen = choose_tasks(store, names)
    position = opened.position(at)
    model, processor = load(base, opened, 0)
    return measure_divergences(move_to_accelerator(model), processor, recipe, chosen, position)


def measure_divergences(
    model: nn.Module,
    processor: Any,
    recipe: Recipe,
    tasks: Sequence[GeneralTask],
    position: int,
) -> dict[str, float]:
    """How far a model at a position of its store is from the base, by task, in nats a token."""
    return {
        task.name: measure_divergence(
            model,
            processor,
            read_task_source(task, task.test),
            position,
            max_new_tokens=task.max_new_tokens,
            max_length=task.max_length,
            batch_size=recipe.train.get("per_device_eval_batch_size", 8),
        )
        for task in tasks
    }


def choose_tasks(
    store: str | Path, names: Sequence[str]
) -> tuple[Recipe, DeltaStore, list[GeneralTask]]:
    """A store's recipe, the store, and those of its tasks that are named; all without names."""
    opened = as_store(store)
    recipe = parse_recipe(opened.recipe, f"{store}/recipe.yaml")
    tasks = {task.name: task for task in (*recipe.tasks, *recipe.general)}
    if unknown := set(names) - set(tasks):
        raise RecipeError(f"unknown task {sorted(unknown)[0]!r}; the store has {', '.join(tasks)}")
    return recipe, opened, [tasks[name] for name in names or tasks]


def count_measured_rows(store: DeltaStore, recipe: Recipe) -> int:
    """Rows of the matrix; none of them counts once the recipe has got a further task."""
    results = store.results()
    is_same = results.get("tasks") == [task.name for task in recipe.tasks]
    return len(results["matrix"]) if is_same and "matrix" in results else 0


def _update_results(
    store: DeltaStore, recipe: Recipe, position: int, row: dict[str, float], answers: AnswersByTask
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
        kinds = scores_by_kind([given for name in general for given in answers[name]])
        old = before.get("base_kinds", {})
        results["base_kinds"] = {k: [*old.get(k, [])[:position], v] for k, v in kinds.items()}
    return results
