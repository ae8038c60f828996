"""Graceful stops: what Ctrl-C, a hang-up and SIGTERM do to a training.

The first signal ends the run where it can go on later. Outside of training steps that is at once;
within them it is after the step, with a checkpoint. A further Ctrl-C ends the process immediately.
"""

import os
import signal
from collections.abc import Callable, Iterator
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
SignalHandler = Callable[[int, FrameType | None], object] | int
_OUTPUT_STREAMS = (1, 2)  # file descriptors of stdout and stderr


class GracefulStop(TrainerCallback):
    """Context that turns the first signal into a SystemExit of status 128 + its number.

    Signals that are ignored on entering (nohup, a shell's background jobs) stay ignored.
    """

    def __init__(self) -> None:
        self.requested_signal = 0  # its number; 0: none yet
        self.has_checkpoint = False  # all processes have agreed to stop, and there is a checkpoint
        self._is_deferring = False
        self._where_stopped = ""
        self._process_id = os.getpid()
        self._previous_handlers: list[tuple[signal.Signals, SignalHandler]] = []
        self._previous_wakeup_fd: int | None = None  # set from the first signal on

    def __enter__(self) -> "GracefulStop":
        if current_thread() is not main_thread():  # Python lets no other thread set handlers
            return self

        for number in SIGNALS:
            before = signal.getsignal(number)
            # None: a handler that was not set from Python, and could not be put back
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
            own_fd = signal.set_wakeup_fd(self._previous_wakeup_fd)
            os.close(own_fd)  # ends the thread that waits at the pipe's other end

    @contextmanager
    def deferring_stop(self) -> Iterator[None]:
        """Keep a stop waiting while the block runs, until the end of a training step or the block.

        All processes enter it together.
        """
        self._exit_if_requested()

        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False

        # a signal may have come to one process only
        self.requested_signal = self._signal_of_any_rank()
        self._exit_if_requested()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have all processes save and stop here if any of them has received a signal."""
        # every step asks this: one flag is cheaper than the gathered numbers
        if not distributed.any_rank(bool(self.requested_signal)):
            return

        self.requested_signal = self._signal_of_any_rank()
        self.has_checkpoint = True
        control.should_save = True
        control.should_training_stop = True

    def exit_run(self, place: str = "") -> None:
        """End the run; leaving the context prints `place` and how to go on."""
        # not printed here: a signal handler, which may call this, may have interrupted a print
        self._where_stopped = place
        raise SystemExit(128 + self.requested_signal)

    def _exit_if_requested(self) -> None:
        if self.requested_signal:
            self.exit_run()

    def _signal_of_any_rank(self) -> int:
        """Return the signal that any process has received, 0 if none has."""
        received = distributed.all_gather_items(
            [self.requested_signal],
            [distributed.rank()],
            distributed.world_size(),
        )
        return max(received)

    def _handle_signal(self, number: int, _: FrameType | None) -> None:
        """Note the first signal, and end the run unless a stop must wait."""
        if self.requested_signal:
            return
        if os.getpid() != self._process_id:  # a fork ends with this process
            return

        self.requested_signal = int(number)
        self._previous_wakeup_fd = _watch_for_interrupt()
        _drop_lost_terminal()
        if not self._is_deferring:
            self.exit_run()

        # os.write, as print may be what the signal interrupted
        if distributed.is_main():
            with suppress(OSError):  # a pipe may have lost its reader
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C: at once\n")


def ignore_stop_signals(_: int) -> None:
    """Keep a process that loads data running until the training process ends it."""
    for number in SIGNALS:
        if number != signal.SIGTERM:  # by which torch ends its workers
            signal.signal(number, signal.SIG_IGN)


def _watch_for_interrupt() -> int:
    """Have a further Ctrl-C end this process at once, in the middle of whatever it computes.

    Python's own handlers wait until a computation outside of Python returns; a thread does not.
    Returns the file descriptor to which Python wrote signals before.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as set_wakeup_fd requires
    waiter = Thread(target=_exit_on_sigint, args=(reading,), daemon=True)
    waiter.start()
    return signal.set_wakeup_fd(writing)


def _exit_on_sigint(reading: int) -> None:
    """End the process when SIGINT comes through a pipe; return when the pipe is closed."""
    with os.fdopen(reading, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] == signal.SIGINT:
                os._exit(128 + signal.SIGINT)


def _drop_lost_terminal() -> None:
    """Redirect output streams whose terminal is gone, as after a hang-up, to the null device."""
    for stream in _OUTPUT_STREAMS:
        try:
            os.write(stream, b"")  # writes nothing, and fails where nothing can be written
        except OSError:
            with open(os.devnull, "wb") as nothing:  # noqa: PTH123
                os.dup2(nothing.fileno(), stream)
