"""A checkpoint folder as a stream of weights: published names, one dtype, slice by slice.

Nothing is held but a slice, so a checkpoint of any size goes through.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor

from mm_piece.deltas.delta import Delta, fingerprint, identity, put, step_of, take
from mm_piece.deltas.file_layout import layout_of, may_turn, turned, turned_positions
from mm_piece.distributed import shape_of
from mm_piece.dtypes import as_dtype, bits, dtype_name
from mm_piece.errors import MismatchError, ModelError, as_path
from mm_piece.files.safetensors import Mapped, Place, places
from mm_piece.models.base import refusing
from mm_piece.models.skeleton import map_tensors, skeleton_of, weight_files

_SETTINGS = ["*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint, as the model has it: cast, and turned where the file is turned.

    Casting is what `from_pretrained` does: floating-point tensors only. Qwen3-VL's fused experts
    lie in published files with their last two dimensions swapped.
    """

    key: str  # in the file
    name: str  # as published; empty for a tensor that is no weight of the model
    place: Place | Mapped
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
        there = turned_positions(torch.arange(0, self.place.size, step), self.shape)
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
    """The weights of a folder as `from_pretrained` sees them, in the order of its files."""

    def __init__(
        self, folder: Path, dtype: str | torch.dtype | None = None, **reading: Any
    ) -> None:
        """`dtype` is what the weights are cast to, by default their own.

        `reading`: those of `models.READING`. Raises ModelError for what cannot be loaded.
        """
        self.root, self.reading = folder, reading
        self.folder = folder / reading.get("subfolder", "")
        held = _held(folder, reading)
        self.dtype = _dtype_of(held) if dtype is None else as_dtype(dtype)
        self.skeleton = skeleton_of(folder, self.dtype, **reading)
        self.family = self.skeleton.family
        found = [self._live(key, place) for key, place in held.items()]
        copies = self._copies(found)
        names = self._names(copies)
        self.apart = bool(self.skeleton.ties.keys() - copies)  # what the configuration ties
        self.weights = [
            replace(weight, name=names.get(weight.name, ""))
            for weight in found
            if weight.name not in copies
        ]
        self.parameters = self._in_order(dict.fromkeys(names.values()))
        published = ((self.skeleton.published(live), names[live]) for live in names)
        self.tied = {other: name for other, name in published if other != name}

    def _live(self, key: str, place: Place | Mapped) -> Weight:
        """A tensor of the files under its live name; under none if it is no weight of the model."""
        name, turns = self.skeleton.live_name(key)
        if name is None:
            dtype = self.dtype if place.dtype.is_floating_point else place.dtype
            return Weight(key, "", place, dtype, place.shape)
        shape, dtype = self.skeleton.kinds[name]
        if place.shape != shape and not (turns and place.shape == turned(shape)):
            found, expected = list(place.shape), list(shape)
            raise ModelError(f"{place.file}: {key} is {found}, the model has {expected}")
        return Weight(key, name, place, dtype, shape)

    def _copies(self, found: Sequence[Weight]) -> set[str]:
        """The live names that the configuration ties and whose values the files hold once more.

        Where the values differ, transformers keeps the two apart, whatever the configuration says.
        """
        live: dict[str, Weight] = {}
        for weight in found:
            if weight.name in live:
                keys = f"{live[weight.name].key} and {weight.key}"
                raise ModelError(f"{self.folder} holds {weight.name} twice: as {keys}")
            if weight.name:
                live[weight.name] = weight
        ties = self.skeleton.ties.items()
        return {target for target, source in ties if _equal(live[target], live[source])}

    def _names(self, copies: set[str]) -> dict[str, str]:
        """The published name of each live one: of tied ones, that of the model's first."""
        first = dict(self.skeleton.first)
        for target in copies:
            source = self.skeleton.ties[target]
            first[target] = first[source] = next(n for n in first if n in (target, source))
        return {live: self.skeleton.published(name) for live, name in first.items()}

    def _in_order(self, names: Iterable[str]) -> dict[str, Weight]:
        """The weights of the model, in its order; ModelError if the files lack one."""
        named = {weight.name: weight for weight in self.weights}
        if missing := [name for name in names if name not in named]:
            raise ModelError(f"{self.folder} lacks {len(missing)} weights, {missing[0]} among them")
        return {name: named[name] for name in names}

    def require_loaded(self, live: Mapping[str, Tensor]) -> None:
        """Raise ModelError unless these are the weights that the files hold, by published names.

        What a model is made of besides its files, no store could be made again from.
        """
        found = {name: _kind(shape_of(t), t.dtype) for name, t in live.items()}
        expected = {name: _kind(w.shape, w.dtype) for name, w in self.parameters.items()}
        for name in sorted(found.keys() | expected.keys()):
            loaded, held = found.get(name, "none"), expected.get(name, "none")
            if loaded != held:
                raise ModelError(
                    f"{self.folder}: the loaded model is not what its files hold: {name}: "
                    f"loaded {loaded}, in the files {held} (do options under model: change it?)"
                )
        if fingerprint(live) != self.fingerprint():
            raise ModelError(f"{self.folder}: the loaded model has other values than its files")

    def require_finite(self) -> None:
        """Raise ModelError for a weight with an entry that is no number; reads everything.

        It is looked at as the model has it: what a narrower dtype cannot hold, it makes infinite.
        """
        for name, weight in self.parameters.items():
            for first, piece in weight.pieces():
                low, high = piece.aminmax()  # in one go; a NaN makes both NaN
                if not (low.isfinite() and high.isfinite()):
                    at = int((~piece.isfinite()).nonzero()[0])
                    dtype = dtype_name(piece.dtype)
                    raise ModelError(
                        f"{self.folder}: {name} holds {float(piece[at])} in {dtype} (entry "
                        f"{first + at}), which no training can use; mend the base's weights, or "
                        "take another dtype if their files hold finite ones"
                    )

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """The shapes in the files of the weights that may lie turned there."""
        return {n: w.place.shape for n, w in self.parameters.items() if may_turn(n)}

    def record(self) -> dict[str, Any]:
        """What a store records of how this checkpoint's files are read."""
        reading = {"reading": self.reading} if self.reading else {}
        return {**reading, **layout_of(self.layout, self.layout)}

    def fingerprint(self) -> str:
        """Return the fingerprint of the model that `load_base` makes of this folder."""
        return identity({n: (w.shape, w.dtype, w.sample()) for n, w in self.parameters.items()})

    def full_digest(self) -> str:
        """Return the full digest of that model; reads everything."""
        return identity({n: (w.shape, w.dtype, w.digest()) for n, w in self.parameters.items()})


def fetch(source: str | Path, revision: str | None = None, **reading: Any) -> Path:
    """Return the folder of a checkpoint, downloaded if `source` is a hub id."""
    if as_path(source, "a checkpoint").is_dir():
        return Path(source)
    if str(source).count("/") > 1 or str(source)[:1] in "/.":
        raise ModelError(f"{source}: there is no such folder")
    weight_files(str(source), revision, **reading)
    with refusing(f"cannot get {source}"):
        found = huggingface_hub.snapshot_download(
            str(source), revision=revision, allow_patterns=_SETTINGS
        )
    return Path(found)


def _held(folder: Path, reading: Mapping[str, Any]) -> dict[str, Place | Mapped]:
    """Where each tensor of a folder's files lies, by its key."""
    held: dict[str, Place | Mapped] = {}
    for file in weight_files(str(folder), **reading):
        if file.suffix == ".safetensors":
            held |= places(file)
        else:
            held |= {key: Mapped(file, tensor) for key, tensor in map_tensors(file).items()}
    return held


def _dtype_of(held: Mapping[str, Place | Mapped]) -> torch.dtype:
    largest = max(held.values(), key=lambda place: place.size)
    return as_dtype(dtype_name(largest.dtype))


def _equal(left: Weight, right: Weight) -> bool:
    """Whether two weights have the same numbers, which is when transformers ties them."""
    if left.shape != right.shape:
        return False
    pairs = zip(left.pieces(), right.pieces(), strict=True)
    return all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs)


def _kind(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{dtype_name(dtype)} {list(shape)}"
