"""PEFT's SHiRA adapters: what their merge leaves in a base."""

from pathlib import Path

import torch
from torch import Tensor

from mm_piece.deltas.delta import gather_entries
from mm_piece.deltas.file import Entries
from mm_piece.deltas.interchange.rows import (
    BaseTensors,
    Rename,
    load_tensors,
    pair_rows,
    rename_rows,
    require_row_kind,
    to_flat_indices,
)
from mm_piece.errors import DamageError, FormatError, MismatchError
from mm_piece.files.strict_json import parse_json

MERGEABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_shira(path: Path, base: BaseTensors, rename: Rename) -> Entries:
    rank = _read_shira_rank(path / "adapter_config.json")
    _, tensors = load_tensors(path / "adapter_model.safetensors")
    rows = pair_rows(tensors, "shira_indices", "shira_weight")
    stem = "base_model.model."
    rows = rename_rows(rows, base, lambda name: rename(f"{name.removeprefix(stem)}.weight"))
    return {name: _merge_adapter(name, *row, base[name], rank) for name, row in rows.items()}


def _read_shira_rank(path: Path) -> int:
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"expected a folder with {path.name}, found {error}") from error
    kind, rank = (config.get("peft_type"), config.get("r")) if type(config) is dict else (0, 0)
    if kind != "SHIRA" or type(rank) is not int or not 0 < rank < 2**31:
        raise FormatError(f"{path.name}: expected SHIRA and r above 0, found {kind!r}, {rank!r}")
    return rank


def _merge_adapter(
    name: str, positions: Tensor, addends: Tensor, base_values: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Return flat indices and the sums that PEFT's merge leaves there, in the base's dtype."""
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
    # PEFT keeps 16-bit adapters in float32, and torch adds them there and rounds once.
    wide = torch.promote_types(base_values.dtype, torch.float32)
    return indices, (
        gather_entries(base_values.contiguous(), indices).to("cpu", wide) + addends.to(wide)
    ).to(base_values.dtype)
