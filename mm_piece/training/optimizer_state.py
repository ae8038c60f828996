"""The state of an optimizer by the names of what it trains, not by places in its lists."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mm_piece.errors import StoreError

_FILE = "optimizer_names.json"  # beside the state, which Trainer writes in the optimizer's order


def save_order(optimizer: Any, named: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Write the names of an optimizer's parameters, in its order."""
    (folder / _FILE).write_text(json.dumps(_names_of(optimizer, named)), encoding="utf-8")


def restore_order(optimizer: Any, named: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Give each parameter its own state again, after states were loaded in a checkpoint's order.

    Raises StoreError if the checkpoint's optimizer trained other parameters.
    """
    saved = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    names = _names_of(optimizer, named)
    if sorted(saved) != sorted(names):
        raise StoreError(f"{folder} trains other weights than this run; remove it to start over")

    loaded = [optimizer.state.pop(named[name], None) for name in names]
    for name, state in zip(saved, loaded, strict=True):
        if state is not None:  # an optimizer may have nothing to remember
            optimizer.state[named[name]] = state


def _names_of(optimizer: Any, named: Mapping[str, nn.Parameter]) -> list[str]:
    names = {parameter: name for name, parameter in named.items()}
    return [names[one] for group in optimizer.param_groups for one in group["params"]]
