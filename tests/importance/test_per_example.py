"""Law 4 for every kind of layer: each example's gradient, from whole batches and one by one."""

from types import SimpleNamespace

import pytest
import torch
from tiny_families import TEXT
from torch import nn

from mm_piece.data import EncodedList, LengthGroupedBatches, encode, read
from mm_piece.families import weights
from mm_piece.importance import estimate, find_patchable_names, hooks, per_example
from mm_piece.models.base import load_base, load_processor


class Model(nn.Module):
    """Layers around a vector per example; `labels` of its first tokens decide the loss."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(6, 5)

    def forward(self, x, labels):
        logits = self.out(self.layers(x))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss)


class Twice(nn.Module):
    """A layer that runs twice in one pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Sometimes(nn.Module):
    """A layer that runs twice for some examples only."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        once = self.layer(x)
        return self.layer(torch.tanh(once)) if x.sum() > 0 else once


class Gate(nn.Module):
    """A bare parameter beside two inputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x, gate):
        return self.scale * x * torch.tanh(gate)


class Gated(nn.Module):
    """A module that is called with two tensors, one of them by name."""

    def __init__(self):
        super().__init__()
        self.layer, self.gate = nn.Linear(6, 6), Gate()

    def forward(self, x):
        return self.gate(self.layer(x), gate=x)


class Functional(nn.Module):
    """A layer whose weights are used outside of it: there alone, or there too."""

    def __init__(self, layer, use):
        super().__init__()
        self.layer, self.use = layer, use

    def forward(self, x):
        return self.use(self.layer, x)


def as_function(layer, x):
    return nn.functional.linear(x, layer.weight, layer.bias)


def as_function_too(layer, x):
    return nn.functional.linear(torch.tanh(layer(x)), layer.weight)


def as_norm_too(layer, x):
    return nn.functional.layer_norm(layer(x), (6,), layer.weight)


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Positions(nn.Module):
    """A bare parameter and an embedding of positions, which never sees the batch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))
        self.places = nn.Embedding(4, 6)

    def forward(self, x):
        return self.scale * x + self.places(torch.arange(4)[None])


class Experts(nn.Module):
    """Fused experts: one weight of three dimensions, each token through one of them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 6, 6) - 0.5)

    def forward(self, x):
        chosen = x.sum(-1).abs().mul(100).long() % 3
        return torch.einsum("btoi,bti->bto", self.weight[chosen], x)


class Router(nn.Module):
    """Which expert each token goes to, and how much of it: a module that gives two tensors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 6) - 0.5)

    def forward(self, x):
        return (x @ self.weight.t()).softmax(-1).max(-1)


class Chosen(nn.Module):
    """Fused experts among tokens that stand in one row, as routed from outside."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 6, 6) - 0.5)

    def forward(self, x, chosen, share):
        return torch.einsum("toi,ti->to", self.weight[chosen], x) * share[:, None]


class Mixture(nn.Module):
    """A router and its experts: the router's gradient comes through them."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = Router(), Chosen()

    def forward(self, x):
        tokens = x.reshape(-1, 6)
        share, chosen = self.router(tokens)
        return self.experts(tokens, chosen, share).view_as(x)


class Later(nn.Module):
    """Layers that run twice for examples of large numbers."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        once = self.layer(self.norm(x))
        return self.layer(self.norm(torch.tanh(once))) if x.abs().max() > 9 else once


class Mixing(nn.Module):
    """What no batch can be taken from: every example sees the others."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x) * (1 + x.mean(0, keepdim=True))


def _back():
    """From 4 maps of 2 by 6 (or 2 of them) to a vector for each of 4 tokens."""
    return [nn.Flatten(1, 2), nn.Unflatten(1, (4, 2)), nn.Flatten(2, 3), nn.Linear(12, 6)]


LAYERS = {
    "linear": lambda: [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False)],
    "wide": lambda: [nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 6)],
    "norms": lambda: [nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6)],
    "embedding": lambda: [nn.Linear(6, 6), Positions()],
    "experts": lambda: [nn.Linear(6, 6), Experts()],
    "routed": lambda: [nn.Linear(6, 6), Mixture()],
    "encoder": lambda: [nn.TransformerEncoderLayer(6, 2, 12, 0.0, batch_first=True)],
    "twice": lambda: [nn.Linear(6, 6), Twice()],
    "sometimes": lambda: [Sometimes(), nn.Linear(6, 6)],
    "gated": lambda: [nn.Linear(6, 6), Gated()],
    "tied": lambda: [Tied(), nn.Linear(6, 6)],
    "functional": lambda: [Functional(nn.Linear(6, 6), as_function)],
    "functional too": lambda: [Functional(nn.Linear(6, 6), as_function_too), nn.Linear(6, 6)],
    "functional norm": lambda: [nn.Linear(6, 6), Functional(nn.LayerNorm(6), as_norm_too)],
    "by keyword": lambda: [Functional(nn.Linear(6, 6), lambda layer, x: layer(input=x))],
    "by forward": lambda: [Functional(nn.Linear(6, 6), lambda layer, x: layer.forward(x))],
    "mixing": lambda: [nn.Linear(6, 6), Mixing()],
    "conv2d": lambda: [
        nn.Unflatten(1, (2, 2)),
        nn.Conv2d(2, 4, (1, 3), padding=(0, 1)),
        *_back(),
    ],
    "conv3d": lambda: [
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv3d(1, 2, (1, 1, 3), padding=(0, 0, 1)),
        nn.Flatten(1, 2),
        *_back(),
    ],
}
BATCHED = set(LAYERS) - {"mixing", "sometimes"}  # some of the weights at least


def examples_of(count=5, seed=0):
    """Examples with 1 to 3 supervised tokens each, so that a batch's mean is not theirs."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        labels = torch.randint(0, 5, (1, 4), generator=generator)
        labels[:, : 1 + number % 3] = -100
        found.append({"x": torch.randn(1, 4, 6, generator=generator), "labels": labels})
    return found


def joined(examples):
    """One batch of examples."""
    return {key: torch.cat([example[key] for example in examples]) for key in ("x", "labels")}


def loop(model, examples):
    """Mean and mean square of the gradients of single examples, summed in float64."""
    first, second = {}, {}
    for example in examples:
        model.zero_grad()
        model(**example).loss.backward()
        for name, weight in weights(model).items():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            first[name] = first.get(name, 0) + gradient.double() / len(examples)
            second[name] = second.get(name, 0) + gradient.double() ** 2 / len(examples)
    model.zero_grad()
    return first, second


@pytest.fixture
def passes(monkeypatch):
    """How many examples each backward pass took."""
    seen = []
    run = per_example.PerExampleGradients._run_backward

    def counted(self, batch, gradient_pass, scales):
        seen.append(len(scales))
        run(self, batch, gradient_pass, scales)

    monkeypatch.setattr(per_example.PerExampleGradients, "_run_backward", counted)
    return seen


@pytest.mark.parametrize("together", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_equals_the_loop(kind, together, passes):
    torch.manual_seed(3)
    model, examples = Model(*LAYERS[kind]()), examples_of()
    first, second = loop(model, examples)
    given = [joined(examples)] if together else examples
    fisher = estimate(model, given)
    signal = estimate(model, given, "piece-s", xi=1e-2)
    assert fisher.keys() == {name for name in second if second[name].any()}
    for name in fisher:
        torch.testing.assert_close(fisher[name].double(), second[name], rtol=1e-4, atol=1e-9)
        expected = first[name].abs() / (second[name] + 1e-2).sqrt()
        torch.testing.assert_close(signal[name].double(), expected, rtol=1e-4, atol=1e-6)
    assert (5 in passes) == (together and kind in BATCHED)
    if kind == "tied" and together:
        assert 1 in passes


def test_halves_are_multiplied_in_fp32():
    """The gradient of a bf16 layer is the fp32 product of what it was given, not rounded again."""
    torch.manual_seed(3)
    model = Model(*LAYERS["linear"]()).bfloat16()
    examples = [{**e, "x": e["x"].bfloat16()} for e in examples_of()]
    named = {f"{name}.weight": m for name, m in model.named_modules() if type(m) is nn.Linear}
    expected = dict.fromkeys(named, 0)

    def note(name):
        def see(module, given, output):
            x = given[0].detach().float().flatten(0, -2)

            def add(gradient):
                product = gradient.float().flatten(0, -2).t() @ x
                expected[name] += product**2 / len(examples)

            output.register_hook(add)

        return see

    handles = [module.register_forward_hook(note(name)) for name, module in named.items()]
    for example in examples:
        model(**example).loss.backward()
    for handle in handles:
        handle.remove()
    fisher = estimate(model, examples)
    for name, square in expected.items():
        torch.testing.assert_close(fisher[name], square, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_public_codes_sums_are_those_of_micro_batches(kind):
    torch.manual_seed(3)
    model, examples = Model(*LAYERS[kind]()), examples_of(6)
    batches = [joined(examples[start : start + 2]) for start in (0, 2, 4)]
    first, second = loop(model, batches)
    fisher = estimate(model, batches, "piece-f-official")
    signal = estimate(model, batches, "piece-s-official")
    for name in fisher:
        squares = 3 * second[name]
        torch.testing.assert_close(fisher[name].double(), squares, rtol=1e-4, atol=1e-9)
        expected = (3 * first[name]).abs() / (squares + 1).sqrt()
        torch.testing.assert_close(signal[name].double(), expected, rtol=1e-4, atol=1e-6)


def test_modules_that_run_twice_in_a_later_batch_only():
    """What is found out about a kind of batch from the first of them may not hold for others."""
    torch.manual_seed(3)
    model, examples = Model(Later(), nn.Linear(6, 6)), examples_of(6)
    for example in examples[3:]:
        example["x"] = 20 * example["x"]
    _, second = loop(model, examples)
    batches = [joined(examples[:3]), joined(examples[3:])]
    fisher = estimate(model, batches)
    for name in fisher:
        torch.testing.assert_close(fisher[name].double(), second[name], rtol=1e-4, atol=1e-9)
        alone = estimate(model, batches, names=[name])
        assert torch.equal(alone[name], fisher[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("together", [False, True], ids=["single", "batch"])
def test_what_else_is_looked_at_changes_no_bit(kind, together):
    """Law 4: neither the budget nor the other weights show in a weight's scores."""
    torch.manual_seed(3)
    model, examples = Model(*LAYERS[kind]()), examples_of(3)
    given = [joined(examples)] if together else examples
    whole = estimate(model, given, "piece-s")
    total = sum(scores.numel() for scores in whole.values())
    for parts in (2, 9, 40):
        cut = estimate(model, given, "piece-s", memory=8 * (total // parts + 1))
        assert all(torch.equal(whole[name], cut[name]) for name in whole), parts
    for name in whole:
        assert torch.equal(whole[name], estimate(model, given, "piece-s", names=[name])[name]), name


def test_tapped_layers_never_have_a_gradient_of_their_size(monkeypatch):
    largest = {}
    original = hooks.GradientHook.add_gradients

    def add(self, call, gradient):
        assert self.module.weight.grad is None
        assert not self.module.weight.requires_grad
        original(self, call, gradient)

    class Watched(per_example.GradientSums):
        def add_gradient(self, name, start, gradient):
            largest[name] = max(largest.get(name, 0), gradient.numel())
            super().add_gradient(name, start, gradient)

    monkeypatch.setattr(hooks.GradientHook, "add_gradients", add)
    monkeypatch.setattr("mm_piece.importance.estimation.GradientSums", Watched)
    model = Model(nn.Linear(6, 300, bias=False), nn.Linear(300, 6, bias=False))
    estimate(model, examples_of(2))
    assert largest["layers.0.weight"] == 256 * 6 < 300 * 6


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_families_in_batches_equal_single_examples(request, family_base, passes, batch):
    for family in ("llava", "llava_next", "qwen3_vl", "qwen3_vl_moe", "gemma2", "qwen3"):
        model, processor = load_base(family_base(family))
        examples = [encode(e, processor) for e in request.getfixturevalue("rows_for")(family)]
        names = find_patchable_names(model, examples[:1], ("embedding", "head"))
        _, second = loop(model, examples)
        passes.clear()
        fisher = estimate(model, LengthGroupedBatches(EncodedList(examples, 0), batch), names=names)
        for name in fisher:
            noise = 1e-10 + 1e-4 * float(second[name].max())
            torch.testing.assert_close(fisher[name].double(), second[name], rtol=1e-3, atol=noise)
        if batch > 1:
            assert (max(passes) > 1) == (family in ("llava", "llava_next", *TEXT)), family
            assert (1 in passes) == (family not in ("llava", *TEXT)), family  # `image_newline`


@pytest.fixture
def rows_for(folder):
    """Rows for a family: pictures of one size and texts of several lengths, or texts alone."""
    import json

    def _rows(family):
        rows = [{"prompt": f"Is it {'very ' * n}red?", "answer": "no " * (n + 1)} for n in range(4)]
        if family not in TEXT:
            names = sorted(p.name for p in folder.glob("*.png"))
            rows = [{**row, "image": names[n % len(names)]} for n, row in enumerate(rows)]
        (folder / "four.json").write_text(json.dumps(rows), encoding="utf-8")
        return list(read(str(folder / "four.json")))

    return _rows


def test_unlike_images_are_taken_apart(base, passes):
    """Two examples whose images are cut into unequal numbers of tiles cannot share a pass."""
    batch = {
        "labels": torch.zeros(2, 3, dtype=torch.int64),
        "pixel_values": torch.zeros(2, 3),
        "image_sizes": torch.tensor([[4, 4], [4, 8]]),
    }
    assert per_example._batch_kind_of(batch) is None
    batch["image_sizes"][1] = 4
    assert per_example._batch_kind_of(batch) is not None


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_recomputed_activations_give_the_same_scores(base):
    model, processor = load_base(base)
    examples = [encode(e, processor) for e in read("scenes:digits/train[:3]")]
    plain = estimate(model, examples)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    modes = [module.training for module in model.modules()]
    calls = []
    attention = model.model.language_model.layers[0].self_attn
    handle = attention.register_forward_pre_hook(lambda *_: calls.append(1))
    again = estimate(model, examples)
    handle.remove()
    assert len(calls) > len(examples) + 1  # it was recomputed
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert [module.training for module in model.modules()] == modes


def test_alike_groups_what_can_stand_together(base):
    processor = load_processor(base)
    examples = [encode(e, processor) for e in read("scenes:digits/train[:5]")]
    text = {key: value for key, value in examples[0].items() if key != "pixel_values"}
    found = list(LengthGroupedBatches(EncodedList([*examples, text], 0), 2))
    assert sorted(len(batch["labels"]) for batch in found) == [1, 1, 2, 2]
    assert sum("pixel_values" not in batch for batch in found) == 1
    lengths = [batch["labels"].shape[1] for batch in found if "pixel_values" in batch]
    assert lengths == sorted(lengths)
    patches = [{**e, "pixel_values": torch.zeros(4, 3)} for e in examples]  # as Qwen packs them
    assert len(LengthGroupedBatches(EncodedList(patches, 0), 4)) == 5


def test_batches_come_from_one_random_part_of_the_examples_each():
    """What is compared as a part of the examples must not be those of one length."""
    lengths = torch.randperm(100, generator=torch.Generator().manual_seed(0)) + 2
    examples = [
        {"input_ids": torch.full((1, int(n)), number), "labels": torch.zeros(1, int(n)).long()}
        for number, n in enumerate(lengths)
    ]
    alike = LengthGroupedBatches(EncodedList(examples, 0), 8)
    for batch, window in zip(alike.batch_positions, alike.windows, strict=True):
        assert {position * 13 // 100 for position in batch} == {window}
        assert [int(lengths[p]) for p in batch] == sorted(int(lengths[p]) for p in batch)
    assert sorted(sum(alike.batch_positions, [])) == list(range(100))


@pytest.mark.parametrize(("count", "windows"), [(3, 1), (33, 5), (130, 16), (512, 16), (600, 32)])
def test_random_parts_are_equal(count, windows):
    ids = torch.zeros(1, 2, dtype=torch.long)
    alike = LengthGroupedBatches(EncodedList([{"input_ids": ids, "labels": ids}] * count, 0), 8)
    sizes = [0] * windows
    for batch, window in zip(alike.batch_positions, alike.windows, strict=True):
        sizes[window] += len(batch)
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1 and max(sizes) <= 32


@pytest.mark.parametrize("count", [33, 100])
def test_batches_that_are_summed_over_are_whole(count):
    ids = torch.zeros(1, 2, dtype=torch.long)
    alike = LengthGroupedBatches(
        EncodedList([{"input_ids": ids, "labels": ids}] * count, 0), 4, windowed=False
    )
    assert [len(batch) for batch in alike.batch_positions[:-1]] == [4] * (
        count // 4 - (count % 4 == 0)
    )
    assert alike.windows == list(range(-(-count // 4)))
