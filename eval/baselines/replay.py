"""Replay: full fine-tuning on a task's rows and a share of those of every earlier task."""

import random
from typing import Any

from transformers import TrainingArguments

from eval.baselines.baseline import Baseline, Fraction


class Replay(Baseline):
    """Needs the data of earlier tasks."""

    def __init__(self, *args: Any, share: Fraction) -> None:
        """`share` of an earlier task's rows is kept, drawn once."""
        super().__init__(*args)
        draw = random.Random(0)
        self.task_memories = [
            draw.sample(task, max(1, round(share * len(task)))) for task in self.tasks
        ]

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Train on the task and on what was kept of the earlier ones."""
        self.model.requires_grad_(True)
        earlier = [example for memory in self.task_memories[:number] for example in memory]
        self.train(self.model, [*self.tasks[number], *earlier], args)
