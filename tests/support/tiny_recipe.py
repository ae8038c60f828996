"""A recipe of three short tasks on the tiny base, and what a run of it leaves."""

from mm_piece.recipe import parse_recipe

RECIPE = """
base: {base}
store: {store}
model: {{dtype: {dtype}}}
tasks:
  - {{name: digits, train: "scenes:digits/train[:24]", test: "scenes:digits/test[:4]"}}
  - {{name: words, train: "scenes:words/train[:24]", test: "scenes:words/test[:4]"}}
  - {{name: charts, train: "scenes:charts/train[:24]", test: "scenes:charts/test[:4]"}}
general:
  - {{name: base, test: "scenes:base/test[:4]", max_new_tokens: 2}}
select: {{method: {method}, density: 0.02, samples: 6}}
train:
  learning_rate: 1e-2
  num_train_epochs: 1
  per_device_train_batch_size: 4
  save_steps: 2
  disable_tqdm: true
seed: 3
"""


def recipe_for(base, store, method="piece-f", dtype="float32"):
    return parse_recipe(RECIPE.format(base=base, store=store, method=method, dtype=dtype))


def deltas_of(store):
    return [entry.sha256 for entry in store.entries]


def measured(store):
    return {key: value for key, value in store.results().items() if key != "seconds"}
