"""Checkpoints of a task in progress, and the settings handed to transformers."""

import json

import pytest

from mm_piece.errors import RecipeError
from mm_piece.trainer import arguments, last_checkpoint


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path / "absent") is None
    for step, state in ((2, json.dumps({})), (10, json.dumps({})), (12, '{"global_st'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_settings_go_through_as_they_stand(tmp_path):
    args = arguments({"learning_rate": 3e-4, "max_steps": 7}, tmp_path, seed=5)
    assert (args.learning_rate, args.max_steps, args.seed) == (3e-4, 7, 5)


@pytest.mark.parametrize("settings", [{"learning_rte": 1e-4}, {"lr_scheduler_type": "sideways"}])
def test_settings_that_transformers_refuses(tmp_path, settings):
    with pytest.raises(RecipeError, match="train: .*(learning_rte|sideways)"):
        arguments(settings, tmp_path, seed=1)
