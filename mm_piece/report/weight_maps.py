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

# group, layer (None outside the stack of layers), module
ParameterLocation = tuple[str, int | None, str]
# Modules in the order in which an example flows through a layer; unknown ones follow by name.
_MODULE_ORDER = (
    "q_proj k_proj v_proj qkv in_proj proj out_proj o_proj gate_proj up_proj fc1 down_proj fc2"
)


@dataclass(frozen=True)
class Cell:
    """One module of one layer: the number of changed entries, and of all."""

    entries: int
    size: int

    @property
    def density(self) -> float:
        """The share of the module's entries that changed."""
        return self.entries / self.size


@dataclass(frozen=True)
class Grid:
    """One group's modules × layers; a module without a changed entry in a layer has no cell."""

    group: str
    layers: tuple[int | None, ...]
    modules: tuple[str, ...]
    cells: dict[tuple[str, int | None], Cell]


@dataclass(frozen=True)
class WeightMap:
    """The places of the changed entries of one task, or of all tasks."""

    title: str
    entries: int
    shares: dict[str, int]
    grids: tuple[Grid, ...]
    densest: float


@dataclass(frozen=True)
class Overlap:
    """The overlap of two tasks' changed entries, and that of random masks of the same sizes."""

    shared: int
    jaccard: float
    containment: float
    random_jaccard: float
    random_containment: float


def union_masks(masks: Iterable[Indices]) -> Indices:
    """Return the entries that at least one task changed."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for mask in masks:
        for name, index in mask.items():
            found[name].append(index)

    union = {}
    for name, indices in found.items():
        union[name] = reduce(np.union1d, indices)  # (entries of the union,), sorted
    return union


def build_weight_map(
    title: str,
    mask: Indices,
    shapes: Shapes,
) -> WeightMap:
    """Count a mask's entries per module and layer, on the grid of every tensor in `shapes`."""
    entries: Counter[ParameterLocation] = Counter()
    sizes: Counter[ParameterLocation] = Counter()
    for name, shape in shapes.items():
        location = parameter_location(name)
        entries[location] += len(mask.get(name, ()))
        # a module may have several tensors: weight and bias
        sizes[location] += prod(shape)

    cells = {}
    for location, count in entries.items():
        if count:
            cells[location] = Cell(count, sizes[location])

    shares: Counter[str] = Counter()
    for (group, _, _), count in entries.items():
        shares[group] += count

    # groups in the order of a page, not of the deltas
    groups = [group for group in GROUPS if group in shares]
    grids = [_build_grid(group, set(sizes), cells) for group in groups]
    densities = [cell.density for cell in cells.values()]
    return WeightMap(
        title=title,
        entries=sum(entries.values()),
        shares={group: shares[group] for group in groups},
        grids=tuple(grids),
        densest=max(densities, default=0.0),
    )


def _build_grid(
    group: str,
    locations: set[ParameterLocation],
    cells: dict[ParameterLocation, Cell],
) -> Grid:
    """Lay out one group: its layers without gaps, its modules in the order of computation."""
    modules = set()
    found_layers = set()
    for other, layer, module in locations:
        if other == group:
            modules.add(module)
            found_layers.add(layer)

    has_unnumbered = None in found_layers
    found_layers.discard(None)
    layers: list[int | None] = [None] if has_unnumbered else []
    # layers without a changed tensor stay as empty columns, so that no gap goes unseen
    if found_layers:
        layers += range(max(found_layers) + 1)

    group_cells = {}
    for (other, layer, module), cell in cells.items():
        if other == group:
            group_cells[module, layer] = cell

    return Grid(
        group=group,
        layers=tuple(layers),
        modules=tuple(sorted(modules, key=_module_sort_key)),
        cells=group_cells,
    )


def _module_sort_key(module: str) -> tuple[int, str]:
    """Return the sort key of a module: known ones in their order, then the others by name."""
    order = _MODULE_ORDER.split()
    rank = order.index(module) if module in order else len(order)
    return rank, module


def measure_overlap(
    first: Indices,
    second: Indices,
    patchable: int,
) -> Overlap:
    """Measure how much two masks share, and how much two random masks of their sizes would.

    `patchable` is the number of entries that the random masks choose from.
    """
    shared = 0
    for name in first.keys() & second.keys():
        shared += _count_shared(first[name], second[name])

    first_size = sum(map(len, first.values()))
    second_size = sum(map(len, second.values()))
    total = first_size + second_size
    # the mean of the hypergeometric distribution: n₁ n₂ / N
    expected = first_size * second_size / max(patchable, 1)
    return Overlap(
        shared=shared,
        jaccard=_ratio_or_zero(shared, total - shared),  # |A ∩ B| / |A ∪ B|
        containment=_ratio_or_zero(shared, first_size),
        random_jaccard=_ratio_or_zero(expected, total - expected),
        random_containment=_ratio_or_zero(expected, first_size),
    )


def _count_shared(first: np.ndarray, second: np.ndarray) -> int:
    """Return the size of the intersection of two sorted index arrays, without sorting again."""
    if not len(second):
        return 0

    offsets = np.searchsorted(second, first)
    # past the end there is no neighbour: the last entry stands in, which is not equal
    nearest = second.take(offsets, mode="clip")
    return int((nearest == first).sum())


def _ratio_or_zero(numerator: float, denominator: float) -> float:
    """Return a ratio; 0 where an empty mask leaves nothing to divide by."""
    if not denominator:
        return 0.0
    return numerator / denominator
