"""Stop where a run can go on: what Ctrl-C, a hang-up and SIGTERM do to a training.

A first signal ends the run at the next good place: at once outside of training steps, after a
checkpoint within them. Ctrl-C once more ends the process there and then.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mm_piece import distributed
from mm_piece.distributed.progress import print_line

SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if name in signal.Signals.__members__  # not every system has hang-ups
)
_OUTPUT_STREAMS = (1, 2)  # the descriptors of stdout and stderr


class GracefulStop(TrainerCallback):
    """Context in which the first signal becomes a SystemExit of status 128 + its number.

    Signals that are ignored on entering (nohup, a shell's background jobs) stay ignored.
    """

    def __init__(self) -> None:
        self.requested_signal = 0  # the signal
        self.has_checkpoint = False  # all processes have agreed to stop, and there is a checkpoint
        self._is_deferring, self._where_stopped = False, ""
        self._previous_wakeup_fd: int | None = None  # what was told of signals before the first one

    def __enter__(self) -> "GracefulStop":
        self._process_id, self._previous_handlers = os.getpid(), []
        if current_thread() is main_thread():  # no other one may listen
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._previous_handlers.append((number, before))
                    signal.signal(number, self._handle_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.requested_signal and kind is SystemExit:
            print_line(f"stopped{self._where_stopped}; the same command goes on from there")
        for number, before in self._previous_handlers:
            signal.signal(number, before)
        if self._previous_wakeup_fd is not None:
            os.close(
                signal.set_wakeup_fd(self._previous_wakeup_fd)
            )  # which ends the thread that waits

    @contextmanager
    def deferring_stop(self) -> Iterator[None]:
        """Context in which a stop waits: for the end of a training step, or of the context.

        All processes go through it.
        """
        self._exit_if_requested()
        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False
        self.requested_signal = self._signal_of_any_rank()
        self._exit_if_requested()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have all processes save and stop here if any of them was asked to."""
        if distributed.any_rank(bool(self.requested_signal)):
            self.requested_signal = self._signal_of_any_rank()
            self.has_checkpoint = control.should_save = control.should_training_stop = True

    def exit_run(self, place: str = "") -> None:
        """End the run; on leaving the context it says at which `place`, and how to go on."""
        self._where_stopped = (
            place  # a handler of signals must not print: it may have interrupted a print
        )
        raise SystemExit(128 + self.requested_signal)

    def _exit_if_requested(self) -> None:
        if self.requested_signal:
            self.exit_run()

    def _signal_of_any_rank(self) -> int:
        """The signal that any process has heard, 0 if none has."""
        return max(
            distributed.all_gather_items(
                [self.requested_signal], [distributed.rank()], distributed.world_size()
            )
        )

    def _handle_signal(self, number: int, _: FrameType | None) -> None:
        if (
            self.requested_signal or os.getpid() != self._process_id
        ):  # a fork ends with this process
            return
        self.requested_signal = int(number)
        self._previous_wakeup_fd = _watch_for_interrupt()
        _drop_lost_terminal()
        if not self._is_deferring:
            self.exit_run()
        if distributed.is_main():
            with suppress(OSError):  # a pipe may have lost its reader
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C: at once\n")


def ignore_stop_signals(_: int) -> None:
    """Go on in a process that loads data until the main process ends it."""
    for number in SIGNALS:
        if number != signal.SIGTERM:  # that is how it does
            signal.signal(number, signal.SIG_IGN)


def _watch_for_interrupt() -> int:
    """Have a further Ctrl-C end this process at once, in the middle of whatever it computes.

    Python's own handlers wait until a computation outside of Python returns; a thread does not.
    Returns the descriptor that was told of signals before.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    Thread(target=_exit_on_sigint, args=(reading,), daemon=True).start()
    return signal.set_wakeup_fd(writing)


def _exit_on_sigint(reading: int) -> None:
    with os.fdopen(reading, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] == signal.SIGINT:
                os._exit(128 + signal.SIGINT)


def _drop_lost_terminal() -> None:
    """After a hang-up: write into nothing what a terminal that is gone would refuse."""
    for stream in _OUTPUT_STREAMS:
        try:
            os.write(stream, b"")
        except OSError:
            with open(os.devnull, "wb") as nothing:  # noqa: PTH123
                os.dup2(nothing.fileno(), stream)
