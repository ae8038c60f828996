"""Laws of the delta: bit exact, all or nothing, and refused when anything about it is not right."""

import hashlib
import json
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_piece import codec, deltafile
from mm_piece.delta import (
    Delta,
    compose,
    difference,
    digest,
    fingerprint,
    full_digest,
    put,
    take,
)
from mm_piece.deltafile import DTYPES, bits
from mm_piece.errors import DamageError, DeltaError, FormatError, MismatchError

GOLDEN = Path(__file__).parent / "golden"
BASE = "0" * 64
FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
ODD_PATTERNS = {  # negative zero, a NaN with a payload, a signalling NaN, the smallest denormal
    "float32": [0x80000000, 0x7FC12345, 0xFF812345, 0x00000001],
    "bfloat16": [0x8000, 0x7FC5, 0xFF81, 0x0001],
    "float16": [0x8000, 0x7E55, 0xFC01, 0x0001],
}


def noise(shape, dtype, seed: int) -> torch.Tensor:
    """A tensor of random bit patterns, NaNs and denormals included."""
    pattern = deltafile.BITS[dtype.itemsize]
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator)
    return raw.to(torch.uint8).view(pattern).view(dtype).reshape(shape)


def same(first, second) -> bool:
    return first.dtype == second.dtype and torch.equal(bits(first), bits(second))


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def change(tensors, indices, seed, **fields) -> tuple[Delta, dict[str, torch.Tensor]]:
    """A delta that writes noise at `indices`, and the tensors after it."""
    after = clones(tensors)
    for number, (name, index) in enumerate(indices.items()):
        put(after[name], index, noise((len(index),), after[name].dtype, 1000 * seed + number))
    delta = Delta.from_change(
        indices,
        {name: take(tensors[name], index) for name, index in indices.items()},
        {name: take(after[name], index) for name, index in indices.items()},
        {name: tensor.shape for name, tensor in tensors.items()},
        **{"task": "ocr", "base": BASE, "info": {"density": 0.001}, **fields},
    )
    return delta, after


@st.composite
def situations(draw):
    """Tensors, and indices into some of them."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shapes = draw(st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=3))
    names = draw(st.lists(st.text(max_size=8), min_size=3, max_size=3, unique=True))
    tensors = {
        name: noise(shape, dtype, seed)
        for seed, (name, shape) in enumerate(zip(names, shapes, strict=False))
    }
    indices = {}
    for name, tensor in tensors.items():
        chosen = draw(st.sets(st.integers(0, tensor.numel() - 1))) if tensor.numel() else set()
        indices[name] = torch.tensor(sorted(chosen), dtype=torch.int32)
    return tensors, indices, draw(st.integers(0, 99))


def small():
    tensors = {
        "a.weight": noise((8, 16), torch.bfloat16, 1),
        "b.weight": noise((40,), torch.bfloat16, 2),
    }
    indices = {
        "a.weight": torch.arange(0, 120, 3, dtype=torch.int32),
        "b.weight": torch.tensor([0, 7, 39], dtype=torch.int32),
    }
    return tensors, indices


def sealed(data: bytes) -> bytes:
    """Forge a matching seal: what a hostile author would do."""
    seal = deltafile.SEAL
    return data[: seal.start] + deltafile._digest_around_seal(data) + data[seal.stop :]


def forge(header, payload) -> bytes:
    text = '{"sha256":"' + "0" * 64 + '",' + header[1:]
    return sealed(safetensors.torch.save(payload, {"mm_piece": text}))


def header_of(data: bytes) -> dict:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["mm_piece"])
    del header["sha256"]
    return header


# --- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gap", "raw"])
@given(situation=situations())
def test_a_file_holds_the_delta_exactly(kind, situation):
    tensors, indices, seed = situation
    delta, _ = change(tensors, indices, seed, parent="ab", info={"k": [1, None, {"é": 0.1}]})
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
    changed = sum(int((bits(tensors[n]) != bits(after[n])).sum()) for n in tensors)
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
    before = {"w": take(tensors["w"], where["w"])}
    after = {"w": patterns.view(dtype)}
    delta = Delta.from_change(where, before, after, shapes, task="t", base=BASE, info={})
    delta.save(tmp_path / "d.safetensors")
    Delta.load(tmp_path / "d.safetensors").apply(tensors)
    assert torch.equal(bits(tensors["w"])[where["w"]], patterns)
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


# --- compose ------------------------------------------------------------------------------------


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
    for name, (index, values) in compose(deltas).items():
        assert (index[1:] > index[:-1]).all()
        put(merged[name], index, values)
    assert all(same(merged[name], live[name]) for name in tensors)


def test_deltas_that_do_not_belong_together_do_not_compose():
    tensors, indices = small()
    first, after = change(tensors, indices, 1)
    other_base, _ = change(after, indices, 2, base="1" * 64)
    with pytest.raises(MismatchError, match="different bases"):
        compose([first, other_base])
    reshaped = {name: tensor.reshape(-1, 1) for name, tensor in after.items()}
    other_shape, _ = change(reshaped, indices, 2)
    with pytest.raises(MismatchError, match="one shape"):
        compose([first, other_shape])


# --- all or nothing -----------------------------------------------------------------------------


def spoiled(tensors) -> dict[str, dict[str, torch.Tensor]]:
    last = tensors["b.weight"]
    touched = last.clone()
    bits(touched)[7] ^= 1
    return {
        "which is not there": {"a.weight": tensors["a.weight"]},
        "shape": {**tensors, "b.weight": last.reshape(5, 8)},
        "dtype": {**tensors, "b.weight": last.view(torch.float16)},
        "contiguous": {**tensors, "b.weight": torch.stack([last, last], 1)[:, 0]},
        "SHA-256 before": {**tensors, "b.weight": touched},
    }


@pytest.mark.parametrize("problem", spoiled(small()[0]))
def test_apply_writes_all_or_nothing(problem):
    tensors, indices = small()
    delta, _ = change(tensors, indices, 1)
    live = clones(spoiled(tensors)[problem])
    live["a.weight"] = tensors["a.weight"].clone()
    if problem == "contiguous":
        live["b.weight"] = spoiled(tensors)[problem]["b.weight"]
    before = {name: tensor.clone() for name, tensor in live.items()}
    with pytest.raises(MismatchError, match=problem):
        delta.apply(live)
    assert all(same(live[n].contiguous(), before[n].contiguous()) for n in live)


def test_a_delta_applies_once_and_only_to_its_base():
    tensors, indices = small()
    delta, _ = change(tensors, indices, 1)
    delta.check(tensors)
    delta.apply(tensors)
    with pytest.raises(MismatchError, match="expected .*, found"):
        delta.check(tensors)


@pytest.mark.parametrize(
    "index",
    [[1, 0], [2, 2], [-1, 3], [0, 12], [0, 2**30]],
    ids=["unsorted", "twice", "negative", "at the end", "far outside"],
)
def test_unsound_indices_make_no_delta(index):
    values = torch.ones(2)
    fields = {"task": "t", "base": BASE, "parent": "", "info": {}}
    row = torch.tensor(index, dtype=torch.int32)
    with pytest.raises(DamageError):
        Delta({"w": row}, {"w": values}, {"w": (3, 4)}, {"w": digest(values)}, **fields)
    record = {"shape": [3, 4], "dtype": "F32", "entries": 2, "before": digest(values)}
    header = {"task": "t", "base": BASE, "parent": "", "info": {}, "tensors": {"w": record}}
    data = deltafile.pack(header, {"w": (row, values)}, "raw")
    with pytest.raises(DamageError):
        Delta.from_bytes(data)


@pytest.mark.parametrize(
    ("index", "values"),
    [
        (torch.tensor([0, 1]), torch.ones(2)),
        (torch.tensor([0, 1], dtype=torch.int16), torch.ones(2)),
        (torch.tensor([[0, 1]], dtype=torch.int32), torch.ones(1, 2)),
        (torch.tensor([0, 1], dtype=torch.int32), torch.ones(3)),
        (torch.tensor([0, 1], dtype=torch.int32), torch.ones(2, 1)),
        (torch.tensor([0, 1], dtype=torch.int32), torch.ones(2, dtype=torch.complex64)),
    ],
)
def test_unsound_rows_make_no_delta(index, values):
    with pytest.raises(DamageError):
        Delta({"w": index}, {"w": values}, {"w": (9,)}, {"w": ""}, "t", BASE, "", {})


def test_names_must_agree():
    row, values = torch.tensor([0], dtype=torch.int32), torch.ones(1)
    with pytest.raises(DamageError, match="different tensors"):
        Delta({"w": row}, {"v": values}, {"w": (9,)}, {"w": ""}, "t", BASE, "", {})


def test_from_change_wants_rows_of_one_length_and_dtype():
    where, shapes = {"w": torch.arange(2)}, {"w": (4,)}
    fields = {"task": "t", "base": BASE, "info": {}}
    for old, new in [(torch.ones(1), torch.zeros(1)), (torch.ones(2), torch.zeros(1))]:
        with pytest.raises(MismatchError):
            Delta.from_change(where, {"w": old}, {"w": new}, shapes, **fields)
    with pytest.raises(MismatchError):
        Delta.from_change(
            where, {"w": torch.ones(2)}, {"w": torch.ones(2).half()}, shapes, **fields
        )


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gap", "raw"])
def test_every_altered_byte_is_refused(kind):
    data = bytearray(golden().to_bytes(kind))
    rng = np.random.default_rng(0)
    for position in range(len(data)):
        altered = data.copy()
        altered[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(DeltaError):
            Delta.from_bytes(bytes(altered))


def test_every_truncation_and_extension_is_refused():
    data = change(*small(), 1)[0].to_bytes()
    for length in range(len(data)):
        with pytest.raises(DeltaError):
            Delta.from_bytes(data[:length])
    for more in (b"\0", b" ", data):
        with pytest.raises(DeltaError):
            Delta.from_bytes(data + more)


def test_the_seal_covers_words_that_nothing_else_checks():
    data = change(*small(), 1)[0].to_bytes()
    assert data.count(b'\\"ocr\\"') == 1
    with pytest.raises(DamageError, match="SHA-256"):
        Delta.from_bytes(data.replace(b'\\"ocr\\"', b'\\"ocl\\"'))


@pytest.mark.parametrize("kind", ["gap", "raw"])
def test_alterations_under_a_forged_seal_are_refused_or_sound(kind):
    data = bytearray(golden().to_bytes(kind))
    rng = np.random.default_rng(0)
    for position in range(len(data)):
        altered = data.copy()
        altered[position] = int(rng.integers(256))
        read_or_refused(sealed(bytes(altered)))


def read_or_refused(data: bytes) -> None:
    try:
        delta = Delta.from_bytes(data)
    except DeltaError:
        return
    for name, index in delta.indices.items():
        assert len(index) == len(delta.values[name])
        assert not len(index) or 0 <= index[0] <= index[-1] < math.prod(delta.shapes[name])


HOSTILE_RECORDS = {
    "entries": [-1, 0, 39, 41, 2**70, 40.0, True, "40", None],
    "shape": [[], [8], [8, -16], [-8, -16], [2**40, 2**40], [True, 128], [128.0], "128", None],
    "dtype": ["F32", "I8", "F128", "bfloat16", "", 3, None],
    "before": [None, 5, []],
}


@pytest.mark.parametrize("field", HOSTILE_RECORDS)
@pytest.mark.parametrize("kind", ["gap", "raw"])
def test_hostile_records_are_refused(kind, field):
    data = change(*small(), 1)[0].to_bytes(kind)
    for value in HOSTILE_RECORDS[field]:
        header = header_of(data)
        header["tensors"]["a.weight"][field] = value
        with pytest.raises(DamageError):
            Delta.from_bytes(forge(json.dumps(header), safetensors.torch.load(data)))


HOSTILE_HEADERS = {
    "task": 3,
    "base": None,
    "parent": ["x"],
    "info": [],
    "tensors": [],
    "stranger": "x",
}


@pytest.mark.parametrize("field", HOSTILE_HEADERS)
def test_hostile_headers_are_refused(field):
    data = change(*small(), 1)[0].to_bytes()
    payload = safetensors.torch.load(data)
    header = header_of(data) | {field: HOSTILE_HEADERS[field]}
    with pytest.raises(DamageError):
        Delta.from_bytes(forge(json.dumps(header), payload))
    if header.pop(field) != "x":
        with pytest.raises(DamageError):
            Delta.from_bytes(forge(json.dumps(header), payload))


@pytest.mark.parametrize("text", ["{1", '{"a":', '{"a":' + "[" * 100_000, '{"a":1}garbage'])
def test_headers_that_do_not_parse_are_refused(text):
    with pytest.raises(DamageError):
        Delta.from_bytes(forge(text, {"w": torch.zeros(1)}))


@pytest.mark.parametrize("field", ["format", "codec"])
@pytest.mark.parametrize("value", ["2", "", "zip", 1, None])
def test_unknown_versions_and_codecs_are_refused(field, value):
    data = change(*small(), 1)[0].to_bytes()
    header = header_of(data) | {field: value}
    with pytest.raises(DeltaError) as caught:
        Delta.from_bytes(forge(json.dumps(header), safetensors.torch.load(data)))
    assert field == "codec" or caught.type is FormatError
    assert type(value) is not str or caught.type is FormatError


def test_hostile_payloads_are_refused():
    data = change(*small(), 1)[0].to_bytes()
    sound, text = safetensors.torch.load(data), json.dumps(header_of(data))
    row = sound["a.weight.values"]
    replacements = [
        row.view(torch.int8),
        row.reshape(1, -1),
        torch.zeros(0, dtype=torch.uint8),
        torch.tensor(0, dtype=torch.uint8),
        torch.cat([row, torch.zeros(1, dtype=torch.uint8)]),
    ]
    for replacement in replacements:
        with pytest.raises(DamageError):
            Delta.from_bytes(forge(text, {**sound, "a.weight.values": replacement}))
    with pytest.raises(DamageError):
        Delta.from_bytes(forge(text, {**sound, "stranger": row.clone()}))
    del sound["a.weight.values"]
    with pytest.raises(DamageError):
        Delta.from_bytes(forge(text, sound))


def test_a_bomb_in_a_file_is_refused():
    data = change(*small(), 1)[0].to_bytes()
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    plane = bytes([codec.DEFLATE]) + coder.compress(bytes(2**27)) + coder.flush()
    payload = safetensors.torch.load(data)
    payload["a.weight.values"] = torch.frombuffer(bytearray(plane * 2), dtype=torch.uint8)
    with pytest.raises(DamageError, match=r"a\.weight: .*40"):
        Delta.from_bytes(forge(json.dumps(header_of(data)), payload))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("F4", [8]),
        ("F8_E8M0", [4]),
        ("X", [4]),
        ("U8", [5]),
        ("U8", [-4]),
        ("U8", [2**62, 0, 2**62]),
        ("U8", [2**63, 0]),
    ],
)
def test_foreign_layouts_are_refused(dtype, shape):
    data = Delta({}, {}, {}, {}, "t", BASE, "", {}).to_bytes()
    length = int.from_bytes(data[:8], "little")
    size = 0 if 0 in shape else 4
    stranger = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}})
    header = data[8 : 8 + length].rstrip().removesuffix(b"}") + b"," + stranger[1:].encode()
    with pytest.raises(DamageError, match="safetensors"):
        Delta.from_bytes(sealed(struct.pack("<Q", len(header)) + header + bytes(size)))


@given(st.binary(max_size=200))
def test_other_files_are_no_deltas(data):
    with pytest.raises(FormatError):
        Delta.from_bytes(data)
    ordinary = safetensors.torch.save({"w": torch.zeros(2)}, {"format": "pt"})
    with pytest.raises(FormatError):
        Delta.from_bytes(ordinary)


# --- files --------------------------------------------------------------------------------------


def test_save_returns_the_sha256_that_a_child_names_as_its_parent(tmp_path):
    path = tmp_path / "d.safetensors"
    delta, _ = change(*small(), 1)
    assert delta.save(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [file.name for file in tmp_path.iterdir()] == ["d.safetensors"]
    assert same(Delta.load(path).values["a.weight"], delta.values["a.weight"])


def test_a_raw_file_is_readable_without_this_library(tmp_path):
    delta, _ = change(*small(), 1)
    delta.save(tmp_path / "d.safetensors", codec="raw")
    plain = safetensors.torch.load_file(tmp_path / "d.safetensors")
    assert same(plain["a.weight.values"], delta.values["a.weight"])
    assert same(plain["a.weight.indices"], delta.indices["a.weight"])


def test_rows_may_share_memory():
    rows = torch.arange(3, dtype=torch.int32)
    values = torch.ones(3)
    both = [{"v": part, "w": part} for part in (rows, values)]
    shapes, before = {"v": (4,), "w": (4,)}, {"v": "", "w": ""}
    delta = Delta(*both, shapes, before, "t", BASE, "", {})
    for kind in ("gap", "raw"):
        assert same(Delta.from_bytes(delta.to_bytes(kind)).values["w"], values)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "d.safetensors"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], fail)
    with pytest.raises(DeltaError, match="No space left"):
        change(*small(), 1)[0].save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_name_the_file_in_one_line(tmp_path):
    delta, _ = change(*small(), 1)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(delta.to_bytes()[:-1])
    for act, kind in [
        (lambda: delta.save(tmp_path / "none" / "d.safetensors"), DeltaError),
        (lambda: Delta.load(tmp_path / "none.safetensors"), FormatError),
        (lambda: Delta.load(tmp_path), FormatError),
        (lambda: Delta.load(cut), DamageError),
        (lambda: delta.save(tmp_path / "d", codec="zip"), FormatError),
    ]:
        with pytest.raises(kind) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value) or "gap, raw" in str(caught.value)


@pytest.mark.parametrize("info", [{"x": math.nan}, {"x": torch.zeros(1)}, {1: 2, "x": 3}])
def test_info_must_be_plain_json(info):
    delta, _ = change(*small(), 1, info=info)
    with pytest.raises(FormatError, match="JSON"):
        delta.to_bytes()


# --- identity -----------------------------------------------------------------------------------


def test_difference_sees_bits():
    before = torch.tensor([[0.0, math.nan], [1.0, 2.0]])
    after = torch.tensor([[-0.0, math.nan], [1.0, 3.0]])
    assert difference(before, after).tolist() == [0, 3]
    assert difference(before.t(), after.t()).tolist() == [0, 3]
    with pytest.raises(MismatchError):
        difference(before, after.half())


def test_fingerprint_is_what_the_specification_says():
    tensors = {"w": noise((100, 70), torch.bfloat16, 0), "b": torch.tensor(1.5)}
    sha = hashlib.sha256()
    sha.update(b'["b", [], "float32"]' + hashlib.sha256(struct.pack("<f", 1.5)).digest())
    sample = bits(tensors["w"]).numpy()[:: 7000 // 64 | 1].tobytes()
    sha.update(b'["w", [100, 70], "bfloat16"]' + hashlib.sha256(sample).digest())
    assert fingerprint(tensors) == sha.hexdigest()


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
    for identity in (fingerprint, full_digest):
        assert identity(tensors) == identity(dict(reversed(clones(tensors).items())))
        assert len({identity(case) for case in [tensors, *others]}) == 6


def test_the_full_digest_sees_every_bit():
    tensors = {"w": noise((300, 70), torch.bfloat16, 0)}
    whole, glance = full_digest(tensors), fingerprint(tensors)
    bits(tensors["w"])[1] ^= 1
    assert full_digest(tensors) != whole
    assert fingerprint(tensors) == glance


# --- golden -------------------------------------------------------------------------------------


def golden() -> Delta:
    """The delta in `golden/`; its bytes are format version 1 and never change."""
    step = torch.arange(600)
    where = {"layer.weight": step * 37 + step * step // 50, "layer.scale": torch.tensor([0])}
    after = {
        "layer.weight": (16000 + step % 7).to(torch.int16).view(torch.bfloat16),
        "layer.scale": torch.tensor([-0.0], dtype=torch.bfloat16),
    }
    before = {name: torch.zeros_like(values) for name, values in after.items()}
    shapes = {"layer.weight": (300, 100), "layer.scale": ()}
    info = {"method": "piece-s", "density": 0.02, "note": "é"}
    return Delta.from_change(
        where, before, after, shapes, task="golden", base=BASE, parent="f" * 64, info=info
    )


@pytest.mark.parametrize("kind", ["gap", "raw"])
def test_golden_files_are_read_and_reproduced(kind):
    path = GOLDEN / f"delta-1-{kind}.safetensors"
    delta, expected = Delta.load(path), golden()
    for field in ("shapes", "before", "task", "base", "parent", "info"):
        assert getattr(delta, field) == getattr(expected, field)
    for name, index in expected.indices.items():
        assert same(delta.indices[name], index)
        assert same(delta.values[name], expected.values[name])
    assert expected.to_bytes(kind) == path.read_bytes()
