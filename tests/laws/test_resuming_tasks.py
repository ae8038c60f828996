"""Laws 5 and 8 in every task: stopped in each, a run ends where one that was not stopped does.

What a task leaves behind in a live model (order, names, hooks) must not show in the next one: the
process that goes on has a model that was just loaded.
"""

import json

import pytest
import torch
from torch import nn

import mm_piece
from mm_piece.errors import StoreError
from mm_piece.recipe import parse_recipe
from mm_piece.store.delta_store import DeltaStore
from mm_piece.training.optimizer_state import restore_order, save_order
from mm_piece.training.trainer import SparseTrainer

RECIPE = """
base: {base}
store: {store}
tasks:
  - {{name: digits, train: "scenes:digits/train[:12]", test: "scenes:digits/test[:2]"}}
  - name: words
    train: "scenes:words/train[:12]"
    test: "scenes:words/test[:2]"
    train_settings: {{learning_rate: 5e-3, num_train_epochs: 1, per_device_train_batch_size: 2}}
  - {{name: charts, train: "scenes:charts/train[:12]", test: "scenes:charts/test[:2]"}}
select: {{method: {method}, density: {density}, samples: 4}}
train:
  learning_rate: 1e-2
  num_train_epochs: 2
  per_device_train_batch_size: 4
  save_steps: 2
  weight_decay: 0.1
  disable_tqdm: true
seed: {seed}
"""
TEXTS = [{"prompt": f"{n} and {n}?", "answer": "many " * (n % 3) + str(2 * n)} for n in range(12)]
# Sparse enough that of a norm's weight and bias one alone is often chosen; `kill.py` has more.
CASES = [
    ("llava", "random", 0.005, 12),
    ("llava", "piece-s", 0.01, 42),
    ("qwen2_vl", "random", 0.01, 5),
    ("llama", "piece-f", 0.02, 1),
]


class Crash(Exception):
    """Ends a run in the middle of a step."""


def recipe_of(base, store, family, method, density, seed, tmp_path):
    text = RECIPE.format(base=base, store=store, method=method, density=density, seed=seed)
    recipe = parse_recipe(text)
    if family != "llama":
        return recipe
    source = tmp_path / "texts.json"
    source.write_text(json.dumps(TEXTS), encoding="utf-8")
    update = {"train": str(source), "test": f"{source}[:2]"}
    tasks = tuple(task.model_copy(update=update) for task in recipe.tasks)
    return recipe.model_copy(update={"tasks": tasks})


def stop_in_task(monkeypatch, position, step):
    """Have a training raise before a step of a task; the rehearsal trains no third step."""
    before = SparseTrainer.training_step

    def crash(trainer, *args, **kwargs):
        folder = trainer.args.output_dir
        if folder.endswith(f"{position:04d}") and trainer.state.global_step == step:
            raise Crash
        return before(trainer, *args, **kwargs)

    monkeypatch.setattr(SparseTrainer, "training_step", crash)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_stopped_in_every_task(case, family_base, base, tmp_path, monkeypatch):
    folder = base if case[0] == "llava" else family_base(case[0])
    recipes = [recipe_of(folder, tmp_path / s, *case, tmp_path) for s in ("whole", "parts")]
    whole = mm_piece.train(recipes[0])
    for position in (1, 2, 3):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            stop_in_task(patch, position, step=3)
            mm_piece.train(recipes[1])
        assert len(DeltaStore.open(tmp_path / "parts")) == position - 1
        work = tmp_path / "parts" / "work"
        assert (work / f"{position:04d}" / "checkpoint-2").exists()
    parts = mm_piece.train(recipes[1])
    assert [e.sha256 for e in parts.entries] == [e.sha256 for e in whole.entries]
    assert parts.results()["matrix"] == whole.results()["matrix"]


def state_of(parameters, optimizer):
    return {
        name: {key: torch.as_tensor(value).clone() for key, value in optimizer.state[p].items()}
        for name, p in parameters.items()
    }


@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.SGD])
def test_the_state_of_an_optimizer_goes_by_names(factory, tmp_path):
    torch.manual_seed(0)
    named = {name: nn.Parameter(torch.randn(3)) for name in ("a", "b", "c")}
    optimizer = factory(named.values(), lr=0.1)
    for name, parameter in named.items():
        parameter.grad = torch.full((3,), float(ord(name)))
    optimizer.step()
    save_order(optimizer, named, tmp_path)
    before, saved = state_of(named, optimizer), optimizer.state_dict()

    other = factory([named[name] for name in "cab"], lr=0.1)
    other.load_state_dict(saved)
    restore_order(other, named, tmp_path)
    after = state_of(named, other)
    assert before.keys() == after.keys()
    for name, state in before.items():
        assert all(torch.equal(value, after[name][key]) for key, value in state.items())


def test_the_state_of_other_weights_is_refused(tmp_path):
    named = {name: nn.Parameter(torch.randn(3)) for name in ("a", "b")}
    save_order(torch.optim.SGD(named.values(), lr=0.1), named, tmp_path)
    fewer = {"a": named["a"]}
    with pytest.raises(StoreError, match="trains other weights"):
        restore_order(torch.optim.SGD(fewer.values(), lr=0.1), fewer, tmp_path)
