"""The embedded data: seeded procedural images with questions and answers, nothing to download.

The tiny base model is pretrained on the task `base`. The other tasks shift away from it in images,
prompts and answers. Row `i` of a split depends on (name, split, i) alone.

    >>> make_rows("charts", "test")[0]["prompt"]
    'Chart: which bar has the largest value?'
"""

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from random import Random

import numpy as np

from mm_piece.data.scenes import base, downstream, questions, textures
from mm_piece.data.scenes.base import Scene
from mm_piece.data.scenes.questions import Turn
from mm_piece.errors import DataError

SPLIT_SIZES = {
    "train": 1000,
    "validation": 200,
    "test": 200,
}
NEW_WORDINGS = 0.25  # share of held-out prompts in wordings that training never uses


class SceneRows:
    """A split of a task as `{"image", "prompt", "answer", "kind"}` rows.

    A row is drawn when it is first asked for, and kept: a slice of a split costs its own rows.
    """

    def __init__(
        self,
        name: str,
        split: str,
    ) -> None:
        """Raise DataError for a task or a split that does not exist."""
        _require_known("task", name, TASKS)
        _require_known("split", split, SPLIT_SIZES)
        self.name = name
        self.split = split
        self._drawn: dict[int, dict] = {}

    def __len__(self) -> int:
        """Return the number of rows of the split."""
        return SPLIT_SIZES[self.split]

    def __getitem__(self, index: int) -> dict:
        """Return a row; IndexError past the last one."""
        size = len(self)
        if index not in range(size):
            raise IndexError(index)

        if index not in self._drawn:
            make_row = TASKS[self.name]
            stream = f"{self.name}/{self.split}"
            rng = _make_random(stream, index)
            row = make_row(index, self.split, rng)
            self._drawn[index] = row

        return self._drawn[index]


def make_rows(
    name: str,
    split: str,
) -> list[dict]:
    """Return all rows of a split of a task; see SceneRows."""
    rows = SceneRows(name, split)
    return [rows[index] for index in range(len(rows))]


def iter_scenes(
    seed: int,
    count: int = 6,
) -> Iterator[tuple[Scene, list[Turn]]]:
    """Yield scenes of the base without end, each with up to `count` (prompt, answer, kind)."""
    index = 0
    while True:
        rng = _make_random(f"stream/{seed}", index)
        scene = base.sample_scene(rng)
        turns = questions.make_turns(scene, rng, count)
        yield scene, turns
        index += 1


def _make_random(name: str, index: int) -> Random:
    """Return the random source of one row, independent of every other row."""
    # neighbouring indices seed unrelated streams: SeedSequence hashes its entropy
    entropy = [*name.encode(), index]
    sequence = np.random.SeedSequence(entropy)
    high, low = sequence.generate_state(2, np.uint64)
    seed = (int(high) << 64) | int(low)
    return Random(seed)


def _require_known(
    what: str,
    value: str,
    allowed,
) -> None:
    """Raise DataError unless the value is one of the allowed ones."""
    if value not in allowed:
        close = get_close_matches(value, allowed, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        choices = ", ".join(allowed)
        raise DataError(f"unknown {what} {value!r}: {hint}choose from {choices}")


def _make_base_row(
    index: int,
    split: str,
    rng: Random,
) -> dict:
    """Return a row of the base; the kinds of question take turns."""
    # no draw for the training split: its stream starts with the scene
    new_wording = split != "train" and rng.random() < NEW_WORDINGS
    kinds = questions.QUESTION_KINDS
    kind = kinds[index % len(kinds)]
    return questions.make_question_row(kind, rng, new_wording)


def _as_row_maker(generate: Callable) -> Callable:
    """Turn a generator of (image, prompt, answer, kind) into a generator of rows."""
    fields = (
        "image",
        "prompt",
        "answer",
        "kind",
    )

    def make_row(index: int, split: str, rng: Random) -> dict:
        values = generate(index, split, rng)
        return dict(zip(fields, values, strict=True))

    return make_row


TASKS = {
    "base": _make_base_row,
    "digits": _as_row_maker(downstream.make_digit),
    "words": _as_row_maker(downstream.make_word),
    "charts": _as_row_maker(downstream.make_chart),
    "textures": _as_row_maker(textures.make_texture),
    "relations": _as_row_maker(downstream.make_relation),
    "clocks": _as_row_maker(downstream.make_clock),
}
