"""`Delta`: what one task changed in a base, as sorted indices and new values.

    entries    find_changed_indices     compare bit patterns, never numbers
    identity   compute_digest, compute_fingerprint   of a tensor, of a base
    Delta      from_change, apply                    sound once it exists; checked before any write
               save, load                            one checksummed file, see `deltas.file`

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

from mm_piece.deltas.arrays import DeltaArrays
from mm_piece.deltas.rows import (
    naming_tensor,
    require_ascending,
    require_index_type,
    require_same_names,
    require_value_type,
)
from mm_piece.deltas.tensor_rows import (
    index_dtype,
    tensors_of,
    to_value_row,
    type_of,
)
from mm_piece.distributed import (
    gather_entries,
    gathered_parameters,
    is_partitioned,
    scatter_entries,
    shape_of,
)
from mm_piece.dtypes import dtype_name, view_bits
from mm_piece.entries import read_entries
from mm_piece.errors import (
    BaseError,
    DeltaError,
    MismatchError,
    OrderError,
    as_path,
)
from mm_piece.files import atomic

FINGERPRINT_SAMPLES = 64  # entries of each tensor; a small one gives up to twice as many

NamedTensors = Mapping[str, Tensor]
Entries = dict[str, tuple[Tensor, Tensor]]  # by tensor's name: indices, values
_Summary = tuple[Sequence[int], torch.dtype, Tensor | str]  # shape, dtype, content or its SHA-256


def find_changed_indices(before: Tensor, after: Tensor) -> Tensor:
    """Return the sorted flat indices of the entries whose bits differ."""
    if type_of(before) != type_of(after):
        raise MismatchError(f"{type_of(before)} cannot be compared with {type_of(after)}")

    old_bits = view_bits(before.contiguous())
    new_bits = view_bits(after.contiguous())
    changed = torch.nonzero(old_bits != new_bits).view(-1)
    return changed.to(index_dtype(before.numel()))


def compute_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bit patterns, in hex."""
    bits = view_bits(tensor.detach().cpu().contiguous())
    return hashlib.sha256(bits.numpy().data).hexdigest()


def compute_fingerprint(
    tensors: NamedTensors,
    index: NamedTensors = MappingProxyType({}),
    values: NamedTensors = MappingProxyType({}),
) -> str:
    """Return a base's identity at a glance: names, shapes, dtypes, a sample of each tensor.

    At the sorted entries `index` a tensor counts as if it had `values`.
    """
    summaries: dict[str, _Summary] = {}
    for name, tensor in tensors.items():
        shape = shape_of(tensor)
        size = shape.numel()
        positions = torch.arange(0, size, compute_stride(size))
        readable = tensor if is_partitioned(tensor) else tensor.contiguous()
        sample = gather_entries(readable, positions)

        if name in index:
            wide_index = index[name].long()
            is_replaced = torch.isin(positions, wide_index)
            at = torch.searchsorted(wide_index, positions[is_replaced])
            new = values[name][at].to(sample.device)
            sample[is_replaced.to(sample.device)] = new
        summaries[name] = (shape, sample.dtype, sample)
    return compute_identity(summaries)


def compute_full_digest(tensors: NamedTensors) -> str:
    """Return a base's identity down to the last bit; reads everything."""
    summaries: dict[str, _Summary] = {}
    for name, tensor in tensors.items():
        # one tensor at a time: under ZeRO-3 all of them may not fit
        with gathered_parameters([tensor]):
            digest = compute_digest(tensor)
            summaries[name] = (tensor.shape, tensor.dtype, digest)
    return compute_identity(summaries)


def compute_stride(size: int) -> int:
    """Return the stride of a fingerprint's sample: odd, to walk through a matrix's columns."""
    return size // FINGERPRINT_SAMPLES | 1


def compute_identity(summaries: Mapping[str, _Summary]) -> str:
    """Return the SHA-256 over each tensor's name, shape, dtype and content.

    `summaries` holds (shape, dtype, content) by name. The content is a tensor (a sample or all
    entries), or the SHA-256 of one.
    """
    sha = hashlib.sha256()
    for name in sorted(summaries):
        shape, dtype, content = summaries[name]
        kind = [name, list(shape), dtype_name(dtype)]
        digest = content if isinstance(content, str) else compute_digest(content)
        sha.update(json.dumps(kind).encode())
        sha.update(bytes.fromhex(digest))
    return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class Delta:
    """One task's changed entries, on the CPU: {tensor's name: flat indices, new values, …}."""

    indices: dict[str, Tensor]
    values: dict[str, Tensor]
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
            index_type = type_of(indices)
            with naming_tensor(name):
                require_index_type(index_type, size)
                require_value_type(type_of(self.values[name]), index_type)
                require_ascending(indices.numpy(), size)

    def __repr__(self) -> str:
        return f"<Delta {self.task!r}: {self.entries:,} entries in {len(self.indices)} tensors>"

    @classmethod
    def from_change(
        cls,
        indices: NamedTensors,
        before: NamedTensors,
        after: NamedTensors,
        shapes: Mapping[str, Sequence[int]],
        *,
        task: str,
        base: str,
        info: Mapping[str, object],
        parent: str = "",
    ) -> "Delta":
        """Build a delta of the selected entries whose bits changed.

        `info` gets the counts `selected` and `unchanged`.
        """
        changed_indices: dict[str, Tensor] = {}
        new_values: dict[str, Tensor] = {}
        digests: dict[str, str] = {}
        for name, selected in indices.items():
            changed, old, new = _filter_changed(
                name,
                selected,
                before[name],
                after[name],
            )
            # a tensor without any change is left out
            if len(changed):
                size = math.prod(shapes[name])
                changed_indices[name] = changed.to(index_dtype(size))
                new_values[name] = new
                digests[name] = compute_digest(old)

        num_selected = sum(map(len, indices.values()))
        num_changed = sum(map(len, changed_indices.values()))
        return cls(
            indices=changed_indices,
            values=new_values,
            shapes={name: tuple(shapes[name]) for name in changed_indices},
            before=digests,
            task=task,
            base=base,
            parent=parent,
            info={
                **info,
                "selected": num_selected,
                "unchanged": num_selected - num_changed,
            },
        )

    @property
    def entries(self) -> int:
        """Number of entries that the delta changes."""
        return sum(map(len, self.indices.values()))

    def require_applicable(self, tensors: NamedTensors) -> dict[str, Tensor]:
        """Raise DeltaError unless every tensor holds the values that this delta starts from.

        Returns those values: {name: 1-D tensor on the CPU}, in index order. Writes nothing.
        """
        before: dict[str, Tensor] = {}
        for name, index in self.indices.items():
            if name not in tensors:
                raise MismatchError(f"task {self.task!r} changes {name}, which is not there")

            tensor = tensors[name]
            self.require_tensor_kind(name, shape_of(tensor), tensor.dtype)
            # entries are written through a flat view
            has_flat_view = is_partitioned(tensor) or tensor.is_contiguous()
            self._require_equal(name, "contiguous", True, has_flat_view)

            before[name] = gather_entries(tensor, index).cpu()
            self.require_before_digest(name, compute_digest(before[name]))
        return before

    def require_tensor_kind(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        """Raise MismatchError unless a tensor is of the shape and dtype that this delta changes."""
        own_shape = list(self.shapes[name])
        own_dtype = self.values[name].dtype
        self._require_equal(name, "shape", own_shape, list(shape))
        self._require_equal(name, "dtype", own_dtype, dtype)

    def _require_equal(
        self,
        name: str,
        what: str,
        expected: object,
        found: object,
    ) -> None:
        if expected != found:
            place = f"task {self.task!r}: {name}: {what}"
            raise MismatchError(f"{place}: expected {expected}, found {found}")

    def require_before_digest(self, name: str, found: str) -> None:
        """Raise unless `found` is the SHA-256 of the values that this delta replaces in a tensor.

        BaseError for a delta that starts from its base, OrderError for one that continues another.
        """
        if found == self.before[name]:
            return

        if self.parent:
            error = OrderError
            start = f"delta {self.parent[:12]}…"
        else:
            error = BaseError
            start = f"base {self.base[:12]}…"
        raise error(
            f"task {self.task!r} starts from {start}, which is not what stands here: {name}: "
            f"SHA-256 before: expected {self.before[name][:12]}…, found {found[:12]}…"
        )

    def apply(self, tensors: NamedTensors) -> dict[str, Tensor]:
        """Check everything, then write the new values in place: all of them or none.

        Returns the values before, as `require_applicable` does: at `indices` they undo the delta.
        """
        before = self.require_applicable(tensors)
        scatter_entries(
            (tensors[name], index, self.values[name]) for name, index in self.indices.items()
        )
        return before

    @property
    def arrays(self) -> DeltaArrays:
        """The delta as numpy arrays, in the same memory."""
        return DeltaArrays(
            indices={name: indices.numpy() for name, indices in self.indices.items()},
            values={name: to_value_row(values) for name, values in self.values.items()},
            shapes=self.shapes,
            before=self.before,
            task=self.task,
            base=self.base,
            parent=self.parent,
            info=self.info,
        )

    @classmethod
    def from_arrays(cls, arrays: DeltaArrays) -> "Delta":
        """Return a delta in the memory of arrays."""
        indices: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for name, row in arrays.indices.items():
            indices[name], values[name] = tensors_of(row, arrays.values[name])

        return cls(
            indices=indices,
            values=values,
            shapes=arrays.shapes,
            before=arrays.before,
            task=arrays.task,
            base=arrays.base,
            parent=arrays.parent,
            info=arrays.info,
        )

    def to_bytes(self, codec: str = "gap") -> bytes:
        """Return the file's content; the same delta gives the same bytes."""
        return self.arrays.to_bytes(codec)

    @classmethod
    def from_bytes(cls, data: bytes, origin: str = "delta") -> "Delta":
        """Validate and decode a file's content; `origin` names it in errors."""
        return cls.from_arrays(DeltaArrays.from_bytes(data, origin))

    def save(self, path: str | Path, codec: str = "gap") -> str:
        """Write the file, whole or not at all; return its SHA-256, the next delta's parent."""
        path = as_path(path, "delta")
        data = self.to_bytes(codec)
        try:
            atomic.write_atomically(path, data)
        except OSError as error:
            raise DeltaError(f"{path}: cannot be written: {error.strerror}") from error
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """Read and validate a file."""
        return cls.from_arrays(DeltaArrays.load(path))


def _filter_changed(
    name: str,
    indices: Tensor,
    before: Tensor,
    after: Tensor,
) -> tuple[Tensor, ...]:
    """Return indices, values before and values after of the entries that changed, on the CPU."""
    if indices.shape != before.shape:
        raise MismatchError(f"{name}: {type_of(indices)} indices for {type_of(before)} values")

    rows = [row.detach().cpu().contiguous() for row in (indices, before, after)]
    changed = find_changed_indices(rows[1], rows[2])
    return tuple(read_entries(row, changed) for row in rows)
