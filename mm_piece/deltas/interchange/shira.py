"""PEFT's SHiRA adapters: what their merge leaves in a base.

SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175) trains addends at fixed entries of a matrix.
"""

from pathlib import Path

import torch
from torch import Tensor

from mm_piece.deltas.delta import Entries
from mm_piece.deltas.interchange.rows import (
    BaseTensors,
    Rename,
    load_tensors,
    pair_rows,
    rename_rows,
    require_row_kind,
    to_flat_indices,
)
from mm_piece.dtypes import TRAINABLE_DTYPES
from mm_piece.entries import read_entries
from mm_piece.errors import DamageError, FormatError, MismatchError
from mm_piece.files.strict_json import JSON, parse_json

MERGEABLE_DTYPES = (
    *TRAINABLE_DTYPES.values(),
    torch.float64,
)


def read_shira(
    path: Path,
    base: BaseTensors,
    rename: Rename,
) -> Entries:
    """Return the entries that a folder of PEFT's changes in `base`, by published name.

    `rename` turns a live name of a weight into a published one.
    """
    rank = _read_shira_rank(path / "adapter_config.json")
    _, tensors = load_tensors(path / "adapter_model.safetensors")
    rows = pair_rows(tensors, "shira_indices", "shira_weight")

    def rename_module(name: str) -> str:
        # PEFT names the module that it wraps, under a prefix of its own
        module = name.removeprefix("base_model.model.")
        return rename(f"{module}.weight")

    rows = rename_rows(rows, base, rename_module)
    entries: Entries = {}
    for name, (positions, addends) in rows.items():
        entries[name] = _merge_adapter(
            name,
            positions,
            addends,
            base[name],
            rank,
        )
    return entries


def _read_shira_rank(path: Path) -> int:
    """Return the rank in an adapter's configuration; raise FormatError for another kind."""
    try:
        config: JSON = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"expected a folder with {path.name}, found {error}") from error

    kind: JSON = 0
    rank: JSON = 0
    if type(config) is dict:
        kind = config.get("peft_type")
        rank = config.get("r")
    if kind != "SHIRA" or type(rank) is not int or not 0 < rank < 2**31:
        raise FormatError(f"{path.name}: expected SHIRA and r above 0, found {kind!r}, {rank!r}")
    return rank


def _merge_adapter(
    name: str,
    positions: Tensor,
    addends: Tensor,
    base_values: Tensor,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """Return flat indices and the sums that PEFT's merge leaves there, in the base's dtype.

    `positions` are coordinates [2, entries], `addends` [entries], `base_values` the whole matrix.
    """
    if base_values.ndim != 2 or base_values.dtype not in MERGEABLE_DTYPES:
        found = f"{base_values.dtype} {list(base_values.shape)}"
        raise MismatchError(f"{name}: expected a floating matrix, found {found}")

    entries = rank * sum(base_values.shape)  # as many as a LoRA adapter of that rank has
    require_row_kind(f"{name}: shira_weight", addends, MERGEABLE_DTYPES, entries)
    kinds = (torch.int32, torch.int64, torch.float32)  # PEFT saves float32 on Windows
    require_row_kind(f"{name}: shira_indices", positions, kinds, 2, entries)
    if not torch.equal(positions, positions.trunc()):
        raise DamageError(f"{name}: shira_indices: expected whole numbers, found fractions")

    indices = to_flat_indices(name, positions, base_values.shape)
    before = read_entries(base_values.contiguous(), indices)
    # PEFT keeps 16-bit adapters in float32, and torch adds them there and rounds once.
    wide = torch.promote_types(base_values.dtype, torch.float32)
    total = before.to("cpu", wide) + addends.to(wide)
    return indices, total.to(base_values.dtype)
