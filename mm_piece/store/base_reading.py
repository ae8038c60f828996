"""How the files of a store's base are read: which of them, and in which dtype."""

from pathlib import Path
from typing import Any

import torch

from mm_piece.dtypes import as_dtype
from mm_piece.errors import StoreError, format_value
from mm_piece.recipe.base_options import READING_OPTIONS
from mm_piece.store.records import BaseRecord


def trained_dtype(
    base: BaseRecord,
    store: Path,
) -> torch.dtype:
    """Return the dtype that a store's deltas were trained in; StoreError if none is recorded."""
    if base.dtype is None:
        raise StoreError(f"store {store} does not say which dtype it was trained in")

    return as_dtype(base.dtype)


def reading_of(
    base: BaseRecord,
    store: Path,
) -> dict[str, Any]:
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
