"""Other ways to store a sparse change, each as a pair of functions: delta to bytes and back.

Indices and values are the same as ours; what a rival decodes to is as near to them as it stores.
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
    """Return the rivals by name, None for what is not installed."""
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
        rows = [row for pair in _pattern_rows(delta).values() for row in pair]
        return zstandard.ZstdCompressor(level=level).compress(b"".join(map(_to_bytes, rows)))

    def decode(data: bytes, delta: Delta) -> np.ndarray:
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint8)

    return encode, decode


def _to_npz(delta: Delta) -> bytes:
    file = io.BytesIO()
    rows = {
        f"{name}.{n}": row
        for name, pair in _pattern_rows(delta).items()
        for n, row in enumerate(pair)
    }
    np.savez_compressed(file, **rows)
    return file.getvalue()


def _from_npz(data: bytes, delta: Delta) -> list[np.ndarray]:
    with np.load(io.BytesIO(data)) as file:
        return [file[name] for name in file.files]


def _to_bitmask(delta: Delta) -> bytes:
    parts = []
    for name, (indices, values) in _pattern_rows(delta).items():
        mask = np.zeros(math.prod(delta.shapes[name]), np.uint8)
        mask[indices] = 1
        coded = zlib.compress(np.packbits(mask))
        parts += [len(coded).to_bytes(8, "little"), coded, _to_bytes(values)]
    return b"".join(parts)


def _from_bitmask(data: bytes, delta: Delta) -> list[tuple[np.ndarray, bytes]]:
    found, start = [], 0
    for name, values in delta.values.items():
        stop = start + 8 + int.from_bytes(data[start : start + 8], "little")
        mask = np.frombuffer(zlib.decompress(data[start + 8 : stop]), np.uint8)
        indices = np.flatnonzero(np.unpackbits(mask, count=math.prod(delta.shapes[name])))
        start = stop + len(values) * values.itemsize
        found.append((indices, data[stop:start]))
    return found


def _pattern_rows(delta: Delta) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        name: (index.numpy(), view_bits(delta.values[name]).numpy())
        for name, index in delta.indices.items()
    }


def _to_bytes(row: np.ndarray) -> bytes:
    return row.tobytes()
