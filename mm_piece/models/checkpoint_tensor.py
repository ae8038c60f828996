"""One tensor of a checkpoint's files, read slice by slice as the model has it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_piece.deltas.delta import (
    Delta,
    compute_identity,
    compute_stride,
)
from mm_piece.deltas.file_layout import may_be_transposed, transpose_positions
from mm_piece.dtypes import view_bits
from mm_piece.entries import read_entries, write_entries
from mm_piece.errors import MismatchError
from mm_piece.files.safetensors import MappedTensor, TensorLocation

Location = TensorLocation | MappedTensor


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint as the model has it: cast, and transposed if the file's one is.

    Casting is what `from_pretrained` does: floating-point tensors only. Published files of
    Qwen3-VL have its fused experts transposed.
    """

    key: str  # in the file
    name: str  # as published; empty for a tensor that is no weight of the model
    location: Location
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
        size = rows * columns
        for first, piece in self.location.iter_slices(size):
            cast = piece.to(self.dtype)
            matrix = cast.view(columns, rows)  # as in the file
            yield first, _flatten_transposed(matrix)

    def to_file_layout(self, piece: Tensor) -> Tensor:
        """Return one of the pieces of `iter_pieces` as the file has it."""
        if not self.is_transposed:
            return piece
        rows, columns = self.shape[-2:]
        matrix = piece.view(rows, columns)
        return _flatten_transposed(matrix)

    def read_entries(self, indices: Tensor) -> Tensor:
        """Return the entries at sorted flat indices; MismatchError beyond the tensor's end."""
        size = self.location.size
        last = -1
        if len(indices):
            last = int(indices[-1])

        if last >= size:
            raise MismatchError(f"{self.name} has {size} entries, a delta reaches past")

        found = [torch.empty(0, dtype=self.dtype)]  # sets the dtype of a tensor without entries
        for first, piece in self.iter_pieces():
            count = len(piece)
            local_indices, _ = slice_indices(indices, first, count)
            entries = read_entries(piece, local_indices)
            found.append(entries)
        return torch.cat(found)

    def read_sample(self) -> Tensor:
        """Return the entries of this tensor that a fingerprint covers."""
        size = self.location.size
        step = compute_stride(size)
        if not self.is_transposed:
            sample = self.location.sample_entries(step)
        else:
            positions = torch.arange(0, size, step)
            file_positions = transpose_positions(positions, self.shape)
            sample = self.location.read_entries(file_positions.tolist())
        return sample.to(self.dtype)

    def compute_digest(self) -> str:
        """Return the SHA-256 of the tensor's bit patterns, in hex."""
        sha = hashlib.sha256()
        for _, piece in self.iter_pieces():
            sha.update(_bytes_of(piece))
        return sha.hexdigest()

    def iter_patched(self, deltas: Sequence[Delta]) -> Iterator[Tensor]:
        """Yield the slices with `deltas` applied in order.

        Raises BaseError or OrderError, after the last slice, if a delta was made for other values
        than it found.
        """
        parts: list[_DeltaPart] = []
        for delta in deltas:
            if self.name in delta.indices:
                delta.require_tensor_kind(self.name, self.shape, self.dtype)
                part = _DeltaPart(self.name, delta)
                parts.append(part)

        for first, piece in self.iter_pieces():
            for part in parts:
                part.patch_slice(piece, first)
            yield piece

        for part in parts:
            part.require_before_digest()


def compute_weights_fingerprint(weights: Mapping[str, CheckpointTensor]) -> str:
    """Return the fingerprint of a base whose weights, by published names, are these."""
    samples = {}
    for name, weight in weights.items():
        samples[name] = (
            weight.shape,
            weight.dtype,
            weight.read_sample(),
        )
    return compute_identity(samples)


def find_layout(weights: Mapping[str, CheckpointTensor]) -> dict[str, tuple[int, ...]]:
    """Return shapes in the files, of the weights that files may have transposed."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in weights.items():
        if may_be_transposed(name):
            shapes[name] = weight.location.shape
    return shapes


class _DeltaPart:
    """A delta's entries of one tensor, written slice by slice.

    The delta records the digest of the entries that it replaces, as they were before.
    """

    def __init__(
        self,
        name: str,
        delta: Delta,
    ) -> None:
        self.name = name
        self.delta = delta
        self.before = hashlib.sha256()

    def patch_slice(
        self,
        piece: Tensor,
        first: int,
    ) -> None:
        """Write the delta's entries into the slice that begins at `first`, in place."""
        indices = self.delta.indices[self.name]
        values = self.delta.values[self.name]
        count = len(piece)
        local_indices, selected = slice_indices(indices, first, count)

        replaced = read_entries(piece, local_indices)
        self.before.update(_bytes_of(replaced))
        write_entries([(piece, local_indices, values[selected])])

    def require_before_digest(self) -> None:
        """Raise BaseError or OrderError if the delta was made for other values than it found."""
        digest = self.before.hexdigest()
        self.delta.require_before_digest(self.name, digest)


def slice_indices(
    indices: Tensor,
    first: int,
    count: int,
) -> tuple[Tensor, slice]:
    """Return the sorted indices that fall into a slice of a tensor, and their range in `indices`.

    The slice has `count` entries from `first` on; the returned indices are relative to it.
    """
    end = first + count
    bounds = torch.tensor([first, end], dtype=indices.dtype)
    edges = torch.searchsorted(indices, bounds)
    low, high = edges.tolist()
    selected = slice(low, high)
    wide_indices = indices[selected].to(torch.int64)
    return wide_indices - first, selected


def _flatten_transposed(matrix: Tensor) -> Tensor:
    transposed = matrix.t()
    return transposed.reshape(-1)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the tensor's bit patterns, in its memory."""
    bits = view_bits(tensor)
    return bits.numpy().data
