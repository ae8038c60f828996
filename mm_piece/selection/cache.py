"""Masks kept on disk, each under what it depends on: model, data, settings, seeds, version."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mm_piece.errors import SelectionError
from mm_piece.files import sealed
from mm_piece.importance import BATCH_METHODS, METHODS
from mm_piece.recipe import SelectionSettings
from mm_piece.selection import Mask

_IRRELEVANT_SETTINGS = {
    "memory",
    "accumulators",
    "cache",
    "samples",
}  # `samples` may exceed what there is


def locate_mask_file(select: SelectionSettings, folder: Path, facts: Mapping[str, Any]) -> Path:
    """The file of a mask: in `folder`, or where the recipe says.

    `facts` are what it depends on beside the recipe's settings. A method of the user's may change
    under its name, and so its masks are kept for one run alone. Raises SelectionError if the folder
    cannot be made.
    """
    directory = Path(select.cache) if select.cache and select.method in METHODS else folder
    require_writable_folder(select)
    directory.mkdir(parents=True, exist_ok=True)
    ignored = _IRRELEVANT_SETTINGS | (set() if select.method in BATCH_METHODS else {"batch_size"})
    settings = select.model_dump(mode="json", exclude=ignored)
    key_text = json.dumps([settings, facts, version("mm-piece")], sort_keys=True)
    return directory / f"mask-{hashlib.sha256(key_text.encode()).hexdigest()[:32]}.safetensors"


def require_writable_folder(select: SelectionSettings) -> None:
    """Raise SelectionError if masks cannot be written where the recipe says."""
    if select.cache is None:
        return
    try:
        Path(select.cache).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=select.cache):
            pass
    except OSError as error:
        raise SelectionError(
            f"select.cache: cannot write to {select.cache}: {error.strerror}"
        ) from error


def write_mask(file: Path, mask: Mask, stability: Mapping[str, float]) -> None:
    """Keep a mask and how stable it is; whole or not at all."""
    sealed.write_checksummed(file, mask, {"stability": dict(stability)})


def read_mask(file: Path) -> tuple[Mask, dict[str, float]] | None:
    """The mask and its stability as an earlier run left them; None if none did, or not whole."""
    cached = sealed.read_checksummed(file)
    return None if cached is None else (cached[0], cached[1]["stability"])
