"""What linear layers give out, row by row: forward passes alone, one example at a time.

Source: MIGU (wenyudu/MIGU), whose per-step sums are taken here over the examples of a task.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.importance.blocks import Block, blocks
from mm_piece.importance.reach import Batch, frozen, loss_of, singles
from mm_piece.names import weights
from mm_piece.owners import owners_of

_PIECE = 2**20  # entries that leave in one go


def with_outputs(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those weights that are a linear layer's own."""
    named, owners = weights(model), owners_of(model)
    return [name for name in names if all(o.is_linear("weight") for o in owners[id(named[name])])]


def outputs(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str],
    memory: int,
    step: Callable[[], Any],
) -> Iterator[tuple[str, int, Tensor]]:
    """Pieces of entries in tensor order: name, first entry, mean output of each one's row.

    The mean is over examples, of the sum over tokens of the absolute output; padding does not
    count. Sums of rows (fp32) never exceed `memory` bytes.
    """
    named = weights(model)
    rows = {name: len(named[name]) for name in names}
    for block in blocks(rows, memory, 1):
        sums = _sums(model, batches, block, step)
        for run in block:
            width = named[run.name].shape[1]
            per_piece = max(1, _PIECE // width)
            for low in range(run.start, run.stop, per_piece):
                part = sums[run.name][low - run.start : low - run.start + per_piece].cpu()
                yield run.name, low * width, part.repeat_interleave(width)


def passes_of(model: nn.Module, names: Sequence[str], memory: int) -> int:
    """How many passes over the data `outputs` makes."""
    named = weights(model)
    return len(blocks({name: len(named[name]) for name in names}, memory, 1))


@torch.no_grad()
def _sums(
    model: nn.Module, batches: Sequence[Batch], block: Block, step: Callable[[], Any]
) -> dict[str, Tensor]:
    named = weights(model)
    sums = {
        run.name: torch.zeros(run.stop - run.start, device=named[run.name].device) for run in block
    }
    examples = 0
    with frozen(model), _listening(model, block, sums):
        for batch in batches:
            for example in singles(batch):
                loss_of(model, _unpadded(example))
                examples += 1
            step()
    return {name: total / examples for name, total in sums.items()}


@contextmanager
def _listening(model: nn.Module, block: Block, sums: Mapping[str, Tensor]) -> Iterator[None]:
    named, owners = weights(model), owners_of(model)

    def hook(name: str, low: int, high: int) -> Callable[..., None]:
        def add(_: nn.Module, __: Any, output: Tensor) -> None:
            # All rows, then some: the order of a sum must not depend on the budget.
            total = output.reshape(-1, output.shape[-1]).float().abs().sum(0)
            sums[name].add_(total[low:high])

        return add

    handles = [
        owner.module.register_forward_hook(hook(run.name, run.start, run.stop))
        for run in block
        for owner in owners[id(named[run.name])]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unpadded(example: Batch) -> Batch:
    """An example without its padding: tokens that the attention mask leaves out."""
    mask = example.get("attention_mask")
    if not isinstance(mask, Tensor) or bool(mask.all()):
        return example
    kept = mask[0].bool()
    return {
        key: value[:, kept] if isinstance(value, Tensor) and value.shape == mask.shape else value
        for key, value in example.items()
    }
