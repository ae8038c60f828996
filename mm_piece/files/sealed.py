"""Checksummed cache files: tensors that this library can compute again, read whole or not at all.

A file that is missing, truncated or altered counts as absent.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from mm_piece.files import atomic
from mm_piece.files.safetensors import open_tensors
from mm_piece.files.strict_json import JSON


class _Record(TypedDict):
    """What a file's metadata say."""

    facts: dict[str, Any]
    sha256: str


def write_checksummed(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, object],
) -> None:
    """Write tensors and plain facts about them, whole or not at all.

    Equal content gives equal bytes.
    """
    record = {
        "facts": metadata,
        "sha256": _hash_tensors(tensors),
    }
    # one key of the file's metadata: safetensors writes several in an order that changes
    metadata_fields = {"sealed": json.dumps(record)}
    data = save(dict(tensors), metadata_fields)
    atomic.write_atomically(file, data)


def read_checksummed(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and facts as they were written; None if the file is absent or altered."""
    tensors: dict[str, Tensor] = {}
    try:
        with open_tensors(file) as opened:
            metadata = opened.metadata() or {}
            record: JSON = json.loads(metadata.get("sealed", "{}"))
            for name in opened.keys():  # noqa: SIM118 - the file is no mapping
                tensors[name] = opened.get_tensor(name)
    except (OSError, SafetensorError, ValueError):
        return None

    if not _is_record(record):
        return None
    if record["sha256"] != _hash_tensors(tensors):
        return None
    return tensors, record["facts"]


def _is_record(content: JSON) -> TypeGuard[_Record]:
    return type(content) is dict and content.keys() == {"facts", "sha256"}


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bits of tensors, whatever their order."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].contiguous()
        kind = [
            name,
            str(values.dtype),
            list(values.shape),
        ]
        sha.update(json.dumps(kind).encode())

        single_bytes = values.view(torch.uint8)
        sha.update(single_bytes.numpy().tobytes())
    return sha.hexdigest()
