"""Training through transformers' Trainer: its settings, sparse values, checkpoints."""

from mm_piece.trainer.fitting import SparseTrainer, fit, last_checkpoint, rehearse
from mm_piece.trainer.settings import arguments, require_numbers

__all__ = ["SparseTrainer", "arguments", "fit", "last_checkpoint", "rehearse", "require_numbers"]
