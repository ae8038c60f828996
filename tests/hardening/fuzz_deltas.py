"""Mutations of delta files that know the format: what a hostile author would make of a sound one.

CLAIMS    what the header says, and how the rows lie in the file
CODED     index rows and planes that no encoder writes, bombs among them
DELTAS    every kind of mutation of a delta, the blind ones too
"""

import math
import random
from collections.abc import Callable

import numpy as np
from fuzz_files import (
    BOMB_BYTES,
    Parts,
    Row,
    Sample,
    bomb,
    build,
    deflated,
    gap_row,
    parse,
    planes,
    samples,
    sealed,
)
from fuzz_mutations import BLIND, MANGLES, NAMES, mangled

NUMBERS = [-1, 0, 1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64, 10**4000, True, 1.0, None, "1"]
SHAPES = [[], [0], [1], [2**31], [2**40], [2**62], [2**63], [0, 2**70], [2**40, 2**40], [-1, -128]]
SHAPES += [[1] * 3000, [99] * 500_000, [10**4000] * 250, [True, 128], [128.0], ["8"], [[8]], "8"]
FOREIGN = ["F64", "I64", "I32", "U16", "U64", "BOOL", "F4", "F8_E8M0", "C64", "X", "u8", "", "I8"]


# --- what the header claims -----------------------------------------------------------------------


def _shape(parts: Parts, rng: random.Random) -> None:
    _, record = parts.pick(rng)
    record["shape"] = rng.choice([*SHAPES, record["shape"] * 2, [math.prod(record["shape"])]])


def _entries(parts: Parts, rng: random.Random) -> None:
    _, record = parts.pick(rng)
    record["entries"] = rng.choice([*NUMBERS, record["entries"] - 1, record["entries"] + 1])


def _promise(parts: Parts, rng: random.Random) -> None:
    """Promise more entries than there are, of a tensor that has room for them."""
    _, record = parts.pick(rng)
    record["entries"] = rng.choice((2**20, 2**31, 2**40, 2**62))
    record["shape"] = [record["entries"]] * rng.choice((1, 1, 2))


def _name(parts: Parts, rng: random.Random) -> None:
    """Rename a tensor in the header and its rows alike, maybe to a name that is taken."""
    name, record = parts.pick(rng)
    new = rng.choice(NAMES)
    parts.header["tensors"][new] = parts.header["tensors"].pop(name)
    for row in ("indices", "values"):
        parts.rows[f"{new}.{row}"] = parts.rows.pop(f"{name}.{row}")


def _codec(parts: Parts, rng: random.Random) -> None:
    parts.header["codec"] = rng.choice(("gap", "raw", "zip", "", "\n", "x" * 5000))


def _dtype(parts: Parts, rng: random.Random) -> None:
    _, record = parts.pick(rng)
    record["dtype"] = rng.choice(["F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", *FOREIGN])


# --- how the rows lie in the file -----------------------------------------------------------------


def _row(parts: Parts, rng: random.Random) -> Row:
    return parts.rows[rng.choice(list(parts.rows))]


def _foreign_row(parts: Parts, rng: random.Random) -> None:
    _row(parts, rng).dtype = rng.choice(FOREIGN)


def _misshapen_row(parts: Parts, rng: random.Random) -> None:
    row = _row(parts, rng)
    row.shape = rng.choice([*SHAPES, [1, *row.shape], [*row.shape, 1], row.shape * 2])


def _misplaced_row(parts: Parts, rng: random.Random) -> None:
    size = sum(len(row.data) for row in parts.rows.values())
    ends = (0, 1, -1, 8, size, size + 1, size - 1, 2**31, 2**63, 2**64, 2**70, 1.5)
    ends += (10**4300 - 1, -(10**4299), True, None, [])
    _row(parts, rng).offsets = [rng.choice(ends), rng.choice(ends)]


def _lost_row(parts: Parts, rng: random.Random) -> None:
    del parts.rows[rng.choice(list(parts.rows))]


def _foreign_rows(parts: Parts, rng: random.Random) -> None:
    """Add a row, or take the rows of another file."""
    other = parse(rng.choice(samples()).data).rows
    parts.rows = rng.choice(
        [other, {**parts.rows, **other}, {**parts.rows, "b.values": _row(parts, rng)}]
    )


def _exchanged_rows(parts: Parts, rng: random.Random) -> None:
    first, second = rng.choice(list(parts.rows)), rng.choice(list(parts.rows))
    parts.rows[first], parts.rows[second] = parts.rows[second], parts.rows[first]


CLAIMS: dict[str, Callable[[Parts, random.Random], None]] = {
    "shape": _shape,
    "entries": _entries,
    "promise": _promise,
    "name": _name,
    "codec": _codec,
    "dtype": _dtype,
    "foreign row": _foreign_row,
    "misshapen row": _misshapen_row,
    "misplaced row": _misplaced_row,
    "lost row": _lost_row,
    "foreign rows": _foreign_rows,
    "exchanged rows": _exchanged_rows,
}


# --- coded rows -----------------------------------------------------------------------------------


def _indices(parts: Parts, rng: random.Random) -> None:
    """Write indices that are unsorted, repeated, negative, outside, or that overflow."""
    name, record = parts.pick(rng)
    size, count = math.prod(record["shape"]), record["entries"]
    index = sorted(rng.sample(range(size), min(count, size)))
    far = rng.choice((size, size + 1, -1, -size, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1))
    tricks = [
        index,
        index[::-1],
        rng.sample(index, count),
        [*index[:-1], far],
        [far, *index[1:]],
        [index[0]] * count,
        [entry + far for entry in index],
        [entry - index[-1] for entry in index],
    ]
    _write_indices(parts, name, rng.choice(tricks), rng)


def _write_indices(parts: Parts, name: str, index: list[int], rng: random.Random) -> None:
    row = parts.rows[f"{name}.indices"]
    if parts.header["codec"] == "raw":
        row.data = np.array([entry % 2**64 for entry in index], dtype="<u8").astype("<i4").tobytes()
        return
    before = [-1, *index[:-1]]
    gaps = [(now - last - 1) % 2**64 for now, last in zip(index, before, strict=True)]
    parts.set_row(f"{name}.indices", gap_row(gaps, rng.choice((1, 2, 4, 8))))


def _gaps(parts: Parts, rng: random.Random) -> None:
    """Write gaps at the edges of what a width, a shape or 64 bits hold."""
    name, record = parts.pick(rng)
    edges = (0, 254, 255, 256, 65534, 65535, 65790, 2**31, 2**32 - 1, 2**32 + 65789)
    edges += (2**61, 2**62 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
    pool = rng.sample(edges, 2)
    gaps = [rng.choice(pool) for _ in range(record["entries"])]
    parts.set_row(f"{name}.indices", gap_row(gaps, rng.choice((1, 2, 4, 8))))


def _escapes(parts: Parts, rng: random.Random) -> None:
    """Escape further than the widths go, or with more or fewer continuations than escapes."""
    name, record = parts.pick(rng)
    width, coded = rng.choice((1, 2, 4, 8)), b""
    for level in range(rng.randint(1, 6)):
        count = max(0, record["entries"] + (rng.randint(-1, 1) if level else 0))
        coded += planes([2**64 - 1] * count, min(8, width << level))
    parts.set_row(f"{name}.indices", bytes([width]) + coded)


def _width(parts: Parts, rng: random.Random) -> None:
    name, _ = parts.pick(rng)
    row = parts.rows[f"{name}.indices"]
    row.data = bytes([rng.choice((0, 1, 2, 3, 4, 5, 7, 8, 16, 255))]) + row.data[1:]


PLANES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "kind": lambda plane, rng: bytes([rng.randrange(2, 256)]) + plane,
    "short": lambda plane, rng: b"\0" + plane[:-1],
    "long": lambda plane, rng: b"\0" + plane + b"\0",
    "none": lambda plane, rng: b"",
    "deflated": lambda plane, rng: b"\1" + deflated(plane),
    "deflated short": lambda plane, rng: b"\1" + deflated(plane[:-1]),
    "deflated long": lambda plane, rng: b"\1" + deflated(plane + b"\0"),
    "deflated cut": lambda plane, rng: (b"\1" + deflated(plane))[:-1],
    "noise": lambda plane, rng: b"\1" + rng.randbytes(len(plane)),
    "twice": lambda plane, rng: b"\0" + plane + b"\0" + plane,
}


def _planes(parts: Parts, rng: random.Random) -> None:
    """Write a row whose planes are sound but for one."""
    name, record = parts.pick(rng)
    width = rng.choice((1, 2, 4, 8))
    coded = [b"\0" + rng.randbytes(record["entries"]) for _ in range(width)]
    place = rng.randrange(width)
    coded[place] = rng.choice(list(PLANES.values()))(coded[place][1:], rng)
    row = rng.choice(("indices", "values"))
    parts.set_row(f"{name}.{row}", bytes([width] * (row == "indices")) + b"".join(coded))


def _bomb(parts: Parts, rng: random.Random) -> None:
    """Write planes that inflate to a thousand times their size, promised or not."""
    name, record = parts.pick(rng)
    plane, width = b"\1" + bomb(), rng.choice((1, 1, 2, 8))
    which = rng.choice(("indices", "values", "both"))
    if which != "values":
        parts.set_row(f"{name}.indices", bytes([width]) + plane * width)
    if which != "indices":
        parts.set_row(f"{name}.values", plane * rng.choice((1, 2, 4)))
    record["entries"] = rng.choice((record["entries"], BOMB_BYTES, 2**40))
    record["shape"] = [max(record["entries"], math.prod(record["shape"]))]


def _emptied(parts: Parts, rng: random.Random) -> None:
    """Promise nothing, with rows that hold nothing, or something."""
    name, record = parts.pick(rng)
    record["entries"] = 0
    for row, width in (("indices", rng.choice((1, 2, 4, 8))), ("values", rng.choice((1, 2, 4)))):
        start = bytes([width] * (row == "indices"))
        parts.set_row(f"{name}.{row}", start + rng.choice((b"\0", b"\1\3\0", b"")) * width)


CODED: dict[str, Callable[[Parts, random.Random], None]] = {
    "indices": _indices,
    "gaps": _gaps,
    "escapes": _escapes,
    "width": _width,
    "planes": _planes,
    "bomb": _bomb,
    "emptied": _emptied,
}


# --- every kind -----------------------------------------------------------------------------------


def _blind(how: str, found: Sample, rng: random.Random) -> bytes:
    return BLIND[how](found.data, rng)


def _blind_sealed(how: str, found: Sample, rng: random.Random) -> bytes:
    return sealed(BLIND[how](found.data, rng))


def _blind_row(how: str, found: Sample, rng: random.Random) -> bytes:
    """Damage one row alone and put the file together again around it."""
    parts = parse(found.data)
    for row in rng.sample(list(parts.rows.values()), min(1, len(parts.rows))):
        row.data = BLIND[how](row.data, rng)
        row.shape = [len(row.data)] if row.dtype == "U8" else row.shape
    return build(parts)


def _mangled_header(how: str, found: Sample, rng: random.Random) -> bytes:
    parts = parse(found.data)
    return build(parts, mangled(parts.header, how, rng))


def _claimed(how: str, found: Sample, rng: random.Random) -> bytes:
    parts = parse(found.data)
    if parts.rows:  # an empty delta has nothing to lie about
        {**CLAIMS, **CODED}[how](parts, rng)
    return build(parts)


def _spliced(how: str, found: Sample, rng: random.Random) -> bytes:
    other = rng.choice(samples()).data
    data = found.data[: rng.randrange(len(found.data))] + other[rng.randrange(len(other)) :]
    return sealed(data) if how == "sealed" else data


FAMILIES = {
    "bytes": (BLIND, _blind),
    "sealed": (BLIND, _blind_sealed),
    "row": (BLIND, _blind_row),
    "header": (MANGLES, _mangled_header),
    "forged": ({**CLAIMS, **CODED}, _claimed),
    "spliced": (("plain", "sealed"), _spliced),
}
DELTAS = {
    f"{family} {how}": (mutate, how) for family, (hows, mutate) in FAMILIES.items() for how in hows
}


def mutated(kind: str, rng: random.Random) -> tuple[Sample, bytes]:
    """Return a sound delta and the mutation of it."""
    found = rng.choice(samples())
    mutate, how = DELTAS[kind]
    return found, mutate(how, found, rng)
