"""The passes over the data: block by block, batch by batch, scores as they become known."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.distributed import EntryRange, gathered_parameters, shape_of
from mm_piece.errors import SelectionError
from mm_piece.families import weights
from mm_piece.importance.accumulators import BlockRange, GradientSums, split_into_blocks
from mm_piece.importance.activations import count_passes, filter_linear_weights, iter_mean_outputs
from mm_piece.importance.backward import (
    Batch,
    Objective,
    find_patchable_names,
    frozen_model,
    loss_of,
)
from mm_piece.importance.folds import FoldSums
from mm_piece.importance.hooks import ModuleReused
from mm_piece.importance.inputs import parse_memory, require_batches, require_weights
from mm_piece.importance.per_example import PerExampleGradients
from mm_piece.importance.rows import ScorePiece
from mm_piece.importance.rules import (
    BATCH_METHODS,
    OUTPUT_METHODS,
    RETENTION_METHODS,
    Moments,
    apply_rule,
    moments_of,
    needs_weights,
    resolve_method,
)

Progress = Callable[[Sequence[int], str], Iterable[Any]]
RetentionLookup = Callable[[str, Tensor], Tensor]  # weight, flat entries -> their importance, fp32
_KnownPiece = tuple[int, int, dict[str, Any]]  # first entry, how many, what is known of them
_RangePieces = Iterator[
    tuple[str, Iterable[_KnownPiece]]
]  # of each run of a weight's entries, its pieces
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
    pieces: dict[str, list[Tensor]] = {}
    for name, _, flat in stream_scores(model, batches, method, **options):
        pieces.setdefault(name, []).append(flat)
    return {name: torch.cat(flats).view(shape_of(named[name])) for name, flats in pieces.items()}


def find_scorable_names(
    model: nn.Module, batches: Sequence[Batch], method: str, exclude: Sequence[str] = ()
) -> list[str]:
    """Published names of the weights that a method scores, in model order, less excluded groups."""
    names = find_patchable_names(model, batches, exclude)
    return filter_linear_weights(model, names) if method in OUTPUT_METHODS else names


def stream_scores(  # noqa: PLR0913 - each is a setting of its own
    model: nn.Module,
    batches: Sequence[Batch],
    method: str = "piece-f",
    *,
    names: Sequence[str] | Mapping[str, EntryRange] | None = None,
    memory: int | str = 2**33,
    host: bool = False,
    xi: float = 1e-3,
    seed: int = 0,
    folds: FoldSums | None = None,
    objective: Objective = loss_of,
    retention: RetentionLookup = lambda name, entries: torch.zeros(len(entries)),
    progress: Progress = lambda steps, title: steps,
) -> Iterator[ScorePiece]:
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
    rule, named, num_bytes = resolve_method(method), weights(model), parse_memory(memory)
    shares = _resolve_shares(
        named, find_scorable_names(model, batches, method) if names is None else names
    )
    pass_settings = _PassSettings(
        model, batches, method, shares, num_bytes, host, folds, objective, progress
    )
    generator = torch.Generator().manual_seed(seed)
    ranges = (
        _iter_output_pieces(pass_settings)
        if method in OUTPUT_METHODS
        else _iter_gradient_pieces(pass_settings)
    )
    for name, pieces in ranges:
        with gathered_parameters([named[name]] if needs_weights(method) else []):
            for start, size, facts in pieces:
                weight = _copy_entries(named[name], start, size, method)
                known = {"mean": torch.zeros(size), "square": torch.zeros(size), **facts}
                if method in RETENTION_METHODS:
                    known["retention"] = retention(name, torch.arange(start, start + size))
                seen = Moments(**known, weight=weight, xi=xi, generator=generator)
                yield name, start, apply_rule(method, rule, seen)


def _resolve_shares(
    named: Mapping[str, nn.Parameter], names: Sequence[str] | Mapping[str, EntryRange]
) -> Mapping[str, EntryRange]:
    """What is scored of each weight: the whole of those that are only named."""
    if isinstance(names, Mapping):
        return names
    if unknown := [name for name in names if name not in named]:
        raise SelectionError(f"names: the model has no weight {unknown[0]!r}")
    sizes = {name: shape_of(named[name]).numel() for name in names}
    return {name: EntryRange(0, size, size) for name, size in sizes.items()}


def _copy_entries(weight: nn.Parameter, start: int, size: int, method: str) -> Tensor:
    """Some entries of a weight, fp32, on the CPU, to compute with; zeros for who looks away."""
    if not needs_weights(method):
        return torch.zeros(size)
    entries = weight.detach().reshape(-1)[start : start + size]
    return entries.to("cpu", torch.float32, copy=True)


@dataclass(frozen=True)
class _PassSettings:
    """What is run, over what, and in how much memory; see `stream`."""

    model: nn.Module
    batches: Sequence[Batch]
    method: str
    shares: Mapping[str, EntryRange]
    memory: int
    host: bool
    folds: FoldSums | None
    objective: Objective
    progress: Progress

    def make_step_callback(self, num_passes: int) -> Callable[[], Any]:
        """What is called after each batch, and once more at the end, which closes the bar."""
        title = f"importance, {num_passes} passes" if num_passes > 1 else "importance"
        wanted = range(num_passes * len(self.batches))
        steps = iter(self.progress(wanted, title) if num_passes else ())
        return lambda: next(steps, None)


def _iter_output_pieces(pass_settings: _PassSettings) -> _RangePieces:
    budget = (pass_settings.model, pass_settings.shares, pass_settings.memory)
    step = pass_settings.make_step_callback(count_passes(*budget))
    for name, pieces in iter_mean_outputs(
        pass_settings.model, pass_settings.batches, *budget[1:], step=step
    ):
        yield name, ((start, len(output), {"output": output}) for start, output in pieces)
    step()


def _iter_gradient_pieces(pass_settings: _PassSettings) -> _RangePieces:
    kinds, named = moments_of(pass_settings.method), weights(pass_settings.model)
    num_bytes = pass_settings.memory - (pass_settings.folds.nbytes if pass_settings.folds else 0)
    plan = split_into_blocks(pass_settings.shares, num_bytes, len(kinds))
    step = pass_settings.make_step_callback(len(plan) if kinds else 0)
    for block in plan:
        devices = {r.name: _CPU if pass_settings.host else named[r.name].device for r in block}
        sums = GradientSums(block, kinds, devices)
        if kinds:
            _accumulate_sums(pass_settings, sums, step)
        for block_range in block:
            yield block_range.name, _iter_mean_pieces(sums, block_range)
        del sums  # before the next ones: two blocks would be twice the budget
    step()


def _iter_mean_pieces(sums: GradientSums, block_range: BlockRange) -> Iterator[_KnownPiece]:
    count = max(sums.examples, 1)
    for start, mean, square in sums.iter_means(block_range):
        yield start, len(mean), {"mean": mean, "square": square, "count": count}


def _accumulate_sums(
    pass_settings: _PassSettings, sums: GradientSums, step: Callable[[], Any]
) -> None:
    """One pass over the data, by examples or by whole batches."""
    model, folds, per_batch = (
        pass_settings.model,
        pass_settings.folds,
        pass_settings.method in BATCH_METHODS,
    )
    reused: set[tuple[str, nn.Module]] = set()  # weights whose modules run twice for an example
    while True:
        gradients = PerExampleGradients(model, sums, reused, pass_settings.objective)
        if folds:
            folds.begin_pass(sums)
        try:
            with frozen_model(model):
                for number, batch in enumerate(pass_settings.batches):
                    gradients.add_batch_as_one(batch) if per_batch else gradients.add_batch(batch)
                    if folds:
                        folds.record_batch(number, sums)
                    step()
            return
        except ModuleReused as call:
            reused |= call.reused
            sums.reset_sums()
