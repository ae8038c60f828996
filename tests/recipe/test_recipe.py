"""Recipes: strict, with errors of one line that name the thing and what is allowed."""

from typing import get_args

import pytest

import mm_piece
from mm_piece import recipe
from mm_piece.errors import RecipeError
from mm_piece.metrics.answers import ANSWER_METRICS as SCORING
from mm_piece.recipe import as_recipe, load_recipe, parse_bytes, parse_recipe
from mm_piece.training.recipe_check import check

GOOD = """
base: some/base
store: checkpoints/x
tasks:
  - {name: a, train: a.json, test: b.json}
train: {learning_rate: 1e-5}
"""


def test_overrides_change_a_file_alone(tmp_path):
    """Of a recipe that was read already they would be lost, in silence."""
    parsed = parse_recipe(GOOD)
    assert as_recipe(parsed) is parsed
    with pytest.raises(RecipeError, match="'seed=7' overrides a recipe's file, and this recipe"):
        as_recipe(parsed, ["seed=7"])
    for run in (mm_piece.train, check):
        with pytest.raises(RecipeError, match="'seed=7' overrides"):
            run(parsed, "seed=7")
    (tmp_path / "a.yaml").write_text(GOOD)
    assert as_recipe(tmp_path / "a.yaml", ["seed=7"]).seed == 7


def test_paths_are_expanded_as_a_shell_would(monkeypatch, tmp_path):
    home, rows = str(tmp_path / "home"), str(tmp_path / "rows")
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("DATA", rows)
    monkeypatch.delenv("ABSENT", raising=False)
    text = GOOD.replace("some/base", "~/base").replace("checkpoints/x", "$DATA/x")
    text = text.replace("a.json", "'${DATA}/a.json[:5]'").replace("b.json", "~b/$ABSENT.json")
    parsed = parse_recipe(text, "text", ["select.cache=~/masks"])
    assert (parsed.base, parsed.store) == (f"{home}/base", f"{rows}/x")
    (task,) = parsed.tasks
    assert (task.train, task.test) == (f"{rows}/a.json[:5]", "~b/$ABSENT.json")
    assert parsed.select.cache == f"{home}/masks"
    assert parse_recipe(parsed.to_yaml()) == parsed


def test_defaults_and_numbers():
    parsed = parse_recipe(GOOD)
    assert parsed.train == {"learning_rate": 1e-5}
    assert parsed.select.density == 0.001
    assert parsed.select.exclude == ("embedding", "head")
    assert parse_recipe(parsed.to_yaml()) == parsed


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("2E3", 2000.0), ("-1.5e+2", -150.0), ("1.0", 1.0), (".5", 0.5)],
)
def test_numbers_as_people_write_them(text, value):
    assert parse_recipe(GOOD.replace("1e-5", text)).train["learning_rate"] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "densty: 0.1\n", "unknown key 'densty'"),
        (GOOD + "select: {densty: 0.1}\n", "unknown key 'select.densty'; did you mean 'density'"),
        (GOOD + "taks: []\n", "did you mean 'tasks'"),
        (GOOD + "select: {density: 1.5}\n", r"density 1.5 is out of \(0, 1\]"),
        (GOOD + "select: {density: 0}\n", r"density 0.0 is out of \(0, 1\]"),
        (GOOD + "select: {density: {vision: 2}}\n", r"density 2.0 is out of \(0, 1\]"),
        (GOOD + "select: {density: {tower: 0.1}}\n", "vision"),
        (
            GOOD + "select: {method: piece-x}\n",
            "unknown method 'piece-x'; allowed: piece-f, piece-s",
        ),
        (GOOD + "select: {memory: 8gigs}\n", "KiB, MiB, GiB"),
        (GOOD + "seed: -1\n", "seed"),
        (
            GOOD.replace("test: b.json", "tset: b.json"),
            "unknown key 'tasks.0.tset'; did you mean 'test'",
        ),
        (GOOD.replace("base: some/base", ""), "missing key 'base'"),
        (GOOD.replace("{name: a, train: a.json, test: b.json}", ""), "tasks"),
        ("base: x\nstore: y\ntasks: []\n", "tasks"),
        ("- a\n", "must be a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_are_one_line(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(text)
    assert "\n" not in str(caught.value)


TASK = "{name: a, train: a.json, test: b.json}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("b.json}", "b.json, prompt: Is it?}"), r"line \d, column \d+: .* in quotes"),
        (GOOD.replace("b.json}", "b.json, prompt: Red, or not}"), "'tasks.0.or not'; .* in quotes"),
        (
            GOOD.replace("b.json}", "b.json, prompt: yes}"),
            "tasks.0.prompt: .* not True; put it in quotes",
        ),
        (
            GOOD.replace("train: a.json", "train: "),
            "tasks.0.train: must be a text, not None; give one, or leave the key out",
        ),
        ("base: a: b\n", "line 1, column 8: .* in quotes"),
        (GOOD + "select: {samples: many}\n", "select.samples: must be a whole number, not 'many'"),
        (GOOD + "select: {samples: 0}\n", "select.samples: must be at least 1, not 0"),
        (GOOD + "select: {xi: 0}\n", "select.xi: must be above 0, not 0"),
        (GOOD + "penalty: high\n", "penalty: must be a number, not 'high'"),
        (GOOD + "rehearsal: 2\n", "rehearsal: must be at most 1, not 2"),
        (GOOD + "seed: 1.5\n", "seed: must be a whole number, not 1.5"),
        (GOOD + "general: {name: g, test: b.json}\n", "general: must be a list, .* not {'name'"),
        (GOOD + "select: piece-s\n", "select: must be a mapping, {key: value}, not 'piece-s'"),
        (
            GOOD.replace("name: a,", "name: a/b,"),
            "tasks.0.name: must be a letter or digit, .* 'a/b'",
        ),
        (GOOD.replace("name: a,", "name: '',"), "tasks.0.name: must be a letter or digit, .* ''"),
        ("base: x\nstore: y\ntasks: []\n", "tasks: must not be empty"),
        ("base: x\nstore: ''\ntasks: [" + TASK + "]\n", "store: must be at least 1 characters"),
    ],
)
def test_values_are_described_in_our_words(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(text)
    shown = str(caught.value)
    assert "\n" not in shown
    for word in ("Input", "should", "valid", "dictionary", "instance", "unicode", "parse"):
        assert word not in shown.split(": ", 1)[1], word


@pytest.mark.parametrize(
    ("text", "home"),
    [
        ("learning_rate: 1e-4\n", "under `train` or under a task's `train_settings`"),
        ("bf16: true\n", "under `train`"),
        ("dtype: bfloat16\n", "under `model`"),
        ("density: 0.01\n", "in a task of `tasks` or under `select`"),
        ("method: piece-s\n", "under `select`"),
        ("metric: vqa\n", "in a task of `tasks`"),
        ("select: {penalty: 0.1}\n", "beside `tasks`"),
        ("select: {num_train_epochs: 1}\n", "under `train` or under a task's `train_settings`"),
    ],
)
def test_a_key_in_the_wrong_place_is_sent_home(text, home):
    with pytest.raises(RecipeError, match=f"unknown key '.*'; it belongs {home}$"):
        parse_recipe(GOOD + text)
    moved = GOOD.replace("b.json}", "b.json, max_steps: 3}")
    with pytest.raises(RecipeError, match="'tasks.0.max_steps'; it belongs under `train` or"):
        parse_recipe(moved)


def test_task_names_are_unique():
    double = GOOD.replace("tasks:", "tasks:\n  - {name: a, train: c.json, test: d.json}")
    with pytest.raises(RecipeError, match="'a' is used twice"):
        parse_recipe(double)


def test_overrides():
    changed = parse_recipe(
        GOOD, overrides=["select.density=1e-2", "tasks.0.name=z", "train.max_steps=3", "seed=7"]
    )
    assert (changed.select.density, changed.tasks[0].name, changed.seed) == (0.01, "z", 7)
    assert changed.train == {"learning_rate": 1e-5, "max_steps": 3}


@pytest.mark.parametrize(
    "override", ["density", "=3", "tasks.9.name=x", "base.x=1", "seed=[", "nope=1"]
)
def test_bad_overrides(override):
    with pytest.raises(RecipeError):
        parse_recipe(GOOD, overrides=[override])


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="cannot read recipe .*absent.yaml: No such file"):
        load_recipe(tmp_path / "absent.yaml")


def test_sizes():
    assert parse_bytes("8GiB") == 2**33
    assert parse_bytes("1.5 MiB") == 3 * 2**19
    assert parse_bytes(4096) == 4096


def test_names_in_the_recipe_are_those_of_the_registries():
    assert tuple(SCORING) == get_args(recipe.MetricName)
