"""Integers and bit patterns to compact bytes and back, exactly.

    plane    one byte of every number     kind (1 byte: raw or deflate), then the bytes
    values   width planes, lowest first   so that exponents meet exponents and mantissas mantissas
    gaps     values of 1, 2, 4 or 8 bytes all ones = "the rest follows", at twice the width
    indices  first width (1 byte), gaps   gap = how many entries lie between two neighbours

Only numpy and zlib. A plane of mantissas is noise and stays raw; the others are Huffman coded.
Decoders get the count that must come out, never inflate further, and raise `DamageError` otherwise.
"""

import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mm_piece.errors import DamageError

RAW = 0
DEFLATE = 1
MEMORY_LEVEL = 9  # longer blocks, fewer Huffman tables
WIDTHS = (1, 2, 4, 8)  # bytes of an unsigned integer
SLICE = 2**20  # gaps at a time
MAX_TENSOR_SIZE = 2**62  # below it no sum of a position and a gap leaves int64

_Bytes = bytes | memoryview
_Gaps = NDArray[np.int64]
_Indices = NDArray[np.signedinteger]
_Plane = NDArray[np.uint8]
_Symbols = NDArray[np.unsignedinteger]


def encode_indices(indices: _Indices, runs: bool = True) -> bytes:
    """Code sorted, unique, non-negative indices.

    Without `runs` every index takes at least one bit.
    """
    slices = _GapSlices(indices)
    width = _choose_width(slices, indices.size)
    escape = _escape_symbol(width)

    symbols = np.empty(indices.size, f"<u{width}")
    escaped = [np.empty(0, np.int64)]  # np.concatenate needs one array at least
    first = 0
    for gaps in slices:
        symbol_slice = np.minimum(gaps, escape)
        is_escaped = symbol_slice == escape
        escaped.append(gaps[is_escaped] - escape)

        stop = first + gaps.size
        symbols[first:stop] = symbol_slice
        first = stop

    coded = bytes([width])
    coded += encode_values(symbols, runs)
    rest = np.concatenate(escaped)
    if rest.size:
        coded += _encode_gaps(rest, 2 * width)
    return coded


def decode_indices(
    data: _Bytes,
    count: int,
    size: int,
) -> _Gaps:
    """Decode `count` sorted, unique indices, all of them below `size`."""
    width = data[0] if len(data) else 0
    if width not in WIDTHS or size > MAX_TENSOR_SIZE:
        raise DamageError(f"index width {width} (known: {WIDTHS}) or tensor size {size} is unsound")

    body = memoryview(data)[1:]
    indices, rest = _read_gaps(body, count, width)
    _require_no_rest(rest)

    # index i = Σ (gap + 1) over all gaps up to i, minus 1; in place, as `count` may be large
    indices += 1
    np.cumsum(indices, out=indices)
    indices -= 1
    # a sum passes `size` before it can leave int64, so max() sees one that is too large
    if count and indices.max() >= size:
        raise DamageError(f"an index lies outside a tensor of {size} entries")
    return indices


def encode_values(values: _Symbols, runs: bool = True) -> bytes:
    """Code unsigned integers of 1, 2, 4 or 8 bytes, plane by plane."""
    contiguous_values = np.ascontiguousarray(values)
    single_bytes = np.frombuffer(contiguous_values.data, np.uint8)
    by_value = np.reshape(single_bytes, (values.size, values.itemsize))
    planes = np.transpose(by_value)  # (width, count)

    coded: list[bytes] = []
    for plane in planes:
        contiguous: _Plane = np.ascontiguousarray(plane)
        coded.append(_encode_plane(contiguous, runs))
    return b"".join(coded)


def decode_values(
    data: _Bytes,
    count: int,
    width: int,
) -> _Symbols:
    """Decode `count` unsigned integers of `width` bytes."""
    values, rest = _read_values(memoryview(data), count, width)
    _require_no_rest(rest)
    return values


class _GapSlices:
    """The gaps of one tensor's indices, slice by slice, in the memory of one slice."""

    def __init__(self, indices: _Indices) -> None:
        self._indices = indices
        self._cached_gaps = None
        # gaps that fit into one slice are computed once, not at each of up to five iterations
        if 0 < indices.size <= SLICE:
            self._cached_gaps = [_compute_gaps(indices, 0)]

    def __iter__(self) -> Iterator[_Gaps]:
        if self._cached_gaps is not None:
            return iter(self._cached_gaps)

        starts = range(0, self._indices.size, SLICE)
        return (_compute_gaps(self._indices, first) for first in starts)


def _compute_gaps(indices: _Indices, first: int) -> _Gaps:
    """Return the gaps of the slice that begins at `first`."""
    # an index -1 before the first one, so that the first gap counts the entries before it
    previous = int(indices[first - 1]) if first else -1
    stop = first + SLICE
    wide = indices[first:stop].astype(np.int64)
    gaps = np.diff(wide, prepend=previous) - 1
    if gaps.min() < 0:
        raise ValueError("indices must be sorted, unique and not negative")
    return gaps


def _choose_width(slices: _GapSlices, count: int) -> int:
    """Return the narrowest width that holds at least half of the gaps.

    A common escape is one cheap symbol, but Huffman codes cannot spend less than a bit on it.
    """
    fitting = (width for width in WIDTHS if 2 * _count_fitting(slices, width) >= count)
    return next(fitting)


def _count_fitting(slices: _GapSlices, width: int) -> int:
    """Return how many gaps are coded at `width` without an escape."""
    escape = _escape_symbol(width)
    counts = (np.count_nonzero(gaps < escape) for gaps in slices)
    return int(sum(counts))


def _escape_symbol(width: int) -> int:
    """Return the symbol of `width` bytes that means: the rest follows, at twice the width."""
    if width == WIDTHS[-1]:
        return MAX_TENSOR_SIZE
    return 2 ** (8 * width) - 1


def _encode_gaps(gaps: _Gaps, width: int) -> bytes:
    """Code gaps at `width` bytes, then what exceeds it at twice the width."""
    escape = _escape_symbol(width)
    symbols = np.minimum(gaps, escape)
    is_escaped = symbols == escape
    escaped = gaps[is_escaped] - escape

    coded = encode_values(symbols.astype(f"<u{width}"))
    if escaped.size:
        coded += _encode_gaps(escaped, 2 * width)
    return coded


def _read_gaps(
    data: memoryview,
    count: int,
    width: int,
) -> tuple[_Gaps, memoryview]:
    """Decode `count` gaps; return them and the bytes that follow."""
    symbols, data = _read_values(data, count, width)
    gaps = symbols.astype(np.int64)
    escaped = symbols >= _escape_symbol(width)
    num_escaped = int(np.count_nonzero(escaped))
    if not num_escaped:
        return gaps, data

    if width == WIDTHS[-1]:
        raise DamageError("a gap between two indices is wider than any tensor")
    rest, data = _read_gaps(data, num_escaped, 2 * width)
    gaps[escaped] += rest
    return gaps, data


def _read_values(
    data: memoryview,
    count: int,
    width: int,
) -> tuple[_Symbols, memoryview]:
    """Decode `count` integers of `width` bytes; return them and the bytes that follow."""
    planes: list[_Bytes] = []
    for _ in range(width):
        plane, data = _read_plane(data, count)
        planes.append(plane)

    # allocated only now: until every plane has `count` bytes, a hostile file may claim any count
    values = np.empty(count, f"<u{width}")
    single_bytes = np.frombuffer(values.data, np.uint8)
    by_value = np.reshape(single_bytes, (count, width))  # shares the memory of `values`
    for position, plane in enumerate(planes):
        by_value[:, position] = np.frombuffer(plane, np.uint8)
    return values, data


def _encode_plane(
    plane: _Plane,
    runs: bool,
) -> bytes:
    """Code one plane in the shortest way: Huffman codes, run lengths or raw."""
    coded = _deflate_plane(plane, zlib.Z_HUFFMAN_ONLY)
    # near Huffman's floor of one bit a symbol, which only run lengths can go below
    if runs and 4 * len(coded) < plane.size:
        with_runs = _deflate_plane(plane, zlib.Z_RLE)
        coded = min(coded, with_runs, key=len)

    if len(coded) < plane.size:
        return bytes([DEFLATE]) + coded
    return bytes([RAW]) + plane.tobytes()


def _deflate_plane(
    plane: _Plane,
    strategy: int,
) -> bytes:
    # negative window bits: a bare deflate stream, without zlib's header and checksum
    coder = zlib.compressobj(
        level=1,
        method=zlib.DEFLATED,
        wbits=-zlib.MAX_WBITS,
        memLevel=MEMORY_LEVEL,
        strategy=strategy,
    )
    coded = coder.compress(plane.data)
    return coded + coder.flush()


def _read_plane(
    data: memoryview,
    count: int,
) -> tuple[_Bytes, memoryview]:
    """Decode one plane of `count` bytes; return it and the bytes that follow."""
    kind = data[:1].tobytes()  # empty where the data have ended
    body = data[1:]
    if kind == bytes([RAW]):
        plane = body[:count]
        rest = body[count:]
    elif kind == bytes([DEFLATE]):
        plane, rest = _inflate_plane(body, count)
    else:
        raise DamageError("coded numbers end early or name an unknown kind of plane")

    if len(plane) != count:
        raise DamageError(f"{count} coded numbers were promised, {len(plane)} or more are there")
    return plane, rest


def _inflate_plane(
    body: memoryview,
    count: int,
) -> tuple[bytes, memoryview]:
    """Inflate a stream of `count` bytes; return them and the bytes behind the stream.

    One byte more than `count` is enough to see that a stream is longer, whatever it would inflate
    to.
    """
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
