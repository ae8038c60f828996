"""Sequential SHiRA (arXiv 2406.13175, PEFT): a random sparse adapter per task, merged.

It has as many entries of each linear layer as LoRA of the same rank.
"""

from typing import Any

from peft import PeftConfig, ShiraConfig

from eval.baselines.adapters import AdapterBaseline
from eval.baselines.baseline import Count


class Shira(AdapterBaseline):
    """Baseline with a fresh random pattern for every task."""

    def __init__(self, *args: Any, rank: Count) -> None:
        super().__init__(*args)
        self.rank = rank
        self.last_seed = 0

    def make_config(self, linear: str) -> PeftConfig:
        """Return a SHiRA configuration with another seed each time."""
        self.last_seed += 1
        return ShiraConfig(
            r=self.rank,
            random_seed=self.last_seed,
            target_modules=linear,
        )
