"""Weights that are read without transformers are those that it would read, or none at all."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mm_piece.dtypes import view_bits
from mm_piece.models.checkpoint import Checkpoint
from mm_piece.models.plain_checkpoint import find_plain_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_folder_has_the_weights_of_its_checkpoint(base, dtype):
    expected = Checkpoint(Path(base), dtype)
    fingerprint = expected.compute_fingerprint()
    found = find_plain_checkpoint(Path(base), expected.family, dtype, fingerprint)
    assert found is not None
    assert found.compute_fingerprint() == fingerprint
    assert found.layout == expected.layout
    assert found.parameters.keys() == expected.parameters.keys()
    for name, weight in found.parameters.items():
        index = torch.arange(0, weight.location.size, 3)
        read, wanted = (w.read_entries(index) for w in (weight, expected.parameters[name]))
        assert read.dtype == wanted.dtype == dtype
        assert torch.equal(view_bits(read), view_bits(wanted))


def test_what_has_another_fingerprint_is_not_found(base, tmp_path):
    fingerprint = Checkpoint(Path(base), "float32").compute_fingerprint()

    def find(folder, family="llava", dtype=torch.float32):
        return find_plain_checkpoint(folder, family, dtype, fingerprint)

    assert find(Path(base))
    assert not find(Path(base), dtype=torch.float16)
    assert not find(Path(base), family="qwen2_vl")
    assert not find(Path(base), family="unknown")
    assert not find(tmp_path)
    assert not find(tmp_path / "nowhere")

    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    (copy / "adapter_config.json").write_text("{}")
    assert not find(copy)
    (copy / "adapter_config.json").unlink()
    assert find(copy)
    file = copy / "model.safetensors"
    content = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**content, "stranger": torch.zeros(2)}, file)
    assert not find(copy)
    file.write_bytes(b"no file of tensors")
    assert not find(copy)
    file.unlink()
    for text in ("", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 9999):
        (copy / "model.safetensors.index.json").write_text(text)
        assert not find(copy)
