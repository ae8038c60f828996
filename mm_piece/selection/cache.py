"""Masks on disk, each under what it depends on: model, data, settings, seeds, version."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mm_piece.errors import SelectionError
from mm_piece.files import sealed
from mm_piece.importance.rules import RULES, rule_of
from mm_piece.recipe import SelectionSettings
from mm_piece.selection import Mask

# Settings of `select` that change no mask; `samples` may exceed what there is, so it is counted.
_IRRELEVANT_SETTINGS = {
    "memory",
    "accumulators",
    "cache",
    "samples",
}


def locate_mask_file(
    select: SelectionSettings,
    folder: Path,
    facts: Mapping[str, Any],
) -> Path:
    """Return the file of a mask: in the folder of the recipe's cache, or in `folder`.

    Its name is a digest of all that the mask depends on: the settings, `facts` and the version. A
    user's own rule may change under its name, so its masks stay in the run's `folder`. Raises
    SelectionError if the cache folder cannot be written.
    """
    require_writable_folder(select)
    directory = folder
    if select.cache is not None and select.method in RULES:
        directory = Path(select.cache)
    directory.mkdir(parents=True, exist_ok=True)

    digest = _compute_digest(select, facts)
    return directory / f"mask-{digest}.safetensors"


def require_writable_folder(select: SelectionSettings) -> None:
    """Raise SelectionError if masks cannot be written where the recipe says."""
    if select.cache is None:
        return
    folder = Path(select.cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SelectionError(
            f"select.cache: cannot write to {select.cache}: {error.strerror}"
        ) from error


def write_mask(
    file: Path,
    mask: Mask,
    stability: Mapping[str, float],
) -> None:
    """Write a mask and its stability, whole or not at all."""
    facts = {"stability": dict(stability)}
    sealed.write_checksummed(file, mask, facts)


def read_mask(file: Path) -> tuple[Mask, dict[str, float]] | None:
    """Return the mask and its stability as a run wrote them; None unless they are whole."""
    cached = sealed.read_checksummed(file)
    if cached is None:
        return None

    mask, facts = cached
    return mask, facts["stability"]


def _compute_digest(select: SelectionSettings, facts: Mapping[str, Any]) -> str:
    """Return a digest of all that a mask depends on, in hex."""
    ignored = set(_IRRELEVANT_SETTINGS)
    if rule_of(select.method).per_example:
        ignored.add("batch_size")
    settings = select.model_dump(mode="json", exclude=ignored)

    parts = [
        settings,
        facts,
        version("mm-piece"),
    ]
    text = json.dumps(parts, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:32]
