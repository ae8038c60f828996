"""The delta file, format version 1: a header and entries to bytes and back.

    pack      header, {name: (indices, values)}, codec -> bytes     deterministic
    Packer    the same, tensor by tensor, into a file               memory stays that of a tensor
    unpack    bytes -> header, {name: (indices, values)}            every field and length checked
    write     bytes -> disk                                         whole or not at all

A valid safetensors file whose first metadata field, `mm_piece`, is a JSON header that starts with
the SHA-256 of the rest of the file. `checkpoints/README.md` is the specification.
"""

import hashlib
import io
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mm_piece.deltas import codec as coding
from mm_piece.deltas import header as deltaheader
from mm_piece.deltas.header import DELTA_DTYPES, index_dtype
from mm_piece.dtypes import SAFETENSORS_NAMES, view_bits
from mm_piece.errors import DamageError, FormatError, format_value
from mm_piece.files import safetensors as tensorfile
from mm_piece.files.atomic import naming_errors
from mm_piece.files.safetensors import TensorSpec

Entries = dict[str, tuple[Tensor, Tensor]]  # name -> indices, values

OPENING = b'{"__metadata__":{"mm_piece":"{\\"sha256\\":\\"'
CHECKSUM_SLICE = slice(8 + len(OPENING), 8 + len(OPENING) + 64)
MAX_ENTRIES_PER_BYTE = 8  # entries per coded byte that a reader believes: what Huffman codes reach
# What reading a hostile file raises: broken layout, foreign dtype, overlong and overflowing shape.
PAYLOAD_ERRORS = (safetensors.SafetensorError, KeyError, TypeError, RuntimeError)

_CHUNK = 2**24  # bytes copied at a time


def pack_delta(header: Mapping[str, Any], entries: Entries, codec: str = "gap") -> bytes:
    """Return the file's content; the same delta gives the same bytes."""
    file = io.BytesIO()
    packer = DeltaPacker(io.BytesIO(), codec)
    for name, rows in entries.items():
        packer.add_tensor(name, *rows)
    packer.write_file(header, file)
    return file.getvalue()


class DeltaPacker:
    """Codes one tensor after another into a spool; `finish` writes the file around them."""

    def __init__(self, spool: BinaryIO, codec: str = "gap") -> None:
        self._encode, _ = _find_coders(codec)
        self._codec = codec
        self._spool = spool
        self._starts: dict[TensorSpec, int] = {}

    def add_tensor(self, name: str, indices: Tensor, values: Tensor) -> None:
        """Code the entries of one tensor."""
        for kind, row in zip(("indices", "values"), self._encode(indices, values), strict=True):
            dtype = SAFETENSORS_NAMES[row.dtype]
            self._starts[TensorSpec(f"{name}.{kind}", dtype, tuple(row.shape))] = self._spool.tell()
            self._spool.write(view_bits(row).numpy().data)

    def write_file(self, header: Mapping[str, Any], file: BinaryIO) -> None:
        """Write the whole file, then its seal into the place that was left for it."""
        rows = tensorfile.sort_tensor_specs(self._starts)
        text = deltaheader.serialise_header({"codec": self._codec, **header})
        opening = tensorfile.build_header(rows, {"mm_piece": text})
        sha = hashlib.sha256(opening[: CHECKSUM_SLICE.start] + opening[CHECKSUM_SLICE.stop :])
        file.write(opening)
        for row in rows:
            for chunk in self._iter_chunks(row):
                sha.update(chunk)
                file.write(chunk)
        file.seek(CHECKSUM_SLICE.start)
        file.write(sha.hexdigest().encode())

    def _iter_chunks(self, row: TensorSpec) -> Iterator[bytes]:
        self._spool.seek(self._starts[row])
        for first in range(0, row.nbytes, _CHUNK):
            yield self._spool.read(min(_CHUNK, row.nbytes - first))


def unpack_delta(data: bytes) -> tuple[dict[str, Any], Entries]:
    """Validate a file's content and return its header and entries."""
    if data[8 : CHECKSUM_SLICE.start] != OPENING:
        raise FormatError("not a delta file")
    header = deltaheader.parse_header(data)
    if (found := _compute_checksum(data)) != (expected := data[CHECKSUM_SLICE]):
        stored = expected.decode(errors="replace")
        raise DamageError(f"altered: expected SHA-256 {stored!r}, found {found.decode()!r}")
    deltaheader.require_valid_header(header)
    return header, _read_entries(data, header["tensors"], header["codec"])


@contextmanager
def packing_delta(path: Path, codec: str = "gap") -> Iterator[DeltaPacker]:
    """Open a packer whose spool lies beside the file to come, on the same disk."""
    try:
        spool = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - entered below
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    with naming_errors(path), spool:
        yield DeltaPacker(spool, codec)


def _compute_checksum(data: bytes) -> bytes:
    sha = hashlib.sha256(memoryview(data)[: CHECKSUM_SLICE.start])
    sha.update(memoryview(data)[CHECKSUM_SLICE.stop :])
    return sha.hexdigest().encode()


def _read_entries(data: bytes, records: dict[str, dict[str, Any]], codec: str) -> Entries:
    _, decode = _find_coders(codec)
    try:
        payload = safetensors.torch.load(data)
    except PAYLOAD_ERRORS as error:
        raise DamageError(f"not a sound safetensors file: {format_value(error)}") from error
    if payload.keys() != {f"{name}.{row}" for name in records for row in ("indices", "values")}:
        raise DamageError("the file's tensors are not those that its header names")
    entries = {}
    for name, record in records.items():
        try:
            rows = payload[f"{name}.indices"], payload[f"{name}.values"]
            entries[name] = decode(*rows, record)
        except DamageError as error:
            raise DamageError(f"{name}: {error}") from error
    return entries


def _encode_gap(indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    patterns = view_bits(values).numpy().view(f"<u{values.itemsize}")
    rows = coding.encode_indices(indices.numpy()), coding.encode_values(patterns)
    if len(indices) > MAX_ENTRIES_PER_BYTE * sum(map(len, rows)):
        rows = coding.encode_indices(indices.numpy(), runs=False), rows[1]
    first, second = (torch.frombuffer(bytearray(row), dtype=torch.uint8) for row in rows)
    return first, second


def _decode_gap(indices: Tensor, values: Tensor, record: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if any(row.dtype != torch.uint8 or row.ndim != 1 for row in (indices, values)):
        raise DamageError("coded rows are bytes")
    entries, size, dtype = (
        record["entries"],
        math.prod(record["shape"]),
        DELTA_DTYPES[record["dtype"]],
    )
    if entries > MAX_ENTRIES_PER_BYTE * (len(indices) + len(values)):
        raise DamageError(f"{entries} entries are promised in {len(indices) + len(values)} bytes")
    positions = coding.decode_indices(indices.numpy().data, entries, size)
    patterns = coding.decode_values(values.numpy().data, entries, dtype.itemsize)
    new = torch.from_numpy(patterns.view(f"<i{dtype.itemsize}")).view(dtype)
    return torch.from_numpy(positions).to(index_dtype(size)), new


def _encode_raw(indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return indices.clone(), values.clone()  # safetensors refuses rows that share memory


def _decode_raw(indices: Tensor, values: Tensor, record: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if values.shape != (record["entries"],) or values.dtype != DELTA_DTYPES[record["dtype"]]:
        raise DamageError("the values are not of the number and dtype that the header names")
    return indices, values


def _find_coders(codec: str) -> tuple[Any, Any]:
    if codec not in CODECS:
        raise FormatError(f"unknown codec {format_value(codec)}; known: {', '.join(CODECS)}")
    return CODECS[codec]


CODECS = {"gap": (_encode_gap, _decode_gap), "raw": (_encode_raw, _decode_raw)}
