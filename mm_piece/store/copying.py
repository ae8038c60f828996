"""Stores that are copied to other folders, as a whole or up to a position.

    transfer_positions  positions 1…at into a new store, or into one that lacks the last of them
    fork                a new branch of a store, to be trained differently from there on

A transfer only ever continues a history. Two stores agree on a position if their delta files have
the same SHA-256. Everything is verified before the first byte is written.
"""

import os.path
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mm_piece.errors import (
    PieceError,
    StoreError,
    as_path,
)
from mm_piece.files.atomic import creating_folder, reporting_os_errors
from mm_piece.store.base_location import relocate_base
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.folder import is_store
from mm_piece.store.inspection import as_store
from mm_piece.store.records import BaseRecord, ManifestEntry
from mm_piece.store.snapshot import StoreSnapshot, drop_unlearned_tasks, read_snapshot


def transfer_positions(
    source: str | Path | DeltaStore,
    to: str | Path,
    at: int | None = None,
) -> DeltaStore:
    """Copy positions 1…`at` (default: all) to a new store, or add what an existing one lacks.

    Recipe, results and answers come along, logs and scratch do not. A store that has `at` already
    gets no more than the results that it lacks. Raises StoreError if `to` is of another base or has
    diverged, PositionError, and the errors of `verify`.
    """
    snapshot = read_snapshot(as_store(source), at)
    return copy_snapshot(snapshot, as_path(to, "the new store"))


def fork(
    store: str | Path | DeltaStore,
    to: str | Path,
    at: int,
) -> DeltaStore:
    """Make a new store that shares deltas 1…`at` and goes its own way from there.

    Its recipe and results name these tasks only, so that others may follow. Raises StoreError if
    `to` is a store already, PositionError outside 1…T.
    """
    opened = as_store(store)
    to = as_path(to, "the new store")
    if is_store(to):
        target = DeltaStore.open(to)
        if _is_complete_fork(target, opened, at):
            raise StoreError(f"{to}: is a store already; a fork makes a new one")

    opened.data(at)  # a PositionError for 0 too, where nothing would be shared
    snapshot = read_snapshot(opened, at)
    snapshot = drop_unlearned_tasks(snapshot, to)
    return copy_snapshot(snapshot, to)


def _is_complete_fork(
    target: DeltaStore,
    source: DeltaStore,
    at: int,
) -> bool:
    """Return whether a store is complete, not the remainder of an interrupted fork."""
    has_deltas = len(target) >= at
    has_results = bool(target.results()) or not source.results()
    return has_deltas and has_results


def copy_snapshot(
    snapshot: StoreSnapshot,
    to: Path,
) -> DeltaStore:
    """Write a snapshot to a new store, or add what an existing one lacks."""
    if to.exists():
        target = _open_target(snapshot, to)
        # compared under the lock: nobody appends between the comparison and the copy
        with target.writing():
            require_same_history(
                str(to),
                target.base,
                target.entries,
                snapshot,
            )
            _append_missing(target, snapshot)
        return target

    base = relocate_base(snapshot.base, snapshot.store.path, to)
    with _making_folder(to) as folder:
        target = DeltaStore.create(folder, base.facts, snapshot.recipe)
        _append_missing(target, snapshot)
    return DeltaStore.open(to)


def _open_target(
    snapshot: StoreSnapshot,
    to: Path,
) -> DeltaStore:
    """Open and verify the store in a folder; create one where the folder has none."""
    if not is_store(to):
        base = relocate_base(snapshot.base, snapshot.store.path, to)
        return DeltaStore.create(to, base.facts, snapshot.recipe)

    target = DeltaStore.open(to)
    target.verify()
    return target


@contextmanager
def _making_folder(to: Path) -> Iterator[Path]:
    """Keep a new folder in the making while the block runs; put it at `to` once the block ends.

    If the block raises, there is no folder at all. Errors name `to`.
    """
    # a link is followed: the folder replaces what the link points to, not the link
    real = Path(os.path.realpath(to))
    with reporting_os_errors(to), creating_folder(real) as folder:
        try:
            yield folder
        except PieceError as error:
            message = str(error).replace(str(folder), str(to))
            raise type(error)(message) from error


def _append_missing(target: DeltaStore, snapshot: StoreSnapshot) -> None:
    """Add what the target lacks: deltas, recipe, answers, results."""
    # deltas come first, as no row of results may stand without its position
    new = snapshot.entries[len(target) :]
    if new:
        # a generator: one delta file at a time is in memory
        files = (snapshot.store.data(entry.position) for entry in new)
        target.extend(new, files)
        target.write_recipe(snapshot.recipe)

    # results that the target has are never replaced by fewer
    measured = target.results().get("matrix", [])
    available = snapshot.results.get("matrix", [])
    if measured and len(measured) >= len(available):
        return

    for position, answers in snapshot.answers.items():
        target.write_answers(position, answers)
    if snapshot.results:
        target.write_results(snapshot.results)


def require_same_history(
    target_name: str,
    base: BaseRecord,
    entries: Sequence[ManifestEntry],
    snapshot: StoreSnapshot,
) -> None:
    """Raise StoreError unless one of two histories continues the other."""
    # only the fingerprint is required, but two recorded digests must agree as well
    for key in ("fingerprint", "digest"):
        there = base.facts.get(key)
        here = snapshot.base.facts.get(key)
        if there and here and there != here:
            detail = f"{key} {there[:12]}… there, {here[:12]}… in {snapshot.name}"
            raise StoreError(f"{target_name}: is a store of another base: {detail}")

    # the shorter of the two ends the comparison
    for old, new in zip(entries, snapshot.entries, strict=False):
        if old.sha256 != new.sha256:
            detail = f"SHA-256 {old.sha256[:12]}… there, {new.sha256[:12]}… in {snapshot.name}"
            raise StoreError(f"{target_name}: has diverged at position {old.position}: {detail}")
