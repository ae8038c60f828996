"""Two layouts of one weight: files may hold it transposed, with its last two dimensions swapped.

Deltas count entries in the model's layout. Published files of Qwen3-VL-MoE hold its fused experts
as [experts, in, out], the model has [experts, out, in]; transformers saves either of the two.
All conversions between a delta and a file, in both directions, are in this module.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from mm_piece.errors import FormatError, format_value
from mm_piece.files.strict_json import JSON

Shapes = Mapping[str, Sequence[int]]  # by the weights' names

# A key of a delta's info and of a store's base: a transposable weight's name -> its shape in files.
LAYOUT_KEY = "file_shapes"
_TRANSPOSABLE = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")


def may_be_transposed(name: str) -> bool:
    """Return whether files may hold the weight of this published name transposed."""
    return _TRANSPOSABLE.search(name) is not None


def transpose_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape with its last two dimensions swapped."""
    leading = shape[:-2]
    swapped = shape[:-3:-1]
    return (*leading, *swapped)


def transpose_positions(
    positions: Tensor,
    shape: Sequence[int],
) -> Tensor:
    """Return the flat positions that a tensor's entries have once it is transposed.

    `positions` are flat positions in a tensor of `shape`, [..., rows, columns].
    """
    rows, columns = shape[-2:]
    inside = positions % (rows * columns)  # within one matrix
    matrix_start = positions - inside

    row = inside // columns
    column = inside % columns
    # entry (row, column) of a matrix becomes entry (column, row), `rows` entries to a line
    return matrix_start + column * rows + row


def layout_of(
    names: Iterable[str],
    shapes: Shapes,
) -> dict[str, dict[str, list[int]]]:
    """Return the field of a delta's info that records how files hold its transposable weights.

    `shapes` are those that weights have in files. Without a transposable weight there is no field.
    """
    known: dict[str, list[int]] = {}
    for name in names:
        if may_be_transposed(name) and name in shapes:
            known[name] = list(shapes[name])

    if not known:
        return {}
    return {LAYOUT_KEY: known}


def find_file_shape(
    name: str,
    shape: Sequence[int],
    layout: JSON | Shapes,
) -> Sequence[int]:
    """Return the shape that a weight of the model's `shape` has in the base's files.

    `layout` comes from a delta's info or a base's checkpoint, and may hold anything. Raises
    FormatError where it says nothing of a transposable weight, or a shape that cannot be.
    """
    if not may_be_transposed(name):
        return shape

    known = layout if isinstance(layout, Mapping) else {}
    if name not in known:
        raise FormatError(f"{name}: files may hold it turned: name the base whose files are meant")

    for possible in (tuple(shape), transpose_shape(shape)):
        # a tuple from a checkpoint, a list from JSON
        if known[name] in (possible, list(possible)):
            return possible

    found = format_value(known[name])
    raise FormatError(f"{name} is {list(shape)}; its shape in files cannot be {found}")
