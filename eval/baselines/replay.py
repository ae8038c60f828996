"""Replay: full fine-tuning on a task's rows and a share of those of every earlier task."""

import random
from typing import Any

from transformers import TrainingArguments

from eval.baselines.baseline import Peer, Share


class Replay(Peer):
    """Needs the data of earlier tasks."""

    def __init__(self, *args: Any, share: Share) -> None:
        """`share` of an earlier task's rows is kept, drawn once."""
        super().__init__(*args)
        draw = random.Random(0)
        self.kept = [draw.sample(task, max(1, round(share * len(task)))) for task in self.tasks]

    def learn(self, number: int, args: TrainingArguments) -> None:
        """Train on the task and on what was kept of the earlier ones."""
        self.model.requires_grad_(True)
        earlier = [example for kept in self.kept[:number] for example in kept]
        self.train(self.model, [*self.tasks[number], *earlier], args)
