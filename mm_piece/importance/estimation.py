"""The passes over the data: block by block, batch by batch, scores as they become known."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.importance.blocks import Sums, blocks
from mm_piece.importance.gradients import Gradients
from mm_piece.importance.reach import Batch, frozen, patchable
from mm_piece.importance.rules import OF_BATCHES, Moments, moments_of, resolve
from mm_piece.importance.taps import CalledAgain
from mm_piece.mask import Piece
from mm_piece.names import weights


def estimate(
    model: nn.Module, batches: Sequence[Batch], method: str = "piece-f", **options: Any
) -> dict[str, Tensor]:
    """Scores of every patchable weight: fp32, on the CPU, in its shape, under its published name.

    `batches` are what the model's forward takes, labels included; every example counts by itself,
    however they are batched. Options: those of `stream`. Raises SelectionError for an unknown
    method and for batches that cannot be taken apart.
    """
    named = weights(model)
    parts: dict[str, list[Tensor]] = {}
    for name, _, flat in stream(model, batches, method, **options):
        parts.setdefault(name, []).append(flat)
    return {name: torch.cat(flats).view(named[name].shape) for name, flats in parts.items()}


def stream(
    model: nn.Module,
    batches: Sequence[Batch],
    method: str = "piece-f",
    *,
    names: Sequence[str] | None = None,
    memory: int = 2**33,
    xi: float = 1e-3,
    seed: int = 0,
    progress: Callable[[Sequence[int], str], Iterable[Any]] = lambda steps, title: steps,
) -> Iterator[Piece]:
    """Scores as flat pieces in tensor order; accumulators never exceed `memory` bytes.

    `names` restricts and orders the weights (default: all that `patchable` finds), `xi` is
    PIECE-S's damping on the scale of the mean square, `progress` wraps the steps of all passes.
    """
    rule, kinds = resolve(method), moments_of(method)
    named = weights(model)
    names = patchable(model, batches) if names is None else names
    generator = torch.Generator().manual_seed(seed)
    plan = blocks({name: named[name].numel() for name in names}, memory, len(kinds))
    title = f"importance, {len(plan)} passes" if len(plan) > 1 else "importance"
    steps = iter(progress(range(len(plan) * len(batches)), title)) if kinds else iter(())
    for block in plan:
        devices = {run.name: named[run.name].device for run in block}
        sums = Sums(block, kinds, devices)
        if kinds:
            whole = method in OF_BATCHES
            _accumulate(model, batches, sums, whole, lambda: next(steps, None))
        for run in block:
            for start, mean, square in sums.means(run):
                place = slice(start, start + len(mean))
                weight = named[run.name].detach().reshape(-1)[place].float().cpu()
                seen = Moments(mean, square, weight, xi, generator, max(sums.examples, 1))
                yield run.name, start, rule(seen)
        del sums  # before the next ones: two blocks would be twice the budget
    next(steps, None)  # the bar is closed


def _accumulate(
    model: nn.Module, batches: Sequence[Batch], sums: Sums, whole: bool, step: Callable[[], Any]
) -> None:
    """One pass over the data, by examples or by `whole` batches."""
    twice: set[str] = set()  # weights whose layers run more than once for an example
    while True:
        gradients = Gradients(model, sums, twice)
        try:
            with frozen(model):
                for batch in batches:
                    gradients.add_whole(batch) if whole else gradients.add(batch)
                    step()
            return
        except CalledAgain as call:
            twice.add(call.name)
            sums.clear()
