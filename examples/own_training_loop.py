"""Train 5 % of a model's weights on a new task, in a plain loop with AdamW.

From the repository's root: python examples/own_training_loop.py
"""

import torch

import mm_piece
from mm_piece.data import collate, encode, read

torch.manual_seed(0)
model, processor = mm_piece.load("checkpoints/tiny/base")
examples = [encode(example, processor) for example in read("scenes:textures/train[:96]")]
questions = read("scenes:textures/test[:30]")


def count_right_answers() -> int:
    answers = mm_piece.evaluate(model, processor, questions, max_new_tokens=8)
    return round(sum(answer["score"] for answer in answers))


print(f"before: {count_right_answers()} of {len(questions)} right")

scores = mm_piece.estimate(model, examples, method="piece-s")
mask = mm_piece.select(scores, density=0.05)

with mm_piece.sparse_tuning(model, mask) as tuning:
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=8e-3)
    for _ in range(4):
        for chosen in torch.randperm(len(examples)).split(8):
            batch = collate([examples[number] for number in chosen], pad=0)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    delta = tuning.delta(task="textures")

print(f"after:  {count_right_answers()} of {len(questions)} right")
print(f"{delta.entries:,} of {model.num_parameters():,} weights changed")
