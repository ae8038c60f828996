"""Training through transformers' Trainer: its settings, sparse values, checkpoints."""

from mm_piece.trainer.fitting import SparseTrainer, fit, last_checkpoint, rehearse
from mm_piece.trainer.saving import reported_writes
from mm_piece.trainer.settings import arguments, require_numbers
from mm_piece.trainer.stopping import Stop

__all__ = [
    "SparseTrainer",
    "Stop",
    "arguments",
    "fit",
    "last_checkpoint",
    "rehearse",
    "reported_writes",
    "require_numbers",
]
