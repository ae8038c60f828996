"""Files of tensors that this library makes for itself: read whole, or not at all.

A file that is missing, cut off or altered is one that has to be made again.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mm_piece.files import atomic


def write_checksummed(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Keep tensors and plain facts about them, whole or not at all; equal content, equal bytes."""
    # One key: the order of several would differ from file to file.
    record = json.dumps({"facts": metadata, "sha256": _hash_tensors(tensors)})
    atomic.write_atomically(file, save(dict(tensors), {"sealed": record}))


def read_checksummed(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and facts as they were written; None if they are not there, or not whole."""
    try:
        with safe_open(file, "pt") as opened:
            record = json.loads((opened.metadata() or {}).get("sealed", "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None
    is_complete = type(record) is dict and record.keys() == {"facts", "sha256"}
    return (
        (tensors, record["facts"])
        if is_complete and record["sha256"] == _hash_tensors(tensors)
        else None
    )


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].contiguous()
        sha.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        sha.update(values.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
