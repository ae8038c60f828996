"""A delta store made up for the report: what the page asks of a store, and nothing more."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mm_piece.store.records import BaseRecord, ManifestEntry

TASKS = ("action", "commonsense", "count")
MATRIX = [
    [0.205, 0.31, 0.12],
    [0.9, 0.335, 0.14],
    [0.885, 0.76, 0.11],
    [0.87, 0.755, 0.68],
]


@dataclass
class FakeDelta:
    indices: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    info: dict[str, Any]


@dataclass
class FakeStore:
    """What the report asks of a delta store, and nothing more."""

    tasks: tuple[str, ...] = TASKS
    matrix: list[list[float]] = field(default_factory=lambda: MATRIX)
    path: Path = Path("checkpoints/my-run")
    recipe: str = "base: tiny/base\nselect: {method: piece-s, density: 0.01}\n"

    def __post_init__(self):
        facts = {
            "folder": "../tiny/base",
            "dtype": "float32",
            "family": "llava",
            "fingerprint": "5d" * 32,
            "parameters": 2_104_512,
            "bytes": 8_418_048,
        }
        self.base = BaseRecord(facts)
        self.deltas = [fake_delta(at) for at in range(1, len(self.tasks) + 1)]
        self.entries = [self._entry(at) for at in range(1, len(self.tasks) + 1)]

    def _entry(self, at: int) -> ManifestEntry:
        entries = sum(map(len, self.deltas[at - 1].indices.values()))
        file = f"{at:04}-{self.tasks[at - 1]}.safetensors"
        digest = f"{at}{'c0ffee' * 11}"[:64]
        return ManifestEntry(at, self.tasks[at - 1], file, digest, "", entries, 4000 + 5 * entries)

    def delta_arrays(self, position: int) -> FakeDelta:
        return self.deltas[position - 1]

    def results(self) -> dict[str, Any]:
        ability = [0.74, 0.733, 0.725, 0.719]
        shares = {"125": 0.41, "250": 0.58, "500": 0.725}
        return {
            "tasks": list(self.tasks),
            "matrix": self.matrix,
            "base_ability": ability[: len(self.matrix)],
            "base_ability_name": "scenes",
            "seconds": {task: {"select": 12.5, "train": 61.0, "loss": 1.25} for task in self.tasks},
            "losses": {task: {"10": 2.5, "20": 1.5, "25": 0.5} for task in self.tasks[:2]},
            "stability": dict.fromkeys(self.tasks[:1], shares),
            "base_kinds": {"colour": ability[: len(self.matrix)], "shape": [0.9, 0.9, 0.89, 0.91]},
        }

    def answers(self, position: int) -> dict[str, list[dict]]:
        return {task: [fake_answer(row, position) for row in range(200)] for task in self.tasks}


def fake_answer(row: int, position: int) -> dict[str, Any]:
    said = ("a red kite", "a blue square", "riding")[(row + position) % 3]
    return {
        "row": row,
        "prompt": f"What is the person on the left doing in picture {row}?",
        "answer": "riding",
        "prediction": said if row != 1 else "",
        "score": {"riding": 1.0, "a red kite": 1 / 3}.get(said, 0.0),
    }


def fake_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "multi_modal_projector.linear_1.weight": (128, 96),
        "multi_modal_projector.linear_2.weight": (128, 128),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (96, 3, 8, 8),
    }
    for layer in range(4):
        stem = f"vision_tower.vision_model.encoder.layers.{layer}."
        shapes |= {f"{stem}self_attn.{m}_proj.weight": (96, 96) for m in ("q", "k", "v", "out")}
        shapes |= {f"{stem}mlp.fc1.weight": (192, 96), f"{stem}mlp.fc2.weight": (96, 192)}
    for layer in range(12):
        stem = f"language_model.model.layers.{layer}."
        shapes |= {f"{stem}self_attn.{m}_proj.weight": (128, 128) for m in ("q", "k", "v", "o")}
        shapes |= {f"{stem}mlp.{m}_proj.weight": (256, 128) for m in ("gate", "up", "down")}
    return shapes


def fake_delta(at: int) -> FakeDelta:
    """Random entries, denser towards the last layers; tasks overlap more than chance."""
    draw, common = random.Random(at), random.Random(0)
    indices = {}
    for number, (name, shape) in enumerate(fake_shapes().items()):
        numel = math.prod(shape)
        how_many = int(numel * 0.01 * (1 + number % 7) / 7)
        own = {draw.randrange(numel) for _ in range(how_many)}
        shared = {common.randrange(numel) for _ in range(how_many // 5)}
        indices[name] = np.array(sorted(own | shared), dtype=np.int32)
    info = {"method": "piece-s", "density": 0.01, "k": 9876, "patchable": 987_600}
    info |= {"data": "da7a" * 16, "threshold": 3.21e-7, "seconds": {"select": 12.5, "train": 61.0}}
    vision = {"entries": 500_000, "patchable": 490_000, "selected": 2000, "changed": 1990}
    frozen = {"entries": 9000, "patchable": 0, "selected": 0, "changed": 0, "share": 0.0}
    groups = {"vision": {**vision, "norm": 0.4321, "share": 0.0123}, "head": frozen}
    info |= {"groups": groups if at == 1 else {"vision": vision, "projector": {"changed": 7}}}
    return FakeDelta(indices, fake_shapes(), info)


def picture(seed: int) -> Image.Image:
    draw = random.Random(seed)
    image = Image.new("RGB", (96, 96), (235, 232, 222))
    for _ in range(4):
        x, y, side = draw.randrange(70), draw.randrange(70), draw.randrange(10, 40)
        colour = tuple(draw.randrange(256) for _ in range(3))
        ImageDraw.Draw(image).ellipse((x, y, x + side, y + side), fill=colour)
    return image


def load_pictures(task: str, rows: Sequence[int]) -> dict[int, Image.Image]:
    return {row: picture(row) for row in rows}
