"""Training: a recipe's tasks in turn, each through transformers' Trainer over a mask's entries.

loop                the tasks of a recipe, resumable at any instant
run_setup           a recipe's run: its data, its store, its model
store_setup         the store that a run goes on with
preflight           settings that fit each other
recipe_check        `check`: settings, base, data and store, before training
data_check          what a task's rows look like to a base; answer_check: its answers to a metric
base_parts          whether the parts of a base fit each other
retention           importance K of what the model should retain; retention_run: in a run
penalty             the pull back to where a task found its entries

trainer             `SparseTrainer`, `fit`: transformers' Trainer over compact values
batches             which examples a process trains on in each step
loss                the mean over the tokens of the answers
causality           whether an answer is shown to itself
dry_run             a step that is tried before anything is written
callbacks, stopping, reporters, write_errors, optimizer_state

arguments           TrainingArguments from a recipe's `train:`
known_arguments     what becomes of each of their settings
values, effects, optimizers, schedules     their types and ranges; those that act beside others
"""

from mm_piece.training.arguments import arguments
from mm_piece.training.loop import train
from mm_piece.training.trainer import SparseTrainer, fit

__all__ = [
    "SparseTrainer",
    "arguments",
    "fit",
    "train",
]
