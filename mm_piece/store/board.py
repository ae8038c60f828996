"""TensorBoard's files of a store, which are written where TensorBoard is installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def has_tensorboard() -> bool:
    """Return whether TensorBoard is installed."""
    return find_spec("tensorboard") is not None


def open_board(logs: Path) -> SummaryWriter | None:
    """Open a writer of TensorBoard's files in a folder; None where it is not installed."""
    if not has_tensorboard():
        return None

    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(logs))


def write_scores(logs: Path, scores: Mapping[str, float], position: int) -> None:
    """Write the score of each task at a position to TensorBoard's files, if it is installed."""
    board = open_board(logs)
    if board is None:
        return

    with board:
        for name, score in scores.items():
            board.add_scalar(f"score/{name}", score, position)
