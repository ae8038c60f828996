"""New deltas out of old ones and out of checkpoints: squash, merge, extract, without, diff.

All of them are derived from what is stored (new values against a base) and from the base's files,
which are read slice by slice; none needs a model in memory.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_piece.deltas import file as deltafile
from mm_piece.deltas import merging
from mm_piece.deltas.comparison import compare_positions
from mm_piece.deltas.delta import Delta, find_changed_indices, gather_entries, make_tensor_record
from mm_piece.deltas.file_layout import layout_of
from mm_piece.deltas.header import MAX_NAME_LENGTH, index_dtype
from mm_piece.dtypes import view_bits
from mm_piece.errors import BaseError, ConflictError, DeltaError, ModelError, StoreError, as_path
from mm_piece.files import atomic
from mm_piece.models.checkpoint import Checkpoint, CheckpointTensor, fetch_checkpoint
from mm_piece.recipe import parse_recipe
from mm_piece.store.base_record import relocate_base
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.exporting import open_base_checkpoint
from mm_piece.store.loading import as_store


def squash(
    store: str | Path | DeltaStore,
    at: int | None = None,
    *,
    task: str | None = None,
    base: str | Path | None = None,
) -> Delta:
    """One delta from the base straight to a position (default: the last), exactly.

    It holds the entries whose bits differ between the two. `task` names it, by default after the
    tasks it holds. Raises PositionError, and what a damaged chain or another base raises.
    """
    opened = as_store(store)
    last = len(opened) if at is None else at
    deltas, entries = opened.deltas(last), opened.entries[:last]
    checkpoint = open_base_checkpoint(opened, base)
    index = merging.collect_indices(deltas)
    before = _read_values(checkpoint, index)
    after = merging.replay_deltas(deltas, index, before)
    sources = [{"task": entry.task, "sha256": entry.sha256} for entry in entries]
    title = task or _join_task_names([entry.task for entry in entries])
    return _make_delta(checkpoint, title, (index, before, after), {"squashed": sources})


def merge(
    deltas: Sequence[Delta], base: str | Path, rule: str = "error", *, task: str | None = None
) -> Delta:
    """One delta out of several that each start from `base`, by a rule of `merging.RULES`.

    Raises ConflictError (rule `error`), BaseError or OrderError for a delta that does not start
    from the base.
    """
    if not deltas:
        raise DeltaError("nothing to merge: name at least one delta")
    merging.require_mergeable(deltas, rule)
    checkpoint = Checkpoint(fetch_checkpoint(base), _find_common_dtype(deltas))
    if (found := checkpoint.compute_fingerprint()) != deltas[0].base:
        raise BaseError(
            f"the deltas belong to another base than {base}: "
            f"expected fingerprint {deltas[0].base[:12]}…, found {found[:12]}…"
        )
    index = merging.collect_indices(deltas)
    before = _read_values(checkpoint, index)
    after = merging.merge_deltas(deltas, index, before, rule)
    facts: dict[str, Any] = {"rule": rule, "merged": [delta.task for delta in deltas]}
    title = task or _join_task_names(facts["merged"])
    return _make_delta(checkpoint, title, (index, before, after), facts)


def extract(
    base: str | Path,
    tuned: str | Path,
    to: str | Path,
    *,
    task: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> dict[str, int]:
    """Write the delta between two ordinary checkpoints (folders or hub ids) to the file `to`.

    Both are cast to `dtype` (default: the tuned one's) and compared tensor by tensor, bit by bit; a
    tensor's changed entries are all that is held. Returns how many entries of how many changed.
    Raises ModelError where the two have not the same weights.
    """
    to = as_path(to, "the file to write")
    new = Checkpoint(fetch_checkpoint(tuned), dtype)
    old = Checkpoint(fetch_checkpoint(base), new.dtype)
    pairs = list(_iter_weight_pairs(old, new))
    header = {"task": task or to.stem, "base": old.compute_fingerprint(), "parent": ""}
    try:
        with deltafile.packing_delta(to) as packer, atomic.writing_atomically(to) as file:
            records = dict(_pack_changes(pairs, packer))
            entries = sum(found["entries"] for found in records.values())
            counts = {"method": "extract", "selected": entries, "unchanged": 0}
            info = {**counts, **layout_of(records, old.layout)}
            packer.write_file({**header, "info": info, "tensors": records}, file)
    except OSError as error:
        raise DeltaError(f"{error.filename or to}: {error.strerror}") from error
    total = sum(before.location.size for before, _ in pairs)
    return {"entries": entries, "of": total, "bytes": to.stat().st_size}


def remove_task(store: str | Path | DeltaStore, task: str, to: str | Path) -> DeltaStore:
    """A new store at `to` without one task, whose entries no other task of the store may touch.

    The other deltas are the same but for the chain of parents. Results are not carried over: they
    were measured on other models. Raises StoreError for an unknown task, ConflictError where the
    masks are not disjoint.
    """
    opened = as_store(store)
    names = [entry.task for entry in opened.entries]
    if task not in names:
        raise StoreError(f"{opened.path} has no task {task!r}; it has {', '.join(names) or 'none'}")
    deltas = opened.deltas()
    removed = deltas.pop(names.index(task))
    for other in deltas:
        _require_disjoint(removed, other)
    recipe = parse_recipe(opened.recipe, f"{opened.path}/recipe.yaml")
    remaining = tuple(item for item in recipe.tasks if item.name != task)
    new_recipe = recipe.model_copy(update={"tasks": remaining, "store": str(to)})
    new = DeltaStore.create(
        to, relocate_base(opened.base, opened.path, Path(to)), new_recipe.to_yaml()
    )
    for delta in deltas:
        new.append(replace(delta, parent=new.entries[-1].sha256 if len(new) else ""))
    return new


def diff_positions(left: str | Path, right: str | Path) -> dict[str, Any]:
    """Compare two positions: each a store, `STORE@T` or a delta file; see `comparison.compare`."""
    return compare_positions(read_deltas_at(left), read_deltas_at(right))


def read_deltas_at(source: str | Path) -> list[Delta]:
    """The deltas that lead to a place: a store (its last position), `STORE@T`, or a delta file."""
    if Path(source).is_file():
        return [Delta.load(source)]
    match = re.fullmatch(r"(.+)@(\d+)", str(source))
    if match and not Path(source).exists():
        return DeltaStore.open(match[1]).deltas(int(match[2]))
    return DeltaStore.open(source).deltas()


def _read_values(checkpoint: Checkpoint, index: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = checkpoint.parameters
    if unknown := sorted(index.keys() - parameters.keys()):
        raise ModelError(f"{checkpoint.folder} has no weight {unknown[0]}, which a delta changes")
    return {name: parameters[name].read_entries(indices) for name, indices in index.items()}


def _make_delta(
    checkpoint: Checkpoint,
    task: str,
    change: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]],
    info: dict[str, Any],
) -> Delta:
    shapes = {name: checkpoint.parameters[name].shape for name in change[0]}
    base, info = (
        checkpoint.compute_fingerprint(),
        {**info, **layout_of(change[0], checkpoint.layout)},
    )
    return Delta.from_change(*change, shapes, task=task, base=base, info=info)


def _join_task_names(tasks: Sequence[str]) -> str:
    """Return the name of several tasks in one."""
    title = "+".join(tasks) or "base"
    return title if len(title) <= MAX_NAME_LENGTH else f"{len(tasks)} tasks"


def _find_common_dtype(deltas: Sequence[Delta]) -> torch.dtype:
    """Return the floating dtype that the deltas were trained in."""
    found = {values.dtype for delta in deltas for values in delta.values.values()}
    floating = sorted((dtype for dtype in found if dtype.is_floating_point), key=str)
    if len(floating) > 1:
        raise DeltaError(f"deltas of different dtypes do not merge: {floating}")
    return floating[0] if floating else torch.float32


def _iter_weight_pairs(
    old: Checkpoint, new: Checkpoint
) -> Iterator[tuple[CheckpointTensor, CheckpointTensor]]:
    """Yield each weight of the base and of the tuned checkpoint, in the base's order."""
    if old.family != new.family:
        raise ModelError(f"{old.folder} is a {old.family} model, {new.folder} a {new.family} model")
    for name in sorted(new.parameters.keys() - old.parameters.keys()):
        tied = f", which {old.folder} ties to {old.tied[name]}" if name in old.tied else ""
        raise ModelError(
            f"{new.folder} has a weight {name} of its own{tied}: a delta adds no weights"
        )
    for name, weight in old.parameters.items():
        after = new.parameters.get(new.tied.get(name, name))  # a tied one has its twin's values
        if after is None:
            raise ModelError(f"{new.folder} lacks the weight {name} of {old.folder}")
        if weight.shape != after.shape:
            shapes = f"{list(weight.shape)} and {list(after.shape)}"
            raise ModelError(f"{name} has the shapes {shapes}: a delta changes no shapes")
        yield weight, after


def _pack_changes(
    pairs: Sequence[tuple[CheckpointTensor, CheckpointTensor]], packer: deltafile.DeltaPacker
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pack what changed, tensor by tensor; yield what the header says of each."""
    for before, after in pairs:
        index, values, digest = _find_changes(before, after)
        if len(index):
            packer.add_tensor(before.name, index, values)
            yield before.name, make_tensor_record(before.shape, values, digest)


def _find_changes(before: CheckpointTensor, after: CheckpointTensor) -> tuple[Tensor, Tensor, str]:
    """Return indices, new values and SHA-256 before of the entries whose bits differ."""
    stored_dtype = index_dtype(before.location.size)
    indices, values = [torch.empty(0, dtype=stored_dtype)], [torch.empty(0, dtype=after.dtype)]
    sha = hashlib.sha256()
    for (first, old), (_, new) in zip(before.iter_pieces(), after.iter_pieces(), strict=True):
        changed = find_changed_indices(old, new)
        sha.update(view_bits(gather_entries(old, changed)).numpy().data)
        indices.append((changed.to(torch.int64) + first).to(stored_dtype))
        values.append(gather_entries(new, changed))
    return torch.cat(indices), torch.cat(values), sha.hexdigest()


def _require_disjoint(removed: Delta, other: Delta) -> None:
    counts = {
        name: len(merging.find_shared_entries(removed, other, name)[0]) for name in removed.indices
    }
    if count := sum(counts.values()):
        name = next(name for name, found in counts.items() if found)
        raise ConflictError(
            f"{removed.task!r} cannot be taken out: {other.task!r} changes {count:,} of its "
            f"{removed.entries:,} entries too, in {name} first"
        )
