"""Masks as published: the library's selections against the formulas, written out in a few lines.

PIECE (arXiv 2511.15375), FGGM (arXiv 2601.18261) and MIGU as their texts and public code have them:
gradients from plain autograd, whole tensors held at once, `torch.topk` and `torch.quantile`.
"""

import pytest
import torch
from torch import nn

from mm_piece.data import EncodedDataset, EncodedList, LengthGroupedBatches, read
from mm_piece.families import weights
from mm_piece.models.base import load_base
from mm_piece.recipe import SelectionSettings
from mm_piece.selection.task import select_for_task

ROWS = "scenes:charts/train[:12]"


@pytest.fixture(scope="module")
def task(base, tmp_path_factory):
    """A model, and a task's examples as the library reads them."""
    model, processor = load_base(base)
    folder = tmp_path_factory.mktemp("encoded")
    return model, EncodedDataset(read(ROWS), processor, folder)


def ours(task, folder, **settings):
    model, encoded = task
    select = SelectionSettings(**settings)
    found = select_for_task(model, encoded, select, folder / "masks", seeds=(0, 0), cache_key={})
    return {name: set(index.tolist()) for name, index in found.mask.items()}


def gradients(model, batches):
    """The gradient of each batch's mean loss, by name."""
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        yield {n: p.grad.clone() for n, p in weights(model).items() if p.grad is not None}
    model.zero_grad()


def global_top(scores, density):
    """The coordinates of the `density * N` largest scores of all tensors together."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    threshold = flat.topk(int(density * len(flat))).values[-1]
    return {n: set((s.flatten() >= threshold).nonzero()[:, 0].tolist()) for n, s in scores.items()}


def rows_above(score, shape, alpha=0.7):
    """Flat indices of the entries of those rows whose score is not below the quantile."""
    kept = score >= torch.quantile(score, alpha)
    full = kept.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    return set(full.flatten().nonzero()[:, 0].tolist())


def same(found, expected):
    expected = {name: chosen for name, chosen in expected.items() if chosen}
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert sum(map(len, expected.values())) > 100


@pytest.mark.parametrize("density", [0.01, 0.2])
def test_piece_f_official(task, tmp_path, density):
    model, encoded = task
    found = ours(task, tmp_path, method="piece-f-official", density=density, **SUMS)
    fisher = {}
    for batch in gradients(model, in_micro_batches(encoded)):
        fisher = {name: fisher.get(name, 0) + g**2 for name, g in batch.items()}
    same(found, global_top(fisher, density))


@pytest.mark.parametrize("density", [0.01, 0.2])
def test_piece_s_official(task, tmp_path, density):
    model, encoded = task
    found = ours(task, tmp_path, method="piece-s-official", density=density, **SUMS)
    fisher, total = {}, {}
    for batch in gradients(model, in_micro_batches(encoded)):
        fisher = {name: fisher.get(name, 0) + g**2 for name, g in batch.items()}
        total = {name: total.get(name, 0) + g for name, g in batch.items()}
    signal = {name: total[name].abs() / torch.sqrt(fisher[name] + 1.0) for name in total}
    same(found, global_top(signal, density))


def test_fggm(task, tmp_path):
    model, encoded = task
    found = ours(task, tmp_path, method="fggm")
    fisher = {}
    for example in gradients(model, encoded):
        fisher = {name: fisher.get(name, 0) + g**2 / len(encoded) for name, g in example.items()}
    # "Layout": what a weight sums over is summed; a vector's entries are rows of their own.
    rows = {name: f if f.dim() == 1 else f.flatten(1).sum(1) for name, f in fisher.items()}
    # A key's bias moves all of a query's logits alike: its gradient is nil, and rounding ranks it.
    told = [name for name in found if not name.endswith("k_proj.bias")]
    assert len(found) - len(told) == 2
    expected = {name: rows_above(rows[name], fisher[name].shape) for name in told}
    same({name: found[name] for name in told}, expected)


def test_migu(task, tmp_path):
    model, encoded = task
    found = ours(task, tmp_path, method="migu")
    named, sums = {id(weight): name for name, weight in weights(model).items()}, {}

    def listen(layer, _, output):
        name = named[id(layer.weight)]
        sums[name] = sums.get(name, 0) + output.abs().sum((0, 1))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(listen) for layer in layers]
    for example in encoded:
        with torch.no_grad():
            model(**example)
    for handle in handles:
        handle.remove()
    shapes = {name: weight.shape for name, weight in weights(model).items()}
    same(found, {name: rows_above(sums[name], shapes[name]) for name in found})


SUMS = {"batch_size": 4, "exclude": ()}


def in_micro_batches(encoded):
    """The batches that the library makes of the examples in the order of its seed."""
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(0)).tolist()
    return LengthGroupedBatches(
        EncodedList([encoded[place] for place in order], 0), SUMS["batch_size"], windowed=False
    )
