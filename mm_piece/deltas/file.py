"""The delta file, format version 1: a header and entries to bytes and back.

    pack_delta      header, {name: (indices, values)}, codec -> bytes   deterministic
    packing_delta   the same, tensor by tensor, into a file             in the memory of one tensor
    unpack_delta    bytes -> header, {name: (indices, values)}          every field checked

A valid safetensors file whose first metadata field, `mm_piece`, is a JSON header that starts with
the SHA-256 of the rest of the file. `checkpoints/README.md` is the specification.
"""

import hashlib
import io
import math
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mm_piece.deltas import codec as coding
from mm_piece.deltas import header as deltaheader
from mm_piece.deltas.header import DELTA_DTYPES, DeltaHeader, TensorRecord, index_dtype
from mm_piece.dtypes import SAFETENSORS_NAMES, view_bits
from mm_piece.errors import DamageError, FormatError, format_value
from mm_piece.files import safetensors as tensorfile
from mm_piece.files.atomic import naming_errors
from mm_piece.files.safetensors import TensorSpec

Entries = dict[str, tuple[Tensor, Tensor]]  # name -> indices, values
# indices, values -> coded rows, and back
Encoder = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Decoder = Callable[[Tensor, Tensor, TensorRecord], tuple[Tensor, Tensor]]

# What stands between the header's length (8 bytes) and the checksum (64 hex digits).
OPENING = b'{"__metadata__":{"mm_piece":"{\\"sha256\\":\\"'
_CHECKSUM_START = 8 + len(OPENING)
CHECKSUM_SLICE = slice(_CHECKSUM_START, _CHECKSUM_START + 64)
MAX_ENTRIES_PER_BYTE = 8  # entries per coded byte that a reader believes: what Huffman codes reach
# What reading a hostile file raises: broken layout, foreign dtype, overlong and overflowing shape.
PAYLOAD_ERRORS = (
    safetensors.SafetensorError,
    KeyError,
    TypeError,
    RuntimeError,
)

_CHUNK = 2**24  # bytes copied at a time


def pack_delta(
    header: Mapping[str, object],
    entries: Entries,
    codec: str = "gap",
) -> bytes:
    """Return the file's content; the same delta gives the same bytes."""
    file = io.BytesIO()
    packer = DeltaPacker(io.BytesIO(), codec)
    for name, (indices, values) in entries.items():
        packer.add_tensor(name, indices, values)
    packer.write_file(header, file)
    return file.getvalue()


class DeltaPacker:
    """A writer that codes one tensor after another into a spool, then the file around them."""

    def __init__(
        self,
        spool: BinaryIO,
        codec: str = "gap",
    ) -> None:
        self._encode, _ = _find_coders(codec)
        self._codec = codec
        self._spool = spool
        self._starts: dict[TensorSpec, int] = {}  # where each coded row begins in the spool

    def add_tensor(
        self,
        name: str,
        indices: Tensor,
        values: Tensor,
    ) -> None:
        """Code the entries of one tensor."""
        coded_indices, coded_values = self._encode(indices, values)
        self._spool_row(f"{name}.indices", coded_indices)
        self._spool_row(f"{name}.values", coded_values)

    def _spool_row(self, key: str, row: Tensor) -> None:
        spec = TensorSpec(
            name=key,
            dtype=SAFETENSORS_NAMES[row.dtype],
            shape=tuple(row.shape),
        )
        self._starts[spec] = self._spool.tell()
        bits = view_bits(row)
        self._spool.write(bits.numpy().data)

    def write_file(
        self,
        header: Mapping[str, object],
        file: BinaryIO,
    ) -> None:
        """Write the whole file, then its checksum into the place that the header leaves for it."""
        specs = tensorfile.sort_tensor_specs(self._starts)
        text = deltaheader.serialise_header({"codec": self._codec, **header})
        opening = tensorfile.build_header(specs, {"mm_piece": text})
        file.write(opening)

        # the checksum covers all bytes but its own
        sha = hashlib.sha256(opening[: CHECKSUM_SLICE.start])
        sha.update(opening[CHECKSUM_SLICE.stop :])
        for spec in specs:
            for chunk in self._iter_chunks(spec):
                sha.update(chunk)
                file.write(chunk)

        file.seek(CHECKSUM_SLICE.start)
        file.write(sha.hexdigest().encode())

    def _iter_chunks(self, spec: TensorSpec) -> Iterator[bytes]:
        """Yield the bytes of one coded row."""
        self._spool.seek(self._starts[spec])
        for first in range(0, spec.nbytes, _CHUNK):
            size = min(_CHUNK, spec.nbytes - first)
            yield self._spool.read(size)


def unpack_delta(data: bytes) -> tuple[DeltaHeader, Entries]:
    """Validate a file's content and return its header and entries.

    Raises FormatError for another format or version, DamageError for altered content.
    """
    if data[8 : CHECKSUM_SLICE.start] != OPENING:
        raise FormatError("not a delta file")

    # the checksum comes second, so that a truncated file is called truncated and not altered;
    # fields come last, as only a checksum that fits shows that a writer meant them so
    header = deltaheader.parse_header(data)
    expected = data[CHECKSUM_SLICE]
    found = _compute_checksum(data)
    if found != expected:
        stored = expected.decode(errors="replace")
        raise DamageError(f"altered: expected SHA-256 {stored!r}, found {found.decode()!r}")

    deltaheader.require_valid_header(header)
    entries = _read_entries(data, header["tensors"], header["codec"])
    return header, entries


@contextmanager
def packing_delta(
    path: Path,
    codec: str = "gap",
) -> Generator[DeltaPacker]:
    """Open a packer whose spool lies beside the file to come, on the same disk."""
    try:
        spool = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - entered below
    except OSError as error:
        # the original names the temporary file, or none
        raise OSError(
            error.errno,
            error.strerror,
            str(path),
        ) from error

    with naming_errors(path), spool:
        yield DeltaPacker(spool, codec)


def _compute_checksum(data: bytes) -> bytes:
    """Return the SHA-256, in hex, of all bytes but those of the checksum itself."""
    view = memoryview(data)  # a slice of it copies nothing
    sha = hashlib.sha256(view[: CHECKSUM_SLICE.start])
    sha.update(view[CHECKSUM_SLICE.stop :])
    return sha.hexdigest().encode()


def _read_entries(
    data: bytes,
    records: Mapping[str, TensorRecord],
    codec: str,
) -> Entries:
    """Decode the entries of every tensor; `records` are the header's."""
    _, decode = _find_coders(codec)
    try:
        payload = safetensors.torch.load(data)
    except PAYLOAD_ERRORS as error:
        raise DamageError(f"not a sound safetensors file: {format_value(error)}") from error

    expected = {f"{name}.{row}" for name in records for row in ("indices", "values")}
    if payload.keys() != expected:
        raise DamageError("the file's tensors are not those that its header names")

    entries: Entries = {}
    for name, record in records.items():
        coded_indices = payload[f"{name}.indices"]
        coded_values = payload[f"{name}.values"]
        try:
            entries[name] = decode(coded_indices, coded_values, record)
        except DamageError as error:
            raise DamageError(f"{name}: {error}") from error
    return entries


def _encode_gap(
    indices: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor]:
    """Code a tensor's entries as two rows of bytes."""
    flat_indices = indices.numpy()
    coded_indices = coding.encode_indices(flat_indices)
    bits = view_bits(values).numpy()
    patterns = np.frombuffer(bits.data, f"<u{values.itemsize}")
    coded_values = coding.encode_values(patterns)

    # without runs an index takes a bit at least, so that the reader's bound holds
    num_bytes = len(coded_indices) + len(coded_values)
    if len(indices) > MAX_ENTRIES_PER_BYTE * num_bytes:
        coded_indices = coding.encode_indices(flat_indices, runs=False)

    return _to_byte_tensor(coded_indices), _to_byte_tensor(coded_values)


def _to_byte_tensor(coded: bytes) -> Tensor:
    # a bytearray, since torch warns about memory that is read-only
    return torch.frombuffer(bytearray(coded), dtype=torch.uint8)


def _decode_gap(
    indices: Tensor,
    values: Tensor,
    record: TensorRecord,
) -> tuple[Tensor, Tensor]:
    """Decode a tensor's entries from two rows of bytes."""
    for row in (indices, values):
        if row.dtype != torch.uint8 or row.ndim != 1:
            raise DamageError("coded rows are bytes")

    num_entries = record["entries"]
    num_bytes = len(indices) + len(values)
    # before anything is allocated: a small file may not claim much memory
    if num_entries > MAX_ENTRIES_PER_BYTE * num_bytes:
        raise DamageError(f"{num_entries} entries are promised in {num_bytes} bytes")

    size = math.prod(record["shape"])
    dtype = DELTA_DTYPES[record["dtype"]]
    positions = coding.decode_indices(
        indices.numpy().data,
        count=num_entries,
        size=size,
    )
    patterns = coding.decode_values(
        values.numpy().data,
        count=num_entries,
        width=dtype.itemsize,
    )

    # as signed integers: torch supports unsigned ones of two bytes and more only in part
    bits = torch.as_tensor(np.frombuffer(patterns.data, f"<i{dtype.itemsize}"))
    flat_indices = torch.as_tensor(positions)
    return flat_indices.to(index_dtype(size)), bits.view(dtype)


def _encode_raw(
    indices: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor]:
    return indices.clone(), values.clone()  # safetensors refuses rows that share memory


def _decode_raw(
    indices: Tensor,
    values: Tensor,
    record: TensorRecord,
) -> tuple[Tensor, Tensor]:
    expected_shape = (record["entries"],)
    expected_dtype = DELTA_DTYPES[record["dtype"]]
    if values.shape != expected_shape or values.dtype != expected_dtype:
        raise DamageError("the values are not of the number and dtype that the header names")
    return indices, values


def _find_coders(codec: str) -> tuple[Encoder, Decoder]:
    if codec not in CODECS:
        raise FormatError(f"unknown codec {format_value(codec)}; known: {', '.join(CODECS)}")
    return CODECS[codec]


# name -> encoder, decoder of one tensor's entries
CODECS: dict[str, tuple[Encoder, Decoder]] = {
    "gap": (_encode_gap, _decode_gap),
    "raw": (_encode_raw, _decode_raw),
}
