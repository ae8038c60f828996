"""A position of a store as one delta, and a change of a base's weights as a delta."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mm_piece.deltas import merging
from mm_piece.deltas.delta import Delta
from mm_piece.deltas.file_layout import layout_of
from mm_piece.deltas.header import MAX_NAME_LENGTH
from mm_piece.errors import ModelError
from mm_piece.models.plain_checkpoint import PlainCheckpoint, find_plain_checkpoint
from mm_piece.store.base_location import base_source
from mm_piece.store.base_reading import reading_of, trained_dtype
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.inspection import as_store

if TYPE_CHECKING:
    from mm_piece.models.checkpoint import Checkpoint

TensorMap = dict[str, Tensor]  # by weight name: flat indices or values of its entries


def squash(
    store: str | Path | DeltaStore,
    at: int | None = None,
    *,
    task: str | None = None,
    base: str | Path | None = None,
) -> Delta:
    """Return one delta from the base straight to a position (default: the last), exactly.

    It holds the entries whose bits differ between the two. `task` names it; by default its name
    joins those of its tasks. Raises PositionError, and what a damaged chain or another base raises.
    """
    opened = as_store(store)
    last = len(opened) if at is None else at
    deltas = opened.deltas(last)
    entries = opened.entries[:last]

    # a delta that a later one undoes leaves nothing: values are compared at the two ends only
    checkpoint = _open_base_weights(opened, base)
    index = merging.collect_indices(deltas)
    before = read_values(checkpoint, index)
    after = merging.replay_deltas(deltas, index, before)

    tasks = [entry.task for entry in entries]
    title = task or join_task_names(tasks)
    sources = [{"task": entry.task, "sha256": entry.sha256} for entry in entries]
    change = (index, before, after)
    info = {"squashed": sources}
    return make_delta(checkpoint, title, change, info)


def read_values(
    checkpoint: "Checkpoint | PlainCheckpoint",
    index: TensorMap,
) -> TensorMap:
    """Read the checkpoint's values at the entries `index`; ModelError for an unknown weight."""
    parameters = checkpoint.parameters
    unknown = sorted(index.keys() - parameters.keys())
    if unknown:
        raise ModelError(f"{checkpoint.folder} has no weight {unknown[0]}, which a delta changes")

    values = {}
    for name, indices in index.items():
        values[name] = parameters[name].read_entries(indices)
    return values


def make_delta(
    checkpoint: "Checkpoint | PlainCheckpoint",
    task: str,
    change: tuple[TensorMap, TensorMap, TensorMap],
    info: dict[str, Any],
) -> Delta:
    """Build the delta of a change (indices, values before, values after) of a checkpoint."""
    index, before, after = change
    shapes = {name: checkpoint.parameters[name].shape for name in index}
    base = checkpoint.compute_fingerprint()
    layout = layout_of(index, checkpoint.layout)
    return Delta.from_change(
        index,
        before,
        after,
        shapes,
        task=task,
        base=base,
        info={**info, **layout},
    )


def join_task_names(tasks: Sequence[str]) -> str:
    """Return one name for several tasks."""
    title = "+".join(tasks) or "base"  # position 0 has no task
    if len(title) > MAX_NAME_LENGTH:
        return f"{len(tasks)} tasks"
    return title


def _open_base_weights(
    store: DeltaStore,
    base: str | Path | None,
) -> "Checkpoint | PlainCheckpoint":
    """Open the files of a store's base, in the dtype trained in; BaseError if another base."""
    source = base or base_source(store.base, store.path)[0]
    family = store.base.family
    if family is not None and not reading_of(store.base, store.path):
        plain = find_plain_checkpoint(
            Path(source),
            family,
            trained_dtype(store.base, store.path),
            store.base.fingerprint,
        )
        if plain is not None:
            return plain

    from mm_piece.store.exporting import open_base_checkpoint  # imports transformers

    return open_base_checkpoint(store, base)
