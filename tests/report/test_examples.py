"""The test questions that a page shows: which one stands for what, and its image."""

import pytest
from made_store import BASE, delta_for
from made_up_store import FakeStore, picture

import mm_piece.report
from mm_piece.data import read
from mm_piece.report import report_store, summarise_store
from mm_piece.report.examples import build_examples
from mm_piece.store.delta_store import DeltaStore

# Rows of one task, learned second of three: scores at the base and after each of them.
SCORES = {
    0: (0.0, 0.0, 0.0, 0.0),
    4: (0.0, 0.0, 1.0, 0.0),  # learned, forgotten
    5: (0.0, 1.0, 1.0, 0.0),  # learned, forgotten
    6: (1.0, 0.0, 1.0, 1.0),  # kept
    7: (0.5, 0.0, 1.0, 0.5),  # none of the three
    8: (0.0, 0.0, 1.0, 1.0),  # learned, kept
    9: (0.0, 1.0, 0.5, 1.0),  # not right at its own position
}
TASKS = ["first", "second", "third"]


def answers_of(scores, task="second"):
    """Answers at every position; a score of None was not taken."""
    found = []
    for position in range(len(next(iter(scores.values())))):
        rows = []
        for row, taken in scores.items():
            if taken[position] is not None:
                answer = {"row": row, "prompt": f"q{row}", "answer": "a", "prediction": "p"}
                rows.append({**answer, "score": taken[position]})
        found.append({task: rows})
    return found


def shown_in(examples, task="second"):
    return {example.row: example.kinds for example in examples[task].shown}


def test_one_of_each_kind_and_how_many_there_are():
    examples = build_examples(answers_of(SCORES), TASKS, None)
    assert shown_in(examples) == {4: ["learned"], 6: ["retained"], 5: ["forgotten"]}
    found = examples["second"]
    assert found.counts == {"learned": 3, "retained": 2, "forgotten": 2}
    assert (found.own_position, found.num_questions) == (2, 7)
    (first, *_) = found.shown
    assert [attempt.position for attempt in first.telling] == [0, 2, 3]
    assert [attempt.position for attempt in first.attempts] == [0, 1, 2, 3]


def test_a_question_may_stand_for_two_kinds():
    only = {row: SCORES[row] for row in (0, 4)}
    assert shown_in(build_examples(answers_of(only), TASKS, None)) == {4: ["learned", "forgotten"]}


def test_kinds_without_a_question_are_left_out():
    kept = build_examples(answers_of({6: SCORES[6]}), TASKS, None)
    assert (shown_in(kept), kept["second"].counts) == ({6: ["retained"]}, {"retained": 1})
    none = build_examples(answers_of({7: SCORES[7], 0: SCORES[0]}), TASKS, None)
    assert (shown_in(none), none["second"].counts) == ({7: []}, {})


def test_the_last_task_has_not_been_kept_or_forgotten():
    rows = {4: (0.0, 0.0, 1.0)}
    assert shown_in(build_examples(answers_of(rows), TASKS, None)) == {4: ["learned"]}


def test_a_task_whose_turn_has_not_come_is_not_shown():
    assert build_examples(answers_of({4: (0.0, 0.0)}), TASKS, None) == {}


def test_a_general_task_is_kept_or_forgotten_since_the_base():
    rows = {1: (1.0, 1.0, 0.0, 1.0), 2: (1.0, 1.0, 1.0, 0.0), 3: (0.0, 1.0, 1.0, 1.0)}
    examples = build_examples(answers_of(rows, "general"), TASKS, None)
    assert shown_in(examples, "general") == {1: ["retained"], 2: ["forgotten"]}


def test_a_question_that_was_not_asked_at_a_position_is_no_example_of_it():
    rows = {4: (None, 0.0, 1.0, 0.0), 5: (0.0, 0.0, None, 1.0)}
    assert shown_in(build_examples(answers_of(rows), TASKS, None)) == {4: ["forgotten"]}


def test_images_are_loaded_of_the_rows_that_are_shown():
    asked = []

    def load_images(task, rows):
        asked.append((task, rows))
        return {6: picture(6)}

    examples = build_examples(answers_of(SCORES), TASKS, load_images)
    assert asked == [("second", [4, 6, 5])]
    images = {example.row: example.image for example in examples["second"].shown}
    assert str(images.pop(6)).startswith("data:image/webp;base64,")
    assert images == {4: None, 5: None}


def test_every_kind_is_named_on_the_page():
    page = mm_piece.report.render_report(summarise_store(FakeStore()))
    assert '<span class="kind learned">learned</span>' in page
    assert "67 learned, 67 forgotten, of 200 questions" in page
    assert "none of these, of 200 questions" in page


@pytest.mark.parametrize("source", ["scenes:digits/test", "scenes:digits/test[2:5]"])
def test_images_come_from_the_recipe_s_data(source, tmp_path, monkeypatch):
    """By the row's number in the source, also where the recipe takes a part of it."""
    facts = {"family": "llava", "dtype": "float32", "parameters": 12, "bytes": 48}
    recipe = f"base: b\nstore: s\ntasks: [{{name: a, train: x, test: '{source}'}}]\n"
    store = DeltaStore.create(tmp_path / "store", BASE | facts, recipe)
    store.append(delta_for(store, "a"))
    store.write_results({"tasks": ["a"], "matrix": [[0.0], [1.0]]})
    for position, score in enumerate((0.0, 1.0)):
        store.write_answers(position, answers_of({3: (score,)}, "a")[0])

    shown = []

    def note_image(image):
        shown.append(image)
        return "data:image/webp;base64,"

    monkeypatch.setattr("mm_piece.report.examples.encode_data_uri", note_image)
    report_store(store.path)
    (image,) = shown
    (example,) = [example for example in read("scenes:digits/test[:5]") if example.row == 3]
    assert image.tobytes() == example.open_images()[0].tobytes()
