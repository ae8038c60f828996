"""A model at a position, from files."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

import torch

from mm_piece.deltas.delta import Delta, compute_fingerprint
from mm_piece.dtypes import as_dtype
from mm_piece.errors import BaseError, StoreError, as_path
from mm_piece.families import group_of
from mm_piece.models.base import load_base, tensors, validate_options
from mm_piece.store.attachment import as_store, attach_base
from mm_piece.store.base_record import base_source, reading_of, trained_dtype
from mm_piece.store.delta_store import DeltaStore


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
    revision = options.pop("revision", None)
    if revision is not None and base is None:
        raise StoreError("revision goes with a base; a store knows its own")
    options = validate_options(options)
    if delta is not None:
        return _load_delta(base, revision, Delta.load(delta), options)
    if store is None:
        if base is None or at:
            raise StoreError("load needs a base, a store, or a base and a delta")
        return load_base(base, revision, **options)
    opened = as_store(store)
    last = opened.position(at)
    requested_dtype = options.pop("dtype", None)
    source, revision = (str(base), revision) if base else base_source(opened.base, opened.path)
    dtype = trained_dtype(opened.base, opened.path)
    options = {**reading_of(opened.base, opened.path), **options}
    with ThreadPoolExecutor(1) as reader:  # deltas are read and verified while the base is loaded
        pending = [reader.submit(opened.delta, position) for position in range(1, last + 1)]
        model, processor = load_base(source, revision, dtype=dtype, **options)
        attachment, live = attach_base(model, opened), tensors(model)
        for future in pending:  # nobody else has this model yet: one delta at a time
            attachment.apply_delta(future.result(), live)
    return (model if requested_dtype is None else model.to(as_dtype(requested_dtype))), processor


def describe_delta(store: str | Path | DeltaStore, at: int | None) -> dict[str, Any]:
    """What a delta holds, its header and a line per tensor: a file, or a store's at a position.

    What whoever made it wrote into `info` stands apart from what was read and counted here.
    """
    delta = Delta.load(store) if is_delta_file(store) else _read_delta_at(as_store(store), at)
    tensor_rows = [
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
    return {**facts, "info": delta.info, "tensors": tensor_rows}


def _read_delta_at(store: DeltaStore, at: int | None) -> Delta:
    return store.delta(len(store) if at is None else at)


def is_delta_file(source: str | Path | DeltaStore) -> TypeGuard[str | Path]:
    """Whether a source is a delta file, not a store."""
    return not isinstance(source, DeltaStore) and as_path(source, "store").is_file()


def _load_delta(
    base: str | Path | None, revision: str | None, delta: Delta, options: dict[str, Any]
) -> tuple[Any, Any]:
    requested_dtype = options.pop("dtype", None)
    model, processor = load_base(
        require_base_source(base), revision, dtype=dtype_of(delta), **options
    )
    live = tensors(model)
    if not delta.parent:
        require_delta_base(delta, str(base), compute_fingerprint(live))
    delta.apply(live)
    return (model if requested_dtype is None else model.to(as_dtype(requested_dtype))), processor


def require_base_source(base: str | Path | None) -> str | Path:
    """The base that a single delta was given; StoreError if there is none."""
    if base is None:
        raise StoreError("a single delta needs its base, a folder or hub id, beside it")
    return base


def dtype_of(delta: Delta) -> torch.dtype:
    """The dtype a delta was trained in; that of an empty one does not matter."""
    dtypes = {values.dtype for values in delta.values.values() if values.is_floating_point()}
    return min(dtypes, key=str, default=torch.float32)


def require_delta_base(delta: Delta, base: str, found: str) -> None:
    """Raise BaseError unless a base with the fingerprint `found` is the delta's own."""
    if found != delta.base:
        raise BaseError(
            f"delta {delta.task!r} belongs to another base than {base}: "
            f"expected fingerprint {delta.base[:12]}…, found {found[:12]}…"
        )
