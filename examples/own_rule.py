"""An importance rule of your own: in Python, and in a recipe that names it.

From the repository's root: python examples/own_rule.py
"""

from tempfile import TemporaryDirectory

import mm_piece
from mm_piece.data import encode, read
from mm_piece.importance import Moments, Rule
from mm_piece.recipe import parse_recipe


def measure_agreement(moments: Moments):
    """Score an entry by how far all examples would move it the same way, from 0 to 1."""
    return moments.mean**2 / (moments.square + moments.xi)


# The rule reads two means over the examples: of gradients, and of their squares.
agreement = Rule(measure_agreement, needs=("mean", "square"))

RECIPE = """
base: checkpoints/tiny/base
tasks:
  - {name: textures, train: "scenes:textures/train[:96]", test: "scenes:textures/test[:20]",
     max_new_tokens: 8}
select: {method: own_rule.agreement, density: 0.05, samples: 48}
train: {learning_rate: 8e-3, num_train_epochs: 2, disable_tqdm: true}
"""

if __name__ == "__main__":
    model, processor = mm_piece.load("checkpoints/tiny/base")
    examples = [encode(example, processor) for example in read("scenes:textures/train[:16]")]
    scores = mm_piece.estimate(model, examples, method="own_rule.agreement")
    mask = mm_piece.select(scores, density=0.05)
    print(f"in Python: {sum(map(len, mask.values())):,} entries of {len(mask)} weights")

    with TemporaryDirectory() as folder:
        mm_piece.train(parse_recipe(f"{RECIPE}store: {folder}"))
