"""A tuned weight wherever it is read from, and values that reach the weights by themselves."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import Trainer, TrainingArguments

import mm_piece
from mm_piece.data import collate, encode, read
from mm_piece.errors import SelectionError
from mm_piece.families import weights
from mm_piece.models.base import load_base, load_processor
from mm_piece.sparse.tuning import sparse_tuning

INDEX = {"first.weight": [0, 7, 30], "first.bias": [1], "norm.weight": [2], "last.weight": [3, 9]}


class Layers(nn.Module):
    """A linear layer with a bias, a norm, a layer without bias; `use` says how they are used."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.last = nn.Linear(6, 6, bias=False)
        self.use = use

    def forward(self, x):
        return self.use(self, x).pow(2).sum()


def mask():
    return {name: torch.tensor(index) for name, index in INDEX.items()}


def inputs(seed=1):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


def called(model, x):
    return model.last(model.norm(model.first(x)))


def by_keyword(model, x):
    return model.last(input=model.norm(input=model.first(input=x)))


def by_forward(model, x):
    return model.last.forward(model.norm.forward(model.first.forward(x)))


def functional_alone(model, x):
    y = functional.linear(x, model.first.weight, model.first.bias)
    return functional.layer_norm(y, (6,), model.norm.weight) @ model.last.weight.t()


def functional_too(model, x):
    y = functional.linear(called(model, x), model.first.weight)
    return functional.embedding(torch.tensor([0, 3]), model.last.weight).sum() * y


def twice(model, x):
    return called(model, called(model, x))


def parameter_of_a_module(model, x):
    return functional.linear(called(model, x), dict(model.named_modules())["last"].weight, None)


USES = [called, by_keyword, by_forward, functional_alone, functional_too, twice]
USES += [parameter_of_a_module]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_gradients_are_the_dense_ones_however_a_weight_is_used(use):
    model, x = Layers(use), inputs()
    model(x).backward()
    dense = {name: p.grad.reshape(-1) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with sparse_tuning(model, mask()) as tuning:
        model(x).backward()
        for name, values in tuning.named_values().items():
            expected = dense[name][torch.tensor(INDEX[name])]
            torch.testing.assert_close(values.grad, expected, rtol=1e-4, atol=1e-5)


def test_hooks_of_others_may_change_what_a_layer_takes_and_gives():
    model, x = Layers(called), inputs()
    model.first.register_forward_pre_hook(lambda _, given: (given[0] * 3,))
    model.first.register_forward_hook(lambda _, __, output: output * 2)
    model(x).backward()
    dense = model.first.weight.grad.reshape(-1)[[0, 7, 30]]
    model.zero_grad()
    with sparse_tuning(model, {"first.weight": torch.tensor([0, 7, 30])}) as tuning:
        model(x).backward()
        torch.testing.assert_close(tuning.parameters()[0].grad, dense)


def test_a_layer_that_raises_is_read_rightly_afterwards():
    model, x = Layers(functional_alone), inputs()
    model(x).backward()
    dense = model.first.weight.grad.reshape(-1)[[0, 7, 30]]
    model.zero_grad()
    with sparse_tuning(model, mask()) as tuning:
        with pytest.raises(RuntimeError):
            model.first(torch.zeros(2, 5))
        model(x).backward()
        torch.testing.assert_close(tuning.named_values()["first.weight"].grad, dense)


def test_a_copy_is_a_plain_model():
    """With the weights as they are, and nothing that ties it to the tuning."""
    model, x = Layers(called), inputs()
    names = [name for name, _ in model.named_parameters()]
    with sparse_tuning(model, mask()) as tuning:
        torch_loop(tuning, x)
        twin = copy.deepcopy(model)
        assert [name for name, _ in twin.named_parameters()] == names
        assert [type(m) for m in twin.children()] == [nn.Linear, nn.LayerNorm, nn.Linear]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.children())
        torch_loop(tuning, x)
        learned = tuning.detach_values()
    with torch.no_grad():
        model.last.weight.zero_()
        twin(x)
    assert not model.last.weight.any()  # a pass of the copy writes no values into the model
    with sparse_tuning(twin, mask()) as tuning:
        torch_loop(tuning, x)
        again = tuning.detach_values()
    assert all(torch.equal(again[name], values) for name, values in learned.items())


def test_a_weight_that_is_put_in_anothers_place_has_its_own_gradient():
    model, x = Layers(functional_too), inputs()
    model(x).backward()
    dense = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    given = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    with sparse_tuning(model, mask()):
        torch.func.functional_call(model, given, (x,)).backward()
    for name, expected in dense.items():
        torch.testing.assert_close(given[name].grad, expected)


def test_a_model_keeps_names_order_and_classes_inside_and_afterwards():
    model = Layers(called)
    names = [name for name, _ in model.named_parameters()]
    with sparse_tuning(model, mask()):
        inside = [n for n, _ in model.named_parameters() if not n.endswith("_values")]
        assert inside == names
        assert [type(m).__name__ for m in model.children()] == ["Linear", "LayerNorm", "Linear"]
        assert isinstance(model.first, nn.Linear)
    assert [name for name, _ in model.named_parameters()] == names
    assert [type(m) for m in model.children()] == [nn.Linear, nn.LayerNorm, nn.Linear]
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


def test_the_order_of_weights_is_the_models_whoever_takes_one_out(base):
    """A parametrization puts a weight back at the end of its module."""
    model, _ = load_base(base)
    before = list(weights(model))
    name = next(n for n in before if n.endswith("layer_norm1.weight"))
    layer = model.model.vision_tower.encoder.layers[0].layer_norm1
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    parametrize.remove_parametrizations(layer, "weight")
    assert [n for n, _ in layer.named_parameters()] == ["bias", "weight"]
    assert list(weights(model)) == before
    other = {n: torch.tensor([0]) for n in reversed(before)}
    with sparse_tuning(model, other) as tuning:
        assert list(tuning.named_values()) == before
    assert name in before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["layer_norm1.weight", "input_layernorm.weight", "q_proj.bias"])
def test_leaving_keeps_the_order_of_weights(base, kind, dtype):
    model, _ = load_base(base, dtype=dtype)
    before = [name for name, _ in model.named_parameters()]
    chosen = {name: torch.tensor([0]) for name in weights(model) if name.endswith(kind)}
    with sparse_tuning(model, chosen):
        pass
    assert [name for name, _ in model.named_parameters()] == before


# --- values reach the weights by themselves -------------------------------------------------------


def sgd(tuning, lr=0.1):
    return torch.optim.SGD(tuning.parameters(), lr=lr)


def torch_loop(tuning, x, after_step=lambda: None):
    optimizer = sgd(tuning)
    for _ in range(3):
        optimizer.zero_grad()
        tuning.model(x).backward()
        optimizer.step()
        after_step()


def told_loop(tuning, x):
    """As it had to be written before; the call does nothing more."""
    torch_loop(tuning, x, tuning.write_back)


def loop_by_hand(tuning, x):
    """No optimizer at all, and `.data`, which autograd does not see."""
    for _ in range(3):
        tuning.model(x).backward()
        for values in tuning.parameters():
            values.data -= 0.1 * values.grad
            values.grad = None


class PlainStep:
    """An optimizer that torch does not know."""

    def __init__(self, parameters):
        self.parameters = parameters

    @torch.no_grad()
    def step(self):
        for values in self.parameters:
            values.sub_(values.grad, alpha=0.1)
            values.grad = None


def foreign_loop(tuning, x):
    optimizer = PlainStep(tuning.parameters())
    for _ in range(3):
        tuning.model(x).backward()
        optimizer.step()


def accelerate_loop(tuning, x):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(tuning.model, sgd(tuning))
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(model(x))
        optimizer.step()


def loop_over_parts(tuning, x):
    """The model itself is never called, only what is in it."""
    for _ in range(3):
        called(tuning.model, x).pow(2).sum().backward()
        for values in tuning.parameters():
            values.data -= 0.1 * values.grad
            values.grad = None


def steps_within_the_backward_pass(tuning, x):
    """Each value is stepped as soon as it has its gradient, which is freed then."""
    optimizers = {values: torch.optim.SGD([values], lr=0.1) for values in tuning.parameters()}

    def step(values):
        optimizers[values].step()
        values.grad = None

    for values in optimizers:
        values.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        tuning.model(x).backward()


LOOPS = [torch_loop, told_loop, loop_by_hand, foreign_loop, accelerate_loop]
LOOPS += [loop_over_parts, steps_within_the_backward_pass]


def trained_densely(x):
    """The same three steps on a plain model, all but the mask put back."""
    model = Layers(called)
    for _ in range(3):
        model.zero_grad()
        model(x).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in INDEX:
                    at = torch.tensor(INDEX[name])
                    parameter.view(-1)[at] -= 0.1 * parameter.grad.reshape(-1)[at]
    return dict(model.named_parameters())


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_loop_learns(loop):
    model, x = Layers(called), inputs() * 0.3
    with sparse_tuning(model, mask()) as tuning:
        loop(tuning, x)
        delta = tuning.delta("loop")
    assert delta.entries == sum(map(len, INDEX.values()))
    for name, expected in trained_densely(x).items():
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-4, atol=1e-6)


def added(values, change):
    values.add_(change)


def added_behind(values, change):
    values.data.add_(change)  # which counts as no change of the tensor


def replaced(values, change):
    values.data = values.data + change


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("move", [added, added_behind, replaced])
@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_a_pass_sees_moved_values_without_a_gradient(use, move, whole):
    """As training needs it that only compares losses: two passes forward, none back."""
    model, plain, x = Layers(use), Layers(use), inputs()

    def loss_of(one):
        return one(x) if whole else use(one, x).pow(2).sum()

    with sparse_tuning(model, mask()) as tuning:
        for change in (0.5, -0.75):
            for name, index in INDEX.items():
                plain.get_parameter(name).view(-1)[torch.tensor(index)] += change
            for values in tuning.parameters():
                move(values, change)
            assert torch.equal(loss_of(model), loss_of(plain))


def test_a_delta_is_what_was_learned_whatever_became_of_the_weights():
    model, x = Layers(called), inputs()
    with sparse_tuning(model, mask()) as tuning:
        torch_loop(tuning, x)
        inside = tuning.delta("t")
    with torch.no_grad():
        model.last.weight.zero_()
    afterwards = tuning.delta("t")
    tuning.write_back()
    assert not model.last.weight.any()
    assert all(torch.equal(afterwards.values[n], row) for n, row in inside.values.items())


def test_what_needs_the_context_is_one_line_outside_of_it():
    model = Layers(called)
    tuning = sparse_tuning(model, mask())
    for call in (tuning.parameters, tuning.detach_values, lambda: tuning.delta("t")):
        with pytest.raises(SelectionError, match="^there are no values yet: "):
            call()
    with tuning:
        with pytest.raises(SelectionError, match="^these values belong to another mask"):
            tuning.restore_values({})
        with pytest.raises(SelectionError, match="being tuned already"), tuning:
            pass
    with pytest.raises(SelectionError, match="^values are restored inside"):
        tuning.restore_values(tuning.detach_values())
    with pytest.raises(SelectionError, match="torch.float64; trained are torch.float32"):
        sparse_tuning(model.double(), mask())


def test_weights_hold_the_values_right_after_a_step():
    model, x = Layers(called), inputs()
    with sparse_tuning(model, mask()) as tuning:
        optimizer = sgd(tuning)
        model(x).backward()
        optimizer.step()
        written = model.state_dict()["last.weight"].reshape(-1)[[3, 9]]
        assert torch.equal(written, tuning.detach_values()["last.weight"])


def test_a_pass_that_waits_for_its_backward_is_left_alone():
    """Writing what did not change would spoil the weights that a backward pass still needs."""
    model = Layers(called)
    with sparse_tuning(model, mask()) as tuning:
        first, second = model(inputs(1)), model(inputs(2))
        first.backward()
        third = model(inputs(3))
        second.backward()
        third.backward()
        assert all(values.grad is not None for values in tuning.parameters())


def test_another_optimizer_writes_nothing():
    model = Layers(called)
    stranger = nn.Parameter(torch.zeros(1))
    with sparse_tuning(model, mask()):
        before = model.first.weight._version
        stranger.grad = torch.ones(1)
        torch.optim.SGD([stranger], lr=0.1).step()
        assert model.first.weight._version == before


def test_nothing_listens_to_optimizers_afterwards():
    from torch.optim import optimizer

    before = len(optimizer._global_optimizer_post_hooks), len(optimizer._global_optimizer_pre_hooks)
    model = Layers(called)
    with sparse_tuning(model, mask()):
        pass
    after = len(optimizer._global_optimizer_post_hooks), len(optimizer._global_optimizer_pre_hooks)
    assert after == before and not model._forward_pre_hooks


@pytest.fixture(scope="module")
def examples(base):
    processor = load_processor(base)
    return [encode(example, processor) for example in read("scenes:digits/train[:16]")]


def test_a_plain_trainer_learns(base, examples, tmp_path):
    """Without a callback, as a user writes it: the loss falls, the delta holds what was learned."""
    model, _ = load_base(base)
    rows = [{key: value[0] for key, value in example.items()} for example in examples]
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=8,
        learning_rate=2e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    chosen = {n: torch.arange(0, p.numel(), 7) for n, p in weights(model).items() if "mlp" in n}

    def collator(batch):
        return collate([{k: v[None] for k, v in row.items()} for row in batch], 0)

    with sparse_tuning(model, chosen) as tuning:
        trainer = Trainer(model, settings, train_dataset=rows, data_collator=collator)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        delta = tuning.delta("plain")
    assert losses[-1] < losses[0] - 0.1
    fresh, _ = load_base(base)
    delta.apply({name: p.detach() for name, p in weights(fresh).items()})
    assert all(torch.equal(p, weights(model)[name]) for name, p in weights(fresh).items())
    assert sum(map(len, delta.indices.values())) > 0.9 * sum(map(len, chosen.values()))


# --- a step that does not reach a value -----------------------------------------------------------


def test_an_unreached_value_has_the_gradient_zero(base, examples):
    """One meaning on one process and on several: momentum moves it, and decay acts."""
    model, _ = load_base(base)
    name = "multi_modal_projector.linear_1.weight"
    text = {key: value for key, value in examples[0].items() if key != "pixel_values"}
    keep = text["input_ids"] != model.config.image_token_id
    text = {key: value[keep][None] for key, value in text.items()}
    chosen = {name: torch.arange(8), "language_model.model.norm.weight": torch.arange(8)}
    with sparse_tuning(model, chosen) as tuning:
        values = tuning.named_values()[name]
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2, weight_decay=0.0)
        for inputs_of_step in (examples[0], text):
            optimizer.zero_grad()
            before = values.detach().clone()
            model(**inputs_of_step).loss.backward()
            optimizer.step()
            assert not torch.equal(values, before)
        assert int(optimizer.state[values]["step"]) == 2


def test_the_documented_loop(base, examples):
    """The loop of the documentation, without a word about writing."""
    model, _ = load_base(base)
    chosen = mm_piece.select(mm_piece.estimate(model, examples[:4]), density=0.01)
    with mm_piece.sparse_tuning(model, chosen) as tuning:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
        for example in examples[:4]:
            model(**example).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert tuning.delta(task="digits").entries > 0
