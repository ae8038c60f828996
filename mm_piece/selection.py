"""A task's mask: scores of its examples, selected, and kept so that a resumed run has the same."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from mm_piece import importance
from mm_piece.mask import Mask, select_stream
from mm_piece.names import Group, group_of, weights
from mm_piece.recipe import Select, parse_bytes
from mm_piece.tasks import Alike, Encoded

Sizes = dict[str, int]  # entries per weight
Density = float | dict[Group, float]


def mask_of(
    model: nn.Module,
    encoded: Encoded,
    select: Select,
    file: Path,
    *,
    pad: int,
    seeds: tuple[int, int],
) -> tuple[Mask, Sizes, int]:
    """The mask for a task's examples, the patchable weights, and how many examples were sampled.

    `file` keeps the mask, `pad` is the padding token. `seeds`: of the run, which draws the
    examples, and of the task.
    """
    sample = _sample(encoded, select.samples, seeds[0])
    batches = Alike(sample, select.batch_size, pad)
    names = importance.patchable(model, batches, select.exclude)
    sizes = {name: weights(model)[name].numel() for name in names}
    if file.is_file():
        stored = load_file(file)  # sorted by name; the optimizer's order must be the first run's
        return {name: stored[name] for name in names if name in stored}, sizes, len(sample)
    pieces = importance.stream(
        model,
        batches,
        select.method,
        names=names,
        memory=parse_bytes(select.memory),
        xi=select.xi,
        seed=seeds[1],
        progress=_bar,
    )
    mask = select_stream(pieces, sizes, _reachable(select.density, sizes))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(mask, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)
    return mask, sizes, len(sample)


def _reachable(density: Density, sizes: Sizes) -> Density:
    """The density less the groups that no example reaches: a task of texts trains no tower."""
    if not isinstance(density, dict):
        return density
    reached = {group_of(name) for name in sizes}
    return {g: share for g, share in density.items() if g in reached} or density


def _bar(items: Iterable[Any], title: str) -> Iterable[Any]:
    return tqdm(items, title, unit="batch", leave=False, disable=None)


def _sample(encoded: Encoded, samples: int, seed: int) -> Encoded:
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed))
    return encoded.part(order[:samples].tolist())
