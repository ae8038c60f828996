"""Every family goes the whole way: estimate, select, train, delta, load at t, generate, export."""

from pathlib import Path

import pytest
from family_steps import ALL, STEPS, World, table
from safetensors.torch import load_file, save_file

import mm_piece


@pytest.fixture(scope="module")
def world(request, tmp_path_factory):
    return World(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("world", ALL, indirect=True)
def test_family(world, step):
    STEPS[step](world)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl_moe", "gemma2"])
def test_family_in_bfloat16(family, tmp_path):
    world = World(family, tmp_path, "bfloat16")
    for step in ("train", "delta", "load_at_t", "checkout", "export"):
        STEPS[step](world)


def test_the_guide_shows_what_is_tested_here():
    guide = Path(__file__).parents[2] / "docs" / "guide" / "models.md"
    everything = table(lambda family, step: True)  # or a test above fails
    block = f"<!-- families -->\n{everything}\n<!-- end -->"
    assert block in guide.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_second_copy_of_a_tied_head_does_not_stay_behind(tmp_path):
    """transformers would load it beside an embedding that a delta has changed."""
    world = World("qwen2", tmp_path)
    file = world.base / "model.safetensors"
    content = load_file(file)
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    save_file(content, file, {"format": "pt"})
    folder = mm_piece.export(world.store, at=1, to=tmp_path / "merged")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
