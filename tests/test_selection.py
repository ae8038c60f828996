"""Budgets per group where a task's rows do not reach every group."""

import json

import pytest

import mm_piece
from mm_piece.errors import SelectionError


@pytest.fixture
def recipe(base, tmp_path):
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    task = {"name": "sums", "train": f"{tmp_path}/text.json", "test": f"{tmp_path}/text.json[:1]"}

    def _recipe(**density):
        content = {
            "base": str(base),
            "store": str(tmp_path / "store"),
            "tasks": [{**task, "max_new_tokens": 1}],
            "select": {"density": density},
            "train": {"max_steps": 1, "learning_rate": 0.01},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(content))
        return tmp_path / "recipe.yaml"

    return _recipe


def test_a_task_of_texts_leaves_the_tower_alone(recipe):
    store = mm_piece.train(recipe(vision=0.1, projector=0.1, language=0.1))
    groups = store.delta(1).info["groups"]
    assert groups["vision"]["patchable"] == groups["vision"]["changed"] == 0
    assert groups["language"]["changed"] > 0


def test_a_budget_that_reaches_nothing_is_named(recipe):
    with pytest.raises(SelectionError, match=r"density 0.1 of 0 patchable entries \(vision\)"):
        mm_piece.train(recipe(vision=0.1))
