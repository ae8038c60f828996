"""Fused experts, which files hold turned or not: deltas become other programs' files, and back.

The right value is the tuned checkpoint itself: its file patched is its tuned file, bit for bit.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import BUILDERS
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from mm_piece.cli import main
from mm_piece.deltas import interchange
from mm_piece.deltas.delta import Delta
from mm_piece.deltas.file_layout import (
    LAYOUT_KEY,
    may_be_transposed,
    transpose_positions,
    transpose_shape,
)
from mm_piece.dtypes import view_bits
from mm_piece.errors import FormatError, MismatchError
from mm_piece.families import make_translator, weights
from mm_piece.models.base import build_meta_model, load_base, tensors
from mm_piece.models.checkpoint import Checkpoint
from mm_piece.store import deriving

SAFE = "model.safetensors"
UP = "model.language_model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.language_model.layers.0.mlp.experts.down_proj"
ROUTER = "model.language_model.layers.0.mlp.gate.weight"


def write(folder: Path, content: dict[str, torch.Tensor]) -> Path:
    save_file({n: t.contiguous() for n, t in content.items()}, folder / SAFE, {"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["turned", "as the model", "mixed"])
def pair(request, family_base, tmp_path_factory):
    """A base in a file layout and a tuned checkpoint in the same."""
    folder = tmp_path_factory.mktemp("pair")
    base = shutil.copytree(family_base("qwen3_vl_moe"), folder / "base")
    swapped = {"turned": (UP, DOWN), "as the model": (), "mixed": (DOWN,)}[request.param]
    content = load_file(base / SAFE)
    for name in [name for name in content if may_be_transposed(name)]:
        if any(name.endswith(other.rpartition(".")[2]) for other in swapped):
            content[name] = content[name].mT
    write(base, content)
    after = {name: tensor.clone().contiguous() for name, tensor in content.items()}
    for name in (UP, DOWN, ROUTER):
        after[name].view(-1)[[0, 1, 7, 100, -1] if name != ROUTER else [3, 4]] += 1
    tuned = write(shutil.copytree(base, folder / "tuned"), after)
    deriving.extract(base, tuned, folder / "delta")
    return base, tuned, folder / "delta"


def patched(folder: Path, file: Path, form: str) -> dict[str, torch.Tensor]:
    """A folder's tensors after a foreign file, by that format's own rule."""
    content = load_file(folder / SAFE)
    with safe_open(file, "pt") as opened:
        field = "weight_patches" if form == "vllm" else "sparse_coo"
        for name, kind in json.loads(opened.metadata()[field]).items():
            assert kind["shape"] == list(content[name].shape)
            values = opened.get_tensor(f"{name}.values")
            if form == "vllm":
                content[name].view(-1)[opened.get_tensor(f"{name}.indices").long()] = values
            else:
                content[name][tuple(opened.get_tensor(f"{name}.coords"))] = values
    return content


@pytest.mark.parametrize("form", ["vllm", "coo"])
def test_a_converted_delta_patches_the_files_and_comes_back(form, pair, tmp_path):
    base, tuned, file = pair
    delta, out = Delta.load(file), tmp_path / "out"
    interchange.write_foreign_delta(delta, out, form)
    found, expected = patched(base, out, form), load_file(tuned / SAFE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(view_bits(found[name]), view_bits(expected[name])) for name in found)
    model, _ = load_base(base)
    again = interchange.read_foreign_delta(
        out, form, tensors(model), task="t", rename=make_translator(model)
    )
    assert again.shapes == delta.shapes and again.before == delta.before
    for name in delta.shapes:
        assert torch.equal(again.indices[name], delta.indices[name])
        assert torch.equal(view_bits(again.values[name]), view_bits(delta.values[name]))


def test_every_delta_of_a_checkpoint_knows_how_its_files_lie(pair, tmp_path):
    base, _, file = pair
    delta, content = Delta.load(file), load_file(base / SAFE)
    shapes = {name: list(content[name].shape) for name in (UP, DOWN)}
    assert delta.info[LAYOUT_KEY] == shapes
    assert deriving.merge([delta], base).info[LAYOUT_KEY] == shapes
    for form in ("vllm", "coo"):
        run = CliRunner().invoke
        assert (
            run(main, ["convert", str(file), str(tmp_path / form), "--format", form]).exit_code == 0
        )
        back = [str(tmp_path / form), str(base), str(tmp_path / f"{form}-back"), "--format", form]
        assert run(main, ["import", *back]).exit_code == 0
        imported = Delta.load(tmp_path / f"{form}-back")
        assert imported.info[LAYOUT_KEY] == shapes
        assert all(torch.equal(imported.indices[n], delta.indices[n]) for n in delta.indices)


def test_other_files_than_the_deltas_own_can_be_meant(pair, family_base, tmp_path):
    base, _, file = pair
    other, plain = family_base("qwen3_vl_moe"), tmp_path / "plain"
    command = ["convert", str(file), str(plain), "--format", "coo", "--base", str(other)]
    assert CliRunner().invoke(main, command).exit_code == 0
    live, found = tensors(load_base(base)[0]), patched(other, plain, "coo")
    Delta.load(file).apply(live)
    assert all(torch.equal(view_bits(found[name]), view_bits(live[name])) for name in live)


def test_nothing_is_guessed_where_nobody_says_how_files_lie(pair, tmp_path):
    base, _, file = pair
    delta = Delta.load(file)
    layout = delta.info.pop(LAYOUT_KEY)
    for call in (
        lambda: interchange.write_foreign_delta(delta, tmp_path / "x", "vllm"),
        lambda: interchange.write_foreign_delta(delta, tmp_path / "x", "coo"),
        lambda: interchange.make_checkpoint_patches(delta),
        lambda: interchange.make_sparse_patches(delta),
    ):
        with pytest.raises(FormatError, match=r"experts\.\w+: files may hold it turned"):
            call()
    for hostile in ({**layout, UP: [1, 2]}, {**layout, UP: None}, [UP], {UP: layout[UP]}):
        delta.info[LAYOUT_KEY] = hostile
        with pytest.raises(FormatError, match=r"experts\.\w+"):
            interchange.write_foreign_delta(delta, tmp_path / "x", "vllm")
    assert not list(tmp_path.iterdir())
    interchange.write_foreign_delta(delta, tmp_path / "x", "vllm", Checkpoint(base).layout)


def test_only_fused_experts_may_turn(pair, tmp_path):
    base, _, file = pair
    interchange.write_foreign_delta(Delta.load(file), tmp_path / "x", "coo")
    with safe_open(tmp_path / "x", "pt") as opened:
        rows = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        fields = json.loads(opened.metadata()["sparse_coo"])
    fields[ROUTER]["shape"].reverse()
    rows[f"{ROUTER}.coords"] = rows[f"{ROUTER}.coords"].flip(0).contiguous()
    save_file(rows, tmp_path / "x", {"sparse_coo": json.dumps(fields)})
    with pytest.raises(MismatchError, match="gate.weight: expected"):
        interchange.read_foreign_delta(tmp_path / "x", "coo", tensors(load_base(base)[0]), task="t")


@pytest.mark.parametrize("family", BUILDERS)
def test_what_may_turn_is_what_transformers_turns(family, family_base):
    model = build_meta_model(family_base(family))
    steps = get_model_conversion_mapping(model)
    patterns = [
        s for step in steps if isinstance(step, WeightConverter) for s in step.source_patterns
    ]
    for name in weights(model):
        assert may_be_transposed(name) == any(pattern in name for pattern in patterns)


def test_positions_of_a_turned_tensor():
    shape = (2, 3, 5)
    tensor = torch.arange(30).view(shape)
    there = transpose_positions(torch.arange(30), shape)
    assert torch.equal(tensor.mT.reshape(-1)[there], tensor.view(-1))
    assert transpose_shape(shape) == (2, 5, 3) == tuple(tensor.mT.shape)
    assert torch.equal(transpose_positions(there, transpose_shape(shape)), torch.arange(30))
