"""Sizes in bytes, as people write them."""

import re

_UNITS = {
    "": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: str | int) -> int:
    """Return the bytes of `8GiB`, `5GB` or a plain number.

    Raises ValueError, which names the allowed units, for anything else and below 1KiB.
    """
    num_bytes = 0.0
    match = _SIZE.fullmatch(str(size))
    if match and match[2] in _UNITS:
        num_bytes = float(match[1]) * _UNITS[match[2]]

    # an upper bound too: sizes must fit a 64-bit integer, and infinity is none
    if not 1024 <= num_bytes < 2**63:
        raise ValueError(
            f"{size!r} is not a size such as 8GiB, of at least 1KiB "
            f"(units: {', '.join(_UNITS)[2:]})"
        )
    return int(num_bytes)


def format_bytes(num_bytes: float) -> str:
    """Format bytes in decimal units: 45213 → 45.2 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        # from 999.5 on, three digits would round to 1e+03
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
