"""Rules of merging: exact where one delta decides, order-free where they add, refused in doubt."""

from dataclasses import replace

import pytest
import torch
from edits import EDITS, base_of, change
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_piece.deltas.delta import compute_fingerprint
from mm_piece.deltas.entry_sets import find_conflicts, find_shared_entries, list_shared_names
from mm_piece.deltas.merging import (
    MERGE_RULES,
    collect_indices,
    merge_deltas,
    replay_deltas,
    require_agreement,
    require_mergeable,
)
from mm_piece.dtypes import view_bits
from mm_piece.entries import read_entries
from mm_piece.errors import BaseError, ConflictError, MismatchError, OrderError, PieceError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def merged(base, deltas, rule):
    index = collect_indices(deltas)
    values = {name: read_entries(base[name], at) for name, at in index.items()}
    after = {name: tensor.clone() for name, tensor in base.items()}
    for name, row in merge_deltas(deltas, index, values, rule).items():
        after[name].view(-1)[index[name].long()] = row
    return after


def same(left, right):
    return all(torch.equal(view_bits(left[name]), view_bits(right[name])) for name in left)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", MERGE_RULES)
def test_disjoint_deltas_merge_to_the_same_bits_under_every_rule(dtype, rule):
    base = base_of(dtype)
    ours = change(base, {"a": {0: -0.0, 3: float("nan"), 5: 1e-3}})
    theirs = change(base, {"a": {4: 7.0}, "b": {1: 0.3}})
    after = {name: tensor.clone() for name, tensor in base.items()}
    ours.apply(after)
    theirs.apply(after)
    assert same(merged(base, [ours, theirs], rule), after)
    assert same(merged(base, [theirs, ours], rule), after)


def test_last_and_first_decide_by_order():
    base = base_of()
    ours, theirs = change(base, {"a": {1: 1.0, 2: 1.0}}), change(base, {"a": {2: 2.0, 3: 2.0}})
    assert merged(base, [ours, theirs], "last")["a"][1:4].tolist() == [1.0, 2.0, 2.0]
    assert merged(base, [ours, theirs], "first")["a"][1:4].tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_adds_in_fp32_and_rounds_once(dtype):
    base = base_of(dtype)
    deltas = [change(base, {"a": {7: value}}) for value in (0.37, -1.21, 5.5)]
    wide = base["a"][7].float()
    steps = torch.stack([delta.values["a"][0].float() - wide for delta in deltas])
    expected = (wide + steps.sort().values.sum()).to(dtype)
    for order in (deltas, deltas[::-1], deltas[1:] + deltas[:1]):
        assert merged(base, order, "sum")["a"][7] == expected


def test_ties_takes_the_mean_of_those_that_agree_with_the_sign_of_the_sum():
    base = {"a": torch.zeros(4)}
    deltas = [
        change(base, {"a": {0: 4.0, 1: 1.0, 2: 3.0}}),
        change(base, {"a": {0: 2.0, 1: -5.0, 2: -3.0}}),
        change(base, {"a": {0: -1.0, 3: 9.0}}),
    ]
    # 4 and 2 outvote -1; -5 outvotes 1; 3 and -3 cancel; 9 stands alone.
    assert merged(base, deltas, "ties")["a"].tolist() == [3.0, -5.0, 0.0, 9.0]
    assert same(merged(base, deltas[::-1], "ties"), merged(base, deltas, "ties"))


def test_a_conflict_is_an_error_by_default_and_names_the_place():
    base = base_of()
    ours = change(base, {"a": {1: 1.0}, "b": {2: 1.0, 3: 1.0}}, "ocr")
    theirs = change(base, {"a": {1: 1.0}, "b": {3: 2.0}}, "charts")
    with pytest.raises(ConflictError, match=r"'ocr' and 'charts' change 1 entries .* b\[3\]"):
        merged(base, [ours, theirs], "error")
    agreeing = change(base, {"a": {1: 1.0}})
    assert merged(base, [ours, agreeing], "error")["a"][1] == 1.0


def test_equal_numbers_of_other_bits_are_a_conflict():
    base = {"a": torch.ones(2)}
    left, right = change(base, {"a": {0: 0.0}}), change(base, {"a": {0: -0.0}})
    with pytest.raises(ConflictError):
        require_agreement([left, right])


def test_deltas_that_do_not_start_from_this_base_are_refused():
    base, other = base_of(), base_of(seed=1)
    ours, theirs = change(base, {"a": {1: 1.0}}), change(other, {"a": {2: 1.0}})
    with pytest.raises(BaseError, match="'t' and 't' belong to different bases"):
        require_mergeable([ours, theirs], "last")
    with pytest.raises(BaseError, match="SHA-256 before"):
        merged(other, [ours], "last")
    with pytest.raises(OrderError, match="squash"):
        merged(base, [ours, change(base, {"a": {2: 1.0}}, parent="f" * 64)], "last")
    with pytest.raises(PieceError, match=r"'mean'; known: error, last, first, sum, ties"):
        merged(base, [ours], "mean")


def test_integers_are_not_added():
    base = {"a": torch.zeros(4, dtype=torch.int8)}
    deltas = [change(base, {"a": {0: 1}}), change(base, {"a": {0: 2}})]
    assert merged(base, deltas, "last")["a"][0] == 2
    with pytest.raises(PieceError, match="int8"):
        merged(base, deltas, "sum")


@settings(deadline=None)
@given(st.lists(EDITS, min_size=1, max_size=4), st.sampled_from(DTYPES))
def test_replay_is_one_delta_after_the_other(edits, dtype):
    base = base_of(dtype)
    live = {name: tensor.clone() for name, tensor in base.items()}
    deltas = []
    for edit in edits:
        deltas.append(change(live, edit))
        deltas[-1].apply(live)
    deltas = [change_base(delta, base) for delta in deltas]
    index = collect_indices(deltas)
    state = replay_deltas(
        deltas, index, {name: read_entries(base[name], at) for name, at in index.items()}
    )
    for name, at in index.items():
        assert torch.equal(view_bits(state[name]), view_bits(read_entries(live[name], at)))


def change_base(delta, base):
    return replace(delta, base=compute_fingerprint(base))


def test_replay_in_another_order_is_refused():
    base = base_of()
    first = change(base, {"a": {1: 1.0}})
    live = {name: tensor.clone() for name, tensor in base.items()}
    first.apply(live)
    second = change_base(change(live, {"a": {1: 2.0}}, parent="e" * 64), base)
    index = collect_indices([first, second])
    values = {name: read_entries(base[name], at) for name, at in index.items()}
    with pytest.raises(OrderError, match="eeeeeeeeeeee"):
        replay_deltas([second, first], index, values)


@given(EDITS, EDITS)
def test_shared_and_clash_count_as_sets_do(left, right):
    base = {"a": torch.full((20,), 9.0), "b": torch.full((20,), 9.0)}
    ours, theirs = change(base, left).arrays, change(base, right).arrays
    shared = list_shared_names(ours, theirs)
    for name in shared:
        mine, yours = left.get(name, {}), right.get(name, {})
        both = sorted(mine.keys() & yours.keys())
        assert find_shared_entries(ours, theirs, name)[0].tolist() == both
        differ = [
            i for i in both if view_bits(torch.tensor(mine[i])) != view_bits(torch.tensor(yours[i]))
        ]
        assert find_conflicts(ours, theirs, name).tolist() == differ
    assert shared == [name for name in ours.indices if left[name].keys() and right.get(name)]


def test_shapes_that_differ_are_refused():
    left = change({"a": torch.zeros(4)}, {"a": {1: 1.0}})
    right = change({"a": torch.zeros(2, 2)}, {"a": {1: 1.0}})
    with pytest.raises(MismatchError, match=r"\[4\] and \[2, 2\]"):
        find_conflicts(left.arrays, right.arrays, "a")
