"""Ship what two tasks taught as one file, and have it elsewhere on the base, bit for bit.

From the repository's root: python examples/ship_one_delta.py [FOLDER]
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

import torch

import mm_piece
from mm_piece.data import read

STORE = "checkpoints/tiny"
BASE = "checkpoints/tiny/base"

# Here: the first two tasks of a store become one delta, a file.
folder = Path(sys.argv[1] if sys.argv[1:] else mkdtemp())
file = folder / "two-tasks.safetensors"
mm_piece.squash(STORE, at=2).save(file)
size = Path(BASE, "model.safetensors").stat().st_size
print(f"{file}: {file.stat().st_size:,} bytes; the model itself has {size:,}")

# Elsewhere: the base and that file are enough. Both are verified, down to each value replaced.
shipped, processor = mm_piece.load(BASE, delta=file)

original, _ = mm_piece.load(BASE, store=STORE, at=2)
weights = zip(shipped.state_dict().values(), original.state_dict().values(), strict=True)
print("the same bits as in the store:", all(torch.equal(a, b) for a, b in weights))

questions = read("scenes:textures/test[:50]")
for answer in mm_piece.evaluate(shipped, processor, questions, max_new_tokens=8)[:3]:
    print(f"{answer['prompt']} {answer['prediction']} (right: {answer['answer']})")
