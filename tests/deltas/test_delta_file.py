"""Laws of the delta file: sealed, golden, and refused when anything about it is not right."""

import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from forged import forge, header_of, sealed
from hypothesis import given
from hypothesis import strategies as st
from made_deltas import BASE, change, noise, same, small

from mm_piece.deltas import codec
from mm_piece.deltas import file as deltafile
from mm_piece.deltas.delta import Delta
from mm_piece.errors import DamageError, DeltaError, FormatError, TruncatedError

GOLDEN = Path(__file__).parents[1] / "golden"


# --- damage ---------------------------------------------------------------------------------------


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


def test_what_is_missing_is_told_from_what_is_altered():
    data = change(*small(), 1)[0].to_bytes()
    for length in (100, len(data) // 2, len(data) - 1):
        with pytest.raises(TruncatedError, match=f"bytes expected, {length} found"):
            Delta.from_bytes(data[:length])
    with pytest.raises(DamageError, match="altered: expected SHA-256") as caught:
        Delta.from_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not isinstance(caught.value, TruncatedError)


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
        ("U8", [0, 2**62, 0, 2**31]),
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


# --- golden ---------------------------------------------------------------------------------------


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


# --- bounds ---------------------------------------------------------------------------------------


def test_a_whole_tensor_set_to_one_value_stays_readable():
    size = 2**18
    tensors = {"w": noise((size,), torch.float32, 0)}
    where = torch.arange(size, dtype=torch.int32)
    before, after = {"w": tensors["w"]}, {"w": torch.zeros(size)}
    fields = {"task": "prune", "base": BASE, "info": {}}
    delta = Delta.from_change({"w": where}, before, after, {"w": (size,)}, **fields)
    data = delta.to_bytes()
    assert size / 8 < len(data) < size
    assert same(Delta.from_bytes(data).values["w"], after["w"])


def tampered(**changes):
    """A sound file whose header says something else about its tensor."""
    data = change(*small(), 1)[0].to_bytes()
    header = header_of(data)
    header["tensors"]["a.weight"].update(changes)
    return forge(json.dumps(header), safetensors.torch.load(data))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shape": [2**20, 2**20], "entries": 2**40}, "entries are promised in"),
        ({"shape": [2**26], "entries": 2**26}, "entries are promised in"),
        ({"shape": [99] * 300_000}, "is no shape"),
        ({"shape": [2**62 + 1]}, "is no shape"),
        ({"shape": [-1, -1]}, "is no shape"),
        ({"shape": [True, True]}, "is no shape"),
        ({"entries": 10**4000}, "entries to change"),
        ({"before": "\x1b[2J"}, "expected a SHA-256"),
        ({"dtype": "x" * 9000}, "unknown dtype"),
    ],
)
def test_promises_beyond_reason_are_refused_in_one_short_line(changes, problem):
    with pytest.raises(DamageError, match=problem) as caught:
        Delta.from_bytes(tampered(**changes))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["task", "base", "parent", "name"])
def test_names_that_no_message_could_show_are_neither_written_nor_read(key):
    delta, _ = change(*small(), 1)
    header = header_of(delta.to_bytes())
    for text in ("", "two\nlines", "\u2028", "x" * 201):
        if key == "parent" and not text:
            continue
        if key == "name":
            first = next(iter(header["tensors"].values()))
            bad = {**header, "tensors": {text: first}}
        else:
            bad = {**header, key: text}
        with pytest.raises(DamageError):
            deltafile.pack_delta(bad, {})
        with pytest.raises(DamageError):
            Delta.from_bytes(forge(json.dumps(bad), {}))


def test_a_header_nested_too_deep_is_refused_when_written():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    delta, _ = change(*small(), 1, info={"k": deep})
    with pytest.raises(FormatError, match="plain JSON"):
        delta.to_bytes()
