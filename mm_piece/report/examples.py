"""Test questions that tell what a run did to a task: one learned, one retained, one forgotten."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mm_piece.store.results import AnswerRecord, Answers

if TYPE_CHECKING:
    from PIL.Image import Image

AnswersByRow = dict[str, dict[int, dict[int, AnswerRecord]]]  # task → row → position
Images = Mapping[int, "Image"]  # by row
ImageLoader = Callable[[str, Sequence[int]], Images]  # of a task, and rows of its test set

# In the order of a page. A question's own position is that of its task; the base's for a general
# task, which no position learns.
KINDS = {
    "learned": "wrong at the base, right at its own position",
    "retained": "right at its own position and with the last model",
    "forgotten": "right at its own position, wrong with the last model",
}
_IMAGE_SIDE = 320  # pixels; larger images are shrunk before they are embedded


@dataclass(frozen=True)
class Attempt:
    """The model's answer at one position, and its score."""

    position: int
    prediction: str
    score: float


@dataclass(frozen=True)
class ReportExample:
    """One test question: why it is shown, its image (a data URI), what was expected and answered.

    `telling`: the answers at the base, at the task's own position and at the last one.
    """

    row: int
    kinds: list[str]
    image: str | None
    prompt: str
    expected: str
    telling: list[Attempt]
    attempts: list[Attempt]


@dataclass(frozen=True)
class TaskExamples:
    """The questions of one task that a page shows, and how many there are of each kind."""

    own_position: int
    num_questions: int
    counts: dict[str, int]
    shown: list[ReportExample]


def build_examples(
    answers: Sequence[Answers],
    tasks: Sequence[str],
    load_images: ImageLoader | None,
) -> dict[str, TaskExamples]:
    """Choose the questions of every task that was learned, and of every general one."""
    last = len(answers) - 1
    examples = {}
    for task, by_row in _group_by_row(answers).items():
        own = tasks.index(task) + 1 if task in tasks else 0
        if own > last:  # of a task whose turn has not come there is nothing to tell
            continue

        rows_by_kind = _sort_rows(by_row, own, last)
        chosen = _choose_rows(rows_by_kind)
        if not chosen:
            first = next(iter(by_row))
            chosen = {first: []}
        images = {}
        if load_images:
            images = load_images(task, list(chosen))

        shown = []
        for row, kinds in chosen.items():
            example = _build_example(
                by_row[row],
                kinds,
                positions=(0, own, last),
                image=images.get(row),
            )
            shown.append(example)

        examples[task] = TaskExamples(
            own_position=own,
            num_questions=len(by_row),
            counts={kind: len(rows) for kind, rows in rows_by_kind.items()},
            shown=shown,
        )
    return examples


def _group_by_row(answers: Sequence[Answers]) -> AnswersByRow:
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


def _sort_rows(
    by_row: Mapping[int, Mapping[int, AnswerRecord]],
    own: int,
    last: int,
) -> dict[str, list[int]]:
    """Return the rows of each kind that there is any of, in the order of `KINDS`."""
    rows: dict[str, list[int]] = {}
    for row, answers in by_row.items():
        for kind in _find_kinds(answers, own, last):
            found = rows.setdefault(kind, [])
            found.append(row)
    return {kind: rows[kind] for kind in KINDS if kind in rows}


def _find_kinds(
    answers: Mapping[int, AnswerRecord],
    own: int,
    last: int,
) -> list[str]:
    """Return what the answers to one question, by position, are an example of."""
    # a score between is neither right nor wrong, and neither is one that was not taken
    scores = {position: answer["score"] for position, answer in answers.items()}
    right = {position for position, score in scores.items() if score >= 1}
    wrong = {position for position, score in scores.items() if score <= 0}
    if own not in right:
        return []

    kinds = []
    if 0 in wrong:
        kinds.append("learned")
    if last == own:  # the last task had no time to be forgotten
        return kinds
    if last in right:
        kinds.append("retained")
    if last in wrong:
        kinds.append("forgotten")
    return kinds


def _choose_rows(rows_by_kind: Mapping[str, Sequence[int]]) -> dict[int, list[str]]:
    """Choose the first row of each kind, another one for each as far as there is one."""
    chosen: dict[int, list[str]] = {}
    for kind, rows in rows_by_kind.items():
        unused = [row for row in rows if row not in chosen]
        row = unused[0] if unused else rows[0]
        kinds = chosen.setdefault(row, [])
        kinds.append(kind)
    return chosen


def _build_example(
    answers: Mapping[int, AnswerRecord],
    kinds: list[str],
    positions: Sequence[int],
    image: "Image | None",
) -> ReportExample:
    """Build one example from its answers by position; those at `positions` tell most."""
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
        kinds=kinds,
        image=encode_data_uri(image) if image else None,
        prompt=asked["prompt"],
        expected=asked["answer"],
        telling=[attempt for attempt in attempts if attempt.position in positions],
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
