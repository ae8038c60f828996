"""Files laid out piece by piece are those of the safetensors library, and read the same."""

import os

import pytest
import safetensors.torch
import torch

from mm_piece.dtypes import SAFETENSORS_DTYPES, SAFETENSORS_NAMES, view_bits
from mm_piece.errors import ModelError
from mm_piece.files import safetensors as tensorfile
from mm_piece.files.safetensors import read_tensor_locations
from mm_piece.files.tensor_specs import TensorSpec, build_header, sort_tensor_specs


def tensors():
    torch.manual_seed(0)
    named = {}
    for name, dtype in SAFETENSORS_DTYPES.items():
        noise = torch.randint(0, 2, (5, 3)) if name == "BOOL" else torch.randn(5, 3) * 9
        named[f"ü.{name}"] = noise.to(dtype)
    return {**named, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}


def written(named, metadata):
    rows = {TensorSpec(n, SAFETENSORS_NAMES[t.dtype], tuple(t.shape)): t for n, t in named.items()}
    order = sort_tensor_specs(rows)
    data = b"".join(view_bits(rows[row]).numpy().tobytes() for row in order)
    return build_header(order, metadata) + data


def test_the_layout_is_the_librarys_own():
    named = tensors()
    assert written(named, {"format": "pt"}) == safetensors.torch.save(named, {"format": "pt"})


def test_slices_and_samples_are_those_of_the_tensor(tmp_path):
    named = {**tensors(), "long": torch.arange(10_007, dtype=torch.float64)}
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(named, file)
    found = read_tensor_locations(file)
    assert found.keys() == named.keys()
    for name, place in found.items():
        flat = named[name].reshape(-1)
        pieces = list(place.iter_slices(max_entries=7))
        assert [first for first, _ in pieces] == list(range(0, len(flat), 7))
        whole = torch.cat([piece for _, piece in pieces] or [flat[:0]])
        assert torch.equal(view_bits(whole), view_bits(flat))
        for step in (1, 3, 7, 513, 2001):
            assert torch.equal(
                view_bits(place.sample_entries(step)), view_bits(flat[::step].clone())
            )


def test_samples_step_over_piece_borders(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    row = torch.arange(1000, dtype=torch.int32)
    safetensors.torch.save_file({"row": row}, file)
    monkeypatch.setattr(tensorfile.TensorLocation.iter_slices, "__defaults__", (13,))
    assert torch.equal(read_tensor_locations(file)["row"].sample_entries(9), row[::9])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 20,
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a":[0]}',
        safetensors.torch.save({"a": torch.zeros(9)})[:-1],
        safetensors.torch.save({"a": torch.zeros(9)}).replace(b"[9]", b"[8]"),
        safetensors.torch.save({"a": torch.zeros(9)}).replace(b"F32", b"Q32"),
    ],
)
def test_unsound_files_are_refused_in_one_line(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="safetensors") as caught:
        read_tensor_locations(file)
    assert "\n" not in str(caught.value)


def test_a_file_cut_while_it_is_read_is_noticed(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(9)}, file)
    place = read_tensor_locations(file)["a"]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ModelError, match="truncated"):
        list(place.iter_slices())
