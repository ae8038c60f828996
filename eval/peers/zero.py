"""Zero-shot: nothing is learned; the lower bound."""

from peers.peer import Peer
from transformers import TrainingArguments


class Zero(Peer):
    """The base, whatever comes."""

    entries = 0

    def learn(self, number: int, args: TrainingArguments) -> None:
        """Nothing."""
