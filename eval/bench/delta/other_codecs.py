"""Other codecs of a sparse change, each a pair of functions: delta to bytes and back.

They store the same indices and values as ours. A baseline decodes as far as it takes to have both:
not all of them return a delta.
"""

import io
import math
import zlib
from collections.abc import Callable
from importlib import import_module, util
from typing import Any

import numpy as np

from mm_piece.deltas.delta import Delta
from mm_piece.dtypes import view_bits

BaselineCodec = tuple[Callable[[Delta], bytes], Callable[[bytes, Delta], Any]]


def baseline_codecs() -> dict[str, BaselineCodec | None]:
    """Return the baselines by name, None for one that is not installed."""
    return {
        "int32 + values, safetensors": (lambda delta: delta.to_bytes("raw"), _from_raw),
        "int32 + values, zstd 3": _make_zstd_codec(3),
        "int32 + values, zstd 19": _make_zstd_codec(19),
        "int32 + values, savez_compressed": (_to_npz, _from_npz),
        "bitmask zlib + values": (_to_bitmask, _from_bitmask),
    }


def _from_raw(data: bytes, delta: Delta) -> Delta:
    return Delta.from_bytes(data)


def _make_zstd_codec(level: int) -> BaselineCodec | None:
    if not util.find_spec("zstandard"):
        return None
    zstandard = import_module("zstandard")

    def encode(delta: Delta) -> bytes:
        parts = []
        for indices, values in _pattern_rows(delta).values():
            parts += [_to_bytes(indices), _to_bytes(values)]
        compressor = zstandard.ZstdCompressor(level=level)
        return compressor.compress(b"".join(parts))

    def decode(data: bytes, delta: Delta) -> np.ndarray:
        raw = zstandard.ZstdDecompressor().decompress(data)
        return np.frombuffer(raw, np.uint8)

    return encode, decode


def _to_npz(delta: Delta) -> bytes:
    rows = {}
    for name, (indices, values) in _pattern_rows(delta).items():
        rows[f"{name}.0"] = indices
        rows[f"{name}.1"] = values
    file = io.BytesIO()
    np.savez_compressed(file, **rows)
    return file.getvalue()


def _from_npz(data: bytes, delta: Delta) -> list[np.ndarray]:
    with np.load(io.BytesIO(data)) as file:
        return [file[name] for name in file.files]


def _to_bitmask(delta: Delta) -> bytes:
    """Return for each tensor the length of its mask, the compressed mask, and the values."""
    parts = []
    for name, (indices, values) in _pattern_rows(delta).items():
        size = math.prod(delta.shapes[name])
        mask = np.zeros(size, np.uint8)
        mask[indices] = 1
        coded = zlib.compress(np.packbits(mask).data)
        length = len(coded).to_bytes(8, "little")
        parts += [length, coded, _to_bytes(values)]
    return b"".join(parts)


def _from_bitmask(data: bytes, delta: Delta) -> list[tuple[np.ndarray, bytes]]:
    found = []
    start = 0
    for name, values in delta.values.items():
        begin = start + 8
        length = int.from_bytes(data[start:begin], "little")
        stop = begin + length

        coded = zlib.decompress(data[begin:stop])
        packed = np.frombuffer(coded, np.uint8)
        size = math.prod(delta.shapes[name])
        mask = np.unpackbits(packed, count=size)
        indices = np.flatnonzero(mask)

        start = stop + len(values) * values.itemsize
        found.append((indices, data[stop:start]))
    return found


def _pattern_rows(delta: Delta) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return each tensor's indices, and the bit patterns of its values."""
    rows = {}
    for name, index in delta.indices.items():
        patterns = view_bits(delta.values[name])
        rows[name] = (index.numpy(), patterns.numpy())
    return rows


def _to_bytes(row: np.ndarray) -> bytes:
    return row.tobytes()
