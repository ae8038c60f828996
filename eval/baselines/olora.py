"""O-LoRA (arXiv 2310.14152): the adapters of a sequence span subspaces orthogonal to each other."""

from typing import Any

from torch import Tensor

from eval.baselines.baseline import Count, Strength
from eval.baselines.lora import Lora

_DOWN = ".lora_A.default.weight"


class OLora(Lora):
    """Baseline with the penalty `strength` times the sum of |A_earlier A_now'|.

    The sum runs over layers and earlier tasks.
    """

    def __init__(
        self,
        *args: Any,
        rank: Count,
        strength: Strength = 0.5,
    ) -> None:
        super().__init__(*args, rank=rank)
        self.strength = strength
        self.earlier: dict[str, list[Tensor]] = {}

    def remember_adapter(self, adapted: Any) -> None:
        """Store the adapter's down-projections: the subspace that later adapters avoid."""
        for name, weight in _down_projections(adapted).items():
            stored = self.earlier.setdefault(name, [])
            stored.append(weight.detach().clone())

    def compute_penalty(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        logits: Tensor,
    ) -> Tensor | float:
        """Return how far the adapter is from orthogonal to the earlier ones."""
        now = _down_projections(model)
        total = 0
        for name, earlier_weights in self.earlier.items():
            for before in earlier_weights:
                overlap = before @ now[name].t()  # (rank, rank)
                total = total + overlap.abs().sum()
        return self.strength * total


def _down_projections(model: Any) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: weight for name, weight in named if name.endswith(_DOWN)}
