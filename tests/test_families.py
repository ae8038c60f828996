"""Every family goes the whole way: estimate, select, train, delta, load at t, generate, export."""

from pathlib import Path

import pytest
from families import BUILDERS
from family_steps import STEPS, World, table


@pytest.fixture(scope="module")
def world(request, tmp_path_factory):
    return World(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("world", BUILDERS, indirect=True)
def test_family(world, step):
    STEPS[step](world)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl_moe", "gemma2"])
def test_family_in_bfloat16(family, tmp_path):
    world = World(family, tmp_path, "bfloat16")
    for step in ("train", "delta", "load_at_t", "checkout", "export"):
        STEPS[step](world)


def test_readme_shows_what_is_tested_here():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    everything = table(lambda family, step: True)  # or a test above fails
    assert f"<!-- families -->\n{everything}\n<!-- end -->" in readme
