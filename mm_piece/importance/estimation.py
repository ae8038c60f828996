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
from mm_piece.importance.accumulators import (
    Block,
    BlockRange,
    GradientSums,
    split_into_blocks,
)
from mm_piece.importance.activations import (
    count_passes,
    filter_linear_weights,
    iter_mean_outputs,
)
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

Names = Sequence[str] | Mapping[str, EntryRange]
Progress = Callable[[Sequence[int], str], Iterable[Any]]
RetentionLookup = Callable[[str, Tensor], Tensor]  # weight, flat entries -> their importance, fp32

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _KnownPiece:
    """Flat entries of a weight from `start` on, with some fields of their `Moments`."""

    start: int
    size: int
    facts: dict[str, Any]

    def list_entries(self) -> Tensor:
        """Return the flat indices of the entries, int64."""
        return torch.arange(self.start, self.start + self.size)


_WeightPieces = tuple[str, Iterable[_KnownPiece]]  # a weight, and its entries piece by piece


@torch.enable_grad()
def estimate(
    model: nn.Module,
    batches: Sequence[Batch],
    method: str = "piece-f",
    **options: Any,
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
        weight_pieces = pieces.setdefault(name, [])
        weight_pieces.append(flat)

    named = weights(model)
    scores: dict[str, Tensor] = {}
    for name, weight_pieces in pieces.items():
        shape = shape_of(named[name])
        scores[name] = torch.cat(weight_pieces).view(shape)
    return scores


def find_scorable_names(
    model: nn.Module,
    batches: Sequence[Batch],
    method: str,
    exclude: Sequence[str] = (),
) -> list[str]:
    """List the published names that a method scores, in model order, without excluded groups."""
    names = find_patchable_names(model, batches, exclude)
    if rule_of(method).needs_outputs:
        return filter_linear_weights(model, names)
    return names


def _assume_no_retention(_: str, entries: Tensor) -> Tensor:
    """Return zeros: there is nothing that the model should retain."""
    return torch.zeros(len(entries))


def _show_no_progress(steps: Sequence[int], _: str) -> Iterable[Any]:
    return steps


def stream_scores(  # noqa: PLR0913 - each is a setting of its own
    model: nn.Module,
    batches: Sequence[Batch],
    method: str = "piece-f",
    *,
    names: Names | None = None,
    memory: int | str = 2**33,
    host: bool = False,
    xi: float = 1e-3,
    seed: int = 0,
    folds: FoldSums | None = None,
    objective: Objective = loss_of,
    retention: RetentionLookup = _assume_no_retention,
    progress: Progress = _show_no_progress,
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
    shares = _resolve_shares(model, batches, method, names)

    settings = _PassSettings(
        model=model,
        batches=batches,
        rule=rule,
        shares=shares,
        memory=num_bytes,
        host=host,
        folds=folds,
        objective=objective,
        progress=progress,
    )
    named = weights(model)
    generator = torch.Generator().manual_seed(seed)
    for name, pieces in _iter_weights(settings):
        weight = named[name]
        # A weight that is partitioned over processes is gathered only where the rule reads it.
        with gathered_parameters([weight] if rule.reads_weights else []):
            for piece in pieces:
                known = dict(piece.facts)
                if rule.reads_weights:
                    known["weight"] = _copy_entries(weight, piece)
                if rule.uses_retention:
                    known["retention"] = retention(name, piece.list_entries())

                moments = _make_moments(piece.size, known, xi, generator)
                yield name, piece.start, apply_rule(method, rule, moments)


def _resolve_shares(
    model: nn.Module,
    batches: Sequence[Batch],
    method: str,
    names: Names | None,
) -> Mapping[str, EntryRange]:
    """Return the entries of each weight that this process scores: all, where only names are given.

    Without names, these are the weights that the method scores. Raises SelectionError for a weight
    that the model does not have.
    """
    if isinstance(names, Mapping):
        return names
    if names is None:
        names = find_scorable_names(model, batches, method)

    named = weights(model)
    shares: dict[str, EntryRange] = {}
    for name in names:
        if name not in named:
            raise SelectionError(f"names: the model has no weight {name!r}")
        size = shape_of(named[name]).numel()
        shares[name] = EntryRange(0, size, size)
    return shares


def _copy_entries(weight: nn.Parameter, piece: _KnownPiece) -> Tensor:
    """Copy a piece's entries of a weight to the CPU, as fp32."""
    flat = weight.detach().reshape(-1)
    end = piece.start + piece.size
    entries = flat[piece.start : end]
    return entries.to("cpu", torch.float32, copy=True)


def _make_moments(
    size: int,
    known: Mapping[str, Any],
    xi: float,
    generator: torch.Generator,
) -> Moments:
    """Return the moments of `size` entries, with zeros for what the rule does not need."""
    fields: dict[str, Any] = {
        "mean": torch.zeros(size),
        "square": torch.zeros(size),
        "weight": torch.zeros(size),
    }
    fields.update(known)
    return Moments(**fields, xi=xi, generator=generator)


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
        if num_passes == 0:
            return lambda: None

        title = "importance"
        if num_passes > 1:
            title += f", {num_passes} passes"
        num_steps = num_passes * len(self.batches)
        steps = iter(self.progress(range(num_steps), title))
        return lambda: next(steps, None)


def _iter_weights(settings: _PassSettings) -> Iterator[_WeightPieces]:
    """Yield what the rule needs to know of each weight's entries."""
    if settings.rule.needs_outputs:
        return _iter_output_pieces(settings)
    return _iter_gradient_pieces(settings)


def _iter_output_pieces(settings: _PassSettings) -> Iterator[_WeightPieces]:
    """Yield the mean absolute outputs of linear layers, for each weight piece by piece."""
    num_passes = count_passes(settings.model, settings.shares, settings.memory)
    step = settings.make_step_callback(num_passes)
    weight_outputs = iter_mean_outputs(
        settings.model,
        settings.batches,
        settings.shares,
        settings.memory,
        step=step,
    )

    for name, outputs in weight_outputs:
        yield name, _iter_output_facts(outputs)
    step()


def _iter_output_facts(outputs: Iterable[tuple[int, Tensor]]) -> Iterator[_KnownPiece]:
    for start, output in outputs:
        facts = {"output": output}
        yield _KnownPiece(start, len(output), facts)


def _iter_gradient_pieces(settings: _PassSettings) -> Iterator[_WeightPieces]:
    """Yield the mean gradients and squares that the rule needs, for each weight piece by piece."""
    kinds = settings.rule.needs
    num_bytes = settings.memory
    if settings.folds is not None:
        num_bytes -= settings.folds.nbytes

    blocks = split_into_blocks(settings.shares, num_bytes, len(kinds))
    num_passes = len(blocks) if kinds else 0
    step = settings.make_step_callback(num_passes)
    for block in blocks:
        sums = GradientSums(block, kinds, _choose_devices(settings, block))
        if kinds:
            _accumulate_sums(settings, sums, step)

        for block_range in block:
            yield block_range.name, _iter_mean_pieces(sums, block_range)
        del sums  # before the next block's: both together would be twice the budget
    step()


def _choose_devices(settings: _PassSettings, block: Block) -> dict[str, torch.device]:
    """Return where the sums of each weight of a block lie."""
    named = weights(settings.model)
    devices: dict[str, torch.device] = {}
    for block_range in block:
        weight = named[block_range.name]
        devices[block_range.name] = _CPU if settings.host else weight.device
    return devices


def _iter_mean_pieces(
    sums: GradientSums,
    block_range: BlockRange,
) -> Iterator[_KnownPiece]:
    count = max(sums.examples, 1)
    for start, mean, square in sums.iter_means(block_range):
        facts = {
            "mean": mean,
            "square": square,
            "count": count,
        }
        yield _KnownPiece(start, len(mean), facts)


def _accumulate_sums(
    settings: _PassSettings,
    sums: GradientSums,
    step: Callable[[], Any],
) -> None:
    """Add up one block's gradients in a pass over the data, by examples or by whole batches."""
    # Weights whose modules run twice for an example: hooks would see each call apart, and the
    # square of a sum is not the sum of squares. The pass starts again without hooks on them.
    reused: set[tuple[str, nn.Module]] = set()

    while True:
        gradients = PerExampleGradients(
            settings.model,
            sums,
            reused,
            settings.objective,
        )
        try:
            _add_batches(settings, gradients, sums, step)
            return
        except ModuleReused as found:
            reused |= found.reused
            sums.reset_sums()


def _add_batches(
    settings: _PassSettings,
    gradients: PerExampleGradients,
    sums: GradientSums,
    step: Callable[[], Any],
) -> None:
    """Add the gradients of all batches to the sums, and each batch's share to its fold."""
    add_batch = gradients.add_batch
    if not settings.rule.per_example:
        add_batch = gradients.add_batch_as_one
    folds = settings.folds
    if folds:
        folds.begin_pass(sums)

    with frozen_model(settings.model):
        for number, batch in enumerate(settings.batches):
            add_batch(batch)
            if folds:
                folds.record_batch(number, sums)
            step()
