"""Sizes in bytes, as people write them."""

import re

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(size: str | int) -> int:
    """Bytes of `8GiB`, `5GB` or a plain number; ValueError names the allowed units."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not match or match[2] not in _UNITS or not 1024 <= _count_bytes(match) < 2**63:
        raise ValueError(
            f"{size!r} is not a size such as 8GiB, of at least 1KiB "
            f"(units: {', '.join(_UNITS)[2:]})"
        )
    return int(_count_bytes(match))


def _count_bytes(match: re.Match[str]) -> float:
    return float(match[1]) * _UNITS[match[2]]
