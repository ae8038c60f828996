"""Laws of the delta: bit exact, all or nothing, and refused when anything about it is not right."""

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_deltas import BASE, change, clones, noise, same, small

from mm_piece.deltas.delta import (
    Delta,
    compute_digest,
    compute_fingerprint,
    compute_full_digest,
    find_changed_indices,
)
from mm_piece.deltas.header import DELTA_DTYPES
from mm_piece.deltas.merging import compose_deltas
from mm_piece.dtypes import SAFETENSORS_DTYPES, view_bits
from mm_piece.entries import read_entries, write_entries
from mm_piece.errors import MismatchError

ODD_PATTERNS = {  # negative zero, a NaN with a payload, a signalling NaN, the smallest denormal
    "float32": [0x80000000, 0x7FC12345, 0xFF812345, 0x00000001],
    "bfloat16": [0x8000, 0x7FC5, 0xFF81, 0x0001],
    "float16": [0x8000, 0x7E55, 0xFC01, 0x0001],
}


@st.composite
def situations(draw):
    """Tensors, and indices into some of them."""
    dtype = draw(st.sampled_from([SAFETENSORS_DTYPES[name] for name in DELTA_DTYPES]))
    shapes = draw(st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=3))
    text = st.text(min_size=1, max_size=8).filter(str.isprintable)
    names = draw(st.lists(text, min_size=3, max_size=3, unique=True))
    tensors = {
        name: noise(shape, dtype, seed)
        for seed, (name, shape) in enumerate(zip(names, shapes, strict=False))
    }
    indices = {}
    for name, tensor in tensors.items():
        chosen = draw(st.sets(st.integers(0, tensor.numel() - 1))) if tensor.numel() else set()
        indices[name] = torch.tensor(sorted(chosen), dtype=torch.int32)
    return tensors, indices, draw(st.integers(0, 99))


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gap", "raw"])
@given(situation=situations())
def test_a_file_holds_the_delta_exactly(kind, situation):
    tensors, indices, seed = situation
    delta, _ = change(tensors, indices, seed, parent="ab" * 32, info={"k": [1, None, {"é": 0.1}]})
    data = delta.to_bytes(kind)
    read = Delta.from_bytes(data)
    for field in ("shapes", "before", "task", "base", "parent", "info", "entries"):
        assert getattr(read, field) == getattr(delta, field)
    for name, index in delta.indices.items():
        assert same(read.indices[name], index)
        assert same(read.values[name], delta.values[name])
    assert read.indices.keys() == delta.indices.keys()
    assert read.to_bytes(kind) == data


@given(situations())
def test_apply_gives_the_tensors_after_bit_for_bit(situation):
    tensors, indices, seed = situation
    delta, after = change(tensors, indices, seed)
    live = clones(tensors)
    delta.apply(live)
    assert all(same(live[name], after[name]) for name in tensors)
    changed = sum(int((view_bits(tensors[n]) != view_bits(after[n])).sum()) for n in tensors)
    assert delta.entries == changed
    assert delta.info["selected"] == sum(len(index) for index in indices.values())
    assert delta.info["unchanged"] == delta.info["selected"] - changed


@pytest.mark.parametrize("name", ODD_PATTERNS)
def test_odd_bit_patterns_survive(name, tmp_path):
    dtype = getattr(torch, name)
    width = dtype.itemsize
    patterns = torch.from_numpy(np.array(ODD_PATTERNS[name], f"<u{width}").view(f"<i{width}"))
    tensors = {"w": torch.zeros(3, 4, dtype=dtype)}
    where = {"w": torch.tensor([0, 5, 6, 11])}
    shapes = {"w": (3, 4)}
    before = {"w": read_entries(tensors["w"], where["w"])}
    after = {"w": patterns.view(dtype)}
    delta = Delta.from_change(where, before, after, shapes, task="t", base=BASE, info={})
    delta.save(tmp_path / "d.safetensors")
    Delta.load(tmp_path / "d.safetensors").apply(tensors)
    assert torch.equal(view_bits(tensors["w"])[where["w"]], patterns)
    assert delta.entries == 4  # the negative zero differs from zero


def test_equal_bits_are_no_change():
    nan = torch.tensor([math.nan, 1.0, -0.0])
    where, shapes = {"w": torch.arange(3)}, {"w": (3,)}
    delta = Delta.from_change(
        where, {"w": nan}, {"w": nan.clone()}, shapes, task="t", base=BASE, info={}
    )
    assert (delta.entries, delta.indices, delta.info) == (0, {}, {"selected": 3, "unchanged": 3})
    assert Delta.from_bytes(delta.to_bytes()).info == delta.info


def test_scalars_and_full_masks():
    tensors = {"scale": torch.tensor(2.0), "w": noise((4, 4), torch.float32, 0)}
    indices = {"scale": torch.tensor([0]), "w": torch.arange(16)}
    delta, after = change(tensors, indices, 3)
    Delta.from_bytes(delta.to_bytes()).apply(tensors)
    assert all(same(tensors[name], after[name]) for name in tensors)


def test_parameters_are_written_in_place():
    layer = torch.nn.Linear(3, 3, bias=False)
    delta, after = change({"w": layer.weight.detach()}, {"w": torch.tensor([1, 8])}, 1)
    address = layer.weight.data_ptr()
    delta.apply({"w": layer.weight})
    assert layer.weight.data_ptr() == address
    assert same(layer.weight, after["w"])


@pytest.mark.parametrize(
    ("size", "dtype"), [(2**31 - 1, torch.int32), (2**31, torch.int64), (2**40, torch.int64)]
)
@pytest.mark.parametrize("kind", ["gap", "raw"])
def test_indices_widen_where_they_must(kind, size, dtype):
    where = {"w": torch.tensor([0, 5, size - 1])}
    before, after = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    delta = Delta.from_change(where, before, after, {"w": (size,)}, task="t", base=BASE, info={})
    read = Delta.from_bytes(delta.to_bytes(kind))
    assert read.indices["w"].dtype == dtype
    assert read.indices["w"].tolist() == [0, 5, size - 1]


@pytest.mark.parametrize("kind", ["gap", "raw"])
@pytest.mark.parametrize("size", [9, 2**31])
def test_rows_without_entries_are_ordinary_tensors(kind, size):
    dtype = torch.int32 if size < 2**31 else torch.int64
    rows = {"w": torch.empty(0, dtype=dtype)}, {"w": torch.empty(0, dtype=torch.float16)}
    digest = {"w": compute_digest(rows[1]["w"])}
    delta = Delta(*rows, {"w": (size,)}, digest, "t", BASE, "", {})
    read = Delta.from_bytes(delta.to_bytes(kind))
    for row in (read.indices["w"], read.values["w"]):
        assert row.stride() == (1,)
        assert row.view(torch.uint8).shape == (0,)


def test_the_same_delta_gives_the_same_file():
    tensors, indices = small()
    first, _ = change(tensors, indices, 1, info={"a": 1, "b": {"c": 2, "d": 3}})
    backwards = dict(reversed(indices.items()))
    second = Delta(
        indices={name: first.indices[name] for name in backwards},
        values={name: first.values[name] for name in backwards},
        shapes=first.shapes,
        before=first.before,
        task=first.task,
        base=first.base,
        parent="",
        info={**dict(reversed(first.info.items())), "b": {"d": 3, "c": 2}},
    )
    assert first.to_bytes() == second.to_bytes()


def test_a_bf16_delta_costs_under_2_9_bytes_per_entry():
    size, density = 4096 * 4096, 0.001
    generator = torch.Generator().manual_seed(0)
    where = torch.nonzero(torch.rand(size, generator=generator) < density).view(-1)
    before = (torch.randn(len(where), generator=generator) * 0.02).bfloat16()
    after = before + torch.randn(len(where), generator=generator).bfloat16() * 1e-3
    delta = Delta.from_change(
        {"w": where}, {"w": before}, {"w": after}, {"w": (size,)}, task="t", base=BASE, info={}
    )
    assert len(delta.to_bytes()) <= 2.9 * delta.entries + 1000  # 1000: the header


# --- compose --------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(situations(), st.lists(st.integers(0, 99), max_size=4), st.data())
def test_composing_equals_applying_one_after_the_other(situation, seeds, data):
    tensors, _, _ = situation
    live, deltas = clones(tensors), []
    for seed in seeds:
        rows = {
            name: data.draw(st.sets(st.integers(0, tensor.numel() - 1)))
            for name, tensor in tensors.items()
            if tensor.numel()
        }
        indices = {name: torch.tensor(sorted(row), dtype=torch.int32) for name, row in rows.items()}
        delta, live = change(live, indices, seed)
        deltas.append(delta)
    merged = clones(tensors)
    for name, (index, values) in compose_deltas(deltas).items():
        assert (index[1:] > index[:-1]).all()
        write_entries([(merged[name], index, values)])
    assert all(same(merged[name], live[name]) for name in tensors)


def test_deltas_that_do_not_belong_together_do_not_compose():
    tensors, indices = small()
    first, after = change(tensors, indices, 1)
    other_base, _ = change(after, indices, 2, base="1" * 64)
    with pytest.raises(MismatchError, match="different bases"):
        compose_deltas([first, other_base])
    reshaped = {name: tensor.reshape(-1, 1) for name, tensor in after.items()}
    other_shape, _ = change(reshaped, indices, 2)
    with pytest.raises(MismatchError, match="one shape"):
        compose_deltas([first, other_shape])


# --- identity -------------------------------------------------------------------------------------


def test_difference_sees_bits():
    before = torch.tensor([[0.0, math.nan], [1.0, 2.0]])
    after = torch.tensor([[-0.0, math.nan], [1.0, 3.0]])
    assert find_changed_indices(before, after).tolist() == [0, 3]
    assert find_changed_indices(before.t(), after.t()).tolist() == [0, 3]
    with pytest.raises(MismatchError):
        find_changed_indices(before, after.half())


def test_fingerprint_is_what_the_specification_says():
    tensors = {"w": noise((100, 70), torch.bfloat16, 0), "b": torch.tensor(1.5)}
    sha = hashlib.sha256()
    sha.update(b'["b", [], "float32"]' + hashlib.sha256(struct.pack("<f", 1.5)).digest())
    sample = view_bits(tensors["w"]).numpy()[:: 7000 // 64 | 1].tobytes()
    sha.update(b'["w", [100, 70], "bfloat16"]' + hashlib.sha256(sample).digest())
    assert compute_fingerprint(tensors) == sha.hexdigest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_identity_tells_bases_apart(dtype):
    tensors = {"w": torch.zeros(100, 70, dtype=dtype), "v": torch.ones(3, dtype=dtype)}
    others = [
        {"w": tensors["w"]},
        {"w": tensors["w"], "u": tensors["v"]},
        {**tensors, "w": tensors["w"].reshape(70, 100)},
        {**tensors, "v": tensors["v"].to(torch.float16)},
        {**tensors, "v": torch.zeros_like(tensors["v"])},
    ]
    for identity in (compute_fingerprint, compute_full_digest):
        assert identity(tensors) == identity(dict(reversed(clones(tensors).items())))
        assert len({identity(case) for case in [tensors, *others]}) == 6


def test_the_full_digest_sees_every_bit():
    tensors = {"w": noise((300, 70), torch.bfloat16, 0)}
    whole, glance = compute_full_digest(tensors), compute_fingerprint(tensors)
    view_bits(tensors["w"])[1] ^= 1
    assert compute_full_digest(tensors) != whole
    assert compute_fingerprint(tensors) == glance
