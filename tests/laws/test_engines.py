"""Law 6 over all engines: plain, DDP, ZeRO-1, 2 and 3 choose the same and learn the same.

Data with every unevenness: few rows with images, so that whole steps have none; numbers that no
number of processes divides; answers of unequal length. With weight decay, which would act on what
a step does not reach.
"""

from shutil import copytree

import pytest
import torch
from engines import ENGINES
from extras import needs
from forking import launch_forks
from launching import LIMIT, SUPPORT, done
from safetensors.torch import load_file, save_file

import mm_piece
from mm_piece.store.delta_store import DeltaStore

pytestmark = [pytest.mark.slow, needs("deepspeed"), pytest.mark.timeout(3 * LIMIT)]


def masks_of(folder):
    """The masks of a run, in the order of its tasks."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    return [load_file(file) for file in files]


def require_same_masks(folder, engine, tasks=2):
    """Raise unless an engine chose what one process did."""
    expected, found = masks_of(folder / "m-plain"), masks_of(folder / f"m-{engine}")
    assert len(expected) == len(found) == 2
    for mask, other in zip(expected[:tasks], found[:tasks], strict=True):
        assert mask.keys() == other.keys()
        assert all(torch.equal(mask[name], other[name]) for name in mask), engine


def require_same(folder, engine, atol=1e-6):
    """Raise unless an engine chose and learned what one process did."""
    require_same_masks(folder, engine)
    one, other = DeltaStore.open(folder / "plain"), DeltaStore.open(folder / engine)
    other.verify()
    assert one.results()["stability"] == other.results()["stability"]
    for position in range(3):
        assert one.answers(position) == other.answers(position), engine
    for position in (1, 2):
        alone, together = one.delta(position), other.delta(position)
        assert alone.info["data"] == together.info["data"]
        for name, index in alone.indices.items():
            assert torch.equal(index, together.indices[name]), (engine, name)
            torch.testing.assert_close(
                together.values[name].float(), alone.values[name].float(), rtol=0, atol=atol
            )


@pytest.fixture(params=["llava", "qwen3_vl"])
def any_base(request, flat_base, family_base):
    """The folder of a base with one layer in each part, then of one with several."""
    if request.param == "llava":
        return flat_base
    return family_base(request.param)


def test_every_engine_learns_what_one_process_does(any_base, write, tmp_path):
    base = any_base
    recipes = {engine: write(base, engine, 2, section) for engine, section in ENGINES.items()}
    again = {"gradient_checkpointing": True}  # every layer runs twice, and is gathered thrice
    recipes["again"] = write(base, "again", 2, ENGINES["zero3"], **again)
    train_all(recipes)
    mm_piece.train(write(base, "plain", 1))
    for engine in recipes:
        require_same(tmp_path, engine)


def test_what_is_to_be_kept_is_the_same(flat_base, write, tmp_path):
    base = flat_base
    kept = {"method": "piece-r", "keep": {"rehearsal": 0.5, "penalty": 30.0}}
    engines = ("ddp", "zero1", "zero3")
    recipes = {engine: write(base, engine, 2, ENGINES[engine], **kept) for engine in engines}
    train_all(recipes)
    mm_piece.train(write(base, "plain", 1, **kept))
    mm_piece.train(write(base, "free", 1, method="piece-r", keep={"rehearsal": 0.5}))
    free, held = (DeltaStore.open(tmp_path / name).delta(1) for name in ("free", "plain"))
    assert values_apart(free, held) > 1e-3
    for engine in recipes:
        require_same(tmp_path, engine)
        for position in ("0001", "0002"):
            files = (
                tmp_path / name / "kept" / f"{position}.safetensors" for name in ("plain", engine)
            )
            one, other = map(load_file, files)
            assert one.keys() == other.keys()
            for name, values in one.items():
                torch.testing.assert_close(other[name], values, rtol=2**-7, atol=1e-4)


@pytest.fixture
def biased(flat_base, tmp_path):
    """A base whose biases, nil when a model is made, count."""
    folder = copytree(flat_base, tmp_path / "biased")
    tensors, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensor.normal_(0, 0.5, generator=random)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_bf16_weights_keep_their_dtype_and_their_masks(biased, write, tmp_path):
    """Values are trained in fp32; what is written rounds, so that runs part by a bf16 step."""
    half, base = {"dtype": "bfloat16"}, biased
    engines = ("ddp", "zero2", "zero3")
    recipes = {e: write(base, e, 2, ENGINES[e], **half) for e in engines}
    train_all(recipes)
    mm_piece.train(write(base, "plain", 1, **half))
    one = DeltaStore.open(tmp_path / "plain")
    for engine in engines:
        require_same_masks(tmp_path, engine, tasks=1)
        other = DeltaStore.open(tmp_path / engine)
        alone, together = one.delta(1), other.delta(1)
        for name, values in together.values.items():
            assert values.dtype == alone.values[name].dtype == torch.bfloat16
        assert values_apart(alone, together) <= 2**-8


def train_all(recipes):
    """Train all recipes in the same two processes."""
    done(launch_forks(2, str(SUPPORT / "train_all.py"), *map(str, recipes.values())))


def values_apart(one, other):
    """The largest difference between values of entries that both deltas changed."""
    found = 0.0
    for name, index in one.indices.items():
        if name in other.indices:
            first = torch.isin(index, other.indices[name])
            second = torch.isin(other.indices[name], index)
            apart = one.values[name][first].float() - other.values[name][second].float()
            found = max(found, *apart.abs().tolist(), 0.0)
    return found
