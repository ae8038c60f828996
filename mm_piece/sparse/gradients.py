"""The gradient of a linear layer at selected entries alone: two ways, the cheaper one by its mask.

Entry (o, i) of the gradient of `x @ W.T` is the sum over tokens of g_o x_i. Either it is read off a
dense product of the rows and columns that hold entries, or each entry is a dot product of its own.
"""

import warnings
from typing import Protocol

import torch
from torch import Tensor

# Time of the sampled product over that of the whole weight gradient, on one core: a line through
# the project's design figures at 0.1, 1 and 5 % (.09, .13, .32). A part of a dense product costs
# that part.
_SAMPLED_LEAST, _SAMPLED_SLOPE = 0.085, 4.7
_FEW = 4  # copying a part of the inputs pays where it is at most a quarter of them
_PIECE = 2**22  # numbers gathered in one go where neither CPU nor CUDA has a kernel


class GradientProduct(Protocol):
    """How one weight's gradient is found at its entries."""

    def save_inputs(self, x: Tensor) -> Tensor:
        """What of the inputs (…, columns) must live until the backward pass."""
        ...

    def compute_gradient(self, saved: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at the entries, fp32, from what was kept and the outputs' (…, rows)."""
        ...


def choose_product(index: Tensor, shape: tuple[int, int]) -> GradientProduct:
    """The cheaper way for a weight of `shape` with these sorted flat entries (int32 or int64)."""
    rows, columns = (index // shape[1]).unique(), (index % shape[1]).unique()
    area = len(rows) * len(columns) / (shape[0] * shape[1])
    density = len(index) / (shape[0] * shape[1])
    if area <= _SAMPLED_LEAST + _SAMPLED_SLOPE * density:
        return DenseProduct(index, shape, rows, columns)
    return SampledProduct(index, shape)


class DenseProduct:
    """A dense product of the rows and columns that hold entries."""

    def __init__(
        self, index: Tensor, shape: tuple[int, int], rows: Tensor, columns: Tensor
    ) -> None:
        """`rows` and `columns`: those with entries, sorted."""
        self.rows = rows if len(rows) < shape[0] else None
        self.columns = columns if len(columns) < shape[1] else None
        self.saves_columns = len(columns) * _FEW <= shape[1]  # cut on the way forward
        offsets = torch.searchsorted(rows, index // shape[1]) * len(columns)
        self.local_entries = _narrow_indices(
            offsets + torch.searchsorted(columns, index % shape[1]), shape
        )

    def save_inputs(self, x: Tensor) -> Tensor:
        return _select_columns(x, self.columns) if self.saves_columns else x

    def compute_gradient(self, saved: Tensor, gradient: Tensor) -> Tensor:
        x = _flatten_tokens(saved if self.saves_columns else _select_columns(saved, self.columns))
        out = _flatten_tokens(_select_columns(gradient, self.rows))
        return (out.t() @ x).view(-1)[self.local_entries.long()].float()


class SampledProduct:
    """A dot product for each entry; what is held are the entries, which the mask holds anyway."""

    def __init__(self, index: Tensor, shape: tuple[int, int]) -> None:
        self.index, self.shape = index, shape

    def save_inputs(self, x: Tensor) -> Tensor:
        return x

    def compute_gradient(self, saved: Tensor, gradient: Tensor) -> Tensor:
        out, x = _flatten_tokens(gradient), _flatten_tokens(saved)
        if x.device.type == "cpu":
            return torch.sparse.sampled_addmm(
                self._make_csr_pattern(), out.t(), x, beta=0.0
            ).values()
        transposed = out.t().contiguous(), x.t().contiguous()
        rows, columns = self.index // self.shape[1], self.index % self.shape[1]
        if x.is_cuda:
            from mm_piece.sparse.triton_kernels import (
                multiply_sampled,
            )  # only CUDA machines have Triton

            return multiply_sampled(*transposed, rows, columns)
        return multiply_gathered(*transposed, rows, columns)

    def _make_csr_pattern(self) -> Tensor:
        """The entries as a CSR tensor, whose order sorted flat entries already have."""
        ends = torch.arange(self.shape[0] + 1, dtype=self.index.dtype) * self.shape[1]
        starts = torch.searchsorted(self.index, ends).to(self.index.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                starts,
                self.index % self.shape[1],
                torch.zeros(len(self.index)),
                size=self.shape,
                check_invariants=False,
            )


def multiply_gathered(out: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """For each entry the dot product, fp32, of a row of `out` and one of `x`, both (…, tokens)."""
    step = max(1, _PIECE // out.shape[1])
    products = [
        (out[rows[start : start + step]].float() * x[columns[start : start + step]].float()).sum(1)
        for start in range(0, len(rows), step)
    ]
    return torch.cat(products)


def _select_columns(values: Tensor, chosen: Tensor | None) -> Tensor:
    return values if chosen is None else values.index_select(-1, chosen)


def _flatten_tokens(values: Tensor) -> Tensor:
    """One row for each token; on a CPU in fp32, which it multiplies faster and better."""
    flat = values.reshape(-1, values.shape[-1])
    return flat.float() if flat.device.type == "cpu" else flat


def _narrow_indices(numbers: Tensor, shape: tuple[int, int]) -> Tensor:
    """As int32 where any entry's number fits."""
    return numbers.int() if shape[0] * shape[1] < 2**31 else numbers
