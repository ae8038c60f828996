"""Zero-shot: nothing is learned; the lower bound."""

from transformers import TrainingArguments

from eval.baselines.baseline import Baseline


class Zero(Baseline):
    """The base, whatever comes."""

    num_entries = 0

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Nothing."""
