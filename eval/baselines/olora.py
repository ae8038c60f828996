"""O-LoRA (arXiv 2310.14152): the adapters of a sequence span subspaces orthogonal to each other."""

from typing import Any

from torch import Tensor

from eval.baselines.baseline import Count, Strength
from eval.baselines.lora import Lora

_DOWN = ".lora_A.default.weight"


class OLora(Lora):
    """The price is `strength` times the sum of |A_earlier A_now'| over layers and earlier tasks."""

    def __init__(self, *args: Any, rank: Count, strength: Strength = 0.5) -> None:
        super().__init__(*args, rank=rank)
        self.strength = strength
        self.earlier: dict[str, list[Tensor]] = {}

    def remember_adapter(self, adapted: Any) -> None:
        """Remember what the adapter projects onto."""
        for name, weight in _down_projections(adapted).items():
            self.earlier.setdefault(name, []).append(weight.detach().clone())

    def compute_penalty(
        self, model: Any, inputs: dict[str, Tensor], logits: Tensor
    ) -> Tensor | float:
        """How far the adapter is from orthogonal to the earlier ones."""
        now = _down_projections(model)
        overlaps = (
            (before @ now[name].t()).abs().sum()
            for name, earlier_weights in self.earlier.items()
            for before in earlier_weights
        )
        return self.strength * sum(overlaps)


def _down_projections(model: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if name.endswith(_DOWN)}
