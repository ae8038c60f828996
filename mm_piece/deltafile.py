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
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mm_piece import codec as coding
from mm_piece import tensorfile
from mm_piece.errors import DamageError, FormatError, TruncatedError
from mm_piece.tensorfile import Row, bits

Entries = dict[str, tuple[Tensor, Tensor]]  # name -> indices, values

FORMAT = "1"
OPENING = b'{"__metadata__":{"mm_piece":"{\\"sha256\\":\\"'
SEAL = slice(8 + len(OPENING), 8 + len(OPENING) + 64)
HEADER = {key: str for key in ("sha256", "format", "codec", "task", "base", "parent")}
HEADER |= {"info": dict, "tensors": dict}
RECORD = {"shape": list, "dtype": str, "entries": int, "before": str}
# What reading a hostile file raises: broken layout, foreign dtype, overlong and overflowing shape.
PAYLOAD_ERRORS = (safetensors.SafetensorError, KeyError, TypeError, RuntimeError)

_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8", "U8")
DTYPES = {name: tensorfile.DTYPES[name] for name in _TYPES}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 2**24  # bytes copied at a time


def index_dtype(size: int) -> torch.dtype:
    """Return the dtype of flat indices into a tensor of `size` entries."""
    return torch.int32 if size < 2**31 else torch.int64


def pack(header: Mapping[str, Any], entries: Entries, codec: str = "gap") -> bytes:
    """Return the file's content; the same delta gives the same bytes."""
    file = io.BytesIO()
    packer = Packer(io.BytesIO(), codec)
    for name, rows in entries.items():
        packer.add(name, *rows)
    packer.finish(header, file)
    return file.getvalue()


class Packer:
    """Codes one tensor after another into a spool; `finish` writes the file around them."""

    def __init__(self, spool: BinaryIO, codec: str = "gap") -> None:
        self._encode, _ = _coders(codec)
        self._codec = codec
        self._spool = spool
        self._starts: dict[Row, int] = {}

    def add(self, name: str, indices: Tensor, values: Tensor) -> None:
        """Code the entries of one tensor."""
        for kind, row in zip(("indices", "values"), self._encode(indices, values), strict=True):
            dtype = tensorfile.NAMES[row.dtype]
            self._starts[Row(f"{name}.{kind}", dtype, tuple(row.shape))] = self._spool.tell()
            self._spool.write(bits(row).numpy().data)

    def finish(self, header: Mapping[str, Any], file: BinaryIO) -> None:
        """Write the whole file, then its seal into the place that was left for it."""
        rows = tensorfile.ordered(self._starts)
        text = _header_text({"format": FORMAT, "codec": self._codec, **header})
        opening = tensorfile.header(rows, {"mm_piece": text})
        sha = hashlib.sha256(opening[: SEAL.start] + opening[SEAL.stop :])
        file.write(opening)
        for row in rows:
            for chunk in self._chunks(row):
                sha.update(chunk)
                file.write(chunk)
        file.seek(SEAL.start)
        file.write(sha.hexdigest().encode())

    def _chunks(self, row: Row) -> Iterator[bytes]:
        self._spool.seek(self._starts[row])
        for first in range(0, row.nbytes, _CHUNK):
            yield self._spool.read(min(_CHUNK, row.nbytes - first))


def unpack(data: bytes) -> tuple[dict[str, Any], Entries]:
    """Validate a file's content and return its header and entries."""
    if data[8 : SEAL.start] != OPENING:
        raise FormatError("not a delta file")
    header = _parse_header(data)
    if type(header) is not dict or header.get("format") != FORMAT:
        raise FormatError(f"a delta of an unknown format version; known: {FORMAT}")
    if (found := _digest_around_seal(data)) != (expected := data[SEAL]):
        said = expected.decode(errors="replace")
        raise DamageError(f"altered: expected SHA-256 {said!r}, found {found.decode()!r}")
    _require_fields("header", header, HEADER)
    for name, record in header["tensors"].items():
        _require_plausible(name, record)
    return header, _read_entries(data, header["tensors"], header["codec"])


def write(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, even after a power cut."""
    with writing(path) as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is there whole once the block ends, and not at all if it raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def packing(path: Path, codec: str = "gap") -> Iterator[Packer]:
    """Open a packer whose spool lies beside the file to come, on the same disk."""
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        yield Packer(spool, codec)


def _header_text(header: dict[str, Any]) -> str:
    """Return the header as JSON, with an empty seal in front, where its place is known."""
    try:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError(f"the header is not plain JSON: {error}") from error
    return f'{{"sha256":"{"0" * 64}",{text[1:]}'


def _parse_header(data: bytes) -> Any:
    """Return the JSON that `mm_piece` holds, once the file is as long as its header promises."""
    start = 8 + int.from_bytes(data[:8], "little")
    _require_length(data, start)
    try:
        content = json.loads(data[8:start])
        header = json.loads(content.pop("__metadata__")["mm_piece"])
        ends = [int(record["data_offsets"][1]) for record in content.values()]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError) as error:
        raise DamageError(f"altered header: {error}") from error
    _require_length(data, start + max(ends, default=0))
    return header


def _require_length(data: bytes, expected: int) -> None:
    if len(data) < expected:
        raise TruncatedError(f"truncated: {expected} bytes expected, {len(data)} found")


def _digest_around_seal(data: bytes) -> bytes:
    sha = hashlib.sha256(memoryview(data)[: SEAL.start])
    sha.update(memoryview(data)[SEAL.stop :])
    return sha.hexdigest().encode()


def _require_fields(name: str, record: Any, fields: dict[str, type]) -> None:
    found = {key: type(value) for key, value in record.items()} if type(record) is dict else {}
    if found != fields:
        raise DamageError(f"{name}: expected the fields {', '.join(fields)}, each of its type")


def _require_plausible(name: str, record: Any) -> None:
    _require_fields(name, record, RECORD)
    shape, entries, dtype = record["shape"], record["entries"], record["dtype"]
    if dtype not in DTYPES:
        raise DamageError(f"{name}: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not all(type(length) is int and length >= 0 for length in shape):
        raise DamageError(f"{name}: {shape} is no shape")
    if not 0 <= entries <= math.prod(shape) <= coding.LARGEST_SIZE:
        raise DamageError(f"{name}: a tensor of shape {shape} has no {entries} entries to change")


def _read_entries(data: bytes, records: dict[str, dict[str, Any]], codec: str) -> Entries:
    _, decode = _coders(codec)
    try:
        payload = safetensors.torch.load(data)
    except PAYLOAD_ERRORS as error:
        raise DamageError(f"not a sound safetensors file: {error}") from error
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
    patterns = bits(values).numpy().view(f"<u{values.itemsize}")
    rows = coding.encode_indices(indices.numpy()), coding.encode_values(patterns)
    first, second = (torch.frombuffer(bytearray(row), dtype=torch.uint8) for row in rows)
    return first, second


def _decode_gap(indices: Tensor, values: Tensor, record: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if any(row.dtype != torch.uint8 or row.ndim != 1 for row in (indices, values)):
        raise DamageError("coded rows are bytes")
    entries, size, dtype = record["entries"], math.prod(record["shape"]), DTYPES[record["dtype"]]
    where = coding.decode_indices(indices.numpy().data, entries, size)
    patterns = coding.decode_values(values.numpy().data, entries, dtype.itemsize)
    new = torch.from_numpy(patterns.view(f"<i{dtype.itemsize}")).view(dtype)
    return torch.from_numpy(where).to(index_dtype(size)), new


def _encode_raw(indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return indices.clone(), values.clone()  # safetensors refuses rows that share memory


def _decode_raw(indices: Tensor, values: Tensor, record: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if values.shape != (record["entries"],) or values.dtype != DTYPES[record["dtype"]]:
        raise DamageError("the values are not of the number and dtype that the header names")
    return indices, values


def _coders(codec: str) -> tuple[Any, Any]:
    if codec not in CODECS:
        raise FormatError(f"unknown codec {codec!r}; known: {', '.join(CODECS)}")
    return CODECS[codec]


CODECS = {"gap": (_encode_gap, _decode_gap), "raw": (_encode_raw, _decode_raw)}
