"""A task may have its own `train_settings`, as it may have its own density."""

import pytest

import mm_piece
from mm_piece.errors import RecipeError, StoreError
from mm_piece.recipe import parse_recipe
from mm_piece.recipe.train_keys import RUN_KEYS, TASK_KEYS
from mm_piece.training.known_arguments import HONOURED
from mm_piece.training.preflight import preflight

RECIPE = """
base: {base}
store: {store}
tasks:
  - {{name: digits, train: "scenes:digits/train[:8]", test: "scenes:digits/test[:2]"}}
  - {{name: words, train: "scenes:words/train[:8]", test: "scenes:words/test[:2]"}}
select: {{method: random, density: 0.02}}
train: {{learning_rate: 1e-2, max_steps: 3, per_device_train_batch_size: 4, disable_tqdm: true}}
"""
OWN = {"learning_rate": 3e-3, "num_train_epochs": 2, "per_device_train_batch_size": 2}


def recipe_of(base, store, task=1, settings=None):
    recipe = parse_recipe(RECIPE.format(base=base, store=store))
    tasks = list(recipe.tasks)
    tasks[task] = tasks[task].model_copy(update={"train_settings": settings or {}})
    return recipe.model_copy(update={"tasks": tuple(tasks)})


@pytest.mark.slow
def test_a_tasks_own_settings_train_it_and_no_other(base, tmp_path):
    """Its deltas are those of a run in which all tasks have these settings, from there on."""
    plain = mm_piece.train(recipe_of(base, tmp_path / "plain"))
    own = mm_piece.train(recipe_of(base, tmp_path / "own", settings=OWN))
    assert plain.entries[0].sha256 == own.entries[0].sha256
    assert plain.entries[1].sha256 != own.entries[1].sha256

    first = recipe_of(base, tmp_path / "first", task=0, settings=OWN)
    first = mm_piece.train(first.model_copy(update={"tasks": first.tasks[:1]}))
    everywhere = recipe_of(base, tmp_path / "everywhere")
    changes = {"train": {**OWN, "disable_tqdm": True}, "tasks": everywhere.tasks[:1]}
    everywhere = mm_piece.train(everywhere.model_copy(update=changes))
    assert first.entries[0].sha256 == everywhere.entries[0].sha256

    steps = [store.delta(2).info["batch"] for store in (plain, own)]
    assert steps == [4, 2]


@pytest.mark.slow
def test_a_run_goes_on_with_the_settings_of_each_task(base, tmp_path):
    """How a task's step is divided may change, and nothing else of its settings."""
    store = tmp_path / "store"
    trained = mm_piece.train(recipe_of(base, store, settings=OWN))
    deltas = [entry.sha256 for entry in trained.entries]

    divided = {**OWN, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    again = mm_piece.train(recipe_of(base, store, settings=divided))
    assert [entry.sha256 for entry in again.entries] == deltas

    more = {**OWN, "per_device_train_batch_size": 4}
    with pytest.raises(StoreError, match="2 examples of 'words' a step, here it would be 4"):
        mm_piece.train(recipe_of(base, store, settings=more))
    faster = {**OWN, "learning_rate": 1e-2}
    changed = r"tasks\[1\].train_settings.learning_rate was 0.003, here it is 0.01"
    with pytest.raises(StoreError, match=changed):
        mm_piece.train(recipe_of(base, store, settings=faster))


def test_epochs_of_a_task_win_over_steps_of_the_recipe():
    recipe = recipe_of("b", "s", settings={"num_train_epochs": 2})
    first, second = (recipe.train_of(task) for task in recipe.tasks)
    assert first["max_steps"] == 3
    assert "max_steps" not in second
    assert second["num_train_epochs"] == 2
    assert second["learning_rate"] == first["learning_rate"] == 1e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bf16": True}, "'bf16' is a setting of the whole run: write it under `train`"),
        ({"deepspeed": "x.json"}, "'deepspeed' is a setting of the whole run"),
        ({"report_to": "wandb"}, "'report_to' is a setting of the whole run"),
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"learning_rate": -1}, "learning_rate must be a number of at least 0"),
        ({"num_train_epochs": 0}, "leave no step to train"),
        ({"output_dir": "x"}, "'output_dir' is not a setting here|of the whole run"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1"),
    ],
)
def test_settings_that_a_task_cannot_have_are_named(settings, message, base, tmp_path):
    recipe = recipe_of(base, tmp_path / "store", settings=settings)
    with pytest.raises(RecipeError, match=f"task 'words': .*{message}") as caught:
        preflight(recipe)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_settings_under_a_tasks_train_are_sent_where_they_belong():
    text = RECIPE.format(base="b", store="s").replace(
        'train: "scenes:words/train[:8]"', "train: {learning_rate: 1e-3}"
    )
    with pytest.raises(RecipeError, match=r"tasks.1.train: .* go to `train_settings`"):
        parse_recipe(text)


def test_keys_that_messages_send_home_are_settings():
    assert HONOURED.keys() >= TASK_KEYS
    assert HONOURED.keys() >= RUN_KEYS
    assert not TASK_KEYS & RUN_KEYS


@pytest.mark.parametrize("key", ["penalty", "density", "metric", "dtype"])
def test_keys_of_other_places_are_sent_home(key, base, tmp_path):
    recipe = recipe_of(base, tmp_path / "store")
    wrong = recipe.model_copy(update={"train": {**recipe.train, key: 1}})
    with pytest.raises(RecipeError, match=f"train: unknown key '{key}'; it belongs "):
        preflight(wrong)
