"""The header of a delta file and what it may hold; checked whenever one is written or read."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from mm_piece.deltas.codec import MAX_TENSOR_SIZE
from mm_piece.errors import (
    DamageError,
    FormatError,
    TruncatedError,
    format_value,
)
from mm_piece.files.strict_json import is_object, parse_json
from mm_piece.stored_dtypes import STORED_DTYPES

FORMAT_VERSION = "1"
HEADER_FIELDS = {
    "sha256": str,
    "format": str,
    "codec": str,
    "task": str,
    "base": str,
    "parent": str,
    "info": dict,
    "tensors": dict,
}
TENSOR_FIELDS = {
    "shape": list,
    "dtype": str,
    "entries": int,
    "before": str,
}
_DTYPE_NAMES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
)
DELTA_DTYPES = {name: STORED_DTYPES[name] for name in _DTYPE_NAMES}
MAX_NAME_LENGTH = 200  # characters of a task's or a tensor's name
_MAX_NDIM = 64  # what PyTorch has
_SHA256 = re.compile(r"[0-9a-f]{64}")


class TensorRecord(TypedDict):
    """What a header says of one tensor: `TENSOR_FIELDS`."""

    shape: list[int]
    dtype: str
    entries: int
    before: str


class DeltaHeader(TypedDict):
    """What a file's header says: `HEADER_FIELDS`."""

    sha256: str
    format: str
    codec: str
    task: str
    base: str
    parent: str
    info: dict[str, Any]
    tensors: dict[str, TensorRecord]


def make_tensor_record(
    shape: Sequence[int],
    dtype: str,
    entries: int,
    before: str,
) -> TensorRecord:
    """Build one tensor's record for a delta file's header."""
    return {
        "shape": list(shape),
        "dtype": dtype,
        "entries": entries,
        "before": before,
    }


def serialise_header(header: Mapping[str, object]) -> str:
    """Return a header as JSON, with 64 zeros in front, where the checksum's place is known.

    Raises FormatError for what is not plain JSON, DamageError for what no reader would accept.
    """
    content = {"format": FORMAT_VERSION, **header}
    require_valid_header({"sha256": "", **content})
    try:
        plain = json.dumps(
            content,
            sort_keys=True,
            separators=(",", ":"),
            allow_nan=False,
        )
        parse_json(plain)  # names that are no text, such as 1 and "1", may have become one
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"the header is not plain JSON: {format_value(error)}") from error

    # by hand, since sorted keys would put the checksum last
    empty_checksum = "0" * 64
    return f'{{"sha256":"{empty_checksum}",{plain[1:]}'


def parse_header(data: bytes) -> DeltaHeader:
    """Return what `mm_piece` holds, of a known version, in a file as long as it promises to be.

    All else about its fields is for `require_valid_header` to check.
    Raises TruncatedError, DamageError, FormatError.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    _require_length(data, start)
    try:
        content = parse_json(data[8:start])
        metadata = content.pop("__metadata__")
        header: DeltaHeader = parse_json(metadata["mm_piece"])

        end = 0
        for record in content.values():
            # bounded, since a message cannot show an integer of thousands of digits
            end = max(end, min(int(record["data_offsets"][1]), 2**63))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError) as error:
        raise DamageError(f"altered header: {format_value(error)}") from error

    _require_length(data, start + end)
    if not _is_of_known_version(header):
        raise FormatError(f"a delta of an unknown format version; known: {FORMAT_VERSION}")
    return header


def require_valid_header(header: Mapping[str, Any]) -> None:
    """Raise DamageError unless a header has every field as it must be."""
    _require_fields("header", header, HEADER_FIELDS)
    _require_name("task", header["task"])

    for key in ("base", "parent"):
        is_first = key == "parent" and not header[key]  # a delta from the base has no parent
        if not is_first and not _SHA256.fullmatch(header[key]):
            raise DamageError(f"{key} is {format_value(header[key])}; expected a SHA-256 in hex")

    for name, record in header["tensors"].items():
        _require_name("a tensor", name)
        _require_plausible(name, record)


def _is_of_known_version(header: object) -> bool:
    return is_object(header) and header.get("format") == FORMAT_VERSION


def _require_length(data: bytes, expected: int) -> None:
    if len(data) < expected:
        raise TruncatedError(f"truncated: {expected} bytes expected, {len(data)} found")


def _require_fields(
    name: str,
    record: object,
    fields: dict[str, type],
) -> None:
    """Raise DamageError unless a record has exactly these fields, each of exactly its type."""
    found: dict[str, type] = {}
    if is_object(record):
        # types by identity: a bool is no int here
        found = {key: type(value) for key, value in record.items()}
    if found != fields:
        raise DamageError(f"{name}: expected the fields {', '.join(fields)}, each of its type")


def _require_name(what: str, name: str) -> None:
    """Raise DamageError unless a name can stand in a message's line."""
    if not (name.isprintable() and 1 <= len(name) <= MAX_NAME_LENGTH):
        allowed = f"1 to {MAX_NAME_LENGTH} printable characters"
        raise DamageError(f"{what} is called {format_value(name)}; allowed: {allowed}")


def _require_plausible(name: str, record: Any) -> None:
    """Raise DamageError unless a tensor of the record's shape can have the entries it promises."""
    _require_fields(name, record, TENSOR_FIELDS)
    shape = record["shape"]
    entries = record["entries"]
    dtype = record["dtype"]
    if dtype not in DELTA_DTYPES:
        raise DamageError(
            f"{name}: unknown dtype {format_value(dtype)}; known: {', '.join(DELTA_DTYPES)}"
        )

    lengths = all(type(length) is int and 0 <= length <= MAX_TENSOR_SIZE for length in shape)
    if not lengths or len(shape) > _MAX_NDIM:
        raise DamageError(f"{name}: {format_value(shape)} is no shape")
    if not 0 <= entries <= math.prod(shape) <= MAX_TENSOR_SIZE:
        place = f"a tensor of shape {format_value(shape)}"
        raise DamageError(f"{name}: {place} has no {format_value(entries)} entries to change")

    before = record["before"]
    if not _SHA256.fullmatch(before):
        raise DamageError(f"{name}: before is {format_value(before)}; expected a SHA-256 in hex")
