"""The embedded data: seeded procedural pictures with questions and answers, nothing to download.

`base` is the ability that the tiny base model is born with; the other tasks shift away from it in
pictures, prompts and answers. Row `i` of a split depends on (name, split, i) alone.

    >>> rows("charts", "test")[0]["prompt"]
    'Chart: which bar has the largest value?'
"""

import random
from collections.abc import Callable, Iterator

import numpy as np

from mm_piece.data.scenes import base, downstream
from mm_piece.data.scenes.base import Scene
from mm_piece.errors import DataError

SPLITS = {"train": 1000, "validation": 200, "test": 200}
NEW_WORDINGS = 0.25  # share of the base's held-out prompts whose wordings are never trained on


def rows(name: str, split: str) -> list[dict]:
    """Return a split of a task as `{"image", "prompt", "answer", "kind"}` rows."""
    _check("task", name, TASKS)
    _check("split", split, SPLITS)
    return [TASKS[name](i, split, _source(f"{name}/{split}", i)) for i in range(SPLITS[split])]


def stream(seed: int, count: int = 6) -> Iterator[tuple[Scene, list[tuple[str, str, str]]]]:
    """Yield scenes of the base for ever, each with up to `count` (prompt, answer, kind)."""
    index = 0
    while True:
        rng = _source(f"stream/{seed}", index)
        scene = base.sample(rng)
        yield scene, base.turns(scene, rng, count)
        index += 1


def _source(name: str, index: int) -> random.Random:
    """Return the random source of one row, independent of every other row."""
    state = np.random.SeedSequence([*name.encode(), index]).generate_state(2, np.uint64)
    return random.Random((int(state[0]) << 64) | int(state[1]))


def _check(what: str, value: str, allowed) -> None:
    if value not in allowed:
        raise DataError(f"unknown {what} {value!r}: choose from {', '.join(allowed)}")


def _base(index: int, split: str, rng: random.Random) -> dict:
    new_wording = split != "train" and rng.random() < NEW_WORDINGS
    return base.example(base.KINDS[index % len(base.KINDS)], rng, new_wording)


def _plain(generate: Callable) -> Callable:
    """Turn a generator of tuples into one of rows."""

    def row(index: int, split: str, rng: random.Random) -> dict:
        fields = ("image", "prompt", "answer", "kind")
        return dict(zip(fields, generate(index, split, rng), strict=True))

    return row


TASKS = {
    "base": _base,
    "digits": _plain(downstream.digits),
    "words": _plain(downstream.words),
    "charts": _plain(downstream.charts),
    "textures": _plain(downstream.textures),
    "relations": _plain(downstream.relations),
    "clocks": _plain(downstream.clocks),
}
