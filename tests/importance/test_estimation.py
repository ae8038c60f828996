"""Law 4: scores equal a loop of single-example backward passes, whatever batch or budget."""

from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from torch import nn

from mm_piece.data import collate, encode, read
from mm_piece.errors import SelectionError
from mm_piece.families import group_of, weights
from mm_piece.importance import estimate, estimation, find_patchable_names, stream_scores
from mm_piece.importance.accumulators import GradientSums
from mm_piece.models.base import load_base
from mm_piece.selection import select


@pytest.fixture(scope="module")
def model_and_examples(base):
    model, processor = load_base(base)
    examples = [encode(example, processor) for example in read("scenes:digits/train[:6]")]
    return model, examples


def loop(model, examples):
    """Mean gradient and mean squared gradient, one example at a time, in float64 sums."""
    first, second = {}, {}
    for example in examples:
        model.zero_grad()
        model(**example).loss.backward()
        for name, parameter in weights(model).items():
            if parameter.grad is not None:
                gradient = parameter.grad.double()
                first[name] = first.get(name, 0) + gradient / len(examples)
                second[name] = second.get(name, 0) + gradient**2 / len(examples)
    model.zero_grad()
    return first, second


def test_equals_the_loop(model_and_examples):
    model, examples = model_and_examples
    first, second = loop(model, examples)
    fisher, signal = (
        estimate(model, examples, "piece-f"),
        estimate(model, examples, "piece-s", xi=1e-3),
    )
    assert fisher.keys() == second.keys() == signal.keys()
    for name in fisher:
        torch.testing.assert_close(fisher[name].double(), second[name], rtol=1e-5, atol=1e-12)
        expected = first[name].abs() / (second[name] + 1e-3).sqrt()
        torch.testing.assert_close(signal[name].double(), expected, rtol=1e-4, atol=1e-7)
        assert fisher[name].dtype == torch.float32


def test_first_order_rules_are_those_of_the_loop(model_and_examples):
    model, examples = model_and_examples
    first, _ = loop(model, examples)
    named = weights(model)
    found, snip = (estimate(model, examples, method) for method in ("gradient", "snip"))
    assert found.keys() == snip.keys() == first.keys()
    for name in found:
        torch.testing.assert_close(found[name].double(), first[name].abs(), rtol=1e-4, atol=1e-7)
        expected = (first[name] * named[name].double()).abs()
        torch.testing.assert_close(snip[name].double(), expected, rtol=1e-4, atol=1e-7)


def test_is_not_the_square_of_the_batch_gradient(model_and_examples):
    model, examples = model_and_examples
    model.zero_grad()
    model(**collate(examples, 0)).loss.backward()
    named, fisher = weights(model), estimate(model, examples)
    assert any(not torch.allclose(named[name].grad ** 2, fisher[name], rtol=0.1) for name in fisher)
    model.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["piece-f", "piece-s", "snip", "random", "magnitude"])
@pytest.mark.parametrize("entries", [997, 5000, 10**9])
def test_budget_changes_nothing(model_and_examples, method, entries):
    model, examples = model_and_examples
    whole = estimate(model, examples, method)
    cut = estimate(model, examples, method, memory=entries * 8)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_text_among_pictures_has_no_part_in_the_tower(model_and_examples):
    model, examples = model_and_examples
    text = {key: torch.arange(5, 12)[None] for key in ("input_ids", "labels")}
    whole = estimate(model, [*examples[:2], text])
    cut = estimate(model, [*examples[:2], text], memory=4000)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["piece-f", "piece-s"])
def test_accumulators_stay_inside_the_budget(model_and_examples, monkeypatch, method):
    model, examples = model_and_examples
    held, made = [], []

    class Watched(GradientSums):
        def __init__(self, *args):
            assert not any(earlier() for earlier in made)  # never two blocks at a time
            made.append(ref(self))
            super().__init__(*args)
            held.append(
                sum(t.nbytes for t in (*self.gradient_sums.values(), *self.square_sums.values()))
            )

    monkeypatch.setattr(estimation, "GradientSums", Watched)
    list(stream_scores(model, examples, method, memory=10_000))
    assert len(held) > 1
    assert set(held[:-1]) == {10_000}  # used up, and not exceeded
    assert 0 < held[-1] <= 10_000


def test_batches_are_taken_apart(model_and_examples):
    model, examples = model_and_examples
    length = {example["input_ids"].shape[1] for example in examples}
    same = [e for e in examples if e["input_ids"].shape[1] == max(length)]
    one_by_one, together = estimate(model, same), estimate(model, [collate(same, 0)])
    assert all(torch.equal(one_by_one[name], together[name]) for name in one_by_one)
    padded = estimate(model, [collate(examples[:3], 0), collate(examples[3:], 0)])
    whole = estimate(model, examples)
    for name in whole:
        torch.testing.assert_close(padded[name], whole[name], rtol=1e-3, atol=1e-9)


class Scaled(nn.Module):
    """A layer whose loss an option of its forward scales."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, labels, scale=1.0):
        return SimpleNamespace(loss=scale * self.layer(x)[..., 0].square().mean())


def test_an_option_of_the_model_goes_to_each_example():
    torch.manual_seed(0)
    model, labels = Scaled(), torch.ones(2, 4, dtype=torch.long)
    batch = {"x": torch.randn(2, 4, 3), "labels": labels, "scale": 3.0}
    one_by_one = [{**batch, "x": batch["x"][row : row + 1], "labels": labels[:1]} for row in (0, 1)]
    together, alone = estimate(model, [batch]), estimate(model, one_by_one)
    assert all(torch.allclose(together[name], scores) for name, scores in alone.items())
    plain = estimate(model, [{key: value for key, value in batch.items() if key != "scale"}])
    assert all(torch.allclose(9 * plain[name], scores) for name, scores in together.items())


def test_batches_that_cannot_be_taken_apart_are_refused(model_and_examples):
    model, examples = model_and_examples
    batch = collate(examples[:2], 0)
    batch["pixel_values"] = torch.cat([batch["pixel_values"]] * 2)
    with pytest.raises(SelectionError, match="4 pixel_values"):
        estimate(model, [batch])


def test_what_never_trains_is_not_patchable(model_and_examples):
    model, examples = model_and_examples
    names = find_patchable_names(model, examples)
    missing = set(weights(model)) - set(names)
    assert missing == {
        "vision_tower.vision_model.post_layernorm.weight",
        "vision_tower.vision_model.post_layernorm.bias",
    }
    kept = find_patchable_names(model, examples, exclude=("embedding", "head"))
    assert {group_of(name) for name in kept} == {"vision", "projector", "language"}


def test_model_is_left_as_it_was(model_and_examples):
    model, examples = model_and_examples
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    estimate(model, examples)
    assert model.training
    model.eval()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == flags[name]
        assert torch.equal(parameter, before[name])


def test_random_masks_differ_by_seed_alone(model_and_examples):
    model, examples = model_and_examples
    masks = [select(estimate(model, examples, "random", seed=seed), 0.01) for seed in (1, 1, 2)]
    same = all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    other = any(
        not torch.equal(masks[0][name], masks[2].get(name, masks[0][name][:0])) for name in masks[0]
    )
    assert same and other


def test_a_dotted_path_is_a_method(model_and_examples):
    model, examples = model_and_examples
    ours, theirs = (
        estimate(model, examples),
        estimate(model, examples, "mm_piece.importance.piece_f"),
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", ["piece-x", "no.such.module", "mm_piece.importance.absent", ""])
def test_unknown_methods_are_refused(model_and_examples, method):
    with pytest.raises(SelectionError, match="allowed: piece-f, piece-s"):
        estimate(*model_and_examples, method)


def in_place(moments):
    return moments.weight.abs_() * moments.square.sqrt_()


def fails(moments):
    raise ZeroDivisionError("nothing to divide by")


def short(moments):
    return moments.square[:-1]


def no_tensor(moments):
    return 3.0


def misspelt(moments):
    return moments.nothere


def test_a_rule_that_computes_in_place_changes_no_weight(model_and_examples):
    model, examples = model_and_examples
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    estimate(model, examples[:1], f"{__name__}.in_place")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("fails", "fails: ZeroDivisionError: nothing to divide by"),
        ("short", r"gives \(6,\), not scores of shape \(7,\)"),
        ("no_tensor", "gives float, not scores"),
        ("misspelt", "fails: AttributeError: .*nothere"),
    ],
)
def test_mistakes_in_a_rule_are_one_line(model_and_examples, rule, message):
    with pytest.raises(SelectionError, match=message) as caught:
        estimate(*model_and_examples, f"{__name__}.{rule}")
    assert "\n" not in str(caught.value)


def test_nothing_to_score_is_named(model_and_examples):
    model, examples = model_and_examples
    with pytest.raises(SelectionError, match="no batches"):
        estimate(model, [])
    with pytest.raises(SelectionError, match="the model has no weight 'foo'"):
        estimate(model, examples, names=["foo"])
