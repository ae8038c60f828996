"""`Delta`: what one task changed in a base, as sorted indices and new values.

    entries    take, put, difference      copy, write and compare bit patterns, never numbers
    identity   digest, fingerprint        of a tensor, of a base
    Delta      from_change, check, apply  sound once it exists; checked before the first write
               save, load                 one sealed file, see module `file`

NaN payloads and negative zeros survive: values only ever move as same-size integers.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mm_piece.deltas import file as deltafile
from mm_piece.deltas.header import DELTA_DTYPES, index_dtype
from mm_piece.distributed import (
    gather_entries,
    gathered_parameters,
    is_partitioned,
    scatter_entries,
    shape_of,
)
from mm_piece.dtypes import SAFETENSORS_NAMES, dtype_name, view_bits
from mm_piece.errors import (
    BaseError,
    DamageError,
    DeltaError,
    FormatError,
    MismatchError,
    OrderError,
    as_path,
    format_value,
)
from mm_piece.files import atomic

FINGERPRINT_SAMPLES = (
    64  # entries of each tensor that enter a fingerprint; small tensors give up to twice that
)


def set_entries(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write `values` at flat `indices` in place, bit for bit."""
    scatter_entries([(tensor, indices, values)])


def find_changed_indices(before: Tensor, after: Tensor) -> Tensor:
    """Return the sorted flat indices of the entries whose bits differ."""
    if _describe_tensor(before) != _describe_tensor(after):
        raise MismatchError(
            f"{_describe_tensor(before)} cannot be compared with {_describe_tensor(after)}"
        )
    changed = view_bits(before.contiguous()) != view_bits(after.contiguous())
    return torch.nonzero(changed).view(-1).to(index_dtype(before.numel()))


def compute_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bit patterns, in hex."""
    return hashlib.sha256(view_bits(tensor.detach().cpu().contiguous()).numpy().data).hexdigest()


def compute_fingerprint(
    tensors: Mapping[str, Tensor],
    index: Mapping[str, Tensor] = MappingProxyType({}),
    values: Mapping[str, Tensor] = MappingProxyType({}),
) -> str:
    """Return a base's identity at a glance: names, shapes, dtypes, a sample of each tensor.

    At the sorted entries `index` a tensor counts as if it had `values`.
    """
    summaries = {}
    for name, tensor in tensors.items():
        shape = shape_of(tensor)
        positions = torch.arange(0, shape.numel(), compute_stride(shape.numel()))
        sample = gather_entries(
            tensor if is_partitioned(tensor) else tensor.contiguous(), positions
        )
        if name in index:
            inside = torch.isin(positions, index[name].long())
            at = torch.searchsorted(index[name].long(), positions[inside])
            sample[inside.to(sample.device)] = values[name][at].to(sample.device)
        summaries[name] = (shape, sample.dtype, sample)
    return compute_identity(summaries)


def compute_full_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a base's identity down to the last bit; reads everything."""
    summaries: dict[str, tuple[Sequence[int], torch.dtype, Tensor | str]] = {}
    for name, tensor in tensors.items():
        with gathered_parameters([tensor]):
            summaries[name] = (tensor.shape, tensor.dtype, compute_digest(tensor))
    return compute_identity(summaries)


def compute_stride(size: int) -> int:
    """Return the stride of a fingerprint's sample: odd, to walk through a matrix's columns."""
    return size // FINGERPRINT_SAMPLES | 1


def compute_identity(
    summaries: Mapping[str, tuple[Sequence[int], torch.dtype, Tensor | str]],
) -> str:
    """Return the SHA-256 over the name, shape and dtype of tensors and what stands for each.

    That is a sample of it, all of it, or the SHA-256 of either.
    """
    sha = hashlib.sha256()
    for name in sorted(summaries):
        shape, dtype, content = summaries[name]
        kind = [name, list(shape), dtype_name(dtype)]
        sha.update(json.dumps(kind).encode())
        sha.update(bytes.fromhex(content if isinstance(content, str) else compute_digest(content)))
    return sha.hexdigest()


def _describe_tensor(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {format_value(list(tensor.shape))}"


@dataclass(frozen=True, eq=False)
class Delta:
    """One task's changed entries, on the CPU."""

    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    before: dict[str, str]
    task: str
    base: str
    parent: str
    info: dict[str, Any]

    def __post_init__(self) -> None:
        names = self.shapes.keys()
        if not names == self.indices.keys() == self.values.keys() == self.before.keys():
            raise DamageError("indices, values, shapes and digests name different tensors")
        for name, shape in self.shapes.items():
            _require_sound(name, self.indices[name], self.values[name], math.prod(shape))

    @classmethod
    def from_change(
        cls,
        indices: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        *,
        task: str,
        base: str,
        info: Mapping[str, Any],
        parent: str = "",
    ) -> "Delta":
        """Keep the selected entries whose bits changed; `info` counts selected and unchanged."""
        rows = {
            name: _filter_changed(name, indices[name], before[name], after[name])
            for name in indices
        }
        rows = {name: row for name, row in rows.items() if len(row[0])}
        sizes = {name: math.prod(shapes[name]) for name in rows}
        selected = sum(len(index) for index in indices.values())
        entries = sum(len(index) for index, _, _ in rows.values())
        return cls(
            indices={name: row[0].to(index_dtype(sizes[name])) for name, row in rows.items()},
            values={name: row[2] for name, row in rows.items()},
            shapes={name: tuple(shapes[name]) for name in rows},
            before={name: compute_digest(row[1]) for name, row in rows.items()},
            task=task,
            base=base,
            parent=parent,
            info={**info, "selected": selected, "unchanged": selected - entries},
        )

    @property
    def entries(self) -> int:
        """Return how many entries the delta changes."""
        return sum(len(index) for index in self.indices.values())

    def require_applicable(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raise unless every tensor stands where this delta starts; write nothing.

        Returns the values that stand there: {name: 1-D tensor on the CPU}, in index order.
        """
        before = {}
        for name, index in self.indices.items():
            if name not in tensors:
                raise MismatchError(f"task {self.task!r} changes {name}, which is not there")
            tensor = tensors[name]
            self.require_tensor_kind(name, shape_of(tensor), tensor.dtype)
            self._require_equal(
                name, "contiguous", True, is_partitioned(tensor) or tensor.is_contiguous()
            )
            before[name] = gather_entries(tensor, index).cpu()
            self.require_before_digest(name, compute_digest(before[name]))
        return before

    def require_tensor_kind(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Raise MismatchError unless a tensor is of the shape and dtype that this delta changes."""
        self._require_equal(name, "shape", list(self.shapes[name]), list(shape))
        self._require_equal(name, "dtype", self.values[name].dtype, dtype)

    def _require_equal(self, name: str, what: str, expected: object, found: object) -> None:
        if expected != found:
            place = f"task {self.task!r}: {name}: {what}"
            raise MismatchError(f"{place}: expected {expected}, found {found}")

    def require_before_digest(self, name: str, found: str) -> None:
        """Raise unless `found` is the SHA-256 of the values that this delta replaces in a tensor.

        BaseError for a delta that starts from its base, OrderError for one that continues another.
        """
        if found == self.before[name]:
            return
        error = OrderError if self.parent else BaseError
        start = f"delta {self.parent[:12]}…" if self.parent else f"base {self.base[:12]}…"
        raise error(
            f"task {self.task!r} starts from {start}, which is not what stands here: {name}: "
            f"SHA-256 before: expected {self.before[name][:12]}…, found {found[:12]}…"
        )

    def apply(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Check everything, then write the new values in place: all of them or none.

        Returns the values before, as `check` does: put at `indices` they undo the delta.
        """
        before = self.require_applicable(tensors)
        scatter_entries(
            (tensors[name], index, self.values[name]) for name, index in self.indices.items()
        )
        return before

    def to_bytes(self, codec: str = "gap") -> bytes:
        """Return the file's content; the same delta gives the same bytes."""
        header = {key: vars(self)[key] for key in ("task", "base", "parent", "info")}
        header["tensors"] = {
            name: make_tensor_record(shape, self.values[name], self.before[name])
            for name, shape in self.shapes.items()
        }
        entries = {name: (index, self.values[name]) for name, index in self.indices.items()}
        return deltafile.pack_delta(header, entries, codec)

    @classmethod
    def from_bytes(cls, data: bytes, origin: str = "delta") -> "Delta":
        """Validate and decode a file's content; `origin` names it in errors."""
        try:
            header, entries = deltafile.unpack_delta(data)
            records = header["tensors"]
            return cls(
                indices={name: indices for name, (indices, _) in entries.items()},
                values={name: values for name, (_, values) in entries.items()},
                shapes={
                    name: tuple(record_fields["shape"]) for name, record_fields in records.items()
                },
                before={name: record["before"] for name, record in records.items()},
                **{key: header[key] for key in ("task", "base", "parent", "info")},
            )
        except DeltaError as error:
            raise type(error)(f"{origin}: {error}") from error

    def save(self, path: str | Path, codec: str = "gap") -> str:
        """Write the file, whole or not at all; return its SHA-256, the next delta's parent."""
        path, data = as_path(path, "delta"), self.to_bytes(codec)
        try:
            atomic.write_atomically(path, data)
        except OSError as error:
            raise DeltaError(f"{path}: cannot be written: {error.strerror}") from error
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """Read and validate a file."""
        path = as_path(path, "delta")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
        return cls.from_bytes(data, origin=str(path))


def make_tensor_record(shape: Sequence[int], values: Tensor, before: str) -> dict[str, Any]:
    """Return what a delta file's header says of one tensor."""
    kind = {"dtype": SAFETENSORS_NAMES[values.dtype], "entries": len(values)}
    return {"shape": list(shape), **kind, "before": before}


def _filter_changed(
    name: str, indices: Tensor, before: Tensor, after: Tensor
) -> tuple[Tensor, ...]:
    """Return indices, values before and values after of the entries that changed, on the CPU."""
    rows = [row.detach().cpu().contiguous() for row in (indices, before, after)]
    if rows[0].shape != rows[1].shape:
        raise MismatchError(
            f"{name}: {_describe_tensor(indices)} indices for {_describe_tensor(before)} values"
        )
    changed = find_changed_indices(rows[1], rows[2])
    return tuple(gather_entries(row, changed) for row in rows)


def _require_sound(name: str, indices: Tensor, values: Tensor, size: int) -> None:
    """Raise unless indices and values can be written to a tensor of `size` entries."""
    if indices.ndim != 1 or indices.dtype != index_dtype(size):
        raise DamageError(
            f"{name}: {_describe_tensor(indices)} is no row of {index_dtype(size)} indices"
        )
    if values.shape != indices.shape or values.dtype not in DELTA_DTYPES.values():
        raise DamageError(
            f"{name}: {_describe_tensor(values)} are no values for {len(indices)} indices"
        )
    inside = not len(indices) or (indices[0] >= 0 and indices[-1] < size)
    if not inside or (indices[1:] <= indices[:-1]).any():
        raise DamageError(f"{name}: indices must be sorted, unique and below {size}")
