"""What holds for every scoring rule and any text."""

import json
import random
import re
import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_piece import recipe
from mm_piece.errors import RecipeError
from mm_piece.metrics.answers import ANSWER_METRICS

# Any text, and text in which rules find something: short words, digits, marks, articles, labels.
ANY = st.text(max_size=30)
BUSY = st.lists(
    st.sampled_from(["a", "A", "the", "cat", "two", "5", "1,000", ".5", "-", ".", ")", " ", "\n"]),
    max_size=8,
).map("".join)
TEXT = ANY | BUSY
TASK = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=5)), max_size=5)


def one(metric, prediction, *accepted):
    return ANSWER_METRICS[metric]([prediction], [list(accepted)])[0]


def apart(task):
    return [said for said, _ in task], [answers for _, answers in task]


def test_metrics_are_those_of_the_recipe():
    assert set(ANSWER_METRICS) == set(get_args(recipe.MetricName))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ANSWER_METRICS)
@given(task=TASK)
def test_scores_are_fractions_one_per_example(metric, task):
    scores = ANSWER_METRICS[metric](*apart(task))
    assert len(scores) == len(task)
    assert all(type(score) is float and 0 <= score <= 1 for score in scores)  # no NaN either


@pytest.mark.slow
@pytest.mark.parametrize("metric", ANSWER_METRICS)
@given(task=TASK, seed=st.integers(0, 9))
def test_permuted_examples_have_permuted_scores(metric, task, seed):
    order = random.Random(seed).sample(range(len(task)), len(task))
    scores = ANSWER_METRICS[metric](*apart(task))
    assert ANSWER_METRICS[metric](*apart([task[i] for i in order])) == [scores[i] for i in order]


@pytest.mark.parametrize("metric", sorted(set(ANSWER_METRICS) - {"cider"}))
@given(text=TEXT)
def test_a_perfect_prediction_scores_one(metric, text):
    assert one(metric, text, text) == 1
    assert one(metric, text, *[text] * 10) == 1


@pytest.mark.parametrize("metric", ["exact", "choice", "rouge-l", "edit"])
@given(said=TEXT, answers=st.lists(TEXT, min_size=1, max_size=3), more=TEXT)
def test_a_further_accepted_answer_never_lowers_the_score(metric, said, answers, more):
    assert one(metric, said, *answers, more) >= one(metric, said, *answers)


@pytest.mark.parametrize("metric", ANSWER_METRICS)
@given(answer=TEXT.filter(str.strip))
def test_nothing_said_scores_nothing(metric, answer):
    assert one(metric, "", answer) == 0
    assert ANSWER_METRICS[metric](["", "cat"], [[answer], ["cat"]])[0] == 0


@pytest.mark.parametrize("metric", ANSWER_METRICS)
def test_an_empty_task_and_lone_surrogates_are_legal(metric):
    assert ANSWER_METRICS[metric]([], []) == []
    assert ANSWER_METRICS[metric](["\ud800", "b"], [["c"], ["d"]]) == [0, 0]


@pytest.mark.parametrize("metric", ANSWER_METRICS)
def test_predictions_and_answers_are_pairs(metric):
    with pytest.raises(ValueError):
        ANSWER_METRICS[metric](["a", "b"], [[""]])


@pytest.mark.parametrize(
    ("metric", "module", "install"),
    [
        ("cider", "pycocoevalcap.cider.cider", "pycocoevalcap: pip install 'mm-piece[captions]'"),
        ("bleu", "sacrebleu.metrics.bleu", "sacrebleu: pip install 'mm-piece[bleu]'"),
    ],
)
def test_a_metric_says_what_to_install(monkeypatch, metric, module, install):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=rf"^metric '{metric}' needs {re.escape(install)}$"):
        ANSWER_METRICS[metric]([], [])


@pytest.mark.slow
def test_the_libraries_wait_until_a_rule_runs():
    names = ["torch", "sacrebleu", "rapidfuzz", "pycocoevalcap", "nltk"]
    code = "import json, sys, mm_piece.metrics.answers; print(json.dumps(list(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(names) & set(json.loads(out.stdout))
