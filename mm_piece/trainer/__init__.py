"""Training through transformers' Trainer: its settings, sparse values, checkpoints."""

from mm_piece.trainer.fitting import SparseTrainer, fit, last_checkpoint
from mm_piece.trainer.rehearsing import rehearse
from mm_piece.trainer.saving import reported_writes
from mm_piece.trainer.settings import arguments
from mm_piece.trainer.stopping import Stop
from mm_piece.trainer.values import require_values

__all__ = [
    "SparseTrainer",
    "Stop",
    "arguments",
    "fit",
    "last_checkpoint",
    "rehearse",
    "reported_writes",
    "require_values",
]
