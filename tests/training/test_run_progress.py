"""What a run says while it trains: where it is, and about how long the rest takes."""

from types import SimpleNamespace

import pytest

import mm_piece
from mm_piece.recipe import parse_recipe
from mm_piece.training import run_progress
from mm_piece.training.callbacks import ProgressBar
from mm_piece.training.run_progress import RunProgress, count_steps, format_seconds
from mm_piece.training.trainer import SparseTrainer

RECIPE = """
base: {base}
store: {store}
tasks:
  - {{name: digits, train: "scenes:digits/train[:10]", test: "scenes:digits/test[:2]"}}
  - name: words
    train: "scenes:words/train[:7]"
    test: "scenes:words/test[:2]"
    train_settings: {{num_train_epochs: 2, per_device_train_batch_size: 3}}
select: {{method: random, density: 0.02}}
train: {{learning_rate: 1e-3, max_steps: 5, per_device_train_batch_size: 4, logging_steps: 1}}
"""


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(run_progress.time, "monotonic", lambda: clock.now)
    return clock


def test_the_rest_takes_what_was_seen(clock):
    _, words = parse_recipe(RECIPE.format(base="b", store="s")).tasks
    progress = RunProgress(3, {2: 10, 3: 20})
    progress.note_measuring(7)
    progress.begin_task(2, words)
    assert progress.title == "words (2 of 3)"

    clock.now += 30  # of scoring and selecting
    progress.begin_training(step=4)
    clock.now += 6  # three steps of two seconds each
    this_task = 3 * 2 + 7
    next_task = 30 + 20 * 2 + 7
    assert progress.estimate_seconds_left(7, 10) == pytest.approx(this_task + next_task)


def test_durations_read_as_clocks_do():
    assert [format_seconds(s) for s in (0.4, 59.6, 245, 3729)] == [
        "0:00",
        "1:00",
        "4:05",
        "1:02:09",
    ]


def state(step):
    return SimpleNamespace(global_step=step, max_steps=100, is_world_process_zero=True)


def test_without_a_terminal_each_tenth_is_a_line(clock, capsys):
    bar = ProgressBar(RunProgress(1, {}))
    bar.has_terminal = False
    bar.on_train_begin(None, state(0), None)
    for step in range(1, 101):
        clock.now += 1
        bar.on_step_end(None, state(step), None)
        bar.on_log(None, state(step), None, {"loss": 0.25})
    bar.on_log(None, state(100), None, {"train_runtime": 1.0})  # Trainer's last word
    bar.on_train_end(None, state(100), None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: step 1 of 100, loss 0.2500, 1:39 left"
    assert len(lines) == 10


@pytest.mark.slow
def test_steps_are_counted_as_they_are_trained(base, tmp_path, monkeypatch, capsys):
    recipe = parse_recipe(RECIPE.format(base=base, store=tmp_path / "store"))
    counted = [
        count_steps(recipe, task, number, batch)
        for task, number, batch in zip(recipe.tasks, (10, 7), (4, 3), strict=True)
    ]

    trained = []
    train = SparseTrainer.train

    def note_steps(trainer, *args, **options):
        done = train(trainer, *args, **options)
        trained.append(done.global_step)
        return done

    monkeypatch.setattr(SparseTrainer, "train", note_steps)
    mm_piece.train(recipe)
    assert trained[-2:] == counted == [5, 6]

    printed = capsys.readouterr().out
    assert "loading the base" in printed.splitlines()[0]
    assert "digits (1 of 2): step 1 of 5, loss " in printed
    assert "words (2 of 2): selected" in printed
    assert "embedding" not in printed  # none of its entries changed
