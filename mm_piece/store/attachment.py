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

from mm_piece.deltas.delta import Delta, compute_digest, compute_fingerprint, set_entries
from mm_piece.deltas.merging import collect_indices, replay_deltas
from mm_piece.distributed import gather_entries, scatter_entries, shape_of
from mm_piece.errors import BaseError, MismatchError, StoreError, as_path
from mm_piece.families import inner_model, why_fixed
from mm_piece.models.base import tensors
from mm_piece.models.checkpoint import Checkpoint, fetch_checkpoint
from mm_piece.modules import is_intercepted
from mm_piece.store.base_record import base_source, reading_of, trained_dtype
from mm_piece.store.delta_store import DeltaStore


@dataclass(frozen=True)
class UndoRecord:
    """What a delta replaced in a live model: putting it back undoes the delta."""

    sha256: str
    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    after: dict[str, str]  # SHA-256 of the values that the delta wrote


@dataclass
class Attachment:
    """The store a live model belongs to, and how to undo each delta it stands on, the last last."""

    store: DeltaStore
    undo_stack: list[UndoRecord] = field(default_factory=list)

    def apply_delta(self, delta: Delta, live: Mapping[str, Tensor]) -> None:
        """Go one position on."""
        self.record_delta(delta, delta.apply(live))

    def record_delta(self, delta: Delta, replaced: dict[str, Tensor]) -> None:
        """Take down that a model has gone one position on, and what that replaced."""
        sha256 = self.store.entries[len(self.undo_stack)].sha256
        after = {name: compute_digest(values) for name, values in delta.values.items()}
        self.undo_stack.append(UndoRecord(sha256, delta.indices, replaced, after))

    def undo_last(self, live: Mapping[str, Tensor]) -> None:
        """Go one position back; MismatchError if the model is not what the last delta left."""
        record = self.undo_stack[-1]
        for name, index in record.indices.items():
            if compute_digest(gather_entries(live[name], index).cpu()) != record.after[name]:
                raise MismatchError(f"{name} was changed since the model was loaded: load it again")
        self.undo_stack.pop()
        scatter_entries(
            (live[name], index, record.values[name]) for name, index in record.indices.items()
        )


_attachments: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_registries = Lock()  # of both


def lock_of(model: nn.Module) -> RLock:
    """The lock of a model: whoever holds it is the only one to move it."""
    with _registries:
        return _locks.setdefault(inner_model(model), RLock())


def attachment_of(model: nn.Module) -> Attachment:
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
        return len(attachment_of(model).undo_stack)


def as_store(store: str | Path | DeltaStore) -> DeltaStore:
    """A store from its path, or itself."""
    return store if isinstance(store, DeltaStore) else DeltaStore.open(as_path(store, "store"))


def attach_base(model: nn.Module, store: DeltaStore) -> Attachment:
    """Tie a model that was just loaded, and stands at the base; BaseError if it is another base."""
    _require_same_base(store, tensors(model))
    return _register_attachment(model, Attachment(store))


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
        _require_live_weights(live, deltas)
        index = collect_indices(deltas)
        before = _read_base_values(opened, base, index)
        _require_same_base(opened, live, index, before)
        attachment, matching, differing = _rebuild_attachment(opened, deltas, last, before, live)
        if last not in matching:
            found = (
                f"its values are those of position {matching[0]}" if matching else "of no position"
            )
            raise MismatchError(
                f"the model does not stand at position {last} of store {opened.path}: "
                f"{differing}: {found}"
            )
        _register_attachment(model, attachment)


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
        attachment, live = attachment_of(model), tensors(model)
        store = DeltaStore.open(attachment.store.path)
        last, here = store.position(at), len(attachment.undo_stack)
        _require_known_history(attachment, store)
        _require_dtype(live, store)
        deltas = [store.delta(position) for position in range(here + 1, last + 1)]
        _require_live_weights(live, [*attachment.undo_stack[last:], *deltas])
        _require_applicable(deltas, live)
        attachment.store = store
        for _ in range(last, here):
            attachment.undo_last(live)
        for delta in deltas:
            attachment.apply_delta(delta, live)


def _register_attachment(model: nn.Module, attachment: Attachment) -> Attachment:
    with _registries:
        _attachments[inner_model(model)] = attachment
    return attachment


def _read_base_values(
    store: DeltaStore, base: str | Path | None, index: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the files of a store's base hold at some entries."""
    if not index:
        return {}
    source, revision = (base, None) if base else base_source(store.base, store.path)
    dtype, files = trained_dtype(store.base, store.path), reading_of(store.base, store.path)
    parameters = Checkpoint(fetch_checkpoint(source, revision, **files), dtype, **files).parameters
    return {name: parameters[name].read_entries(indices) for name, indices in index.items()}


def _rebuild_attachment(
    store: DeltaStore,
    deltas: Sequence[Delta],
    last: int,
    before: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
) -> tuple[Attachment, list[int], str]:
    """How to undo the deltas up to `last`, and all positions that a model may stand at.

    Beside them the name of a weight that is not what it is at `last`, "" if there is none.
    """
    index, state = (
        collect_indices(deltas),
        {name: values.clone() for name, values in before.items()},
    )
    digests = {
        name: compute_digest(gather_entries(live[name], indices)) for name, indices in index.items()
    }
    attachment, matching, differing = Attachment(store), [], ""
    for number in range(len(deltas) + 1):
        if number:
            replaced = _apply_to_values(deltas[number - 1], index, state)
            if number <= last:
                attachment.record_delta(deltas[number - 1], replaced)
        name = next(
            (n for n, entry_values in state.items() if compute_digest(entry_values) != digests[n]),
            "",
        )
        if not name:
            matching.append(number)
        if number == last:
            differing = name
    return attachment, matching, differing


def _apply_to_values(
    delta: Delta, index: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Apply a delta to the values of the entries `index`; what it replaced."""
    replaced = {}
    for name, touched in delta.indices.items():
        offsets = torch.searchsorted(index[name], touched)
        replaced[name] = gather_entries(state[name], offsets)
        delta.require_before_digest(name, compute_digest(replaced[name]))
        set_entries(state[name], offsets, delta.values[name])
    return replaced


def _require_same_base(
    store: DeltaStore,
    live: Mapping[str, Tensor],
    *instead: Mapping[str, Tensor],
) -> None:
    """Raise BaseError unless a model is a store's base; `instead`: those of `fingerprint`."""
    found, expected = compute_fingerprint(live, *instead), store.base["fingerprint"]
    if found != expected:
        raise BaseError(
            f"store {store.path} was made on another base: "
            f"expected fingerprint {expected[:12]}…, found {found[:12]}…"
        )


def _require_live_weights(
    live: Mapping[str, Tensor], changes: Sequence[Delta | UndoRecord]
) -> None:
    """Raise unless a model has the weights that deltas touch, as tensors that can be written."""
    for name in dict.fromkeys(name for change in changes for name in change.indices):
        if name in live and (reason := why_fixed(live[name])):
            raise MismatchError(f"{name} {reason}")
        if name not in live:
            raise MismatchError(
                f"the model has no {name}: were its layers replaced since it was loaded, as by "
                "PEFT or by quantisation in place?"
            )
    for change in changes:
        for name, values in change.values.items():
            if live[name].dtype != values.dtype:
                raise MismatchError(
                    f"{name} is {live[name].dtype}, the store's deltas are {values.dtype}"
                )


def _require_applicable(deltas: Sequence[Delta], live: Mapping[str, Tensor]) -> None:
    """Raise unless deltas can be applied one after the other; write nothing to the model.

    What later ones are to find is worked out on the entries that all of them touch.
    """
    if deltas:
        deltas[0].require_applicable(live)
    if len(deltas) < 2:
        return
    index = collect_indices(deltas)
    for delta in deltas:
        for name in delta.shapes:
            delta.require_tensor_kind(name, shape_of(live[name]), live[name].dtype)
    replay_deltas(
        deltas,
        index,
        {name: gather_entries(live[name], indices).cpu() for name, indices in index.items()},
    )


def _require_known_history(attachment: Attachment, store: DeltaStore) -> None:
    shared = zip(attachment.undo_stack, store.entries, strict=False)
    is_same = all(undo.sha256 == entry.sha256 for undo, entry in shared)
    if not is_same or len(store) < len(attachment.undo_stack):
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
