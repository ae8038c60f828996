"""`DeltaStore`: a directory with one base's deltas in order. It never touches a model.

Every file is written whole under a temporary name and renamed; the manifest comes last. After a
crash a file may lie there that the manifest does not list, but never the other way round. What lies
where: `store.folder`.
"""

import hashlib
import json
import os.path
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mm_piece.errors import (
    PieceError,
    PositionError,
    StoreError,
    as_path,
    format_value,
)
from mm_piece.files import atomic
from mm_piece.files.atomic import reporting_os_errors
from mm_piece.store import folder, manifest
from mm_piece.store.folder import MANIFEST, RECIPE, RESULTS
from mm_piece.store.garbage import iter_half_written, list_garbage, remove_garbage
from mm_piece.store.lock import StoreLock
from mm_piece.store.records import BaseRecord, ManifestEntry
from mm_piece.store.results import Answers, Results

if TYPE_CHECKING:  # each takes longer to import than a command that needs none of them
    from mm_piece.deltas.arrays import DeltaArrays
    from mm_piece.deltas.delta import Delta
    from mm_piece.recipe import Recipe


class DeltaStore:
    """One base's deltas in order; `create` or `open` it."""

    def __init__(
        self,
        path: Path,
        base: BaseRecord,
        entries: list[ManifestEntry],
    ) -> None:
        self.path = path
        self.base = base
        self._entries = entries
        self._lock = StoreLock(path)

    @classmethod
    def create(
        cls,
        path: str | Path,
        base: Mapping[str, object],
        recipe: str,
        over_empty: bool = False,
    ) -> "DeltaStore":
        """Make a store without deltas; the directory may exist, but not be a store.

        With `over_empty` it may be one without deltas, whose results and scratch are then removed.
        `base` are the facts of a BaseRecord; only the fingerprint is required. Raises StoreError.
        """
        path = as_path(path, "store")
        # a round trip through JSON: the new store has the same base as one that is opened
        text = manifest.serialize_json(base, "base")
        record = BaseRecord(json.loads(text))
        manifest.require_valid_base(path, record)
        store = cls(path, record, [])
        with reporting_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)

        with store._lock.acquiring():
            if (path / MANIFEST).exists():
                manifest.require_replaceable(path, over_empty)
                folder.remove_empty_store(path)

            store._write_file(RECIPE, recipe.encode())
            store._write_manifest([])
        return store

    @classmethod
    def open(cls, path: str | Path) -> "DeltaStore":
        """Open a store and validate its manifest; `verify` validates the rest."""
        path = as_path(path, "store")
        with reporting_os_errors(path):
            if not (path / MANIFEST).is_file():
                raise StoreError(f"{path}: not a delta store (it has no {MANIFEST})")
        base, entries = manifest.read_manifest(path)
        return cls(path, base, entries)

    def reload(self) -> None:
        """Read the manifest again, which another process may have written."""
        self.base, self._entries = manifest.read_manifest(self.path)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        tasks = [entry.task for entry in self._entries]
        return f"<DeltaStore {str(self.path)!r} of {len(tasks)} deltas: {', '.join(tasks)}>"

    @property
    def entries(self) -> list[ManifestEntry]:
        """The manifest's deltas, in order."""
        return list(self._entries)

    @property
    def recipe(self) -> str:
        """The text of the recipe that made the store."""
        return self._read_file(RECIPE).decode(errors="replace")

    def load_recipe(self) -> "Recipe":
        """Parse that recipe; no file of the user is read. Raises RecipeError."""
        from mm_piece.recipe import parse_recipe

        source = str(self.path / RECIPE)
        return parse_recipe(self.recipe, source)

    def write_recipe(self, recipe: str) -> None:
        """Replace the recipe, which may have come to name further tasks."""
        data = recipe.encode()
        with self.writing():
            self._write_file(RECIPE, data)

    @property
    def logs(self) -> Path:
        """The folder for TensorBoard's files."""
        return self.path / folder.LOGS

    def log_folder(self, position: int) -> Path:
        """Return the folder for those of the training of a task."""
        return self.logs / f"{position:04d}"

    def work_folder(self, position: int) -> Path:
        """Return the folder for scratch of the training of a task."""
        work = self.path / folder.WORK
        return work / f"{position:04d}"

    def retention_file(self, position: int) -> Path:
        """Return the path of a learned task's retention importance; it may not be there."""
        return self.path / folder.retention_file(position)

    def data(self, position: int) -> bytes:
        """Read the file of the delta that leads to `position`; verify its size and SHA-256."""
        number = self.require_position(position, first=1)
        entry = self._entries[number - 1]
        data = self._read_file(entry.file)
        path = self.path / entry.file
        manifest.require_listed_content(path, entry, data)
        return data

    def delta(self, position: int) -> "Delta":
        """Read and verify the delta that leads to `position`."""
        from mm_piece.deltas.delta import Delta

        arrays = self.delta_arrays(position)
        return Delta.from_arrays(arrays)

    def delta_arrays(self, position: int) -> "DeltaArrays":
        """Read and verify the delta that leads to `position`, without torch."""
        from mm_piece.deltas.arrays import DeltaArrays

        data = self.data(position)
        entry = self._entries[position - 1]
        path = self.path / entry.file
        delta = DeltaArrays.from_bytes(data, origin=str(path))

        # the manifest must agree with the delta's own header
        expected_base = self.base.fingerprint
        manifest.require_same(path, "base", expected_base, delta.base)
        for field in ("task", "parent", "entries"):
            listed = getattr(entry, field)
            found = getattr(delta, field)
            manifest.require_same(path, field, listed, found)
        return delta

    def deltas(self, at: int | None = None) -> "list[Delta]":
        """Read and verify the deltas 1…`at`, by default all of them."""
        last = self.position(at)
        deltas = []
        for position in range(1, last + 1):
            delta = self.delta(position)
            deltas.append(delta)
        return deltas

    def append(self, delta: "Delta") -> ManifestEntry:
        """Add the next delta; once this returns it is there for good."""
        with self.writing():
            position = len(self) + 1
            parent = ""  # the base
            if self._entries:
                parent = self._entries[-1].sha256
            expected_base = self.base.fingerprint
            manifest.require_same(self.path, "base", expected_base, delta.base)
            label = f"parent of position {position}"
            manifest.require_same(self.path, label, parent, delta.parent)

            data = delta.to_bytes()
            entry = ManifestEntry(
                position=position,
                task=delta.task,
                file=manifest.delta_file_name(position, delta.task),
                sha256=hashlib.sha256(data).hexdigest(),
                parent=parent,
                entries=delta.entries,
                bytes=len(data),
            )
            # the manifest comes last: a crash in between leaves an unlisted file for `gc`
            self._write_file(entry.file, data)
            self._write_manifest([*self._entries, entry])
        return entry

    def extend(
        self,
        entries: Sequence[ManifestEntry],
        files: Iterable[bytes],
    ) -> None:
        """Add further deltas as another store's files, all of them or none."""
        with self.writing():
            extended = [*self._entries, *entries]
            manifest.require_valid_entries(self.path / MANIFEST, extended)
            for entry, data in zip(entries, files, strict=True):
                path = self.path / entry.file
                manifest.require_listed_content(path, entry, data)
                self._write_file(entry.file, data)
            # until this line the store is as it was before
            self._write_manifest(extended)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the store locked for this writer while the block runs.

        The manifest is read again first, so earlier writers' deltas are there. Nests. Raises
        LockedError while another process writes.
        """
        with self._lock.acquiring():
            self.reload()
            # nobody else writes now: temporary files are those of a crashed writer
            with reporting_os_errors(self.path):
                half_written = iter_half_written(self.path)
                remove_garbage(half_written)
            yield

    def verify(self, at: int | None = None) -> list[ManifestEntry]:
        """Read results, answers and the deltas 1…`at` in full; return their manifest entries.

        Raises the first problem, naming its position and file.
        """
        last = self.position(at)
        for position in range(last + 1):  # the base may have answers, but has no delta
            try:
                self.answers(position)
                if position:
                    self.delta_arrays(position)
            except PieceError as error:
                raise type(error)(f"position {position}: {error}") from error
        self.results()
        return self._entries[:last]

    def gc(self, dry_run: bool = False) -> list[Path]:
        """Remove files that this library made and the store does not list; return their paths.

        These are: unlisted deltas, half-written files, scratch of learned tasks, answers and
        retention importance past the end. Scratch of the next task stays: a training resumes from
        it. With `dry_run` nothing is removed. Raises LockedError while another writer is at work.
        """
        # not `writing`, which would remove half-written files even in a dry run
        with self._lock.acquiring(), reporting_os_errors(self.path):
            self.reload()
            garbage = list_garbage(self.path, self._entries)
            if not dry_run:
                remove_garbage(garbage)
        return garbage

    def log(self) -> dict[str, Any]:
        """Return the base and the deltas as plain JSON."""
        deltas = []
        for entry in self._entries:
            facts = asdict(entry)
            del facts["parent"]
            deltas.append(facts)
        return {
            "base": dict(self.base.facts),
            "deltas": deltas,
        }

    def results(self) -> Results:
        """Return the results written so far, {} before the first."""
        results = self._read_json(RESULTS)

        # The manifest is read after them: another writer may have added a position, then a row.
        _, entries = manifest.read_manifest(self.path)
        path = self.path / RESULTS
        manifest.require_valid_results(path, results, len(entries))
        return cast(Results, results)

    def write_results(self, results: Results) -> None:
        """Replace the results."""
        with self.writing():
            path = self.path / RESULTS
            text = manifest.serialize_json(results, RESULTS)
            manifest.require_valid_results(path, results, len(self))
            self._write_file(RESULTS, text.encode())

    def update_results(self, change: Callable[[Results], Results]) -> None:
        """Replace the results by what `change` makes of them, as one step."""
        with self.writing():
            results = self.results()
            self.write_results(change(results))

    def answers(self, position: int) -> Answers:
        """Return the answers given at a position, {} if there are none."""
        file = self._answers_file(position)
        answers = self._read_json(file)
        manifest.require_valid_answers(self.path / file, answers)
        return cast(Answers, answers)

    def write_answers(
        self,
        position: int,
        answers: Answers,
    ) -> None:
        """Replace the answers given at a position."""
        with self.writing():
            file = self._answers_file(position)
            text = manifest.serialize_json(answers, file)
            manifest.require_valid_answers(self.path / file, answers)
            self._write_file(file, text.encode())

    def _answers_file(self, position: int) -> str:
        number = self.require_position(position)
        return folder.answers_file(number)

    def position(self, at: int | None) -> int:
        """Return `at`, or the last position for None; PositionError outside 0…T."""
        if at is None:
            return len(self)
        return self.require_position(at)

    def require_position(
        self,
        position: int,
        first: int = 0,
    ) -> int:
        """Return a position as an int; PositionError outside `first`…T."""
        last = len(self)
        # `in range` would take True for 1, and 1.0 too
        allowed_range = range(first, last + 1)
        is_number = not isinstance(position, bool | float)
        if not is_number or position not in allowed_range:
            allowed = f"{first}…{last}"
            if first > last:
                allowed = "none, the store is empty"
            raise PositionError(
                f"{self.path}: position {format_value(position)}; allowed: {allowed}"
            )

        return int(position)

    def _write_manifest(self, entries: list[ManifestEntry]) -> None:
        text = manifest.serialize_manifest(self.base, entries)
        self._write_file(MANIFEST, text.encode())
        self._entries = entries

    def _write_file(self, name: str, data: bytes) -> None:
        path = self.path / name
        manifest.require_inside(self.path, path.parent)
        with reporting_os_errors(path):
            path.parent.mkdir(exist_ok=True)
            atomic.write_atomically(path, data)

    def _read_file(self, name: str) -> bytes:
        path = self.path / name
        manifest.require_inside(self.path, path)
        return manifest.read_bytes(path)

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        manifest.require_inside(self.path, path)
        # a broken link is an error, not an absent file
        if not os.path.lexists(path):
            return {}
        return manifest.read_json_object(path)
