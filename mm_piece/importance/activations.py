"""Outputs of linear layers, summed for each output row, from forward passes alone.

Source: MIGU (wenyudu/MIGU), whose sums of one training step are taken here over all examples of a
task.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mm_piece.distributed import EntryRange, shape_of
from mm_piece.families import weights
from mm_piece.importance.accumulators import Block, split_into_blocks
from mm_piece.importance.backward import (
    Batch,
    frozen_model,
    iter_examples,
    loss_of,
)
from mm_piece.modules import owners_of

Step = Callable[[], object]  # told of each batch that is done
_PIECE = 2**20  # entries that leave in one go


def filter_linear_weights(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return those of the named weights that lie in linear layers only."""
    named = weights(model)
    owners = owners_of(model)
    found = []
    for name in names:
        weight_owners = owners[id(named[name])]
        if all(owner.is_linear("weight") for owner in weight_owners):
            found.append(name)
    return found


def iter_mean_outputs(
    model: nn.Module,
    batches: Sequence[Batch],
    shares: Mapping[str, EntryRange],
    memory: int,
    step: Step,
) -> Iterator[tuple[str, Iterator[tuple[int, Tensor]]]]:
    """Iterate over weights in order, each with pieces: their first entry, each entry's mean output.

    An entry's mean output is that of its output row: the mean over examples of the sum over tokens
    of the absolute output. Padding does not count. `shares` are of complete rows. Sums of rows
    (fp32) never exceed `memory` bytes; `step` is called after each batch.
    """
    named = weights(model)
    row_shares = _to_row_shares(model, shares)
    for block in split_into_blocks(row_shares, memory, num_sums=1):
        sums = _sum_outputs(model, batches, block, step)
        for rows in block:
            width = shape_of(named[rows.name])[1]
            yield rows.name, _iter_row_pieces(sums[rows.name], rows.start, width)


def _iter_row_pieces(
    sums: Tensor,
    start: int,
    width: int,
) -> Iterator[tuple[int, Tensor]]:
    """Iterate over the entries of the rows from `start` on, each with the number of its row."""
    rows_per_piece = max(1, _PIECE // width)
    for low in range(0, len(sums), rows_per_piece):
        rows = sums[low : low + rows_per_piece].cpu()
        first_entry = (start + low) * width
        yield first_entry, rows.repeat_interleave(width)


def count_passes(
    model: nn.Module,
    shares: Mapping[str, EntryRange],
    memory: int,
) -> int:
    """Return how many passes over the data `iter_mean_outputs` makes."""
    row_shares = _to_row_shares(model, shares)
    blocks = split_into_blocks(row_shares, memory, num_sums=1)
    return len(blocks)


def _to_row_shares(
    model: nn.Module,
    shares: Mapping[str, EntryRange],
) -> dict[str, EntryRange]:
    """Convert shares of entries into shares of output rows."""
    named = weights(model)
    row_shares: dict[str, EntryRange] = {}
    for name, share in shares.items():
        width = shape_of(named[name])[1]
        row_shares[name] = EntryRange(
            share.start // width,
            share.stop // width,
            share.max_size // width,
        )
    return row_shares


@torch.no_grad()
def _sum_outputs(
    model: nn.Module,
    batches: Sequence[Batch],
    block: Block,
    step: Step,
) -> dict[str, Tensor]:
    """Return the mean over examples of the summed outputs of a block's rows."""
    named = weights(model)
    sums: dict[str, Tensor] = {}
    for rows in block:
        size = rows.stop - rows.start
        device = named[rows.name].device
        sums[rows.name] = torch.zeros(size, device=device)

    # One example at a time and without its padding: the batches must not show in the result.
    num_examples = 0
    with frozen_model(model), _summing_outputs(model, block, sums):
        for batch in batches:
            for example in iter_examples(batch):
                stripped = _strip_padding(example)
                loss_of(model, stripped)
                num_examples += 1
            step()

    return {name: total / num_examples for name, total in sums.items()}


@contextmanager
def _summing_outputs(
    model: nn.Module,
    block: Block,
    sums: Mapping[str, Tensor],
) -> Iterator[None]:
    """Keep adding the outputs of linear layers to the sums of a block while it runs."""
    named = weights(model)
    owners = owners_of(model)

    def make_hook(
        name: str,
        low: int,
        high: int,
    ) -> Callable[..., None]:
        def add_output(_: nn.Module, __: object, output: Tensor) -> None:
            # All rows, then some: the order of a sum must not depend on the budget.
            by_token = output.reshape(-1, output.shape[-1])  # (tokens, out)
            magnitudes = by_token.float().abs()
            total = magnitudes.sum(0)
            sums[name].add_(total[low:high])

        return add_output

    handles = []
    for rows in block:
        hook = make_hook(rows.name, rows.start, rows.stop)
        weight = named[rows.name]
        for owner in owners[id(weight)]:
            handle = owner.module.register_forward_hook(hook)
            handles.append(handle)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _strip_padding(example: Batch) -> Batch:
    """Return an example without the tokens that its attention mask leaves out."""
    mask = example.get("attention_mask")
    if not isinstance(mask, Tensor) or bool(mask.all()):
        return example

    attended = mask[0].bool()
    stripped: dict[str, object] = {}
    for key, value in example.items():
        # One number for each token; images and the like stay as they are.
        if isinstance(value, Tensor) and value.shape == mask.shape:
            value = value[:, attended]
        stripped[key] = value
    return stripped
