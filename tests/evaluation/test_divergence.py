"""The divergence from the base, against a loop of single examples and torch's own."""

from pathlib import Path

import pytest
import torch

import mm_piece
from mm_piece.data import encode, read
from mm_piece.evaluation.answers import generate_batch
from mm_piece.evaluation.divergence import measure_divergence
from mm_piece.models.base import tensors
from mm_piece.store.delta_store import DeltaStore

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"
ROWS = {"base": 9, "digits": 5}


@pytest.fixture(scope="module")
def examples():
    return [row for name, count in ROWS.items() for row in read(f"scenes:{name}/test[:{count}]")]


@torch.no_grad()
def loop(examples, at):
    """KL(base, position) by torch.nn.KLDivLoss, one example at a time, with two models."""
    base, processor = mm_piece.load(TINY / "base", store=TINY, at=0)
    model, _ = mm_piece.load(TINY / "base", store=TINY, at=at)
    total, tokens = 0.0, 0
    for example in examples:
        (text,) = generate_batch(base, processor, [example], 24)
        inputs = encode(example.with_answer(text), processor)
        answer = inputs["labels"][0, 1:] != -100
        then, now = (
            torch.log_softmax(m(**inputs).logits[0, :-1][answer].double(), -1)
            for m in (base, model)
        )
        total += float(torch.nn.KLDivLoss(reduction="sum", log_target=True)(now, then))
        tokens += int(answer.sum())
    return total / tokens


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3])
def test_equals_the_loop(examples, at):
    model, processor = mm_piece.load(TINY / "base", store=TINY, at=2)
    found = measure_divergence(model, processor, examples, at, max_new_tokens=24, batch_size=4)
    assert found == pytest.approx(loop(examples, at), rel=1e-3)
    assert found > 0.01
    there = tensors(mm_piece.load(TINY / "base", store=TINY, at=at)[0])
    assert all(torch.equal(tensor, there[name]) for name, tensor in tensors(model).items())


def test_the_base_is_where_it_is(examples):
    model, processor = mm_piece.load(TINY / "base", store=TINY, at=1)
    assert measure_divergence(model, processor, examples, 0, max_new_tokens=24) == 0


@pytest.mark.slow
def test_does_not_depend_on_the_parts(examples, monkeypatch):
    model, processor = mm_piece.load(TINY / "base", store=TINY, at=1)
    whole = measure_divergence(model, processor, examples, 2, max_new_tokens=24)
    monkeypatch.setattr("mm_piece.evaluation.divergence._EXAMPLES_PER_CHUNK", 5)
    assert measure_divergence(model, processor, examples, 2, max_new_tokens=24) == pytest.approx(
        whole
    )


@pytest.mark.slow
def test_the_shipped_store_goes_further_from_its_base():
    assert len(DeltaStore.open(TINY)) == 5
    model, processor = mm_piece.load(TINY / "base", store=TINY, at=0)
    rows = read("scenes:base/test[:20]")
    gone = [measure_divergence(model, processor, rows, at, max_new_tokens=24) for at in (1, 3, 5)]
    assert gone == sorted(gone)
