"""Laws of the delta: all or nothing, in a model and on the disk, and errors of one line."""

import hashlib
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from made_deltas import BASE, change, clones, same, small

from mm_piece.deltas import file as deltafile
from mm_piece.deltas.delta import Delta, compute_digest
from mm_piece.deltas.tensor_rows import to_value_row
from mm_piece.dtypes import view_bits
from mm_piece.errors import DamageError, DeltaError, FormatError, MismatchError


def spoiled(tensors) -> dict[str, dict[str, torch.Tensor]]:
    last = tensors["b.weight"]
    touched = last.clone()
    view_bits(touched)[7] ^= 1
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
    delta.require_applicable(tensors)
    delta.apply(tensors)
    with pytest.raises(MismatchError, match="expected .*, found"):
        delta.require_applicable(tensors)


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
        Delta({"w": row}, {"w": values}, {"w": (3, 4)}, {"w": compute_digest(values)}, **fields)
    record = {"shape": [3, 4], "dtype": "F32", "entries": 2, "before": compute_digest(values)}
    header = {"task": "t", "base": BASE, "parent": "", "info": {}, "tensors": {"w": record}}
    entries = {"w": (row.numpy(), to_value_row(values))}
    data = deltafile.pack_delta(header, entries, "raw")
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


# --- files ----------------------------------------------------------------------------------------


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
    shapes, before = {"v": (4,), "w": (4,)}, dict.fromkeys("vw", compute_digest(values))
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
