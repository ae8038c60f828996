"""The report's data: its numbers equal the metrics, its counts equal those of sets."""

import random

import pytest
import torch
from made_up_store import MATRIX, TASKS, FakeStore, fake_answer

from mm_piece.deltas.delta import Delta
from mm_piece.metrics import continual
from mm_piece.report import summarise_store, write_report
from mm_piece.report.drawing import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, LossFrame
from mm_piece.report.formats import (
    format_count,
    format_duration,
    format_fact,
    format_loss,
    format_percent,
    format_permille,
    format_points,
    format_share,
)
from mm_piece.report.weight_maps import build_weight_map, measure_overlap, union_masks
from mm_piece.sizes import format_bytes
from mm_piece.store.delta_store import DeltaStore


def test_numbers_equal_the_metrics():
    report = summarise_store(FakeStore())
    assert {m.name: m.value for m in report.metrics} == continual.summarise_matrix(MATRIX)
    assert {m.name: m.convention for m in report.metrics} == continual.CONVENTIONS
    assert [curve.values for curve in report.curves] == [list(c) for c in zip(*MATRIX, strict=True)]
    assert report.num_examples == dict.fromkeys(TASKS, 200)


def test_maps_count_every_entry_once():
    store = FakeStore()
    report = summarise_store(store)
    together, *alone = report.maps
    for entry, found in zip(store.entries, alone, strict=True):
        assert found.entries == entry.entries == sum(found.shares.values())
        cells = [cell for grid in found.grids for cell in grid.cells.values()]
        assert sum(cell.entries for cell in cells) == entry.entries
    union_of_sets = {(n, i) for d in store.deltas for n, t in d.indices.items() for i in t.tolist()}
    assert together.entries == len(union_of_sets)


def test_grid_of_a_task_spans_what_any_task_touched():
    shapes = {
        "language_model.model.layers.2.mlp.up_proj.weight": (4, 5),
        "language_model.model.layers.2.mlp.up_proj.bias": (5,),
        "language_model.model.norm.weight": (4,),
    }
    mask = {"language_model.model.layers.2.mlp.up_proj.weight": torch.tensor([0, 3, 19]).numpy()}
    (grid,) = build_weight_map("x", mask, shapes).grids
    assert grid.layers == (None, 0, 1, 2)
    assert grid.modules == ("up_proj", "norm")
    assert {spot: (c.entries, c.size) for spot, c in grid.cells.items()} == {
        ("up_proj", 2): (3, 25)
    }


def test_overlap_by_hand():
    first = {"a": torch.tensor([1, 2, 3]).numpy(), "b": torch.tensor([7]).numpy()}
    second = {"a": torch.tensor([3, 9]).numpy(), "c": torch.tensor([7]).numpy()}
    found = measure_overlap(first, second, patchable=100)
    assert (found.shared, found.jaccard, found.containment) == (1, 1 / 6, 1 / 4)
    assert found.random_containment == pytest.approx(3 / 100)
    assert found.random_jaccard == pytest.approx(0.12 / 6.88)


@pytest.mark.parametrize("seed", range(5))
def test_overlap_equals_that_of_sets(seed):
    draw = random.Random(seed)
    sets = [{draw.randrange(300) for _ in range(draw.randrange(200))} for _ in range(2)]
    masks = [{"a": torch.tensor(sorted(s), dtype=torch.int32).numpy()} for s in sets]
    assert measure_overlap(*masks, patchable=300).shared == len(sets[0] & sets[1])
    assert union_masks(masks)["a"].tolist() == sorted(sets[0] | sets[1])


def test_overlap_of_random_masks_is_the_expected_one():
    draw = random.Random(7)
    masks = [{"a": torch.tensor(sorted(draw.sample(range(40_000), 4_000))).numpy()} for _ in "ab"]
    found = measure_overlap(*masks, patchable=40_000)
    assert found.jaccard == pytest.approx(found.random_jaccard, rel=0.15)
    assert found.containment == pytest.approx(found.random_containment, rel=0.15)


def test_of_a_store_on_disk(tmp_path):
    name, after = "language_model.model.layers.0.mlp.up_proj.weight", torch.ones(2)
    base = {"folder": "base", "dtype": "float32", "family": "llava", "fingerprint": "f" * 64}
    store = DeltaStore.create(tmp_path, base | {"parameters": 12, "bytes": 48}, "base: base\n")
    parts = {name: torch.tensor([1, 5], dtype=torch.int32)}, {name: torch.zeros(2)}, {name: after}
    for task in "ab":
        parent = store.entries[-1].sha256 if store.entries else ""
        info = {"method": "random", "density": 0.2, "patchable": 12, "penalty": 0.5}
        made = {"task": task, "base": "f" * 64, "parent": parent, "info": info}
        store.append(Delta.from_change(*parts, {name: (3, 4)}, **made))
    store.write_results({"tasks": ["a", "b"], "matrix": [[0.0, 0.5], [1.0, 0.5], [0.9, 1.0]]})
    store.write_answers(1, {"a": [fake_answer(0, 1)]})
    report = summarise_store(DeltaStore.open(tmp_path))
    assert [found.entries for found in report.maps] == [2, 2, 2]
    assert report.overlaps[0][1].jaccard == 1
    assert [row.bytes for row in report.deltas] == [entry.bytes for entry in store.entries]
    assert list(report.examples) == ["a"]
    page = write_report(store, tmp_path / "report.html").read_text()
    assert "90.0" in page
    assert "random at density 0.2, penalty 0.5" in page


@pytest.mark.parametrize("carried", [{}, {"x": 1.0}, {"5": "y"}, {"5": True}, {"9" * 5000: 1.0}])
def test_losses_that_are_none_are_left_out(carried, monkeypatch):
    store = FakeStore()
    known = {**store.results(), "losses": {"action": {**carried, "7": 10**400, "3": 0.5}}}
    monkeypatch.setattr(store, "results", lambda: known)
    first, *others = summarise_store(store).training
    assert first.losses == [(3, 0.5)]
    assert [record.losses for record in others] == [[], []]


def test_a_loss_lies_between_the_axes():
    frame = LossFrame([[(10, 2.0), (20, 1.0)], [(5, 4.0)], []])
    assert (frame.top, frame.bottom) == (4.0, 0.0)
    assert frame.scale_y(4.0) == TOP and frame.scale_y(0.0) == HEIGHT - BOTTOM
    (first, second) = frame.place_dots([(10, 2.0), (20, 1.0)])
    assert first[0] == (LEFT + WIDTH - RIGHT) / 2 and second[0] == WIDTH - RIGHT
    assert LossFrame([[(0, -1.0)]]).scale_y(-1.0) == HEIGHT - BOTTOM


def test_numbers_in_words():
    shown = [
        *map(format_percent, (0.725, None)),
        *map(format_points, (0.0123, -0.05)),
    ]
    assert shown == [
        "72.5", "–", "+1.2", "−5.0",
    ]  # fmt: skip
    assert [format_points(-0.0001), format_points(None)] == ["+0.0", "–"]
    assert [format_share(0.00098), format_share(1), format_share(0), format_share(1e-9)] == [
        "0.098 %", "100 %", "0 %", "< 0.0001 %",
    ]  # fmt: skip
    assert [format_permille(0.00123), format_permille(0.0123), format_permille(0.00999)] == [
        "1.2",
        "12",
        "10",
    ]
    assert [format_bytes(999), format_bytes(45_213), format_bytes(13.5e9)] == [
        "999 B",
        "45.2 kB",
        "13.5 GB",
    ]
    assert [format_count(1234567), format_fact({"a": 0.5, "b": {"c": 1200}})] == [
        "1,234,567", "a 0.5, b (c 1,200)"
    ]  # fmt: skip
    assert [*map(format_duration, (None, 7.04, 59.96, 3599.6, 12_000))] == [
        "–", "7.0 s", "1 min 0 s", "1 h 0 min", "3 h 20 min"
    ]  # fmt: skip
    assert [*map(format_loss, (None, 0.0123456, 2))] == ["–", "0.0123", "2"]
    assert format_fact([{"task": "a", "k": 2}, "b"]) == "task a, k 2; b"
