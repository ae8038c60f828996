"""Counts of what two positions have in common are those of sets of entries."""

import pytest
import torch
from edits import EDITS, base_of, change
from hypothesis import given

from mm_piece.deltas import comparison
from mm_piece.dtypes import view_bits
from mm_piece.errors import MismatchError


def compare_positions(left, right):
    return comparison.compare_positions(
        [delta.arrays for delta in left], [delta.arrays for delta in right]
    )


def entries(edits, name):
    return {
        index: view_bits(torch.tensor(value)).item() for index, value in edits.get(name, {}).items()
    }


@given(EDITS, EDITS)
def test_counts_are_those_of_sets(left, right):
    base = {"a": torch.full((20,), 9.0), "b": torch.full((20,), 9.0)}
    found = compare_positions([change(base, left)], [change(base, right)])
    for row in found["tensors"]:
        ours, theirs = entries(left, row["name"]), entries(right, row["name"])
        both = ours.keys() & theirs.keys()
        assert row["left"] == len(ours) - len(both)
        assert row["right"] == len(theirs) - len(both)
        assert row["equal"] == sum(ours[i] == theirs[i] for i in both)
        assert row["different"] == sum(ours[i] != theirs[i] for i in both)
        assert (row["group"], row["shape"]) == ("language", [20])
    total = found["groups"]["language"]
    assert total["left"] == sum(row["left"] for row in found["tensors"])
    assert sum(found["groups"]["vision"].values()) == 0


def test_a_position_is_compared_by_what_it_holds_in_the_end():
    base = base_of()
    first = change(base, {"a": {1: 1.0, 2: 1.0}}, "ocr")
    live = {name: tensor.clone() for name, tensor in base.items()}
    first.apply(live)
    second = change(live, {"a": {2: 5.0, 3: 5.0}}, "charts", parent="f" * 64)
    second = type(second)(**{**vars(second), "base": first.base})
    found = compare_positions([first], [first, second])
    assert {key: found["tensors"][0][key] for key in ("left", "right", "equal", "different")} == {
        "left": 0,
        "right": 1,
        "equal": 1,
        "different": 1,
    }
    assert found["same_base"]
    assert found["overlap"] == {
        "tasks": ["ocr", "charts"],
        "entries": [[2, 1], [1, 2]],
        "conflicts": [[0, 1], [1, 0]],
    }


def test_one_delta_on_both_sides_has_one_row():
    delta = change(base_of(), {"a": {1: 1.0}})
    again = type(delta).from_bytes(delta.to_bytes())
    other = change(base_of(), {"a": {1: 2.0}})
    deltas = [delta.arrays for delta in (delta, again, other)]
    assert comparison.count_overlap(deltas)["entries"] == [[1, 1], [1, 1]]


def test_bases_and_kinds():
    left, right = change(base_of(), {"a": {1: 1.0}}), change(base_of(seed=1), {"a": {1: 1.0}})
    assert not compare_positions([left], [right])["same_base"]
    assert compare_positions([], [])["tensors"] == []
    with pytest.raises(MismatchError, match="bfloat16"):
        compare_positions([left], [change(base_of(torch.bfloat16), {"a": {1: 1.0}})])
