"""What a store records of a training's losses."""

from math import inf, nan
from statistics import fmean

import pytest
import torch

from mm_piece.training.step_losses import StepLosses, average_losses, mean_of_finite


def note(losses, first, parts):
    """Add steps from `first` on; each is the sum of its batches' losses."""
    for step, batches in enumerate(parts, first):
        for loss in batches:
            losses.add(step, torch.tensor(loss))


def test_the_batches_of_a_step_are_one_loss():
    losses = StepLosses()
    note(losses, 0, [(0.5, 0.25), (2.0,), (1.0, 1.0)])
    assert losses.collect() == [0.75, 2.0, 2.0]
    note(losses, 3, [(4.0, 0.5)])
    assert losses.collect() == losses.collect() == [0.75, 2.0, 2.0, 4.5]


def test_a_resumed_training_has_the_losses_of_all_its_steps(tmp_path):
    losses = StepLosses()
    note(losses, 0, [(1.0,), (nan,)])
    losses.collect()
    losses.save(tmp_path)
    note(losses, 2, [(7.0,)])  # this step is lost, and trained again

    resumed = StepLosses()
    resumed.restore(tmp_path)
    note(resumed, 2, [(3.0,), (5.0,)])
    assert resumed.collect() == pytest.approx([1.0, nan, 3.0, 5.0], nan_ok=True)


def test_a_checkpoint_without_losses_leaves_its_steps_out(tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    losses = StepLosses()
    losses.restore(checkpoint)
    note(losses, 2, [(3.0,)])
    assert average_losses(losses.collect()) == {"3": 3.0}


def test_a_store_gets_few_means():
    assert average_losses([]) == {}
    assert average_losses([2.0, 1.0]) == {"1": 2.0, "2": 1.0}
    losses = [1 / (step + 1) for step in range(123)]
    means = average_losses(losses)
    assert [*means] == [str(step) for step in [*range(3, 123, 3), 123]]
    assert means["6"] == pytest.approx(fmean(losses[3:6]), rel=1e-5)


def test_losses_that_are_no_numbers_are_left_out():
    losses = [1.0] * 100
    losses[0:2] = [nan, inf]
    losses[3] = nan
    means = average_losses(losses)
    assert "2" not in means and means["4"] == 1.0
    assert (mean_of_finite(losses), mean_of_finite([nan, inf])) == (1.0, None)
