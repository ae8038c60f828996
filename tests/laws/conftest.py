"""Fixtures of the laws that hold over several processes."""

import pytest
from engines import recipe_writer
from tiny_llava import make_llava


@pytest.fixture(scope="session")
def flat_base(tmp_path_factory):
    """Folder of a tiny LLaVA with one layer in each part: under ZeRO-3 every layer costs time."""
    return make_llava(tmp_path_factory.mktemp("flat"), layers=1)


@pytest.fixture
def write(tmp_path):
    """A function that writes a recipe for an engine, and the data it reads."""
    return recipe_writer(tmp_path)
