"""Trainer callbacks that act between the steps of a training."""

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mm_piece.distributed.progress import print_line
from mm_piece.plaintext import make_printable
from mm_piece.training.run_progress import RunProgress, format_seconds

_LINES_PER_TRAINING = 10


class ProgressBar(TrainerCallback):
    """Progress bar with speed, the last loss and the time that is left.

    Without a terminal it prints a line for each tenth of the training, for whoever reads the log.
    """

    def __init__(self, progress: RunProgress) -> None:
        """Show nothing yet: the bar appears when a training begins."""
        self.progress = progress
        self.bar = tqdm(disable=True)
        self.has_terminal = sys.stderr.isatty()
        self.next_line = 0  # step from which on a line is due

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress.begin_training(state.global_step)
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=make_printable(self.progress.title),
            unit="step",
            leave=False,
            # None: no bar where no terminal is
            disable=None if state.is_world_process_zero else True,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # the bar may have begun at the step of a checkpoint
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return

        loss = float(logs["loss"])
        step, steps = state.global_step, state.max_steps
        seconds = self.progress.estimate_seconds_left(step, steps)
        left = format_seconds(seconds)
        self.bar.set_postfix_str(f"loss {loss:.3f}, all tasks {left} left")

        if not self.has_terminal and step >= self.next_line:
            print_line(
                f"{self.progress.title}: step {step} of {steps}, loss {loss:.4f}, {left} left"
            )
            self.next_line = step + steps / _LINES_PER_TRAINING

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.close()


class StopAfterOneStep(TrainerCallback):
    """Callback that stops a training after its first step."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_training_stop = True
