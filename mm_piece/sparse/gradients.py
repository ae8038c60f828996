"""The gradient of a linear layer at selected entries alone, in the cheaper of two ways.

Entry (o, i) of the gradient of `x @ W.T` is the sum over tokens t of g_to x_ti, with the inputs x
(tokens, columns) and the gradient g (tokens, rows) of the outputs. Either it is read off a dense
product of the rows and columns that hold selected entries, or each entry is a dot product alone.
"""

import warnings
from typing import Protocol

import torch
from torch import Tensor

# Time of the sampled product over that of the whole weight gradient, on one core: a line through
# the project's design figures at 0.1, 1 and 5 % density (.09, .13, .32). A dense product of some of
# the rows and columns costs their share of the weight.
_SAMPLED_LEAST = 0.085
_SAMPLED_SLOPE = 4.7

_FEW = 4  # copying some columns of the inputs pays where they are at most a quarter of them
_PIECE = 2**22  # numbers gathered in one go where neither CPU nor CUDA has a kernel


class GradientProduct(Protocol):
    """A way to compute one weight's gradient at its selected entries."""

    def save_inputs(self, x: Tensor) -> Tensor:
        """Return what of the inputs (…, columns) must live until the backward pass."""
        ...

    def compute_gradient(self, saved: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient at the entries, fp32, (entries,).

        `saved` is from `save_inputs`; `gradient` (…, rows) is that of the outputs.
        """
        ...


def choose_product(index: Tensor, shape: tuple[int, int]) -> GradientProduct:
    """Return the cheaper way for a weight of `shape` and these sorted flat entries.

    `index` is int32 or int64.
    """
    num_rows, num_columns = shape
    rows = (index // num_columns).unique()
    columns = (index % num_columns).unique()

    size = num_rows * num_columns
    area = len(rows) * len(columns)
    dense_cost = area / size
    density = len(index) / size
    sampled_cost = _SAMPLED_LEAST + _SAMPLED_SLOPE * density
    if dense_cost <= sampled_cost:
        return DenseProduct(index, shape, rows, columns)
    return SampledProduct(index, shape)


class DenseProduct:
    """A dense product of the rows and columns that hold entries, from which these are read."""

    def __init__(
        self,
        index: Tensor,
        shape: tuple[int, int],
        rows: Tensor,
        columns: Tensor,
    ) -> None:
        """`rows` and `columns`: those with entries, sorted."""
        num_rows, num_columns = shape

        # None stands for all of them, which need no copy.
        self.rows = rows if len(rows) < num_rows else None
        self.columns = columns if len(columns) < num_columns else None
        # Few columns are copied in the forward pass, so that the inputs need not live longer.
        self.saves_columns = len(columns) * _FEW <= num_columns

        # Where the entries lie in the product, whose rows and columns are some of the weight's.
        local_rows = torch.searchsorted(rows, index // num_columns)
        local_columns = torch.searchsorted(columns, index % num_columns)
        local_entries = local_rows * len(columns) + local_columns
        self.local_entries = _narrow_indices(local_entries, shape)

    def save_inputs(self, x: Tensor) -> Tensor:
        if self.saves_columns:
            return _select_columns(x, self.columns)
        return x

    def compute_gradient(self, saved: Tensor, gradient: Tensor) -> Tensor:
        if not self.saves_columns:
            saved = _select_columns(saved, self.columns)
        gradient = _select_columns(gradient, self.rows)

        x = _flatten_tokens(saved)  # (tokens, columns with entries)
        out = _flatten_tokens(gradient)  # (tokens, rows with entries)
        product = out.t() @ x  # (rows with entries, columns with entries)

        indices = self.local_entries.long()
        entries = product.view(-1)[indices]
        return entries.float()


class SampledProduct:
    """A dot product for each entry. It saves no indices: the mask has the entries anyway."""

    def __init__(self, index: Tensor, shape: tuple[int, int]) -> None:
        self.index = index
        self.shape = shape

    def save_inputs(self, x: Tensor) -> Tensor:
        return x

    def compute_gradient(self, saved: Tensor, gradient: Tensor) -> Tensor:
        out = _flatten_tokens(gradient)  # (tokens, rows)
        x = _flatten_tokens(saved)  # (tokens, columns)
        if x.device.type == "cpu":
            pattern = self._make_csr_pattern()
            product = torch.sparse.sampled_addmm(
                pattern,
                out.t(),
                x,
                beta=0.0,
            )
            return product.values()

        # Contiguous, so that an entry's dot product reads two rows of memory.
        out = out.t().contiguous()  # (rows, tokens)
        x = x.t().contiguous()  # (columns, tokens)
        rows = self.index // self.shape[1]
        columns = self.index % self.shape[1]
        if x.is_cuda:
            # Only machines with CUDA have Triton.
            from mm_piece.sparse.triton_kernels import multiply_sampled

            return multiply_sampled(out, x, rows, columns)
        return multiply_gathered(out, x, rows, columns)

    def _make_csr_pattern(self) -> Tensor:
        """Return the entries as a CSR tensor of zeros, in whose order sorted flat entries are."""
        num_rows, num_columns = self.shape
        dtype = self.index.dtype
        row_numbers = torch.arange(num_rows + 1, dtype=dtype)
        bounds = row_numbers * num_columns
        row_starts = torch.searchsorted(self.index, bounds)
        columns = self.index % num_columns
        values = torch.zeros(len(self.index))

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                row_starts.to(dtype),
                columns,
                values,
                size=self.shape,
                check_invariants=False,
            )


def multiply_gathered(
    out: Tensor,
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """Return for each entry the dot product, fp32, of a row of `out` and one of `x`.

    `out` (rows, tokens) and `x` (columns, tokens) are of any floating dtype; `rows` and `columns`
    are (entries,).
    """
    num_tokens = out.shape[1]
    step = max(1, _PIECE // num_tokens)
    products = []
    for start in range(0, len(rows), step):
        end = start + step
        piece_rows = rows[start:end]
        piece_columns = columns[start:end]
        left = out[piece_rows].float()  # (entries of the piece, tokens)
        right = x[piece_columns].float()
        product = left * right
        products.append(product.sum(1))
    return torch.cat(products)


def _select_columns(values: Tensor, chosen: Tensor | None) -> Tensor:
    if chosen is None:
        return values
    return values.index_select(-1, chosen)


def _flatten_tokens(values: Tensor) -> Tensor:
    """Return one row for each token; on a CPU in fp32, which it multiplies faster and better."""
    flat = values.reshape(-1, values.shape[-1])
    if flat.device.type == "cpu":
        return flat.float()
    return flat


def _narrow_indices(numbers: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return flat entries as int32, if any entry of a weight of `shape` fits."""
    num_rows, num_columns = shape
    if num_rows * num_columns < 2**31:
        return numbers.int()
    return numbers
