"""Several deltas into one: in order (`compose`, `replay`), or as a set by a rule (`RULES`).

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

from mm_piece.deltas.delta import Delta, compute_digest, gather_entries, set_entries
from mm_piece.deltas.file import Entries
from mm_piece.dtypes import view_bits
from mm_piece.errors import BaseError, ConflictError, MismatchError, OrderError, PieceError

TensorChange = tuple[Tensor, Tensor]  # places in the union, values
MergeRule = Callable[
    [Tensor, Sequence[TensorChange]], Tensor
]  # the base's values, changes -> new values


def compose_deltas(deltas: Iterable[Delta]) -> Entries:
    """Merge deltas, in order, into one set of entries; where they meet, the later one wins."""
    deltas = list(deltas)
    if len(bases := {delta.base for delta in deltas}) > 1:
        raise BaseError(f"deltas of different bases do not compose: {sorted(bases)}")
    names = dict.fromkeys(name for delta in deltas for name in delta.indices)
    return {name: _compose_tensor(name, [d for d in deltas if name in d.indices]) for name in names}


def _compose_tensor(name: str, deltas: Sequence[Delta]) -> tuple[Tensor, Tensor]:
    kinds = {(delta.shapes[name], delta.values[name].dtype) for delta in deltas}
    if len(kinds) > 1:
        raise MismatchError(f"{name} is not of one shape and dtype in all deltas: {kinds}")
    indices = torch.cat([delta.indices[name] for delta in deltas])
    values = torch.cat([view_bits(delta.values[name]) for delta in deltas])
    indices, order = torch.sort(indices, stable=True)
    last = torch.ones_like(indices, dtype=torch.bool)
    last[:-1] = indices[1:] != indices[:-1]
    return indices[last], values[order[last]].view(deltas[0].values[name].dtype)


def collect_indices(deltas: Sequence[Delta]) -> dict[str, Tensor]:
    """Return the sorted flat indices of all entries that any of the deltas changes."""
    return {name: index for name, (index, _) in compose_deltas(deltas).items()}


def replay_deltas(
    deltas: Sequence[Delta], index: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the values of the entries `index` after `deltas`, in order.

    `base` holds the values before. Each delta is checked against what it replaces; raises BaseError
    or OrderError.
    """
    state = {name: values.clone() for name, values in base.items()}
    for delta in deltas:
        for name, touched in delta.indices.items():
            at = torch.searchsorted(index[name], touched)
            delta.require_before_digest(name, compute_digest(gather_entries(state[name], at)))
            set_entries(state[name], at, delta.values[name])
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
    merged = {}
    for name, values in base.items():
        changes = [
            _locate_change(delta, name, index[name]) for delta in _find_touching(deltas, name)
        ]
        for delta, (at, _) in zip(_find_touching(deltas, name), changes, strict=True):
            delta.require_before_digest(name, compute_digest(gather_entries(values, at)))
        merged[name] = MERGE_RULES[rule](values, changes)
    return merged


def require_mergeable(deltas: Sequence[Delta], rule: str) -> None:
    """Raise what can be told without the base: another base, a sequence, a conflict under `error`.

    BaseError, OrderError, ConflictError; PieceError for an unknown rule.
    """
    if rule not in MERGE_RULES:
        raise PieceError(f"unknown rule {rule!r}; known: {', '.join(MERGE_RULES)}")
    _require_siblings(deltas)
    if rule == "error":
        require_agreement(deltas)


def require_agreement(deltas: Sequence[Delta]) -> None:
    """Raise ConflictError if two deltas change an entry to different values."""
    for number, left in enumerate(deltas):
        for right in deltas[number + 1 :]:
            conflicts = {name: find_conflicts(left, right, name) for name in left.indices}
            count = sum(len(found) for found in conflicts.values())
            if count:
                name = next(name for name, found in conflicts.items() if len(found))
                raise ConflictError(
                    f"{left.task!r} and {right.task!r} change {count:,} entries to different "
                    f"values, {name}[{int(conflicts[name][0])}] first; "
                    "rules that decide: "
                    f"{', '.join(rule for rule in MERGE_RULES if rule != 'error')}"
                )


def find_shared_entries(left: Delta, right: Delta, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the flat indices that both deltas change in a tensor, and each one's values there."""
    if name not in left.indices or name not in right.indices:
        nothing = torch.empty(0, dtype=torch.int64)
        return nothing, nothing, nothing
    ours, theirs = left.indices[name], right.indices[name]
    _require_same_shape(left, right, name)
    at = torch.searchsorted(theirs, ours).clamp(max=max(len(theirs) - 1, 0))
    hits = torch.nonzero(theirs[at] == ours).view(-1) if len(theirs) else at[:0]
    return (
        ours[hits],
        gather_entries(left.values[name], hits),
        gather_entries(right.values[name], at[hits]),
    )


def find_conflicts(left: Delta, right: Delta, name: str) -> Tensor:
    """Return the flat indices that two deltas change to different bit patterns in a tensor."""
    index, ours, theirs = find_shared_entries(left, right, name)
    if ours.dtype != theirs.dtype:
        return index
    return index[view_bits(ours) != view_bits(theirs)]


def _require_same_shape(left: Delta, right: Delta, name: str) -> None:
    if left.shapes[name] != right.shapes[name]:
        shapes = f"{list(left.shapes[name])} and {list(right.shapes[name])}"
        raise MismatchError(f"{name} has the shapes {shapes} in {left.task!r} and {right.task!r}")


def _require_siblings(deltas: Sequence[Delta]) -> None:
    for delta in deltas:
        if delta.base != deltas[0].base:
            raise BaseError(f"{deltas[0].task!r} and {delta.task!r} belong to different bases")
        if delta.parent:
            raise OrderError(
                f"{delta.task!r} continues delta {delta.parent[:12]}…; only deltas that start from "
                "the base merge (squash makes one of a sequence)"
            )


def _find_touching(deltas: Sequence[Delta], name: str) -> list[Delta]:
    return [delta for delta in deltas if name in delta.indices]


def _locate_change(delta: Delta, name: str, index: Tensor) -> TensorChange:
    return torch.searchsorted(index, delta.indices[name]), delta.values[name]


def _merge_last(base: Tensor, changes: Sequence[TensorChange]) -> Tensor:
    merged = base.clone()
    for at, values in changes:
        set_entries(merged, at, values)
    return merged


def _merge_first(base: Tensor, changes: Sequence[TensorChange]) -> Tensor:
    return _merge_last(base, changes[::-1])


def _merge_sum(base: Tensor, changes: Sequence[TensorChange]) -> Tensor:
    task_vectors = (
        _compute_task_vectors(base, changes).sort(dim=0).values
    )  # a sum that does not depend on the order
    return _add_and_round(base, task_vectors.sum(dim=0), changes)


def _merge_ties(base: Tensor, changes: Sequence[TensorChange]) -> Tensor:
    task_vectors = _compute_task_vectors(base, changes).sort(dim=0).values
    agree = torch.sign(task_vectors) == torch.sign(task_vectors.sum(dim=0))
    mean = (task_vectors * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
    return _add_and_round(base, mean, changes)


def _compute_task_vectors(base: Tensor, changes: Sequence[TensorChange]) -> Tensor:
    """Return value − base, in fp32 (fp64 for fp64), a row for each change; 0 where it has none."""
    if not base.is_floating_point():
        raise PieceError(f"{base.dtype} values cannot be added; rules that decide: last, first")
    wide = torch.promote_types(base.dtype, torch.float32)
    task_vectors = torch.zeros(len(changes), len(base), dtype=wide)
    for row, (at, values) in zip(task_vectors, changes, strict=True):
        row[at] = values.to(wide) - base[at].to(wide)
    return task_vectors


def _add_and_round(base: Tensor, update: Tensor, changes: Sequence[TensorChange]) -> Tensor:
    """Return base + step in the base's dtype, but the value itself where there is only one."""
    merged = (base.to(update.dtype) + update).to(base.dtype)
    count = torch.zeros(len(base), dtype=torch.int64)
    for at, _ in changes:
        count[at] += 1
    for at, values in changes:
        changed_once = count[at] == 1
        set_entries(merged, at[changed_once], values[changed_once])
    return merged


MERGE_RULES: dict[str, MergeRule] = {
    "error": _merge_last,  # nothing is left to decide
    "last": _merge_last,
    "first": _merge_first,
    "sum": _merge_sum,
    "ties": _merge_ties,
}
