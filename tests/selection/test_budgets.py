"""Budgets by group, pattern and tensor, floors and ceilings, rows, and `auto`."""

from decimal import Decimal
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_piece.errors import SelectionError
from mm_piece.importance.rows import width_of
from mm_piece.selection import Budgets, build_topk_groups, count_selected, select, select_stream
from mm_piece.selection.auto_density import count_auto_selected

VISION, PROJECTOR = "vision_tower.a.weight", "multi_modal_projector.linear_1.weight"
FIRST, SECOND = "model.layers.0.q_proj.weight", "model.layers.1.up_proj.weight"
NAMES = (VISION, FIRST, PROJECTOR, SECOND)  # groups do not lie side by side


def scores_of(seed, *sizes, ties=20):
    random = torch.Generator().manual_seed(seed)
    sizes = sizes or (100, 60, 30, 80)
    return {
        name: torch.randint(0, ties, (size,), generator=random).float()
        for name, size in zip(NAMES, sizes, strict=True)
    }


def ranked(scores, names):
    """Every entry of some tensors as (name, index), the highest first, ties to the earliest."""
    rows = [
        (-value, number, index, name)
        for number, name in enumerate(scores)
        if name in names
        for index, value in enumerate(scores[name].reshape(-1).tolist())
    ]
    return [(name, index) for _, _, index, name in sorted(rows)]


def entries(mask):
    return {(name, index) for name, found in mask.items() for index in found.tolist()}


def bounded(scores, k, low, high):
    """The k highest under bounds, the slow way: give the floors, then go down the ranking."""
    groups = {VISION: "vision", PROJECTOR: "projector", FIRST: "language", SECOND: "language"}
    taken, held = set(), dict.fromkeys(groups.values(), 0)
    for group, least in low.items():
        members = [name for name in scores if groups[name] == group]
        taken |= set(ranked(scores, members)[:least])
        held[group] = least
    for name, index in ranked(scores, list(scores)):
        group = groups[name]
        if (name, index) in taken or len(taken) == k or held[group] >= high.get(group, k):
            continue
        taken.add((name, index))
        held[group] += 1
    return taken


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(0, 15), st.integers(1, 30))
def test_floors_and_ceilings_of_groups(seed, k, low, high):
    scores = scores_of(seed)
    density = k / 270 + 1e-9
    low_share, high_share = low / 100 + 1e-9, high / 140 + 1e-9
    wanted = {"floor": {"vision": low_share}, "ceiling": {"language": high_share}}
    if low > k or k - low < 0 or 130 + high < k:
        with pytest.raises(SelectionError):
            select(scores, density, **wanted)
        return
    found = entries(select(scores, density, **wanted))
    assert len(found) == k
    assert found == bounded(scores, k, {"vision": low}, {"language": high})


def test_floors_beyond_the_density_are_refused():
    with pytest.raises(SelectionError, match="floor of vision: 90 places, more than the 27"):
        select(scores_of(0), 0.1, floor={"vision": 0.9})
    with pytest.raises(SelectionError, match="the floors ask for 39 places, the density gives 27"):
        select(scores_of(0), 0.1, floor={"vision": 0.2, "language": 0.14})


def test_ceilings_that_leave_too_little_are_refused():
    tight = {"vision": 0.01, "language": 0.05, "projector": 0.01}
    with pytest.raises(SelectionError, match="the ceilings leave 8 places, the density gives 27"):
        select(scores_of(0), 0.1, ceiling=tight)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=4, max_size=4), st.floats(0.02, 1), st.integers(0, 99))
def test_every_tensor_gets_its_share_and_all_of_them_the_exact_number(sizes, density, seed):
    scores = scores_of(seed, *sizes)
    k = floor(Decimal(repr(density)) * sum(sizes))
    if k == 0:
        return
    mask = select(scores, density, scope="tensor")
    assert sum(map(len, mask.values())) == k
    for name, size in zip(NAMES, sizes, strict=True):
        got = len(mask.get(name, ()))
        assert floor(Decimal(repr(density)) * size) <= got <= floor(density * size) + 1
        assert entries({name: mask.get(name, torch.empty(0))}) == set(ranked(scores, [name])[:got])


def test_places_that_are_left_go_to_the_largest_remainders():
    scores = scores_of(7, 15, 12, 18, 10)  # quotas 1.5, 1.2, 1.8, 1.0: 5 places, 4 of them whole
    counts = {name: len(index) for name, index in select(scores, 0.1, scope="tensor").items()}
    assert counts == {VISION: 1, FIRST: 1, PROJECTOR: 2, SECOND: 1}


def test_patterns_come_before_groups_and_in_their_order():
    for density, counts in (
        ({"*.q_proj.*": 0.1, "model.layers.*": 0.25}, {FIRST: 6, SECOND: 20}),
        ({"model.layers.*": 1.0, "*.q_proj.*": 0.1, "vision": 0.01}, None),
        ({"language": 0.5, "*.q_proj.*": 0.1}, {FIRST: 6, SECOND: 40}),
    ):
        if counts is None:  # the first pattern takes what the second one is for
            with pytest.raises(SelectionError, match=r"is called '\*\.q_proj"):
                select(scores_of(1), density)
            continue
        mask = select(scores_of(1), density)
        assert {name: len(index) for name, index in mask.items()} == counts
    with pytest.raises(SelectionError, match=r"density 0.5 of 0 patchable entries \(language\)"):
        select({FIRST: torch.rand(10)}, {"language": 0.5, "model.*": 0.1})


def test_a_pattern_that_fits_nothing_is_named():
    with pytest.raises(SelectionError, match=r"no patchable weight is called '\*\.k_proj\.\*'"):
        select(scores_of(1), {"*.k_proj.*": 0.1})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"density": "atuo"}, "'atuo' is no number, mapping or auto"),
        ({"ceiling": 0.5}, "a number bounds density: auto"),
        ({"floor": {"visoin": 0.1}}, "unknown group 'visoin'; groups: vision, projector"),
        ({"floor": {"vision": 2}}, r"bound 2 of vision is out of \(0, 1\]"),
        ({"density": "auto", "ceiling": 0}, r"bound 0 of all is out of \(0, 1\]"),
        ({"floor": {"vision": 0.1}, "scope": "tensor"}, "go with one density, scope global"),
        ({"floor": {"vision": 0.1}, "density": "auto"}, "go with one density, scope global"),
        ({"density": None}, "density None is no number, mapping or auto"),
        ({"density": True}, "density True is no number"),
        ({"density": {}}, "no group or pattern has a share"),
        ({"floor": 0.05}, "floor 0.05 is no mapping"),
        ({"floor": {"vision": "a"}}, "bound 'a' of vision is out of"),
        ({"scope": "layer"}, "scope must be global or tensor"),
        ({"unit": "column"}, "unit must be entry or row"),
    ],
)
def test_what_cannot_stand_together_is_refused(wanted, message):
    with pytest.raises(SelectionError, match=message):
        Budgets(**wanted)


@pytest.mark.parametrize(
    ("shape", "width"),
    [((7,), 1), ((4, 9), 9), ((8, 4, 9), 9), ((4, 3, 2, 2), 12), ((4, 3, 2, 2, 2), 24)],
)
def test_a_row_is_what_makes_one_output(shape, width):
    assert width_of(shape) == width


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_rows_are_those_at_or_above_the_quantile_of_their_sums(scope):
    """FGGM as published: sums over inputs, `torch.quantile`, `>=`."""
    random = torch.Generator().manual_seed(3)
    shapes = {VISION: (11, 3, 2, 2), FIRST: (50, 16), SECOND: (23, 40), "model.norm.weight": (9,)}
    scores = {name: torch.rand(shape, generator=random) for name, shape in shapes.items()}
    sums = {name: s.flatten(1).sum(1) if s.dim() > 1 else s for name, s in scores.items()}
    together = torch.cat(list(sums.values())).quantile(0.7)
    mask = select(scores, 0.3, unit="row", scope=scope)
    for name, total in sums.items():
        kept = total >= (total.quantile(0.7) if scope == "tensor" else together)
        whole = kept.view(-1, *[1] * (scores[name].dim() - 1)).expand(scores[name].shape)
        expected = whole.flatten().nonzero().flatten().tolist()
        assert mask.get(name, torch.empty(0)).tolist() == expected, name


@pytest.mark.parametrize("piece", [1, 5, 37, 1000])
def test_rows_do_not_depend_on_how_the_scores_are_cut(piece):
    random = torch.Generator().manual_seed(4)
    scores = {FIRST: torch.rand(30, 12, generator=random), SECOND: torch.rand(17, generator=random)}
    budgets = Budgets(0.2, unit="row", scope="tensor")
    shapes = {name: s.shape for name, s in scores.items()}
    pieces = (
        (name, start, s.flatten()[start : start + piece])
        for name, s in scores.items()
        for start in range(0, s.numel(), piece)
    )
    whole = select(scores, 0.2, unit="row", scope="tensor")
    cut = select_stream(pieces, shapes, budgets)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_rows_are_counted_as_the_quantile_counts_them():
    for rows in range(1, 40):
        values = torch.arange(float(rows))
        assert count_selected(0.3, rows, unit="row") == int((values >= values.quantile(0.7)).sum())


def test_auto_stops_where_the_next_entry_adds_less_than_half_the_mean():
    amplitudes = torch.tensor([8.0, 7.0, 6.0, 5.0, 3.3, 3.2, 1.0, 0.5])
    # The mean of the first four is 6.5: 3.3 exceeds its half. Of five it is 5.86: 3.2 does too. Of
    # six it is 5.4: 1.0 does not.
    assert count_auto_selected(amplitudes, squares=False) == 6
    assert count_auto_selected(amplitudes[torch.randperm(8)], squares=False) == 6
    assert count_auto_selected(amplitudes**2, squares=True) == 6
    assert count_auto_selected(torch.zeros(5), squares=False) == 1


def test_auto_takes_the_highest_and_keeps_its_ceiling():
    scores = scores_of(5, ties=1000)
    ranking = ranked(scores, list(scores))
    flat = torch.cat(list(scores.values()))
    for ceiling in (0.05, 0.4, 1.0):
        top = flat.sort(descending=True).values[: floor(ceiling * 270)]
        mask = select(scores, "auto", ceiling=ceiling)
        assert entries(mask) == set(ranking[: count_auto_selected(top, squares=False)])
    assert entries(select(scores, "auto")) <= set(ranking[: floor(0.05 * 270)])


def test_each_contest_knows_its_places():
    sizes = dict(zip(NAMES, (1000, 600, 300, 800), strict=True))
    (alone,) = build_topk_groups(sizes, Budgets(0.01))
    assert (alone.k, alone.names) == (27, list(NAMES))
    both = build_topk_groups(sizes, Budgets({"vision": 0.01, "language": 0.02}))
    assert [(c.label, c.k, c.names) for c in both] == [
        ("vision", 10, [VISION]),
        ("language", 28, [FIRST, SECOND]),
    ]
