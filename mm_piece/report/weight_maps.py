"""Where the changed entries lie: per group, layer and module, and how far two tasks share them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np

from mm_piece.families import GROUPS, parameter_location

Indices = dict[str, np.ndarray]  # hub name → sorted unique flat indices
Shapes = Mapping[str, Iterable[int]]  # hub name → shape

ParameterLocation = tuple[
    str, int | None, str
]  # group, layer (None outside the stack of layers), module
# Modules in the order in which an example flows through a layer; unknown ones follow by name.
_MODULE_ORDER = (
    "q_proj k_proj v_proj qkv in_proj proj out_proj o_proj gate_proj up_proj fc1 down_proj fc2"
)


@dataclass(frozen=True)
class Cell:
    """One module of one layer: how many of its entries changed, of how many."""

    entries: int
    size: int

    @property
    def density(self) -> float:
        return self.entries / self.size


@dataclass(frozen=True)
class Grid:
    """One group's modules × layers; a module with no changed entry there has no cell."""

    group: str
    layers: tuple[int | None, ...]
    modules: tuple[str, ...]
    cells: dict[tuple[str, int | None], Cell]


@dataclass(frozen=True)
class WeightMap:
    """Where one task's (or all tasks') changed entries lie."""

    title: str
    entries: int
    shares: dict[str, int]
    grids: tuple[Grid, ...]
    densest: float


@dataclass(frozen=True)
class Overlap:
    """Two tasks' changed entries against what random masks of the same sizes would share."""

    shared: int
    jaccard: float
    containment: float
    random_jaccard: float
    random_containment: float


def union_masks(masks: Iterable[Indices]) -> Indices:
    """The entries changed by at least one task."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for mask in masks:
        for name, index in mask.items():
            found[name].append(index)
    return {name: reduce(np.union1d, indices) for name, indices in found.items()}


def build_weight_map(title: str, mask: Indices, shapes: Shapes) -> WeightMap:
    """Count a mask's entries per place, on the grid spanned by every tensor in `shapes`."""
    entries: Counter[ParameterLocation] = Counter()
    sizes: Counter[ParameterLocation] = Counter()
    for name, shape in shapes.items():
        entries[parameter_location(name)] += len(mask.get(name, ()))
        sizes[parameter_location(name)] += prod(shape)
    cells = {
        location: Cell(entries[location], sizes[location])
        for location in entries
        if entries[location]
    }
    groups = [group for group in GROUPS if any(group == other for other, _, _ in sizes)]
    shares = {g: sum(n for (other, _, _), n in entries.items() if other == g) for g in groups}
    grids = tuple(_build_grid(group, set(sizes), cells) for group in groups)
    densest = max((cell.density for cell in cells.values()), default=0.0)
    return WeightMap(title, sum(entries.values()), shares, grids, densest)


def _build_grid(
    group: str, locations: set[ParameterLocation], cells: dict[ParameterLocation, Cell]
) -> Grid:
    members = [(module, layer) for other, layer, module in locations if other == group]
    numbered = {layer for _, layer in members if layer is not None}
    layers: tuple[int | None, ...] = tuple(range(max(numbered) + 1)) if numbered else ()
    if any(layer is None for _, layer in members):
        layers = (None, *layers)
    modules = tuple(sorted({module for module, _ in members}, key=_module_sort_key))
    group_cells = {
        (module, layer): cell for (g, layer, module), cell in cells.items() if g == group
    }
    return Grid(group, layers, modules, group_cells)


def _module_sort_key(module: str) -> tuple[int, str]:
    order = _MODULE_ORDER.split()
    return (order.index(module) if module in order else len(order), module)


def measure_overlap(first: Indices, second: Indices, patchable: int) -> Overlap:
    """What `first` and `second` share, and what two random masks of their sizes would."""
    shared = sum(_count_shared(first[name], second[name]) for name in first.keys() & second.keys())
    sizes = [sum(map(len, mask.values())) for mask in (first, second)]
    expected = sizes[0] * sizes[1] / max(patchable, 1)
    return Overlap(
        shared=shared,
        jaccard=_ratio_or_zero(shared, sum(sizes) - shared),
        containment=_ratio_or_zero(shared, sizes[0]),
        random_jaccard=_ratio_or_zero(expected, sum(sizes) - expected),
        random_containment=_ratio_or_zero(expected, sizes[0]),
    )


def _count_shared(first: np.ndarray, second: np.ndarray) -> int:
    """Size of the intersection of two sorted index arrays, without sorting again."""
    if not len(second):
        return 0
    nearest = second.take(np.searchsorted(second, first), mode="clip")
    return int((nearest == first).sum())


def _ratio_or_zero(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
