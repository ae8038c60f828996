"""`DeltaStore`: a directory that holds one base's deltas in order. It never touches a model.

    store.json              base, and each delta's file, SHA-256 and parent: what counts
    recipe.yaml             the run that made it
    0001-name.safetensors   one delta per position, only ever added
    results.json            the accuracy matrix
    answers/0001.json       answers given at that position
    work/                   scratch of a training in progress

Every file is written whole under a temporary name and renamed; the manifest comes last. After a
crash a file may lie there that the manifest does not list, but never the other way round.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mm_piece import deltafile
from mm_piece.delta import Delta
from mm_piece.errors import DamageError, LockedError, MismatchError, PositionError, StoreError

FORMAT = 1
MANIFEST = "store.json"
FILE_NAME = re.compile(r"([0-9]{4,})-[a-z0-9-]+\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One delta as the manifest lists it."""

    position: int
    task: str
    file: str
    sha256: str
    parent: str
    entries: int
    bytes: int


class DeltaStore:
    """One base's deltas in order; `create` or `open` it."""

    def __init__(self, path: Path, base: dict[str, Any], entries: list[Entry]) -> None:
        self.path = path
        self.base = base
        self._entries = entries
        self._lock = FileLock(path / ".lock", timeout=0)

    @classmethod
    def create(cls, path: str | Path, base: dict[str, Any], recipe: str) -> "DeltaStore":
        """Make a store without deltas; the directory may exist, but not be a store."""
        store = cls(Path(path), json.loads(_json(base, "base")), [])
        _require(type(store.base.get("fingerprint")) is str, store.path, "base has no fingerprint")
        with _reported(store.path):
            store.path.mkdir(parents=True, exist_ok=True)
        with store._locked():
            if (store.path / MANIFEST).exists():
                raise StoreError(f"{path}: is a store already")
            store._write("recipe.yaml", recipe.encode())
            store._write_manifest([])
        return store

    @classmethod
    def open(cls, path: str | Path) -> "DeltaStore":
        """Open a store and validate its manifest; `verify` validates the deltas."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise StoreError(f"{path}: not a delta store (it has no {MANIFEST})")
        return cls(path, *_read_manifest(path))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> list[Entry]:
        """Return what the manifest lists, in order."""
        return list(self._entries)

    @property
    def recipe(self) -> str:
        """Return the text of the recipe that made the store."""
        return _read(self.path / "recipe.yaml").decode(errors="replace")

    def write_recipe(self, recipe: str) -> None:
        """Replace the recipe, which may have come to name further tasks."""
        with self.writing():
            self._write("recipe.yaml", recipe.encode())

    @property
    def work(self) -> Path:
        """Return the place for scratch of a training in progress."""
        return self.path / "work"

    def delta(self, position: int) -> Delta:
        """Read and verify the delta that leads to `position`."""
        entry = self._entries[self._require_position(position, first=1) - 1]
        path = self.path / entry.file
        data = _read(path)
        _require_same(path, "bytes", entry.bytes, len(data))
        if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
            raise DamageError(f"{path}: expected SHA-256 {entry.sha256}, found {found}")
        delta = Delta.from_bytes(data, origin=str(path))
        _require_same(path, "base", self.base["fingerprint"], delta.base)
        for field in ("task", "parent", "entries"):
            _require_same(path, field, getattr(entry, field), getattr(delta, field))
        return delta

    def deltas(self, at: int | None = None) -> list[Delta]:
        """Read and verify the deltas 1…`at`, by default all of them."""
        last = len(self) if at is None else self._require_position(at, first=0)
        return [self.delta(position) for position in range(1, last + 1)]

    def append(self, delta: Delta) -> Entry:
        """Add the next delta; once this returns it is there for good."""
        with self.writing():
            head = self._entries[-1].sha256 if self._entries else ""
            position = len(self) + 1
            _require_same(self.path, "base", self.base["fingerprint"], delta.base)
            _require_same(self.path, f"parent of position {position}", head, delta.parent)
            data = delta.to_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            file = f"{position:04d}-{_slug(delta.task)}.safetensors"
            size = len(data)
            entry = Entry(position, delta.task, file, sha256, head, delta.entries, size)
            self._write(file, data)
            self._write_manifest([*self._entries, entry])
        return entry

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer; sees what earlier writers added. Nests."""
        with self._locked():
            self.base, self._entries = _read_manifest(self.path)
            self._sweep()
            yield

    def verify(self) -> list[Entry]:
        """Read every delta in full; return what was verified or raise the first problem."""
        for entry in self._entries:
            self.delta(entry.position)
        return self.entries

    def log(self) -> dict[str, Any]:
        """Return base and deltas as plain JSON."""
        shown = ("position", "task", "file", "sha256", "entries", "bytes")
        deltas = [{key: getattr(entry, key) for key in shown} for entry in self._entries]
        return {"base": self.base, "deltas": deltas}

    def results(self) -> dict[str, Any]:
        """Return the results written so far, {} before the first."""
        return self._read_json("results.json")

    def write_results(self, results: dict[str, Any]) -> None:
        """Replace the results."""
        with self.writing():
            self._write_json("results.json", results)

    def answers(self, position: int) -> dict[str, Any]:
        """Return the answers given at a position, {} if there are none."""
        return self._read_json(self._answers_file(position))

    def write_answers(self, position: int, answers: dict[str, Any]) -> None:
        """Replace the answers given at a position."""
        with self.writing():
            self._write_json(self._answers_file(position), answers)

    def _answers_file(self, position: int) -> str:
        return f"answers/{self._require_position(position, first=0):04d}.json"

    def _require_position(self, position: int, first: int) -> int:
        if not first <= position <= len(self):
            allowed = f"{first}…{len(self)}" if first <= len(self) else "none, the store is empty"
            raise PositionError(f"{self.path}: position {position}; allowed: {allowed}")
        return position

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _reported(self.path):
            try:
                self._lock.acquire()
            except Timeout as error:
                raise LockedError(f"{self.path}: another writer holds this store") from error
        try:
            yield
        finally:
            self._lock.release()

    def _sweep(self) -> None:
        """Remove what a crashed writer left half-written; only the holder of the lock may."""
        with _reported(self.path):
            for stale in [*self.path.glob(".*.tmp"), *self.path.glob("answers/.*.tmp")]:
                stale.unlink()

    def _write_manifest(self, entries: list[Entry]) -> None:
        deltas = [asdict(entry) for entry in entries]
        self._write_json(MANIFEST, {"format": FORMAT, "base": self.base, "deltas": deltas})
        self._entries = entries

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        self._write(name, _json(content, name).encode())

    def _write(self, name: str, data: bytes) -> None:
        path = self.path / name
        with _reported(path):
            path.parent.mkdir(exist_ok=True)
            deltafile.write(path, data)

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return _load_json(path) if path.is_file() else {}


def _read_manifest(store: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Return base and entries of a manifest in which everything is as `append` writes it."""
    path = store / MANIFEST
    manifest = _load_json(path)
    _require(manifest.get("format") == FORMAT, path, f"unknown format; known: {FORMAT}")
    _require_fields(path, manifest, {"format": int, "base": dict, "deltas": list})
    _require(type(manifest["base"].get("fingerprint")) is str, path, "base has no fingerprint")
    entries: list[Entry] = []
    for record in manifest["deltas"]:
        _require_fields(path, record, {field.name: field.type for field in fields(Entry)})
        entries.append(Entry(**record))
        _require_next(path, entries)
    return manifest["base"], entries


def _require_next(path: Path, entries: list[Entry]) -> None:
    """Raise unless the last entry follows from those before it and names a file of the store."""
    entry, position = entries[-1], len(entries)
    parent = entries[-2].sha256 if position > 1 else ""
    name = FILE_NAME.fullmatch(entry.file)
    _require(entry.position == position, path, f"expected position {position} in this place")
    _require(entry.parent == parent, path, f"position {position} has another parent")
    _require(bool(SHA256.fullmatch(entry.sha256)), path, f"position {position} has no SHA-256")
    _require(min(entry.entries, entry.bytes) >= 0, path, f"position {position} has a negative size")
    plain = name is not None and int(name[1]) == position
    _require(plain, path, f"{entry.file!r} is no file name for position {position}")
    inside = (path.parent / entry.file).resolve().parent == path.parent.resolve()
    _require(inside, path, f"{entry.file} leads out of the store")


def _require(sound: bool, path: Path, problem: str) -> None:
    if not sound:
        raise StoreError(f"{path}: {problem}")


def _require_fields(path: Path, record: Any, expected: dict[str, Any]) -> None:
    found = {key: type(value) for key, value in record.items()} if type(record) is dict else {}
    _require(
        found == expected, path, f"expected the fields {', '.join(expected)}, each of its type"
    )


def _require_same(place: Path, what: str, expected: object, found: object) -> None:
    if expected != found:
        raise MismatchError(f"{place}: {what}: expected {expected!r}, found {found!r}")


def _slug(task: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", task.lower())[:60].strip("-") or "task"


def _json(content: dict[str, Any], what: str) -> str:
    try:
        return json.dumps(content, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise StoreError(f"{what} is not plain JSON: {error}") from error


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: damaged JSON: {error}") from error
    _require(type(content) is dict, path, "damaged: expected a JSON object")
    return content


def _read(path: Path) -> bytes:
    with _reported(path):
        return path.read_bytes()


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn what the system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{error.filename or path}: {error.strerror}") from error
