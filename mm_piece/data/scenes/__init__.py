"""The embedded data: seeded procedural pictures with questions and answers, nothing to download.

`base` is the ability that the tiny base model is born with; the other tasks shift away from it in
pictures, prompts and answers. Row `i` of a split depends on (name, split, i) alone.

    >>> make_rows("charts", "test")[0]["prompt"]
    'Chart: which bar has the largest value?'
"""

import random
from collections.abc import Callable, Iterator

import numpy as np

from mm_piece.data.scenes import base, downstream
from mm_piece.data.scenes.base import Scene
from mm_piece.errors import DataError

SPLIT_SIZES = {"train": 1000, "validation": 200, "test": 200}
NEW_WORDINGS = 0.25  # share of the base's held-out prompts whose wordings are never trained on


def make_rows(name: str, split: str) -> list[dict]:
    """Return a split of a task as `{"image", "prompt", "answer", "kind"}` rows."""
    _require_known("task", name, TASKS)
    _require_known("split", split, SPLIT_SIZES)
    return [
        TASKS[name](i, split, _make_random(f"{name}/{split}", i)) for i in range(SPLIT_SIZES[split])
    ]


def iter_scenes(seed: int, count: int = 6) -> Iterator[tuple[Scene, list[tuple[str, str, str]]]]:
    """Yield scenes of the base for ever, each with up to `count` (prompt, answer, kind)."""
    index = 0
    while True:
        rng = _make_random(f"stream/{seed}", index)
        scene = base.sample_scene(rng)
        yield scene, base.make_turns(scene, rng, count)
        index += 1


def _make_random(name: str, index: int) -> random.Random:
    """Return the random source of one row, independent of every other row."""
    state = np.random.SeedSequence([*name.encode(), index]).generate_state(2, np.uint64)
    return random.Random((int(state[0]) << 64) | int(state[1]))


def _require_known(what: str, value: str, allowed) -> None:
    if value not in allowed:
        raise DataError(f"unknown {what} {value!r}: choose from {', '.join(allowed)}")


def _make_base_row(index: int, split: str, rng: random.Random) -> dict:
    new_wording = split != "train" and rng.random() < NEW_WORDINGS
    return base.make_question_row(
        base.QUESTION_KINDS[index % len(base.QUESTION_KINDS)], rng, new_wording
    )


def _as_row_maker(generate: Callable) -> Callable:
    """Turn a generator of tuples into one of rows."""

    def make_row(index: int, split: str, rng: random.Random) -> dict:
        fields = ("image", "prompt", "answer", "kind")
        return dict(zip(fields, generate(index, split, rng), strict=True))

    return make_row


TASKS = {
    "base": _make_base_row,
    "digits": _as_row_maker(downstream.make_digit),
    "words": _as_row_maker(downstream.make_word),
    "charts": _as_row_maker(downstream.make_chart),
    "textures": _as_row_maker(downstream.make_texture),
    "relations": _as_row_maker(downstream.make_relation),
    "clocks": _as_row_maker(downstream.make_clock),
}
