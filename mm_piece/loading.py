"""A model at a position: load it, move it in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mm_piece.delta import Delta, fingerprint, put, put_all, take
from mm_piece.errors import BaseError, MismatchError, StoreError
from mm_piece.merging import replay, union
from mm_piece.models import as_dtype, load_base, tensors, trained_dtype, where
from mm_piece.names import group_of
from mm_piece.store import DeltaStore


@dataclass
class _Attachment:
    """The store a live model belongs to, and the base's values of every entry touched so far."""

    store: DeltaStore
    index: dict[str, Tensor] = field(default_factory=dict)  # name -> sorted, every entry touched
    base: dict[str, Tensor] = field(default_factory=dict)  # name -> the base's values there


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
    (another dtype is a cast after composition). Other options go to `from_pretrained`. Nothing is
    applied before everything was verified. Raises PositionError, MismatchError (another base),
    DamageError, ModelError.
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
    wanted = options.pop("dtype", None)
    source, revision = (
        (str(base), options.pop("revision", None)) if base else where(opened.base, opened.path)
    )
    dtype = trained_dtype(opened.base, opened.path)
    model, processor = load_base(source, revision, dtype=dtype, **options)
    attach(model, opened)
    checkout(model, len(opened) if at is None else at)
    return (model if wanted is None else model.to(as_dtype(wanted))), processor


def attach(model: nn.Module, store: DeltaStore) -> None:
    """Tie a model that stands at the base to a store; MismatchError if it is another base."""
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
    write. Raises PositionError outside 0…T, StoreError for a model that was not loaded from a
    store.
    """
    if model not in _attachments:
        raise StoreError("checkout needs a model that mm_piece.load took from a store")
    attachment = _attachments[model]
    store = attachment.store = DeltaStore.open(attachment.store.path)
    deltas = store.deltas(at)
    live = tensors(model)
    _same_dtype(live, store)
    index, base = _widened(attachment, deltas, live)
    target = replay(deltas, index, base)
    put_all((live[name], index[name], values) for name, values in target.items())
    attachment.index, attachment.base = index, base


def outline(store: str | Path | DeltaStore, at: int | None) -> dict[str, Any]:
    """What a delta holds, its header and a line per tensor: a file, or a store's at a position."""
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
    return {**facts, **delta.info, "tensors": tensors_of}


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


def _widened(
    attachment: _Attachment, deltas: Sequence[Delta], live: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Union of all entries touched so far and by `deltas`, with the base's values there.

    An entry that is new to the union was never written, so the live model still holds the base's
    value.
    """
    index, base = dict(attachment.index), dict(attachment.base)
    for name, touched in union(deltas).items():
        if name not in live:
            raise MismatchError(f"a delta names {name!r}, which the model does not have")
        _require_kind(name, deltas, live[name])
        known = index.get(name, touched[:0])
        index[name] = torch.cat([known, touched]).unique() if len(known) else touched
        values = take(live[name], index[name]).cpu()
        put(values, torch.searchsorted(index[name], known), base.get(name, values[:0]))
        base[name] = values
    return index, base


def _require_kind(name: str, deltas: Sequence[Delta], tensor: Tensor) -> None:
    for delta in deltas:
        if name in delta.shapes:
            delta.check_kind(name, tensor.shape, tensor.dtype)


def _same_dtype(live: Mapping[str, Tensor], store: DeltaStore) -> None:
    found, expected = next(iter(live.values())).dtype, trained_dtype(store.base, store.path)
    if found != expected:
        raise MismatchError(
            f"the model is {found}, the store's deltas are {expected}: load it in that dtype"
        )
