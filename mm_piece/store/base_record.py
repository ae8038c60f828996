"""The store's record of its base: where it lies, what it is, which of its files are read."""

import os.path
from pathlib import Path
from typing import Any

import torch

from mm_piece.deltas.delta import compute_fingerprint, compute_full_digest
from mm_piece.distributed import shape_of
from mm_piece.dtypes import as_dtype, dtype_name
from mm_piece.errors import (
    ModelError,
    StoreError,
    format_value,
)
from mm_piece.models.base import READING_OPTIONS, tensors
from mm_piece.store.records import BaseRecord


def describe_base(
    model: Any,
    base: str | Path,
    revision: str | None,
    store: Path,
) -> BaseRecord:
    """Return the record of a base: its location, family, dtype, size and fingerprint.

    A folder is recorded relative to the store, so that both can move together; a hub id with its
    revision.
    """
    named = tensors(model)
    first = next(iter(named.values()))  # all weights of a model have one dtype

    num_parameters = 0
    num_bytes = 0
    for tensor in named.values():
        # ZeRO-3 leaves a partitioned weight empty; its full shape is recorded beside it
        size = shape_of(tensor).numel()
        num_parameters += size
        num_bytes += size * tensor.element_size()

    return BaseRecord(
        {
            **locate_base(base, revision, store),
            "family": model.config.model_type,
            "dtype": dtype_name(first.dtype),
            "parameters": num_parameters,
            "bytes": num_bytes,
            "fingerprint": compute_fingerprint(named),  # of a sample: checked at every load
            "digest": compute_full_digest(named),  # of all bits: checked on request
        }
    )


def locate_base(
    base: str | Path,
    revision: str | None,
    store: Path,
) -> dict[str, str | None]:
    """Return `{"folder": relative to the store}` or `{"hub": id, "revision": …}`."""
    if Path(base).is_dir():
        folder = Path(base).resolve()
        relative = _relative_path(folder, store.resolve())
        return {"folder": relative}

    return {"hub": str(base), "revision": revision}


def relocate_base(
    base: BaseRecord,
    store: Path,
    to: Path,
) -> BaseRecord:
    """Return the record of `store`'s base for a store at `to`; the base's folder stays in place."""
    # a hub id means the same from everywhere
    if base.folder is None:
        return base

    # the record of `store` is relative to `store`
    folder = (store / base.folder).resolve()
    return base.with_facts({"folder": _relative_path(folder, to.resolve())})


def trained_dtype(base: BaseRecord, store: Path) -> torch.dtype:
    """Return the dtype that a store's deltas were trained in; StoreError if none is recorded."""
    if base.dtype is None:
        raise StoreError(f"store {store} does not say which dtype it was trained in")

    return as_dtype(base.dtype)


def base_source(base: BaseRecord, store: Path) -> tuple[str, str | None]:
    """Return source and revision of a recorded base, as `load_base` takes them.

    Raises ModelError if the record has no location or its folder is not there.
    """
    if base.folder is not None:
        folder = (store / base.folder).resolve()
        if not folder.is_dir():
            raise ModelError(f"the base of store {store} is not at {folder}; name it with --base")
        return str(folder), None

    if base.hub is None:
        raise ModelError(f"store {store} does not say where its base is; name it with --base")

    return base.hub, base.revision


def reading_of(base: BaseRecord, store: Path) -> dict[str, Any]:
    """Return the recorded options of `load_base` that choose among a base's files.

    Raises StoreError for any other option, and for a path out of the base's folder.
    """
    recorded = base.facts.get("reading", {})  # there only if the base was loaded with some
    is_mapping = isinstance(recorded, dict)
    if not is_mapping or not all(map(_is_reading_option, recorded.items())):
        raise StoreError(
            f"store {store}: base: reading is {format_value(recorded)}; allowed: "
            f"{', '.join(READING_OPTIONS)}, "
            "inside of the base's folder"
        )

    return recorded


def _is_reading_option(item: tuple[str, Any]) -> bool:
    """Return whether an option of a recorded base is known, and stays inside its folder."""
    key, value = item
    if key == "use_safetensors":
        return isinstance(value, bool)

    # a store may come from the Hub: its options must not lead to other files of this computer
    if key not in READING_OPTIONS or not isinstance(value, str):
        return False
    if not value.isprintable() or value.startswith("/"):
        return False
    return ".." not in value.split("/")


def _relative_path(folder: Path, start: Path) -> str:
    relative = os.path.relpath(folder, start)  # Path climbs only from 3.12 on
    return Path(relative).as_posix()
