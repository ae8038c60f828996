"""What a process that trains imports; `forking` has it imported once."""

import gc
import os
from importlib import import_module
from importlib.util import find_spec

import torch

FAMILIES = ("clip", "llama", "llava", "qwen3_vl")  # of the models that most forks train

import_module("mm_piece.cli")
import_module("mm_piece.evaluation.matrix")
import_module("mm_piece.importance.estimation")
import_module("mm_piece.store.loading")
import_module("mm_piece.training.loop")
for family in FAMILIES:
    import_module(f"transformers.models.{family}.modeling_{family}")

if find_spec("tensorboard"):
    import_module("torch.utils.tensorboard")
if find_spec("deepspeed"):
    if not torch.cuda.is_available():
        # DeepSpeed would say on stdout that it found no accelerator, in the middle of JSON too
        os.environ["DS_ACCELERATOR"] = "cpu"
    # every engine imports it, and torch's compiler with it
    import_module("deepspeed.runtime.zero.muon.original_muon")

gc.collect()
gc.freeze()  # full collections of a fork pass over what it has of its own
