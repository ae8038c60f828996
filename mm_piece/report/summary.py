"""What the page says, as plain data: everything is read and counted here, nothing is formatted."""

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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
from mm_piece.selection.stability import parse_overlaps
from mm_piece.sparse.change_report import find_change_rows

if TYPE_CHECKING:
    from PIL.Image import Image

    from mm_piece.store.delta_store import DeltaStore

ExampleImages = Mapping[str, Iterable[tuple[int, "Image"]]]  # task → (row of its test set, image)

# A store whose deltas were never measured still has sizes and maps to show.
_UNMEASURED = {"matrix": [], "base_ability": [], "base_ability_name": "base", "base_kinds": {}}
_NUM_ROWS = 3  # rows shown of each task when the caller chose none
_IMAGE_SIDE = 320  # pixels; larger images are shrunk before they are embedded


@dataclass(frozen=True)
class Curve:
    """One score over the positions; `learned_at` is the position that trained on it, if any."""

    title: str
    values: list[float]
    learned_at: int | None = None


@dataclass(frozen=True)
class MatrixMetric:
    """One function of the accuracy matrix, and in one line what it means."""

    name: str
    value: float | None
    convention: str


@dataclass(frozen=True)
class DeltaSummary:
    """One delta of the store: what it is, what it cost."""

    position: int
    task: str
    file: str
    sha256: str
    entries: int
    bytes: int
    info: dict[str, Any]
    patchable: int  # entries that the task could change: its own word, if that can be true


@dataclass(frozen=True)
class GroupChange:
    """What a task changed in one group."""

    task: str
    group: str
    stats: dict[str, float]


@dataclass(frozen=True)
class Attempt:
    """What the model answered at one position, and the score of that answer."""

    position: int
    prediction: str
    score: float


@dataclass(frozen=True)
class ReportExample:
    """One test row: its image (a data URI), question, expected answer and the answers given."""

    row: int
    image: str | None
    prompt: str
    expected: str
    attempts: list[Attempt]


@dataclass(frozen=True)
class Report:
    """The content of one page."""

    base: dict[str, Any]
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
        """The change report of every delta that carries one."""
        return [
            GroupChange(f"{delta.position} {delta.task}", group, row)
            for delta in self.deltas
            for group, row in find_change_rows(delta.info).items()
        ]

    @property
    def info_keys(self) -> list[str]:
        """What the deltas say about how they were made, in the order they say it."""
        return list(dict.fromkeys(key for delta in self.deltas for key in delta.info))


def summarise_store(store: "DeltaStore", examples: ExampleImages | None = None) -> Report:
    """Read a delta store once and count what the page shows."""
    _require_base_facts(store)
    masks, shapes, deltas = _read_deltas(store)
    results = {**_UNMEASURED, "tasks": [delta.task for delta in deltas], **store.results()}
    matrix, tasks, name = results["matrix"], results["tasks"], results["base_ability_name"]
    answers = [store.answers(position) for position in range(len(matrix))]
    return Report(
        base=store.base,
        tasks=tasks,
        matrix=matrix,
        num_examples={task: len(rows) for at in answers for task, rows in at.items()},
        ability=Curve(name, results["base_ability"]) if results["base_ability"] else None,
        curves=[Curve(t, [row[j] for row in matrix], j + 1) for j, t in enumerate(tasks)],
        kinds=[Curve(kind, values) for kind, values in results["base_kinds"].items()],
        metrics=[
            MatrixMetric(n, v, continual.CONVENTIONS[n])
            for n, v in continual.summarise_matrix(matrix).items()
        ],
        deltas=deltas,
        maps=_build_maps(masks, shapes, deltas),
        overlaps=_build_overlaps(masks, deltas),
        examples=_build_examples(answers, tasks, examples),
        recipe=store.recipe,
        stability=[
            (f"{d.position} {d.task}", parse_overlaps(results, d.task))
            for d in deltas
            if parse_overlaps(results, d.task)
        ],
    )


def _require_base_facts(store: "DeltaStore") -> None:
    """Raise StoreError unless the store says what the page compares deltas with."""
    needed = ("family", "dtype", "parameters", "bytes")
    if missing := [key for key in needed if not store.base.get(key)]:
        raise StoreError(f"{store.path}: its base has no {missing[0]}, which a report shows")


def _read_deltas(store: "DeltaStore") -> tuple[list[Indices], Shapes, list[DeltaSummary]]:
    masks, shapes, rows = [], {}, []
    for entry in store.entries:
        delta = store.delta(entry.position)
        masks.append({name: np.asarray(index) for name, index in delta.indices.items()})
        shapes |= delta.shapes
        rows.append(
            DeltaSummary(
                position=entry.position,
                task=entry.task,
                file=entry.file,
                sha256=entry.sha256,
                entries=entry.entries,
                bytes=entry.bytes,
                info=delta.info,
                patchable=_count_patchable(delta.info, entry.entries, store.base["parameters"]),
            )
        )
    return masks, shapes, rows


def _count_patchable(info: Mapping[str, Any], entries: int, parameters: int) -> int:
    claimed = info.get("patchable")
    return claimed if type(claimed) is int and entries <= claimed <= parameters else parameters


def _build_maps(
    masks: list[Indices], shapes: Shapes, deltas: list[DeltaSummary]
) -> list[WeightMap]:
    """The map of all tasks together, then one per task."""
    if not masks:
        return []
    per_task = [
        build_weight_map(f"{delta.position} {delta.task}", mask, shapes)
        for delta, mask in zip(deltas, masks, strict=True)
    ]
    return [build_weight_map("all tasks", union_masks(masks), shapes), *per_task]


def _build_overlaps(masks: list[Indices], deltas: list[DeltaSummary]) -> list[list[Overlap]]:
    """Every task's entries against every other's; chance is that of the patchable entries."""
    patchable = max((delta.patchable for delta in deltas), default=0)
    return [[measure_overlap(first, second, patchable) for second in masks] for first in masks]


def _build_examples(
    answers: list[dict[str, list[dict]]], tasks: list[str], images: ExampleImages | None
) -> dict[str, list[ReportExample]]:
    """The rows the caller chose, or the first few of each task, with the answers they got."""
    given = _group_by_row(answers)
    chosen = images or {
        task: [(row, None) for row in list(given.get(task, ()))[:_NUM_ROWS]] for task in tasks
    }
    return {
        task: [_build_example(given[task][row], image) for row, image in rows if row in given[task]]
        for task, rows in chosen.items()
        if task in given
    }


def _group_by_row(answers: list[dict[str, list[dict]]]) -> dict[str, dict[int, dict[int, dict]]]:
    """Regroup the answers as task → row → position."""
    given: dict[str, dict[int, dict[int, dict]]] = {}
    for position, at in enumerate(answers):
        for task, answer in ((task, answer) for task, rows in at.items() for answer in rows):
            given.setdefault(task, {}).setdefault(answer["row"], {})[position] = answer
    return given


def _build_example(answers: dict[int, dict], image: "Image | None") -> ReportExample:
    attempts = [Attempt(at, a["prediction"], a["score"]) for at, a in answers.items()]
    asked = next(iter(answers.values()))
    return ReportExample(
        row=asked["row"],
        image=encode_data_uri(image) if image else None,
        prompt=asked["prompt"],
        expected=asked["answer"],
        attempts=attempts,
    )


def encode_data_uri(image: "Image") -> str:
    """The image, shrunk to fit the page, as text that an HTML page can hold."""
    small = image.convert("RGB")
    small.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
