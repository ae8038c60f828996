"""The sampled product on a GPU, in Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES, _TOKENS = 32, 128  # of one program, and of one step of its loop


def multiply_sampled(out: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """For each entry the dot product, fp32, of a row of `out` and one of `x`.

    `out` (rows, tokens) and `x` (columns, tokens) are contiguous and of any floating dtype; `rows`
    and `columns` (entries,) are int32 or int64.
    """
    found = torch.empty(len(rows), device=x.device)
    sizes: Any = {"ENTRIES": _ENTRIES, "TOKENS": _TOKENS}
    grid = (triton.cdiv(len(rows), _ENTRIES),)
    _multiply_sampled_kernel[grid](out, x, rows, columns, found, len(rows), x.shape[1], **sizes)
    return found


@triton.jit
def _multiply_sampled_kernel(
    out, x, rows, columns, found, entries, tokens, ENTRIES: tl.constexpr, TOKENS: tl.constexpr
):
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    real = entry < entries
    # Each entry's two rows lie in one piece: entries of one row of the weight find it in the cache.
    left = out + tl.load(rows + entry, mask=real, other=0).to(tl.int64)[:, None] * tokens
    right = x + tl.load(columns + entry, mask=real, other=0).to(tl.int64)[:, None] * tokens
    total = tl.zeros((ENTRIES,), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        here = real[:, None] & (token < tokens)[None, :]
        first = tl.load(left + token[None, :], mask=here, other=0.0).to(tl.float32)
        second = tl.load(right + token[None, :], mask=here, other=0.0).to(tl.float32)
        total += tl.sum(first * second, axis=1)
    tl.store(found + entry, total, mask=real)
