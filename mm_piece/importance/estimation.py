"""The passes over the data: block by block, batch by batch, scores as they become known."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.errors import SelectionError
from mm_piece.importance.blocks import Sums, blocks
from mm_piece.importance.gradients import Gradients
from mm_piece.importance.outputs import outputs, passes_of, with_outputs
from mm_piece.importance.reach import Batch, frozen, patchable
from mm_piece.importance.resampling import Folds
from mm_piece.importance.rules import OF_BATCHES, OF_OUTPUTS, Moments, moments_of, resolve, scored
from mm_piece.importance.taps import CalledAgain
from mm_piece.mask import Piece
from mm_piece.names import weights

Progress = Callable[[Sequence[int], str], Iterable[Any]]
_Seen = tuple[str, int, int, dict[str, Any]]  # weight, first entry, how many, what is known
_CPU = torch.device("cpu")


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


def scorable(
    model: nn.Module, batches: Sequence[Batch], method: str, exclude: Sequence[str] = ()
) -> list[str]:
    """Published names of the weights that a method scores, in model order, less excluded groups."""
    names = patchable(model, batches, exclude)
    return with_outputs(model, names) if method in OF_OUTPUTS else names


def stream(
    model: nn.Module,
    batches: Sequence[Batch],
    method: str = "piece-f",
    *,
    names: Sequence[str] | None = None,
    memory: int = 2**33,
    host: bool = False,
    xi: float = 1e-3,
    seed: int = 0,
    folds: Folds | None = None,
    progress: Progress = lambda steps, title: steps,
) -> Iterator[Piece]:
    """Scores as flat pieces in tensor order; accumulators never exceed `memory` bytes.

    `names` restricts and orders the weights (default: all that the method scores), `host` keeps
    accumulators on the CPU whatever the model's device, `xi` is PIECE-S's damping on the scale of
    the mean square, `folds` take down what parts of the examples add (within `memory`), and
    `progress` wraps the steps of all passes.
    """
    rule, named = resolve(method), weights(model)
    if not len(batches):
        raise SelectionError("there are no batches to score weights on")
    names = scorable(model, batches, method) if names is None else names
    if unknown := [name for name in names if name not in named]:
        raise SelectionError(f"names: the model has no weight {unknown[0]!r}")
    passes = _Passes(model, batches, method, names, memory, host, folds, progress)
    generator = torch.Generator().manual_seed(seed)
    moments = _of_outputs(passes) if method in OF_OUTPUTS else _of_gradients(passes)
    for name, start, size, facts in moments:
        part = named[name].detach().reshape(-1)[start : start + size]
        weight = part.to("cpu", torch.float32, copy=True)  # a rule may compute in place
        known = {"mean": torch.zeros(size), "square": torch.zeros(size), **facts}
        seen = Moments(**known, weight=weight, xi=xi, generator=generator)
        yield name, start, scored(method, rule, seen)


@dataclass(frozen=True)
class _Passes:
    """What is run, over what, and in how much memory; see `stream`."""

    model: nn.Module
    batches: Sequence[Batch]
    method: str
    names: Sequence[str]
    memory: int
    host: bool
    folds: Folds | None
    progress: Progress

    def steps(self, passes: int) -> Callable[[], Any]:
        """What is called after each batch, and once more at the end, which closes the bar."""
        title = f"importance, {passes} passes" if passes > 1 else "importance"
        wanted = range(passes * len(self.batches))
        steps = iter(self.progress(wanted, title) if passes else ())
        return lambda: next(steps, None)


def _of_outputs(passes: _Passes) -> Iterator[_Seen]:
    budget = (passes.model, passes.names, passes.memory)
    step = passes.steps(passes_of(*budget))
    for name, start, output in outputs(passes.model, passes.batches, *budget[1:], step=step):
        yield name, start, len(output), {"output": output}
    step()


def _of_gradients(passes: _Passes) -> Iterator[_Seen]:
    kinds, named = moments_of(passes.method), weights(passes.model)
    sizes = {name: named[name].numel() for name in passes.names}
    room = passes.memory - (passes.folds.nbytes if passes.folds else 0)
    plan = blocks(sizes, room, len(kinds))
    step = passes.steps(len(plan) if kinds else 0)
    for block in plan:
        devices = {r.name: _CPU if passes.host else named[r.name].device for r in block}
        sums = Sums(block, kinds, devices)
        if kinds:
            _accumulate(passes, sums, step)
        for run in block:
            for start, mean, square in sums.means(run):
                count = max(sums.examples, 1)
                yield run.name, start, len(mean), {"mean": mean, "square": square, "count": count}
        del sums  # before the next ones: two blocks would be twice the budget
    step()


def _accumulate(passes: _Passes, sums: Sums, step: Callable[[], Any]) -> None:
    """One pass over the data, by examples or by whole batches."""
    model, folds, whole = passes.model, passes.folds, passes.method in OF_BATCHES
    twice: set[str] = set()  # weights whose layers run more than once for an example
    while True:
        gradients = Gradients(model, sums, twice)
        if folds:
            folds.begin(sums)
        try:
            with frozen(model):
                for number, batch in enumerate(passes.batches):
                    gradients.add_whole(batch) if whole else gradients.add(batch)
                    if folds:
                        folds.take(number, sums)
                    step()
            return
        except CalledAgain as call:
            twice.add(call.name)
            sums.clear()
