"""The sampled product on a GPU, in Triton: see `SampledProduct`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 32  # of one program
_TOKENS = 128  # of one step of its loop


def multiply_sampled(
    out: Tensor,
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """Return for each entry the dot product, fp32, of a row of `out` and one of `x`.

    `out` (rows, tokens) and `x` (columns, tokens) are contiguous and of any floating dtype; `rows`
    and `columns` (entries,) are int32 or int64.
    """
    num_entries = len(rows)
    num_tokens = x.shape[1]
    found = torch.empty(num_entries, device=x.device)
    sizes: Any = {"ENTRIES": _ENTRIES, "TOKENS": _TOKENS}

    num_programs = triton.cdiv(num_entries, _ENTRIES)
    _multiply_sampled_kernel[(num_programs,)](
        out,
        x,
        rows,
        columns,
        found,
        num_entries,
        num_tokens,
        **sizes,
    )
    return found


@triton.jit
def _multiply_sampled_kernel(
    out,
    x,
    rows,
    columns,
    found,
    entries,
    tokens,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # Tensors arrive as pointers. Past the last entry and the last token, loads are masked.
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entry < entries

    # Each entry's two rows lie in one piece: entries of one row of the weight find it in the cache.
    # In int64: an offset into `out` or `x` may exceed int32.
    row = tl.load(rows + entry, mask=is_entry, other=0).to(tl.int64)
    column = tl.load(columns + entry, mask=is_entry, other=0).to(tl.int64)
    out_row = out + row[:, None] * tokens  # (ENTRIES, 1)
    x_row = x + column[:, None] * tokens

    total = tl.zeros((ENTRIES,), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        is_token = token < tokens
        mask = is_entry[:, None] & is_token[None, :]  # (ENTRIES, TOKENS)

        left = tl.load(out_row + token[None, :], mask=mask, other=0.0)
        right = tl.load(x_row + token[None, :], mask=mask, other=0.0)
        products = left.to(tl.float32) * right.to(tl.float32)
        total += tl.sum(products, axis=1)
    tl.store(found + entry, total, mask=is_entry)
