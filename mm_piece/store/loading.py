"""A model at a position, from files."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mm_piece.deltas.delta import Delta, compute_fingerprint
from mm_piece.dtypes import as_dtype
from mm_piece.errors import (
    BaseError,
    StoreError,
    as_path,
)
from mm_piece.models.base import (
    load_base,
    tensors,
    validate_options,
)
from mm_piece.store.attachment import attach_base
from mm_piece.store.base_location import base_source
from mm_piece.store.base_reading import reading_of, trained_dtype
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.folder import is_store
from mm_piece.store.inspection import as_store


def load(
    base: str | Path | None = None,
    store: str | Path | DeltaStore | None = None,
    at: int | None = None,
    delta: str | Path | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Return a model and its processor: a base, a position of a store, or a base with one delta.

    The position defaults to the last, `base` to the store's own, the dtype to the one trained in
    (another dtype is a cast after composition). A store alone may stand in place of the base.
    Other options go to `from_pretrained`. Every delta is verified, down to the values it replaces;
    a model that fails is never returned. Raises PositionError, BaseError, OrderError, DamageError,
    ModelError.
    """
    if store is None and base is not None:
        folder = as_path(base, "base")
        if is_store(folder):
            store = folder
            base = None

    if store is not None and delta is not None:
        raise StoreError("give a store or a single delta, not both")
    revision = options.pop("revision", None)
    if revision is not None and base is None:
        raise StoreError("revision goes with a base; a store knows its own")

    options = validate_options(options)
    if delta is not None:
        return _load_delta(base, revision, Delta.load(delta), options)
    if store is None:
        # a position without a store is a mistake, but position 0 is the base
        if base is None or at:
            raise StoreError("load needs a base, a store, or a base and a delta")
        return load_base(base, revision, **options)
    return _load_position(as_store(store), at, base, revision, options)


def _load_position(
    store: DeltaStore,
    at: int | None,
    base: str | Path | None,
    revision: str | None,
    options: dict[str, Any],
) -> tuple[Any, Any]:
    """Load the model at a position of a store, and its processor."""
    last = store.position(at)
    # composition takes place in the dtype trained in; the requested one is a cast at the end
    requested_dtype = options.pop("dtype", None)
    if base:
        source = str(base)
    else:
        source, revision = base_source(store.base, store.path)

    dtype = trained_dtype(store.base, store.path)
    # the caller's options come last and win over the recorded ones
    options = {**reading_of(store.base, store.path), **options}

    # deltas are read and verified while the base is loaded
    with ThreadPoolExecutor(1) as reader:
        pending = [reader.submit(store.delta, position) for position in range(1, last + 1)]
        model, processor = load_base(source, revision, dtype=dtype, **options)
        attachment = attach_base(model, store)
        live = tensors(model)
        for future in pending:  # no lock is needed: no other thread has this model yet
            delta = future.result()
            attachment.apply_delta(delta, live)

    return _cast_model(model, requested_dtype), processor


def _load_delta(
    base: str | Path | None,
    revision: str | None,
    delta: Delta,
    options: dict[str, Any],
) -> tuple[Any, Any]:
    """Load a base, apply a single delta to it, and return model and processor."""
    requested_dtype = options.pop("dtype", None)
    source = require_base_source(base)
    dtype = dtype_of(delta)
    model, processor = load_base(source, revision, dtype=dtype, **options)

    live = tensors(model)
    # a later delta of a chain does not start from its base; `apply` checks the values before
    if not delta.parent:
        require_delta_base(delta, str(base), compute_fingerprint(live))
    delta.apply(live)
    return _cast_model(model, requested_dtype), processor


def _cast_model(model: Any, dtype: str | torch.dtype | None) -> Any:
    """Cast a model to a requested dtype; None leaves it as it is."""
    if dtype is None:
        return model
    return model.to(as_dtype(dtype))


def require_base_source(base: str | Path | None) -> str | Path:
    """Return the base of a single delta; StoreError if there is none."""
    if base is None:
        raise StoreError("a single delta needs its base, a folder or hub id, beside it")
    return base


def dtype_of(delta: Delta) -> torch.dtype:
    """Return the dtype that a delta was trained in, float32 for an empty one."""
    dtypes = {values.dtype for values in delta.values.values() if values.is_floating_point()}
    # any order will do, as long as the same delta always gives the same dtype
    return min(dtypes, key=str, default=torch.float32)


def require_delta_base(
    delta: Delta,
    base: str,
    found: str,
) -> None:
    """Raise BaseError unless a base with the fingerprint `found` is the delta's own."""
    if found != delta.base:
        raise BaseError(
            f"delta {delta.task!r} belongs to another base than {base}: "
            f"expected fingerprint {delta.base[:12]}…, found {found[:12]}…"
        )
