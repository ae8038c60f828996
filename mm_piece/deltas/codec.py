"""Integers and bit patterns to compact bytes and back, exactly.

    plane    one byte of every number     kind (1 byte: raw or deflate), then the bytes
    values   width planes, lowest first   so that exponents meet exponents and mantissas mantissas
    gaps     values of 1, 2, 4 or 8 bytes all ones = "the rest follows", at twice the width
    indices  first width (1 byte), gaps   gap = how many entries lie between two neighbours

Only numpy and zlib. A plane of mantissas is noise and stays raw; the others are Huffman coded.
Decoders know how much must come out, never inflate further, and raise `DamageError` otherwise.
"""

import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mm_piece.errors import DamageError

RAW, DEFLATE = 0, 1
MEMORY_LEVEL = 9  # longer blocks, fewer Huffman tables
WIDTHS = (1, 2, 4, 8)
SLICE = 2**20  # gaps at a time
MAX_TENSOR_SIZE = 2**62  # below it no sum of a position and a gap leaves int64


def encode_indices(indices: NDArray[np.signedinteger], runs: bool = True) -> bytes:
    """Code sorted, unique, non-negative indices; without `runs` in at least a bit each."""
    slices = _GapSlices(indices)
    width = _choose_width(slices, indices.size)
    symbols = np.empty(indices.size, f"<u{width}")
    escaped = [np.empty(0, np.int64)]
    first = 0
    for gaps in slices:
        symbol_slice = np.minimum(gaps, _escape_symbol(width))
        symbols[first : first + gaps.size] = symbol_slice
        escaped.append(gaps[symbol_slice == _escape_symbol(width)] - _escape_symbol(width))
        first += gaps.size
    rest = np.concatenate(escaped)
    coded = bytes([width]) + encode_values(symbols, runs)
    return coded + _encode_gaps(rest, 2 * width) if rest.size else coded


def decode_indices(data: bytes | memoryview, count: int, size: int) -> NDArray[np.int64]:
    """Decode `count` sorted, unique indices, all of them below `size`."""
    width = data[0] if len(data) else 0
    if width not in WIDTHS or size > MAX_TENSOR_SIZE:
        raise DamageError(f"index width {width} (known: {WIDTHS}) or tensor size {size} is unsound")
    indices, rest = _read_gaps(memoryview(data)[1:], count, width)
    _require_no_rest(rest)
    indices += 1
    np.cumsum(indices, out=indices)
    indices -= 1
    if count and indices.max() >= size:
        raise DamageError(f"an index lies outside a tensor of {size} entries")
    return indices


def encode_values(values: NDArray[np.unsignedinteger], runs: bool = True) -> bytes:
    """Code unsigned integers of 1, 2, 4 or 8 bytes, plane by plane."""
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(values.size, values.itemsize)
    return b"".join(_encode_plane(np.ascontiguousarray(plane), runs) for plane in planes.T)


def decode_values(data: bytes | memoryview, count: int, width: int) -> NDArray[np.unsignedinteger]:
    """Decode `count` unsigned integers of `width` bytes."""
    values, rest = _read_values(memoryview(data), count, width)
    _require_no_rest(rest)
    return values


class _GapSlices:
    """The gaps of a row of indices, slice by slice: memory stays that of one."""

    def __init__(self, indices: NDArray[np.signedinteger]) -> None:
        self._indices = indices
        self._cached_gaps = [_compute_gaps(indices, 0)] if 0 < indices.size <= SLICE else None

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        if self._cached_gaps is not None:  # a short row is worked out once
            return iter(self._cached_gaps)
        starts = range(0, self._indices.size, SLICE)
        return (_compute_gaps(self._indices, first) for first in starts)


def _compute_gaps(indices: NDArray[np.signedinteger], first: int) -> NDArray[np.int64]:
    last = int(indices[first - 1]) if first else -1
    gaps = np.diff(indices[first : first + SLICE].astype(np.int64), prepend=last) - 1
    if gaps.min() < 0:
        raise ValueError("indices must be sorted, unique and not negative")
    return gaps


def _choose_width(slices: _GapSlices, count: int) -> int:
    """Return the narrowest width that holds at least half of the gaps.

    A common escape is one cheap symbol, but Huffman codes cannot spend less than a bit on it.
    """
    fitting = (sum(np.count_nonzero(gaps < _escape_symbol(w)) for gaps in slices) for w in WIDTHS)
    return next(width for width, fit in zip(WIDTHS, fitting, strict=True) if 2 * fit >= count)


def _escape_symbol(width: int) -> int:
    """Return the symbol of `width` bytes that says: the rest follows, at twice the width."""
    return 2 ** (8 * width) - 1 if width < WIDTHS[-1] else MAX_TENSOR_SIZE


def _encode_gaps(gaps: NDArray[np.int64], width: int) -> bytes:
    symbols = np.minimum(gaps, _escape_symbol(width))
    escaped = gaps[symbols == _escape_symbol(width)] - _escape_symbol(width)
    coded = encode_values(symbols.astype(f"<u{width}"))
    return coded + _encode_gaps(escaped, 2 * width) if escaped.size else coded


def _read_gaps(data: memoryview, count: int, width: int) -> tuple[NDArray[np.int64], memoryview]:
    symbols, data = _read_values(data, count, width)
    escaped = symbols >= _escape_symbol(width)
    gaps = symbols.astype(np.int64)
    more = int(np.count_nonzero(escaped))
    if more and width == WIDTHS[-1]:
        raise DamageError("a gap between two indices is wider than any tensor")
    if more:
        rest, data = _read_gaps(data, more, 2 * width)
        gaps[escaped] += rest
    return gaps, data


def _read_values(
    data: memoryview, count: int, width: int
) -> tuple[NDArray[np.unsignedinteger], memoryview]:
    planes = []
    for _ in range(width):
        plane, data = _read_plane(data, count)
        planes.append(plane)
    values = np.empty((count, width), np.uint8)  # only now: `count` may be a lie until here
    for position, plane in enumerate(planes):
        values[:, position] = np.frombuffer(plane, np.uint8)
    return values.view(f"<u{width}").reshape(count), data


def _encode_plane(plane: NDArray[np.uint8], runs: bool) -> bytes:
    coded = _deflate_plane(plane, zlib.Z_HUFFMAN_ONLY)
    if (
        runs and 4 * len(coded) < plane.size
    ):  # near Huffman's floor of one bit a symbol: runs go below it
        coded = min(coded, _deflate_plane(plane, zlib.Z_RLE), key=len)
    if len(coded) < plane.size:
        return bytes([DEFLATE]) + coded
    return bytes([RAW]) + plane.tobytes()


def _deflate_plane(plane: NDArray[np.uint8], strategy: int) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, MEMORY_LEVEL, strategy)
    return coder.compress(plane.data) + coder.flush()


def _read_plane(data: memoryview, count: int) -> tuple[bytes | memoryview, memoryview]:
    kind, body = data[:1].tobytes(), data[1:]
    if kind == bytes([RAW]):
        plane, rest = body[:count], body[count:]
    elif kind == bytes([DEFLATE]):
        plane, rest = _inflate_plane(body, count)
    else:
        raise DamageError("coded numbers end early or name an unknown kind of plane")
    if len(plane) != count:
        raise DamageError(f"{count} coded numbers were promised, {len(plane)} or more are there")
    return plane, rest


def _inflate_plane(body: memoryview, count: int) -> tuple[bytes, memoryview]:
    """Inflate a stream of `count` bytes; one byte more is enough to know that it lies."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plane = inflater.decompress(body, count + 1)
    except zlib.error as error:
        raise DamageError(f"coded numbers do not inflate ({error})") from error
    if not inflater.eof:
        raise DamageError(f"coded numbers do not end after the {count} that were promised")
    return plane, memoryview(inflater.unused_data)


def _require_no_rest(rest: memoryview) -> None:
    if len(rest):
        raise DamageError(f"{len(rest)} bytes follow the coded numbers")
