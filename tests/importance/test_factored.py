"""Importance in little space: rows, columns, and nothing that depends on how scores arrive."""

import pytest
import torch

from mm_piece.importance import FactoredImportance, factor_scores

SHAPES = {"linear": (6, 8), "bias": (7,), "conv": (3, 2, 2, 2), "experts": (2, 3, 4)}


def scores_of(seed=0):
    random = torch.Generator().manual_seed(seed)
    return {n: torch.rand(shape, generator=random).exp() for n, shape in SHAPES.items()}


def pieces_of(scores, size):
    for name, values in scores.items():
        for start in range(0, values.numel(), size):
            yield name, start, values.flatten()[start : start + size]


def dense(found, name):
    size = torch.Size(SHAPES[name]).numel()
    return found.scores_at(name, torch.arange(size)).view(SHAPES[name])


def matrix(scores):
    """Rows are what makes one output."""
    if scores.dim() == 1:
        return scores[:, None]
    return scores.flatten(1) if scores.dim() > 3 else scores.reshape(-1, scores.shape[-1])


def test_is_the_product_of_the_sums():
    scores = scores_of()
    found = factor_scores(pieces_of(scores, 100), SHAPES)
    total = sum(float(s.sum()) for s in scores.values())
    mean = total / sum(s.numel() for s in scores.values())
    for name, values in scores.items():
        whole = matrix(values)
        expected = whole.sum(1)[:, None] * whole.sum(0) / whole.sum() / mean
        torch.testing.assert_close(
            dense(found, name), expected.view(SHAPES[name]), rtol=2**-7, atol=0
        )


def test_vectors_and_matrices_of_rank_one_stay_as_they_are():
    scores = scores_of()
    scores["linear"] = scores["linear"][:, :1] * scores["linear"][:1]
    found = factor_scores(pieces_of(scores, 5), SHAPES)
    mean = torch.cat([s.flatten() for s in scores.values()]).mean()
    for name in ("linear", "bias"):
        torch.testing.assert_close(dense(found, name), scores[name] / mean, rtol=2**-7, atol=0)


@pytest.mark.parametrize("size", [1, 3, 7, 8, 1000])
def test_does_not_depend_on_the_pieces(size):
    scores = scores_of(1)
    one, other = (factor_scores(pieces_of(scores, cut), SHAPES) for cut in (size, 16))
    for name in SHAPES:
        assert torch.equal(one.rows[name], other.rows[name])
        assert torch.equal(one.columns[name], other.columns[name])


def test_is_relative_to_its_mean():
    found = factor_scores(pieces_of(scores_of(), 9), SHAPES)
    twice = factor_scores(pieces_of({n: 1e-9 * s for n, s in scores_of().items()}, 9), SHAPES)
    values = torch.cat([dense(found, name).flatten() for name in SHAPES])
    assert float(values.mean()) == pytest.approx(1, rel=1e-2)
    for name in SHAPES:
        torch.testing.assert_close(dense(found, name), dense(twice, name), rtol=2**-7, atol=0)


def test_takes_two_bytes_for_a_row_and_a_column():
    found = factor_scores(pieces_of(scores_of(), 9), SHAPES)
    assert found.rows["linear"].dtype == found.columns["linear"].dtype == torch.bfloat16
    assert {n: len(r) for n, r in found.rows.items()} == {
        "linear": 6,
        "bias": 7,
        "conv": 3,
        "experts": 6,
    }
    assert {n: len(c) for n, c in found.columns.items()} == {
        "linear": 8,
        "bias": 1,
        "conv": 8,
        "experts": 4,
    }


def test_scores_of_nothing_but_zeros_are_zeros():
    found = factor_scores(pieces_of({n: 0 * s for n, s in scores_of().items()}, 9), SHAPES)
    assert all(not dense(found, name).any() for name in SHAPES)


def test_a_weight_without_scores_has_no_importance():
    assert not FactoredImportance({}, {}).scores_at("elsewhere", torch.arange(3)).any()
