"""A checkpoint folder as a stream of weights: published names, one dtype, slice by slice.

Nothing is held but a slice, so a checkpoint of any size goes through.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor

from mm_piece.delta import Delta, identity, put, step_of, take
from mm_piece.errors import MismatchError, ModelError
from mm_piece.models import as_dtype, blueprint
from mm_piece.names import hub_name
from mm_piece.tensorfile import Place, bits, places

INDEX = "model.safetensors.index.json"
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint, as the model has it: cast, and turned where the file is turned.

    Casting is what `from_pretrained` does: floating-point tensors only. Qwen3-VL's fused experts
    lie in published files with their last two dimensions swapped.
    """

    key: str  # in the file
    name: str  # as published
    place: Place
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def turned(self) -> bool:
        """Return whether the file has the last two dimensions swapped."""
        return self.place.shape != self.shape

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield flat slices with the position of their first entry."""
        if not self.turned:
            for first, piece in self.place.pieces():
                yield first, piece.to(self.dtype)
            return
        rows, columns = self.shape[-2:]
        for first, piece in self.place.pieces(rows * columns):  # one matrix at a time
            yield first, piece.to(self.dtype).view(columns, rows).t().reshape(-1)

    def stored(self, piece: Tensor) -> Tensor:
        """Return one of `pieces` as the file has it."""
        return piece.view(self.shape[-2:]).t().reshape(-1) if self.turned else piece

    def take(self, indices: Tensor) -> Tensor:
        """Return the entries at sorted flat indices; MismatchError beyond the tensor's end."""
        if len(indices) and int(indices[-1]) >= self.place.size:
            raise MismatchError(f"{self.name} has {self.place.size} entries, a delta reaches past")
        parts = [torch.empty(0, dtype=self.dtype)]
        for first, piece in self.pieces():
            parts.append(take(piece, within(indices, first, len(piece))[0]))
        return torch.cat(parts)

    def sample(self) -> Tensor:
        """Return the entries that stand for this tensor in a fingerprint."""
        step = step_of(self.place.size)
        if not self.turned:
            return self.place.sample(step).to(self.dtype)
        rows, columns = self.shape[-2:]
        at = torch.arange(0, self.place.size, step)
        inside = at % (rows * columns)
        there = at - inside + inside % columns * rows + inside // columns
        return self.place.scattered(there.tolist()).to(self.dtype)

    def digest(self) -> str:
        """Return the SHA-256 of the tensor's bit patterns, in hex."""
        sha = hashlib.sha256()
        for _, piece in self.pieces():
            sha.update(bits(piece).numpy().data)
        return sha.hexdigest()

    def patched(self, deltas: Sequence[Delta]) -> Iterator[Tensor]:
        """Yield the slices after `deltas`, in order; raises at the end if one found other values.

        Raises BaseError or OrderError.
        """
        deltas = [delta for delta in deltas if self.name in delta.indices]
        for delta in deltas:
            delta.check_kind(self.name, self.shape, self.dtype)
        found = [hashlib.sha256() for _ in deltas]
        for first, piece in self.pieces():
            for delta, sha in zip(deltas, found, strict=True):
                at, rows = within(delta.indices[self.name], first, len(piece))
                sha.update(bits(take(piece, at)).numpy().data)
                put(piece, at, delta.values[self.name][rows])
            yield piece
        for delta, sha in zip(deltas, found, strict=True):
            delta.check_before(self.name, sha.hexdigest())


def within(indices: Tensor, first: int, count: int) -> tuple[Tensor, slice]:
    """Return those sorted indices that fall into a slice, relative to it, and which they are."""
    edges = torch.tensor([first, first + count], dtype=indices.dtype)
    low, high = torch.searchsorted(indices, edges).tolist()
    return indices[low:high].to(torch.int64) - first, slice(low, high)


class Checkpoint:
    """The weights of a folder, in the order of its files."""

    def __init__(self, folder: Path, dtype: str | torch.dtype) -> None:
        self.folder = folder
        self.dtype = as_dtype(dtype)
        self.family: str = _settings(folder).get("model_type", "")
        self.shapes, self.tied = blueprint(folder)
        found = [item for file in files_of(folder) for item in places(file).items()]
        self.weights = [self._weight(key, place) for key, place in found]
        self.named = {weight.name: weight for weight in self.weights}

    def _weight(self, key: str, place: Place) -> Weight:
        dtype = self.dtype if place.dtype.is_floating_point else place.dtype
        name = hub_name(key, self.family)
        shape = self.shapes.get(name, place.shape)
        if place.shape not in (shape, (*shape[:-2], *shape[:-3:-1])):
            found, expected = list(place.shape), list(shape)
            raise ModelError(f"{place.file}: {key} is {found}, the model has {expected}")
        return Weight(key, name, place, dtype, shape)

    @cached_property
    def parameters(self) -> dict[str, Weight]:
        """Return the weights that the model takes as parameters; ModelError if one is missing."""
        self.require_parameters()
        return {name: self.named[name] for name in self.shapes}

    def require_parameters(self) -> None:
        """Raise ModelError if a weight that the model takes is missing."""
        if missing := sorted(self.shapes.keys() - self.named.keys()):
            raise ModelError(f"{self.folder} lacks {len(missing)} weights, {missing[0]} among them")

    def fingerprint(self) -> str:
        """Return the fingerprint of the model that `load_base` makes of this folder."""
        return identity({n: (w.shape, w.dtype, w.sample()) for n, w in self.parameters.items()})

    def full_digest(self) -> str:
        """Return the full digest of that model; reads everything."""
        return identity({n: (w.shape, w.dtype, w.digest()) for n, w in self.parameters.items()})


def own_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of a checkpoint's largest tensor; ModelError unless models come in it."""
    held = [place for file in files_of(folder) for place in places(file).values()]
    largest = max(held, key=lambda place: place.size)
    return as_dtype(str(largest.dtype).removeprefix("torch."))


def files_of(folder: Path) -> list[Path]:
    """Return a checkpoint's safetensors files; ModelError if there are none."""
    index = folder / INDEX
    if index.is_file():
        shards = sorted(set(_json(index).get("weight_map", {}).values()))
    else:
        shards = ["model.safetensors"]
    if not shards or any(Path(str(shard)).name != shard for shard in shards):
        raise ModelError(f"{index}: names no files of its folder")
    for shard in shards:
        if not (folder / shard).is_file():
            raise ModelError(f"{folder} has no {shard}: not a safetensors checkpoint")
    return [folder / shard for shard in shards]


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint, downloaded if `source` is a hub id."""
    if Path(source).is_dir():
        return Path(source)
    if str(source).count("/") > 1 or str(source)[:1] in "/.":
        raise ModelError(f"{source}: there is no such folder")
    try:
        return Path(
            huggingface_hub.snapshot_download(str(source), revision=revision, allow_patterns=_FILES)
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot get {source}: {' '.join(str(error).split())[:300]}") from error


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: not a checkpoint")
    return _json(folder / "config.json")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object")
    return content
