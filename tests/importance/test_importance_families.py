"""Law 4 on every kind of model: batches give the loop's scores, and nothing else shows in a bit.

Rows with an image, rows without, and both; what may not show: the memory budget, which other
weights are scored, how many processes divide the entries.
"""

import json

import pytest
import torch
from tiny_families import TEXT

from mm_piece.data import EncodedList, LengthGroupedBatches, encode, read
from mm_piece.distributed import EntryRange
from mm_piece.families import weights
from mm_piece.importance import estimate, stream_scores
from mm_piece.models.base import load_base

FAMILIES = ("llava_next", "llava_onevision", "qwen3_vl", "qwen3_vl_moe", "llama", "qwen2")
EXPERTS = ("eager", "batched_mm", "grouped_mm")
NOISE = 1e-9  # of the largest score: gradients that are zero but for rounding (keys' biases)


@pytest.fixture
def world(family_base, folder):
    """A function from a family to its model and encoded rows: 5 texts, 3 with an image of a size.

    Questions and answers differ in length.
    """

    def _world(family):
        model, processor = load_base(family_base(family))
        rows = [{"prompt": f"Is it {'very ' * n}red?", "answer": "no " * n} for n in range(1, 9)]
        pictures = sorted(path.name for path in folder.glob("*.png"))
        if family not in TEXT:
            for row, picture in zip(rows[5:], pictures, strict=True):
                row["image"] = picture
        (folder / "eight.json").write_text(json.dumps(rows), encoding="utf-8")
        return model, [encode(row, processor) for row in read(str(folder / "eight.json"))]

    return _world


def loop(model, examples):
    """Mean of squared gradients, one example at a time, in float64 sums."""
    second = {name: 0.0 for name in weights(model)}
    for example in examples:
        model(**example).loss.backward()
        for name, weight in weights(model).items():
            if weight.grad is not None:
                second[name] = second[name] + weight.grad.double() ** 2 / len(examples)
        model.zero_grad()
    return second


def in_parts(model, batches, names, processes, **options):
    """The scores that so many processes find together, each of them a part of every weight."""
    named, found = weights(model), {name: [] for name in names}
    for rank in range(processes):
        shares = {}
        for name in names:
            size = named[name].numel()
            most = -(-size // processes)
            start = min(rank * most, size)
            shares[name] = EntryRange(start, min(start + most, size), most)
        for name, _, flat in stream_scores(model, batches, names=shares, **options):
            found[name].append(flat)
    return {name: torch.cat(flats).view_as(named[name]) for name, flats in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("implementation", EXPERTS)
def test_experts_in_batches_equal_the_loop(world, implementation):
    model, examples = world("qwen3_vl_moe")
    model.set_experts_implementation(implementation)
    expected = loop(model, examples)
    largest = max(float(score.max()) for score in map(torch.as_tensor, expected.values()))
    for size in (2, 3, 4, 8):
        batches = LengthGroupedBatches(EncodedList(examples, 0), size)
        assert max(map(len, batches.batch_positions)) == min(
            size, 5
        )  # images are packed: one by one
        for name, scores in estimate(model, batches).items():
            noise = 1e-5 * float(expected[name].max()) + NOISE * largest
            torch.testing.assert_close(scores.double(), expected[name], rtol=1e-3, atol=noise)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_experts_whose_activations_are_recomputed(world):
    model, examples = world("qwen3_vl_moe")
    plain = estimate(model, LengthGroupedBatches(EncodedList(examples, 0), 4))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = estimate(model, LengthGroupedBatches(EncodedList(examples, 0), 4))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_neither_budget_nor_company_nor_processes_show_in_a_bit(world, family):
    model, examples = world(family)
    batches = LengthGroupedBatches(EncodedList(examples, 0), 4)
    whole = estimate(model, batches)
    names, size = [*whole], sum(scores.numel() for scores in whole.values())

    def require_same(found):
        assert found
        assert [name for name in found if not torch.equal(found[name], whole[name])] == []

    for entries in (size // 2 + 1, size // 7 + 1):
        require_same(estimate(model, batches, memory=4 * entries))
    shared = ("embed_tokens.weight", "lm_head.weight", "image_newline")
    require_same(estimate(model, batches, names=[n for n in names if not n.endswith(shared)]))
    for start in range(3):
        require_same(estimate(model, batches, names=names[start::3]))
    require_same(in_parts(model, batches, names, 3, memory=4 * (size // 4)))
