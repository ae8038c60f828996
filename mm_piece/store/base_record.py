"""What a store records of its base: where it lies, what it is, which of its files are read."""

import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mm_piece.deltas.delta import compute_fingerprint, compute_full_digest
from mm_piece.distributed import shape_of
from mm_piece.dtypes import as_dtype, dtype_name
from mm_piece.errors import ModelError, StoreError, format_value
from mm_piece.models.base import READING_OPTIONS, tensors


def describe_base(
    model: Any, base: str | Path, revision: str | None, store: Path
) -> dict[str, Any]:
    """What a store records of its base: where it lies, its family, dtype, size and fingerprint.

    A folder is recorded relative to the store, so that both can move together; a hub id with its
    revision.
    """
    named = tensors(model)
    first = next(iter(named.values()))
    return {
        **locate_base(base, revision, store),
        "family": model.config.model_type,
        "dtype": dtype_name(first.dtype),
        "parameters": sum(shape_of(tensor).numel() for tensor in named.values()),
        "bytes": sum(shape_of(t).numel() * t.element_size() for t in named.values()),
        "fingerprint": compute_fingerprint(named),
        "digest": compute_full_digest(named),
    }


def locate_base(base: str | Path, revision: str | None, store: Path) -> dict[str, Any]:
    """`{"folder": relative to the store}` for a local base, else `{"hub": id, "revision": …}`."""
    if Path(base).is_dir():
        return {"folder": _relative_path(Path(base).resolve(), store.resolve())}
    return {"hub": str(base), "revision": revision}


def relocate_base(base: dict[str, Any], store: Path, to: Path) -> dict[str, Any]:
    """What a store at `to` records of the base that `store` records; a folder stays where it is."""
    if "folder" not in base:
        return base
    return {**base, "folder": _relative_path((store / base["folder"]).resolve(), to.resolve())}


def trained_dtype(base: dict[str, Any], store: Path) -> torch.dtype:
    """The dtype that a store's deltas were trained in; StoreError if it does not say."""
    if "dtype" not in base:
        raise StoreError(f"store {store} does not say which dtype it was trained in")
    return as_dtype(base["dtype"])


def base_source(base: dict[str, Any], store: Path) -> tuple[str, str | None]:
    """What `load_base` takes for a base that a store recorded: source and revision."""
    if "folder" in base:
        folder = (store / base["folder"]).resolve()
        if not folder.is_dir():
            raise ModelError(f"the base of store {store} is not at {folder}; name it with --base")
        return str(folder), None
    if "hub" not in base:
        raise ModelError(f"store {store} does not say where its base is; name it with --base")
    return base["hub"], base.get("revision")


def reading_of(base: Mapping[str, Any], store: Path) -> dict[str, Any]:
    """Which of its files a base that a store recorded is read from: options of `load_base`."""
    recorded = base.get("reading", {})
    if not isinstance(recorded, dict) or not all(map(_is_reading_option, recorded.items())):
        raise StoreError(
            f"store {store}: base: reading is {format_value(recorded)}; allowed: "
            f"{', '.join(READING_OPTIONS)}, "
            "inside of the base's folder"
        )
    return recorded


def _is_reading_option(item: tuple[str, Any]) -> bool:
    key, value = item
    if key == "use_safetensors":
        return isinstance(value, bool)
    is_plain = isinstance(value, str) and value.isprintable()
    return key in READING_OPTIONS and is_plain and value[:1] != "/" and ".." not in value.split("/")


def _relative_path(folder: Path, start: Path) -> str:
    return Path(os.path.relpath(folder, start)).as_posix()  # Path climbs only from 3.12 on
