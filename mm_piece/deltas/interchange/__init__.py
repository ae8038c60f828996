"""Deltas in the formats of other programs, and back.

    write_foreign_delta        Delta -> file            vllm, coo
    read_foreign_delta         file, base -> Delta      vllm, coo, shira
    make_checkpoint_patches    Delta -> fields of vLLM's classes, without a file
    make_sparse_patches        likewise

Foreign files hold neither a base's fingerprint nor the values before, so a reader gets the whole
base, and checks everything before it makes a delta. They count entries in the layout of the base's
own files, which may differ from the model's: `deltas.file_layout`.

**vllm.** vLLM (repository vllm-project/vllm) has two classes for new values at flat indices of a
checkpoint's tensors, and no file for them. Values replace, floating only; NaN means "unchanged".
* `CheckpointWeightPatch(name, shape, dtype, values, indices)` for the worker's
  `load_checkpoint_weight_patches(model, patches)`: int32 or int64 indices, unique, in any order.
  `vllm/model_executor/model_loader/checkpoint_weight_patch.py`, pull request 50723.
* `SparseWeightPatch(name, indices, values, full_shape)` for a trainer's `send_weights(patches)`:
  int32 indices. `vllm/distributed/weight_transfer/sparse_nccl_engine.py`, pull request 53751.

Our file for them is a safetensors file of rows NAME.indices and NAME.values; its metadata field
`weight_patches` is JSON: {NAME: {"shape": [2, 3], "dtype": "bfloat16"}}. In vLLM, without us:

    file = safetensors.safe_open(path, "pt")
    row = lambda name, kind: file.get_tensor(f"{name}.{kind}")
    patches = [CheckpointWeightPatch(name, tuple(field["shape"]), getattr(torch, field["dtype"]),
                                     row(name, "values"), row(name, "indices"))
               for name, field in json.loads(file.metadata()["weight_patches"]).items()]

**coo.** The arguments of `torch.sparse_coo_tensor`: rows NAME.coords (int64, [ndim, entries], in
any order) and NAME.values, which replace; sizes in the metadata field `sparse_coo`, as above.

**shira.** A folder of PEFT's `save_pretrained` with a SHiRA adapter (repository huggingface/peft,
`src/peft/tuners/shira/`). Its values are *added*, at PEFT's scale of 1: the model after its
`merge_and_unload()`, bit for bit. Only the NaNs of a 16-bit base stay, which PEFT rewrites.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from mm_piece.deltas.delta import Delta, Entries, compute_fingerprint
from mm_piece.deltas.file_layout import (
    LAYOUT_KEY,
    find_file_shape,
    layout_of,
    may_be_transposed,
    transpose_positions,
    transpose_shape,
)
from mm_piece.deltas.interchange.patches import (
    CheckpointPatch,
    SparsePatch,
    make_patches,
    require_patchable,
)
from mm_piece.deltas.interchange.rows import (
    BaseTensors,
    Rename,
    RowKind,
    kind_of,
    load_tensors,
    pair_rows,
    rename_rows,
    require_row_kind,
    to_flat_indices,
)
from mm_piece.deltas.interchange.shira import read_shira
from mm_piece.entries import read_entries
from mm_piece.errors import DamageError, DeltaError, FormatError, MismatchError
from mm_piece.files import atomic
from mm_piece.files.strict_json import parse_json

Layout = Mapping[str, Sequence[int]]  # a transposable weight's name -> its shape in files
Reader = Callable[[Path, BaseTensors, Rename], Entries]
Packer = Callable[[Delta], tuple[str, dict[str, Tensor]]]


def read_foreign_delta(
    path: str | Path,
    format_name: str,
    base: BaseTensors,
    *,
    task: str,
    rename: Rename = str,
    layout: Layout | None = None,
) -> Delta:
    """Return what a foreign file changes in `base`; entries whose bits stay are left out.

    `base` is the whole base, {published name: tensor}, in the dtype trained in. `rename` turns a
    name in the file into a published one: `families.make_translator(model)` for adapters of live
    models. `layout` (`Checkpoint.layout`) gives the shapes in the base's files of weights that may
    be transposed; the delta records it. Raises FormatError (another format), DamageError (unsound),
    MismatchError (another base).
    """
    reader, _ = _find_format(format_name)
    try:
        entries = reader(Path(path), base, rename)
        indices: dict[str, Tensor] = {}
        after: dict[str, Tensor] = {}
        for name in entries:
            indices[name], after[name] = _sort_entries(name, *entries[name])

        before: dict[str, Tensor] = {}
        for name, index in indices.items():
            before[name] = read_entries(base[name].contiguous(), index)
        return Delta.from_change(
            indices,
            before,
            after,
            {name: base[name].shape for name in indices},
            task=task,
            base=compute_fingerprint(base),
            info={"imported": format_name, **layout_of(indices, layout or {})},
        )
    except DeltaError as error:
        line = " ".join(str(error).splitlines())  # names in a hostile file may break lines
        raise type(error)(f"{path}: {line}") from error


def write_foreign_delta(
    delta: Delta,
    path: str | Path,
    format_name: str,
    layout: Layout | None = None,
) -> None:
    """Write a foreign file, whole or not at all; the same delta gives the same bytes.

    Entries are counted in the layout of the base's files, which `layout` (`Checkpoint.layout`)
    gives, or by default the delta itself. Raises FormatError where the format cannot express the
    delta, or where the layout of a transposable weight is unknown; DeltaError where the disk
    refuses.
    """
    _, pack = _find_format(format_name)
    if pack is None:
        raise FormatError(f"the format {format_name!r} can be read only")

    delta = to_file_layout(delta, layout)
    field, rows = pack(delta)
    # copies: safetensors refuses rows that share memory
    owned = {key: row.clone(memory_format=torch.contiguous_format) for key, row in rows.items()}

    kinds: dict[str, RowKind] = {}
    for name, values in delta.values.items():
        kinds[name] = kind_of(delta.shapes[name], values.dtype)
    metadata = {field: json.dumps(kinds, sort_keys=True)}
    data = safetensors.torch.save(owned, metadata)
    try:
        atomic.write_atomically(Path(path), data)
    except OSError as error:
        raise DeltaError(f"{path}: cannot be written: {error.strerror}") from error


def make_checkpoint_patches(
    delta: Delta,
    layout: Layout | None = None,
) -> list[CheckpointPatch]:
    """Return the fields of one vLLM `CheckpointWeightPatch` per tensor.

    values [entries] in the tensor's dtype, indices [entries] int32 (int64 from 2³¹ entries on),
    in the delta's memory where it can be; `layout` as for `write_foreign_delta`. Raises FormatError
    for integer tensors and NaN.
    """
    return make_patches(to_file_layout(delta, layout))


def make_sparse_patches(
    delta: Delta,
    layout: Layout | None = None,
) -> list[SparsePatch]:
    """Return the fields of one vLLM `SparseWeightPatch` per tensor.

    As `make_checkpoint_patches`; but vLLM sends int32 indices only.
    """
    sparse_patches: list[SparsePatch] = []
    for patch in make_checkpoint_patches(delta, layout):
        sparse_patches.append(
            {
                "name": patch["name"],
                "indices": patch["indices"],
                "values": patch["values"],
                "full_shape": patch["shape"],
            }
        )
    return sparse_patches


def to_file_layout(
    delta: Delta,
    layout: Layout | None = None,
) -> Delta:
    """Return a delta that counts its entries in the layout of the base's files.

    `layout` as for `write_foreign_delta`.
    """
    known = delta.info.get(LAYOUT_KEY) if layout is None else layout
    indices = dict(delta.indices)
    values = dict(delta.values)
    # all shapes first: an unknown layout is refused before any work
    shapes = {name: find_file_shape(name, shape, known) for name, shape in delta.shapes.items()}

    for name, shape in delta.shapes.items():
        if tuple(shapes[name]) != shape:
            in_file = transpose_positions(indices[name], shape)
            indices[name], values[name] = _sort_entries(name, in_file, values[name])
    return replace(delta, indices=indices, values=values, shapes=shapes)


def _find_format(format_name: str) -> tuple[Reader, Packer | None]:
    if format_name not in FORMATS:
        raise FormatError(f"unknown format {format_name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[format_name]


def _sort_entries(
    name: str,
    indices: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sort entries by flat index; raise DamageError for two with one index."""
    order = torch.argsort(indices)
    indices = indices[order]
    is_repeated = indices[1:] == indices[:-1]
    repeated = indices[1:][is_repeated]
    if len(repeated):
        raise DamageError(f"{name}: expected unique indices, found {int(repeated[0])} twice")
    return indices, read_entries(values.contiguous(), order)


def _pack_patches(delta: Delta) -> tuple[str, dict[str, Tensor]]:
    rows: dict[str, Tensor] = {}
    for patch in make_patches(delta):
        name = patch["name"]
        rows[f"{name}.indices"] = patch["indices"]
        rows[f"{name}.values"] = patch["values"]
    return "weight_patches", rows


def _read_patches(
    path: Path,
    base: BaseTensors,
    rename: Rename,
) -> Entries:
    entries, shapes = _read_rows(path, base, rename, "weight_patches", "indices")
    for name, (indices, values) in entries.items():
        require_row_kind(
            f"{name}.indices",
            indices,
            (torch.int32, torch.int64),
            len(values),
        )
        require_patchable(name, values, DamageError)

        # flat indices are coordinates in one dimension: (1, entries)
        flat = to_flat_indices(name, indices[None], (base[name].numel(),))
        entries[name] = _to_model_layout(flat, shapes[name], base[name].shape), values
    return entries


def _pack_coo(delta: Delta) -> tuple[str, dict[str, Tensor]]:
    rows: dict[str, Tensor] = {}
    for name, index in delta.indices.items():
        rows[f"{name}.coords"] = _compute_coords(index, delta.shapes[name])
    for name, values in delta.values.items():
        rows[f"{name}.values"] = values
    return "sparse_coo", rows


def _read_coo(
    path: Path,
    base: BaseTensors,
    rename: Rename,
) -> Entries:
    entries, shapes = _read_rows(path, base, rename, "sparse_coo", "coords")
    for name, (coords, values) in entries.items():
        shape = shapes[name]
        require_row_kind(
            f"{name}.coords",
            coords,
            (torch.int64,),
            len(shape),
            len(values),
        )
        flat = to_flat_indices(name, coords, shape)
        entries[name] = _to_model_layout(flat, shape, base[name].shape), values
    return entries


def _read_rows(
    path: Path,
    base: BaseTensors,
    rename: Rename,
    field: str,
    first: str,
) -> tuple[Entries, dict[str, Sequence[int]]]:
    """Return the entries and shapes, by published name, of a file that this library wrote.

    Entries are the rows `first` (not checked yet) and `values` (checked). `field` is the metadata
    field that gives shape and dtype.
    """
    metadata, tensors = load_tensors(path)
    rows = pair_rows(tensors, first, "values")
    try:
        content = parse_json(metadata[field])
        kinds = {rename(name): kind for name, kind in content.items()}
    except (KeyError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"expected JSON in the metadata field {field}, found {error}") from error

    rows = rename_rows(rows, base, rename)
    if odd := kinds.keys() ^ rows.keys():
        raise DamageError(f"expected the same names in {field} and rows, found {min(odd)!r} in one")

    shapes = {name: _parse_file_shape(name, kinds[name], base[name]) for name in rows}
    for name, (_, values) in rows.items():
        require_row_kind(f"{name}.values", values, (base[name].dtype,), values.numel())
    return rows, shapes


def _parse_file_shape(
    name: str,
    field: object,
    tensor: Tensor,
) -> Sequence[int]:
    """Return the shape that a file gives a tensor of the base, which may be transposed there."""
    expected = kind_of(tensor.shape, tensor.dtype)
    if may_be_transposed(name):
        transposed = transpose_shape(tensor.shape)
        if field == kind_of(transposed, tensor.dtype):
            return transposed

    if field != expected:
        raise MismatchError(f"{name}: expected {expected}, found {field}")
    return tensor.shape


def _to_model_layout(
    flat: Tensor,
    found: Sequence[int],
    shape: Sequence[int],
) -> Tensor:
    """Return flat indices of a file's tensor, of shape `found`, as those of the model's."""
    if tuple(found) == tuple(shape):
        return flat
    return transpose_positions(flat, found)


def _compute_coords(
    indices: Tensor,
    shape: Sequence[int],
) -> Tensor:
    """Return coordinates [ndim, entries] of flat indices."""
    flat = indices.to(torch.int64)[None]  # (1, entries)
    rows = [flat[:0]]  # (0, entries), for a tensor without dimensions
    for axis, size in enumerate(shape):
        stride = math.prod(shape[axis + 1 :])
        rows.append(flat // stride % size)
    return torch.cat(rows)


# name -> reader, packer, which returns the metadata field and the rows of a file
FORMATS: dict[str, tuple[Reader, Packer | None]] = {
    "vllm": (_read_patches, _pack_patches),
    "coo": (_read_coo, _pack_coo),
    "shira": (read_shira, None),
}
