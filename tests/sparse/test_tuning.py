"""Laws 1 and 5 (first half): only selected entries move, and their gradients are the dense ones."""

import json

import pytest
import torch
from torch import nn

from mm_piece.data import collate, encode, read
from mm_piece.errors import SelectionError
from mm_piece.families import weights
from mm_piece.models.base import load_base, load_processor
from mm_piece.sparse.tuning import sparse_tuning

OPTIMIZERS = {
    "adamw-decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.fixture
def batch(base):
    processor = load_processor(base)
    return collate([encode(e, processor) for e in read("scenes:digits/train[:4]")], 0)


def every_kind_of_mask(model, seed=0, density=0.05):
    """A random mask that touches every parameter: linear, conv, norm, bias, embedding, bare."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randperm(p.numel(), generator=generator)[: max(1, int(density * p.numel()))]
        .sort()
        .values
        for name, p in weights(model).items()
    }


def step(model, batch, tuning, optimizer):
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    tuning.write_back()
    return loss.item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_entries_outside_the_mask_stay_bit_identical(base, batch, optimizer, dtype):
    model, _ = load_base(base, dtype=dtype)
    batch = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
    mask = every_kind_of_mask(model)
    before = {name: p.detach().clone() for name, p in weights(model).items()}
    with sparse_tuning(model, mask) as tuning:
        chosen = OPTIMIZERS[optimizer](tuning.parameters())
        for _ in range(3):
            step(model, batch, tuning, chosen)
    moved = 0
    for name, parameter in weights(model).items():
        changed = (parameter != before[name]).view(-1).nonzero().view(-1)
        assert torch.isin(changed, mask[name]).all(), name
        moved += len(changed)
    assert (
        moved
        > 0.5 * sum(len(index) for name, index in mask.items() if "post_layernorm" not in name)
        or dtype != "float32"
    )


def test_gradients_are_the_dense_ones_at_the_entries(base, batch):
    model, _ = load_base(base)
    mask = every_kind_of_mask(model)
    model(**batch).loss.backward()
    dense = {name: p.grad for name, p in weights(model).items()}
    model.zero_grad()
    with sparse_tuning(model, mask) as tuning:
        model(**batch).loss.backward()
        for name, patch in tuning.patches.items():
            if dense[name] is None:
                assert patch.values.grad is None
                continue
            expected = dense[name].reshape(-1)[mask[name]]
            torch.testing.assert_close(patch.values.grad, expected, rtol=1e-4, atol=1e-8)
    assert all(p.grad is None for p in model.parameters())


def test_sparse_training_follows_masked_dense_training(base, batch):
    """The same optimizer on the dense model with everything but the mask put back."""
    sparse, _ = load_base(base)
    dense, _ = load_base(base)
    mask = every_kind_of_mask(sparse)
    with sparse_tuning(sparse, mask) as tuning:
        optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
        for _ in range(5):
            step(sparse, batch, tuning, optimizer)
    for _ in range(5):
        dense.zero_grad()
        dense(**batch).loss.backward()
        with torch.no_grad():
            for name, parameter in weights(dense).items():
                if parameter.grad is not None:
                    at = mask[name]
                    parameter.view(-1)[at] -= 0.5 * parameter.grad.reshape(-1)[at]
    for name, parameter in weights(sparse).items():
        torch.testing.assert_close(parameter, weights(dense)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.003, 0.05, 0.5])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl_moe", "gemma2"])
def test_every_family_has_the_dense_gradients(family, family_base, density, folder):
    """Fused experts, packed images, tied heads; sampled and dense products."""
    model, processor = load_base(family_base(family))
    rows = [{"prompt": "Is it red?", "answer": "no"}, {"prompt": "Is it?", "answer": "yes it is"}]
    if family != "gemma2":
        pictures = sorted(folder.glob("*.png"))
        rows = [{**row, "image": p.name} for row, p in zip(rows, pictures, strict=False)]
    (folder / "two.json").write_text(json.dumps(rows), encoding="utf-8")
    batch = collate([encode(e, processor) for e in read(str(folder / "two.json"))], 0)
    mask = every_kind_of_mask(model, density=density)
    model(**batch).loss.backward()
    same_as_dense(model, mask, lambda: model(**batch).loss.backward(), 1e-3, 1e-5)


def same_as_dense(model, mask, backward, rtol, share):
    """The gradients that `backward` gives are the dense ones, which it gave before."""
    dense = {name: p.grad for name, p in weights(model).items()}
    model.zero_grad()
    with sparse_tuning(model, mask) as tuning:
        backward()
        for name, patch in tuning.patches.items():
            if dense[name] is None:
                assert patch.values.grad is None, name
                continue
            expected = dense[name].reshape(-1)[mask[name]].float()
            atol = share * float(dense[name].abs().max()) + 1e-9
            found = patch.values.grad
            torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_recomputed_activations_give_the_same_gradients(base, batch, reentrant):
    model, _ = load_base(base)
    mask = every_kind_of_mask(model, density=0.01)
    if reentrant:  # its tower's layers take an input without a gradient, which this way needs
        mask = {name: index for name, index in mask.items() if not name.startswith("vision")}
    model(**batch).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()

    def backward():
        model.enable_input_require_grads()  # as Trainer does
        model(**batch).loss.backward()

    same_as_dense(model, mask, backward, 1e-4, 1e-6)


def test_autocast_gives_the_gradients_of_its_dtype(base, batch):
    model, _ = load_base(base)

    def backward():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()

    backward()
    same_as_dense(model, every_kind_of_mask(model, density=0.01), backward, 2e-2, 2e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains_the_same(base, batch):
    eager, compiled, before = (load_base(base)[0] for _ in range(3))
    mask = {n: i for n, i in every_kind_of_mask(eager, density=0.01).items() if "layers.1" in n}
    for model in (eager, compiled):
        with sparse_tuning(model, mask) as tuning:
            run = torch.compile(model, backend="aot_eager") if model is compiled else model
            optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
            for _ in range(2):
                optimizer.zero_grad()
                run(**batch).loss.backward()
                optimizer.step()
                tuning.write_back()
    torch._dynamo.reset()
    for name, weight in weights(eager).items():
        torch.testing.assert_close(weights(compiled)[name], weight, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(weights(compiled)[name], weights(before)[name]) for name in mask)


def test_two_micro_batches_of_one_are_one_of_two(base, batch):
    model, _ = load_base(base)
    mask = every_kind_of_mask(model)
    labels = (batch["labels"][:, 1:] != -100).sum(1)
    gradients = []
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        with sparse_tuning(model, mask) as tuning:
            for part in parts:
                rows = {key: value[part] for key, value in batch.items()}
                share = labels[part].sum() / labels[:2].sum()
                (model(**rows).loss * share).backward()
            gradients.append({n: p.values.grad for n, p in tuning.patches.items()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-8)


def test_leaving_restores_the_plain_model(base):
    model, _ = load_base(base)
    names = [name for name, _ in model.named_parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    identities = [id(p) for p in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    with sparse_tuning(model, every_kind_of_mask(model)) as tuning:
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in trainable} == {id(p) for p in tuning.parameters()}
        assert all(p.dtype == torch.float32 for p in trainable)
    assert [name for name, _ in model.named_parameters()] == names
    assert [id(p) for p in model.parameters()] == identities
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [type(module) for module in model.modules()] == kinds
    assert not any("forward" in vars(module) for module in model.modules())


def test_leaving_writes_the_values(base):
    model, _ = load_base(base)
    mask = every_kind_of_mask(model)
    with sparse_tuning(model, mask) as tuning, torch.no_grad():
        for values in tuning.parameters():
            values += 1
        kept = tuning.detach_values()
    named = weights(model)
    written = {name: named[name].detach().flatten()[mask[name].long()] for name in kept}
    assert all(torch.equal(written[name], kept[name]) for name in kept)


def test_an_exception_inside_leaves_a_plain_model(base):
    model, _ = load_base(base)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(RuntimeError, match="stop"), sparse_tuning(model, every_kind_of_mask(model)):
        raise RuntimeError("stop")
    assert [name for name, _ in model.named_parameters()] == names


def test_tied_weights_train_as_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    model, ids = Tied(), torch.tensor([1, 2, 3])
    model(ids).pow(2).sum().backward()
    dense, model.embed.weight.grad = model.embed.weight.grad, None
    index = torch.tensor([3, 8, 20])
    with sparse_tuning(model, {"embed.weight": index}) as tuning:
        model(ids).pow(2).sum().backward()
        torch.testing.assert_close(tuning.parameters()[0].grad, dense.view(-1)[index])
    assert model.head.weight is model.embed.weight


def test_modules_without_entries_get_no_gradient_and_no_hook(base, batch):
    model, _ = load_base(base)
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    with sparse_tuning(model, {name: torch.tensor([0, 5])}) as tuning:
        model(**batch).loss.backward()
        assert [p.grad is not None for p in tuning.parameters()] == [True]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({}, "selects no entry"),
        ({"nowhere.weight": [0]}, "does not have"),
        ({"language_model.model.norm.weight": [3, 2]}, "must ascend"),
        ({"language_model.model.norm.weight": [2, 2]}, "must ascend"),
        ({"language_model.model.norm.weight": [24]}, "within 0…23"),
        ({"language_model.model.norm.weight": [-1]}, "within 0…23"),
    ],
)
def test_bad_masks_are_refused(base, mask, message):
    model, _ = load_base(base)
    with pytest.raises(SelectionError, match=message):
        sparse_tuning(model, {name: torch.tensor(index) for name, index in mask.items()})


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([1, 2], "indices are a tensor"),
        (None, "indices are a tensor"),
        (torch.tensor([1.0, 2.0]), "a vector of int32 or int64"),
        (torch.tensor([True]), "a vector of int32 or int64"),
        (torch.tensor([[1, 2]]), "a vector of int32 or int64"),
        (torch.tensor(3), "a vector of int32 or int64"),
    ],
)
def test_indices_of_another_kind_are_refused(base, index, message):
    model, _ = load_base(base)
    with pytest.raises(SelectionError, match=message):
        sparse_tuning(model, {"language_model.model.norm.weight": index})


def test_a_model_is_tuned_once_at_a_time(base):
    model, _ = load_base(base)
    mask = every_kind_of_mask(model)
    with sparse_tuning(model, mask) as tuning:
        with pytest.raises(SelectionError, match="is being tuned already"):
            sparse_tuning(model, mask)
        assert len(tuning.parameters()) == len(mask)
    with sparse_tuning(model, mask):
        pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_delta_rebuilds_the_trained_model(base, batch, dtype):
    model, _ = load_base(base, dtype=dtype)
    twin, _ = load_base(base, dtype=dtype)
    batch = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
    with sparse_tuning(model, every_kind_of_mask(model)) as tuning:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
        step(model, batch, tuning, optimizer)
        delta = tuning.delta("digits")
    assert delta.entries > 100
    delta.apply({name: p.detach() for name, p in weights(twin).items()})
    for name, parameter in weights(model).items():
        assert torch.equal(parameter, weights(twin)[name])
