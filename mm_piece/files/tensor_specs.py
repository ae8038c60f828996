"""What a safetensors file begins with, laid out before its data exist; without torch.

The safetensors library writes only tensors that are in memory. The format is short: 8 bytes of
length, a JSON header of names, dtypes, shapes and offsets, the data.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from mm_piece.stored_dtypes import STORED_DTYPES

_DTYPE_ORDER = {name: rank for rank, name in enumerate(STORED_DTYPES)}


class TensorRecord(TypedDict):
    """One tensor in a header; the offsets are those of its first byte and of the one behind it."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written: its name, dtype (as in safetensors) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        itemsize = STORED_DTYPES[self.dtype].itemsize
        return math.prod(self.shape) * itemsize


def sort_tensor_specs(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return specs in the order in which the safetensors library lays tensors out."""

    def rank_of(spec: TensorSpec) -> tuple[int, str]:
        return _DTYPE_ORDER[spec.dtype], spec.name

    return sorted(specs, key=rank_of)


def build_header(
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, str],
) -> bytes:
    """Return the opening of a file whose data are those of `specs`, in this order."""
    content: dict[str, TensorRecord | dict[str, str]] = {"__metadata__": dict(metadata)}
    start = 0
    for spec in specs:
        stop = start + spec.nbytes
        content[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start, stop],
        }
        start = stop

    text = json.dumps(
        content,
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    length = len(text).to_bytes(8, "little")
    return length + text
