"""Scoring rules, and greedy answers that do not depend on how examples are batched."""

import pytest

from mm_piece.evaluation import by_kind, evaluate, exact, generate, mean_score, normalise, vqa
from mm_piece.models import load_base
from mm_piece.tasks import read


@pytest.mark.parametrize(
    ("prediction", "accepted", "score"),
    [
        ("A Red circle.", ["red circle"], 1),
        ("the  CAT", ["cat!"], 1),
        ("1,000", ["1.000"], 1),
        ("3.5", ["35"], 0),
        ("", ["x"], 0),
        ("two", ["three", "two"], 1),
    ],
)
def test_exact(prediction, accepted, score):
    assert exact(prediction, accepted) == score


def test_vqa_counts_agreeing_annotators():
    answers = ["red"] * 2 + ["blue"] * 8
    assert vqa("Red", answers) == pytest.approx(2 / 3)
    assert vqa("blue", answers) == 1
    assert vqa("green", answers) == 0
    assert vqa("red", ["red"]) == 1


def test_normalise():
    assert normalise("An  apple, the 2.50!") == "apple 2.50"


def test_answers_do_not_depend_on_the_batch(base):
    model, processor = load_base(base)
    examples = read("scenes:charts/test[:5]") + read("scenes:digits/test[:3]")
    together = generate(model, processor, examples, 4)
    alone = [generate(model, processor, [example], 4)[0] for example in examples]
    assert together == alone


def test_evaluate_scores_every_row(base):
    model, processor = load_base(base)
    examples = read("scenes:base/test[:7]")
    answers = evaluate(model, processor, examples, max_new_tokens=2)
    assert [answer["row"] for answer in answers] == list(range(7))
    for answer in answers:
        assert answer["score"] == exact(answer["prediction"], [answer["answer"]])
    kinds = by_kind(answers)
    assert set(kinds) == {example.kind for example in examples}
    assert mean_score(answers) == sum(answer["score"] for answer in answers) / 7
