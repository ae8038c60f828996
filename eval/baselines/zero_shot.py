"""Zero-shot: the base learns nothing; the lower bound."""

from transformers import TrainingArguments

from eval.baselines.baseline import Baseline


class Zero(Baseline):
    """The base, unchanged by every task."""

    @property
    def num_entries(self) -> int:
        """No entry may change."""
        return 0

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Leave the model as it is."""
