"""Stores that travel: copied, forked, pushed to and pulled from a folder or the Hugging Face Hub.

    transfer_positions  positions 1…at into a new store, or into one that lacks the last of them
    fork                a new branch of a store, to be trained differently from there on
    push, pull          to and from `user/name` on the Hub; a folder or a file:// URL is a transfer

A transfer only ever continues a history. Two stores agree on a position if their delta files have
the same SHA-256. Everything is verified before the first byte is written.
"""

import os.path
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mm_piece.errors import (
    PieceError,
    StoreError,
    as_path,
)
from mm_piece.files.atomic import creating_folder, reporting_os_errors
from mm_piece.store import hub, manifest
from mm_piece.store.base_record import relocate_base
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.folder import MANIFEST, RECIPE, RESULTS, answers_file, is_store
from mm_piece.store.loading import as_store
from mm_piece.store.model_card import GENERATED_MARK, format_model_card
from mm_piece.store.records import BaseRecord, ManifestEntry
from mm_piece.store.snapshot import StoreSnapshot, drop_unlearned_tasks, read_snapshot

_CARD_NAME = "README.md"


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
    return _copy_snapshot(snapshot, as_path(to, "the new store"))


def fork(
    store: str | Path | DeltaStore,
    at: int,
    to: str | Path,
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
    return _copy_snapshot(snapshot, to)


def _is_complete_fork(
    target: DeltaStore,
    source: DeltaStore,
    at: int,
) -> bool:
    """Return whether a store is complete, not the remainder of an interrupted fork."""
    return len(target) >= at and bool(target.results() or not source.results())


def push(
    store: str | Path | DeltaStore,
    to: str | Path,
    *,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Copy a store to `user/name` on the Hub, in one commit, or to a folder; return a report line.

    A push only ever continues the store that is there. The Hub also gets a model card, unless a
    person wrote the one that is there, and no folder of this computer. Raises StoreError and the
    errors of `verify`.
    """
    folder = hub.folder_of(to)
    if folder is None:
        snapshot = read_snapshot(as_store(store), None)
        return _push_to_hub(snapshot, str(to), private, revision)

    if private or revision:
        raise StoreError(f"{to}: private and revision are for the Hub, and this is a folder")
    target = transfer_positions(store, folder)
    return f"{folder}: a store with positions 0…{len(target)}"


def pull(
    source: str | Path,
    to: str | Path,
    *,
    revision: str | None = None,
) -> DeltaStore:
    """Copy a store from `user/name` on the Hub or from a folder, or add what `to` lacks of it.

    Nothing is written to `to` before all was verified. Raises StoreError and the errors of
    `verify`.
    """
    folder = hub.folder_of(source)
    if folder is None:
        return _pull_from_hub(str(source), as_path(to, "the new store"), revision)

    if revision:
        raise StoreError(f"{source}: a revision is for the Hub, and this is a folder")
    return transfer_positions(DeltaStore.open(folder), to)


def _copy_snapshot(snapshot: StoreSnapshot, to: Path) -> DeltaStore:
    """Write a snapshot to a new store, or add what an existing one lacks."""
    if to.exists():
        target = _open_target(snapshot, to)
        # compared under the lock: nobody appends between the comparison and the copy
        with target.writing():
            _require_same_history(str(to), target.base, target.entries, snapshot)
            _append_missing(target, snapshot)
        return target

    base = relocate_base(snapshot.base, snapshot.store.path, to)
    with _making_folder(to) as folder:
        target = DeltaStore.create(folder, base.facts, snapshot.recipe)
        _append_missing(target, snapshot)
    return DeltaStore.open(to)


def _open_target(snapshot: StoreSnapshot, to: Path) -> DeltaStore:
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


def _require_same_history(
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


def _push_to_hub(
    snapshot: StoreSnapshot,
    repository: str,
    private: bool,
    revision: str | None,
) -> str:
    """Push a snapshot to a repository of the Hub in one commit; return a report line."""
    snapshot = replace(snapshot, base=snapshot.base.without_folder())
    hub.create_repository(repository, private, revision)
    commit, remote_names = hub.inspect_revision(repository, revision)

    # manifest and card are small, and enough to compare the two histories
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wanted = remote_names & {MANIFEST, _CARD_NAME}
        hub.download_files(repository, commit, wanted, scratch)
        remote_entries = _read_remote_entries(snapshot, repository, remote_names, scratch)
        is_handwritten = _is_handwritten(scratch / _CARD_NAME)

    last = len(snapshot.entries)
    if len(remote_entries) > last:
        return (
            f"{repository}: has positions 0…{len(remote_entries)}, this store 0…{last}; "
            "nothing to push"
        )

    # deltas that are there need no upload: a file of a store never changes
    files = _collect_files(snapshot, repository)
    for entry in remote_entries:
        if entry.file in remote_names:
            del files[entry.file]
    if is_handwritten:
        del files[_CARD_NAME]

    # the commit names its parent: the Hub refuses it if somebody else has pushed since
    message = f"Positions 0…{last}"
    new_commit = hub.commit_files(
        repository,
        files,
        message,
        revision=revision,
        parent=commit,
    )
    state = "nothing had changed" if new_commit == commit else f"commit {new_commit[:12]}"
    note = f"; its {_CARD_NAME} was written by hand and stays" if is_handwritten else ""
    return f"{repository} on the Hub: a store with positions 0…{last}, {state}{note}"


def _is_handwritten(card: Path) -> bool:
    """Return whether a person wrote the model card that is there."""
    return card.is_file() and GENERATED_MARK not in card.read_text("utf-8", "replace")


def _read_remote_entries(
    snapshot: StoreSnapshot,
    repository: str,
    remote_names: set[str],
    scratch: Path,
) -> list[ManifestEntry]:
    """Read a repository's entries of the same history from its manifest in `scratch`.

    Raises StoreError if its history is another, or if it is no store but has files of that name.
    """
    if MANIFEST in remote_names:
        with _naming_repository(repository, scratch):
            base, entries = manifest.read_manifest(scratch)
        _require_same_history(repository, base, entries, snapshot)
        return entries

    other = sorted(remote_names & _list_file_names(snapshot.entries))
    if other:
        raise StoreError(f"{repository}: is no store but has a {other[0]}; push to a new one")
    return []


def _collect_files(
    snapshot: StoreSnapshot,
    repository: str,
) -> dict[str, str | bytes]:
    """Return all files of a store in a repository: small ones as content, deltas as paths."""
    base = snapshot.base
    entries = snapshot.entries
    results = snapshot.results
    texts = {
        MANIFEST: manifest.serialize_manifest(base, entries),
        RECIPE: snapshot.recipe,
        _CARD_NAME: format_model_card(base, entries, results, repository),
    }
    if results:
        texts[RESULTS] = manifest.serialize_json(results, RESULTS)
    for position, rows in snapshot.answers.items():
        name = answers_file(position)
        texts[name] = manifest.serialize_json(rows, "answers")

    # text becomes bytes, as the Hub's library takes a str for a path
    files: dict[str, str | bytes] = {}
    for entry in entries:
        files[entry.file] = str(snapshot.store.path / entry.file)
    for name, text in texts.items():
        files[name] = text.encode()
    return files


def _pull_from_hub(
    repository: str,
    to: Path,
    revision: str | None,
) -> DeltaStore:
    """Download a store from the Hub to scratch, verify it there, and copy it to `to`."""
    commit, remote_names = hub.inspect_revision(repository, revision)
    if MANIFEST not in remote_names:
        raise StoreError(f"{repository}: is no delta store (it has no {MANIFEST})")

    # the scratch lies on the disk of `to`, which must have room for the store anyway
    parents = Path(os.path.realpath(to)).parents
    nearest_folder = next(parent for parent in parents if parent.is_dir())
    prefix = f".{to.name}-"
    with (
        reporting_os_errors(to),
        tempfile.TemporaryDirectory(
            prefix=prefix,
            suffix=".tmp",
            dir=nearest_folder,
        ) as folder,
    ):
        scratch = Path(folder)
        # the manifest names the files, so only files of a store are downloaded
        hub.download_files(repository, commit, {MANIFEST}, scratch)
        with _naming_repository(repository, scratch):
            _, entries = manifest.read_manifest(scratch)
        wanted = remote_names & _list_file_names(entries)
        hub.download_files(repository, commit, wanted, scratch)

        with _naming_repository(repository, scratch):
            snapshot = read_snapshot(DeltaStore.open(scratch), None)
        base = snapshot.base.without_folder()
        snapshot = replace(snapshot, name=repository, base=base)
        return _copy_snapshot(snapshot, to)


def _list_file_names(entries: Sequence[ManifestEntry]) -> set[str]:
    """Return the names of a store's files beside its manifest, also of those it may lack."""
    names = {RECIPE, RESULTS}
    names.update(entry.file for entry in entries)
    positions = range(len(entries) + 1)  # answers begin at the base
    names.update(answers_file(position) for position in positions)
    return names


@contextmanager
def _naming_repository(repository: str, scratch: Path) -> Iterator[None]:
    """Keep errors about downloaded files naming the repository while the block runs."""
    try:
        yield
    except PieceError as error:
        message = str(error).replace(f"{scratch}/", "")
        raise type(error)(f"{repository}: {message}") from error
