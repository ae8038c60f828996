"""The passes over the data: block by block, batch by batch, scores as they become known.

Accumulators cost four or eight bytes an entry. Where they exceed the budget, the entries are split
into blocks, and the data pass once for each block.
"""

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
from mm_piece.importance.moments import Moments, apply_rule, resolve_rule
from mm_piece.importance.per_example import PerExampleGradients
from mm_piece.importance.rows import ScorePiece
from mm_piece.importance.rules import Rule, rule_of

Progress = Callable[[Sequence[int], str], Iterable[Any]]
RetentionLookup = Callable[[str, Tensor], Tensor]  # weight, flat entries -> their importance, fp32

_KnownPiece = tuple[int, int, dict[str, Any]]  # first entry, how many, fields of their Moments
_WeightPieces = tuple[str, Iterable[_KnownPiece]]  # a weight, and its entries piece by piece

_CPU = torch.device("cpu")


@torch.enable_grad()
def estimate(
    model: nn.Module, batches: Sequence[Batch], method: str = "piece-f", **options: Any
) -> dict[str, Tensor]:
    """Return the scores of every patchable weight, under its published name.

    Scores are fp32, on the CPU, in the weight's shape. `batches` are what the model's forward
    takes, labels included. Every example counts by itself, however they are batched. The caller may
    have switched gradients off. Options: those of `stream_scores`.

    Raises SelectionError for an unknown method, for batches that cannot be taken apart and for rows
    without an answer, ModelError for a model whose layers were replaced or that is being tuned.
    """
    require_weights(model)
    require_batches(batches)

    pieces: dict[str, list[Tensor]] = {}
    for name, _, flat in stream_scores(model, batches, method, **options):
        pieces.setdefault(name, []).append(flat)

    named = weights(model)
    return {name: torch.cat(flats).view(shape_of(named[name])) for name, flats in pieces.items()}


def find_scorable_names(
    model: nn.Module, batches: Sequence[Batch], method: str, exclude: Sequence[str] = ()
) -> list[str]:
    """List the published names that a method scores, in model order, without excluded groups."""
    names = find_patchable_names(model, batches, exclude)
    if rule_of(method).needs_outputs:
        return filter_linear_weights(model, names)
    return names


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
    """Yield scores as flat pieces, in tensor order, within a budget of memory.

    names       the weights to score, in this order; by default all that the method scores. A
                mapping also says which entries of each this process scores
    memory      bytes (or `8GiB`) that accumulators never exceed
    host        keeps accumulators on the CPU
    xi          damping, on the scale of the mean square (PIECE-S) or of `retention` (PIECE-R)
    retention   importance K of some entries for what the model should retain
    folds       records the sums of parts of the examples, within `memory`
    objective   the function whose gradients count
    progress    wraps the steps of all passes
    """
    if not len(batches):
        raise SelectionError("there are no batches to score weights on")

    rule = resolve_rule(method)
    num_bytes = parse_memory(memory)
    named = weights(model)
    if names is None:
        names = find_scorable_names(model, batches, method)
    shares = _resolve_shares(named, names)

    settings = _PassSettings(
        model, batches, rule, shares, num_bytes, host, folds, objective, progress
    )
    generator = torch.Generator().manual_seed(seed)
    for name, pieces in _iter_weights(settings):
        # A weight that is partitioned over processes is gathered only where the rule reads it.
        with gathered_parameters([named[name]] if rule.reads_weights else []):
            for start, size, facts in pieces:
                known = {"mean": torch.zeros(size), "square": torch.zeros(size), **facts}
                if rule.reads_weights:
                    weight = _copy_entries(named[name], start, size)
                else:
                    weight = torch.zeros(size)
                if rule.uses_retention:
                    known["retention"] = retention(name, torch.arange(start, start + size))

                moments = Moments(**known, weight=weight, xi=xi, generator=generator)
                yield name, start, apply_rule(method, rule, moments)


def _resolve_shares(
    named: Mapping[str, nn.Parameter], names: Sequence[str] | Mapping[str, EntryRange]
) -> Mapping[str, EntryRange]:
    """Return the entries of each weight that this process scores: all, where only names are given.

    Raises SelectionError for a weight that the model does not have.
    """
    if isinstance(names, Mapping):
        return names

    if unknown := [name for name in names if name not in named]:
        raise SelectionError(f"names: the model has no weight {unknown[0]!r}")

    sizes = {name: shape_of(named[name]).numel() for name in names}
    return {name: EntryRange(0, size, size) for name, size in sizes.items()}


def _copy_entries(weight: nn.Parameter, start: int, size: int) -> Tensor:
    """Copy some flat entries of a weight to the CPU, as fp32."""
    entries = weight.detach().reshape(-1)[start : start + size]
    return entries.to("cpu", torch.float32, copy=True)


@dataclass(frozen=True)
class _PassSettings:
    """The arguments of `stream_scores` that every pass needs."""

    model: nn.Module
    batches: Sequence[Batch]
    rule: Rule
    shares: Mapping[str, EntryRange]
    memory: int  # bytes
    host: bool
    folds: FoldSums | None
    objective: Objective
    progress: Progress

    def make_step_callback(self, num_passes: int) -> Callable[[], Any]:
        """Return what to call after each batch, and once more at the end: that closes the bar."""
        title = f"importance, {num_passes} passes" if num_passes > 1 else "importance"
        num_steps = range(num_passes * len(self.batches))
        steps = iter(self.progress(num_steps, title) if num_passes else ())
        return lambda: next(steps, None)


def _iter_weights(settings: _PassSettings) -> Iterator[_WeightPieces]:
    """Yield what the rule needs to know of each weight's entries."""
    if settings.rule.needs_outputs:
        return _iter_output_pieces(settings)
    return _iter_gradient_pieces(settings)


def _iter_output_pieces(settings: _PassSettings) -> Iterator[_WeightPieces]:
    """Yield the mean absolute outputs of linear layers, for each weight piece by piece."""
    model, shares, memory = settings.model, settings.shares, settings.memory
    step = settings.make_step_callback(count_passes(model, shares, memory))

    for name, pieces in iter_mean_outputs(model, settings.batches, shares, memory, step=step):
        yield name, ((start, len(output), {"output": output}) for start, output in pieces)
    step()


def _iter_gradient_pieces(settings: _PassSettings) -> Iterator[_WeightPieces]:
    """Yield the mean gradients and squares that the rule needs, for each weight piece by piece."""
    kinds = settings.rule.needs
    named = weights(settings.model)
    num_bytes = settings.memory - (settings.folds.nbytes if settings.folds else 0)

    blocks = split_into_blocks(settings.shares, num_bytes, len(kinds))
    step = settings.make_step_callback(len(blocks) if kinds else 0)
    for block in blocks:
        devices = {r.name: _CPU if settings.host else named[r.name].device for r in block}
        sums = GradientSums(block, kinds, devices)
        if kinds:
            _accumulate_sums(settings, sums, step)

        for block_range in block:
            yield block_range.name, _iter_mean_pieces(sums, block_range)
        del sums  # before the next block's: both together would be twice the budget
    step()


def _iter_mean_pieces(sums: GradientSums, block_range: BlockRange) -> Iterator[_KnownPiece]:
    count = max(sums.examples, 1)
    for start, mean, square in sums.iter_means(block_range):
        yield start, len(mean), {"mean": mean, "square": square, "count": count}


def _accumulate_sums(settings: _PassSettings, sums: GradientSums, step: Callable[[], Any]) -> None:
    """Add up one block's gradients in a pass over the data, by examples or by whole batches."""
    folds = settings.folds
    # Weights whose modules run twice for an example: hooks would see each call apart, and the
    # square of a sum is not the sum of squares. The pass starts again without hooks on them.
    reused: set[tuple[str, nn.Module]] = set()

    while True:
        gradients = PerExampleGradients(settings.model, sums, reused, settings.objective)
        add = gradients.add_batch if settings.rule.per_example else gradients.add_batch_as_one
        if folds:
            folds.begin_pass(sums)

        try:
            with frozen_model(settings.model):
                for number, batch in enumerate(settings.batches):
                    add(batch)
                    if folds:
                        folds.record_batch(number, sums)
                    step()
            return
        except ModuleReused as found:
            reused |= found.reused
            sums.reset_sums()
