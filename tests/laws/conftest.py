"""Fixtures of the laws that hold over several processes."""

import pytest
from engines import recipe_writer


@pytest.fixture
def write(tmp_path):
    """A function that writes a recipe for an engine, and the data it reads."""
    return recipe_writer(tmp_path)
