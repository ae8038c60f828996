"""The store's record of its base: what it is, which of its files are read."""

from pathlib import Path
from typing import Any

import torch

from mm_piece.deltas.delta import compute_fingerprint, compute_full_digest
from mm_piece.distributed import shape_of
from mm_piece.dtypes import as_dtype, dtype_name
from mm_piece.errors import StoreError, format_value
from mm_piece.models.base import READING_OPTIONS, tensors
from mm_piece.store.base_location import locate_base
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


def trained_dtype(base: BaseRecord, store: Path) -> torch.dtype:
    """Return the dtype that a store's deltas were trained in; StoreError if none is recorded."""
    if base.dtype is None:
        raise StoreError(f"store {store} does not say which dtype it was trained in")

    return as_dtype(base.dtype)


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
