"""Which store a live model belongs to and where it stands: attach it, move it, ask it.

Nothing is hung on the model itself: it stays the plain transformers model that others know. Inside
a wrapper (`names.inner_model`) it is the same model; a copy of it is another one, to be attached.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mm_piece.deltas.delta import Delta, digest, fingerprint, put
from mm_piece.deltas.merging import replay, union
from mm_piece.distributed import put_all, shape_of, take
from mm_piece.errors import BaseError, MismatchError, StoreError, as_path
from mm_piece.families import inner_model, why_fixed
from mm_piece.models.base import tensors
from mm_piece.models.checkpoint import Checkpoint, fetch
from mm_piece.modules import is_intercepted
from mm_piece.store.base_record import reading_of, trained_dtype, where
from mm_piece.store.delta_store import DeltaStore


@dataclass(frozen=True)
class Undo:
    """What a delta replaced in a live model: putting it back undoes the delta."""

    sha256: str
    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    after: dict[str, str]  # SHA-256 of the values that the delta wrote


@dataclass
class Attachment:
    """The store a live model belongs to, and how to undo each delta it stands on, the last last."""

    store: DeltaStore
    undo: list[Undo] = field(default_factory=list)

    def apply(self, delta: Delta, live: Mapping[str, Tensor]) -> None:
        """Go one position on."""
        self.note(delta, delta.apply(live))

    def note(self, delta: Delta, replaced: dict[str, Tensor]) -> None:
        """Take down that a model has gone one position on, and what that replaced."""
        sha256 = self.store.entries[len(self.undo)].sha256
        after = {name: digest(values) for name, values in delta.values.items()}
        self.undo.append(Undo(sha256, delta.indices, replaced, after))

    def back(self, live: Mapping[str, Tensor]) -> None:
        """Go one position back; MismatchError if the model is not what the last delta left."""
        undo = self.undo[-1]
        for name, index in undo.indices.items():
            if digest(take(live[name], index).cpu()) != undo.after[name]:
                raise MismatchError(f"{name} was changed since the model was loaded: load it again")
        self.undo.pop()
        put_all((live[name], index, undo.values[name]) for name, index in undo.indices.items())


_attachments: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_registries = Lock()  # of both


def lock_of(model: nn.Module) -> RLock:
    """The lock of a model: whoever holds it is the only one to move it."""
    with _registries:
        return _locks.setdefault(inner_model(model), RLock())


def attached(model: nn.Module) -> Attachment:
    """The attachment of a model, wrapped or not; StoreError if it has none."""
    inner = inner_model(model)
    with _registries:
        if inner in _attachments:
            return _attachments[inner]
    raise StoreError(
        "the model belongs to no store: load takes one from a store, attach ties a copy to one"
    )


def position(model: nn.Module) -> int:
    """The position at which a model stands; StoreError if it belongs to no store."""
    with lock_of(model):
        return len(attached(model).undo)


def as_store(store: str | Path | DeltaStore) -> DeltaStore:
    """A store from its path, or itself."""
    return store if isinstance(store, DeltaStore) else DeltaStore.open(as_path(store, "store"))


def attach_base(model: nn.Module, store: DeltaStore) -> Attachment:
    """Tie a model that was just loaded, and stands at the base; BaseError if it is another base."""
    _require_base(store, tensors(model))
    return _tie(model, Attachment(store))


def attach(
    model: nn.Module, store: str | Path | DeltaStore, at: int, base: str | Path | None = None
) -> None:
    """Tie a model that stands at position `at` to a store, so that `checkout` moves it from there.

    For what `load` has not returned: a copy, or what transformers loaded from an export. Entries
    that any delta touches are compared bit by bit with what they are at `at`, the rest as `load`
    compares a base. What the deltas replaced is read from the files of the base: the store's own,
    or `base`. Raises PositionError, BaseError for another base, MismatchError for another position.
    """
    opened = as_store(store)
    last = opened.position(at)
    with lock_of(model):
        _require_untuned(model)
        live, deltas = tensors(model), opened.deltas()
        _require_dtype(live, opened)
        _require_weights(live, deltas)
        index = union(deltas)
        before = _base_values(opened, base, index)
        _require_base(opened, live, index, before)
        attachment, stands, differing = _replay(opened, deltas, last, before, live)
        if last not in stands:
            there = f"its values are those of position {stands[0]}" if stands else "of no position"
            raise MismatchError(
                f"the model does not stand at position {last} of store {opened.path}: "
                f"{differing}: {there}"
            )
        _tie(model, attachment)


def checkout(model: nn.Module, at: int) -> None:
    """Move a loaded model to position `at` in place; only entries that deltas touched are written.

    Every delta on the way is verified, down to the values it expects to find, before the first
    write. The way back needs no file: what the deltas replaced was kept, as much again as their
    values. One thread at a time moves a model. Raises PositionError outside 0…T, MismatchError if
    the weights are not what the last delta left, StoreError for a model that belongs to no store,
    or whose store has changed its history.
    """
    with lock_of(model):
        _require_untuned(model)
        attachment, live = attached(model), tensors(model)
        store = DeltaStore.open(attachment.store.path)
        last, here = store.position(at), len(attachment.undo)
        _same_history(attachment, store)
        _require_dtype(live, store)
        deltas = [store.delta(position) for position in range(here + 1, last + 1)]
        _require_weights(live, [*attachment.undo[last:], *deltas])
        _rehearse(deltas, live)
        attachment.store = store
        for _ in range(last, here):
            attachment.back(live)
        for delta in deltas:
            attachment.apply(delta, live)


def _tie(model: nn.Module, attachment: Attachment) -> Attachment:
    with _registries:
        _attachments[inner_model(model)] = attachment
    return attachment


def _base_values(
    store: DeltaStore, base: str | Path | None, index: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the files of a store's base hold at some entries."""
    if not index:
        return {}
    source, revision = (base, None) if base else where(store.base, store.path)
    dtype, files = trained_dtype(store.base, store.path), reading_of(store.base, store.path)
    named = Checkpoint(fetch(source, revision, **files), dtype, **files).parameters
    return {name: named[name].take(places) for name, places in index.items()}


def _replay(
    store: DeltaStore,
    deltas: Sequence[Delta],
    last: int,
    before: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
) -> tuple[Attachment, list[int], str]:
    """How to undo the deltas up to `last`, and all positions that a model may stand at.

    Beside them the name of a weight that is not what it is at `last`, "" if there is none.
    """
    index, state = union(deltas), {name: values.clone() for name, values in before.items()}
    marks = {name: digest(take(live[name], places)) for name, places in index.items()}
    attachment, stands, differing = Attachment(store), [], ""
    for number in range(len(deltas) + 1):
        if number:
            replaced = _step(deltas[number - 1], index, state)
            if number <= last:
                attachment.note(deltas[number - 1], replaced)
        name = next((n for n, row in state.items() if digest(row) != marks[n]), "")
        if not name:
            stands.append(number)
        if number == last:
            differing = name
    return attachment, stands, differing


def _step(
    delta: Delta, index: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Apply a delta to the values of the entries `index`; what it replaced."""
    replaced = {}
    for name, touched in delta.indices.items():
        places = torch.searchsorted(index[name], touched)
        replaced[name] = take(state[name], places)
        delta.check_before(name, digest(replaced[name]))
        put(state[name], places, delta.values[name])
    return replaced


def _require_base(
    store: DeltaStore,
    live: Mapping[str, Tensor],
    *instead: Mapping[str, Tensor],
) -> None:
    """Raise BaseError unless a model is a store's base; `instead`: those of `fingerprint`."""
    found, expected = fingerprint(live, *instead), store.base["fingerprint"]
    if found != expected:
        raise BaseError(
            f"store {store.path} was made on another base: "
            f"expected fingerprint {expected[:12]}…, found {found[:12]}…"
        )


def _require_weights(live: Mapping[str, Tensor], touching: Sequence[Delta | Undo]) -> None:
    """Raise unless a model has the weights that deltas touch, as tensors that can be written."""
    for name in dict.fromkeys(name for one in touching for name in one.indices):
        if name in live and (reason := why_fixed(live[name])):
            raise MismatchError(f"{name} {reason}")
        if name not in live:
            raise MismatchError(
                f"the model has no {name}: were its layers replaced since it was loaded, as by "
                "PEFT or by quantisation in place?"
            )
    for one in touching:
        for name, values in one.values.items():
            if live[name].dtype != values.dtype:
                raise MismatchError(
                    f"{name} is {live[name].dtype}, the store's deltas are {values.dtype}"
                )


def _rehearse(deltas: Sequence[Delta], live: Mapping[str, Tensor]) -> None:
    """Raise unless deltas can be applied one after the other; write nothing to the model.

    What later ones are to find is worked out on the entries that all of them touch.
    """
    if deltas:
        deltas[0].check(live)
    if len(deltas) < 2:
        return
    index = union(deltas)
    for delta in deltas:
        for name in delta.shapes:
            delta.check_kind(name, shape_of(live[name]), live[name].dtype)
    replay(deltas, index, {name: take(live[name], places).cpu() for name, places in index.items()})


def _same_history(attachment: Attachment, store: DeltaStore) -> None:
    shared = zip(attachment.undo, store.entries, strict=False)
    same = all(undo.sha256 == entry.sha256 for undo, entry in shared)
    if not same or len(store) < len(attachment.undo):
        raise StoreError(f"{store.path}: has another history than when the model was loaded")


def _require_untuned(model: nn.Module) -> None:
    if is_intercepted(model):
        raise MismatchError(
            "the model is being tuned: leave `sparse_tuning` first, which writes its values"
        )


def _require_dtype(live: Mapping[str, Tensor], store: DeltaStore) -> None:
    found, expected = next(iter(live.values())).dtype, trained_dtype(store.base, store.path)
    if found != expected:
        raise MismatchError(
            f"the model is {found}, the store's deltas are {expected}: load it in that dtype"
        )
