"""What a process that trains imports; `forking` has it imported once."""

import gc
from importlib import import_module

FAMILIES = ("clip", "llama", "llava", "qwen3_vl")  # of the models that most forks train

import_module("mm_piece.cli")
import_module("mm_piece.evaluation.matrix")
import_module("mm_piece.store.loading")
import_module("mm_piece.training.loop")
for family in FAMILIES:
    import_module(f"transformers.models.{family}.modeling_{family}")

gc.collect()
gc.freeze()  # full collections of a fork pass over what it has of its own
