"""Where the changed entries lie: per group, layer and module, and how far two tasks share them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np

from mm_piece.families import GROUPS, place_of

Indices = dict[str, np.ndarray]  # hub name → sorted unique flat indices
Shapes = Mapping[str, Iterable[int]]  # hub name → shape

Place = tuple[str, int | None, str]  # group, layer (None outside the stack of layers), module
# Modules in the order in which an example flows through a layer; unknown ones follow by name.
_FLOW = "q_proj k_proj v_proj qkv in_proj proj out_proj o_proj gate_proj up_proj fc1 down_proj fc2"


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


def union(masks: Iterable[Indices]) -> Indices:
    """The entries changed by at least one task."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for mask in masks:
        for name, index in mask.items():
            found[name].append(index)
    return {name: reduce(np.union1d, parts) for name, parts in found.items()}


def weight_map(title: str, mask: Indices, shapes: Shapes) -> WeightMap:
    """Count a mask's entries per place, on the grid spanned by every tensor in `shapes`."""
    entries: Counter[Place] = Counter()
    sizes: Counter[Place] = Counter()
    for name, shape in shapes.items():
        entries[place_of(name)] += len(mask.get(name, ()))
        sizes[place_of(name)] += prod(shape)
    cells = {spot: Cell(entries[spot], sizes[spot]) for spot in entries if entries[spot]}
    groups = [group for group in GROUPS if any(group == other for other, _, _ in sizes)]
    shares = {g: sum(n for (other, _, _), n in entries.items() if other == g) for g in groups}
    grids = tuple(_grid(group, set(sizes), cells) for group in groups)
    densest = max((cell.density for cell in cells.values()), default=0.0)
    return WeightMap(title, sum(entries.values()), shares, grids, densest)


def _grid(group: str, places: set[Place], cells: dict[Place, Cell]) -> Grid:
    inside = [(module, layer) for other, layer, module in places if other == group]
    numbered = {layer for _, layer in inside if layer is not None}
    layers: tuple[int | None, ...] = tuple(range(max(numbered) + 1)) if numbered else ()
    if any(layer is None for _, layer in inside):
        layers = (None, *layers)
    modules = tuple(sorted({module for module, _ in inside}, key=_flow))
    own = {(module, layer): cell for (g, layer, module), cell in cells.items() if g == group}
    return Grid(group, layers, modules, own)


def _flow(module: str) -> tuple[int, str]:
    order = _FLOW.split()
    return (order.index(module) if module in order else len(order), module)


def overlap(first: Indices, second: Indices, patchable: int) -> Overlap:
    """What `first` and `second` share, and what two random masks of their sizes would."""
    shared = sum(_shared(first[name], second[name]) for name in first.keys() & second.keys())
    sizes = [sum(map(len, mask.values())) for mask in (first, second)]
    by_chance = sizes[0] * sizes[1] / max(patchable, 1)
    return Overlap(
        shared=shared,
        jaccard=_ratio(shared, sum(sizes) - shared),
        containment=_ratio(shared, sizes[0]),
        random_jaccard=_ratio(by_chance, sum(sizes) - by_chance),
        random_containment=_ratio(by_chance, sizes[0]),
    )


def _shared(first: np.ndarray, second: np.ndarray) -> int:
    """Size of the intersection of two sorted index arrays, without sorting again."""
    if not len(second):
        return 0
    nearest = second.take(np.searchsorted(second, first), mode="clip")
    return int((nearest == first).sum())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
