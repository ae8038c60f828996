"""Safetensors files piece by piece: read slices of a tensor, lay out a file before its data exist.

The safetensors library maps a file into memory, where every page that was read stays, and writes
what is whole in memory. Checkpoints larger than memory need both without that; the format is short:
8 bytes of length, a JSON header of names, dtypes, shapes and offsets, the data.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_piece.dtypes import SAFETENSORS_DTYPES, view_bits
from mm_piece.errors import ModelError
from mm_piece.files.strict_json import parse_json

SLICE_ENTRIES = 2**22  # entries of a slice: large enough for full speed, a few MiB
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts

_DTYPE_ORDER = {name: rank for rank, name in enumerate(SAFETENSORS_DTYPES)}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written: its name, dtype (as in safetensors) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of its data in bytes."""
        return math.prod(self.shape) * SAFETENSORS_DTYPES[self.dtype].itemsize


def sort_tensor_specs(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return rows in the order in which the safetensors library lays them out."""
    return sorted(specs, key=lambda row: (_DTYPE_ORDER[row.dtype], row.name))


def build_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return the opening of a file whose data are those of `rows`, in this order."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for spec in specs:
        stop = start + spec.nbytes
        record = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, stop]}
        content[spec.name] = record
        start = stop
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class TensorLocation:
    """Where a file holds one tensor; `start` counts bytes from the file's beginning."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)

    def iter_slices(self, max_entries: int = SLICE_ENTRIES) -> Iterator[tuple[int, Tensor]]:
        """Yield flat slices of at most `most` entries with the position of their first entry.

        Raises ModelError if the file ends early.
        """
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for first in range(0, self.size, max_entries):
                piece = torch.empty(min(max_entries, self.size - first), dtype=self.dtype)
                _read_exactly(file, view_bits(piece).numpy().view("u1"), self.file)
                yield first, piece

    def sample_entries(self, step: int) -> Tensor:
        """Return the entries 0, `step`, 2·`step`, …, reading little but them."""
        if step * self.dtype.itemsize < 2**12:  # closer than pages are: read all
            slices = [piece[-first % step :: step] for first, piece in self.iter_slices()]
            return torch.cat(slices) if slices else torch.empty(0, dtype=self.dtype)
        return self.gather_entries(range(0, self.size, step))

    def gather_entries(self, positions: Sequence[int]) -> Tensor:
        """Return the entries at flat positions, in that order, reading them one by one."""
        found = torch.empty(len(positions), dtype=self.dtype)
        buffers = view_bits(found).numpy().view("u1").reshape(len(found), self.dtype.itemsize)
        with self.file.open("rb", buffering=0) as file:
            for position, buffer in zip(positions, buffers, strict=True):
                file.seek(self.start + position * self.dtype.itemsize)
                _read_exactly(file, buffer, self.file)
        return found


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a file in another format, which its reader has mapped into memory: a `Place`."""

    file: Path
    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of its entries."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        return tuple(self.tensor.shape)

    @property
    def size(self) -> int:
        """Return the number of entries."""
        return self.tensor.numel()

    def iter_slices(self, max_entries: int = SLICE_ENTRIES) -> Iterator[tuple[int, Tensor]]:
        """Yield flat slices of at most `most` entries with the position of their first entry."""
        flat = self.tensor.reshape(-1)
        for first in range(0, self.size, max_entries):
            yield first, flat[first : first + max_entries].clone()  # a slice may be written to

    def sample_entries(self, step: int) -> Tensor:
        """Return the entries 0, `step`, 2·`step`, …."""
        return self.tensor.reshape(-1)[::step].clone()

    def gather_entries(self, positions: Sequence[int]) -> Tensor:
        """Return the entries at flat positions, in that order."""
        return self.tensor.reshape(-1)[torch.tensor(positions, dtype=torch.int64)]


def read_tensor_locations(path: Path) -> dict[str, TensorLocation]:
    """Return where a file holds each of its tensors; ModelError for what is no sound file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _MAX_HEADER_BYTES else b""
            end = file.seek(0, 2)
        content = parse_json(text)
        content.pop("__metadata__", None)
        found = {
            name: _parse_location(path, 8 + length, record) for name, record in content.items()
        }
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not a sound safetensors file: {error}") from error
    for name, location in found.items():
        if location.start + location.size * location.dtype.itemsize > end:
            raise ModelError(f"{path}: truncated: {name} reaches past the {end} bytes of the file")
    return found


def _parse_location(path: Path, origin: int, record: dict[str, Any]) -> TensorLocation:
    if record["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"dtype {record['dtype']!r}; known: {', '.join(SAFETENSORS_DTYPES)}")
    location = TensorLocation(
        path, SAFETENSORS_DTYPES[record["dtype"]], tuple(record["shape"]), origin
    )
    first, last = record["data_offsets"]
    if min((first, *location.shape)) < 0 or last - first != location.size * location.dtype.itemsize:
        raise ValueError(f"{record} is no place of a tensor")
    return TensorLocation(path, location.dtype, location.shape, origin + first)


def _read_exactly(file: Any, buffer: Any, path: Path) -> None:
    """Read exactly as many bytes as `row` has; one read returns at most 2 GiB."""
    view = memoryview(buffer)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise ModelError(f"{path}: truncated: it ended while a tensor was read")
        view = view[count:]
