"""A folder's weights by the rules of their family alone, without transformers.

`models.checkpoint` asks transformers where each tensor of the files goes, which takes seconds to
import. The rules here are a guess: they know nothing of ties, buffers or transposed weights. Only
who knows a base's fingerprint can use them, and the fingerprint decides whether they were right.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mm_piece.errors import ModelError
from mm_piece.families import FAMILIES, hub_name
from mm_piece.files.safetensors import TensorLocation, read_tensor_locations
from mm_piece.models.checkpoint_tensor import (
    CheckpointTensor,
    compute_weights_fingerprint,
    find_layout,
)

_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
# What files raise that are not there, damaged, or of another kind than these rules expect.
_READING_ERRORS = (
    ModelError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)


@dataclass(frozen=True)
class PlainCheckpoint:
    """The weights of a folder under published names, as `Checkpoint` has them."""

    folder: Path
    parameters: dict[str, CheckpointTensor]

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the files, of the weights that files may have transposed."""
        return find_layout(self.parameters)

    def compute_fingerprint(self) -> str:
        """Return the fingerprint of the model that the files hold."""
        return compute_weights_fingerprint(self.parameters)


def find_plain_checkpoint(
    folder: Path,
    family: str,
    dtype: torch.dtype,
    fingerprint: str,
) -> PlainCheckpoint | None:
    """Return a folder's weights, cast to `dtype`; None unless they have the fingerprint.

    None says nothing of the folder: it may need more than a family's rules.
    """
    if (folder / _ADAPTER).exists():
        return None  # `models.base` refuses it: transformers would add it to the weights

    try:
        located = dict(_iter_locations(folder))
        for names in _guess_names(located, family):
            checkpoint = _make_checkpoint(folder, located, names, dtype)
            if checkpoint.compute_fingerprint() == fingerprint:
                return checkpoint
    except _READING_ERRORS:
        return None
    return None


def _guess_names(
    keys: Iterable[str],
    family: str,
) -> Iterator[dict[str, str]]:
    """Yield published names by the keys of files: by the family's rules, then as they stand."""
    if family in FAMILIES:
        yield {key: hub_name(key, family) for key in keys}
    # other families, and known ones with a vision tower of another kind
    yield {key: key for key in keys}


def _make_checkpoint(
    folder: Path,
    located: Mapping[str, TensorLocation],
    names: Mapping[str, str],
    dtype: torch.dtype,
) -> PlainCheckpoint:
    """Return a folder's weights under the names of their keys, cast to `dtype`."""
    parameters: dict[str, CheckpointTensor] = {}
    for key, location in located.items():
        name = names[key]
        parameters[name] = _cast_tensor(key, name, location, dtype)
    return PlainCheckpoint(folder, parameters)


def _iter_locations(folder: Path) -> Iterator[tuple[str, TensorLocation]]:
    """Yield the tensors of a folder's files by their keys."""
    names = {_SINGLE_FILE}
    if not (folder / _SINGLE_FILE).is_file():
        text = (folder / _INDEX).read_text(encoding="utf-8")
        weight_map = json.loads(text)["weight_map"]
        names = set(weight_map.values())

    for name in sorted(names):
        locations = read_tensor_locations(folder / name)
        yield from locations.items()


def _cast_tensor(
    key: str,
    name: str,
    location: TensorLocation,
    dtype: torch.dtype,
) -> CheckpointTensor:
    """Return a tensor of the files as the model has it: cast if it is floating-point."""
    is_floating = location.dtype.is_floating_point
    return CheckpointTensor(
        key=key,
        name=name,
        location=location,
        dtype=dtype if is_floating else location.dtype,
        shape=location.shape,
    )
