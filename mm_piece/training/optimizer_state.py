"""The state of an optimizer by the names of its parameters.

Trainer saves the state by position in the optimizer's lists. A run that goes on may build those
lists in another order, so the names are saved beside it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mm_piece.errors import StoreError

_FILE = "optimizer_names.json"  # beside the state, which Trainer writes in the optimizer's order


def save_order(
    optimizer: Any,
    named: Mapping[str, nn.Parameter],
    folder: Path,
) -> None:
    """Write the names of an optimizer's parameters, in its order."""
    names = _names_of(optimizer, named)
    text = json.dumps(names)
    (folder / _FILE).write_text(text, encoding="utf-8")


def restore_order(
    optimizer: Any,
    named: Mapping[str, nn.Parameter],
    folder: Path,
) -> None:
    """Give each parameter its own state again, after Trainer loaded states by position.

    Raises StoreError if the checkpoint's optimizer trained other parameters.
    """
    text = (folder / _FILE).read_text(encoding="utf-8")
    saved = json.loads(text)
    names = _names_of(optimizer, named)
    # the order may differ, the set may not
    if sorted(saved) != sorted(names):
        raise StoreError(f"{folder} trains other weights than this run; remove it to start over")

    # take all states out before the first is put back: names may have swapped their positions
    loaded = []
    for name in names:
        parameter = named[name]
        state = optimizer.state.pop(parameter, None)
        loaded.append(state)

    for name, state in zip(saved, loaded, strict=True):
        if state is None:  # an optimizer may have nothing to remember
            continue
        parameter = named[name]
        optimizer.state[parameter] = state


def _names_of(optimizer: Any, named: Mapping[str, nn.Parameter]) -> list[str]:
    names = {parameter: name for name, parameter in named.items()}
    ordered = []
    for group in optimizer.param_groups:
        ordered += [names[parameter] for parameter in group["params"]]
    return ordered
