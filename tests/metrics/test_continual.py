"""Metrics of the accuracy matrix: worked by hand, and the laws that hold for any matrix."""

import random
from statistics import fmean

import pytest

from mm_piece.metrics import continual

# Three tasks. Rows: base, after 1, after 2, after 3.
MATRIX = [
    [0.1, 0.2, 0.3],
    [0.9, 0.3, 0.2],
    [0.8, 0.7, 0.4],
    [0.6, 0.8, 0.5],
]


def random_matrix(seed: int, num_tasks: int, num_rows: int) -> list[list[float]]:
    draw = random.Random(seed).random
    return [[draw() for _ in range(num_tasks)] for _ in range(num_rows)]


def test_worked_by_hand():
    assert continual.summarise_matrix(MATRIX) == pytest.approx(
        {
            "learned": (0.9 + 0.7 + 0.5) / 3,
            "op": (0.6 + 0.8 + 0.5) / 3,
            "maa": (0.9 + (0.8 + 0.7) / 2 + (0.6 + 0.8 + 0.5) / 3) / 3,
            "bwt": ((0.6 - 0.9) + (0.8 - 0.7)) / 2,
            "forgetting": ((0.9 - 0.6) + (0.7 - 0.8)) / 2,
            "fwt": ((0.3 - 0.2) + (0.4 - 0.3)) / 2,
        }
    )


def test_a_run_under_way_speaks_of_the_tasks_seen():
    found = continual.summarise_matrix(MATRIX[:3])
    assert found == pytest.approx(
        {
            "learned": (0.9 + 0.7) / 2,
            "op": (0.8 + 0.7) / 2,
            "maa": (0.9 + (0.8 + 0.7) / 2) / 2,
            "bwt": 0.8 - 0.9,
            "forgetting": 0.9 - 0.8,
            "fwt": 0.3 - 0.2,
        }
    )


def test_one_task_has_nothing_backward_or_forward():
    found = continual.summarise_matrix([[0.25], [0.75]])
    assert found == {
        "learned": 0.75,
        "op": 0.75,
        "maa": 0.75,
        "bwt": None,
        "forgetting": None,
        "fwt": None,
    }


@pytest.mark.parametrize("matrix", [[], [[]], [[0.1, 0.2, 0.3]]])
def test_without_a_learned_task_there_is_no_metric(matrix):
    assert set(continual.summarise_matrix(matrix).values()) == {None}


def test_forgetting_counts_what_the_base_could_do():
    assert continual.average_forgetting([[0.9, 0.0], [0.7, 0.0], [0.6, 1.0]]) == pytest.approx(
        0.9 - 0.6
    )


@pytest.mark.parametrize("matrix", [[[0.1], [0.2], [0.3]], [[0.1, 0.2], [0.3]]])
def test_a_matrix_of_another_shape_is_refused(matrix):
    with pytest.raises(ValueError, match="T columns and at most T \\+ 1 rows"):
        continual.overall_performance(matrix)


@pytest.mark.parametrize("seed", range(8))
def test_a_shift_of_every_score_moves_levels_and_no_difference(seed):
    matrix = random_matrix(seed, 5, 6)
    shifted = continual.summarise_matrix([[score + 0.5 for score in row] for row in matrix])
    for name, value in continual.summarise_matrix(matrix).items():
        level = 0.5 if name in ("learned", "op", "maa") else 0.0
        assert value is not None
        assert shifted[name] == pytest.approx(value + level)


@pytest.mark.parametrize("seed", range(8))
def test_identities(seed):
    num_tasks = 2 + seed % 5
    matrix = random_matrix(seed, num_tasks, num_tasks + 1)
    found = continual.summarise_matrix(matrix)
    assert all(value is not None for value in found.values())
    # BWT is the difference of OP and learned, spread over the T - 1 earlier tasks.
    spread = (found["op"] - found["learned"]) * num_tasks / (num_tasks - 1)
    assert found["bwt"] == pytest.approx(spread)
    # The best position cannot be worse than the one right after learning.
    assert found["forgetting"] >= -found["bwt"] - 1e-12
    # MAA is the mean of OP over the stages.
    stages = [
        continual.overall_performance(matrix[: stage + 1]) for stage in range(1, num_tasks + 1)
    ]
    assert found["maa"] == pytest.approx(fmean(stages))


def test_the_base_row_enters_forgetting_and_fwt_only():
    other_base = [[0.0, 0.0, 0.0], *MATRIX[1:]]
    before, after = continual.summarise_matrix(MATRIX), continual.summarise_matrix(other_base)
    assert {name for name in before if before[name] != after[name]} <= {"forgetting", "fwt"}
    assert before["fwt"] != after["fwt"]


def test_every_metric_has_its_convention():
    assert (
        list(continual.CONVENTIONS)
        == list(continual.MATRIX_METRICS)
        == list(continual.summarise_matrix(MATRIX))
    )
    assert all("\n" not in line for line in continual.CONVENTIONS.values())
