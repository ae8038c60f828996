"""Mutated delta stores: manifests, results and listed files that are not what `append` wrote.

Sandbox    a store of three deltas, beside a folder that nobody may look into
STORES     every kind of mutation: files of the store -> what lies in their places
"""

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fuzz_deltas import DELTAS, mutated
from fuzz_mutations import BLIND, MANGLES, NAMES, TEXTS, mangled

from mm_piece.deltas.delta import Delta
from mm_piece.store.delta_store import DeltaStore

BASE = "ab" * 32
ENTRIES = 40
FILES = ["../outside/0001-task-1.safetensors", "/dev/zero", "", ".", "..", "store.json", "\0"]
FILES += ["0001-task-1.safetensors\n", "0" * 5000 + "1-x.safetensors", f"0001-{'x' * 300}", "0001-"]
FILES += ["0" * 3000 + "1-x.safetensors", f"0001-{'x' * 300}.safetensors", "000١-x.safetensors"]
FILES += ["0001-x.safetensors/../../outside/0001-task-1.safetensors", "C:\\0001-x.safetensors"]


@dataclass(frozen=True)
class Special:
    """What is no ordinary file."""

    kind: str
    target: str = ""

    def plant(self, path: Path) -> None:
        """Put it at a place where nothing is."""
        if self.kind == "link":
            path.symlink_to(self.target)
        elif self.kind == "pipe":
            os.mkfifo(path)
        elif self.kind == "folder":
            path.mkdir()


Content = bytes | Special
Changes = dict[str, Content]
SPECIALS = [
    Special("missing"),
    Special("folder"),
    Special("pipe"),
    Special("link", "../outside/secret"),
    Special("link", "../outside/0001-task-1.safetensors"),
    Special("link", "nowhere"),
    Special("link", "0002-task-2.safetensors"),
    Special("link", "store.json"),
    Special("link", "."),
    Special("link", "/dev/zero"),
    Special("link", "itself"),
    Special("link", "x" * 300),
]


class Sandbox:
    """A folder with a store whose files can be replaced and restored."""

    def __init__(self, folder: Path) -> None:
        self.store, self.outside = folder / "store", folder / "outside"
        shutil.rmtree(folder, ignore_errors=True)
        make_store(self.store)
        files = [file for file in self.store.rglob("*") if file.is_file() and file.name != ".lock"]
        self.sound = {str(file.relative_to(self.store)): file.read_bytes() for file in files}
        self.outside.mkdir()
        (self.outside / "secret").write_text('{"secret": 1}')
        first = "0001-task-1.safetensors"
        (self.outside / first).write_bytes(self.sound[first])

    def plant(self, changes: Changes) -> None:
        """Replace files of the store."""
        for name, content in changes.items():
            path = self.store / name
            if os.path.isdir(path) and not path.is_symlink():  # noqa: PTH112 - Path.is_dir may raise
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            path.write_bytes(content) if isinstance(content, bytes) else content.plant(path)

    def restore(self, changes: Changes) -> None:
        """Put back what `plant` replaced."""
        self.plant({name: self.sound[name] for name in changes})

    def listing(self) -> list[tuple[str, int, int]]:
        """Return what lies in the sandbox, to see that reading changes nothing."""
        paths = sorted(self.store.parent.rglob("*"))
        return [(str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths]


def make_store(path: Path) -> DeltaStore:
    """Create a sound store of three deltas, with results and answers."""
    store = DeltaStore.create(path, {"fingerprint": BASE, "dtype": "float32"}, "base: x\n")
    for position in (1, 2, 3):
        parent = store.entries[-1].sha256 if position > 1 else ""
        store.append(delta_at(position, parent, ENTRIES))
        store.write_answers(position, answers(position))
    store.write_results(results(3, 3))
    return store


def results(tasks: int, position: int) -> dict[str, Any]:
    """Return results of the positions up to this one."""
    names = [f"task {number}" for number in range(1, tasks + 1)]
    return {"tasks": names, "matrix": [[row / tasks] * tasks for row in range(position + 1)]}


def answers(position: int) -> dict[str, Any]:
    """Return answers given at a position."""
    said = {"prompt": "how many?", "answer": "3", "prediction": f"{position}", "score": 0.5}
    return {"task 1": [{"row": row, **said} for row in range(3)]}


def delta_at(position: int, parent: str, entries: int) -> Delta:
    """Return a delta that writes its position everywhere."""
    return Delta.from_change(
        {"w": torch.arange(entries)},
        {"w": torch.full((entries,), position - 1.0)},
        {"w": torch.full((entries,), float(position))},
        {"w": (entries + 1,)},
        task=f"task {position}",
        base=BASE,
        parent=parent,
        info={"position": position},
    )


# --- kinds ----------------------------------------------------------------------------------------

Sound = dict[str, bytes]
Change = Callable[[Sound, str, random.Random], Changes]


def _manifest(sound: Sound) -> dict[str, Any]:
    return json.loads(sound["store.json"])


def _blind(name: str) -> Change:
    return lambda sound, how, rng: {name: BLIND[how](sound[name], rng)}


def _mangled(name: str) -> Change:
    def change(sound: Sound, how: str, rng: random.Random) -> Changes:
        text = mangled(json.loads(sound[name]), how, rng)
        return {name: text.encode("utf-8", "surrogatepass")}

    return change


def _text(sound: Sound, how: str, rng: random.Random) -> Changes:
    """Replace a whole JSON file, or write it in another encoding."""
    name = rng.choice(("store.json", "results.json", "answers/0001.json"))
    encoding = rng.choice(("utf-8", "utf-16", "utf-32", "utf-8-sig", "utf-16-le"))
    text = rng.choice([*TEXTS, sound[name].decode()])
    return {name: text.encode(encoding)}


def _file_name(sound: Sound, how: str, rng: random.Random) -> Changes:
    """List a file under another name; sometimes the others are gone."""
    manifest = _manifest(sound)
    rng.choice(manifest["deltas"][:2])["file"] = rng.choice([*FILES, *NAMES])
    return {"store.json": json.dumps(manifest).encode()}


def _order(sound: Sound, how: str, rng: random.Random) -> Changes:
    """Permute the deltas, or one of their fields, or both so that they look sound again."""
    manifest = _manifest(sound)
    records = manifest["deltas"]
    fields = rng.sample(list(records[0]), rng.randint(1, len(records[0])))
    columns = {field: rng.sample([record[field] for record in records], 3) for field in fields}
    for number, record in enumerate(records):
        record |= {field: column[number] for field, column in columns.items()}
    manifest["deltas"] = rng.choice([records, records[::-1], records * 2, records[1:], records[:2]])
    return {"store.json": json.dumps(manifest).encode()}


def _special(sound: Sound, how: str, rng: random.Random) -> Changes:
    """Put something that is no ordinary file into the place of one."""
    name = rng.choice(list(sound))
    special = rng.choice(SPECIALS)
    return {name: Special("link", Path(name).name) if special.target == "itself" else special}


def _altered_delta(sound: Sound, how: str, rng: random.Random) -> Changes:
    name = rng.choice([name for name in sound if name.endswith(".safetensors")])
    return {name: rng.choice(list(BLIND.values()))(sound[name], rng)}


def _listed_delta(sound: Sound, how: str, rng: random.Random) -> Changes:
    """List a hostile delta as if it belonged there, with its right size and SHA-256."""
    _, data = mutated(rng.choice(list(DELTAS)), rng)
    manifest = _manifest(sound)
    record = copy.copy(manifest["deltas"][0])
    record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["deltas"] = [record]
    return {"store.json": json.dumps(manifest).encode(), record["file"]: data}


FAMILIES: dict[str, tuple[Any, Change]] = {
    "manifest": (BLIND, _blind("store.json")),
    "manifest json": (MANGLES, _mangled("store.json")),
    "results": (BLIND, _blind("results.json")),
    "results json": (MANGLES, _mangled("results.json")),
    "store": (("text",), _text),
    "store file": (("name",), _file_name),
    "store order": (("permuted",), _order),
    "store place": (("special",), _special),
    "store delta": (("altered",), _altered_delta),
    "store list": (("hostile",), _listed_delta),
}
STORES = {
    f"{family} {how}": (change, how) for family, (hows, change) in FAMILIES.items() for how in hows
}


def changes(kind: str, sound: Sound, rng: random.Random) -> Changes:
    """Return what lies where in a mutated store."""
    change, how = STORES[kind]
    return change(sound, how, rng)
