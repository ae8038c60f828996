"""Metrics of an accuracy matrix: pure functions of numbers, each with its convention in one line.

The matrix `R` is a list of rows. Row 0 is the base, row i is the model after task i; column j
holds the scores of task j + 1, so the score of task t right after it was learned is `R[t][t - 1]`.
A run that is still under way has fewer rows than tasks + 1: every metric then speaks of the t tasks
seen so far. A metric that has nothing to average (no task yet, or a single task for the backward
and forward ones) is `None`.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

AccuracyMatrix = Sequence[Sequence[float]]


def learned_accuracy(matrix: AccuracyMatrix) -> float | None:
    """Mean of the diagonal: how well each task was learned when its turn came (MFT)."""
    return _compute_mean(matrix[task][task - 1] for task in _list_seen_tasks(matrix))


def overall_performance(matrix: AccuracyMatrix) -> float | None:
    """Mean of the last row over the tasks seen: overall performance (OP, Last, MFN)."""
    return _compute_mean(matrix[-1][task - 1] for task in _list_seen_tasks(matrix))


def mean_average_accuracy(matrix: AccuracyMatrix) -> float | None:
    """Mean over the stages of the mean over the tasks seen by then."""
    return _compute_mean(fmean(matrix[stage][:stage]) for stage in _list_seen_tasks(matrix))


def backward_transfer(matrix: AccuracyMatrix) -> float | None:
    """Backward transfer: what earlier tasks gained since each was learned; a loss is below 0."""
    return _compute_mean(
        matrix[-1][task - 1] - matrix[task][task - 1] for task in _list_seen_tasks(matrix)[:-1]
    )


def average_forgetting(matrix: AccuracyMatrix) -> float | None:
    """What the earlier tasks lost since the best position each has stood at, the base included."""
    columns = list(zip(*matrix, strict=True))
    best_and_last = (
        (max(columns[t - 1][:-1]), columns[t - 1][-1]) for t in _list_seen_tasks(matrix)[:-1]
    )
    return _compute_mean(best - last for best, last in best_and_last)


def forward_transfer(matrix: AccuracyMatrix) -> float | None:
    """Forward transfer: what the later tasks gained over the base before their own turn."""
    return _compute_mean(
        matrix[task - 1][task - 1] - matrix[0][task - 1] for task in _list_seen_tasks(matrix)[1:]
    )


def summarise_matrix(matrix: AccuracyMatrix) -> dict[str, float | None]:
    """Every metric of the matrix, by name, in the order of `CONVENTIONS`."""
    return {name: metric(matrix) for name, metric in MATRIX_METRICS.items()}


def _list_seen_tasks(matrix: AccuracyMatrix) -> range:
    """The tasks seen so far, 1…t."""
    num_tasks = len(matrix[0]) if matrix else 0
    if len(matrix) > num_tasks + 1 or any(len(row) != num_tasks for row in matrix):
        rows = [len(row) for row in matrix]
        raise ValueError(
            f"an accuracy matrix has T columns and at most T + 1 rows; got rows {rows}"
        )
    return range(1, len(matrix))


def _compute_mean(values: Iterable[float]) -> float | None:
    present = list(values)
    return fmean(present) if present else None


MATRIX_METRICS: dict[str, Callable[[AccuracyMatrix], float | None]] = {
    "learned": learned_accuracy,
    "op": overall_performance,
    "maa": mean_average_accuracy,
    "bwt": backward_transfer,
    "forgetting": average_forgetting,
    "fwt": forward_transfer,
}

# R[i][j]: score on task j after task i, j from 1; T: the tasks seen so far; row 0: the base.
CONVENTIONS = {
    "learned": "mean over j ≤ T of R[j][j], the diagonal (also MFT); higher is better",
    "op": "mean over j ≤ T of R[T][j], the last row (also Last, MFN); higher is better",
    "maa": "mean over i ≤ T of the mean over j ≤ i of R[i][j]; higher is better",
    "bwt": "mean over j < T of R[T][j] − R[j][j]; below 0: earlier tasks lost",
    "forgetting": "mean over j < T of (max over 0 ≤ i < T of R[i][j]) − R[T][j]; lower is better",
    "fwt": "mean over 1 < j ≤ T of R[j−1][j] − R[0][j]; above 0: earlier tasks helped later ones",
}
