"""Sequential full fine-tuning: every weight trains on every task in turn."""

from eval.baselines.baseline import Peer as Full

__all__ = ["Full"]
