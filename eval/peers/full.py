"""Sequential full fine-tuning: every weight trains on every task in turn."""

from typing import Any

from transformers import Trainer, TrainingArguments

from mm_piece.tasks import collate


def learn(model: Any, examples: list[Any], args: TrainingArguments, pad: int, **_: Any) -> Any:
    """Train all weights on one task; the model that goes on to the next."""
    model.requires_grad_(True)
    Trainer(model, args, lambda batch: collate(batch, pad), examples).train()  # type: ignore[arg-type]
    return model.eval()


def trainable(model: Any, **_: Any) -> int:
    """Entries that may change."""
    return sum(parameter.numel() for parameter in model.parameters())
