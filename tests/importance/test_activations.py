"""MIGU's scores: what linear layers give out, whatever the batches and the budget."""

import pytest
import torch
from torch import nn

from mm_piece.data import EncodedList, LengthGroupedBatches, encode, read
from mm_piece.families import weights
from mm_piece.importance import estimate, find_scorable_names
from mm_piece.models.base import load_base
from mm_piece.selection import select


@pytest.fixture(scope="module")
def model_and_examples(base):
    model, processor = load_base(base)
    rows = [*read("scenes:words/train[:3]"), *read("scenes:relations/train[:3]")]
    return model, [encode(example, processor) for example in rows]


@torch.no_grad()
def loop(model, examples):
    """Per linear layer the mean over examples of the sum over tokens of |output|."""
    named = {id(weight): name for name, weight in weights(model).items()}
    sums, handles = {}, []
    for module in model.modules():
        if type(module) is nn.Linear:
            name = named[id(module.weight)]

            def add(_, __, output, name=name):
                total = output.double().abs().flatten(0, -2).sum(0)
                sums[name] = sums.get(name, 0) + total / len(examples)

            handles.append(module.register_forward_hook(add))
    for example in examples:
        model(**example)
    for handle in handles:
        handle.remove()
    return sums


def test_equals_the_loop(model_and_examples):
    model, examples = model_and_examples
    expected, scores = loop(model, examples), estimate(model, examples, "migu")
    reached = find_scorable_names(model, examples, "piece-f")
    assert set(scores) == set(expected) & set(reached)
    assert len(scores) > 10
    for name, score in scores.items():
        assert score.shape == weights(model)[name].shape
        rows = expected[name].float()[:, None].expand(score.shape)
        torch.testing.assert_close(score, rows, rtol=1e-4, atol=1e-6)


def test_padding_does_not_count(model_and_examples):
    model, examples = model_and_examples
    lengths = {example["input_ids"].shape[1] for example in examples}
    assert len(lengths) > 1
    alone, together = (
        estimate(model, examples, "migu"),
        estimate(model, LengthGroupedBatches(EncodedList(examples, 0), 5), "migu"),
    )
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory", [60, 1000])
def test_budget_changes_nothing(model_and_examples, memory, monkeypatch):
    from mm_piece.importance import activations

    model, examples = model_and_examples
    passes = []
    monkeypatch.setattr(
        activations,
        "_sum_outputs",
        lambda *args, real=activations._sum_outputs: passes.append(args[2]) or real(*args),
    )
    whole = estimate(model, examples[:1], "migu")
    cut = estimate(model, examples[:1], "migu", memory=memory)
    assert len(passes) > 2
    assert all(4 * sum(r.stop - r.start for r in block) <= memory for block in passes[1:])
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_rows_that_give_out_most_are_chosen(model_and_examples):
    """MIGU as published: rows at or above the quantile 0.7 of each layer."""
    model, examples = model_and_examples
    mask = select(estimate(model, examples, "migu"), 0.3, unit="row", scope="tensor")
    for name, total in loop(model, examples).items():
        if name in mask:
            kept = (total >= total.quantile(0.7)).nonzero().flatten()
            width = weights(model)[name].shape[1]
            assert mask[name].view(-1, width)[:, 0].tolist() == (kept * width).tolist()
            assert len(mask[name]) == len(kept) * width
