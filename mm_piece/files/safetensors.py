"""Safetensors files piece by piece: read slices of a tensor.

The safetensors library maps a file into memory, where every page that was read stays. A checkpoint
larger than memory is read in slices instead. The format: `files.tensor_specs`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from mm_piece.dtypes import SAFETENSORS_DTYPES, view_bits
from mm_piece.errors import ModelError
from mm_piece.files.strict_json import parse_json
from mm_piece.files.tensor_specs import TensorRecord

SLICE_ENTRIES = 2**22  # entries of a slice: large enough for full speed, a few MiB
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts
_PAGE_BYTES = 2**12  # what a disk reads at least

# What reading a damaged or hostile header raises.
_HEADER_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
)


class OpenTensors(Protocol):
    """A file that the safetensors library has opened, which does not say types itself."""

    def __enter__(self) -> "OpenTensors": ...

    def __exit__(self, kind: object, error: object, trace: object, /) -> object: ...

    def metadata(self) -> dict[str, str] | None:
        """Return the texts of the header."""
        ...

    def keys(self) -> list[str]:
        """Return the tensors' names."""
        ...

    def get_tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        ...


def open_tensors(file: Path) -> OpenTensors:
    """Open a file with the safetensors library, to read its tensors one by one."""
    return safe_open(file, "pt")


@dataclass(frozen=True)
class TensorLocation:
    """The place of one tensor in a file; `start` counts bytes from the file's beginning."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        return self.size * self.dtype.itemsize

    def iter_slices(
        self,
        max_entries: int = SLICE_ENTRIES,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield flat slices of at most `max_entries`, each with the position of its first entry.

        Raises ModelError if the file ends early.
        """
        # unbuffered: bytes go straight into the tensor's memory
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for first in range(0, self.size, max_entries):
                count = min(max_entries, self.size - first)
                piece = torch.empty(count, dtype=self.dtype)
                _read_exactly(file, _byte_view(piece).data, self.file)
                yield first, piece

    def sample_entries(self, step: int) -> Tensor:
        """Return the entries 0, `step`, 2·`step`, …, reading little but them."""
        if step * self.dtype.itemsize >= _PAGE_BYTES:
            return self.read_entries(range(0, self.size, step))

        # several samples lie in each page, so all is read anyway
        samples: list[Tensor] = []
        for first, piece in self.iter_slices():
            offset = -first % step  # from the slice's first entry to the next multiple of `step`
            samples.append(piece[offset::step])
        if not samples:
            return torch.empty(0, dtype=self.dtype)
        return torch.cat(samples)

    def read_entries(self, positions: Sequence[int]) -> Tensor:
        """Return the entries at flat positions, in that order, reading them one by one."""
        itemsize = self.dtype.itemsize
        found = torch.empty(len(positions), dtype=self.dtype)
        buffers = np.reshape(_byte_view(found), (len(found), itemsize))
        with self.file.open("rb", buffering=0) as file:
            for position, buffer in zip(positions, buffers, strict=True):
                file.seek(self.start + position * itemsize)
                _read_exactly(file, buffer.data, self.file)
        return found


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a file in another format, mapped into memory, with a `TensorLocation`'s methods.

    `iter_slices`, `sample_entries` and `read_entries` return copies.
    """

    file: Path
    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its entries."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.tensor.numel()

    def iter_slices(
        self,
        max_entries: int = SLICE_ENTRIES,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield flat slices of at most `max_entries`, each with the position of its first entry."""
        flat = self.tensor.reshape(-1)
        for first in range(0, self.size, max_entries):
            piece = flat[first : first + max_entries]
            yield first, piece.clone()  # a slice may be written to

    def sample_entries(self, step: int) -> Tensor:
        """Return the entries 0, `step`, 2·`step`, …."""
        flat = self.tensor.reshape(-1)
        return flat[::step].clone()

    def read_entries(self, positions: Sequence[int]) -> Tensor:
        """Return the entries at flat positions, in that order."""
        flat = self.tensor.reshape(-1)
        index = torch.tensor(positions, dtype=torch.int64)
        return flat[index]


def read_tensor_locations(path: Path) -> dict[str, TensorLocation]:
    """Return the place of each tensor of a file; raise ModelError unless the file is sound."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = b""  # refused below, as no JSON
            # a damaged file may claim any length
            if length <= _MAX_HEADER_BYTES:
                text = file.read(length)
            end = file.seek(0, 2)

        content = parse_json(text)
        content.pop("__metadata__", None)
        found: dict[str, TensorLocation] = {}
        for name, record in content.items():
            found[name] = _parse_location(path, 8 + length, record)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except _HEADER_ERRORS as error:
        raise ModelError(f"{path}: not a sound safetensors file: {error}") from error

    for name, location in found.items():
        if location.start + location.nbytes > end:
            raise ModelError(f"{path}: truncated: {name} reaches past the {end} bytes of the file")
    return found


def _parse_location(
    path: Path,
    origin: int,
    record: TensorRecord,
) -> TensorLocation:
    """Return the place that a header's record gives; offsets in it count from `origin`."""
    if record["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"dtype {record['dtype']!r}; known: {', '.join(SAFETENSORS_DTYPES)}")

    first, last = record["data_offsets"]
    location = TensorLocation(
        file=path,
        dtype=SAFETENSORS_DTYPES[record["dtype"]],
        shape=tuple(record["shape"]),
        start=origin + first,
    )
    # min() comes first: it refuses a shape with text in it, of which a product might be huge
    is_negative = min((first, *location.shape)) < 0
    if is_negative or last - first != location.nbytes:
        raise ValueError(f"{record} is no place of a tensor")
    return location


def _byte_view(tensor: Tensor) -> NDArray[np.uint8]:
    """Return a tensor's memory as a row of bytes."""
    single_bytes: NDArray[np.uint8] = view_bits(tensor).view(torch.uint8).numpy()
    return single_bytes


def _read_exactly(
    file: FileIO,
    buffer: memoryview,
    path: Path,
) -> None:
    """Fill a buffer from a file; raise ModelError if the file ends before."""
    # one read returns at most 2 GiB
    while len(buffer):
        count = file.readinto(buffer)
        if not count:
            raise ModelError(f"{path}: truncated: it ended while a tensor was read")
        buffer = buffer[count:]
