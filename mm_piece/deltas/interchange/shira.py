"""PEFT's SHiRA adapters: what their merge leaves in a base."""

from pathlib import Path

import torch
from torch import Tensor

from mm_piece.deltas.delta import take
from mm_piece.deltas.file import Entries
from mm_piece.deltas.interchange.rows import (
    Base,
    Rename,
    flat_indices,
    load_tensors,
    paired_rows,
    published_rows,
    require_kind,
)
from mm_piece.errors import DamageError, FormatError, MismatchError
from mm_piece.files.strict_json import parse_json

MERGEABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_shira(path: Path, base: Base, rename: Rename) -> Entries:
    rank = _shira_rank(path / "adapter_config.json")
    _, tensors = load_tensors(path / "adapter_model.safetensors")
    rows = paired_rows(tensors, "shira_indices", "shira_weight")
    stem = "base_model.model."
    rows = published_rows(rows, base, lambda name: rename(f"{name.removeprefix(stem)}.weight"))
    return {name: _merged(name, *row, base[name], rank) for name, row in rows.items()}


def _shira_rank(path: Path) -> int:
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"expected a folder with {path.name}, found {error}") from error
    kind, rank = (config.get("peft_type"), config.get("r")) if type(config) is dict else (0, 0)
    if kind != "SHIRA" or type(rank) is not int or not 0 < rank < 2**31:
        raise FormatError(f"{path.name}: expected SHIRA and r above 0, found {kind!r}, {rank!r}")
    return rank


def _merged(name: str, at: Tensor, add: Tensor, old: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return flat indices and the sums that PEFT's merge leaves there, in the base's dtype."""
    if old.ndim != 2 or old.dtype not in MERGEABLE:
        found = f"{old.dtype} {list(old.shape)}"
        raise MismatchError(f"{name}: expected a floating matrix, found {found}")
    entries = rank * sum(old.shape)  # as many as a LoRA adapter of that rank has
    require_kind(f"{name}: shira_weight", add, MERGEABLE, entries)
    kinds = (torch.int32, torch.int64, torch.float32)  # PEFT saves float32 on Windows
    require_kind(f"{name}: shira_indices", at, kinds, 2, entries)
    if not torch.equal(at, at.trunc()):
        raise DamageError(f"{name}: shira_indices: expected whole numbers, found fractions")
    indices = flat_indices(name, at, old.shape)
    # PEFT keeps 16-bit adapters in float32, and torch adds them there and rounds once.
    wide = torch.promote_types(old.dtype, torch.float32)
    return indices, (take(old.contiguous(), indices).to("cpu", wide) + add.to(wide)).to(old.dtype)
