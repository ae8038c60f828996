"""A model at a position: load it, move it in place."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mm_piece.delta import Delta, digest, fingerprint
from mm_piece.errors import BaseError, MismatchError, StoreError
from mm_piece.merging import replay, union
from mm_piece.models import as_dtype, load_base, reading_of, tensors, trained_dtype, where
from mm_piece.names import group_of
from mm_piece.sharding import put_all, shape_of, take
from mm_piece.store import DeltaStore


@dataclass(frozen=True)
class _Undo:
    """What a delta replaced in a live model: putting it back undoes the delta."""

    sha256: str
    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    after: dict[str, str]  # SHA-256 of the values that the delta wrote


@dataclass
class _Attachment:
    """The store a live model belongs to, and how to undo each delta it stands on, the last last."""

    store: DeltaStore
    undo: list[_Undo] = field(default_factory=list)

    def apply(self, delta: Delta, live: Mapping[str, Tensor]) -> None:
        """Go one position on."""
        sha256 = self.store.entries[len(self.undo)].sha256
        after = {name: digest(values) for name, values in delta.values.items()}
        self.undo.append(_Undo(sha256, delta.indices, delta.apply(live), after))

    def back(self, live: Mapping[str, Tensor]) -> None:
        """Go one position back; MismatchError if the model is not what the last delta left."""
        undo = self.undo[-1]
        for name, index in undo.indices.items():
            if digest(take(live[name], index).cpu()) != undo.after[name]:
                raise MismatchError(f"{name} was changed since the model was loaded: load it again")
        self.undo.pop()
        put_all((live[name], index, undo.values[name]) for name, index in undo.indices.items())


# Nothing is hung on the model itself: it stays the plain transformers model that others know.
_attachments: WeakKeyDictionary[nn.Module, _Attachment] = WeakKeyDictionary()


def load(
    base: str | Path | None = None,
    store: str | Path | DeltaStore | None = None,
    at: int | None = None,
    delta: str | Path | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """The model at a position of a store (default: the last) or with one delta, and its processor.

    `base` defaults to the one the store was made with; the dtype to the one it was trained in
    (another dtype is a cast after composition). Other options go to `from_pretrained`. Every delta
    is verified, down to the values it replaces; what fails is never returned. Raises PositionError,
    BaseError, OrderError, DamageError, ModelError.
    """
    if store is not None and delta is not None:
        raise StoreError("give a store or a single delta, not both")
    if delta is not None:
        return _load_delta(base, Delta.load(Path(delta)), options)
    if store is None:
        if base is None or at:
            raise StoreError("load needs a base, a store, or a base and a delta")
        return load_base(base, **options)
    opened = as_store(store)
    last = opened.position(at)
    wanted = options.pop("dtype", None)
    source, revision = (
        (str(base), options.pop("revision", None)) if base else where(opened.base, opened.path)
    )
    dtype = trained_dtype(opened.base, opened.path)
    options = {**reading_of(opened.base, opened.path), **options}
    with ThreadPoolExecutor(1) as reader:  # deltas are read and verified while the base is loaded
        pending = [reader.submit(opened.delta, position) for position in range(1, last + 1)]
        model, processor = load_base(source, revision, dtype=dtype, **options)
        attach(model, opened)
        live = tensors(model)
        for read in pending:  # nobody else has this model yet: one delta at a time
            _attachments[model].apply(read.result(), live)
    return (model if wanted is None else model.to(as_dtype(wanted))), processor


def attach(model: nn.Module, store: DeltaStore) -> None:
    """Tie a model that stands at the base to a store; BaseError if it is another base."""
    found = fingerprint(tensors(model))
    if found != store.base["fingerprint"]:
        expected = store.base["fingerprint"]
        raise BaseError(
            f"store {store.path} was made on another base: "
            f"expected fingerprint {expected[:12]}…, found {found[:12]}…"
        )
    _attachments[model] = _Attachment(store)


def checkout(model: nn.Module, at: int) -> None:
    """Move a loaded model to position `at` in place; only entries that deltas touched are written.

    Every delta on the way is verified, down to the values it expects to find, before the first
    write. The way back needs no file: what the deltas replaced was kept, as much again as their
    values. Raises PositionError outside 0…T, MismatchError if the weights are not what the last
    delta left, StoreError for a model that was not loaded from a store, or whose store has changed
    its history.
    """
    if model not in _attachments:
        raise StoreError("checkout needs a model that mm_piece.load took from a store")
    attachment, live = _attachments[model], tensors(model)
    store = DeltaStore.open(attachment.store.path)
    last, here = store.position(at), len(attachment.undo)
    _same_history(attachment, store)
    _same_dtype(live, store)
    deltas = [store.delta(position) for position in range(here + 1, last + 1)]
    _rehearse(deltas, live)
    attachment.store = store
    for _ in range(last, here):
        attachment.back(live)
    for delta in deltas:
        attachment.apply(delta, live)


def outline(store: str | Path | DeltaStore, at: int | None) -> dict[str, Any]:
    """What a delta holds, its header and a line per tensor: a file, or a store's at a position.

    What whoever made it wrote into `info` stands apart from what was read and counted here.
    """
    delta = Delta.load(store) if is_delta(store) else _delta_at(as_store(store), at)
    tensors_of = [
        {
            "name": name,
            "group": group_of(name),
            "shape": list(delta.shapes[name]),
            "entries": len(index),
        }
        for name, index in delta.indices.items()
    ]
    facts = {
        "task": delta.task,
        "base": delta.base,
        "parent": delta.parent,
        "entries": delta.entries,
    }
    return {**facts, "info": delta.info, "tensors": tensors_of}


def _delta_at(store: DeltaStore, at: int | None) -> Delta:
    return store.delta(len(store) if at is None else at)


def is_delta(source: str | Path | DeltaStore) -> TypeGuard[str | Path]:
    """Whether a source is a delta file, not a store."""
    return not isinstance(source, DeltaStore) and Path(source).is_file()


def as_store(store: str | Path | DeltaStore) -> DeltaStore:
    """A store from its path, or itself."""
    return store if isinstance(store, DeltaStore) else DeltaStore.open(Path(store))


def _load_delta(base: str | Path | None, delta: Delta, options: dict[str, Any]) -> tuple[Any, Any]:
    wanted = options.pop("dtype", None)
    model, processor = load_base(named_base(base), dtype=dtype_of(delta), **options)
    live = tensors(model)
    if not delta.parent:
        require_base(delta, str(base), fingerprint(live))
    delta.apply(live)
    return (model if wanted is None else model.to(as_dtype(wanted))), processor


def named_base(base: str | Path | None) -> str | Path:
    """The base that a single delta was given; StoreError if there is none."""
    if base is None:
        raise StoreError("a single delta needs its base, a folder or hub id, beside it")
    return base


def dtype_of(delta: Delta) -> torch.dtype:
    """The dtype a delta was trained in; that of an empty one does not matter."""
    dtypes = {row.dtype for row in delta.values.values() if row.is_floating_point()}
    return min(dtypes, key=str, default=torch.float32)


def require_base(delta: Delta, base: str, found: str) -> None:
    """Raise BaseError unless a base with the fingerprint `found` is the delta's own."""
    if found != delta.base:
        raise BaseError(
            f"delta {delta.task!r} belongs to another base than {base}: "
            f"expected fingerprint {delta.base[:12]}…, found {found[:12]}…"
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
    if missing := sorted(index.keys() - live.keys()):
        raise MismatchError(f"a delta names {missing[0]!r}, which the model does not have")
    for delta in deltas:
        for name in delta.shapes:
            delta.check_kind(name, shape_of(live[name]), live[name].dtype)
    replay(deltas, index, {name: take(live[name], where).cpu() for name, where in index.items()})


def _same_history(attachment: _Attachment, store: DeltaStore) -> None:
    shared = zip(attachment.undo, store.entries, strict=False)
    same = all(undo.sha256 == entry.sha256 for undo, entry in shared)
    if not same or len(store) < len(attachment.undo):
        raise StoreError(f"{store.path}: has another history than when the model was loaded")


def _same_dtype(live: Mapping[str, Tensor], store: DeltaStore) -> None:
    found, expected = next(iter(live.values())).dtype, trained_dtype(store.base, store.path)
    if found != expected:
        raise MismatchError(
            f"the model is {found}, the store's deltas are {expected}: load it in that dtype"
        )
