"""Metrics of an accuracy matrix: pure functions of numbers, each with its convention in one line.

The matrix `R` is a list of rows. Row 0 is the base, row i is the model after task i; column j
holds the scores of task j + 1, so the score of task t right after it was learned is `R[t][t - 1]`.
A run that is still under way has fewer rows than tasks + 1; every metric then covers the t tasks
seen so far. A metric that has nothing to average (no task yet, or a single task for the backward
and forward ones) is `None`.
"""

from collections.abc import Callable, Sequence
from statistics import fmean

AccuracyMatrix = Sequence[Sequence[float]]
Scores = list[float]
Summary = dict[str, float | None]  # name of a metric -> its value
MatrixMetric = Callable[[AccuracyMatrix], float | None]


def learned_accuracy(matrix: AccuracyMatrix) -> float | None:
    """Return the mean of the diagonal: each task's score when it was learned (MFT)."""
    scores: Scores = []
    for task in _list_seen_tasks(matrix):
        learned = matrix[task][task - 1]
        scores.append(learned)
    return _compute_mean(scores)


def overall_performance(matrix: AccuracyMatrix) -> float | None:
    """Return the mean of the last row over the tasks seen: overall performance (OP, Last, MFN)."""
    scores: Scores = []
    for task in _list_seen_tasks(matrix):
        last = matrix[-1][task - 1]
        scores.append(last)
    return _compute_mean(scores)


def mean_average_accuracy(matrix: AccuracyMatrix) -> float | None:
    """Return the mean over the stages of the mean over the tasks seen by then."""
    # the average accuracy after each task, averaged over the run
    averages: Scores = []
    for stage in _list_seen_tasks(matrix):
        seen_scores = matrix[stage][:stage]
        average = fmean(seen_scores)
        averages.append(average)
    return _compute_mean(averages)


def backward_transfer(matrix: AccuracyMatrix) -> float | None:
    """Return the backward transfer: the earlier tasks' gain since each was learned.

    A loss is below 0.
    """
    gains: Scores = []
    for task in _list_seen_tasks(matrix)[:-1]:
        learned = matrix[task][task - 1]
        last = matrix[-1][task - 1]
        gain = last - learned
        gains.append(gain)
    return _compute_mean(gains)


def average_forgetting(matrix: AccuracyMatrix) -> float | None:
    """Return the earlier tasks' loss since the best position of each, the base included."""
    columns = list(zip(*matrix, strict=True))
    losses: Scores = []
    for task in _list_seen_tasks(matrix)[:-1]:
        # `max` over all rows but the last, so that a gain counts as a negative loss
        *earlier, last = columns[task - 1]
        loss = max(earlier) - last
        losses.append(loss)
    return _compute_mean(losses)


def forward_transfer(matrix: AccuracyMatrix) -> float | None:
    """Return the forward transfer: the later tasks' gain over the base before their own turn."""
    gains: Scores = []
    for task in _list_seen_tasks(matrix)[1:]:
        before = matrix[task - 1][task - 1]
        at_base = matrix[0][task - 1]
        gain = before - at_base
        gains.append(gain)
    return _compute_mean(gains)


def summarise_matrix(matrix: AccuracyMatrix) -> Summary:
    """Return every metric of the matrix, by name, in the order of `CONVENTIONS`."""
    values: Summary = {}
    for name, metric in MATRIX_METRICS.items():
        values[name] = metric(matrix)
    return values


def _list_seen_tasks(matrix: AccuracyMatrix) -> range:
    """Return the tasks seen so far, 1…t; raise ValueError unless the matrix has T columns."""
    num_tasks = len(matrix[0]) if matrix else 0
    row_lengths = [len(row) for row in matrix]
    is_ragged = any(length != num_tasks for length in row_lengths)
    if len(matrix) > num_tasks + 1 or is_ragged:
        raise ValueError(
            f"an accuracy matrix has T columns and at most T + 1 rows; got rows {row_lengths}"
        )
    return range(1, len(matrix))


def _compute_mean(values: Sequence[float]) -> float | None:
    if not values:
        return None
    return fmean(values)


MATRIX_METRICS: dict[str, MatrixMetric] = {
    "learned": learned_accuracy,
    "op": overall_performance,
    "maa": mean_average_accuracy,
    "bwt": backward_transfer,
    "forgetting": average_forgetting,
    "fwt": forward_transfer,
}

# What each metric says, for a reader who does not know its name.
MEANINGS = {
    "learned": "each task right after it was learned",
    "op": "all tasks at the last position: overall performance",
    "maa": "the tasks learned so far, over all positions",
    "bwt": "how earlier tasks changed since each was learned",
    "forgetting": "what earlier tasks lost since their best position",
    "fwt": "how later tasks changed before their own turn",
}
# Metrics that are changes of a score, not scores: their sign is shown.
CHANGES = {"bwt", "fwt"}

# R[i][j]: score on task j after task i, j from 1; T: the tasks seen so far; row 0: the base.
CONVENTIONS = {
    "learned": "mean over j ≤ T of R[j][j], the diagonal (also MFT); higher is better",
    "op": "mean over j ≤ T of R[T][j], the last row (also Last, MFN); higher is better",
    "maa": "mean over i ≤ T of the mean over j ≤ i of R[i][j]; higher is better",
    "bwt": "mean over j < T of R[T][j] − R[j][j]; below 0: earlier tasks lost",
    "forgetting": "mean over j < T of (max over 0 ≤ i < T of R[i][j]) − R[T][j]; lower is better",
    "fwt": "mean over 1 < j ≤ T of R[j−1][j] − R[0][j]; above 0: earlier tasks helped later ones",
}
