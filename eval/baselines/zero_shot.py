"""Zero-shot: nothing is learned; the lower bound."""

from transformers import TrainingArguments

from eval.baselines.baseline import Peer


class Zero(Peer):
    """The base, whatever comes."""

    entries = 0

    def learn(self, number: int, args: TrainingArguments) -> None:
        """Nothing."""
