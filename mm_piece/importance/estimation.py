"""The passes over the data: block by block, batch by batch, scores as they become known."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.distributed import Share, shape_of, whole
from mm_piece.errors import SelectionError
from mm_piece.families import weights
from mm_piece.importance.accumulators import Run, Sums, blocks
from mm_piece.importance.activations import outputs, passes_of, with_outputs
from mm_piece.importance.backward import Batch, Objective, frozen, loss_of, patchable
from mm_piece.importance.folds import Folds
from mm_piece.importance.hooks import CalledAgain
from mm_piece.importance.inputs import bytes_of, require_batches, require_weights
from mm_piece.importance.per_example import Gradients
from mm_piece.importance.rows import Piece
from mm_piece.importance.rules import (
    KEEPING,
    OF_BATCHES,
    OF_OUTPUTS,
    Moments,
    moments_of,
    resolve,
    scored,
    weighs,
)

Progress = Callable[[Sequence[int], str], Iterable[Any]]
Kept = Callable[[str, Tensor], Tensor]  # weight, flat entries -> their importance, fp32
_Seen = tuple[int, int, dict[str, Any]]  # first entry, how many, what is known of them
_Runs = Iterator[tuple[str, Iterable[_Seen]]]  # of each run of a weight's entries, its pieces
_CPU = torch.device("cpu")


@torch.enable_grad()
def estimate(
    model: nn.Module, batches: Sequence[Batch], method: str = "piece-f", **options: Any
) -> dict[str, Tensor]:
    """Scores of every patchable weight: fp32, on the CPU, in its shape, under its published name.

    `batches` are what the model's forward takes, labels included; every example counts by itself,
    however they are batched. Gradients may be off around it. Options: those of `stream`. Raises
    SelectionError for an unknown method, for batches that cannot be taken apart and for rows
    without an answer, ModelError for a model whose layers were replaced or that is being tuned.
    """
    require_weights(model)
    require_batches(batches)
    named = weights(model)
    parts: dict[str, list[Tensor]] = {}
    for name, _, flat in stream(model, batches, method, **options):
        parts.setdefault(name, []).append(flat)
    return {name: torch.cat(flats).view(shape_of(named[name])) for name, flats in parts.items()}


def scorable(
    model: nn.Module, batches: Sequence[Batch], method: str, exclude: Sequence[str] = ()
) -> list[str]:
    """Published names of the weights that a method scores, in model order, less excluded groups."""
    names = patchable(model, batches, exclude)
    return with_outputs(model, names) if method in OF_OUTPUTS else names


def stream(  # noqa: PLR0913 - each is a setting of its own
    model: nn.Module,
    batches: Sequence[Batch],
    method: str = "piece-f",
    *,
    names: Sequence[str] | Mapping[str, Share] | None = None,
    memory: int | str = 2**33,
    host: bool = False,
    xi: float = 1e-3,
    seed: int = 0,
    folds: Folds | None = None,
    objective: Objective = loss_of,
    kept: Kept = lambda name, entries: torch.zeros(len(entries)),
    progress: Progress = lambda steps, title: steps,
) -> Iterator[Piece]:
    """Scores as flat pieces in tensor order; accumulators never exceed `memory` (bytes, or `8GiB`).

    `names` restricts and orders the weights (default: all that the method scores); as a mapping it
    says also which entries of each are scored here, where several processes divide them and all go
    through the same weights and batches. `host` keeps accumulators on the CPU, `xi` is PIECE-S's
    damping on the scale of the mean square, PIECE-R's on that of `kept`, the stake of what is to be
    kept. `folds` take down what parts of the examples add (within `memory`), gradients are those of
    `objective`, and `progress` wraps the steps of all passes.
    """
    if not len(batches):
        raise SelectionError("there are no batches to score weights on")
    rule, named, room = resolve(method), weights(model), bytes_of(memory)
    shares = _shares(named, scorable(model, batches, method) if names is None else names)
    passes = _Passes(model, batches, method, shares, room, host, folds, objective, progress)
    generator = torch.Generator().manual_seed(seed)
    runs = _of_outputs(passes) if method in OF_OUTPUTS else _of_gradients(passes)
    for name, pieces in runs:
        with whole([named[name]] if weighs(method) else []):
            for start, size, facts in pieces:
                weight = _entries(named[name], start, size, method)
                known = {"mean": torch.zeros(size), "square": torch.zeros(size), **facts}
                if method in KEEPING:
                    known["kept"] = kept(name, torch.arange(start, start + size))
                seen = Moments(**known, weight=weight, xi=xi, generator=generator)
                yield name, start, scored(method, rule, seen)


def _shares(
    named: Mapping[str, nn.Parameter], names: Sequence[str] | Mapping[str, Share]
) -> Mapping[str, Share]:
    """What is scored of each weight: the whole of those that are only named."""
    if isinstance(names, Mapping):
        return names
    if unknown := [name for name in names if name not in named]:
        raise SelectionError(f"names: the model has no weight {unknown[0]!r}")
    sizes = {name: shape_of(named[name]).numel() for name in names}
    return {name: Share(0, size, size) for name, size in sizes.items()}


def _entries(weight: nn.Parameter, start: int, size: int, method: str) -> Tensor:
    """Some entries of a weight, fp32, on the CPU, to compute with; zeros for who looks away."""
    if not weighs(method):
        return torch.zeros(size)
    part = weight.detach().reshape(-1)[start : start + size]
    return part.to("cpu", torch.float32, copy=True)


@dataclass(frozen=True)
class _Passes:
    """What is run, over what, and in how much memory; see `stream`."""

    model: nn.Module
    batches: Sequence[Batch]
    method: str
    shares: Mapping[str, Share]
    memory: int
    host: bool
    folds: Folds | None
    objective: Objective
    progress: Progress

    def steps(self, passes: int) -> Callable[[], Any]:
        """What is called after each batch, and once more at the end, which closes the bar."""
        title = f"importance, {passes} passes" if passes > 1 else "importance"
        wanted = range(passes * len(self.batches))
        steps = iter(self.progress(wanted, title) if passes else ())
        return lambda: next(steps, None)


def _of_outputs(passes: _Passes) -> _Runs:
    budget = (passes.model, passes.shares, passes.memory)
    step = passes.steps(passes_of(*budget))
    for name, pieces in outputs(passes.model, passes.batches, *budget[1:], step=step):
        yield name, ((start, len(output), {"output": output}) for start, output in pieces)
    step()


def _of_gradients(passes: _Passes) -> _Runs:
    kinds, named = moments_of(passes.method), weights(passes.model)
    room = passes.memory - (passes.folds.nbytes if passes.folds else 0)
    plan = blocks(passes.shares, room, len(kinds))
    step = passes.steps(len(plan) if kinds else 0)
    for block in plan:
        devices = {r.name: _CPU if passes.host else named[r.name].device for r in block}
        sums = Sums(block, kinds, devices)
        if kinds:
            _accumulate(passes, sums, step)
        for run in block:
            yield run.name, _means(sums, run)
        del sums  # before the next ones: two blocks would be twice the budget
    step()


def _means(sums: Sums, run: Run) -> Iterator[_Seen]:
    count = max(sums.examples, 1)
    for start, mean, square in sums.means(run):
        yield start, len(mean), {"mean": mean, "square": square, "count": count}


def _accumulate(passes: _Passes, sums: Sums, step: Callable[[], Any]) -> None:
    """One pass over the data, by examples or by whole batches."""
    model, folds, whole = passes.model, passes.folds, passes.method in OF_BATCHES
    twice: set[tuple[str, nn.Module]] = set()  # weights whose modules run twice for an example
    while True:
        gradients = Gradients(model, sums, twice, passes.objective)
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
            twice |= call.watched
            sums.clear()
