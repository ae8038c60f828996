"""Live models of a store: attach one, move it to a position, read its position.

The record is kept here, not on the model, which stays a plain transformers model. A wrapper around
a model (`families.inner_model`) shares its record. A copy of a model has none until it is attached.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mm_piece.deltas.delta import Delta, compute_digest, compute_fingerprint
from mm_piece.deltas.merging import collect_indices, replay_deltas
from mm_piece.distributed import gather_entries, scatter_entries, shape_of
from mm_piece.entries import read_entries, write_entries
from mm_piece.errors import BaseError, MismatchError, StoreError
from mm_piece.families import inner_model, why_fixed
from mm_piece.models.base import tensors
from mm_piece.models.checkpoint import Checkpoint, fetch_checkpoint
from mm_piece.modules import is_intercepted
from mm_piece.store.base_location import base_source
from mm_piece.store.base_reading import reading_of, trained_dtype
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.inspection import as_store


@dataclass(frozen=True)
class UndoRecord:
    """The values that a delta replaced in a live model; writing them back undoes the delta."""

    sha256: str
    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    after: dict[str, str]  # SHA-256 of the values that the delta wrote


@dataclass
class Attachment:
    """A live model's store, and how to undo each of its deltas, in the order of application."""

    store: DeltaStore
    undo_stack: list[UndoRecord] = field(default_factory=list)

    def apply_delta(self, delta: Delta, live: Mapping[str, Tensor]) -> None:
        """Move a model one position on."""
        replaced = delta.apply(live)
        self.record_delta(delta, replaced)

    def record_delta(
        self,
        delta: Delta,
        replaced: dict[str, Tensor],
    ) -> None:
        """Record that a model has moved one position on, and the values replaced there."""
        position = len(self.undo_stack)
        sha256 = self.store.entries[position].sha256
        after = {}
        for name, values in delta.values.items():
            after[name] = compute_digest(values)

        record = UndoRecord(
            sha256=sha256,
            indices=delta.indices,
            values=replaced,
            after=after,
        )
        self.undo_stack.append(record)

    def undo_last(self, live: Mapping[str, Tensor]) -> None:
        """Move a model one position back.

        Raises MismatchError if its values are not those that the last delta left.
        """
        record = self.undo_stack[-1]
        for name, index in record.indices.items():
            found = gather_entries(live[name], index).cpu()  # (entries of the delta,)
            if compute_digest(found) != record.after[name]:
                raise MismatchError(f"{name} was changed since the model was loaded: load it again")

        self.undo_stack.pop()
        scatter_entries(
            (live[name], index, record.values[name]) for name, index in record.indices.items()
        )


# weak keys: a model that is no longer in use takes its record along
_attachments: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_registries = Lock()  # of both


def lock_of(model: nn.Module) -> RLock:
    """Return the lock of a model; only its owner may move the model."""
    inner = inner_model(model)
    with _registries:
        return _locks.setdefault(inner, RLock())  # reentrant: a caller may have it already


def attachment_of(model: nn.Module) -> Attachment:
    """Return the attachment of a model, wrapped or not; StoreError if it has none."""
    inner = inner_model(model)
    with _registries:
        if inner in _attachments:
            return _attachments[inner]

    raise StoreError(
        "the model belongs to no store: load takes one from a store, attach ties a copy to one"
    )


def position(model: nn.Module) -> int:
    """Return the position of a model; StoreError if it belongs to no store."""
    with lock_of(model):
        attachment = attachment_of(model)
        return len(attachment.undo_stack)


def attach_base(model: nn.Module, store: DeltaStore) -> Attachment:
    """Tie a model that was just loaded from its base to a store; BaseError for another base."""
    _require_same_base(store, tensors(model))
    return _register_attachment(model, Attachment(store))


def attach(
    model: nn.Module,
    store: str | Path | DeltaStore,
    at: int,
    base: str | Path | None = None,
) -> None:
    """Tie a model that is at position `at` to a store, so that `checkout` moves it from there.

    This is for models that `load` has not returned: a copy, or an export that transformers loaded.
    Entries that any delta touches are compared bit by bit with their values at `at`, the rest as
    `load` compares a base. The values that the deltas replaced are read from the files of the base:
    the store's own, or `base`. Raises PositionError, BaseError for another base, MismatchError for
    another position.
    """
    opened = as_store(store)
    last = opened.position(at)
    with lock_of(model):
        _require_untuned(model)
        live = tensors(model)
        deltas = opened.deltas()
        _require_dtype(live, opened)
        _require_live_weights(live, deltas)

        # all deltas, also those after `at`: the touched entries are known from the base on
        index = collect_indices(deltas)
        before = _read_base_values(opened, base, index)
        _require_same_base(opened, live, index, before)

        attachment, matching, differing = _rebuild_attachment(opened, deltas, last, before, live)
        if last not in matching:
            found = "of no position"
            if matching:
                found = f"its values are those of position {matching[0]}"
            raise MismatchError(
                f"the model does not stand at position {last} of store {opened.path}: "
                f"{differing}: {found}"
            )
        _register_attachment(model, attachment)


def checkout(model: nn.Module, at: int) -> None:
    """Move a loaded model to position `at` in place; only entries that deltas touched are written.

    Every delta on the way is verified, down to the values it expects to find, before the first
    write. The way back needs no file: the replaced values stay in memory, as much again as the
    deltas' own. One thread at a time moves a model. Raises PositionError outside 0…T, MismatchError
    if the weights are not those that the last delta left, StoreError for a model that belongs to no
    store, or whose store has changed its history.
    """
    with lock_of(model):
        _require_untuned(model)
        attachment = attachment_of(model)
        live = tensors(model)
        # opened anew: another process may have appended deltas since
        store = DeltaStore.open(attachment.store.path)
        # `position` takes None for the last one: where to move has to be said
        last = store.require_position(at)
        here = len(attachment.undo_stack)
        _require_known_history(attachment, store)
        _require_dtype(live, store)

        # one of the two is empty: a move goes either back or on
        undone = attachment.undo_stack[last:]
        deltas = [store.delta(position) for position in range(here + 1, last + 1)]
        _require_live_weights(live, [*undone, *deltas])
        _require_applicable(deltas, live)

        # all checks are done: from here on the model changes
        attachment.store = store
        for _ in range(last, here):
            attachment.undo_last(live)
        for delta in deltas:
            attachment.apply_delta(delta, live)


def _register_attachment(model: nn.Module, attachment: Attachment) -> Attachment:
    """Record the attachment of a model; return it."""
    with _registries:
        _attachments[inner_model(model)] = attachment
    return attachment


def _read_base_values(
    store: DeltaStore,
    base: str | Path | None,
    index: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Read the values at the entries `index` from the files of a store's base."""
    # without deltas there is nothing to read: a store may work without its base's files
    if not index:
        return {}

    source, revision = (base, None) if base else base_source(store.base, store.path)
    dtype = trained_dtype(store.base, store.path)
    options = reading_of(store.base, store.path)
    folder = fetch_checkpoint(source, revision, **options)
    parameters = Checkpoint(folder, dtype, **options).parameters

    values = {}
    for name, indices in index.items():
        values[name] = parameters[name].read_entries(indices)
    return values


def _rebuild_attachment(
    store: DeltaStore,
    deltas: Sequence[Delta],
    last: int,
    before: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
) -> tuple[Attachment, list[int], str]:
    """Replay all deltas on the base's values and compare a model with every position.

    Returns the attachment of a model at position `last`, the positions whose values the model has,
    and the name of a weight that differs from position `last`, "" if there is none.
    """
    index = collect_indices(deltas)
    state = {name: values.clone() for name, values in before.items()}
    digests = {}
    for name, indices in index.items():
        found = gather_entries(live[name], indices)  # (touched entries,)
        digests[name] = compute_digest(found)

    attachment = Attachment(store)
    matching = []
    differing = ""
    for number in range(len(deltas) + 1):
        if number:
            delta = deltas[number - 1]  # it leads to position `number`
            replaced = _apply_to_values(delta, index, state)
            if number <= last:
                attachment.record_delta(delta, replaced)

        name = _find_differing(state, digests)
        if not name:
            matching.append(number)
        if number == last:
            differing = name
    return attachment, matching, differing


def _find_differing(state: Mapping[str, Tensor], digests: Mapping[str, str]) -> str:
    """Return the first name whose values have another digest, "" if there is none."""
    for name, values in state.items():
        if compute_digest(values) != digests[name]:
            return name
    return ""


def _apply_to_values(
    delta: Delta,
    index: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Apply a delta to the values of the entries `index`, in place; return the replaced values.

    Raises BaseError or OrderError if the delta expects other values.
    """
    replaced = {}
    for name, touched in delta.indices.items():
        # places of the delta's entries among all touched ones; both are sorted
        offsets = torch.searchsorted(index[name], touched)
        values = read_entries(state[name], offsets)
        delta.require_before_digest(name, compute_digest(values))

        replaced[name] = values
        write_entries([(state[name], offsets, delta.values[name])])
    return replaced


def _require_same_base(
    store: DeltaStore,
    live: Mapping[str, Tensor],
    *instead: Mapping[str, Tensor],
) -> None:
    """Raise BaseError unless a model is a store's base.

    `instead` are indices and values that `compute_fingerprint` takes in place of the model's own.
    """
    found = compute_fingerprint(live, *instead)
    expected = store.base.fingerprint
    if found != expected:
        raise BaseError(
            f"store {store.path} was made on another base: "
            f"expected fingerprint {expected[:12]}…, found {found[:12]}…"
        )


def _require_live_weights(
    live: Mapping[str, Tensor],
    changes: Sequence[Delta | UndoRecord],
) -> None:
    """Raise MismatchError unless a model has the weights that deltas touch.

    They must be tensors that can be written, and of the deltas' dtype.
    """
    names: dict[str, None] = {}  # a set in the order of the deltas
    for change in changes:
        names.update(dict.fromkeys(change.indices))

    for name in names:
        if name not in live:
            raise MismatchError(
                f"the model has no {name}: were its layers replaced since it was loaded, as by "
                "PEFT or by quantisation in place?"
            )
        reason = why_fixed(live[name])
        if reason:
            raise MismatchError(f"{name} {reason}")

    for change in changes:
        for name, values in change.values.items():
            if live[name].dtype != values.dtype:
                raise MismatchError(
                    f"{name} is {live[name].dtype}, the store's deltas are {values.dtype}"
                )


def _require_applicable(
    deltas: Sequence[Delta],
    live: Mapping[str, Tensor],
) -> None:
    """Raise unless deltas can be applied one after the other; write nothing to the model.

    Later deltas start from what earlier ones leave: a copy of all touched entries is replayed.
    """
    if deltas:
        deltas[0].require_applicable(live)
    if len(deltas) < 2:
        return

    index = collect_indices(deltas)
    for delta in deltas:
        for name in delta.shapes:
            weight = live[name]
            delta.require_tensor_kind(name, shape_of(weight), weight.dtype)

    before = {}
    for name, indices in index.items():
        before[name] = gather_entries(live[name], indices).cpu()  # (touched entries,)
    replay_deltas(deltas, index, before)


def _require_known_history(attachment: Attachment, store: DeltaStore) -> None:
    """Raise StoreError unless a store still has the deltas that a model was moved along."""
    shared = zip(attachment.undo_stack, store.entries, strict=False)  # the store may be ahead
    is_same = all(undo.sha256 == entry.sha256 for undo, entry in shared)
    if not is_same or len(store) < len(attachment.undo_stack):
        raise StoreError(f"{store.path}: has another history than when the model was loaded")


def _require_untuned(model: nn.Module) -> None:
    """Raise MismatchError inside `sparse_tuning`, which writes its own values to the weights."""
    if is_intercepted(model):
        raise MismatchError(
            "the model is being tuned: leave `sparse_tuning` first, which writes its values"
        )


def _require_dtype(live: Mapping[str, Tensor], store: DeltaStore) -> None:
    """Raise MismatchError unless a model is in the dtype of the store's deltas."""
    first = next(iter(live.values()))  # all weights of a model have one dtype
    found = first.dtype
    expected = trained_dtype(store.base, store.path)
    if found != expected:
        raise MismatchError(
            f"the model is {found}, the store's deltas are {expected}: load it in that dtype"
        )
