"""Sequential full fine-tuning: every weight trains on every task in turn."""

from eval.baselines.baseline import Baseline as Full

__all__ = ["Full"]
