"""Answers that a store holds already: which still count, and which another recipe outdates."""

from collections.abc import Collection, Sequence

from mm_piece import distributed
from mm_piece.data import Example
from mm_piece.distributed.progress import print_line
from mm_piece.recipe import GeneralTask, Recipe
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.results import AnswerRecord, remove_rows

# What a task's predictions depend on besides the weights.
_PREDICTION_KEYS = {
    "test",
    "images",
    "columns",
    "prompt",
    "max_new_tokens",
    "max_length",
}
# Scores also depend on how a prediction is compared to its answer.
_SCORE_KEYS = {*_PREDICTION_KEYS, "metric"}


def find_predictions(
    examples: Sequence[Example],
    recorded: Sequence[AnswerRecord],
) -> list[str] | None:
    """Return the predictions of recorded answers; None unless they answer these examples."""
    if len(recorded) != len(examples):
        return None

    predictions = []
    for example, record in zip(examples, recorded, strict=True):
        answered = (record["row"], record["prompt"], record["answer"])
        if answered != (example.row, example.prompt, example.answer):
            return None
        predictions.append(record["prediction"])
    return predictions


def forget_measurements(
    store: DeltaStore,
    before: Recipe,
    after: Recipe,
) -> None:
    """Remove from a store what it measured by other tests and metrics than a recipe's.

    Predictions stay where a task's test is the same: another metric scores them anew. The main
    process writes. Does nothing where both recipes measure the same.
    """
    is_scored_alike = not _find_changed_tasks(before, after, _SCORE_KEYS)
    has_same_general = _general_names(before) == _general_names(after)
    if is_scored_alike and has_same_general:
        return

    print_line("tests or metrics of the recipe changed: every position is measured again")
    if not distributed.is_main():
        return

    # rows first: a row that is there has its answers, wherever a run was stopped
    store.update_results(remove_rows)
    outdated = _find_changed_tasks(before, after, _PREDICTION_KEYS)
    for position in range(len(store) + 1):
        answers = dict(store.answers(position))
        for name in outdated:
            answers.pop(name, None)
        store.write_answers(position, answers)


def _find_changed_tasks(
    before: Recipe,
    after: Recipe,
    keys: Collection[str],
) -> set[str]:
    """Return the names of tasks in both recipes of which some keys differ."""
    earlier_values = {}
    for task in (*before.tasks, *before.general):
        earlier_values[task.name] = _pick_values(task, keys)

    changed = set()
    for task in (*after.tasks, *after.general):
        values = _pick_values(task, keys)
        if earlier_values.get(task.name, values) != values:
            changed.add(task.name)
    return changed


def _pick_values(task: GeneralTask, keys: Collection[str]) -> dict[str, object]:
    return task.model_dump(include=set(keys))


def _general_names(recipe: Recipe) -> list[str]:
    return [task.name for task in recipe.general]
