"""What all baselines share: one model, the tasks' encoded examples, plain transformers training."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import Trainer, TrainingArguments

from mm_piece.data import collate

Examples = Sequence[dict[str, Tensor]]

# What options of baselines may be; an experiment's are held against them before anything runs.
Count = PositiveInt
Strength = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Baseline:
    """Learns task after task; `model` is what the next one starts from."""

    def __init__(self, model: Any, tasks: Sequence[Examples], pad: int) -> None:
        """`tasks` holds the encoded training examples of the whole sequence, in order."""
        self.model, self.tasks, self.pad = model, tasks, pad

    @property
    def num_entries(self) -> int:
        """How many entries may change in a task."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Train on one task of the sequence."""
        self.model.requires_grad_(True)
        self.train(self.model, self.tasks[number], args)

    def train(self, model: Any, examples: Examples, args: TrainingArguments) -> None:
        """Plain training on some examples; the model is ready to answer afterwards."""
        BaselineTrainer(self, model, args, self.collate_batch, examples).train()  # type: ignore[arg-type]
        model.eval()

    def collate_batch(self, examples: Examples) -> dict[str, Tensor]:
        """Examples side by side, as the model takes them."""
        return collate(examples, self.pad)

    def compute_penalty(
        self, model: Any, inputs: dict[str, Tensor], logits: Tensor
    ) -> Tensor | float:
        """What a step's loss has beside that of the answers."""
        return 0.0

    def adjust_gradients(self, model: Any) -> None:
        """What happens to the gradients of a step before the optimizer sees them."""


class BaselineTrainer(Trainer):
    """A Trainer that asks its baseline for a price, and to look at the gradients."""

    def __init__(self, baseline: Baseline, *args: Any) -> None:
        super().__init__(*args)
        self.baseline = baseline

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        """The loss of the answers, and the baseline's price."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        loss = loss + self.baseline.compute_penalty(model, inputs, outputs.logits)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, *args: Any, **options: Any) -> Tensor:
        """Forward, backward, and what the baseline does to the gradients."""
        loss = super().training_step(model, *args, **options)
        self.baseline.adjust_gradients(model)
        return loss
