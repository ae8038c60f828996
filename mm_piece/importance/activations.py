"""What linear layers give out, row by row: forward passes alone, one example at a time.

Source: MIGU (wenyudu/MIGU), whose per-step sums are taken here over the examples of a task.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece.distributed import EntryRange, shape_of
from mm_piece.families import weights
from mm_piece.importance.accumulators import Block, split_into_blocks
from mm_piece.importance.backward import Batch, frozen_model, iter_examples, loss_of
from mm_piece.modules import owners_of

_PIECE = 2**20  # entries that leave in one go


def filter_linear_weights(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those weights that are a linear layer's own."""
    named, owners = weights(model), owners_of(model)
    return [name for name in names if all(o.is_linear("weight") for o in owners[id(named[name])])]


def iter_mean_outputs(
    model: nn.Module,
    batches: Sequence[Batch],
    shares: Mapping[str, EntryRange],
    memory: int,
    step: Callable[[], Any],
) -> Iterator[tuple[str, Iterator[tuple[int, Tensor]]]]:
    """Weights in order, each with pieces of its entries: the first, mean output of each one's row.

    `shares` are of whole rows.

    The mean is over examples, of the sum over tokens of the absolute output; padding does not
    count. Sums of rows (fp32) never exceed `memory` bytes.
    """
    named = weights(model)
    for block in split_into_blocks(_to_row_shares(model, shares), memory, 1):
        sums = _sum_outputs(model, batches, block, step)
        for block_range in block:
            yield (
                block_range.name,
                _iter_row_pieces(
                    sums[block_range.name], block_range.start, shape_of(named[block_range.name])[1]
                ),
            )


def _iter_row_pieces(sums: Tensor, start: int, width: int) -> Iterator[tuple[int, Tensor]]:
    """The entries of the rows from `start` on, each with its row's number."""
    per_piece = max(1, _PIECE // width)
    for low in range(0, len(sums), per_piece):
        rows = sums[low : low + per_piece].cpu()
        yield (start + low) * width, rows.repeat_interleave(width)


def count_passes(model: nn.Module, shares: Mapping[str, EntryRange], memory: int) -> int:
    """How many passes over the data `outputs` makes."""
    return len(split_into_blocks(_to_row_shares(model, shares), memory, 1))


def _to_row_shares(model: nn.Module, shares: Mapping[str, EntryRange]) -> dict[str, EntryRange]:
    """Shares counted in rows."""
    widths = {
        name: shape_of(weight)[1] for name, weight in weights(model).items() if name in shares
    }
    return {
        name: EntryRange(
            share.start // widths[name], share.stop // widths[name], share.max_size // widths[name]
        )
        for name, share in shares.items()
    }


@torch.no_grad()
def _sum_outputs(
    model: nn.Module, batches: Sequence[Batch], block: Block, step: Callable[[], Any]
) -> dict[str, Tensor]:
    named = weights(model)
    sums = {
        run.name: torch.zeros(run.stop - run.start, device=named[run.name].device) for run in block
    }
    examples = 0
    with frozen_model(model), _summing_outputs(model, block, sums):
        for batch in batches:
            for example in iter_examples(batch):
                loss_of(model, _strip_padding(example))
                examples += 1
            step()
    return {name: total / examples for name, total in sums.items()}


@contextmanager
def _summing_outputs(model: nn.Module, block: Block, sums: Mapping[str, Tensor]) -> Iterator[None]:
    named, owners = weights(model), owners_of(model)

    def make_hook(name: str, low: int, high: int) -> Callable[..., None]:
        def add_output(_: nn.Module, __: Any, output: Tensor) -> None:
            # All rows, then some: the order of a sum must not depend on the budget.
            total = output.reshape(-1, output.shape[-1]).float().abs().sum(0)
            sums[name].add_(total[low:high])

        return add_output

    handles = [
        owner.module.register_forward_hook(make_hook(run.name, run.start, run.stop))
        for run in block
        for owner in owners[id(named[run.name])]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _strip_padding(example: Batch) -> Batch:
    """An example without its padding: tokens that the attention mask leaves out."""
    mask = example.get("attention_mask")
    if not isinstance(mask, Tensor) or bool(mask.all()):
        return example
    attended = mask[0].bool()
    return {
        key: value[:, attended]
        if isinstance(value, Tensor) and value.shape == mask.shape
        else value
        for key, value in example.items()
    }
