"""Changed tests and metrics are measured anew; what was answered already is not asked again."""

import json
from shutil import copytree

import pytest
from forking import launch_forks
from launching import SUPPORT, done

import mm_piece
from mm_piece.errors import StoreError
from mm_piece.evaluation import answers as answering
from mm_piece.recipe import parse_recipe
from mm_piece.store.delta_store import DeltaStore

pytestmark = pytest.mark.slow

RECIPE = """
base: {base}
store: {store}
tasks:
  - {{name: digits, train: "scenes:digits/train[:8]", test: "scenes:digits/test[:4]", {short}}}
  - {{name: words, train: "scenes:words/train[:8]", test: "scenes:words/test[:4]", {short}}}
general:
  - {{name: base, test: "scenes:base/test[:4]", {short}}}
select: {{method: random, density: 0.02}}
train: {{learning_rate: 1e-2, max_steps: 2, per_device_train_batch_size: 4, disable_tqdm: true}}
"""
MORE = """\
  - {{name: charts, train: "scenes:charts/train[:8]", test: "scenes:charts/test[:4]", {short}}}
"""


def recipe_of(base, store, text=RECIPE):
    return parse_recipe(text.format(base=base, store=store, short="max_new_tokens: 4"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The folder of a store that has learned and measured the tasks of RECIPE."""
    folder = tmp_path_factory.mktemp("trained") / "store"
    mm_piece.train(recipe_of(base, folder))
    return folder


@pytest.fixture
def learned(trained, tmp_path):
    """A copy of that store."""
    return copytree(trained, tmp_path / "store")


@pytest.fixture
def asked(monkeypatch):
    """The names of the tasks that are answered, in order."""
    titles = []
    generate = answering.generate_answers

    def watch(*args, **options):
        titles.append(options["title"])
        return generate(*args, **options)

    monkeypatch.setattr(answering, "generate_answers", watch)
    return titles


def measured(store):
    results = store.results()
    rows = {key: results[key] for key in results if key not in ("seconds", "stability")}
    return rows, [store.answers(position) for position in range(len(store) + 1)]


WORDS = ["words"] * 3  # at every position
CHANGES = {
    "metric": ("words/test[:4]", 'words/test[:4]", metric: "edit', []),
    "test": ("words/test[:4]", "words/test[4:9]", WORDS),
    "length": ('words/test[:4]", {short}', 'words/test[:4]", max_new_tokens: 2', WORDS),
    "general": ("base/test[:4]", "base/test[:3]", ["base"] * 3),
    "renamed": ("{{name: base", "{{name: scenes", ["scenes"] * 3),
    "no general": ('general:\n  - {{name: base, test: "scenes:base/test[:4]", {short}}}\n', "", []),
    "general metric": ("base/test[:4]", 'base/test[:4]", metric: "edit', []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_test_is_measured_again_and_no_other(change, base, learned, tmp_path, asked):
    before, after, names = CHANGES[change]
    changed = RECIPE.replace(before, after)
    assert changed != RECIPE
    deltas = [entry.sha256 for entry in DeltaStore.open(learned).entries]

    again = mm_piece.train(recipe_of(base, learned, changed))
    assert asked == names
    assert [entry.sha256 for entry in again.entries] == deltas

    fresh = mm_piece.train(recipe_of(base, tmp_path / "fresh", changed))
    assert measured(again) == measured(fresh)


def test_a_further_task_is_asked_at_every_position_and_no_other(base, learned, tmp_path, asked):
    more = RECIPE.replace("general:", MORE + "general:")

    store = mm_piece.train(recipe_of(base, learned, more))
    assert asked == [*["charts"] * 3, "digits", "words", "charts", "base"]
    fresh = mm_piece.train(recipe_of(base, tmp_path / "fresh", more))
    assert measured(store) == measured(fresh)


def test_measuring_goes_on_where_it_stopped(base, learned, tmp_path, monkeypatch):
    """Between any two tasks, at any position, also while a changed test is measured again."""
    changed = RECIPE.replace("test[:4]", "test[4:8]")
    fresh = mm_piece.train(recipe_of(base, tmp_path / "fresh", changed))

    class Crash(Exception):
        pass

    generate = answering.generate_answers
    for _ in range(9):  # three tasks at three positions
        left = [1]

        def once(*args, left=left, **options):
            if not left:
                raise Crash
            left.pop()
            return generate(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(answering, "generate_answers", once)
            try:
                store = mm_piece.train(recipe_of(base, learned, changed))
            except Crash:
                continue
    assert measured(store) == measured(fresh)


def test_other_rows_under_the_same_name_are_asked(base, tmp_path, asked):
    rows = [{"prompt": f"{n} and {n}?", "answer": str(2 * n)} for n in range(4)]
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    text = RECIPE.replace("scenes:words/test[:4]", str(source))
    mm_piece.train(recipe_of(base, tmp_path / "store", text))

    rows[3]["answer"] = "six"
    source.write_text(json.dumps(rows), encoding="utf-8")
    more = text.replace("general:", MORE + "general:")
    asked.clear()
    store = mm_piece.train(recipe_of(base, tmp_path / "store", more))
    assert asked == [*["words", "charts"] * 3, "digits", "words", "charts", "base"]
    assert store.answers(0)["words"][3]["answer"] == "six"


def test_processes_agree_on_what_is_measured_again(base, learned, tmp_path):
    """Though one process alone forgets outdated results, and takes its time."""
    changed = RECIPE.replace('words/test[:4]"', 'words/test[:4]", metric: edit')
    changed = changed.replace("per_device_train_batch_size: 4", "per_device_train_batch_size: 2")
    recipe = tmp_path / "changed.yaml"
    text = changed.format(base=base, store=learned, short="max_new_tokens: 4")
    recipe.write_text(text, encoding="utf-8")
    done(launch_forks(2, str(SUPPORT / "slow_results.py"), "train", str(recipe)))

    fresh = mm_piece.train(
        recipe_of(base, tmp_path / "fresh", changed.replace("size: 2", "size: 4"))
    )
    assert measured(DeltaStore.open(learned)) == measured(fresh)


def test_what_was_trained_otherwise_is_still_refused(base, learned):
    for before, after in (
        ("digits/train[:8]", "digits/train[:7]"),
        ('words/test[:4]"', 'words/test[:4]", max_length: 99'),
        ("name: words", "name: letters"),
    ):
        with pytest.raises(StoreError, match=r"tasks\[[01]\]\.(train|max_length|name) was"):
            mm_piece.train(recipe_of(base, learned, RECIPE.replace(before, after)))
