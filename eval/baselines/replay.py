"""Replay: full fine-tuning on a task's rows and a share of those of every earlier task."""

import random
from typing import Any

from transformers import TrainingArguments

from eval.baselines.baseline import Baseline, Fraction


class Replay(Baseline):
    """Baseline that needs the data of earlier tasks."""

    def __init__(self, *args: Any, share: Fraction) -> None:
        """`share` of an earlier task's rows is stored, drawn once."""
        super().__init__(*args)
        draw = random.Random(0)
        self.task_memories = []
        for task in self.tasks:
            count = max(1, round(share * len(task)))
            self.task_memories.append(draw.sample(task, count))

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Train on the task and on the stored rows of the earlier ones."""
        self.model.requires_grad_(True)
        examples = list(self.tasks[number])
        for memory in self.task_memories[:number]:
            examples += memory
        self.train(self.model, examples, args)
