"""`DeltaArrays`: a delta as numpy arrays, read and written without torch.

Commands that look at deltas need no tensors, and importing torch takes longer than what they do.
`deltas.delta.Delta` is made of these arrays and shares their memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_piece.deltas import file as deltafile
from mm_piece.deltas.header import TensorRecord, make_tensor_record
from mm_piece.deltas.rows import (
    Indices,
    RowType,
    ValueRow,
    naming_tensor,
    require_ascending,
    require_index_type,
    require_same_names,
    require_value_type,
)
from mm_piece.errors import DeltaError, FormatError, as_path


@dataclass(frozen=True, eq=False)
class DeltaArrays:
    """One task's changed entries: {tensor's name: flat indices, bit patterns of new values, …}."""

    indices: dict[str, Indices]
    values: dict[str, ValueRow]
    shapes: dict[str, tuple[int, ...]]
    before: dict[str, str]  # SHA-256 of the values that the new ones replace
    task: str
    base: str  # the base's fingerprint
    parent: str  # SHA-256 of the delta file before this one; empty for a delta from the base
    info: dict[str, Any]

    def __post_init__(self) -> None:
        require_same_names(
            self.shapes.keys(),
            self.indices.keys(),
            self.values.keys(),
            self.before.keys(),
        )
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            indices = self.indices[name]
            index_type = RowType(indices.dtype.name, indices.shape)
            with naming_tensor(name):
                require_index_type(index_type, size)
                require_value_type(self.values[name].type, index_type)
                require_ascending(indices, size)

    @property
    def entries(self) -> int:
        """Number of entries that the delta changes."""
        return sum(map(len, self.indices.values()))

    def to_bytes(self, codec: str = "gap") -> bytes:
        """Return the file's content; the same delta gives the same bytes."""
        records: dict[str, TensorRecord] = {}
        for name, shape in self.shapes.items():
            records[name] = make_tensor_record(
                shape,
                self.values[name].dtype,
                len(self.indices[name]),
                self.before[name],
            )

        entries: deltafile.EntryRows = {}
        for name, indices in self.indices.items():
            entries[name] = (indices, self.values[name])

        header: Mapping[str, object] = {
            "task": self.task,
            "base": self.base,
            "parent": self.parent,
            "info": self.info,
            "tensors": records,
        }
        return deltafile.pack_delta(header, entries, codec)

    @classmethod
    def from_bytes(cls, data: bytes, origin: str = "delta") -> "DeltaArrays":
        """Validate and decode a file's content; `origin` names it in errors."""
        shapes: dict[str, tuple[int, ...]] = {}
        before: dict[str, str] = {}
        try:
            header, entries = deltafile.unpack_delta(data)
            for name, record in header["tensors"].items():
                shapes[name] = tuple(record["shape"])
                before[name] = record["before"]
            return cls(
                indices={name: indices for name, (indices, _) in entries.items()},
                values={name: values for name, (_, values) in entries.items()},
                shapes=shapes,
                before=before,
                task=header["task"],
                base=header["base"],
                parent=header["parent"],
                info=header["info"],
            )
        except DeltaError as error:
            raise type(error)(f"{origin}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "DeltaArrays":
        """Read and validate a file."""
        path = as_path(path, "delta")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
        return cls.from_bytes(data, origin=str(path))
