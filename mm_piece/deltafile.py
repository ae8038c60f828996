"""The delta file, format version 1: a header and entries to bytes and back.

    pack      header, {name: (indices, values)}, codec -> bytes     deterministic
    unpack    bytes -> header, {name: (indices, values)}            every field and length checked
    write     bytes -> disk                                         whole or not at all

A valid safetensors file whose first metadata field, `mm_piece`, is a JSON header that starts with
the SHA-256 of the rest of the file. `checkpoints/README.md` is the specification.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mm_piece import codec as coding
from mm_piece.errors import DamageError, FormatError

Entries = dict[str, tuple[Tensor, Tensor]]  # name -> indices, values

FORMAT = "1"
OPENING = b'{"__metadata__":{"mm_piece":"{\\"sha256\\":\\"'
SEAL = slice(8 + len(OPENING), 8 + len(OPENING) + 64)
HEADER = {key: str for key in ("sha256", "format", "codec", "task", "base", "parent")}
HEADER |= {"info": dict, "tensors": dict}
RECORD = {"shape": list, "dtype": str, "entries": int, "before": str}
# What reading a hostile file raises: broken layout, foreign dtype, overlong and overflowing shape.
PAYLOAD_ERRORS = (safetensors.SafetensorError, KeyError, TypeError, RuntimeError)

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def bits(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as a flat row of same-size integers, sharing its memory."""
    return tensor.detach().view(-1).view(BITS[tensor.itemsize])


def index_dtype(size: int) -> torch.dtype:
    """Return the dtype of flat indices into a tensor of `size` entries."""
    return torch.int32 if size < 2**31 else torch.int64


def pack(header: dict[str, Any], entries: Entries, codec: str = "gap") -> bytes:
    """Return the file's content; the same delta gives the same bytes."""
    encode, _ = _coders(codec)
    coded = {name: encode(*rows) for name, rows in entries.items()}
    payload = {f"{name}.indices": rows[0] for name, rows in coded.items()}
    payload |= {f"{name}.values": rows[1] for name, rows in coded.items()}
    text = _header_text({"format": FORMAT, "codec": codec, **header})
    data = safetensors.torch.save(payload, {"mm_piece": text})
    return data[: SEAL.start] + _digest_around_seal(data) + data[SEAL.stop :]


def unpack(data: bytes) -> tuple[dict[str, Any], Entries]:
    """Validate a file's content and return its header and entries."""
    if data[8 : SEAL.start] != OPENING:
        raise FormatError("not a delta file")
    header = _parse_header(data)
    if type(header) is not dict or header.get("format") != FORMAT:
        raise FormatError(f"a delta of an unknown format version; known: {FORMAT}")
    if data[SEAL] != _digest_around_seal(data):
        raise DamageError("truncated or altered: the SHA-256 inside is not that of the file")
    _require_fields("header", header, HEADER)
    for name, record in header["tensors"].items():
        _require_plausible(name, record)
    return header, _read_entries(data, header["tensors"], header["codec"])


def write(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, even after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
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


def _header_text(header: dict[str, Any]) -> str:
    """Return the header as JSON, with an empty seal in front, where its place is known."""
    try:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError(f"the header is not plain JSON: {error}") from error
    return f'{{"sha256":"{"0" * 64}",{text[1:]}'


def _parse_header(data: bytes) -> Any:
    length = int.from_bytes(data[:8], "little")
    try:
        return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["mm_piece"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamageError(f"truncated or altered header: {error}") from error


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
