"""Two layouts of one weight: files may hold it turned, with its last two dimensions swapped.

Deltas count entries as the model has them. Published files of Qwen3-VL-MoE hold its fused experts
as [experts, in, out], the model has [experts, out, in]; what transformers saves may be either.
Every way from a delta to a file, or back, goes through here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mm_piece.errors import FormatError, format_value

# A key of a delta's info and of a store's base: weight that may turn -> its shape in files.
LAYOUT_KEY = "file_shapes"
_TRANSPOSABLE = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")


def may_be_transposed(name: str) -> bool:
    """Return whether files may hold the weight of this published name turned."""
    return _TRANSPOSABLE.search(name) is not None


def transpose_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape with its last two dimensions swapped."""
    return (*shape[:-2], *shape[:-3:-1])


def transpose_positions(positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Return where entries at flat positions of a tensor lie once it is turned."""
    rows, columns = shape[-2:]
    inside = positions % (rows * columns)
    return positions - inside + inside % columns * rows + inside // columns


def layout_of(names: Iterable[str], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return what a delta's info says of weights that may turn, out of their shapes in files."""
    known = {
        name: list(shapes[name]) for name in names if may_be_transposed(name) and name in shapes
    }
    return {LAYOUT_KEY: known} if known else {}


def find_file_shape(name: str, shape: Sequence[int], layout: Any) -> Sequence[int]:
    """Return a weight's shape in the base's files; FormatError where it may turn and nobody says.

    `layout` is what a delta's info says, or a base's checkpoint; nothing else was checked before.
    """
    if not may_be_transposed(name):
        return shape
    known = layout if isinstance(layout, Mapping) else {}
    if name not in known:
        raise FormatError(f"{name}: files may hold it turned: name the base whose files are meant")
    for possible in (tuple(shape), transpose_shape(shape)):
        if known[name] in (possible, list(possible)):
            return possible
    found = format_value(known[name])
    raise FormatError(f"{name} is {list(shape)}; its shape in files cannot be {found}")
