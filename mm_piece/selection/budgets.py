"""Budgets: which entries compete with each other, and how many of them are chosen.

All weights in one contest, or one for each group, pattern or tensor. A *unit* is what is chosen
whole: an entry, or a row (the entries that make one output).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal
from fnmatch import fnmatchcase
from math import floor
from typing import Any, Literal

from mm_piece.errors import SelectionError
from mm_piece.families import GROUPS, group_of

Density = float | str | Mapping[str, float]  # of all units, by group and pattern of names, or auto
Scope = Literal["global", "tensor"]
Unit = Literal["entry", "row"]
Sizes = Mapping[str, int]  # units per tensor, in model order

AUTO_CEILING = 0.05


@dataclass(frozen=True)
class Budgets:
    """How much is chosen, and where.

    `density`: a share of all units; one for each group or pattern of names (the first pattern that
    fits a name, else its group; what fits none gets nothing); or `auto`, see `knee`. `scope`
    "tensor" gives every tensor its own share. `floor` and `ceiling` bound the share of a group
    under one density for all; `ceiling` as a number bounds `auto`. `squares`: the scores are
    squares of what `auto` weighs, as PIECE-F's are squares of gradients.
    """

    density: Density = 0.001
    scope: Scope = "global"
    unit: Unit = "entry"
    floor: Mapping[Any, float] = field(default_factory=dict)
    ceiling: float | Mapping[Any, float] = field(default_factory=dict)
    squares: bool = False

    def __post_init__(self) -> None:
        """Raise SelectionError for what cannot stand together."""
        bounds = (self.floor, self.ceiling)
        if self.scope not in ("global", "tensor") or self.unit not in ("entry", "row"):
            raise SelectionError("scope must be global or tensor, unit must be entry or row")
        _require_density(self.density)
        if not isinstance(self.floor, Mapping):
            raise SelectionError(f"floor {self.floor!r} is no mapping of groups to shares")
        if not isinstance(self.ceiling, Mapping) and self.density != "auto":
            raise SelectionError("ceiling: a number bounds density: auto; else name groups")
        named = any(isinstance(bound, Mapping) and bound for bound in bounds)
        if named and (self.scope == "tensor" or not isinstance(self.density, int | float)):
            raise SelectionError("floor and ceiling of groups go with one density, scope global")
        for bound in bounds:
            _require_shares(bound)


@dataclass(frozen=True)
class Subgroup:
    """Tensors of a contest that get at least `low` and at most `high` of its places."""

    names: tuple[str, ...]
    min_quota: int
    max_quota: int


@dataclass(frozen=True)
class TopKGroup:
    """Tensors whose units compete for `k` places; with `auto` for at most so many."""

    label: str
    subgroups: tuple[Subgroup, ...]
    k: int
    auto: bool = False

    @property
    def names(self) -> list[str]:
        """The tensors of all parts."""
        return [name for subgroup in self.subgroups for name in subgroup.names]


def build_topk_groups(sizes: Sizes, budgets: Budgets) -> list[TopKGroup]:
    """Who competes for how many places; `sizes` counts units.

    Raises SelectionError for a density out of (0, 1], one that selects nothing, a key that fits no
    tensor, and bounds that leave more or fewer places than there are.
    """
    density = budgets.density
    if isinstance(density, Mapping):
        members = _match_tensor_names(sizes, density)
        return [
            group
            for key in density
            for group in _build_density_groups(key, density[key], members[key], sizes, budgets)
        ]
    share = _auto_ceiling(budgets) if isinstance(density, str) else density
    return _build_density_groups("all", share, list(sizes), sizes, budgets)


def count_selected(density: float, total: int, label: str = "all", unit: Unit = "entry") -> int:
    """How many of `total` units a density selects, exact for the decimal number as written.

    Entries: `floor(density * total)`. Rows: those at or above the `1 - density` quantile, as FGGM
    and MIGU take it, interpolated linearly. Raises SelectionError if that is none.
    """
    if not _is_number(density) or not 0 < density <= 1:
        raise SelectionError(f"density {density} is out of (0, 1]")
    share = _to_decimal(density)
    if unit == "row" and total:
        below = ((1 - share) * (total - 1)).to_integral_value(ROUND_CEILING)
        return total - int(below)
    k = floor(share * total)
    if k == 0:
        hint = "" if total else "; is the group excluded, or does the model not have it?"
        raise SelectionError(
            f"density {density} of {total} patchable {_UNIT_PLURALS[unit]} ({label}) selects "
            f"none{hint}"
        )
    return k


_UNIT_PLURALS = {"entry": "entries", "row": "rows"}


def _build_density_groups(
    label: str, share: float, names: list[str], sizes: Sizes, budgets: Budgets
) -> list[TopKGroup]:
    """The contests of tensors with one density: one, or with scope tensor one for each."""
    total, auto = sum(sizes[name] for name in names), budgets.density == "auto"
    k = count_selected(share, total, label, budgets.unit)
    if budgets.scope == "global":
        return [TopKGroup(label, _build_subgroups(k, names, sizes, budgets), k, auto)]
    if budgets.unit == "row":
        quotas = {name: count_selected(share, sizes[name], name, "row") for name in names}
    else:
        quotas = _apportion_quotas(share, k, {name: sizes[name] for name in names})
    return [
        TopKGroup(name, (Subgroup((name,), 0, quota),), quota, auto)
        for name, quota in quotas.items()
        if quota
    ]


def _apportion_quotas(share: float, k: int, sizes: Sizes) -> dict[str, int]:
    """Whole places for tensors of equal density, `k` together, by largest remainders."""
    exact = {name: _to_decimal(share) * size for name, size in sizes.items()}
    quotas = {name: floor(exact_quota) for name, exact_quota in exact.items()}
    left = k - sum(quotas.values())
    by_remainder = sorted(exact, key=lambda name: quotas[name] - exact[name])
    for name in by_remainder[:left]:
        quotas[name] += 1
    return quotas


def _build_subgroups(
    k: int, names: list[str], sizes: Sizes, budgets: Budgets
) -> tuple[Subgroup, ...]:
    """The groups of a contest with their bounds; one part if nothing is bound."""
    ceilings = budgets.ceiling if isinstance(budgets.ceiling, Mapping) else {}
    if not budgets.floor and not ceilings:
        return (Subgroup(tuple(names), 0, k),)
    groups = dict.fromkeys(map(group_of, names))
    if absent := [group for group in (*budgets.floor, *ceilings) if group not in groups]:
        raise SelectionError(
            f"floor and ceiling: no patchable entries in {absent[0]}; is the group excluded?"
        )
    subgroups = []
    for group in groups:
        members = tuple(name for name in names if group_of(name) == group)
        total = sum(sizes[name] for name in members)
        max_quota = min(k, floor(_to_decimal(ceilings.get(group, 1)) * total))
        min_quota = floor(_to_decimal(budgets.floor.get(group, 0)) * total)
        if min_quota > max_quota:
            raise SelectionError(
                f"floor of {group}: {min_quota} places, more than the {max_quota} it may get"
            )
        if max_quota:
            subgroups.append(Subgroup(members, min_quota, max_quota))
    _require_feasible_quotas(subgroups, k)
    return tuple(subgroups)


def _require_feasible_quotas(subgroups: Iterable[Subgroup], k: int) -> None:
    min_total, max_total = (
        sum(subgroup.min_quota for subgroup in subgroups),
        sum(subgroup.max_quota for subgroup in subgroups),
    )
    if not min_total <= k <= max_total:
        which = f"floors ask for {min_total}" if min_total > k else f"ceilings leave {max_total}"
        raise SelectionError(f"the {which} places, the density gives {k}")


def _match_tensor_names(sizes: Sizes, density: Mapping[str, float]) -> dict[str, list[str]]:
    """The tensors of each key: a pattern takes what no earlier one took, a group the rest."""
    patterns = [key for key in density if key not in GROUPS]
    members: dict[str, list[str]] = {key: [] for key in density}
    for name in sizes:
        key = next((p for p in patterns if fnmatchcase(name, p)), group_of(name))
        if key in members:
            members[key].append(name)
    if unused := [p for p in patterns if not members[p]]:
        raise SelectionError(
            f"density: no patchable weight is called {unused[0]!r}; "
            f"groups: {', '.join(GROUPS)}; patterns fit published names"
        )
    return members


def _auto_ceiling(budgets: Budgets) -> float:
    return AUTO_CEILING if isinstance(budgets.ceiling, Mapping) else budgets.ceiling


def _require_density(density: Any) -> None:
    if density == {}:
        raise SelectionError("density: no group or pattern has a share")
    if density != "auto" and not _is_number(density) and not isinstance(density, Mapping):
        raise SelectionError(f"density {density!r} is no number, mapping or auto")


def _require_shares(bound: float | Mapping[str, float]) -> None:
    shares = bound if isinstance(bound, Mapping) else {"all": bound}
    for group, share in shares.items():
        if isinstance(bound, Mapping) and group not in GROUPS:
            raise SelectionError(f"unknown group {group!r}; groups: {', '.join(GROUPS)}")
        if not _is_number(share) or not 0 < share <= 1:
            raise SelectionError(f"bound {share!r} of {group} is out of (0, 1]")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _to_decimal(share: float) -> Decimal:
    return Decimal(repr(float(share)))
