"""Importance scores on batches: exact per-example moments of the gradient, in bounded memory.

One pass over the data per block of entries whose accumulators fit the budget; no weight is changed.
Sources of the rules: PIECE (arXiv 2511.15375); the empirical Fisher uses the data's own answers as
labels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.errors import SelectionError
from mm_piece.mask import Piece
from mm_piece.names import group_of, weights

Batch = Mapping[str, Any]  # what the model's forward takes, labels included
Block = list[tuple[str, int, int]]  # name, first and last + 1 flat entry


@dataclass(frozen=True)
class Moments:
    """What a scoring rule may see of a run of flat entries: fp32 tensors of equal length."""

    mean: Tensor  # mean over examples of the gradient
    square: Tensor  # mean over examples of the squared gradient: the diagonal empirical Fisher
    weight: Tensor  # the entries themselves
    xi: float
    generator: torch.Generator


def piece_f(moments: Moments) -> Tensor:
    """PIECE-F: the diagonal Fisher, E_n[g_n ** 2]."""
    return moments.square


def piece_s(moments: Moments) -> Tensor:
    """PIECE-S: |E_n[g_n]| / sqrt(F + xi), a first-order signal normalised by curvature."""
    return moments.mean.abs() / (moments.square + moments.xi).sqrt()


def magnitude(moments: Moments) -> Tensor:
    """The entry's absolute value; needs no data."""
    return moments.weight.abs()


def random(moments: Moments) -> Tensor:
    """Uniform numbers from the seed: the control of equal density."""
    return torch.rand(moments.weight.shape, generator=moments.generator)


def estimate(
    model: nn.Module, batches: Sequence[Batch], method: str = "piece-f", **options: Any
) -> dict[str, Tensor]:
    """Scores of every patchable weight: fp32, on the CPU, in its shape, under its published name.

    `batches` are what the model's forward takes, labels included; a batch of several examples is
    taken apart along the first dimension. Options: those of `stream`. Raises SelectionError for an
    unknown method and for batches that cannot be taken apart.
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
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, title: items,
) -> Iterator[Piece]:
    """Scores as flat pieces in tensor order; accumulators never exceed `memory` bytes.

    `names` restricts and orders the weights (default: all that `patchable` finds), `xi` is
    PIECE-S's damping on the scale of the mean square, `progress` wraps the loop over batches.
    """
    rule = resolve(method)
    named = weights(model)
    names = patchable(model, batches) if names is None else names
    needs_gradients = method not in DATA_FREE
    generator = torch.Generator().manual_seed(seed)
    blocks = _blocks({name: named[name].numel() for name in names}, memory // 8)
    for number, block in enumerate(blocks, start=1):
        title = f"importance {number}/{len(blocks)}" if len(blocks) > 1 else "importance"
        sums = _accumulate(model, progress(batches, title), block) if needs_gradients else None
        for position, (name, start, stop) in enumerate(block):
            weight = named[name].detach().reshape(-1)[start:stop].float().cpu()
            mean, square = sums.means(position) if sums else (weight, weight)
            yield name, start, rule(Moments(mean, square, weight, xi, generator))


def resolve(method: str) -> Callable[[Moments], Tensor]:
    """The scoring rule of a method's name or dotted path; SelectionError names the known ones."""
    if method in METHODS:
        return METHODS[method]
    module, _, function = method.rpartition(".")
    try:
        rule = getattr(import_module(module), function)
        nothing = torch.zeros(1)
        rule(Moments(nothing, nothing, nothing, 1.0, torch.Generator()))
        return rule
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        allowed = ", ".join(METHODS)
        raise SelectionError(
            f"unknown method {method!r}; allowed: {allowed}, or a dotted path to a rule"
        ) from error


def patchable(model: nn.Module, batches: Sequence[Batch], exclude: Sequence[str] = ()) -> list[str]:
    """Published names of the weights that receive a gradient, in model order, less excluded groups.

    One backward pass per kind of batch (with and without images): what is not reached can never
    train.
    """
    kinds = {frozenset(batch): batch for batch in batches}
    reached: set[str] = set()
    for batch in kinds.values():
        with _requiring(model, list(weights(model).values())):
            _loss(model, next(_examples([batch]))).backward()
            reached |= {name for name, p in weights(model).items() if p.grad is not None}
    return [name for name in weights(model) if name in reached and group_of(name) not in exclude]


class _Sums:
    """Running sums of gradient and squared gradient over one block of entries."""

    def __init__(self, block: Block, device: torch.device) -> None:
        self.first = [torch.zeros(stop - start, device=device) for _, start, stop in block]
        self.second = [torch.zeros(stop - start, device=device) for _, start, stop in block]
        self.examples = 0

    def add(self, gradients: list[Tensor]) -> None:
        self.examples += 1
        for first, second, gradient in zip(self.first, self.second, gradients, strict=True):
            first.add_(gradient)
            second.addcmul_(gradient, gradient)

    def means(self, position: int) -> tuple[Tensor, Tensor]:
        scale = max(self.examples, 1)
        return (self.first[position] / scale).cpu(), (self.second[position] / scale).cpu()


def _accumulate(model: nn.Module, batches: Iterable[Batch], block: Block) -> _Sums:
    named = weights(model)
    parameters = [named[name] for name, _, _ in block]
    sums = _Sums(block, parameters[0].device)
    with _requiring(model, parameters):
        for example in _examples(batches):
            _loss(model, example).backward()
            sums.add([_slice(named[name], start, stop) for name, start, stop in block])
            for parameter in parameters:
                parameter.grad = None
    return sums


def _slice(parameter: nn.Parameter, start: int, stop: int) -> Tensor:
    if parameter.grad is None:  # this example does not reach it (a row without an image, say)
        return torch.zeros(stop - start, device=parameter.device)
    return parameter.grad.reshape(-1)[start:stop].float()


@contextmanager
def _requiring(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone, evaluation mode; everything is put back afterwards."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training = model.training
    model.eval().requires_grad_(False)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        model.train(training)


def _loss(model: nn.Module, example: Batch) -> Tensor:
    device = next(model.parameters()).device
    moved = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in example.items()
    }
    return model(**moved).loss


def _examples(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Single examples; a batch must agree on its first dimension to be taken apart."""
    for batch in batches:
        lengths = {key: len(value) for key, value in batch.items() if isinstance(value, Tensor)}
        size = lengths.get("labels", 1)
        if size == 1:
            yield batch
            continue
        if odd := [f"{length} {key}" for key, length in lengths.items() if length != size]:
            raise SelectionError(
                f"a batch of {size} examples holds {odd[0]}; give batches of one example"
            )
        for row in range(size):
            yield {
                key: value[row : row + 1]
                for key, value in batch.items()
                if isinstance(value, Tensor)
            }


def _blocks(sizes: Mapping[str, int], capacity: int) -> list[Block]:
    """Runs of entries of at most `capacity` each, in order, cutting tensors where needed."""
    if capacity < 1:
        raise SelectionError("memory: the budget holds not even one entry (8 bytes)")
    blocks: list[Block] = [[]]
    room = capacity
    for name, size in sizes.items():
        start = 0
        while start < size:
            if room == 0:
                blocks.append([])
                room = capacity
            stop = min(size, start + room)
            blocks[-1].append((name, start, stop))
            room -= stop - start
            start = stop
    return [block for block in blocks if block]


# The rules that look at the weights alone: no example is run for them.
DATA_FREE = ("magnitude", "random")

METHODS: dict[str, Callable[[Moments], Tensor]] = {
    "piece-f": piece_f,
    "piece-s": piece_s,
    "magnitude": magnitude,
    "random": random,
}
