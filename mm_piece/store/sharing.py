"""Stores that travel: pushed to and pulled from `user/name` on the Hugging Face Hub.

A folder or a file:// URL is a transfer (`store.copying`). A push only ever continues a history, and
everything is verified before the first byte is written.
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
from mm_piece.files.atomic import reporting_os_errors
from mm_piece.store import hub, manifest
from mm_piece.store.copying import copy_snapshot, require_same_history, transfer_positions
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.folder import MANIFEST, RECIPE, RESULTS, answers_file
from mm_piece.store.inspection import as_store
from mm_piece.store.model_card import GENERATED_MARK, format_model_card
from mm_piece.store.records import ManifestEntry
from mm_piece.store.snapshot import StoreSnapshot, read_snapshot

_CARD_NAME = "README.md"


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
        require_same_history(repository, base, entries, snapshot)
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
        return copy_snapshot(snapshot, to)


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
