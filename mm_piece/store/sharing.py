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
from mm_piece.files.atomic import new_folder, reported
from mm_piece.recipe import parse_recipe
from mm_piece.store import hub, manifest
from mm_piece.store.base_record import relocated
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import as_store
from mm_piece.store.manifest import MANIFEST, Entry
from mm_piece.store.model_card import MARK, model_card

_CARD = "README.md"


def transfer(source: str | Path | DeltaStore, to: str | Path, at: int | None = None) -> DeltaStore:
    """Copy positions 1…`at` (default: all) to a new store, or add what an existing one lacks.

    Recipe, results and answers come along, logs and scratch do not; a store that has `at` already
    gets no more than results that it lacks. Raises StoreError if `to` is of another base or has
    diverged, PositionError, and what `verify` finds.
    """
    return _copy(_part(as_store(source), at), as_path(to, "the new store"))


def fork(store: str | Path | DeltaStore, at: int, to: str | Path) -> DeltaStore:
    """Make a new store that shares deltas 1…`at` and goes its own way from there.

    Its recipe and results speak of these tasks only, so that others may follow. Raises StoreError
    if `to` is a store already, PositionError outside 1…T.
    """
    opened, to = as_store(store), as_path(to, "the new store")
    if (to / MANIFEST).exists() and _is_whole(DeltaStore.open(to), opened, at):
        raise StoreError(f"{to}: is a store already; a fork makes a new one")
    opened.data(at)  # a PositionError for 0 too, where nothing would be shared
    return _copy(_only_learned(_part(opened, at), to), to)


def _is_whole(target: DeltaStore, source: DeltaStore, at: int) -> bool:
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
        return _push_to_hub(_part(as_store(store), None), str(to), private, revision)
    if private or revision:
        raise StoreError(f"{to}: private and revision are for the Hub, and this is a folder")
    return f"{folder}: a store with positions 0…{len(transfer(store, folder))}"


def pull(source: str | Path, to: str | Path, *, revision: str | None = None) -> DeltaStore:
    """Copy a store from `user/name` on the Hub or from a folder, or add what `to` lacks of it.

    Nothing is written to `to` before all was verified. Raises StoreError and what `verify` finds.
    """
    if (folder := hub.folder_of(source)) is None:
        return _pull_from_hub(str(source), as_path(to, "the new store"), revision)
    if revision:
        raise StoreError(f"{source}: a revision is for the Hub, and this is a folder")
    return transfer(DeltaStore.open(folder), to)


@dataclass(frozen=True)
class _Part:
    """Positions 0…at of a store, verified; `name` is what messages call it."""

    store: DeltaStore
    name: str
    base: dict[str, Any]
    entries: list[Entry]
    recipe: str
    results: dict[str, Any]
    answers: dict[int, dict[str, Any]]


def _part(store: DeltaStore, at: int | None) -> _Part:
    entries = store.verify(at)
    given = {position: store.answers(position) for position in range(len(entries) + 1)}
    answers = {position: rows for position, rows in given.items() if rows}
    results = _first_rows(store.results(), entries)
    return _Part(store, str(store.path), store.base, entries, store.recipe, results, answers)


def _first_rows(results: dict[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """What was measured at the base and at these positions."""
    rows, tasks = len(entries) + 1, {entry.task for entry in entries}
    cut = {key: results[key][:rows] for key in ("matrix", "base_ability") if key in results}
    if kinds := results.get("base_kinds"):
        cut["base_kinds"] = {kind: values[:rows] for kind, values in kinds.items()}
    for key in ("seconds", "stability"):
        if told := results.get(key):
            cut[key] = {task: facts for task, facts in told.items() if task in tasks}
    return {**results, **cut}


def _only_learned(part: _Part, to: Path) -> _Part:
    """Leave the tasks that were not learned out of recipe and results; the recipe names `to`.

    A store that `train` did not make may have any text as its recipe, or one of other tasks: it
    stays as it is.
    """
    learned, results = [entry.task for entry in part.entries], part.results
    if results.get("tasks", [])[: len(learned)] == learned:
        matrix = [row[: len(learned)] for row in results["matrix"]]
        part = replace(part, results={**results, "tasks": learned, "matrix": matrix})
    try:
        recipe = parse_recipe(part.recipe)
    except RecipeError:
        return part
    tasks = tuple(task for task in recipe.tasks if task.name in learned)
    recipe = recipe.model_copy(update={"tasks": tasks, "store": str(to)})
    return replace(part, recipe=recipe.text()) if tasks else part


def _copy(part: _Part, to: Path) -> DeltaStore:
    if to.exists():
        target = _opened(part, to)
        with target.writing():
            _require_same_history(str(to), target.base, target.entries, part)
            _continue(target, part)
        return target

    base = relocated(part.base, part.store.path, to)
    with _made(to) as folder:
        _continue(DeltaStore.create(folder, base, part.recipe), part)
    return DeltaStore.open(to)


def _opened(part: _Part, to: Path) -> DeltaStore:
    """The store in a folder that is there, verified, or a new one beside what that holds."""
    if not (to / MANIFEST).exists():
        return DeltaStore.create(to, relocated(part.base, part.store.path, to), part.recipe)
    target = DeltaStore.open(to)
    target.verify()
    return target


@contextmanager
def _made(to: Path) -> Iterator[Path]:
    """A new folder that is there whole once the block ends, or not at all; errors name `to`."""
    with reported(to), new_folder(Path(os.path.realpath(to))) as folder:
        try:
            yield folder
        except PieceError as error:
            raise type(error)(str(error).replace(str(folder), str(to))) from error


def _continue(target: DeltaStore, part: _Part) -> None:
    """Add what the target lacks; deltas come first, as no row may stand without its position."""
    if new := part.entries[len(target) :]:
        target.extend(new, (part.store.data(entry.position) for entry in new))
        target.write_recipe(part.recipe)
    measured = len(target.results().get("matrix", []))
    if measured and measured >= len(part.results.get("matrix", [])):
        return
    for position, answers in part.answers.items():
        target.write_answers(position, answers)
    if part.results:
        target.write_results(part.results)


def _require_same_history(
    place: str, base: dict[str, Any], entries: Sequence[Entry], part: _Part
) -> None:
    """Raise unless one of two histories continues the other."""
    for key in ("fingerprint", "digest"):
        there, here = base.get(key), part.base.get(key)
        if there and here and there != here:
            also = f"{key} {there[:12]}… there, {here[:12]}… in {part.name}"
            raise StoreError(f"{place}: is a store of another base: {also}")
    for old, new in zip(entries, part.entries, strict=False):
        if old.sha256 != new.sha256:
            also = f"SHA-256 {old.sha256[:12]}… there, {new.sha256[:12]}… in {part.name}"
            raise StoreError(f"{place}: has diverged at position {old.position}: {also}")


def _push_to_hub(part: _Part, repository: str, private: bool, revision: str | None) -> str:
    part = replace(part, base=_without_folder(part.base))
    hub.prepare(repository, private, revision)
    commit, there = hub.look(repository, revision)
    with tempfile.TemporaryDirectory() as scratch:
        hub.fetch(repository, commit, there & {MANIFEST, _CARD}, Path(scratch))
        known = _known(part, repository, there, Path(scratch))
        card = Path(scratch, _CARD)
        foreign = card.is_file() and MARK not in card.read_text("utf-8", "replace")
    last = len(part.entries)
    if len(known) > last:
        return f"{repository}: has positions 0…{len(known)}, this store 0…{last}; nothing to push"
    files = _files(part, repository)
    for name in [entry.file for entry in known if entry.file in there] + [_CARD] * foreign:
        del files[name]
    done = hub.commit(repository, files, f"Positions 0…{last}", revision=revision, parent=commit)
    state = "nothing had changed" if done == commit else f"commit {done[:12]}"
    note = f"; its {_CARD} was written by hand and stays" if foreign else ""
    return f"{repository} on the Hub: a store with positions 0…{last}, {state}{note}"


def _known(part: _Part, repository: str, there: set[str], scratch: Path) -> list[Entry]:
    """What a repository has of the same history; StoreError if it has another, or other files."""
    if MANIFEST in there:
        with _named(repository, scratch):
            base, entries = manifest.read(scratch)
        _require_same_history(repository, base, entries, part)
        return entries
    if other := sorted(there & _names(part.entries)):
        raise StoreError(f"{repository}: is no store but has a {other[0]}; push to a new one")
    return []


def _files(part: _Part, repository: str) -> dict[str, str | bytes]:
    """All files of a store in a repository: small ones as content, deltas as paths."""
    texts = {
        MANIFEST: manifest.text(part.base, part.entries),
        "recipe.yaml": part.recipe,
        _CARD: model_card(part.base, part.entries, part.results, repository),
    }
    if part.results:
        texts["results.json"] = manifest.dump(part.results, "results.json")
    for position, rows in part.answers.items():
        texts[_answers(position)] = manifest.dump(rows, "answers")
    deltas = {entry.file: str(part.store.path / entry.file) for entry in part.entries}
    return {**deltas, **{name: text.encode() for name, text in texts.items()}}


def _pull_from_hub(repository: str, to: Path, revision: str | None) -> DeltaStore:
    commit, there = hub.look(repository, revision)
    if MANIFEST not in there:
        raise StoreError(f"{repository}: is no delta store (it has no {MANIFEST})")
    beside = next(parent for parent in Path(os.path.realpath(to)).parents if parent.is_dir())
    prefix = f".{to.name}-"
    with (
        reported(to),
        tempfile.TemporaryDirectory(prefix=prefix, suffix=".tmp", dir=beside) as scratch,
    ):
        hub.fetch(repository, commit, {MANIFEST}, Path(scratch))
        with _named(repository, Path(scratch)):
            _, entries = manifest.read(Path(scratch))
        hub.fetch(repository, commit, there & _names(entries), Path(scratch))
        with _named(repository, Path(scratch)):
            part = _part(DeltaStore.open(scratch), None)
        part = replace(part, name=repository, base=_without_folder(part.base))
        return _copy(part, to)


def _names(entries: Sequence[Entry]) -> set[str]:
    """The files of a store beside its manifest, whether or not it has them all."""
    answers = (_answers(position) for position in range(len(entries) + 1))
    return {"recipe.yaml", "results.json", *(entry.file for entry in entries), *answers}


def _answers(position: int) -> str:
    return f"answers/{position:04d}.json"


def _without_folder(base: dict[str, Any]) -> dict[str, Any]:
    """A base as the Hub may tell of it: no folder of one computer means anything on another."""
    return {key: value for key, value in base.items() if key != "folder"}


@contextmanager
def _named(repository: str, scratch: Path) -> Iterator[None]:
    """Let errors about a downloaded file name the repository, not where it lies for the moment."""
    try:
        yield
    except PieceError as error:
        raise type(error)(f"{repository}: {str(error).replace(f'{scratch}/', '')}") from error
