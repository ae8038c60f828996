"""Optional libraries that some tests need: a test imports them where it uses them."""

from importlib.util import find_spec

import pytest


def needs(library: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test where a library is not installed."""
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")
