"""Law 3: exactly floor(density * N) entries, deterministic ties, streaming = concatenated."""

from decimal import Decimal
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_piece import selection as masks
from mm_piece.errors import SelectionError
from mm_piece.selection import Budgets, TopK, select, select_stream, topk


def reference(scores: dict[str, torch.Tensor], k: int) -> dict[str, list[int]]:
    """Sort everything by (score descending, position ascending) and take k."""
    rows = [
        (-score, number, index, name)
        for number, (name, tensor) in enumerate(scores.items())
        for index, score in enumerate(tensor.reshape(-1).tolist())
    ]
    chosen: dict[str, list[int]] = {}
    for _, _, index, name in sorted(rows)[:k]:
        chosen.setdefault(name, []).append(index)
    return {name: sorted(chosen[name]) for name in scores if name in chosen}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_a_full_sort_with_ties(data):
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    values = st.sampled_from([0.0, 0.5, 1.0, 1.5, float("inf"), -1.0, -float("inf")])
    scores = {
        f"t{number}": torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)))
        for number, size in enumerate(sizes)
    }
    density = data.draw(st.floats(0.01, 1))
    k = floor(Decimal(repr(density)) * sum(sizes))
    if k == 0:
        with pytest.raises(SelectionError, match="selects none"):
            select(scores, density)
        return
    found = {name: index.tolist() for name, index in select(scores, density).items()}
    assert found == reference(scores, k)


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
def test_streaming_equals_concatenated(piece, monkeypatch):
    monkeypatch.setattr(topk, "_CHUNK", 50)
    generator = torch.Generator().manual_seed(1)
    scores = {
        name: torch.randint(0, 40, (size,), generator=generator).float()
        for name, size in (("a", 501), ("b", 33), ("c", 1200))
    }
    shapes = {name: flat.shape for name, flat in scores.items()}
    pieces = (
        (name, start, flat[start : start + piece])
        for name, flat in scores.items()
        for start in range(0, len(flat), piece)
    )
    whole, streamed = select(scores, 0.03), select_stream(pieces, shapes, Budgets(0.03))
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(whole[name], streamed[name]) for name in whole)


@pytest.mark.parametrize(
    ("density", "total", "k"), [(0.29, 100, 29), (0.1, 30, 3), (0.001, 1999, 1), (1, 7, 7)]
)
def test_count_is_the_floor_of_the_written_number(density, total, k):
    assert masks.count_selected(density, total) == k


def test_groups_have_their_own_budgets():
    scores = {
        "vision_tower.a.weight": torch.arange(100.0),
        "multi_modal_projector.linear_1.weight": torch.arange(50.0) + 1000,
        "language_model.model.layers.0.b.weight": torch.arange(200.0) + 2000,
    }
    chosen = select(scores, {"vision": 0.1, "language": 0.01})
    assert {name: len(index) for name, index in chosen.items()} == {
        "vision_tower.a.weight": 10,
        "language_model.model.layers.0.b.weight": 2,
    }


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan")])
def test_density_out_of_range_is_refused(density):
    with pytest.raises(SelectionError, match=r"out of \(0, 1\]"):
        select({"a": torch.rand(100)}, density)


def test_nan_scores_are_refused():
    with pytest.raises(SelectionError, match="NaN"):
        select({"a": torch.tensor([1.0, float("nan")])}, 0.5)


@pytest.mark.parametrize("place", [0, 63, 64, 100, 299, 300, 301, 959])
def test_nan_scores_are_refused_wherever_they_stand(place, monkeypatch):
    monkeypatch.setattr(topk, "_CHUNK", 300)  # blocks, a tail, several chunks
    scores = torch.rand(960)
    scores[place] = float("nan")
    with pytest.raises(SelectionError, match="NaN"):
        select({"a": scores}, 0.01)


@pytest.mark.parametrize("chunk", [50, 64, 200, 10_000])
def test_blocks_leave_nothing_out(chunk, monkeypatch):
    """Many ties at the threshold, entries in blocks and in tails."""
    monkeypatch.setattr(topk, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(2)
    scores = {"a": torch.randint(0, 60, (3001,), generator=generator).float()}
    for density in (0.001, 0.02, 0.3):
        found = {name: index.tolist() for name, index in select(scores, density).items()}
        assert found == reference(scores, floor(Decimal(repr(density)) * 3001))


def test_candidates_stay_few():
    top = TopK(10)
    for start in range(0, 100_000, 1000):
        top.add_scores(torch.rand(1000, generator=torch.Generator().manual_seed(start)), start)
        assert top._num_candidates <= 2 * 10 + 1000
