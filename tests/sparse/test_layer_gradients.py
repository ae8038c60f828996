"""Gradients at selected entries: every way gives the dense gradient's, and the cheaper is taken."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from mm_piece.sparse.gradients import (
    DenseProduct,
    SampledProduct,
    choose_product,
    multiply_gathered,
)
from mm_piece.sparse.tuning import sparse_tuning

SHAPE = (40, 30)


def uniform(density, shape=SHAPE, seed=0):
    size = shape[0] * shape[1]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, int(density * size))].sort().values


def block(rows, columns, shape=SHAPE):
    """All entries of some rows and columns."""
    return (torch.tensor(rows)[:, None] * shape[1] + torch.tensor(columns)[None]).view(-1)


MASKS = {
    "one": torch.tensor([SHAPE[1] * 7 + 3]),
    "first and last": torch.tensor([0, SHAPE[0] * SHAPE[1] - 1]),
    "sparse": uniform(0.01),
    "dense": uniform(0.6),
    "all": torch.arange(SHAPE[0] * SHAPE[1]),
    "rows": block([3, 17], list(range(30))),
    "columns": block(list(range(40)), [0, 29]),
    "corner": block([1, 39], [2, 5, 11]),
    "corner with holes": block([1, 39, 20], [2, 5, 11])[[0, 4, 5, 8]].sort().values,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["area", "sampled", "chosen"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_way_is_the_dense_gradient_at_the_entries(mask, way, dtype):
    index = MASKS[mask]
    product = {
        "area": lambda: DenseProduct(
            index, SHAPE, (index // SHAPE[1]).unique(), (index % SHAPE[1]).unique()
        ),
        "sampled": lambda: SampledProduct(index, SHAPE),
        "chosen": lambda: choose_product(index, SHAPE),
    }[way]()
    torch.manual_seed(1)
    x, gradient = torch.randn(2, 9, SHAPE[1]).to(dtype), torch.randn(2, 9, SHAPE[0]).to(dtype)
    found = product.compute_gradient(product.save_inputs(x), gradient)
    dense = gradient.double().view(-1, SHAPE[0]).t() @ x.double().view(-1, SHAPE[1])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dense.view(-1)[index], rtol=1e-5, atol=1e-5)


def test_gathering_is_the_same_product(monkeypatch):
    monkeypatch.setattr("mm_piece.sparse.gradients._PIECE", 40)  # several pieces
    index = uniform(0.1)
    out, x = torch.randn(SHAPE[0], 13), torch.randn(SHAPE[1], 13)
    rows, columns = index // SHAPE[1], index % SHAPE[1]
    found = multiply_gathered(out, x, rows, columns)
    torch.testing.assert_close(found, (out @ x.t()).view(-1)[index])


def test_the_cheaper_way_is_taken():
    shape = (1000, 1000)
    assert isinstance(choose_product(uniform(0.001, shape), shape), SampledProduct)
    assert isinstance(choose_product(uniform(0.05, shape), shape), SampledProduct)
    assert isinstance(
        choose_product(uniform(0.3, shape), shape), DenseProduct
    )  # dense, and gathered
    assert isinstance(choose_product(block(range(30), range(1000), shape), shape), DenseProduct)
    assert isinstance(choose_product(block(range(200), range(200), shape), shape), DenseProduct)
    scattered = block(range(0, 1000, 2), range(0, 1000, 2), shape)[::249].contiguous()
    assert isinstance(choose_product(scattered, shape), SampledProduct)


def test_only_the_inputs_that_are_needed_are_kept():
    x = torch.randn(5, SHAPE[1])
    few = choose_product(block(list(range(40)), [0, 29]), SHAPE)
    assert few.save_inputs(x).shape == (5, 2)
    many = choose_product(block([3], list(range(30))), SHAPE)
    assert many.save_inputs(x) is x


def saved_bytes(work):
    """Bytes that a forward pass keeps for the backward pass, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(kept.values())


def test_layers_without_entries_keep_nothing():
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    x = torch.randn(100, 8)
    weights = sum(p.untyped_storage().nbytes() for p in layers.parameters())
    with sparse_tuning(layers, {"0.weight": torch.tensor([5])}):
        first = saved_bytes(lambda: layers(x))
    with sparse_tuning(layers, {"2.weight": torch.tensor([5])}):
        last = saved_bytes(lambda: layers(x))
    one_column = 100 * 4  # of the only entry
    assert last <= one_column + 100  # nothing below the lowest layer with entries is kept
    assert first <= one_column + weights + 100


def test_autocast_keeps_inputs_in_its_own_dtype():
    layers, kept = nn.Sequential(nn.Linear(8, 8)), []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    tuning = sparse_tuning(layers, {"0.weight": torch.arange(0, 64, 9)})
    with tuning, hooks, torch.autocast("cpu", torch.bfloat16):
        layers(torch.randn(3, 8))
    assert [tensor.dtype for tensor in kept if tensor.shape == (3, 8)] == [torch.bfloat16]


SCRIPT = """
import torch
from mm_piece.sparse.gradients import multiply_gathered
from mm_piece.sparse.triton_kernels import multiply_sampled

torch.manual_seed(0)
for entries, tokens, dtype in ((1, 1, "float32"), (33, 127, "float32"), (70, 300, "bfloat16")):
    out = torch.randn(20, tokens).to(getattr(torch, dtype))
    x = torch.randn(24, tokens).to(getattr(torch, dtype))
    rows, columns = torch.randint(0, 20, (entries,)), torch.randint(0, 24, (entries,))
    weight = torch.zeros(20, 24, dtype=torch.float64, requires_grad=True)
    loss = ((x.double().t() @ weight.t()) * out.double().t()).sum()
    loss.backward()
    found = multiply_sampled(out, x, rows, columns)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), weight.grad[rows, columns], rtol=1e-5, atol=1e-4)
    dense = multiply_gathered(out, x, rows, columns)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-4)
print("equal")
"""


@pytest.mark.slow
def test_the_triton_kernel_is_autograds_gradient():
    """In Triton's interpreter, which must be chosen before the kernel is defined."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=400,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mask", MASKS)
def test_on_a_gpu_it_is_the_dense_gradient_too(mask):
    index = MASKS[mask].cuda()
    x, gradient = torch.randn(64, SHAPE[1]).cuda(), torch.randn(64, SHAPE[0]).cuda()
    dense = (gradient.double().t() @ x.double()).view(-1)[index]
    for product in (choose_product(index, SHAPE), SampledProduct(index, SHAPE)):
        found = product.compute_gradient(product.save_inputs(x), gradient)
        torch.testing.assert_close(found.double(), dense, rtol=1e-3, atol=1e-3)
