"""Several deltas into one: in order (`compose_deltas`, `replay_deltas`), or as a set by a rule.

`MERGE_RULES` decide where several deltas change one entry:

    error   deltas that change one entry to different values do not merge
    last    the later one named wins
    first   the earlier one named wins
    sum     base + Σ (value − base), in fp32, rounded once
    ties    base + mean of the changes that agree with the sign of Σ (value − base), likewise

Where one delta alone changes an entry, every rule keeps its value, bit for bit. `sum` and `ties` do
not depend on the order. `ties` is TIES-Merging (Yadav et al. 2023, arXiv 2306.01708) with λ = 1 and
without its trimming, since the deltas are sparse already; where the changes cancel, the base stays.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mm_piece.deltas.arrays import DeltaArrays
from mm_piece.deltas.delta import (
    Delta,
    Entries,
    compute_digest,
)
from mm_piece.deltas.entry_sets import compose_entries, find_conflicts, list_shared_names
from mm_piece.deltas.rows import Indices
from mm_piece.deltas.tensor_rows import tensors_of
from mm_piece.entries import read_entries, write_entries
from mm_piece.errors import (
    BaseError,
    ConflictError,
    OrderError,
    PieceError,
)

TensorChange = tuple[Tensor, Tensor]  # positions in the union of all entries, values
# the base's values at the union, changes -> new values
MergeRule = Callable[[Tensor, Sequence[TensorChange]], Tensor]


def compose_deltas(deltas: Iterable[Delta]) -> Entries:
    """Merge deltas, in order, into one set of entries; where they meet, the later one wins."""
    arrays = [delta.arrays for delta in deltas]
    composed: Entries = {}
    for name, (indices, values) in compose_entries(arrays).items():
        composed[name] = tensors_of(indices, values)
    return composed


def collect_indices(deltas: Sequence[Delta]) -> dict[str, Tensor]:
    """Return the sorted flat indices of all entries that any of the deltas changes."""
    composed = compose_deltas(deltas)
    return {name: indices for name, (indices, _) in composed.items()}


def replay_deltas(
    deltas: Sequence[Delta],
    index: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the values of the entries `index` after `deltas`, in order.

    `base` holds the values before. Each delta is checked against the values that it replaces;
    raises BaseError or OrderError.
    """
    state = {name: values.clone() for name, values in base.items()}
    for delta in deltas:
        for name, touched in delta.indices.items():
            positions = torch.searchsorted(index[name], touched)
            replaced = read_entries(state[name], positions)
            delta.require_before_digest(name, compute_digest(replaced))
            change = (state[name], positions, delta.values[name])
            write_entries([change])
    return state


def merge_deltas(
    deltas: Sequence[Delta],
    index: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    rule: str = "error",
) -> dict[str, Tensor]:
    """Return the values of the entries `index` (their union) once all `deltas` are merged.

    Every delta must start from `base`, the values before. Raises OrderError or BaseError where one
    does not, ConflictError under the rule `error`, PieceError for an unknown rule or numbers that
    cannot be added.
    """
    require_mergeable(deltas, rule)

    merged: dict[str, Tensor] = {}
    for name, values in base.items():
        changes: list[TensorChange] = []
        for delta in _find_touching(deltas, name):
            positions = torch.searchsorted(index[name], delta.indices[name])
            replaced = read_entries(values, positions)
            # siblings all start from the base, so each is checked against the base's values
            delta.require_before_digest(name, compute_digest(replaced))
            changes.append((positions, delta.values[name]))
        merged[name] = MERGE_RULES[rule](values, changes)
    return merged


def require_mergeable(
    deltas: Sequence[Delta],
    rule: str,
) -> None:
    """Raise for all that shows without the base: other bases, a sequence, conflicts under `error`.

    Raises BaseError, OrderError, ConflictError; PieceError for an unknown rule.
    """
    if rule not in MERGE_RULES:
        raise PieceError(f"unknown rule {rule!r}; known: {', '.join(MERGE_RULES)}")

    _require_siblings(deltas)
    if rule == "error":
        require_agreement(deltas)


def require_agreement(deltas: Sequence[Delta]) -> None:
    """Raise ConflictError if two deltas change an entry to different values."""
    arrays = [delta.arrays for delta in deltas]
    for number, left in enumerate(arrays):
        for right in arrays[number + 1 :]:
            _require_pair_agreement(left, right)


def _require_pair_agreement(
    left: DeltaArrays,
    right: DeltaArrays,
) -> None:
    conflicts: dict[str, Indices] = {}
    for name in list_shared_names(left, right):
        found = find_conflicts(left, right, name)
        if len(found):
            conflicts[name] = found
    if not conflicts:
        return

    count = sum(len(found) for found in conflicts.values())
    # dicts keep their order: this is the earliest tensor and its lowest index
    first_name = next(iter(conflicts))
    first_index = int(conflicts[first_name][0])
    deciding = [rule for rule in MERGE_RULES if rule != "error"]
    raise ConflictError(
        f"{left.task!r} and {right.task!r} change {count:,} entries to different "
        f"values, {first_name}[{first_index}] first; "
        f"rules that decide: {', '.join(deciding)}"
    )


def _require_siblings(deltas: Sequence[Delta]) -> None:
    """Raise BaseError or OrderError unless all deltas start from one base."""
    for delta in deltas:
        if delta.base != deltas[0].base:
            raise BaseError(f"{deltas[0].task!r} and {delta.task!r} belong to different bases")
        if delta.parent:
            raise OrderError(
                f"{delta.task!r} continues delta {delta.parent[:12]}…; only deltas that start from "
                "the base merge (squash makes one of a sequence)"
            )


def _find_touching(
    deltas: Sequence[Delta],
    name: str,
) -> list[Delta]:
    """Return the deltas that change a tensor, in order."""
    return [delta for delta in deltas if name in delta.indices]


def _merge_last(
    base: Tensor,
    changes: Sequence[TensorChange],
) -> Tensor:
    merged = base.clone()
    for positions, values in changes:
        write = (merged, positions, values)
        write_entries([write])
    return merged


def _merge_first(
    base: Tensor,
    changes: Sequence[TensorChange],
) -> Tensor:
    reverse = changes[::-1]
    return _merge_last(base, reverse)


def _merge_sum(
    base: Tensor,
    changes: Sequence[TensorChange],
) -> Tensor:
    task_vectors = _compute_task_vectors(base, changes)
    # sorted, so that the rounded sum does not depend on the order of the deltas
    ordered = task_vectors.sort(dim=0).values  # (changes, entries)
    update = ordered.sum(dim=0)
    return _add_and_round(base, update, changes)


def _merge_ties(
    base: Tensor,
    changes: Sequence[TensorChange],
) -> Tensor:
    task_vectors = _compute_task_vectors(base, changes)
    ordered = task_vectors.sort(dim=0).values  # as in `_merge_sum`
    elected_sign = torch.sign(ordered.sum(dim=0))

    # "disjoint merge": the mean of those with the elected sign; zeros of other deltas agree only
    # where the changes cancel, and add nothing there
    agree = torch.sign(ordered) == elected_sign
    num_agreeing = agree.sum(dim=0)
    total = (ordered * agree).sum(dim=0)
    mean = total / num_agreeing.clamp(min=1)
    return _add_and_round(base, mean, changes)


def _compute_task_vectors(
    base: Tensor,
    changes: Sequence[TensorChange],
) -> Tensor:
    """Return value − base, [changes, entries], 0 where a change has no value.

    The dtype is fp32, or fp64 for an fp64 base. Raises PieceError for integers.
    """
    if not base.is_floating_point():
        raise PieceError(f"{base.dtype} values cannot be added; rules that decide: last, first")

    wide = torch.promote_types(base.dtype, torch.float32)
    task_vectors = torch.zeros(len(changes), len(base), dtype=wide)
    for row, (positions, values) in zip(task_vectors, changes, strict=True):
        start = base[positions].to(wide)
        row[positions] = values.to(wide) - start
    return task_vectors


def _add_and_round(
    base: Tensor,
    update: Tensor,
    changes: Sequence[TensorChange],
) -> Tensor:
    """Return base + update in the base's dtype, but the value itself where only one delta has it.

    base + (value − base) misses the value in floating point.
    """
    wide = base.to(update.dtype) + update
    merged = wide.to(base.dtype)

    num_changes = torch.zeros(len(base), dtype=torch.int64)
    for positions, _ in changes:
        num_changes[positions] += 1
    for positions, values in changes:
        changed_once = num_changes[positions] == 1
        write_entries([(merged, positions[changed_once], values[changed_once])])
    return merged


MERGE_RULES: dict[str, MergeRule] = {
    "error": _merge_last,  # require_mergeable has refused all conflicts
    "last": _merge_last,
    "first": _merge_first,
    "sum": _merge_sum,
    "ties": _merge_ties,
}
