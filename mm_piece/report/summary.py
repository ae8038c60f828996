"""The content of the page, as plain data: this module reads and counts, and formats nothing."""

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mm_piece.errors import StoreError
from mm_piece.metrics import continual
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
from mm_piece.store.results import AnswerRecord, Answers, parse_overlaps

if TYPE_CHECKING:
    from PIL.Image import Image

    from mm_piece.store.delta_store import DeltaStore

AnswersByRow = dict[str, dict[int, dict[int, AnswerRecord]]]  # task → row → position
ExampleImages = Mapping[str, Iterable[tuple[int, "Image"]]]  # task → (row of its test set, image)

# A store whose deltas were never measured still has sizes and maps to show.
_UNMEASURED = {"matrix": [], "base_ability": [], "base_ability_name": "base", "base_kinds": {}}
_NUM_ROWS = 3  # examples shown of each task if the caller chose none
_IMAGE_SIDE = 320  # pixels; larger images are shrunk before they are embedded


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
class GroupChange:
    """Statistics of a task's changes in one group."""

    task: str
    group: str
    stats: dict[str, float]


@dataclass(frozen=True)
class Attempt:
    """The model's answer at one position, and its score."""

    position: int
    prediction: str
    score: float


@dataclass(frozen=True)
class ReportExample:
    """One test example: its image (a data URI), question, expected answer, generated answers."""

    row: int
    image: str | None
    prompt: str
    expected: str
    attempts: list[Attempt]


@dataclass(frozen=True)
class Report:
    """The content of one page."""

    base: BaseRecord
    tasks: list[str]
    matrix: list[list[float]]
    num_examples: dict[str, int]
    ability: Curve | None
    curves: list[Curve]
    kinds: list[Curve]
    metrics: list[MatrixMetric]
    deltas: list[DeltaSummary]
    maps: list[WeightMap]
    overlaps: list[list[Overlap]]
    examples: dict[str, list[ReportExample]]
    recipe: str
    stability: list[tuple[str, list[tuple[int, float]]]]  # by delta: examples, overlap of masks

    @property
    def positions(self) -> list[str]:
        """A name for each position: the base, then the task that led there."""
        return ["base", *self.tasks]

    @property
    def changes(self) -> list[GroupChange]:
        """The change report of every delta that has one."""
        changes = []
        for delta in self.deltas:
            task = f"{delta.position} {delta.task}"
            for group, row in find_change_rows(delta.info).items():
                changes.append(GroupChange(task, group, row))
        return changes

    @property
    def info_keys(self) -> list[str]:
        """The keys of the deltas' `info`, in the order of their first appearance."""
        keys: dict[str, None] = {}
        for delta in self.deltas:
            keys.update(dict.fromkeys(delta.info))
        return list(keys)


def summarise_store(
    store: "DeltaStore",
    examples: ExampleImages | None = None,
) -> Report:
    """Read a delta store once and count the content of the page."""
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

    return Report(
        base=store.base,
        tasks=tasks,
        matrix=matrix,
        num_examples=num_examples,
        ability=Curve(results["base_ability_name"], ability) if ability else None,
        curves=_build_curves(matrix, tasks),
        kinds=[Curve(kind, values) for kind, values in results["base_kinds"].items()],
        metrics=_build_metrics(matrix),
        deltas=deltas,
        maps=_build_maps(masks, shapes, deltas),
        overlaps=_build_overlaps(masks, deltas),
        examples=_build_examples(answers, tasks, examples),
        recipe=store.recipe,
        stability=_build_stability(results, deltas),
    )


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


def _build_examples(
    answers: list[Answers],
    tasks: list[str],
    images: ExampleImages | None,
) -> dict[str, list[ReportExample]]:
    """Return the caller's examples, or the first few of each task, with the generated answers."""
    given = _group_by_row(answers)
    chosen = images or _choose_rows(given, tasks)

    examples = {}
    for task, rows in chosen.items():
        if task not in given:
            continue
        # a chosen row without an answer is left out: a run may be limited to fewer test examples
        answered = given[task]
        examples[task] = [
            _build_example(answered[row], image) for row, image in rows if row in answered
        ]
    return examples


def _choose_rows(given: AnswersByRow, tasks: list[str]) -> dict[str, list[tuple[int, None]]]:
    """Choose the first answered rows of each task, without images."""
    chosen = {}
    for task in tasks:
        rows = list(given.get(task, ()))
        chosen[task] = [(row, None) for row in rows[:_NUM_ROWS]]
    return chosen


def _group_by_row(answers: list[Answers]) -> AnswersByRow:
    """Regroup the answers by task, then row, then position."""
    # the order of insertion is the order on the page: tasks, then rows, then positions
    given: AnswersByRow = {}
    for position, at_position in enumerate(answers):
        for task, rows in at_position.items():
            for answer in rows:
                by_row = given.setdefault(task, {})
                by_position = by_row.setdefault(answer["row"], {})
                by_position[position] = answer
    return given


def _build_example(
    answers: dict[int, AnswerRecord],
    image: "Image | None",
) -> ReportExample:
    """Build one example from its answers by position."""
    attempts = []
    for position, answer in answers.items():
        attempt = Attempt(
            position=position,
            prediction=answer["prediction"],
            score=answer["score"],
        )
        attempts.append(attempt)

    # question and expected answer are the same at every position
    asked = next(iter(answers.values()))
    return ReportExample(
        row=asked["row"],
        image=encode_data_uri(image) if image else None,
        prompt=asked["prompt"],
        expected=asked["answer"],
        attempts=attempts,
    )


def encode_data_uri(image: "Image") -> str:
    """Return the image, shrunk to fit the page, as a data URI for an HTML page."""
    small = image.convert("RGB")  # a copy: `thumbnail` works in place
    small.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = io.BytesIO()
    # WebP: a page embeds many images
    small.save(buffer, format="WEBP", quality=88)

    encoded = base64.b64encode(buffer.getvalue())
    return "data:image/webp;base64," + encoded.decode()
