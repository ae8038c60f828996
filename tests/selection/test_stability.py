"""The printed stability of a mask: what the masks of two fresh sets of examples would share."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mm_piece.data import EncodedDataset
from mm_piece.importance import FoldSums, estimate, estimation, rule_of, stream_scores
from mm_piece.importance.accumulators import GradientSums
from mm_piece.recipe import SelectionSettings
from mm_piece.selection import Budgets, build_topk_groups, count_units, select, select_stream
from mm_piece.selection.stability import build_sampled_groups
from mm_piece.selection.task import select_for_task

N = 40  # inputs and outputs


class Layer(nn.Module):
    """One layer whose gradients are drawn: an outer product of a signal and noise."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(N, N, bias=False)

    def forward(self, x, y, labels, **_):
        return SimpleNamespace(loss=(self.layer(x)[:, 0] * y[:, 0]).sum(1).mean())


class Examples(list):
    """Encoded examples, as a training has them."""

    pad_token_id = 0
    sample = EncodedDataset.sample

    def select_positions(self, positions):
        return Examples(self[position] for position in positions)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Layer()


def examples_of(count, seed, noise):
    random = torch.Generator().manual_seed(seed)
    signal, ids = torch.linspace(0.1, 3, N), torch.zeros(1, 2, dtype=torch.long)
    drawn = signal + noise * torch.randn(count, 2, 1, 1, N, generator=random)
    return Examples({"x": x, "y": y, "labels": ids, "input_ids": ids} for x, y in drawn)


@pytest.fixture
def selected(model, tmp_path):
    """A selection by what a recipe says, of as many examples."""

    def _selected(count, noise, seed=1, **wanted):
        select = SelectionSettings(
            **{"method": "piece-s", "samples": count, "exclude": (), **wanted}
        )
        facts = {"count": count, "noise": noise, "seed": seed}
        examples = examples_of(count, seed, noise)
        return select_for_task(model, examples, select, tmp_path, seeds=(0, 0), cache_key=facts)

    return _selected


def fresh(model, count, density, noise, pairs=24):
    """The mean overlap of the masks of fresh sets of examples."""
    shares = []
    for pair in range(pairs):
        masks = [
            select(estimate(model, examples_of(count, seed, noise), "piece-s"), density)
            for seed in (1000 + 2 * pair, 1001 + 2 * pair)
        ]
        first, second = (mask["layer.weight"] for mask in masks)
        shares.append(float(torch.isin(first, second).float().mean()))
    return sum(shares) / pairs


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_it_is_what_fresh_examples_share(model, selected, noise):
    told = [selected(512, noise, seed, density=0.1).stability for seed in range(4)]
    assert all(list(found) == ["64", "128", "256"] for found in told)
    for count in told[0]:
        expected = fresh(model, int(count), 0.1, noise)
        assert sum(found[count] for found in told) / 4 == pytest.approx(expected, abs=0.05)
    assert told[0]["64"] < told[0]["256"] - 0.03


def test_few_examples_tell_less_or_nothing(selected):
    assert list(selected(100, 1.0, density=0.1).stability) == ["8", "23", "46"]  # of 13 parts
    assert list(selected(20, 1.0, density=0.1).stability) == ["7"]
    assert selected(8, 1.0, density=0.1).stability == {}
    assert "masks" not in str(selected(8, 1.0, density=0.1))


def test_it_is_said_in_one_line(selected):
    found = selected(512, 1.0, density=0.1)
    assert str(found).startswith(
        "selected 160 of 1,600 entries (10%); masks of 256 examples and of 256 others share "
    )
    assert str(found).count("%") == 4 and "\n" not in str(found)


def test_a_budget_without_room_leaves_it_out(selected):
    found = selected(128, 1.0, density=0.1, memory="1KiB")
    assert found.stability == {} and len(found.mask["layer.weight"]) == 160


@pytest.mark.parametrize("method", ["random", "magnitude", "migu"])
def test_what_weighs_no_gradient_has_none(selected, method):
    assert selected(128, 1.0, method=method, density=0.1).stability == {}


def test_rows_have_one_too(selected):
    found = selected(512, 1.0, method="fggm")
    assert len(found.mask["layer.weight"]) == 12 * N  # rows at or above the quantile 0.7 of 40
    assert set(found.stability) == {"64", "128", "256"}
    assert found.stability["256"] > 0.9  # the rows differ by far


@pytest.mark.parametrize("memory", [2**13, 2**16, 2**30])
def test_it_stays_inside_the_budget_and_changes_no_score(model, memory):
    examples = examples_of(64, 1, 1.0)
    sizes, widths = {"layer.weight": N * N}, {"layer.weight": 1}
    folds = FoldSums(
        sizes,
        widths,
        ("mean", "square"),
        windows=[n // 32 for n in range(64)],
        max_bytes=memory // 8,
        seed=0,
    )
    assert 0 < folds.nbytes <= memory // 8
    plain = torch.cat(
        [flat for _, _, flat in stream_scores(model, examples, "piece-s", memory=2**30)]
    )
    beside = [
        flat for _, _, flat in stream_scores(model, examples, "piece-s", memory=memory, folds=folds)
    ]
    assert torch.equal(plain, torch.cat(beside))


@pytest.mark.parametrize("memory", [2**14, 2**30])
def test_folds_hold_the_sums_of_their_examples(model, memory):
    examples = examples_of(96, 1, 1.0)
    windows = [n // 32 for n in range(96)]
    folds = FoldSums(
        {"layer.weight": N * N},
        {"layer.weight": 1},
        ("mean", "square"),
        windows=windows,
        max_bytes=memory // 8,
        seed=0,
    )
    list(stream_scores(model, examples, "piece-s", memory=memory, folds=folds))
    assert folds.counts == [32, 32, 32]
    index = folds.entries["layer.weight"]
    for fold in range(3):
        part = [
            example for example, window in zip(examples, windows, strict=True) if window == fold
        ]
        fisher = estimate(model, part, "piece-f")["layer.weight"].flatten()[index]
        times = torch.zeros(3, dtype=torch.long)
        times[fold] = 2
        means, count = folds.compute_means(times)
        assert count == 64
        torch.testing.assert_close(means["square"], fisher, rtol=1e-4, atol=1e-5)


def test_groups_keep_their_densities_among_sampled_entries():
    shapes = {"vision_tower.a.weight": (200, 50), "model.layers.0.b.weight": (300, 100)}
    budgets = Budgets(0.01, floor={"vision": 0.02})
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    pieces = [(name, 0, score.flatten()) for name, score in scores.items()]
    mask = select_stream(pieces, shapes, budgets)
    sizes, widths = count_units(shapes, budgets)
    folds = FoldSums(sizes, widths, ("square",), windows=[0, 1], max_bytes=2**17, seed=0)
    chosen = {name: len(index) for name, index in mask.items()}
    (group,) = build_sampled_groups(folds, build_topk_groups(sizes, budgets), sizes, chosen)
    sampled = sum(map(len, folds.units.values()))
    assert sampled < 40_000 and group.k == round(0.01 * sampled)
    vision = next(part for part in group.subgroups if "vision_tower.a.weight" in part.names)
    assert vision.min_quota == int(0.02 * len(folds.units["vision_tower.a.weight"]))


@pytest.mark.parametrize("method", ["piece-f", "piece-s"])
def test_what_parts_take_is_left_of_the_budget(model, monkeypatch, method):
    held = []

    class Watched(GradientSums):
        def __init__(self, *args):
            super().__init__(*args)
            held.append(
                sum(t.nbytes for t in (*self.gradient_sums.values(), *self.square_sums.values()))
            )

    monkeypatch.setattr(estimation, "GradientSums", Watched)
    folds = FoldSums(
        {"layer.weight": N * N},
        {"layer.weight": 1},
        rule_of(method).needs,
        windows=[0, 1],
        max_bytes=500,
        seed=0,
    )
    list(stream_scores(model, examples_of(2, 1, 1.0), method, memory=4000, folds=folds))
    assert 0 < folds.nbytes <= 500
    assert len(held) > 1 and max(held) + folds.nbytes <= 4000 < max(held) + folds.nbytes + 8


def test_groups_of_which_little_was_sampled_do_not_count():
    """One place of two rows would be the same for any examples, and look like certainty."""
    shapes = {f"model.layers.{n}.a.weight": (rows, 64) for n, rows in enumerate((8, 40, 400))}
    budgets = Budgets(0.3, unit="row", scope="tensor")
    sizes, widths = count_units(shapes, budgets)
    rounds = build_topk_groups(sizes, budgets)
    chosen = {group.names[0]: group.k for group in rounds}
    few, all_of_them = (
        FoldSums(sizes, widths, ("square",), windows=[0, 1], max_bytes=room, seed=0)
        for room in (2**17, 2**30)
    )
    assert 0 < len(few.units["model.layers.1.a.weight"]) < 20
    assert [group.names[0] for group in build_sampled_groups(few, rounds, sizes, chosen)] == [
        "model.layers.2.a.weight"
    ]
    whole = build_sampled_groups(all_of_them, rounds, sizes, chosen)
    assert [(c.names, c.k) for c in whole] == [(c.names, c.k) for c in rounds]


def test_a_ceiling_holds_among_sampled_entries():
    shapes = {"vision_tower.a.weight": (200, 50), "model.layers.0.b.weight": (300, 100)}
    budgets = Budgets(0.05, ceiling={"vision": 0.04})
    sizes, widths = count_units(shapes, budgets)
    folds = FoldSums(sizes, widths, ("square",), windows=[0, 1], max_bytes=2**17, seed=0)
    chosen = {"vision_tower.a.weight": 400, "model.layers.0.b.weight": 1600}
    (group,) = build_sampled_groups(folds, build_topk_groups(sizes, budgets), sizes, chosen)
    vision, language = (
        next(part for part in group.subgroups if name in part.names) for name in shapes
    )
    assert vision.max_quota == round(0.04 * len(folds.units["vision_tower.a.weight"]))
    assert language.max_quota == len(folds.units["model.layers.0.b.weight"])
