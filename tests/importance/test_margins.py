"""What answers stand on: against a loop over tokens, each with a backward pass of its own."""

from importlib import import_module
from itertools import product

import pytest
import torch

from mm_piece import importance
from mm_piece.data import EncodedList, LengthGroupedBatches, collate, encode, read
from mm_piece.families import weights
from mm_piece.importance import margin_sensitivity
from mm_piece.models.base import load_base

module = import_module("mm_piece.importance.margins")


@pytest.fixture(scope="module")
def world(base):
    """A model and examples with answers of one to several tokens, some without an image."""
    model, processor = load_base(base)
    rows = read("scenes:charts/train[:4]")
    said = [row.with_answer(text) for row, text in zip(rows, ("a", "bc", "def", "g"), strict=True)]
    return model, [encode(row, processor) for row in said]


def leads(model, example):
    """The lead of every answer token, with its graph, and the tokens."""
    labels = example["labels"][0, 1:]
    logits = model(**{k: v for k, v in example.items() if k != "labels"}).logits[0, :-1]
    found = []
    for place in (labels != -100).nonzero().flatten().tolist():
        row, token = logits[place], int(labels[place])
        other = max(float(v) for n, v in enumerate(row.tolist()) if n != token)
        runner_up = next(n for n, v in enumerate(row.tolist()) if n != token and v == other)
        found.append(row[token] - row[runner_up])
    return found


def by_loop(model, examples):
    """Mean over examples of the mean over tokens of (dm/dw / max(m, 1)) ** 2."""
    named = {name: weight for name, weight in weights(model).items()}
    for weight in named.values():
        weight.requires_grad_(True)
    total = {name: torch.zeros_like(weight) for name, weight in named.items()}
    for example in examples:
        count = len(leads(model, example))
        for number in range(count):
            lead = leads(model, example)[number]
            if lead <= 0:
                continue
            found = torch.autograd.grad(lead, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    step = gradient / max(float(lead.detach()), 1.0)
                    total[name] += step.square() / count / len(examples)
    for weight in named.values():
        weight.requires_grad_(False)
    return total


def with_leading_answers(model, examples):
    """The same examples, answered with what the model itself would say, token by token."""
    for example in examples:
        labels = example["labels"][0, 1:]
        for place in (labels != -100).nonzero().flatten().tolist():
            inputs = {k: v for k, v in example.items() if k != "labels"}
            token = int(model(**inputs).logits[0, place].argmax())
            example["input_ids"][0, place + 1] = example["labels"][0, place + 1] = token
    return examples


def test_over_all_signs_the_mean_is_that_of_the_tokens(world, monkeypatch):
    model, examples = world
    with torch.no_grad():
        own = with_leading_answers(model, [{k: v.clone() for k, v in examples[1].items()}])
    expected = by_loop(model, own)
    count = len(leads(model, own[0]))
    assert count > 1
    total = {}
    for signs in product((-1.0, 1.0), repeat=count):
        monkeypatch.setattr(module, "_draw_signs", lambda *_, s=signs: torch.tensor(s))
        for name, found in importance.estimate(model, own, objective=margin_sensitivity).items():
            total[name] = total.get(name, 0) + found / 2**count
    assert sum(float(expected[name].sum()) for name in total) > 0
    for name, found in total.items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-9)


def test_tokens_that_others_lead_have_nothing_at_stake(world):
    model, examples = world
    last = {k: v.clone() for k, v in examples[0].items()}
    place = int((last["labels"][0] != -100).nonzero()[0])
    with torch.no_grad():
        inputs = {k: v for k, v in last.items() if k != "labels"}
        worst = int(model(**inputs).logits[0, place - 1].argmin())
    last["labels"][:] = -100
    last["labels"][0, place] = last["input_ids"][0, place] = worst
    found = importance.estimate(model, [last], objective=margin_sensitivity)
    assert all(not scores.any() for scores in found.values())
    fisher = importance.estimate(model, [last])
    assert any(scores.any() for scores in fisher.values())


def test_batches_give_what_single_examples_give(world):
    model, examples = world
    with torch.no_grad():
        own = with_leading_answers(model, [{k: v.clone() for k, v in e.items()} for e in examples])
    alone = importance.estimate(model, own, objective=margin_sensitivity)
    together = importance.estimate(
        model, LengthGroupedBatches(EncodedList(own, 0), 4), objective=margin_sensitivity
    )
    one = importance.estimate(
        model, [collate(own, 0)], objective=margin_sensitivity, memory=200_000
    )
    assert sum(float(scores.sum()) for scores in alone.values()) > 0
    for name, scores in alone.items():
        largest = float(scores.max())
        for other in (together[name], one[name]):
            torch.testing.assert_close(other, scores, rtol=1e-3, atol=1e-5 * largest + 1e-12)


def test_nothing_answered_is_nothing(world):
    model, examples = world
    empty = {k: v.clone() for k, v in examples[0].items()}
    empty["labels"][:] = -100
    with torch.no_grad():
        assert float(margin_sensitivity(model, collate([examples[0], empty], 0))) == pytest.approx(
            float(margin_sensitivity(model, examples[0])), rel=1e-4
        )
