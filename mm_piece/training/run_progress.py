"""How far a run is: which task of how many, and about how long the rest takes."""

import time
from dataclasses import dataclass, field
from math import ceil

from mm_piece.recipe import Recipe, Task


@dataclass
class RunProgress:
    """The tasks that a run has yet to learn, and what those so far took.

    The time left is told from what steps take in this training, and from what the last task spent
    before its training and on being measured.
    """

    num_tasks: int
    steps_by_position: dict[int, int]  # of the tasks to learn, about
    position: int = 0
    title: str = "train"

    # what was seen so far, in seconds of a clock that only goes forward
    _task_began: float = field(default_factory=time.monotonic)
    _training_began: float = 0.0
    _first_step: int = 0
    _selecting_seconds: float = 0.0
    _measuring_seconds: float = 0.0

    def begin_task(self, position: int, task: Task) -> None:
        """Note that a task begins."""
        self.position = position
        self.title = f"{task.name} ({position} of {self.num_tasks})"
        self._task_began = time.monotonic()

    def begin_training(self, step: int) -> None:
        """Note that a training begins, after the steps of a checkpoint."""
        self._training_began = time.monotonic()
        self._first_step = step
        self._selecting_seconds = self._training_began - self._task_began

    def note_measuring(self, seconds: float) -> None:
        """Note how long it took to measure a position."""
        self._measuring_seconds = seconds

    def estimate_seconds_left(self, step: int, max_steps: int) -> float:
        """Return about how many seconds the run takes from a step of the training under way."""
        elapsed = time.monotonic() - self._training_began
        num_done = max(step - self._first_step, 1)
        step_seconds = elapsed / num_done

        num_steps = max_steps - step
        seconds = self._measuring_seconds
        for position, steps in self.steps_by_position.items():
            if position > self.position:
                num_steps += steps
                seconds += self._selecting_seconds
                seconds += self._measuring_seconds
        return seconds + step_seconds * num_steps


def count_steps(recipe: Recipe, task: Task, num_examples: int, batch_size: int) -> int:
    """Return about how many steps a task trains; rehearsal that comes to nothing is counted too."""
    settings = recipe.train_of(task)
    max_steps = settings.get("max_steps", -1)
    if max_steps > 0:
        return max_steps

    num_trained = num_examples * (1 + recipe.rehearsal)
    steps_per_epoch = ceil(num_trained / batch_size)
    epochs = settings.get("num_train_epochs", 3)
    return ceil(epochs * steps_per_epoch)


def format_seconds(seconds: float) -> str:
    """Return a duration as minutes and seconds, with hours where there are any: 4:05, 1:02:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"
