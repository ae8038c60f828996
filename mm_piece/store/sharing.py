"""Stores that travel: copied, forked, pushed to and pulled from a folder or the Hugging Face Hub.

    transfer    positions 1…at into a new store, or into one that lacks the last of them
    fork        a new branch of a store, to be trained differently from there on
    push, pull  to and from `user/name` on the Hub; a folder or a file:// URL is a transfer

History is only ever continued. Two stores agree on a position if their delta files have the same
SHA-256. Everything is verified before the first byte is written.
"""

import os.path
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_piece.errors import PieceError, RecipeError, StoreError, as_path
from mm_piece.files.atomic import creating_folder, reporting_os_errors
from mm_piece.recipe import parse_recipe
from mm_piece.store import hub, manifest
from mm_piece.store.base_record import relocate_base
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import as_store
from mm_piece.store.manifest import MANIFEST, ManifestEntry
from mm_piece.store.model_card import GENERATED_MARK, format_model_card

_CARD_NAME = "README.md"


def transfer_positions(
    source: str | Path | DeltaStore, to: str | Path, at: int | None = None
) -> DeltaStore:
    """Copy positions 1…`at` (default: all) to a new store, or add what an existing one lacks.

    Recipe, results and answers come along, logs and scratch do not; a store that has `at` already
    gets no more than results that it lacks. Raises StoreError if `to` is of another base or has
    diverged, PositionError, and what `verify` finds.
    """
    return _copy_snapshot(_read_snapshot(as_store(source), at), as_path(to, "the new store"))


def fork(store: str | Path | DeltaStore, at: int, to: str | Path) -> DeltaStore:
    """Make a new store that shares deltas 1…`at` and goes its own way from there.

    Its recipe and results speak of these tasks only, so that others may follow. Raises StoreError
    if `to` is a store already, PositionError outside 1…T.
    """
    opened, to = as_store(store), as_path(to, "the new store")
    if (to / MANIFEST).exists() and _is_complete_fork(DeltaStore.open(to), opened, at):
        raise StoreError(f"{to}: is a store already; a fork makes a new one")
    opened.data(at)  # a PositionError for 0 too, where nothing would be shared
    return _copy_snapshot(_drop_unlearned_tasks(_read_snapshot(opened, at), to), to)


def _is_complete_fork(target: DeltaStore, source: DeltaStore, at: int) -> bool:
    """Whether a store is there, and not only what a fork left that was cut off."""
    return len(target) >= at and bool(target.results() or not source.results())


def push(
    store: str | Path | DeltaStore,
    to: str | Path,
    *,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Copy a store to `user/name` on the Hub, in one commit, or to a folder; return what was done.

    What is there is only ever continued. The Hub also gets a model card, unless a person wrote the
    one that is there, and no folder of this computer. Raises StoreError and what `verify` finds.
    """
    if (folder := hub.folder_of(to)) is None:
        return _push_to_hub(_read_snapshot(as_store(store), None), str(to), private, revision)
    if private or revision:
        raise StoreError(f"{to}: private and revision are for the Hub, and this is a folder")
    return f"{folder}: a store with positions 0…{len(transfer_positions(store, folder))}"


def pull(source: str | Path, to: str | Path, *, revision: str | None = None) -> DeltaStore:
    """Copy a store from `user/name` on the Hub or from a folder, or add what `to` lacks of it.

    Nothing is written to `to` before all was verified. Raises StoreError and what `verify` finds.
    """
    if (folder := hub.folder_of(source)) is None:
        return _pull_from_hub(str(source), as_path(to, "the new store"), revision)
    if revision:
        raise StoreError(f"{source}: a revision is for the Hub, and this is a folder")
    return transfer_positions(DeltaStore.open(folder), to)


@dataclass(frozen=True)
class _StoreSnapshot:
    """Positions 0…at of a store, verified; `name` is what messages call it."""

    store: DeltaStore
    name: str
    base: dict[str, Any]
    entries: list[ManifestEntry]
    recipe: str
    results: dict[str, Any]
    answers: dict[int, dict[str, Any]]


def _read_snapshot(store: DeltaStore, at: int | None) -> _StoreSnapshot:
    entries = store.verify(at)
    found = {position: store.answers(position) for position in range(len(entries) + 1)}
    answers = {position: rows for position, rows in found.items() if rows}
    results = _truncate_results(store.results(), entries)
    return _StoreSnapshot(
        store, str(store.path), store.base, entries, store.recipe, results, answers
    )


def _truncate_results(results: dict[str, Any], entries: Sequence[ManifestEntry]) -> dict[str, Any]:
    """What was measured at the base and at these positions."""
    rows, tasks = len(entries) + 1, {entry.task for entry in entries}
    truncated = {key: results[key][:rows] for key in ("matrix", "base_ability") if key in results}
    if kinds := results.get("base_kinds"):
        truncated["base_kinds"] = {kind: values[:rows] for kind, values in kinds.items()}
    for key in ("seconds", "stability"):
        if by_task := results.get(key):
            truncated[key] = {task: facts for task, facts in by_task.items() if task in tasks}
    return {**results, **truncated}


def _drop_unlearned_tasks(snapshot: _StoreSnapshot, to: Path) -> _StoreSnapshot:
    """Leave the tasks that were not learned out of recipe and results; the recipe names `to`.

    A store that `train` did not make may have any text as its recipe, or one of other tasks: it
    stays as it is.
    """
    learned, results = [entry.task for entry in snapshot.entries], snapshot.results
    if results.get("tasks", [])[: len(learned)] == learned:
        matrix = [row[: len(learned)] for row in results["matrix"]]
        snapshot = replace(snapshot, results={**results, "tasks": learned, "matrix": matrix})
    try:
        recipe = parse_recipe(snapshot.recipe)
    except RecipeError:
        return snapshot
    tasks = tuple(task for task in recipe.tasks if task.name in learned)
    recipe = recipe.model_copy(update={"tasks": tasks, "store": str(to)})
    return replace(snapshot, recipe=recipe.to_yaml()) if tasks else snapshot


def _copy_snapshot(snapshot: _StoreSnapshot, to: Path) -> DeltaStore:
    if to.exists():
        target = _open_target(snapshot, to)
        with target.writing():
            _require_same_history(str(to), target.base, target.entries, snapshot)
            _append_missing(target, snapshot)
        return target

    base = relocate_base(snapshot.base, snapshot.store.path, to)
    with _making_folder(to) as folder:
        _append_missing(DeltaStore.create(folder, base, snapshot.recipe), snapshot)
    return DeltaStore.open(to)


def _open_target(snapshot: _StoreSnapshot, to: Path) -> DeltaStore:
    """The store in a folder that is there, verified, or a new one beside what that holds."""
    if not (to / MANIFEST).exists():
        return DeltaStore.create(
            to, relocate_base(snapshot.base, snapshot.store.path, to), snapshot.recipe
        )
    target = DeltaStore.open(to)
    target.verify()
    return target


@contextmanager
def _making_folder(to: Path) -> Iterator[Path]:
    """A new folder that is there whole once the block ends, or not at all; errors name `to`."""
    with reporting_os_errors(to), creating_folder(Path(os.path.realpath(to))) as folder:
        try:
            yield folder
        except PieceError as error:
            raise type(error)(str(error).replace(str(folder), str(to))) from error


def _append_missing(target: DeltaStore, snapshot: _StoreSnapshot) -> None:
    """Add what the target lacks; deltas come first, as no row may stand without its position."""
    if new := snapshot.entries[len(target) :]:
        target.extend(new, (snapshot.store.data(entry.position) for entry in new))
        target.write_recipe(snapshot.recipe)
    measured = len(target.results().get("matrix", []))
    if measured and measured >= len(snapshot.results.get("matrix", [])):
        return
    for position, answers in snapshot.answers.items():
        target.write_answers(position, answers)
    if snapshot.results:
        target.write_results(snapshot.results)


def _require_same_history(
    target_name: str,
    base: dict[str, Any],
    entries: Sequence[ManifestEntry],
    snapshot: _StoreSnapshot,
) -> None:
    """Raise unless one of two histories continues the other."""
    for key in ("fingerprint", "digest"):
        there, here = base.get(key), snapshot.base.get(key)
        if there and here and there != here:
            detail = f"{key} {there[:12]}… there, {here[:12]}… in {snapshot.name}"
            raise StoreError(f"{target_name}: is a store of another base: {detail}")
    for old, new in zip(entries, snapshot.entries, strict=False):
        if old.sha256 != new.sha256:
            detail = f"SHA-256 {old.sha256[:12]}… there, {new.sha256[:12]}… in {snapshot.name}"
            raise StoreError(f"{target_name}: has diverged at position {old.position}: {detail}")


def _push_to_hub(
    snapshot: _StoreSnapshot, repository: str, private: bool, revision: str | None
) -> str:
    snapshot = replace(snapshot, base=_drop_folder(snapshot.base))
    hub.create_repository(repository, private, revision)
    commit, remote_names = hub.inspect_revision(repository, revision)
    with tempfile.TemporaryDirectory() as scratch:
        hub.download_files(repository, commit, remote_names & {MANIFEST, _CARD_NAME}, Path(scratch))
        remote_entries = _read_remote_entries(snapshot, repository, remote_names, Path(scratch))
        card = Path(scratch, _CARD_NAME)
        is_handwritten = card.is_file() and GENERATED_MARK not in card.read_text("utf-8", "replace")
    last = len(snapshot.entries)
    if len(remote_entries) > last:
        return (
            f"{repository}: has positions 0…{len(remote_entries)}, this store 0…{last}; "
            "nothing to push"
        )
    files = _collect_files(snapshot, repository)
    for name in [entry.file for entry in remote_entries if entry.file in remote_names] + [
        _CARD_NAME
    ] * is_handwritten:
        del files[name]
    new_commit = hub.commit_files(
        repository, files, f"Positions 0…{last}", revision=revision, parent=commit
    )
    state = "nothing had changed" if new_commit == commit else f"commit {new_commit[:12]}"
    note = f"; its {_CARD_NAME} was written by hand and stays" if is_handwritten else ""
    return f"{repository} on the Hub: a store with positions 0…{last}, {state}{note}"


def _read_remote_entries(
    snapshot: _StoreSnapshot, repository: str, remote_names: set[str], scratch: Path
) -> list[ManifestEntry]:
    """What a repository has of the same history; StoreError if it has another, or other files."""
    if MANIFEST in remote_names:
        with _naming_repository(repository, scratch):
            base, entries = manifest.read_manifest(scratch)
        _require_same_history(repository, base, entries, snapshot)
        return entries
    if other := sorted(remote_names & _list_file_names(snapshot.entries)):
        raise StoreError(f"{repository}: is no store but has a {other[0]}; push to a new one")
    return []


def _collect_files(snapshot: _StoreSnapshot, repository: str) -> dict[str, str | bytes]:
    """All files of a store in a repository: small ones as content, deltas as paths."""
    texts = {
        MANIFEST: manifest.serialize_manifest(snapshot.base, snapshot.entries),
        "recipe.yaml": snapshot.recipe,
        _CARD_NAME: format_model_card(
            snapshot.base, snapshot.entries, snapshot.results, repository
        ),
    }
    if snapshot.results:
        texts["results.json"] = manifest.serialize_json(snapshot.results, "results.json")
    for position, rows in snapshot.answers.items():
        texts[_answers_file(position)] = manifest.serialize_json(rows, "answers")
    deltas = {entry.file: str(snapshot.store.path / entry.file) for entry in snapshot.entries}
    return {**deltas, **{name: text.encode() for name, text in texts.items()}}


def _pull_from_hub(repository: str, to: Path, revision: str | None) -> DeltaStore:
    commit, remote_names = hub.inspect_revision(repository, revision)
    if MANIFEST not in remote_names:
        raise StoreError(f"{repository}: is no delta store (it has no {MANIFEST})")
    nearest_folder = next(
        parent for parent in Path(os.path.realpath(to)).parents if parent.is_dir()
    )
    prefix = f".{to.name}-"
    with (
        reporting_os_errors(to),
        tempfile.TemporaryDirectory(prefix=prefix, suffix=".tmp", dir=nearest_folder) as scratch,
    ):
        hub.download_files(repository, commit, {MANIFEST}, Path(scratch))
        with _naming_repository(repository, Path(scratch)):
            _, entries = manifest.read_manifest(Path(scratch))
        hub.download_files(
            repository, commit, remote_names & _list_file_names(entries), Path(scratch)
        )
        with _naming_repository(repository, Path(scratch)):
            snapshot = _read_snapshot(DeltaStore.open(scratch), None)
        snapshot = replace(snapshot, name=repository, base=_drop_folder(snapshot.base))
        return _copy_snapshot(snapshot, to)


def _list_file_names(entries: Sequence[ManifestEntry]) -> set[str]:
    """The files of a store beside its manifest, whether or not it has them all."""
    answers = (_answers_file(position) for position in range(len(entries) + 1))
    return {"recipe.yaml", "results.json", *(entry.file for entry in entries), *answers}


def _answers_file(position: int) -> str:
    return f"answers/{position:04d}.json"


def _drop_folder(base: dict[str, Any]) -> dict[str, Any]:
    """A base as the Hub may tell of it: no folder of one computer means anything on another."""
    return {key: value for key, value in base.items() if key != "folder"}


@contextmanager
def _naming_repository(repository: str, scratch: Path) -> Iterator[None]:
    """Let errors about a downloaded file name the repository, not where it lies for the moment."""
    try:
        yield
    except PieceError as error:
        raise type(error)(f"{repository}: {str(error).replace(f'{scratch}/', '')}") from error
