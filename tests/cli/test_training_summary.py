"""What `train` says at its end about scores."""

from made_store import BASE, RECIPE, delta_for

from mm_piece.cli.training_summary import print_summary
from mm_piece.store.delta_store import DeltaStore


def summarise(folder, capsys, matrix):
    """What is printed of a store with these scores of the tasks `a`, `b`."""
    store = DeltaStore.create(folder, {**BASE, "bytes": 48}, RECIPE)
    for task in ("a", "b"):
        store.append(delta_for(store, task))
    store.write_results({"tasks": ["a", "b"], "matrix": matrix})
    print_summary(store)
    return capsys.readouterr().out


def test_a_task_that_training_did_not_raise_is_pointed_out(tmp_path, capsys):
    # `b` had risen with `a` already, and did not rise by its own training
    said = summarise(tmp_path / "one", capsys, [[0.0, 0.0], [0.5, 0.2], [0.5, 0.2]])
    assert "training did not raise the score of b: look" in said

    said = summarise(tmp_path / "both", capsys, [[0.3, 0.2], [0.2, 0.2], [0.2, 0.1]])
    assert "training did not raise the score of a, b: look" in said


def test_learned_tasks_and_those_that_were_right_already_are_not(tmp_path, capsys):
    said = summarise(tmp_path / "one", capsys, [[0.0, 0.9], [0.5, 1.0], [0.5, 1.0]])
    assert "did not raise" not in said
