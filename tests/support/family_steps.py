"""What every family must do, step by step, on its tiny base; prints the table of
docs/guide/models.md.

python tests/support/family_steps.py
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from newer_families import ALL, make_any
from newer_families import ALL_TEXT as TEXT
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_families import BUILDERS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import mm_piece
from mm_piece.data import encode, read
from mm_piece.deltas import interchange
from mm_piece.deltas.delta import Delta, compute_fingerprint
from mm_piece.evaluation.answers import generate_batch
from mm_piece.families import group_of, hub_name, weights
from mm_piece.models.base import load_base, tensors
from mm_piece.models.checkpoint import Checkpoint
from mm_piece.store.delta_store import DeltaStore

DENSITY = 0.02
SAFE = "model.safetensors"


@dataclass
class World:
    """A family's base, two tasks, and the model that stood at each position after training."""

    family: str
    folder: Path
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self.base = make_any(self.family, self.folder / "base")
        for task in ("first", "second"):
            (self.folder / f"{task}.json").write_text(json.dumps(self._rows(task)))

    def _rows(self, task: str) -> list[dict[str, Any]]:
        """Rows with one image, two images and none, of several turns; a text family's have none."""
        rows: list[dict[str, Any]] = []
        words = ("red", "green", "blue") if task == "first" else ("one", "two", "three")
        for number in range(9):
            name, word = f"{task}{number}.png", words[number % 3]
            picture = Image.linear_gradient("L").rotate(40 * number).resize((24 + 4 * number, 20))
            Image.merge("RGB", [picture.point(lambda p, n=n: p // n) for n in (1, 2, 3)]).save(
                self.folder / name
            )
            rows.append({"prompt": f"Which {task}?", "answer": word, "image": name})
        rows.append({"prompt": f"Name a {task}.", "answer": words[0]})
        rows.append({**_conversation(words), "image": [f"{task}0.png", f"{task}1.png"]})
        if self.family in TEXT:
            text = json.dumps(rows).replace("<image>", "")
            rows = [{k: v for k, v in row.items() if k != "image"} for row in json.loads(text)]
        return rows

    @cached_property
    def examples(self) -> list[Any]:
        return list(read(str(self.folder / "first.json")))

    @cached_property
    def store(self) -> DeltaStore:
        return mm_piece.train(str(self.recipe))

    @cached_property
    def recipe(self) -> Path:
        groups = ["language", *([] if self.family in TEXT else ["vision", "projector"])]
        file = self.folder / "recipe.yaml"
        source = self.folder.as_posix()
        content = {
            "base": str(self.base),
            "model": {"dtype": self.dtype},
            "store": f"{source}/store",
            "tasks": [
                {
                    "name": task,
                    "train": f"{source}/{task}.json",
                    "test": f"{source}/{task}.json[:4]",
                    "max_new_tokens": 3,
                }
                for task in ("first", "second")
            ],
            "select": {"method": "piece-s", "density": dict.fromkeys(groups, DENSITY)},
            "train": {
                "learning_rate": 0.01,
                "num_train_epochs": 1,
                "per_device_train_batch_size": 4,
                "save_strategy": "no",
                "use_cpu": True,
            },
        }
        file.write_text(json.dumps(content))
        return file

    def at(self, position: int) -> dict[str, Tensor]:
        """The base's weights with the deltas put in by hand: what must stand at a position."""
        named = {
            n: t.clone() for n, t in tensors(load_base(self.base, dtype=self.dtype)[0]).items()
        }
        for delta in self.store.deltas(position):
            for name, index in delta.indices.items():
                named[name].view(-1)[index.long()] = delta.values[name]
        return named


def _conversation(words: tuple[str, ...]) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "human", "value": "<image>\nWhich?"},
            {"from": "gpt", "value": words[1]},
            {"from": "human", "value": "And <image> here?"},
            {"from": "gpt", "value": words[2]},
        ]
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names and equal bits."""
    return left.keys() == right.keys() and all(
        torch.equal(left[n].view(-1).view(torch.uint8), right[n].reshape(-1).view(torch.uint8))
        for n in left
    )


def hub_names(world: World) -> None:
    """Files with published names load whole, and stand for the same base as transformers' own."""
    model, processor = load_base(world.base)
    folder = world.folder / "published"
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    published = {name: tensor.contiguous() for name, tensor in tensors(model).items()}
    if world.family == "qwen3_vl_moe":  # published experts lie with their dimensions swapped
        published = {n: t.mT.contiguous() if ".experts." in n else t for n, t in published.items()}
    save_file(published, folder / "model.safetensors", {"format": "pt"})
    again = load_base(folder)[0]
    assert same(tensors(again), tensors(model))
    prints = {
        compute_fingerprint(tensors(model)),
        *(Checkpoint(f, "float32").compute_fingerprint() for f in (folder, world.base)),
    }
    assert len(prints) == 1


def estimate(world: World) -> None:
    """Scores are the mean of squared gradients, example by example."""
    model, processor = load_base(world.base)
    encoded = [encode(example, processor) for example in world.examples[-4:]]
    scores = mm_piece.estimate(model, encoded, "piece-f")
    expected = {name: torch.zeros_like(weight) for name, weight in weights(model).items()}
    for example in encoded:
        model.zero_grad()
        model(**example).loss.backward()
        for name, weight in weights(model).items():
            if weight.grad is not None:
                expected[name] += weight.grad**2 / len(encoded)
    assert all(torch.allclose(scores[name], expected[name], rtol=1e-4) for name in scores)
    assert {group_of(name) for name in scores} >= _groups(world)


def select(world: World) -> None:
    """Exactly floor(density · N) entries in every group, none in what never gets a gradient."""
    model, processor = load_base(world.base)
    encoded = [encode(example, processor) for example in world.examples[:4]]
    scores = mm_piece.estimate(model, encoded, "piece-s")
    mask = mm_piece.select(scores, density=DENSITY)
    assert sum(len(index) for index in mask.values()) == int(
        DENSITY * sum(score.numel() for score in scores.values())
    )
    if world.family in ("llava", "llava_next"):  # feature layer -2
        assert not [name for name in scores if ".layers.2." in name or "post_layernorm" in name]


def train(world: World) -> None:
    """Entries outside the mask keep their bits; tower, projector and language model all train."""
    base, after = tensors(load_base(world.base, dtype=world.dtype)[0]), world.at(1)
    delta = world.store.delta(1)
    live = mm_piece.load(world.base, store=world.store, at=1)[0]
    assert same(tensors(live), after)
    for name, weight in base.items():
        moved = (weight.view(-1) != tensors(live)[name].view(-1)).nonzero().view(-1)
        assert set(moved.tolist()) <= set(delta.indices.get(name, torch.empty(0)).tolist())
    report = delta.info["groups"]
    assert {group for group, row in report.items() if row["changed"]} == _groups(world)
    assert report["embedding"]["changed"] == 0
    assert delta.info["patchable"] == sum(row["patchable"] for row in report.values())


def delta(world: World) -> None:
    """A delta names published weights and survives its file, bit for bit."""
    names = set(tensors(load_base(world.base)[0]))
    for position, entry in enumerate(world.store.entries, start=1):
        read_back = Delta.load(world.store.path / entry.file)
        assert set(read_back.indices) <= names
        stored = world.store.delta(position)
        assert all(torch.equal(read_back.values[n], stored.values[n]) for n in stored.values)


def load_at(world: World) -> None:
    """The model at every position, in both file layouts."""
    folders = [world.base, world.folder / "published"]
    for position in range(3):
        for folder in folders[: 1 + folders[1].is_dir()]:
            model = mm_piece.load(folder, store=world.store, at=position)[0]
            assert same(tensors(model), world.at(position))


def checkout(world: World) -> None:
    """Anywhere and back."""
    model = mm_piece.load(world.base, store=world.store, at=0)[0]
    for position in (2, 1, 0, 1, 2, 0):
        mm_piece.checkout(model, position)
        assert same(tensors(model), world.at(position))


def generate_greedily(world: World) -> None:
    """A batch padded on the left says what its rows say alone, whatever the base's own settings."""
    model, processor = load_base(world.base)
    alone = [generate_batch(model, processor, [example], 4)[0] for example in world.examples]
    assert generate_batch(model, processor, world.examples, 4) == alone
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    assert generate_batch(model, processor, world.examples, 4) == alone


def export(world: World) -> None:
    """The exported folder is an ordinary checkpoint of the same bits and keys."""
    folder = mm_piece.export(world.store, at=2, to=world.folder / "merged")
    auto = AutoModelForCausalLM if world.family in TEXT else AutoModelForImageTextToText
    model = auto.from_pretrained(folder)
    assert same(tensors(model), world.at(2))
    files = [load_file(where / "model.safetensors") for where in (folder, world.base)]
    assert {n: t.shape for n, t in files[0].items()} == {n: t.shape for n, t in files[1].items()}
    if world.family in BUILDERS:
        assert all(hub_name(name, world.family) in tensors(model) for name in files[0])
    assert Checkpoint(folder).parameters.keys() == tensors(model).keys()
    published = world.folder / "published"
    _require_patches(world, world.base)
    if published.is_dir():
        _require_patches(world, published)
        folder = mm_piece.export(world.store, at=2, to=world.folder / "again", base=published)
        assert same(tensors(auto.from_pretrained(folder)), world.at(2))
        files = [load_file(where / "model.safetensors") for where in (folder, published)]
        assert [(n, t.shape) for n, t in files[0].items()] == [
            (n, t.shape) for n, t in files[1].items()
        ]


def _require_patches(world: World, folder: Path) -> None:
    """Converted deltas are patches of these files, whatever layout their experts have."""
    checkpoint = Checkpoint(folder, world.dtype)
    keys = {name: weight.key for name, weight in checkpoint.parameters.items()}
    files = {key: tensor.to(checkpoint.dtype) for key, tensor in load_file(folder / SAFE).items()}
    for position in (1, 2):
        delta = world.store.delta(position)
        layout = None if folder == world.base else checkpoint.layout
        for patch in interchange.make_checkpoint_patches(delta, layout):
            tensor = files[keys[patch["name"]]]
            assert tuple(patch["shape"]) == tensor.shape
            tensor.view(-1)[patch["indices"].long()] = patch["values"]
    exported = world.folder / f"patched-{folder.name}"
    mm_piece.export(world.store, at=2, to=exported, base=folder)
    assert same(load_file(exported / SAFE), {k: files[k] for k in load_file(exported / SAFE)})


def _groups(world: World) -> set[str]:
    return {"language"} if world.family in TEXT else {"vision", "projector", "language"}


def table(green: Callable[[str, str], bool]) -> str:
    """Every family by every step, as Markdown."""
    head = "| family | " + " | ".join(step.replace("_", " ") for step in STEPS) + " |"
    lines = [head, "|---" * (len(STEPS) + 1) + "|"]
    for family in ALL:
        marks = ("✓" if green(family, step) else "**✗**" for step in STEPS)
        lines.append(f"| `{family}` | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def tried() -> dict[tuple[str, str], bool]:
    """Which steps each family makes."""
    found = {}
    for family in ALL:
        with tempfile.TemporaryDirectory() as folder:
            world = World(family, Path(folder))
            for name, step in STEPS.items():
                try:
                    step(world)
                    found[family, name] = True
                except AssertionError:
                    found[family, name] = False
    return found


STEPS: dict[str, Callable[[World], None]] = {
    "hub_names": hub_names,
    "estimate": estimate,
    "select": select,
    "train": train,
    "delta": delta,
    "load_at_t": load_at,
    "checkout": checkout,
    "generate": generate_greedily,
    "export": export,
}

if __name__ == "__main__":
    results = tried()
    print(table(lambda family, step: results[family, step]), file=sys.stdout)
