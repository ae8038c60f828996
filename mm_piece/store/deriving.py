"""New deltas out of old ones and out of checkpoints: merge, extract, remove.

Every result is derived from stored data: the deltas' new values, and the base's files, which are
read slice by slice. No function needs a model in memory.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_piece.deltas import file as deltafile
from mm_piece.deltas import merging
from mm_piece.deltas.delta import Delta, find_changed_indices
from mm_piece.deltas.entry_sets import find_shared_entries, list_shared_names
from mm_piece.deltas.file_layout import layout_of
from mm_piece.deltas.header import TensorRecord, make_tensor_record
from mm_piece.deltas.tensor_rows import index_dtype, to_value_row
from mm_piece.dtypes import view_bits
from mm_piece.entries import read_entries
from mm_piece.errors import (
    BaseError,
    ConflictError,
    DeltaError,
    ModelError,
    StoreError,
    as_path,
)
from mm_piece.files import atomic
from mm_piece.models.checkpoint import Checkpoint, fetch_checkpoint
from mm_piece.models.checkpoint_tensor import CheckpointTensor
from mm_piece.store.base_location import relocate_base
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.inspection import as_store
from mm_piece.store.squashing import join_task_names, make_delta, read_values


def merge(
    deltas: Sequence[Delta],
    base: str | Path,
    rule: str = "error",
    *,
    task: str | None = None,
) -> Delta:
    """Return one delta out of several that each start from `base`.

    `rule` is one of `merging.MERGE_RULES`. Raises ConflictError (rule `error`), BaseError or
    OrderError for a delta that does not start from the base.
    """
    if not deltas:
        raise DeltaError("nothing to merge: name at least one delta")
    merging.require_mergeable(deltas, rule)

    # the deltas hold no dtype of the base: it is cast to theirs, as it was for their training
    folder = fetch_checkpoint(base)
    dtype = _find_common_dtype(deltas)
    checkpoint = Checkpoint(folder, dtype)
    expected = deltas[0].base
    found = checkpoint.compute_fingerprint()
    if found != expected:
        raise BaseError(
            f"the deltas belong to another base than {base}: "
            f"expected fingerprint {expected[:12]}…, found {found[:12]}…"
        )

    index = merging.collect_indices(deltas)
    before = read_values(checkpoint, index)
    after = merging.merge_deltas(deltas, index, before, rule)

    tasks = [delta.task for delta in deltas]
    title = task or join_task_names(tasks)
    change = (index, before, after)
    info = {"rule": rule, "merged": tasks}
    return make_delta(checkpoint, title, change, info)


def extract(
    base: str | Path,
    tuned: str | Path,
    to: str | Path,
    *,
    task: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> dict[str, int]:
    """Write the delta between two ordinary checkpoints (folders or hub ids) to the file `to`.

    Both are cast to `dtype` (default: the tuned one's) and compared tensor by tensor, bit by bit.
    Memory holds one tensor's changed entries at a time. Returns the counts `entries` (changed) and
    `of` (all), and the file's `bytes`. Raises ModelError if the two have different weights.
    """
    to = as_path(to, "the file to write")
    new = Checkpoint(fetch_checkpoint(tuned), dtype)
    old = Checkpoint(fetch_checkpoint(base), new.dtype)

    # match all pairs first: nothing is written for checkpoints that do not fit
    pairs = list(_iter_weight_pairs(old, new))
    header: dict[str, Any] = {
        "task": task or to.stem,
        "base": old.compute_fingerprint(),
        "parent": "",
    }
    try:
        with (
            deltafile.packing_delta(to) as packer,
            atomic.writing_atomically(to) as file,
        ):
            # the header comes first in the file but counts what follows, so the packer spools
            records = dict(_pack_changes(pairs, packer))
            entries = sum(record["entries"] for record in records.values())
            info: dict[str, Any] = {
                "method": "extract",
                "selected": entries,
                "unchanged": 0,
            }
            info.update(layout_of(records, old.layout))
            header["info"] = info
            header["tensors"] = records
            packer.write_file(header, file)
    except OSError as error:
        raise DeltaError(f"{error.filename or to}: {error.strerror}") from error

    total = sum(before.location.size for before, _ in pairs)
    return {
        "entries": entries,
        "of": total,
        "bytes": to.stat().st_size,
    }


def remove_task(
    store: str | Path | DeltaStore,
    task: str,
    to: str | Path,
) -> DeltaStore:
    """Return a new store at `to` without one task.

    No other task of the store may change an entry of that task. The other deltas stay the same but
    for the chain of parents. Results are not carried over: they were measured on other models.
    Raises StoreError for an unknown task, ConflictError where the masks are not disjoint.
    """
    opened = as_store(store)
    names = [entry.task for entry in opened.entries]
    if task not in names:
        raise StoreError(f"{opened.path} has no task {task!r}; it has {', '.join(names) or 'none'}")

    deltas = opened.deltas()
    removed = deltas.pop(names.index(task))
    for other in deltas:
        _require_disjoint(removed, other)

    recipe = opened.load_recipe()
    remaining = tuple(item for item in recipe.tasks if item.name != task)
    changes = {
        "tasks": remaining,
        "store": str(to),
    }
    new_recipe = recipe.model_copy(update=changes)
    base = relocate_base(opened.base, opened.path, Path(to))
    new = DeltaStore.create(to, base.facts, new_recipe.to_yaml())

    # a delta's file names its parent, so each one is written anew on top of the last
    for delta in deltas:
        parent = new.entries[-1].sha256 if len(new) else ""  # "" stands for the base
        new.append(replace(delta, parent=parent))
    return new


def _find_common_dtype(deltas: Sequence[Delta]) -> torch.dtype:
    """Return the floating dtype that the deltas were trained in."""
    found: set[torch.dtype] = set()
    for delta in deltas:
        found.update(values.dtype for values in delta.values.values())

    floating = [dtype for dtype in found if dtype.is_floating_point]
    floating.sort(key=str)  # the message below has one order, a set has none
    if len(floating) > 1:
        raise DeltaError(f"deltas of different dtypes do not merge: {floating}")

    return floating[0] if floating else torch.float32


def _iter_weight_pairs(
    old: Checkpoint,
    new: Checkpoint,
) -> Iterator[tuple[CheckpointTensor, CheckpointTensor]]:
    """Yield each weight of the base and of the tuned checkpoint, in the base's order.

    Raises ModelError where the two differ in family, weights or shapes.
    """
    if old.family != new.family:
        raise ModelError(f"{old.folder} is a {old.family} model, {new.folder} a {new.family} model")

    added = sorted(new.parameters.keys() - old.parameters.keys())
    if added:
        name = added[0]
        tied = f", which {old.folder} ties to {old.tied[name]}" if name in old.tied else ""
        raise ModelError(
            f"{new.folder} has a weight {name} of its own{tied}: a delta adds no weights"
        )

    for name, weight in old.parameters.items():
        # a checkpoint may tie what the other stores twice: a tied weight has its twin's values
        stored_name = new.tied.get(name, name)
        after = new.parameters.get(stored_name)
        if after is None:
            raise ModelError(f"{new.folder} lacks the weight {name} of {old.folder}")
        if weight.shape != after.shape:
            shapes = f"{list(weight.shape)} and {list(after.shape)}"
            raise ModelError(f"{name} has the shapes {shapes}: a delta changes no shapes")
        yield weight, after


def _pack_changes(
    pairs: Sequence[tuple[CheckpointTensor, CheckpointTensor]],
    packer: deltafile.DeltaPacker,
) -> Iterator[tuple[str, TensorRecord]]:
    """Pack the changed entries, tensor by tensor; yield the header's record of each tensor."""
    for before, after in pairs:
        index, values, digest = _find_changes(before, after)
        if len(index):
            row = to_value_row(values)
            packer.add_tensor(before.name, index.numpy(), row)
            record = make_tensor_record(
                before.shape,
                row.dtype,
                len(index),
                digest,
            )
            yield before.name, record


def _find_changes(
    before: CheckpointTensor,
    after: CheckpointTensor,
) -> tuple[Tensor, Tensor, str]:
    """Return the indices, new values and SHA-256 before of the entries whose bits differ."""
    stored_dtype = index_dtype(before.location.size)
    # the empty first items keep the dtypes where nothing changed
    indices = [torch.empty(0, dtype=stored_dtype)]
    values = [torch.empty(0, dtype=after.dtype)]
    sha = hashlib.sha256()

    # equal shapes give equal slices on both sides
    slices = zip(before.iter_pieces(), after.iter_pieces(), strict=True)
    for (first, old), (_, new) in slices:
        changed = find_changed_indices(old, new)
        replaced = read_entries(old, changed)  # (changed entries,)
        sha.update(view_bits(replaced).numpy().data)

        # a slice's indices may be narrower than the tensor's: widen, then add the offset
        positions = changed.to(torch.int64) + first
        indices.append(positions.to(stored_dtype))
        values.append(read_entries(new, changed))

    return torch.cat(indices), torch.cat(values), sha.hexdigest()


def _require_disjoint(removed: Delta, other: Delta) -> None:
    """Raise ConflictError if another delta changes an entry of the removed one."""
    left = removed.arrays
    right = other.arrays
    counts = {}
    for name in list_shared_names(left, right):
        shared, _, _ = find_shared_entries(left, right, name)
        counts[name] = len(shared)

    count = sum(counts.values())
    if count:
        name = next(name for name in counts if counts[name])
        raise ConflictError(
            f"{removed.task!r} cannot be taken out: {other.task!r} changes {count:,} of its "
            f"{removed.entries:,} entries too, in {name} first"
        )
