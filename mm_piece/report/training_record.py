"""What a store records of each task's training: its time, and its loss over the steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm_piece.store.records import ManifestEntry
from mm_piece.store.results import parse_losses

LossCurve = list[tuple[int, float]]  # step, mean loss of the steps since the entry before


@dataclass(frozen=True)
class TrainingRecord:
    """The training of one task; None for what a store does not record."""

    position: int
    task: str
    select_seconds: float | None
    train_seconds: float | None
    mean_loss: float | None
    losses: LossCurve

    @property
    def seconds(self) -> float | None:
        """The time of both; one of them alone would make a task look cheap."""
        if self.select_seconds is None or self.train_seconds is None:
            return None
        return self.select_seconds + self.train_seconds


def read_training_records(
    results: Mapping[str, Any],
    entries: Sequence[ManifestEntry],
) -> list[TrainingRecord]:
    """Return the record of every task whose training a store's results tell anything of."""
    timings = results.get("seconds", {})
    records = []
    for entry in entries:
        timing = timings.get(entry.task, {})
        losses = parse_losses(results, entry.task)
        if not timing and not losses:
            continue

        record = TrainingRecord(
            position=entry.position,
            task=entry.task,
            select_seconds=_find_number(timing, "select"),
            train_seconds=_find_number(timing, "train"),
            mean_loss=_find_number(timing, "loss"),
            losses=losses,
        )
        records.append(record)
    return records


def _find_number(facts: Mapping[str, Any], key: str) -> float | None:
    """Return a number of a file that may hold anything, None if it is none that can be shown."""
    value = facts.get(key)
    # `type`, not isinstance: True is no number
    if type(value) is int or type(value) is float:
        return value if abs(value) < 2**63 else None
    return None
