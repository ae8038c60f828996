"""What all peers share: one model, the tasks' encoded examples, plain transformers training."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import Trainer, TrainingArguments

from mm_piece.data import collate

Examples = Sequence[dict[str, Tensor]]

# What options of peers may be; an experiment's are held against them before anything runs.
Count = PositiveInt
Strength = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class Peer:
    """Learns task after task; `model` is what the next one starts from."""

    def __init__(self, model: Any, tasks: Sequence[Examples], pad: int) -> None:
        """`tasks` holds the encoded training examples of the whole sequence, in order."""
        self.model, self.tasks, self.pad = model, tasks, pad

    @property
    def entries(self) -> int:
        """How many entries may change in a task."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def learn(self, number: int, args: TrainingArguments) -> None:
        """Train on one task of the sequence."""
        self.model.requires_grad_(True)
        self.train(self.model, self.tasks[number], args)

    def train(self, model: Any, examples: Examples, args: TrainingArguments) -> None:
        """Plain training on some examples; the model is ready to answer afterwards."""
        Learning(self, model, args, self.batch, examples).train()  # type: ignore[arg-type]
        model.eval()

    def batch(self, examples: Examples) -> dict[str, Tensor]:
        """Examples side by side, as the model takes them."""
        return collate(examples, self.pad)

    def price(self, model: Any, inputs: dict[str, Tensor], logits: Tensor) -> Tensor | float:
        """What a step's loss has beside that of the answers."""
        return 0.0

    def project(self, model: Any) -> None:
        """What happens to the gradients of a step before the optimizer sees them."""


class Learning(Trainer):
    """A Trainer that asks its peer for a price, and to look at the gradients."""

    def __init__(self, peer: Peer, *args: Any) -> None:
        super().__init__(*args)
        self.peer = peer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        """The loss of the answers, and the peer's price."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        loss = loss + self.peer.price(model, inputs, outputs.logits)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, *args: Any, **options: Any) -> Tensor:
        """Forward, backward, and what the peer does to the gradients."""
        loss = super().training_step(model, *args, **options)
        self.peer.project(model)
        return loss
