"""TensorBoard's files of a store: scores over the positions, or nothing where it is missing."""

import sys

import pytest

from mm_piece.store.board import has_tensorboard, open_board, write_scores


def test_scores_are_written_over_the_positions(tmp_path):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for position, score in enumerate([0.25, 0.5]):
        write_scores(tmp_path, {"digits": score}, position)

    events = module.EventAccumulator(str(tmp_path)).Reload()
    scalars = events.Scalars("score/digits")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(0, 0.25), (1, 0.5)]


def test_nothing_is_written_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert not has_tensorboard()
    assert open_board(tmp_path) is None
    write_scores(tmp_path, {"digits": 0.25}, 0)
    assert not list(tmp_path.iterdir())
