"""Sound delta files of every kind, and files to parts and back, for the fuzzing of deltas.

    samples         sound files with the tensors that they change
    planes, gap_row, bomb    rows that no encoder writes
    parse, build    a file to its parts and back, under a seal that is right again

Files are put together by hand, not by the library, so that they can say what no writer would.
"""

import hashlib
import json
import math
import random
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from mm_piece.deltas.delta import Delta
from mm_piece.entries import read_entries

SEAL = slice(51, 115)
BOMB_BYTES = 2**26


# --- sound deltas ---------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
WHERE: dict[str, tuple[tuple[int, ...], list[int]]] = {
    "scalar": ((), [0]),
    "one": ((8, 16), [77]),
    "full": ((6, 7), [*range(42)]),
    "clustered": ((64, 64), [*range(100, 140), *range(2000, 2100)]),
    "escapes 1": ((200, 500), [*range(0, 2000, 7), 50_000, 99_999]),
    "escapes 2": ((300_000,), [*range(0, 30_000, 300), 299_999]),
    "escapes 4": ((1_000_000,), [0, 200_000, 400_001, 999_999]),
}
MIXES = [*({"a": kind} for kind in WHERE), {"a": "one", "b": "full", "c": "clustered"}, {}]


@dataclass(frozen=True)
class Sample:
    """A sound delta file and the tensors that it changes."""

    data: bytes
    model: dict[str, torch.Tensor]


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return a tensor of random bit patterns."""
    raw = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def sample(mix: dict[str, str], dtype: torch.dtype, codec: str) -> Sample:
    """Return a delta with one pattern of indices for each tensor."""
    model = {name: noise(WHERE[kind][0], dtype, n) for n, (name, kind) in enumerate(mix.items())}
    indices = {name: torch.tensor(WHERE[kind][1]) for name, kind in mix.items()}
    delta = Delta.from_change(
        indices,
        {name: read_entries(model[name], index) for name, index in indices.items()},
        {name: noise((len(index),), dtype, 99) for name, index in indices.items()},
        {name: tensor.shape for name, tensor in model.items()},
        task="digits",
        base="ab" * 32,
        parent="cd" * 32,
        info={"method": "piece-s", "density": 0.1, "groups": {"vision": [1, 2]}},
    )
    return Sample(delta.to_bytes(codec), model)


@cache
def samples() -> list[Sample]:
    """Return sound deltas of every codec, dtype and pattern of indices; the empty ones last."""
    made = [(mix, dtype, codec) for mix in MIXES for dtype in DTYPES for codec in ("gap", "raw")]
    small = [one for one in made if one[1].itemsize == 1 or "escapes 4" not in one[0].values()]
    return [sample(*one) for one in small]


# --- coded rows -----------------------------------------------------------------------------------


@cache
def bomb() -> bytes:
    """Return a deflate stream of many zeros."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    step = 2**20
    coded = b"".join(coder.compress(bytes(step)) for _ in range(BOMB_BYTES // step))
    return coded + coder.flush()


def deflated(data: bytes) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return coder.compress(data) + coder.flush()


def planes(symbols: list[int], width: int) -> bytes:
    """Code numbers below 2**64 in planes of plain bytes."""
    table = np.array(symbols, dtype="<u8").view(np.uint8).reshape(-1, 8)
    return b"".join(b"\0" + table[:, place].tobytes() for place in range(width))


def gap_row(gaps: list[int], width: int) -> bytes:
    """Code any gaps below 2**64; what width 8 cannot hold wraps into its forbidden symbols."""
    coded = bytes([width])
    while gaps:
        escape = 2 ** (8 * width) - 1
        coded += planes([min(gap, escape) for gap in gaps], width)
        gaps = [gap - escape for gap in gaps if gap >= escape and width < 8]
        width *= 2
    return coded


# --- a file and its parts -------------------------------------------------------------------------


@dataclass
class Row:
    """One tensor of a safetensors file as it is written down; it need not be true."""

    dtype: str
    shape: list[Any]
    data: bytes
    offsets: list[int] | None = None  # where it lies, unless told otherwise


@dataclass
class Parts:
    """A delta file taken apart."""

    header: dict[str, Any]
    rows: dict[str, Row]

    def pick(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """Return the name and the record of one tensor."""
        return rng.choice(list(self.header["tensors"].items()))

    def set_row(self, name: str, data: bytes) -> None:
        """Replace a coded row."""
        self.rows[name] = Row("U8", [len(data)], data)


def parse(data: bytes) -> Parts:
    """Take a sound file apart."""
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    header = json.loads(outer.pop("__metadata__")["mm_piece"])
    del header["sha256"]
    body = data[8 + length :]
    rows = {
        name: Row(row["dtype"], row["shape"], body[slice(*row["data_offsets"])])
        for name, row in outer.items()
    }
    return Parts(header, rows)


def build(parts: Parts, text: str = "") -> bytes:
    """Put a file together, sealed; its header may be another text."""
    text = text or json.dumps(parts.header)
    outer: dict[str, Any] = {"__metadata__": {"mm_piece": f'{{"sha256":"{"0" * 64}",{text[1:]}'}}
    body = b""
    for name, row in parts.rows.items():
        offsets = row.offsets or [len(body), len(body) + len(row.data)]
        outer[name] = {"dtype": row.dtype, "shape": row.shape, "data_offsets": offsets}
        body += row.data
    head = json.dumps(outer, separators=(",", ":")).encode()
    return sealed(len(head).to_bytes(8, "little") + head + body)


def sealed(data: bytes) -> bytes:
    """Write the SHA-256 of the rest of a file where a reader looks for it."""
    if len(data) < SEAL.stop:
        return data
    digest = hashlib.sha256(data[: SEAL.start] + data[SEAL.stop :]).hexdigest().encode()
    return data[: SEAL.start] + digest + data[SEAL.stop :]
