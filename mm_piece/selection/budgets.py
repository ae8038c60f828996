"""Budgets: how many units are chosen, and which of them compete with each other.

A *unit* is what is chosen as a whole: an entry of a weight, or an output row (the entries that make
one output). Units compete within *top-k groups*: all weights in one, or one for each group, pattern
of names or tensor. In a top-k group, *subgroups* of tensors may have a smallest and a largest
quota.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal
from fnmatch import fnmatchcase
from math import floor
from typing import Literal

from mm_piece.errors import SelectionError
from mm_piece.families import GROUPS, Group, group_of

# One share of all units, one for each group and pattern of names, or `auto`.
Density = float | str | Mapping[str, float]
GroupShares = Mapping[Group, float]
Scope = Literal["global", "tensor"]
Unit = Literal["entry", "row"]
Sizes = Mapping[str, int]  # units per tensor, in model order

AUTO_CEILING = 0.05  # the largest share that `auto` chooses, unless the budgets give another

_UNIT_PLURALS = {"entry": "entries", "row": "rows"}


@dataclass(frozen=True)
class Budgets:
    """How much is chosen, and where.

    `density` is a share of all units; or one for each group or pattern of names, where the first
    pattern that fits a name counts, else its group, and a tensor that fits none gets nothing; or
    `auto`, see `auto_density`. `scope` "tensor" gives every tensor its own share. `floor` and
    `ceiling` bound the share of a group under one density for all; `ceiling` as a number bounds
    `auto`. With `squares` the scores are squares of the amplitudes that `auto` weighs, as PIECE-F's
    scores are squares of gradients.
    """

    density: Density = 0.001
    scope: Scope = "global"
    unit: Unit = "entry"
    floor: GroupShares = field(default_factory=dict[Group, float])
    ceiling: float | GroupShares = field(default_factory=dict[Group, float])
    squares: bool = False

    def __post_init__(self) -> None:
        """Raise SelectionError for settings that are invalid, alone or together."""
        has_scope = self.scope in ("global", "tensor")
        has_unit = self.unit in ("entry", "row")
        if not has_scope or not has_unit:
            raise SelectionError("scope must be global or tensor, unit must be entry or row")
        _require_density(self.density)
        _require_mapping(self.floor)

        ceiling_is_number = not isinstance(self.ceiling, Mapping)
        if ceiling_is_number and self.density != "auto":
            raise SelectionError("ceiling: a number bounds density: auto; else name groups")

        bounds_groups = bool(self.floor or self.group_ceilings)
        has_one_density = isinstance(self.density, int | float)
        if bounds_groups and (self.scope == "tensor" or not has_one_density):
            raise SelectionError("floor and ceiling of groups go with one density, scope global")

        _require_shares(self.floor)
        _require_shares(self.ceiling)

    @property
    def group_ceilings(self) -> GroupShares:
        """Ceilings of groups: none where the ceiling is a number, which bounds `auto`."""
        if isinstance(self.ceiling, Mapping):
            return self.ceiling
        return {}


@dataclass(frozen=True)
class Subgroup:
    """Tensors of a top-k group that get at least `min_quota` and at most `max_quota` units."""

    names: tuple[str, ...]
    min_quota: int
    max_quota: int


@dataclass(frozen=True)
class TopKGroup:
    """Tensors of which the `k` units with the highest scores are chosen; `auto`: at most k."""

    label: str
    subgroups: tuple[Subgroup, ...]
    k: int
    auto: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the tensors of all subgroups."""
        names: list[str] = []
        for subgroup in self.subgroups:
            names += subgroup.names
        return names


def build_topk_groups(
    sizes: Sizes,
    budgets: Budgets,
) -> list[TopKGroup]:
    """Build the top-k groups that the budgets ask for; `sizes` counts the units of each tensor.

    Raises SelectionError for a density out of (0, 1], one that selects nothing, a key that fits no
    tensor, and bounds that leave more or fewer units than the density gives.
    """
    density = budgets.density
    if isinstance(density, str):  # `auto`
        density = _auto_ceiling(budgets)
    if not isinstance(density, Mapping):
        names = list(sizes)
        return _build_density_groups("all", density, names, sizes, budgets)

    members = _match_tensor_names(sizes, density)
    groups: list[TopKGroup] = []
    for key, share in density.items():
        names = members[key]
        groups += _build_density_groups(key, share, names, sizes, budgets)
    return groups


def count_selected(
    density: float,
    total: int,
    label: str = "all",
    unit: Unit = "entry",
) -> int:
    """Return how many of `total` units a density selects, exact for the decimal number as written.

    Of entries it selects `floor(density * total)`. Of rows it selects those at or above the
    `1 - density` quantile, interpolated linearly, as FGGM and MIGU do. Raises SelectionError for a
    density out of (0, 1], and one that selects no entry.
    """
    if not _is_number(density) or not 0 < density <= 1:
        raise SelectionError(f"density {density} is out of (0, 1]")

    if unit == "row" and total:
        share = _to_decimal(density)
        # The quantile lies at rank (1 - density) (total - 1) of the ascending scores, counted
        # from 0. All rows before that rank are below it.
        rank = (1 - share) * (total - 1)
        num_below = rank.to_integral_value(ROUND_CEILING)
        return total - int(num_below)

    k = _count_share(density, total)
    if k == 0:
        hint = "" if total else "; is the group excluded, or does the model not have it?"
        raise SelectionError(
            f"density {density} of {total} patchable {_UNIT_PLURALS[unit]} ({label}) selects "
            f"none{hint}"
        )
    return k


def _build_density_groups(
    label: str,
    share: float,
    names: list[str],
    sizes: Sizes,
    budgets: Budgets,
) -> list[TopKGroup]:
    """Build the top-k groups of tensors with one density: one, or with scope tensor one each."""
    is_auto = budgets.density == "auto"
    total = sum(sizes[name] for name in names)
    k = count_selected(share, total, label, budgets.unit)

    if budgets.scope == "global":
        subgroups = _build_subgroups(k, names, sizes, budgets)
        return [TopKGroup(label, subgroups, k, is_auto)]

    group_sizes = {name: sizes[name] for name in names}
    if budgets.unit == "row":
        quotas: dict[str, int] = {}
        for name, size in group_sizes.items():
            quotas[name] = count_selected(share, size, name, "row")
    else:
        quotas = _apportion_quotas(share, k, group_sizes)

    groups: list[TopKGroup] = []
    for name, quota in quotas.items():
        if quota:
            subgroup = _make_unbounded_subgroup([name], quota)
            group = TopKGroup(name, (subgroup,), quota, is_auto)
            groups.append(group)
    return groups


def _apportion_quotas(
    share: float,
    k: int,
    sizes: Sizes,
) -> dict[str, int]:
    """Return whole quotas for tensors of equal density, `k` together, by largest remainders."""
    exact_share = _to_decimal(share)
    quotas: dict[str, int] = {}
    remainders: dict[str, Decimal] = {}
    for name, size in sizes.items():
        exact_quota = exact_share * size
        quotas[name] = floor(exact_quota)
        remainders[name] = exact_quota - quotas[name]

    # `sorted` is stable, in reverse too: of equal remainders the first tensor's wins.
    by_remainder = sorted(remainders, key=remainders.__getitem__, reverse=True)
    num_left = k - sum(quotas.values())
    for name in by_remainder[:num_left]:
        quotas[name] += 1
    return quotas


def _build_subgroups(
    k: int,
    names: list[str],
    sizes: Sizes,
    budgets: Budgets,
) -> tuple[Subgroup, ...]:
    """Build one subgroup for each group of tensors, with its bounds; one for all without bounds."""
    ceilings = budgets.group_ceilings
    if not budgets.floor and not ceilings:
        return (_make_unbounded_subgroup(names, k),)

    members: dict[Group, list[str]] = {}
    for name in names:
        group_members = members.setdefault(group_of(name), [])
        group_members.append(name)

    for group in (*budgets.floor, *ceilings):
        if group not in members:
            raise SelectionError(
                f"floor and ceiling: no patchable entries in {group}; is the group excluded?"
            )

    subgroups: list[Subgroup] = []
    for group, group_members in members.items():
        total = sum(sizes[name] for name in group_members)
        floor_share = budgets.floor.get(group, 0)
        ceiling_share = ceilings.get(group, 1)

        min_quota = _count_share(floor_share, total)
        max_quota = min(k, _count_share(ceiling_share, total))
        if min_quota > max_quota:
            raise SelectionError(
                f"floor of {group}: {min_quota} places, more than the {max_quota} it may get"
            )
        if max_quota:
            subgroup = Subgroup(tuple(group_members), min_quota, max_quota)
            subgroups.append(subgroup)

    _require_feasible_quotas(subgroups, k)
    return tuple(subgroups)


def _make_unbounded_subgroup(names: Iterable[str], k: int) -> Subgroup:
    """Return a subgroup of a top-k group of k that may get any number of its units."""
    return Subgroup(
        tuple(names),
        min_quota=0,
        max_quota=k,
    )


def _require_feasible_quotas(subgroups: Iterable[Subgroup], k: int) -> None:
    """Raise SelectionError unless the quotas of the subgroups can add up to k."""
    min_total = sum(subgroup.min_quota for subgroup in subgroups)
    max_total = sum(subgroup.max_quota for subgroup in subgroups)
    if not min_total <= k <= max_total:
        # Both at once cannot be: every subgroup has min_quota <= max_quota.
        which = f"floors ask for {min_total}" if min_total > k else f"ceilings leave {max_total}"
        raise SelectionError(f"the {which} places, the density gives {k}")


def _match_tensor_names(
    sizes: Sizes,
    density: Mapping[str, float],
) -> dict[str, list[str]]:
    """Return the tensors of each key of a density.

    A pattern takes the tensors that no earlier pattern took, a group those that are left. Raises
    SelectionError for a pattern without a tensor.
    """
    patterns = [key for key in density if key not in GROUPS]
    members: dict[str, list[str]] = {key: [] for key in density}
    for name in sizes:
        fitting = (pattern for pattern in patterns if fnmatchcase(name, pattern))
        key = next(fitting, group_of(name))
        if key in members:
            members[key].append(name)

    unused = [pattern for pattern in patterns if not members[pattern]]
    if unused:
        raise SelectionError(
            f"density: no patchable weight is called {unused[0]!r}; "
            f"groups: {', '.join(GROUPS)}; patterns fit published names"
        )
    return members


def _auto_ceiling(budgets: Budgets) -> float:
    """Return the largest share that `density: auto` may choose."""
    if isinstance(budgets.ceiling, Mapping):
        return AUTO_CEILING
    return budgets.ceiling


def _require_density(density: object) -> None:
    """Raise SelectionError for a density of the wrong type, or an empty mapping."""
    if density == {}:
        raise SelectionError("density: no group or pattern has a share")

    is_valid = density == "auto" or _is_number(density) or isinstance(density, Mapping)
    if not is_valid:
        raise SelectionError(f"density {density!r} is no number, mapping or auto")


def _require_mapping(bound: object) -> None:
    """Raise SelectionError for a floor that is no mapping."""
    if not isinstance(bound, Mapping):
        raise SelectionError(f"floor {bound!r} is no mapping of groups to shares")


def _require_shares(bound: float | GroupShares) -> None:
    """Raise SelectionError for an unknown group in a bound, or a share out of (0, 1]."""
    if not isinstance(bound, Mapping):
        _require_share("all", bound)
        return

    for group, share in bound.items():
        if group not in GROUPS:
            raise SelectionError(f"unknown group {group!r}; groups: {', '.join(GROUPS)}")
        _require_share(group, share)


def _require_share(label: str, share: float) -> None:
    """Raise SelectionError for a share out of (0, 1]."""
    if not _is_number(share) or not 0 < share <= 1:
        raise SelectionError(f"bound {share!r} of {label} is out of (0, 1]")


def _is_number(value: object) -> bool:
    """Return whether a value is a number; Python's booleans are ints, and no numbers here."""
    is_boolean = isinstance(value, bool)
    return isinstance(value, int | float) and not is_boolean


def _count_share(share: float, total: int) -> int:
    """Return how many of `total` units a share is, rounded down."""
    exact = _to_decimal(share) * total
    return floor(exact)


def _to_decimal(share: float) -> Decimal:
    """Return the decimal number that a share is written as: 0.1 is a tenth, not its float."""
    return Decimal(repr(float(share)))
