"""Mutations of bytes and of JSON that the fuzzing of deltas and of stores shares.

    BLIND      bytes -> bytes                             damage that knows nothing of the format
    MANGLES    one place of a JSON document -> another    what no writer would have put there

Each draws from the generator that it is given and from nothing else.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

HOLE = "\ue000"  # stands in a document where text goes that `json.dumps` would never write
NAMES = ["", "\n", "a\u2028b", "\x1b[2J", "\ud800", "\0", "é🙂", "../../a", "%s{0}", "x" * 5000]
NAMES += ["__metadata__", "a.indices", "a.values.indices", "'", '"', "\\", "a\tb", " ", "b"]
TEXTS = ["NaN", "-Infinity", "1e400", "-1", "0", "-0.0", "1.5", "true", "null", '""', "[]", "{}"]
TEXTS += [str(2**63), str(2**64), "9" * 4000, "9" * 5000, '"\\ud800"', '"a\\nb"', '"\\u001b[2J"']
TEXTS += ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000, "9" * 4300]
TEXTS += ["[" * depth + "]" * depth for depth in range(940, 990, 5)]
TEXTS += [f'"{"x" * 5000}"', '{"a":1,"a":2}', "[0,0,0]", "'x'", "", "\0", "\ufeff1", '"../x"']

Blind = Callable[[bytes, random.Random], bytes]
Mangle = Callable[[Any, Any, random.Random], str]


# --- bytes ----------------------------------------------------------------------------------------


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 1000)))


def _flip_bytes(data: bytes, rng: random.Random) -> bytes:
    altered = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        altered[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(altered)


def _flip_bit(data: bytes, rng: random.Random) -> bytes:
    altered = bytearray(data)
    altered[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(altered)


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _insert(data: bytes, rng: random.Random) -> bytes:
    start, _ = _span(data, rng)
    return data[:start] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[start:]


def _duplicate(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng)
    return data[:stop] + data[start:]


def _cut_out(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + data[stop:]


def _zero(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + bytes(stop - start) + data[stop:]


BLIND: dict[str, Blind] = {
    "flipped bytes": _flip_bytes,
    "flipped bit": _flip_bit,
    "truncated": _truncate,
    "inserted": _insert,
    "duplicated": _duplicate,
    "cut out": _cut_out,
    "zeroed": _zero,
}


# --- JSON -----------------------------------------------------------------------------------------


def mangled(document: Any, how: str, rng: random.Random) -> str:
    """Return the text of a document with one place of it mangled."""
    document = copy.deepcopy(document)
    place, key = rng.choice(list(_places(document)))
    filling = MANGLES[how](place, key, rng)
    return json.dumps(document).replace(json.dumps(HOLE), filling)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    pairs = node.items() if type(node) is dict else enumerate(node) if type(node) is list else ()
    for key, child in pairs:
        yield node, key
        yield from _places(child)


def _replace(place: Any, key: Any, rng: random.Random) -> str:
    place[key] = HOLE
    return rng.choice(TEXTS)


def _drop(place: Any, key: Any, rng: random.Random) -> str:
    del place[key]
    return ""


def _repeat(place: Any, key: Any, rng: random.Random) -> str:
    """Name a field twice, with another value; in a list, repeat the element."""
    if type(place) is list:
        place.insert(key, place[key])
        return ""
    place[HOLE] = rng.choice([place[key], None, *place.values()])
    return json.dumps(key)


def _rename(place: Any, key: Any, rng: random.Random) -> str:
    if type(place) is list:
        return _replace(place, key, rng)
    place[HOLE] = place.pop(key)
    return json.dumps(rng.choice(NAMES))


def _exchange(place: Any, key: Any, rng: random.Random) -> str:
    """Exchange two neighbours, whatever they are."""
    other = rng.choice(
        [other for other, _ in enumerate(place)] if type(place) is list else [*place]
    )
    place[key], place[other] = place[other], place[key]
    return ""


MANGLES: dict[str, Mangle] = {
    "replaced": _replace,
    "dropped": _drop,
    "repeated": _repeat,
    "renamed": _rename,
    "exchanged": _exchange,
}
