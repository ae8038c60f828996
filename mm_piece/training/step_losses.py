"""The loss of every step of a training: what a store records of it."""

import json
from collections.abc import Sequence
from math import (
    ceil,
    isfinite,
    nan,
)
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from mm_piece import distributed

_FILE = "losses.json"
_MOST_MEANS = 50  # as many as a small drawing can show


class StepLosses:
    """The losses of a training's steps, each the mean over all processes.

    They go into every checkpoint, so a training that was stopped has those of all its steps. A
    step's losses stay on the device until then: reading them would wait for the device.
    """

    def __init__(self) -> None:
        """Know no step yet."""
        self._collected: list[float] = []
        self._pending: list[Tensor] = []  # this process's own, of the steps after these

    def add(self, step: int, loss: Tensor) -> None:
        """Add the loss of one batch to that of a step, counted from 0."""
        index = step - len(self._collected)
        is_first_batch = index == len(self._pending)
        if is_first_batch:
            self._pending.append(loss)
            return

        earlier_batches = self._pending[index]
        self._pending[index] = earlier_batches + loss

    def collect(self) -> list[float]:
        """Return the losses of all steps so far; all processes call it together."""
        if self._pending:
            stacked = torch.stack(self._pending)
            own = stacked.cpu().double()
            total = distributed.all_reduce_sum(own)
            means = total / distributed.world_size()
            self._collected += means.tolist()
            self._pending = []
        return list(self._collected)

    def save(self, checkpoint: Path) -> None:
        """Write what has been collected into a checkpoint."""
        file = checkpoint / _FILE
        text = json.dumps(self._collected)
        file.write_text(text, encoding="utf-8")

    def restore(self, checkpoint: Path) -> None:
        """Read the losses of the steps before a checkpoint, which is named by their number."""
        file = checkpoint / _FILE
        if file.exists():
            text = file.read_text(encoding="utf-8")
            self._collected = json.loads(text)
            return

        # a checkpoint from before losses were recorded: no number, which nothing counts
        _, _, num_steps = checkpoint.name.rpartition("-")
        self._collected = [nan] * int(num_steps)


def average_losses(losses: Sequence[float]) -> dict[str, float]:
    """Return means over equally long runs of steps, by the last step of each."""
    num_steps = len(losses)
    length = ceil(num_steps / _MOST_MEANS) or 1
    means = {}
    for start in range(0, num_steps, length):
        stop = min(start + length, num_steps)
        part = losses[start:stop]
        mean = mean_of_finite(part)
        if mean is None:
            continue

        rounded = f"{mean:.6g}"
        means[str(stop)] = float(rounded)
    return means


def mean_of_finite(losses: Sequence[float]) -> float | None:
    """Return the mean of the losses that are numbers, None if none is.

    A loss that overflows in fp16 is none, and JSON could not hold it.
    """
    finite = [loss for loss in losses if isfinite(loss)]
    if not finite:
        return None
    return fmean(finite)
