"""Greedy answers that do not depend on how examples are batched."""

from mm_piece.evaluation import by_kind, evaluate, generate, mean_score
from mm_piece.models import load_base
from mm_piece.scoring import exact
from mm_piece.tasks import read


def test_answers_do_not_depend_on_the_batch(base):
    model, processor = load_base(base)
    examples = [*read("scenes:charts/test[:5]"), *read("scenes:digits/test[:3]")]
    together = generate(model, processor, examples, 4)
    alone = [generate(model, processor, [example], 4)[0] for example in examples]
    assert together == alone


def test_evaluate_scores_every_row(base):
    model, processor = load_base(base)
    examples = read("scenes:base/test[:7]")
    answers = evaluate(model, processor, examples, max_new_tokens=2)
    assert [answer["row"] for answer in answers] == list(range(7))
    for answer in answers:
        assert answer["score"] == exact([answer["prediction"]], [[answer["answer"]]])[0]
    kinds = by_kind(answers)
    assert set(kinds) == {example.kind for example in examples}
    assert mean_score(answers) == sum(answer["score"] for answer in answers) / 7
