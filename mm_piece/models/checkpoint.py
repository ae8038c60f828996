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

from mm_piece.deltas.delta import (
    Delta,
    compute_fingerprint,
    compute_identity,
    compute_stride,
    gather_entries,
    set_entries,
)
from mm_piece.deltas.file_layout import (
    layout_of,
    may_be_transposed,
    transpose_positions,
    transpose_shape,
)
from mm_piece.distributed import shape_of
from mm_piece.dtypes import as_dtype, dtype_name, view_bits
from mm_piece.errors import MismatchError, ModelError, as_path
from mm_piece.files.safetensors import MappedTensor, TensorLocation, read_tensor_locations
from mm_piece.models.base import raising_model_error
from mm_piece.models.skeleton import find_weight_files, load_skeleton, map_tensors

_SETTINGS_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint, as the model has it: cast, and turned where the file is turned.

    Casting is what `from_pretrained` does: floating-point tensors only. Qwen3-VL's fused experts
    lie in published files with their last two dimensions swapped.
    """

    key: str  # in the file
    name: str  # as published; empty for a tensor that is no weight of the model
    location: TensorLocation | MappedTensor
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def is_transposed(self) -> bool:
        """Return whether the file has the last two dimensions swapped."""
        return self.location.shape != self.shape

    def iter_pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield flat slices with the position of their first entry."""
        if not self.is_transposed:
            for first, piece in self.location.iter_slices():
                yield first, piece.to(self.dtype)
            return
        rows, columns = self.shape[-2:]
        for first, piece in self.location.iter_slices(rows * columns):  # one matrix at a time
            yield first, piece.to(self.dtype).view(columns, rows).t().reshape(-1)

    def to_file_layout(self, piece: Tensor) -> Tensor:
        """Return one of `pieces` as the file has it."""
        return piece.view(self.shape[-2:]).t().reshape(-1) if self.is_transposed else piece

    def read_entries(self, indices: Tensor) -> Tensor:
        """Return the entries at sorted flat indices; MismatchError beyond the tensor's end."""
        if len(indices) and int(indices[-1]) >= self.location.size:
            raise MismatchError(
                f"{self.name} has {self.location.size} entries, a delta reaches past"
            )
        slices = [torch.empty(0, dtype=self.dtype)]
        for first, piece in self.iter_pieces():
            slices.append(gather_entries(piece, slice_indices(indices, first, len(piece))[0]))
        return torch.cat(slices)

    def read_sample(self) -> Tensor:
        """Return the entries that stand for this tensor in a fingerprint."""
        step = compute_stride(self.location.size)
        if not self.is_transposed:
            return self.location.sample_entries(step).to(self.dtype)
        file_positions = transpose_positions(torch.arange(0, self.location.size, step), self.shape)
        return self.location.gather_entries(file_positions.tolist()).to(self.dtype)

    def compute_digest(self) -> str:
        """Return the SHA-256 of the tensor's bit patterns, in hex."""
        sha = hashlib.sha256()
        for _, piece in self.iter_pieces():
            sha.update(view_bits(piece).numpy().data)
        return sha.hexdigest()

    def iter_patched(self, deltas: Sequence[Delta]) -> Iterator[Tensor]:
        """Yield the slices after `deltas`, in order; raises at the end if one found other values.

        Raises BaseError or OrderError.
        """
        deltas = [delta for delta in deltas if self.name in delta.indices]
        for delta in deltas:
            delta.require_tensor_kind(self.name, self.shape, self.dtype)
        found = [hashlib.sha256() for _ in deltas]
        for first, piece in self.iter_pieces():
            for delta, sha in zip(deltas, found, strict=True):
                at, rows = slice_indices(delta.indices[self.name], first, len(piece))
                sha.update(view_bits(gather_entries(piece, at)).numpy().data)
                set_entries(piece, at, delta.values[self.name][rows])
            yield piece
        for delta, sha in zip(deltas, found, strict=True):
            delta.require_before_digest(self.name, sha.hexdigest())


def slice_indices(indices: Tensor, first: int, count: int) -> tuple[Tensor, slice]:
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
        located = _locate_tensors(folder, reading)
        self.dtype = _dtype_of(located) if dtype is None else as_dtype(dtype)
        self.skeleton = load_skeleton(folder, self.dtype, **reading)
        self.family = self.skeleton.family
        found = [self._to_live_tensor(key, place) for key, place in located.items()]
        copies = self._find_tied_copies(found)
        names = self._map_published_names(copies)
        self.has_untied = bool(self.skeleton.ties.keys() - copies)  # what the configuration ties
        self.weights = [
            replace(weight, name=names.get(weight.name, ""))
            for weight in found
            if weight.name not in copies
        ]
        self.parameters = self._order_weights(dict.fromkeys(names.values()))
        published = ((self.skeleton.published_name_of(live), names[live]) for live in names)
        self.tied = {other: name for other, name in published if other != name}

    def _to_live_tensor(
        self, key: str, location: TensorLocation | MappedTensor
    ) -> CheckpointTensor:
        """A tensor of the files under its live name; under none if it is no weight of the model."""
        name, turns = self.skeleton.find_live_name(key)
        if name is None:
            dtype = self.dtype if location.dtype.is_floating_point else location.dtype
            return CheckpointTensor(key, "", location, dtype, location.shape)
        shape, dtype = self.skeleton.shapes_and_dtypes[name]
        if location.shape != shape and not (turns and location.shape == transpose_shape(shape)):
            found, expected = list(location.shape), list(shape)
            raise ModelError(f"{location.file}: {key} is {found}, the model has {expected}")
        return CheckpointTensor(key, name, location, dtype, shape)

    def _find_tied_copies(self, found: Sequence[CheckpointTensor]) -> set[str]:
        """The live names that the configuration ties and whose values the files hold once more.

        Where the values differ, transformers keeps the two apart, whatever the configuration says.
        """
        live: dict[str, CheckpointTensor] = {}
        for weight in found:
            if weight.name in live:
                keys = f"{live[weight.name].key} and {weight.key}"
                raise ModelError(f"{self.folder} holds {weight.name} twice: as {keys}")
            if weight.name:
                live[weight.name] = weight
        ties = self.skeleton.ties.items()
        return {target for target, source in ties if _has_same_values(live[target], live[source])}

    def _map_published_names(self, copies: set[str]) -> dict[str, str]:
        """The published name of each live one: of tied ones, that of the model's first."""
        canonical_names = dict(self.skeleton.canonical_names)
        for target in copies:
            source = self.skeleton.ties[target]
            canonical_names[target] = canonical_names[source] = next(
                n for n in canonical_names if n in (target, source)
            )
        return {
            live: self.skeleton.published_name_of(name) for live, name in canonical_names.items()
        }

    def _order_weights(self, names: Iterable[str]) -> dict[str, CheckpointTensor]:
        """The weights of the model, in its order; ModelError if the files lack one."""
        named = {weight.name: weight for weight in self.weights}
        if missing := [name for name in names if name not in named]:
            raise ModelError(f"{self.folder} lacks {len(missing)} weights, {missing[0]} among them")
        return {name: named[name] for name in names}

    def require_same_weights(self, live: Mapping[str, Tensor]) -> None:
        """Raise ModelError unless these are the weights that the files hold, by published names.

        What a model is made of besides its files, no store could be made again from.
        """
        found = {name: _format_kind(shape_of(t), t.dtype) for name, t in live.items()}
        expected = {name: _format_kind(w.shape, w.dtype) for name, w in self.parameters.items()}
        for name in sorted(found.keys() | expected.keys()):
            loaded, stored = found.get(name, "none"), expected.get(name, "none")
            if loaded != stored:
                raise ModelError(
                    f"{self.folder}: the loaded model is not what its files hold: {name}: "
                    f"loaded {loaded}, in the files {stored} (do options under model: change it?)"
                )
        if compute_fingerprint(live) != self.compute_fingerprint():
            raise ModelError(f"{self.folder}: the loaded model has other values than its files")

    def require_finite(self) -> None:
        """Raise ModelError for a weight with an entry that is no number; reads everything.

        It is looked at as the model has it: what a narrower dtype cannot hold, it makes infinite.
        """
        for name, weight in self.parameters.items():
            for first, piece in weight.iter_pieces():
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
        return {n: w.location.shape for n, w in self.parameters.items() if may_be_transposed(n)}

    def make_reading_record(self) -> dict[str, Any]:
        """What a store records of how this checkpoint's files are read."""
        reading = {"reading": self.reading} if self.reading else {}
        return {**reading, **layout_of(self.layout, self.layout)}

    def compute_fingerprint(self) -> str:
        """Return the fingerprint of the model that `load_base` makes of this folder."""
        return compute_identity(
            {n: (w.shape, w.dtype, w.read_sample()) for n, w in self.parameters.items()}
        )

    def compute_full_digest(self) -> str:
        """Return the full digest of that model; reads everything."""
        return compute_identity(
            {n: (w.shape, w.dtype, w.compute_digest()) for n, w in self.parameters.items()}
        )


def fetch_checkpoint(source: str | Path, revision: str | None = None, **reading: Any) -> Path:
    """Return the folder of a checkpoint, downloaded if `source` is a hub id."""
    if as_path(source, "a checkpoint").is_dir():
        return Path(source)
    if str(source).count("/") > 1 or str(source)[:1] in "/.":
        raise ModelError(f"{source}: there is no such folder")
    find_weight_files(str(source), revision, **reading)
    with raising_model_error(f"cannot get {source}"):
        found = huggingface_hub.snapshot_download(
            str(source), revision=revision, allow_patterns=_SETTINGS_PATTERNS
        )
    return Path(found)


def _locate_tensors(
    folder: Path, reading: Mapping[str, Any]
) -> dict[str, TensorLocation | MappedTensor]:
    """Where each tensor of a folder's files lies, by its key."""
    located: dict[str, TensorLocation | MappedTensor] = {}
    for file in find_weight_files(str(folder), **reading):
        if file.suffix == ".safetensors":
            located |= read_tensor_locations(file)
        else:
            located |= {
                key: MappedTensor(file, tensor) for key, tensor in map_tensors(file).items()
            }
    return located


def _dtype_of(located: Mapping[str, TensorLocation | MappedTensor]) -> torch.dtype:
    largest = max(located.values(), key=lambda place: place.size)
    return as_dtype(dtype_name(largest.dtype))


def _has_same_values(left: CheckpointTensor, right: CheckpointTensor) -> bool:
    """Whether two weights have the same numbers, which is when transformers ties them."""
    if left.shape != right.shape:
        return False
    pairs = zip(left.iter_pieces(), right.iter_pieces(), strict=True)
    return all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs)


def _format_kind(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{dtype_name(dtype)} {list(shape)}"
