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
from typing import BinaryIO, TypedDict

import numpy as np
import safetensors

from mm_piece.deltas import codec as coding
from mm_piece.deltas import header as deltaheader
from mm_piece.deltas.header import DELTA_DTYPES, DeltaHeader, TensorRecord
from mm_piece.deltas.rows import (
    Indices,
    ValueRow,
    index_dtype_name,
    naming_tensor,
    require_index_type,
)
from mm_piece.errors import DamageError, FormatError, format_value
from mm_piece.files import tensor_specs
from mm_piece.files.atomic import naming_errors
from mm_piece.files.tensor_specs import TensorSpec
from mm_piece.stored_dtypes import STORED_DTYPES

EntryRows = dict[str, tuple[Indices, ValueRow]]  # by tensor's name
# indices, values -> coded rows, and back
Encoder = Callable[[Indices, ValueRow], tuple[ValueRow, ValueRow]]
Decoder = Callable[[ValueRow, ValueRow, TensorRecord], tuple[Indices, ValueRow]]

# What stands between the header's length (8 bytes) and the checksum (64 hex digits).
OPENING = b'{"__metadata__":{"mm_piece":"{\\"sha256\\":\\"'
_CHECKSUM_START = 8 + len(OPENING)
CHECKSUM_SLICE = slice(_CHECKSUM_START, _CHECKSUM_START + 64)
MAX_ENTRIES_PER_BYTE = 8  # entries per coded byte that a reader believes: what Huffman codes reach
# What reading a hostile file raises: broken layout, foreign dtype, overlong and overflowing shape.
_PAYLOAD_ERRORS = (
    safetensors.SafetensorError,
    KeyError,
    ValueError,
    OverflowError,
)
_INDEX_DTYPES = {"int32": "I32", "int64": "I64"}  # as safetensors files call them

_CHUNK = 2**24  # bytes copied at a time


class _SerializedTensor(TypedDict):
    """A tensor as the safetensors library returns it."""

    dtype: str
    shape: list[int]
    data: bytearray


def pack_delta(
    header: Mapping[str, object],
    entries: EntryRows,
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
        indices: Indices,
        values: ValueRow,
    ) -> None:
        """Code the entries of one tensor."""
        coded_indices, coded_values = self._encode(indices, values)
        self._spool_row(f"{name}.indices", coded_indices)
        self._spool_row(f"{name}.values", coded_values)

    def _spool_row(self, key: str, row: ValueRow) -> None:
        spec = TensorSpec(
            name=key,
            dtype=row.dtype,
            shape=row.bits.shape,
        )
        self._starts[spec] = self._spool.tell()
        self._spool.write(np.ascontiguousarray(row.bits).data)

    def write_file(
        self,
        header: Mapping[str, object],
        file: BinaryIO,
    ) -> None:
        """Write the whole file, then its checksum into the place that the header leaves for it."""
        specs = tensor_specs.sort_tensor_specs(self._starts)
        text = deltaheader.serialise_header({"codec": self._codec, **header})
        opening = tensor_specs.build_header(specs, {"mm_piece": text})
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


def unpack_delta(data: bytes) -> tuple[DeltaHeader, EntryRows]:
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
) -> EntryRows:
    """Decode the entries of every tensor; `records` are the header's."""
    _, decode = _find_coders(codec)
    payload = _read_payload(data)
    expected = {f"{name}.{row}" for name in records for row in ("indices", "values")}
    if payload.keys() != expected:
        raise DamageError("the file's tensors are not those that its header names")

    entries: EntryRows = {}
    for name, record in records.items():
        coded_indices = payload[f"{name}.indices"]
        coded_values = payload[f"{name}.values"]
        with naming_tensor(name):
            entries[name] = decode(coded_indices, coded_values, record)
    return entries


def _read_payload(data: bytes) -> dict[str, ValueRow]:
    """Return the tensors of a safetensors file as bit patterns, by their names there."""
    payload: dict[str, ValueRow] = {}
    try:
        for name, tensor in _deserialize(data):
            dtype = tensor["dtype"]
            itemsize = STORED_DTYPES[dtype].itemsize
            flat = np.frombuffer(tensor["data"], f"<u{itemsize}")
            payload[name] = ValueRow(dtype, flat.reshape(tensor["shape"]))
    except _PAYLOAD_ERRORS as error:
        raise DamageError(f"not a sound safetensors file: {format_value(error)}") from error
    return payload


def _deserialize(data: bytes) -> list[tuple[str, _SerializedTensor]]:
    """Return the tensors of a safetensors file; the library does not say types itself."""
    return safetensors.deserialize(data)  # type: ignore[no-any-return]


def _encode_gap(
    indices: Indices,
    values: ValueRow,
) -> tuple[ValueRow, ValueRow]:
    """Code a tensor's entries as two rows of bytes."""
    coded_indices = coding.encode_indices(indices)
    coded_values = coding.encode_values(values.bits)

    # without runs an index takes a bit at least, so that the reader's bound holds
    num_bytes = len(coded_indices) + len(coded_values)
    if len(indices) > MAX_ENTRIES_PER_BYTE * num_bytes:
        coded_indices = coding.encode_indices(indices, runs=False)

    return _to_byte_row(coded_indices), _to_byte_row(coded_values)


def _to_byte_row(coded: bytes) -> ValueRow:
    return ValueRow("U8", np.frombuffer(coded, np.uint8))


def _decode_gap(
    indices: ValueRow,
    values: ValueRow,
    record: TensorRecord,
) -> tuple[Indices, ValueRow]:
    """Decode a tensor's entries from two rows of bytes."""
    for row in (indices, values):
        if row.dtype != "U8" or row.bits.ndim != 1:
            raise DamageError("coded rows are bytes")

    num_entries = record["entries"]
    num_bytes = len(indices.bits) + len(values.bits)
    # before anything is allocated: a small file may not claim much memory
    if num_entries > MAX_ENTRIES_PER_BYTE * num_bytes:
        raise DamageError(f"{num_entries} entries are promised in {num_bytes} bytes")

    size = math.prod(record["shape"])
    dtype = record["dtype"]
    positions = coding.decode_indices(
        indices.bits.data,
        count=num_entries,
        size=size,
    )
    patterns = coding.decode_values(
        values.bits.data,
        count=num_entries,
        width=DELTA_DTYPES[dtype].itemsize,
    )
    flat_indices = positions.astype(index_dtype_name(size), copy=False)
    return flat_indices, ValueRow(dtype, patterns)


def _encode_raw(
    indices: Indices,
    values: ValueRow,
) -> tuple[ValueRow, ValueRow]:
    unsigned = indices.view(f"<u{indices.itemsize}")
    return ValueRow(_INDEX_DTYPES[indices.dtype.name], unsigned), values


def _decode_raw(
    indices: ValueRow,
    values: ValueRow,
    record: TensorRecord,
) -> tuple[Indices, ValueRow]:
    expected_shape = (record["entries"],)
    if values.bits.shape != expected_shape or values.dtype != record["dtype"]:
        raise DamageError("the values are not of the number and dtype that the header names")

    size = math.prod(record["shape"])
    require_index_type(indices.type, size)
    return indices.bits.view(index_dtype_name(size)), values


def _find_coders(codec: str) -> tuple[Encoder, Decoder]:
    if codec not in CODECS:
        raise FormatError(f"unknown codec {format_value(codec)}; known: {', '.join(CODECS)}")
    return CODECS[codec]


# name -> encoder, decoder of one tensor's entries
CODECS: dict[str, tuple[Encoder, Decoder]] = {
    "gap": (_encode_gap, _decode_gap),
    "raw": (_encode_raw, _decode_raw),
}
