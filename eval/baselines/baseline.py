"""What all baselines share: one model, the tasks' encoded examples, plain transformers training."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from mm_piece.data import collate

Examples = Sequence[dict[str, Tensor]]

# types of the baselines' options: an experiment's options are validated before anything runs
Count = PositiveInt
Strength = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Baseline:
    """Learner of task after task; each task starts from `model` as the last one left it."""

    def __init__(self, model: Any, tasks: Sequence[Examples], pad: int) -> None:
        """`tasks` holds the encoded training examples of the whole sequence, in order."""
        self.model = model
        self.tasks = tasks
        self.pad = pad

    @property
    def num_entries(self) -> int:
        """Number of entries that may change in a task."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Train on one task of the sequence."""
        self.model.requires_grad_(True)
        self.train(self.model, self.tasks[number], args)

    def train(self, model: Any, examples: Examples, args: TrainingArguments) -> None:
        """Train a model on some examples, and leave it in evaluation mode."""
        trainer = BaselineTrainer(
            self,
            model,
            args,
            self.collate_batch,  # type: ignore[arg-type]
            examples,
        )
        trainer.train()
        model.eval()

    def collate_batch(self, examples: Examples) -> dict[str, Tensor]:
        """Return the examples as one padded batch of model inputs."""
        return collate(examples, self.pad)

    def compute_penalty(
        self, model: Any, inputs: dict[str, Tensor], logits: Tensor
    ) -> Tensor | float:
        """Return what to add to the loss of the answers: 0, unless overridden."""
        return 0.0

    def adjust_gradients(self, model: Any) -> None:
        """Change a step's gradients before the optimizer step: no change, unless overridden."""


class BaselineTrainer(Trainer):
    """Trainer that adds its baseline's penalty and lets the baseline adjust the gradients."""

    def __init__(self, baseline: Baseline, *args: Any) -> None:
        super().__init__(*args)
        self.baseline = baseline

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss of the answers plus the baseline's penalty."""
        # the penalty may need the logits, whatever the caller wants back
        found = super().compute_loss(model, inputs, True, num_items_in_batch)
        assert isinstance(found, tuple)
        loss, outputs = found

        penalty = self.baseline.compute_penalty(model, inputs, outputs.logits)
        loss = loss + penalty
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, *args: Any, **options: Any) -> Tensor:
        """Run forward and backward, then let the baseline adjust the gradients."""
        loss = super().training_step(model, *args, **options)
        self.baseline.adjust_gradients(model)
        return loss
