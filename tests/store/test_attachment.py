"""Where a live model stands: copies attached, wrappers seen through, threads kept apart."""

import copy
import pickle
from threading import Thread

import pytest
import torch
from quick_store import make_store
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForImageTextToText

import mm_piece
from mm_piece.dtypes import view_bits
from mm_piece.errors import BaseError, MismatchError, PieceError, PositionError, StoreError
from mm_piece.models.base import load_base, tensors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def store(request, base, tmp_path_factory):
    return make_store(base, tmp_path_factory.mktemp(request.param) / "store", dtype=request.param)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    return make_store(base, tmp_path_factory.mktemp("plain") / "store")


@pytest.fixture(scope="module")
def expected(plain):
    """The weights at each position, by `load`."""
    return [snapshot(mm_piece.load(store=plain, at=at)[0]) for at in range(4)]


def snapshot(model):
    return {name: tensor.clone() for name, tensor in tensors(model).items()}


def same(model, weights):
    live = tensors(model)
    assert live.keys() == weights.keys()
    return all(torch.equal(view_bits(live[name]), view_bits(row)) for name, row in weights.items())


def test_an_export_loaded_by_transformers_is_attached_and_moves(store, tmp_path):
    """Everywhere and back, in the dtype of the store."""
    folder = mm_piece.export(store, at=2, to=tmp_path / "merged")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=store.base.dtype)
    with pytest.raises(StoreError, match="belongs to no store"):
        mm_piece.position(model)
    mm_piece.attach(model, store, at=2)
    assert mm_piece.position(model) == 2
    for at in (0, 3, 1, 2):
        mm_piece.checkout(model, at=at)
        assert mm_piece.position(model) == at
        assert same(model, snapshot(mm_piece.load(store=store, at=at)[0]))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_another_model(make, plain, expected):
    model, _ = mm_piece.load(store=plain, at=1)
    other = make(model)
    mm_piece.checkout(model, at=3)
    with pytest.raises(StoreError, match="attach"):
        mm_piece.checkout(other, at=0)
    mm_piece.attach(other, plain.path, at=1)
    mm_piece.checkout(other, at=0)
    assert same(other, expected[0]) and same(model, expected[3])


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config  # as wrappers like to
        self.extra = nn.Linear(2, 2)


@pytest.fixture
def alone():
    """A group of one process, which DDP asks for."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


def nested(model):
    return Wrapper(Wrapper(model))


WRAPPERS = [
    Wrapper,
    nested,
    pytest.param(torch.compile, marks=pytest.mark.slow),
    DistributedDataParallel,
]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_a_wrapped_model_is_the_one_inside(wrap, alone, plain, expected):
    model, _ = mm_piece.load(store=plain, at=2)
    wrapped = wrap(model)
    assert mm_piece.position(wrapped) == 2
    mm_piece.checkout(wrapped, at=1)
    assert mm_piece.position(model) == 1 and same(model, expected[1])
    fresh = wrap(copy.deepcopy(model))
    mm_piece.attach(fresh, plain, at=1)
    mm_piece.checkout(fresh, at=3)
    assert same(fresh, expected[3])


def test_two_models_in_one_wrapper_are_not_guessed_between(plain):
    model, _ = mm_piece.load(store=plain, at=2)
    pair = nn.ModuleList([model, copy.deepcopy(model)])
    with pytest.raises(PieceError, match="holds 2 models"):
        mm_piece.checkout(pair, at=1)


@pytest.mark.parametrize(("stands", "said"), [(0, 1), (1, 2), (2, 1), (3, 0), (2, 3)])
def test_another_position_is_named(stands, said, plain, expected):
    model, _ = mm_piece.load(store=plain, at=stands)
    copied = copy.deepcopy(model)
    with pytest.raises(MismatchError) as refused:
        mm_piece.attach(copied, plain, at=said)
    message = str(refused.value)
    assert f"does not stand at position {said}" in message and "layers" in message
    assert f"those of position {stands}" in message
    assert same(copied, expected[stands])
    with pytest.raises(StoreError):
        mm_piece.position(copied)


def test_a_value_of_no_position_is_found(plain):
    """One entry that a delta touches, one bit of it; and one that only a later delta touches."""
    for at, toucher in ((2, 1), (1, 3)):
        copied = copy.deepcopy(mm_piece.load(store=plain, at=at)[0])
        name, index = next(iter(plain.delta(toucher).indices.items()))
        view_bits(tensors(copied)[name])[int(index[0])] ^= 1
        with pytest.raises(MismatchError, match="of no position"):
            mm_piece.attach(copied, plain, at=at)


def test_another_base_another_dtype_another_place(plain, base, tmp_path, monkeypatch):
    from tiny_llava import make_llava

    other, _ = load_base(make_llava(tmp_path / "other", seed=1))
    with pytest.raises(BaseError, match="expected fingerprint"):
        mm_piece.attach(other, plain, at=1)
    copied = copy.deepcopy(mm_piece.load(store=plain, at=1)[0])
    with pytest.raises(MismatchError, match="bfloat16"):
        mm_piece.attach(copied.bfloat16(), plain, at=1)
    with pytest.raises(PositionError):
        mm_piece.attach(copied, plain, at=4)
    copied = copy.deepcopy(mm_piece.load(store=plain, at=1)[0])
    with pytest.raises(BaseError):
        mm_piece.attach(copied, plain, at=1, base=tmp_path / "other")
    mm_piece.attach(copied, plain, at=1, base=base)
    assert mm_piece.position(copied) == 1


def test_threads_move_a_model_one_at_a_time(plain, expected):
    """Many checkouts at once leave a position, whole, and a model that goes on moving."""
    model, _ = mm_piece.load(store=plain, at=0)
    failures = []

    def wander(number):
        order = torch.randint(4, (12,), generator=torch.Generator().manual_seed(number))
        try:
            for at in order.tolist():
                mm_piece.checkout(model, at=at)
        except Exception as error:
            failures.append(error)

    threads = [Thread(target=wander, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert same(model, expected[mm_piece.position(model)])
    for at in (0, 2, 1):
        mm_piece.checkout(model, at=at)
        assert same(model, expected[at])


# --- what has become of a model -------------------------------------------------------------------


def adapted(model):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj", "fc2"]))


def quantised(model):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=True)


def eight_bits(model):
    """As bitsandbytes has it: integers in the place of a layer's weight."""
    for layer in model.get_decoder().layers:
        weight = layer.mlp.down_proj.weight.detach()
        layer.mlp.down_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)


class Packed(torch.Tensor):
    """As torchao has it: a tensor of a kind of its own, which says that it is floating."""


def packed(model):
    for layer in model.get_decoder().layers:
        weight = layer.mlp.down_proj.weight.detach().as_subclass(Packed)
        layer.mlp.down_proj.weight = nn.Parameter(weight, requires_grad=False)


CHANGES = {
    "peft": adapted,
    "quantised": quantised,
    "int8": eight_bits,
    "packed": packed,
    "meta": lambda model: model.to("meta"),
    "half": lambda model: model.half(),
    "pruned": lambda model: [delattr(layer, "mlp") for layer in model.get_decoder().layers],
}


@pytest.mark.filterwarnings("ignore")  # of the libraries that change a model
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_refused_in_one_line(change, plain):
    from mm_piece.data import encode, read

    model, processor = mm_piece.load(store=plain, at=2)
    examples = [encode(example, processor) for example in read("scenes:digits/train[:1]")]
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    CHANGES[change](model)
    asks = [
        lambda: mm_piece.checkout(model, at=1),
        lambda: mm_piece.checkout(model, at=3),
        lambda: mm_piece.attach(model, plain, at=2),
    ]
    if change != "half":
        asks.append(lambda: mm_piece.estimate(model, examples))
    if change not in ("half", "pruned"):
        asks.append(lambda: mm_piece.sparse_tuning(model, {name: torch.arange(3)}))
    for ask in asks:
        with pytest.raises(PieceError) as refused:
            ask()
        assert "\n" not in str(refused.value)


def test_weights_that_a_mask_leaves_alone_may_be_anything(plain):
    """A quantised layer runs beside those that train, as it did."""
    model, _ = mm_piece.load(store=plain, at=0)
    eight_bits(model)
    norm = "language_model.model.layers.1.input_layernorm.weight"
    with mm_piece.sparse_tuning(model, {norm: torch.arange(3)}) as tuning:
        with torch.no_grad():
            tuning.parameters()[0].add_(1)
        tuning.write_back()
        assert tuning.delta("x").entries == 3


def test_a_model_that_is_being_tuned_is_not_moved(plain, expected):
    """Leaving the tuning would write its values over the position."""
    model, _ = mm_piece.load(store=plain, at=2)
    indices = plain.delta(1).indices
    with mm_piece.sparse_tuning(model, indices):
        for move in (
            lambda: mm_piece.checkout(model, at=0),
            lambda: mm_piece.attach(model, plain, at=2),
        ):
            with pytest.raises(MismatchError, match="is being tuned: leave `sparse_tuning` first"):
                move()
        twin = copy.deepcopy(model)
        mm_piece.attach(twin, plain, at=2)
        mm_piece.checkout(twin, at=1)
    assert same(twin, expected[1])
    mm_piece.checkout(model, at=0)
    assert same(model, expected[0])
