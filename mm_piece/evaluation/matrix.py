"""The accuracy matrix: one row for each position of a store, one column for each task.

A row holds the mean scores of the model at that position on every task of the recipe.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from mm_piece import distributed
from mm_piece.data import Example, ExampleDataset, open_examples, require_sound_rows
from mm_piece.data.processor import Processor
from mm_piece.distributed.progress import print_line
from mm_piece.evaluation.answers import (
    ScoredAnswer,
    evaluate,
    mean_score,
    move_to_accelerator,
    score_predictions,
    scores_by_kind,
)
from mm_piece.evaluation.chosen_tasks import choose_tasks
from mm_piece.evaluation.divergence import measure_divergence
from mm_piece.evaluation.recorded_answers import find_predictions
from mm_piece.recipe import GeneralTask, Recipe
from mm_piece.store.board import write_scores
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import load
from mm_piece.store.results import MeasuredRow, add_row

AnswersByTask = dict[str, list[ScoredAnswer]]


def read_task_source(task: GeneralTask, source: str) -> ExampleDataset:
    """Read the examples of a task's train or test source, as the recipe describes them."""
    rows = open_task_source(task, source)
    require_sound_rows(rows)
    return rows


def open_task_source(task: GeneralTask, source: str) -> ExampleDataset:
    """Open a task's source; no row is looked at yet."""
    return open_examples(
        source,
        task.images,
        task.columns,
        task.prompt,
    )


def answer_task(
    model: nn.Module,
    processor: Processor,
    examples: Sequence[Example],
    recipe: Recipe,
    task: GeneralTask,
) -> list[ScoredAnswer]:
    """Answer a task's examples, and score the answers by its metric.

    Batches have `per_device_eval_batch_size` examples, a setting of Trainer's.
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
    processor: Processor,
    *,
    position: int,
    test: Mapping[str, Sequence[Example]],
) -> None:
    """Evaluate every task and the base ability; the main process writes row and answers.

    Predictions that the store has for this position already are scored, and not generated again.
    """
    # read by one process: all must know alike what is left to generate
    recorded = distributed.broadcast(dict(store.answers(position)))
    answers: AnswersByTask = {}
    # all processes answer together
    for task in (*recipe.tasks, *recipe.general):
        examples = test[task.name]
        predictions = find_predictions(examples, recorded.get(task.name, []))
        if predictions is not None:
            answers[task.name] = score_predictions(processor, examples, predictions, task.metric)
            continue

        answers[task.name] = answer_task(model, processor, examples, recipe, task)
        if distributed.is_main():
            # a run that is stopped now need not answer this task again
            store.write_answers(position, {**recorded, **answers})
    if not distributed.is_main():
        return

    row = {}
    for name, scored in answers.items():
        row[name] = mean_score(scored)
    store.write_answers(position, answers)
    # after the answers: a row that is there has its answers, wherever a run was stopped
    measured = _make_row(recipe, row, answers)
    store.update_results(lambda results: add_row(results, position, measured))

    write_scores(store.logs, row, position)
    scores = [f"{name} {score:.1%}" for name, score in row.items()]
    print_line(f"position {position}  {'  '.join(scores)}")


def measure_scores_at(
    store: str | Path,
    at: int | None = None,
    base: str | None = None,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Return the model's mean score at a position, by task of the store's recipe.

    With `names`, only of those tasks.
    """
    distributed.join_process_group()
    recipe, opened, chosen = choose_tasks(store, names)
    # read first: what is wrong with the data shows before a base is loaded
    test = {task.name: read_task_source(task, task.test) for task in chosen}
    model, processor = load(base, opened, at)
    model = move_to_accelerator(model)

    scores = {}
    for task in chosen:
        examples = test[task.name]
        answers = answer_task(model, processor, examples, recipe, task)
        scores[task.name] = mean_score(answers)
    return scores


def measure_divergences_at(
    store: str | Path,
    at: int | None = None,
    base: str | None = None,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Return the divergence of the model at a position from its base, by task, in nats a token."""
    distributed.join_process_group()
    recipe, opened, chosen = choose_tasks(store, names)
    position = opened.position(at)
    # at the base: `measure_divergence` moves the model between both positions
    model, processor = load(base, opened, 0)
    model = move_to_accelerator(model)
    return measure_divergences(model, processor, recipe, chosen, position)


def measure_divergences(
    model: nn.Module,
    processor: Processor,
    recipe: Recipe,
    tasks: Sequence[GeneralTask],
    position: int,
) -> dict[str, float]:
    """Return the divergence of a store's model at a position, by task, in nats a token."""
    divergences = {}
    for task in tasks:
        divergences[task.name] = measure_divergence(
            model,
            processor,
            read_task_source(task, task.test),
            position,
            max_new_tokens=task.max_new_tokens,
            max_length=task.max_length,
            batch_size=recipe.train.get("per_device_eval_batch_size", 8),
        )
    return divergences


def count_measured_rows(store: DeltaStore, recipe: Recipe) -> int:
    """Count the rows of the matrix that a run need not measure again."""
    results = store.results()
    names = [task.name for task in recipe.tasks]
    general_names = [task.name for task in recipe.general]
    # a further task makes a column that none of the rows has
    if results.get("tasks") != names or results.get("general") != general_names:
        return 0
    return len(results.get("matrix", []))


def _make_row(
    recipe: Recipe,
    scores: Mapping[str, float],
    answers: AnswersByTask,
) -> MeasuredRow:
    """Return the scores of a position as the results have them."""
    # over all rows of the general tasks together: a kind may occur in several of them
    general_answers: list[ScoredAnswer] = []
    for task in recipe.general:
        general_answers += answers[task.name]

    return MeasuredRow(
        tasks={task.name: scores[task.name] for task in recipe.tasks},
        general={task.name: scores[task.name] for task in recipe.general},
        kinds=scores_by_kind(general_answers),
    )
