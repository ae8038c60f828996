"""PEFT's SHiRA, the nearest relative in wide use: a sparse adapter on linear layers.

    bytes_per_entry      size of its file
    add_shira_adapter    a model with the adapter, to merge and unmerge

SHiRA stores row and column as int32 and a value in float32, and merges by adding to the weights.
"""

import tempfile
import warnings
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import nn

RANK = 2  # rank · (rows + columns) entries of a matrix: a thousandth of 4096², less of others
STEP = 1e-3  # of a random value: small, as training makes it


def is_peft_installed() -> bool:
    """Whether PEFT is installed."""
    return util.find_spec("peft") is not None


def bytes_per_entry(folder: Path) -> float:
    """Return a file's bytes for each entry; its header is small, as it is for real models."""
    linears = nn.ModuleDict()
    for letter in "qkvo":
        linears[f"{letter}_proj"] = nn.Linear(1024, 1024, bias=False)
    linears.to(torch.bfloat16)
    model = add_shira_adapter(linears, list(linears))
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=folder) as target:
        warnings.simplefilter("ignore")  # this model has no configuration to save
        model.save_pretrained(target)
        file = Path(target) / "adapter_model.safetensors"
        size = file.stat().st_size
    return size / count_entries(model)


def add_shira_adapter(model: nn.Module, targets: Sequence[str]) -> Any:
    """Return a model with an adapter whose values are not zero."""
    import peft

    # PEFT warns of its own code
    for message in ("Sparse invariant checks", "`is_gradient_checkpointing`"):
        warnings.filterwarnings("ignore", message)

    config = peft.ShiraConfig(
        r=RANK,
        target_modules=list(targets),
        init_weights=False,  # random values: zeros would be merged for nothing
    )
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for row in _adapter_values(wrapped):
            row.mul_(STEP)
    return wrapped


def count_entries(model: nn.Module) -> int:
    """Return the number of entries that the adapter changes."""
    return sum(row.numel() for row in _adapter_values(model))


def _adapter_values(model: nn.Module) -> list[nn.Parameter]:
    named = model.named_parameters()
    return [row for name, row in named if "shira_weight" in name]
