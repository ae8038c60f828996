"""`DeltaStore`: a directory that holds one base's deltas in order. It never touches a model.

    store.json              base, and each delta's file, SHA-256 and parent: what counts
    recipe.yaml             the run that made it
    0001-name.safetensors   one delta per position, only ever added
    results.json            the accuracy matrix
    answers/0001.json       answers given at that position
    kept/0001.safetensors   what a learned task is to be kept by, where the method asks
    work/0002/              scratch of a training in progress

Every file is written whole under a temporary name and renamed; the manifest comes last. After a
crash a file may lie there that the manifest does not list, but never the other way round.
"""

import hashlib
import json
import os.path
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

from filelock import FileLock, Timeout

from mm_piece.deltas.delta import Delta
from mm_piece.errors import (
    LockedError,
    PieceError,
    PositionError,
    StoreError,
    as_path,
    format_value,
)
from mm_piece.files import atomic
from mm_piece.files.atomic import reporting_os_errors
from mm_piece.store import manifest
from mm_piece.store.manifest import DELTA_FILE_PATTERN, MANIFEST, ManifestEntry

_TEMPORARY_NAME = re.compile(r"\..+\.[0-9]+\.tmp")  # as atomic.write calls it
_NUMBERED_SUFFIXES = {"answers": ".json", "kept": ".safetensors"}
_NUMBER_PATTERN = re.compile(r"[0-9]{4,}")


class DeltaStore:
    """One base's deltas in order; `create` or `open` it."""

    def __init__(self, path: Path, base: dict[str, Any], entries: list[ManifestEntry]) -> None:
        self.path = path
        self.base = base
        self._entries = entries
        self._lock = FileLock(path / ".lock", timeout=0)

    @classmethod
    def create(
        cls, path: str | Path, base: dict[str, Any], recipe: str, over_empty: bool = False
    ) -> "DeltaStore":
        """Make a store without deltas; the directory may exist, but not be a store.

        With `over_empty` it may be one without deltas, whose results and scratch are then removed.
        Of `base` only the fingerprint is required. Raises StoreError.
        """
        path = as_path(path, "store")
        base = json.loads(manifest.serialize_json(base, "base"))
        manifest.require_valid_base(path, base)
        store = cls(path, base, [])
        with reporting_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        with store._acquiring_lock():
            if (path / MANIFEST).exists():
                if not over_empty or manifest.read_manifest(path)[1]:
                    raise StoreError(f"{path}: is a store already")
                for name in ("results.json", MANIFEST):  # a crash here leaves no store at all
                    (path / name).unlink(missing_ok=True)
                for name in ("answers", "logs", "work"):
                    rmtree(path / name, ignore_errors=True)
            store._write_file("recipe.yaml", recipe.encode())
            store._write_manifest([])
        return store

    @classmethod
    def open(cls, path: str | Path) -> "DeltaStore":
        """Open a store and validate its manifest; `verify` validates the rest."""
        path = as_path(path, "store")
        with reporting_os_errors(path):
            if not (path / MANIFEST).is_file():
                raise StoreError(f"{path}: not a delta store (it has no {MANIFEST})")
        return cls(path, *manifest.read_manifest(path))

    def reload(self) -> None:
        """See what another process has written."""
        self.base, self._entries = manifest.read_manifest(self.path)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> list[ManifestEntry]:
        """Return what the manifest lists, in order."""
        return list(self._entries)

    @property
    def recipe(self) -> str:
        """Return the text of the recipe that made the store."""
        return self._read_file("recipe.yaml").decode(errors="replace")

    def write_recipe(self, recipe: str) -> None:
        """Replace the recipe, which may have come to name further tasks."""
        with self.writing():
            self._write_file("recipe.yaml", recipe.encode())

    @property
    def work(self) -> Path:
        """Return the place for scratch of a training in progress."""
        return self.path / "work"

    def data(self, position: int) -> bytes:
        """Read the file of the delta that leads to `position`; verify its size and SHA-256."""
        entry = self._entries[self._require_position(position, first=1) - 1]
        data = self._read_file(entry.file)
        manifest.require_listed_content(self.path / entry.file, entry, data)
        return data

    def delta(self, position: int) -> Delta:
        """Read and verify the delta that leads to `position`."""
        data, entry = self.data(position), self._entries[position - 1]
        path = self.path / entry.file
        delta = Delta.from_bytes(data, origin=str(path))
        manifest.require_same(path, "base", self.base["fingerprint"], delta.base)
        for field in ("task", "parent", "entries"):
            manifest.require_same(path, field, getattr(entry, field), getattr(delta, field))
        return delta

    def deltas(self, at: int | None = None) -> list[Delta]:
        """Read and verify the deltas 1…`at`, by default all of them."""
        return [self.delta(position) for position in range(1, self.position(at) + 1)]

    def append(self, delta: Delta) -> ManifestEntry:
        """Add the next delta; once this returns it is there for good."""
        with self.writing():
            parent = self._entries[-1].sha256 if self._entries else ""
            position, task = len(self) + 1, delta.task
            manifest.require_same(self.path, "base", self.base["fingerprint"], delta.base)
            manifest.require_same(self.path, f"parent of position {position}", parent, delta.parent)
            data = delta.to_bytes()
            sha256, file = (
                hashlib.sha256(data).hexdigest(),
                manifest.delta_file_name(position, task),
            )
            entry = ManifestEntry(position, task, file, sha256, parent, delta.entries, len(data))
            self._write_file(file, data)
            self._write_manifest([*self._entries, entry])
        return entry

    def extend(self, entries: Sequence[ManifestEntry], files: Iterable[bytes]) -> None:
        """Add further deltas as the files that another store has, all of them or none."""
        with self.writing():
            extended = [*self._entries, *entries]
            manifest.require_valid_entries(self.path / MANIFEST, extended)
            for entry, data in zip(entries, files, strict=True):
                manifest.require_listed_content(self.path / entry.file, entry, data)
                self._write_file(entry.file, data)
            self._write_manifest(extended)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer; sees what earlier writers added. Nests."""
        with self._acquiring_lock():
            self.reload()
            with reporting_os_errors(self.path):
                for stale in self._iter_half_written():
                    stale.unlink()
            yield

    def verify(self, at: int | None = None) -> list[ManifestEntry]:
        """Read results, answers and the deltas 1…`at` in full; return what was verified.

        Raises the first problem, naming its position and file.
        """
        last = self.position(at)
        for position in range(last + 1):
            try:
                self.answers(position)
                if position:
                    self.delta(position)
            except PieceError as error:
                raise type(error)(f"position {position}: {error}") from error
        self.results()
        return self._entries[:last]

    def gc(self, dry_run: bool = False) -> list[Path]:
        """Remove what this library made and the store does not list; return it.

        That is: unlisted deltas, half-written files, scratch of learned tasks, answers and
        importances past the end. Scratch of the next task stays: a training resumes from it.
        With `dry_run` nothing is removed. Raises LockedError while another writer is at work.
        """
        with self._acquiring_lock(), reporting_os_errors(self.path):
            self.base, self._entries = manifest.read_manifest(self.path)
            garbage = sorted([*self._iter_half_written(), *self._iter_unlisted()])
            for path in [] if dry_run else garbage:
                rmtree(path) if path.is_dir() else path.unlink()
        return garbage

    def log(self) -> dict[str, Any]:
        """Return base and deltas as plain JSON."""
        keys = ("position", "task", "file", "sha256", "entries", "bytes")
        deltas = [{key: getattr(entry, key) for key in keys} for entry in self._entries]
        return {"base": self.base, "deltas": deltas}

    def results(self) -> dict[str, Any]:
        """Return the results written so far, {} before the first."""
        results = self._read_json("results.json")
        # The manifest is read after them: another writer may have added a position, then a row.
        positions = len(manifest.read_manifest(self.path)[1])
        manifest.require_valid_results(self.path / "results.json", results, positions)
        return results

    def write_results(self, results: dict[str, Any]) -> None:
        """Replace the results."""
        with self.writing():
            text = manifest.serialize_json(results, "results.json")
            manifest.require_valid_results(self.path / "results.json", results, len(self))
            self._write_file("results.json", text.encode())

    def answers(self, position: int) -> dict[str, Any]:
        """Return the answers given at a position, {} if there are none."""
        file = self._answers_file(position)
        answers = self._read_json(file)
        manifest.require_valid_answers(self.path / file, answers)
        return answers

    def write_answers(self, position: int, answers: dict[str, Any]) -> None:
        """Replace the answers given at a position."""
        with self.writing():
            file = self._answers_file(position)
            text = manifest.serialize_json(answers, file)
            manifest.require_valid_answers(self.path / file, answers)
            self._write_file(file, text.encode())

    def _answers_file(self, position: int) -> str:
        return f"answers/{self._require_position(position, first=0):04d}.json"

    def position(self, at: int | None) -> int:
        """Return `at`, or the last position for None; PositionError outside 0…T."""
        return len(self) if at is None else self._require_position(at, first=0)

    def _require_position(self, position: int, first: int) -> int:
        if isinstance(position, bool | float) or position not in range(first, len(self) + 1):
            allowed = f"{first}…{len(self)}" if first <= len(self) else "none, the store is empty"
            raise PositionError(
                f"{self.path}: position {format_value(position)}; allowed: {allowed}"
            )
        return int(position)

    @contextmanager
    def _acquiring_lock(self) -> Iterator[None]:
        with reporting_os_errors(self.path):
            manifest.require_inside(self.path, self.path / ".lock")
            try:
                self._lock.acquire()
            except Timeout as error:
                raise LockedError(f"{self.path}: another writer holds this store") from error
        try:
            yield
        finally:
            self._lock.release()

    def _iter_half_written(self) -> Iterator[Path]:
        """Yield what a crashed writer left; only the holder of the lock may touch it."""
        for path in (
            *self._list_own_paths(),
            *self._list_own_paths("answers"),
            *self._list_own_paths("kept"),
        ):
            if _TEMPORARY_NAME.fullmatch(path.name) and path.is_file():
                yield path

    def _iter_unlisted(self) -> Iterator[Path]:
        last, listed = len(self), {entry.file for entry in self._entries}
        for path in self._list_own_paths():
            if (
                DELTA_FILE_PATTERN.fullmatch(path.name)
                and path.name not in listed
                and path.is_file()
            ):
                yield path
        for path in (*self._list_own_paths("answers"), *self._list_own_paths("kept")):
            has_number = path.suffix == _NUMBERED_SUFFIXES[
                path.parent.name
            ] and _NUMBER_PATTERN.fullmatch(path.stem)
            if has_number and int(path.stem) > last and path.is_file():
                yield path
        for path in self._list_own_paths("work"):
            if (
                _NUMBER_PATTERN.fullmatch(path.name)
                and 1 <= int(path.name) <= last
                and path.is_dir()
            ):
                yield path

    def _list_own_paths(self, *folder: str) -> list[Path]:
        """Return what lies in a folder of the store, links aside: this library makes none."""
        path = self.path.joinpath(*folder)
        if not path.is_dir() or (folder and path.is_symlink()):
            return []
        return [child for child in path.iterdir() if not child.is_symlink()]

    def _write_manifest(self, entries: list[ManifestEntry]) -> None:
        self._write_file(MANIFEST, manifest.serialize_manifest(self.base, entries).encode())
        self._entries = entries

    def _write_file(self, name: str, data: bytes) -> None:
        path = self.path / name
        manifest.require_inside(self.path, path.parent)
        with reporting_os_errors(path):
            path.parent.mkdir(exist_ok=True)
            atomic.write_atomically(path, data)

    def _read_file(self, name: str) -> bytes:
        manifest.require_inside(self.path, self.path / name)
        return manifest.read_bytes(self.path / name)

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        manifest.require_inside(self.path, path)
        return manifest.read_json_object(path) if os.path.lexists(path) else {}
