"""Sequential LoRA (PEFT): one adapter per task on every linear layer, merged before the next."""

from typing import Any

from peft import LoraConfig, PeftConfig

from eval.baselines.adapters import AdapterBaseline
from eval.baselines.baseline import Count


class Lora(AdapterBaseline):
    """Baseline with a fresh LoRA adapter of `rank` for every task."""

    def __init__(self, *args: Any, rank: Count) -> None:
        super().__init__(*args)
        self.rank = rank

    def make_config(self, linear: str) -> PeftConfig:
        """Return a LoRA configuration with twice the rank as alpha."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules=linear,
        )
