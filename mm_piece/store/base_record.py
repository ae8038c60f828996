"""The store's record of its base: what it is."""

from pathlib import Path
from typing import Any

from mm_piece.deltas.delta import compute_fingerprint, compute_full_digest
from mm_piece.distributed import shape_of
from mm_piece.dtypes import dtype_name
from mm_piece.models.base import tensors
from mm_piece.store.base_location import locate_base
from mm_piece.store.records import BaseRecord


def describe_base(
    model: Any,
    base: str | Path,
    revision: str | None,
    store: Path,
) -> BaseRecord:
    """Return the record of a base: its location, family, dtype, size and fingerprint.

    A folder is recorded relative to the store, so that both can move together; a hub id with its
    revision.
    """
    named = tensors(model)
    first = next(iter(named.values()))  # all weights of a model have one dtype

    num_parameters = 0
    num_bytes = 0
    for tensor in named.values():
        # ZeRO-3 leaves a partitioned weight empty; its full shape is recorded beside it
        size = shape_of(tensor).numel()
        num_parameters += size
        num_bytes += size * tensor.element_size()

    return BaseRecord(
        {
            **locate_base(base, revision, store),
            "family": model.config.model_type,
            "dtype": dtype_name(first.dtype),
            "parameters": num_parameters,
            "bytes": num_bytes,
            "fingerprint": compute_fingerprint(named),  # of a sample: checked at every load
            "digest": compute_full_digest(named),  # of all bits: checked on request
        }
    )
