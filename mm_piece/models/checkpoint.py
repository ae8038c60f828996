"""A checkpoint folder as a stream of weights: published names, one dtype, slice by slice.

Only one slice is in memory at a time, so that a checkpoint of any size goes through. Files may have
a weight *transposed*, with its last two dimensions swapped, see `deltas.file_layout`.
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

_Location = TensorLocation | MappedTensor

_SETTINGS_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint as the model has it: cast, and transposed if the file's one is.

    Casting is what `from_pretrained` does: floating-point tensors only. Published files of
    Qwen3-VL have its fused experts transposed.
    """

    key: str  # in the file
    name: str  # as published; empty for a tensor that is no weight of the model
    location: _Location
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def is_transposed(self) -> bool:
        """Whether the file has the last two dimensions swapped."""
        return self.location.shape != self.shape

    def iter_pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield flat slices with the position of their first entry."""
        if not self.is_transposed:
            for first, piece in self.location.iter_slices():
                yield first, piece.to(self.dtype)
            return

        # One matrix at a time: swapping dimensions moves no entry to another matrix.
        rows, columns = self.shape[-2:]
        for first, piece in self.location.iter_slices(rows * columns):
            matrix = piece.to(self.dtype).view(columns, rows)  # (columns, rows), as in the file
            yield first, matrix.t().reshape(-1)

    def to_file_layout(self, piece: Tensor) -> Tensor:
        """Return one of the pieces of `iter_pieces` as the file has it."""
        if not self.is_transposed:
            return piece
        matrix = piece.view(self.shape[-2:])  # (rows, columns)
        return matrix.t().reshape(-1)

    def read_entries(self, indices: Tensor) -> Tensor:
        """Return the entries at sorted flat indices; MismatchError beyond the tensor's end."""
        last = int(indices[-1]) if len(indices) else -1
        if last >= self.location.size:
            raise MismatchError(
                f"{self.name} has {self.location.size} entries, a delta reaches past"
            )

        found = [torch.empty(0, dtype=self.dtype)]  # sets the dtype of a tensor without entries
        for first, piece in self.iter_pieces():
            local_indices, _ = slice_indices(indices, first, len(piece))
            found.append(gather_entries(piece, local_indices))
        return torch.cat(found)

    def read_sample(self) -> Tensor:
        """Return the entries of this tensor that a fingerprint covers."""
        step = compute_stride(self.location.size)
        if not self.is_transposed:
            return self.location.sample_entries(step).to(self.dtype)

        positions = torch.arange(0, self.location.size, step)
        file_positions = transpose_positions(positions, self.shape)
        sample = self.location.gather_entries(file_positions.tolist())
        return sample.to(self.dtype)

    def compute_digest(self) -> str:
        """Return the SHA-256 of the tensor's bit patterns, in hex."""
        sha = hashlib.sha256()
        for _, piece in self.iter_pieces():
            sha.update(view_bits(piece).numpy().data)
        return sha.hexdigest()

    def iter_patched(self, deltas: Sequence[Delta]) -> Iterator[Tensor]:
        """Yield the slices with `deltas` applied in order.

        Raises BaseError or OrderError, after the last slice, if a delta was made for other values
        than it found.
        """
        deltas = [delta for delta in deltas if self.name in delta.indices]
        for delta in deltas:
            delta.require_tensor_kind(self.name, self.shape, self.dtype)

        # Each delta records the digest of the entries that it replaces, as they were before.
        digests = [hashlib.sha256() for _ in deltas]
        for first, piece in self.iter_pieces():
            for delta, sha in zip(deltas, digests, strict=True):
                indices = delta.indices[self.name]
                local_indices, selected = slice_indices(indices, first, len(piece))
                before = gather_entries(piece, local_indices)
                sha.update(view_bits(before).numpy().data)
                after = delta.values[self.name][selected]
                set_entries(piece, local_indices, after)
            yield piece

        for delta, sha in zip(deltas, digests, strict=True):
            delta.require_before_digest(self.name, sha.hexdigest())


def slice_indices(indices: Tensor, first: int, count: int) -> tuple[Tensor, slice]:
    """Return the sorted indices that fall into a slice of a tensor, and their range in `indices`.

    The slice has `count` entries from `first` on; the returned indices are relative to it.
    """
    edges = torch.tensor([first, first + count], dtype=indices.dtype)
    low, high = torch.searchsorted(indices, edges).tolist()
    selected = slice(low, high)
    return indices[selected].to(torch.int64) - first, selected


class Checkpoint:
    """The weights of a folder as `from_pretrained` loads them, in the order of its files.

    A weight's *live name* is its name in the model that transformers builds.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str | torch.dtype | None = None,
        **reading: Any,
    ) -> None:
        """Read the headers of the folder's files.

        `dtype` is what the weights are cast to, by default their own. `reading` are options of
        `READING_OPTIONS`. Raises ModelError for what cannot be loaded.
        """
        self.root = folder
        self.reading = reading
        self.folder = folder / reading.get("subfolder", "")

        located = _locate_tensors(folder, reading)
        self.dtype = _dtype_of(located) if dtype is None else as_dtype(dtype)
        self.skeleton = load_skeleton(folder, self.dtype, **reading)
        self.family = self.skeleton.family

        found = [self._to_live_tensor(key, location) for key, location in located.items()]
        copies = self._find_tied_copies(found)
        names = self._map_published_names(copies)
        # Ties of the configuration whose two values differ in the files.
        self.has_untied = bool(self.skeleton.ties.keys() - copies)

        self.weights = [
            replace(weight, name=names.get(weight.name, ""))
            for weight in found
            if weight.name not in copies
        ]
        published_names = dict.fromkeys(names.values())
        self.parameters = self._order_weights(published_names)

        self.tied: dict[str, str] = {}  # published name -> that of the weight it is tied to
        for live, name in names.items():
            other = self.skeleton.published_name_of(live)
            if other != name:
                self.tied[other] = name

    def _to_live_tensor(self, key: str, location: _Location) -> CheckpointTensor:
        """Return a tensor of the files under its live name; under none if it is no weight."""
        name, can_transpose = self.skeleton.find_live_name(key)
        if name is None:
            dtype = self.dtype if location.dtype.is_floating_point else location.dtype
            return CheckpointTensor(key, "", location, dtype, location.shape)

        shape, dtype = self.skeleton.shapes_and_dtypes[name]
        is_transposed = can_transpose and location.shape == transpose_shape(shape)
        if location.shape != shape and not is_transposed:
            found = list(location.shape)
            expected = list(shape)
            raise ModelError(f"{location.file}: {key} is {found}, the model has {expected}")
        return CheckpointTensor(key, name, location, dtype, shape)

    def _find_tied_copies(self, found: Sequence[CheckpointTensor]) -> set[str]:
        """Return the live names that the configuration ties and the files have a second time.

        Where the two values differ, transformers does not tie them, whatever the configuration
        says.
        """
        live: dict[str, CheckpointTensor] = {}
        for weight in found:
            if weight.name in live:
                keys = f"{live[weight.name].key} and {weight.key}"
                raise ModelError(f"{self.folder} holds {weight.name} twice: as {keys}")
            if weight.name:
                live[weight.name] = weight

        copies: set[str] = set()
        for target, source in self.skeleton.ties.items():
            if _has_same_values(live[target], live[source]):
                copies.add(target)
        return copies

    def _map_published_names(self, copies: set[str]) -> dict[str, str]:
        """Return the published name of each live one; tied ones share that of the model's first."""
        canonical_names = dict(self.skeleton.canonical_names)
        for target in copies:
            source = self.skeleton.ties[target]
            # In the order of the model, which is that of `canonical_names`.
            first = next(name for name in canonical_names if name in (target, source))
            canonical_names[target] = first
            canonical_names[source] = first

        published: dict[str, str] = {}
        for live, canonical in canonical_names.items():
            published[live] = self.skeleton.published_name_of(canonical)
        return published

    def _order_weights(self, names: Iterable[str]) -> dict[str, CheckpointTensor]:
        """Return the weights of the model, in its order; ModelError if the files lack one."""
        named = {weight.name: weight for weight in self.weights}
        missing = [name for name in names if name not in named]
        if missing:
            raise ModelError(f"{self.folder} lacks {len(missing)} weights, {missing[0]} among them")
        return {name: named[name] for name in names}

    def require_same_weights(self, live: Mapping[str, Tensor]) -> None:
        """Raise ModelError unless these are the weights in the files, by published names.

        A store could not be rebuilt from a model that has anything besides its files.
        """
        found: dict[str, str] = {}
        for name, tensor in live.items():
            found[name] = _format_kind(shape_of(tensor), tensor.dtype)
        expected: dict[str, str] = {}
        for name, weight in self.parameters.items():
            expected[name] = _format_kind(weight.shape, weight.dtype)

        for name in sorted(found.keys() | expected.keys()):
            loaded = found.get(name, "none")
            stored = expected.get(name, "none")
            if loaded != stored:
                raise ModelError(
                    f"{self.folder}: the loaded model is not what its files hold: {name}: "
                    f"loaded {loaded}, in the files {stored} (do options under model: change it?)"
                )

        # Names, shapes and dtypes agree. Values may still differ, as far as a sample shows.
        if compute_fingerprint(live) != self.compute_fingerprint():
            raise ModelError(f"{self.folder}: the loaded model has other values than its files")

    def require_finite(self) -> None:
        """Raise ModelError for a weight with an infinite or NaN entry; reads everything.

        The entries are those of the model: a number that a narrower dtype cannot represent has
        become infinite.
        """
        for name, weight in self.parameters.items():
            for first, piece in weight.iter_pieces():
                low, high = piece.aminmax()  # one pass; a NaN makes both NaN
                if low.isfinite() and high.isfinite():
                    continue

                not_finite = ~piece.isfinite()
                at = int(not_finite.nonzero()[0])
                dtype = dtype_name(piece.dtype)
                raise ModelError(
                    f"{self.folder}: {name} holds {float(piece[at])} in {dtype} (entry "
                    f"{first + at}), which no training can use; mend the base's weights, or "
                    "take another dtype if their files hold finite ones"
                )

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the files, of the weights that files may have transposed."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, weight in self.parameters.items():
            if may_be_transposed(name):
                shapes[name] = weight.location.shape
        return shapes

    def make_reading_record(self) -> dict[str, Any]:
        """Return what a store records of how this checkpoint's files are read."""
        record: dict[str, Any] = {}
        if self.reading:
            record["reading"] = self.reading
        record |= layout_of(self.layout, self.layout)
        return record

    def compute_fingerprint(self) -> str:
        """Return the fingerprint of the model that `load_base` makes of this folder."""
        samples = {
            name: (weight.shape, weight.dtype, weight.read_sample())
            for name, weight in self.parameters.items()
        }
        return compute_identity(samples)

    def compute_full_digest(self) -> str:
        """Return the full digest of that model; reads everything."""
        digests = {
            name: (weight.shape, weight.dtype, weight.compute_digest())
            for name, weight in self.parameters.items()
        }
        return compute_identity(digests)


def fetch_checkpoint(
    source: str | Path,
    revision: str | None = None,
    **reading: Any,
) -> Path:
    """Return the folder of a checkpoint, downloaded if `source` is a hub id."""
    if as_path(source, "a checkpoint").is_dir():
        return Path(source)

    hub_id = str(source)
    if hub_id.count("/") > 1 or hub_id[:1] in "/.":
        raise ModelError(f"{source}: there is no such folder")

    # Finding the files of weights downloads them; settings and tokenizer come after.
    find_weight_files(hub_id, revision, **reading)
    with raising_model_error(f"cannot get {source}"):
        folder = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=_SETTINGS_PATTERNS,
        )
    return Path(folder)


def _locate_tensors(folder: Path, reading: Mapping[str, Any]) -> dict[str, _Location]:
    """Return where each tensor of a folder's files is, by its key."""
    located: dict[str, _Location] = {}
    for file in find_weight_files(str(folder), **reading):
        if file.suffix == ".safetensors":
            located |= read_tensor_locations(file)
            continue
        for key, tensor in map_tensors(file).items():
            located[key] = MappedTensor(file, tensor)
    return located


def _dtype_of(located: Mapping[str, _Location]) -> torch.dtype:
    """Return the dtype of a checkpoint: that of its largest tensor."""
    largest = max(located.values(), key=lambda location: location.size)
    return as_dtype(dtype_name(largest.dtype))


def _has_same_values(left: CheckpointTensor, right: CheckpointTensor) -> bool:
    """Return whether two weights have the same numbers, which is when transformers ties them."""
    if left.shape != right.shape:
        return False

    pairs = zip(left.iter_pieces(), right.iter_pieces(), strict=True)
    return all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs)


def _format_kind(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{dtype_name(dtype)} {list(shape)}"
