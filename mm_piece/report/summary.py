"""The content of the page, as plain data: this module reads and counts, and formats nothing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mm_piece.errors import StoreError
from mm_piece.families import GROUPS
from mm_piece.metrics import continual
from mm_piece.report.examples import ImageLoader, TaskExamples, build_examples
from mm_piece.report.training_record import TrainingRecord, read_training_records
from mm_piece.report.weight_maps import (
    Indices,
    Overlap,
    Shapes,
    WeightMap,
    build_weight_map,
    measure_overlap,
    union_masks,
)
from mm_piece.sparse.change_report import find_change_rows
from mm_piece.store.records import BaseRecord
from mm_piece.store.results import Answers, parse_overlaps

if TYPE_CHECKING:
    from mm_piece.store.delta_store import DeltaStore

# A store whose deltas were never measured still has sizes and maps to show.
_UNMEASURED = {"matrix": [], "base_ability": [], "base_ability_name": "base", "base_kinds": {}}


@dataclass(frozen=True)
class Curve:
    """One score over the positions; `learned_at` is the position of its own training, if any."""

    title: str
    values: list[float]
    learned_at: int | None = None


@dataclass(frozen=True)
class MatrixMetric:
    """One function of the accuracy matrix, with its meaning in one line."""

    name: str
    value: float | None
    convention: str


@dataclass(frozen=True)
class DeltaSummary:
    """One delta of the store: its identity and its cost."""

    position: int
    task: str
    file: str
    sha256: str
    entries: int
    bytes: int
    info: dict[str, object]
    patchable: int  # entries that the task could change: its `info`'s claim, if possible


@dataclass(frozen=True)
class TaskScores:
    """One task's scores at three positions; None before its turn has come."""

    position: int
    task: str
    at_base: float
    at_own: float | None
    at_last: float | None


@dataclass(frozen=True)
class Report:
    """The content of one page."""

    name: str  # the store's folder
    base: BaseRecord
    tasks: list[str]
    matrix: list[list[float]]
    num_examples: dict[str, int]  # by task, general ones included
    num_general: dict[str, int]  # questions of base ability: in all under its name, and by kind
    ability: Curve | None
    curves: list[Curve]
    kinds: list[Curve]
    metrics: list[MatrixMetric]
    deltas: list[DeltaSummary]
    maps: list[WeightMap]
    overlaps: list[list[Overlap]]
    examples: dict[str, TaskExamples]
    training: list[TrainingRecord]
    recipe: str
    stability: list[tuple[str, list[tuple[int, float]]]]  # by delta: examples, overlap of masks

    @property
    def positions(self) -> list[str]:
        """A name for each position: the base, then the task that led there."""
        return ["base", *self.tasks]

    @property
    def num_measured(self) -> int:
        """The number of tasks that have been learned and measured."""
        return max(len(self.matrix) - 1, 0)

    @property
    def scores(self) -> list[TaskScores]:
        """Every task's score at the base, at its own position and at the last one."""
        scores = []
        for number, task in enumerate(self.tasks, start=1):
            if not self.matrix:
                break
            column = [row[number - 1] for row in self.matrix]
            is_learned = number <= self.num_measured
            score = TaskScores(
                position=number,
                task=task,
                at_base=column[0],
                at_own=column[number] if is_learned else None,
                at_last=column[-1] if is_learned else None,
            )
            scores.append(score)
        return scores

    @property
    def base_score(self) -> float | None:
        """The base's mean score on the tasks that have been learned since."""
        found = [score.at_base for score in self.scores if score.at_own is not None]
        return fmean(found) if found else None

    @property
    def changes(self) -> dict[str, dict[str, dict[str, float]]]:
        """The change report of every delta that has one: by delta, by group."""
        changes = {}
        for delta in self.deltas:
            rows = find_change_rows(delta.info)
            if rows:
                changes[f"{delta.position} {delta.task}"] = rows
        return changes

    @property
    def changed_groups(self) -> list[str]:
        """The groups in which any task changed an entry."""
        return [group for group in GROUPS if self._max_changed(group) > 0]

    @property
    def unchanged_groups(self) -> list[str]:
        """The groups of the model in which no task changed an entry."""
        return [group for group in GROUPS if self._max_changed(group) == 0]

    def _max_changed(self, group: str) -> float:
        """Return the most entries of a group that a task changed; -1 for a group without a row."""
        rows = [by_group[group] for by_group in self.changes.values() if group in by_group]
        return max((row.get("changed", 0) for row in rows), default=-1)

    @property
    def info_keys(self) -> list[str]:
        """The keys of the deltas' `info`, in the order of their first appearance."""
        keys: dict[str, None] = {}
        for delta in self.deltas:
            keys.update(dict.fromkeys(delta.info))
        return list(keys)


def summarise_store(
    store: "DeltaStore",
    load_images: ImageLoader | None = None,
) -> Report:
    """Read a delta store once and count the content of the page.

    Without `load_images` its test questions have no images.
    """
    _require_base_facts(store)
    masks, shapes, deltas = _read_deltas(store)

    # the store's results win over the stand-ins
    results = {
        **_UNMEASURED,
        "tasks": [delta.task for delta in deltas],
        **store.results(),
    }
    matrix = results["matrix"]
    tasks = results["tasks"]
    ability = results["base_ability"]
    answers = [store.answers(position) for position in range(len(matrix))]

    # the same test set at every position: the last count stands for all
    num_examples = {}
    for at_position in answers:
        for task, rows in at_position.items():
            num_examples[task] = len(rows)

    name = results["base_ability_name"]
    return Report(
        name=store.path.resolve().name,
        base=store.base,
        tasks=tasks,
        matrix=matrix,
        num_examples=num_examples,
        num_general=_count_general(name, results.get("general", []), answers),
        ability=Curve(name, ability) if ability else None,
        curves=_build_curves(matrix, tasks),
        kinds=[Curve(kind, values) for kind, values in results["base_kinds"].items()],
        metrics=_build_metrics(matrix),
        deltas=deltas,
        maps=_build_maps(masks, shapes, deltas),
        overlaps=_build_overlaps(masks, deltas),
        examples=build_examples(answers, tasks, load_images),
        training=read_training_records(results, store.entries),
        recipe=store.recipe,
        stability=_build_stability(results, deltas),
    )


def _count_general(
    name: str,
    tasks: Sequence[str],
    answers: Sequence[Answers],
) -> dict[str, int]:
    """Count the questions of the general tasks, in all under `name` and by kind of question.

    A position's test sets are the same as every other's: the last one's are counted.
    """
    at_last = answers[-1] if answers else {}
    rows: list[Mapping[str, object]] = []
    for task in tasks:
        rows += at_last.get(task, [])
    if not rows:
        return {}

    kinds = Counter(str(row["kind"]) for row in rows if row.get("kind"))
    return {**kinds, name: len(rows)}


def _require_base_facts(store: "DeltaStore") -> None:
    """Raise StoreError unless the base has the facts that the page compares deltas with."""
    for key in ("family", "dtype", "parameters", "bytes"):
        if not store.base.facts.get(key):
            raise StoreError(f"{store.path}: its base has no {key}, which a report shows")


def _build_curves(matrix: list[list[float]], tasks: list[str]) -> list[Curve]:
    """Return one curve for each task: its column of the accuracy matrix."""
    curves = []
    for column, task in enumerate(tasks):
        values = [row[column] for row in matrix]
        curves.append(Curve(task, values, column + 1))  # position 0 is the base
    return curves


def _build_metrics(matrix: list[list[float]]) -> list[MatrixMetric]:
    """Return all metrics of the accuracy matrix with their conventions."""
    metrics = []
    for name, value in continual.summarise_matrix(matrix).items():
        convention = continual.CONVENTIONS[name]
        metrics.append(MatrixMetric(name, value, convention))
    return metrics


def _build_stability(
    results: Mapping[str, Any],
    deltas: list[DeltaSummary],
) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return the overlaps of masks from fewer examples, for each delta that has them."""
    stability = []
    for delta in deltas:
        overlaps = parse_overlaps(results, delta.task)
        if overlaps:
            title = f"{delta.position} {delta.task}"
            stability.append((title, overlaps))
    return stability


def _read_deltas(store: "DeltaStore") -> tuple[list[Indices], Shapes, list[DeltaSummary]]:
    """Read all deltas once: their masks, the shapes of all changed tensors, and summaries."""
    masks = []
    shapes = {}
    summaries = []
    num_parameters = store.base.facts["parameters"]
    for entry in store.entries:
        delta = store.delta_arrays(entry.position)
        # a page needs the places only, so that the values can go
        masks.append(delta.indices)
        shapes |= delta.shapes
        summary = DeltaSummary(
            position=entry.position,
            task=entry.task,
            file=entry.file,
            sha256=entry.sha256,
            entries=entry.entries,
            bytes=entry.bytes,
            info=delta.info,
            patchable=_count_patchable(delta.info, entry.entries, num_parameters),
        )
        summaries.append(summary)
    return masks, shapes, summaries


def _count_patchable(
    info: Mapping[str, object],
    entries: int,
    parameters: int,
) -> int:
    """Return the patchable entries that a delta claims; all parameters for an impossible claim."""
    claimed = info.get("patchable")
    # `type`, not isinstance: True is no count
    if type(claimed) is int and entries <= claimed <= parameters:
        return claimed
    return parameters


def _build_maps(
    masks: list[Indices],
    shapes: Shapes,
    deltas: list[DeltaSummary],
) -> list[WeightMap]:
    """Build the map of all tasks together, then one per task."""
    if not masks:
        return []

    union = union_masks(masks)
    maps = [build_weight_map("all tasks", union, shapes)]
    for delta, mask in zip(deltas, masks, strict=True):
        title = f"{delta.position} {delta.task}"
        maps.append(build_weight_map(title, mask, shapes))
    return maps


def _build_overlaps(
    masks: list[Indices],
    deltas: list[DeltaSummary],
) -> list[list[Overlap]]:
    """Measure every pair of tasks; random masks choose from the patchable entries."""
    # tasks may differ in what they could change: the widest choice gives the least chance overlap
    patchable = max((delta.patchable for delta in deltas), default=0)
    overlaps = []
    for first in masks:
        row = [measure_overlap(first, second, patchable) for second in masks]
        overlaps.append(row)
    return overlaps
