"""Deltas in the formats of other programs, and back.

    write                                Delta -> file            vllm, coo
    read                                 file, base -> Delta      vllm, coo, shira
    checkpoint_patches, sparse_patches   Delta -> fields of vLLM's classes, without a file

Foreign files know neither a base's fingerprint nor what stood there before, so a reader gets the
whole base, and checks everything before it makes a delta.

**vllm.** vLLM (repository vllm-project/vllm) has two classes for new values at flat indices of a
checkpoint's tensors, and no file for them. Values replace, floating only; NaN means "unchanged".
* `CheckpointWeightPatch(name, shape, dtype, values, indices)` for the worker's
  `load_checkpoint_weight_patches(model, patches)`: int32 or int64 indices, unique, in any order.
  `vllm/model_executor/model_loader/checkpoint_weight_patch.py`, pull request 50723.
* `SparseWeightPatch(name, indices, values, full_shape)` for a trainer's `send_weights(patches)`:
  int32 indices. `vllm/distributed/weight_transfer/sparse_nccl_engine.py`, pull request 53751.

Ours is one safetensors file of rows NAME.indices and NAME.values; its metadata field
`weight_patches` is JSON: {NAME: {"shape": [2, 3], "dtype": "bfloat16"}}. In vLLM, without us:

    file = safetensors.safe_open(path, "pt")
    row = lambda name, kind: file.get_tensor(f"{name}.{kind}")
    patches = [CheckpointWeightPatch(name, tuple(field["shape"]), getattr(torch, field["dtype"]),
                                     row(name, "values"), row(name, "indices"))
               for name, field in json.loads(file.metadata()["weight_patches"]).items()]

**coo.** What makes a `torch.sparse_coo_tensor`: rows NAME.coords (int64, [ndim, entries], in any
order) and NAME.values, which replace; sizes in the metadata field `sparse_coo`, as above.

**shira.** A folder of PEFT's `save_pretrained` with a SHiRA adapter (repository huggingface/peft,
`src/peft/tuners/shira/`). Its values are *added*, at PEFT's scale of 1: the model after its
`merge_and_unload()`, bit for bit; only the NaNs of a 16-bit base, which that rewrites, stay.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mm_piece import deltafile
from mm_piece.delta import Delta, fingerprint, take
from mm_piece.deltafile import Entries
from mm_piece.errors import DamageError, DeltaError, FormatError, MismatchError

Base = Mapping[str, Tensor]
Rename = Callable[[str], str]

MERGEABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What a broken file raises: a bad layout, a shape that overflows, a dtype torch does not have.
FILE_ERRORS = (safetensors.SafetensorError, KeyError, TypeError, RuntimeError)


def read(path: str | Path, form: str, base: Base, *, task: str, rename: Rename = str) -> Delta:
    """Return what a foreign file changes in `base`; entries whose bits stay are left out.

    `base` is the whole base, {published name: tensor}, in the dtype trained in. `rename` turns a
    name in the file into a published one: `names.translator(model)` for adapters of live models.
    Raises FormatError (another format), DamageError (unsound), MismatchError (another base).
    """
    reader, _ = _format(form)
    try:
        entries = reader(Path(path), base, rename)
        rows = {name: _in_order(name, *entries[name]) for name in entries}
        return Delta.from_change(
            {name: row[0] for name, row in rows.items()},
            {name: take(base[name].contiguous(), row[0]) for name, row in rows.items()},
            {name: row[1] for name, row in rows.items()},
            {name: base[name].shape for name in rows},
            task=task,
            base=fingerprint(base),
            info={"imported": form},
        )
    except DeltaError as error:
        line = " ".join(str(error).splitlines())  # names in a hostile file may break lines
        raise type(error)(f"{path}: {line}") from error


def write(delta: Delta, path: str | Path, form: str) -> None:
    """Write a foreign file, whole or not at all; the same delta gives the same bytes.

    Raises FormatError where the format cannot say it, DeltaError where the disk refuses.
    """
    _, pack = _format(form)
    if pack is None:
        raise FormatError(f"the format {form!r} can be read only")
    field, rows = pack(delta)
    rows = {key: row.clone(memory_format=torch.contiguous_format) for key, row in rows.items()}
    fields = {name: _field(delta.shapes[name], row.dtype) for name, row in delta.values.items()}
    data = safetensors.torch.save(rows, {field: json.dumps(fields, sort_keys=True)})
    try:
        deltafile.write(Path(path), data)
    except OSError as error:
        raise DeltaError(f"{path}: cannot be written: {error.strerror}") from error


def checkpoint_patches(delta: Delta) -> list[dict[str, Any]]:
    """Return the fields of one vLLM `CheckpointWeightPatch` per tensor.

    values [entries] in the tensor's dtype, indices [entries] int32 (int64 from 2³¹ entries on),
    in the delta's memory. Raises FormatError for integer tensors and NaN.
    """
    for name, values in delta.values.items():
        _require_patchable(name, values, FormatError)
    return [
        {"name": name, "shape": delta.shapes[name], "dtype": values.dtype}
        | {"values": values.contiguous(), "indices": delta.indices[name].contiguous()}
        for name, values in delta.values.items()
    ]


def sparse_patches(delta: Delta) -> list[dict[str, Any]]:
    """Return the fields of one vLLM `SparseWeightPatch` per tensor.

    As `checkpoint_patches`; but vLLM sends int32 indices only.
    """
    return [
        {key: patch[key] for key in ("name", "indices", "values")} | {"full_shape": patch["shape"]}
        for patch in checkpoint_patches(delta)
    ]


def _format(form: str) -> tuple[Any, Any]:
    if form not in FORMATS:
        raise FormatError(f"unknown format {form!r}; known: {', '.join(FORMATS)}")
    return FORMATS[form]


def _in_order(name: str, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sort entries by flat index; refuse two for one index."""
    order = torch.argsort(indices)
    indices = indices[order]
    twice = indices[1:][indices[1:] == indices[:-1]]
    if len(twice):
        raise DamageError(f"{name}: expected unique indices, found {int(twice[0])} twice")
    return indices, take(values.contiguous(), order)


def _require_patchable(name: str, values: Tensor, error: type[DeltaError]) -> None:
    if not values.is_floating_point() or values.isnan().any():
        raise error(f"{name}: expected floating numbers for vLLM, found integers or NaN")


def _pack_patches(delta: Delta) -> tuple[str, dict[str, Tensor]]:
    patches, rows = checkpoint_patches(delta), ("indices", "values")
    return "weight_patches", {f"{p['name']}.{row}": p[row] for p in patches for row in rows}


def _read_patches(path: Path, base: Base, rename: Rename) -> Entries:
    entries = _read_rows(path, base, rename, "weight_patches", "indices")
    for name, (indices, values) in entries.items():
        _require_kind(f"{name}.indices", indices, (torch.int32, torch.int64), len(values))
        _require_patchable(name, values, DamageError)
        entries[name] = _flat(name, indices[None], (base[name].numel(),)), values
    return entries


def _pack_coo(delta: Delta) -> tuple[str, dict[str, Tensor]]:
    coords = {f"{n}.coords": _coords(row, delta.shapes[n]) for n, row in delta.indices.items()}
    return "sparse_coo", coords | {f"{name}.values": row for name, row in delta.values.items()}


def _read_coo(path: Path, base: Base, rename: Rename) -> Entries:
    entries = _read_rows(path, base, rename, "sparse_coo", "coords")
    for name, (coords, values) in entries.items():
        shape = base[name].shape
        _require_kind(f"{name}.coords", coords, (torch.int64,), len(shape), len(values))
        entries[name] = _flat(name, coords, shape), values
    return entries


def _read_shira(path: Path, base: Base, rename: Rename) -> Entries:
    rank = _shira_rank(path / "adapter_config.json")
    _, tensors = _load(path / "adapter_model.safetensors")
    rows = _pairs(tensors, "shira_indices", "shira_weight")
    stem = "base_model.model."
    rows = _published(rows, base, lambda name: rename(f"{name.removeprefix(stem)}.weight"))
    return {name: _merged(name, *row, base[name], rank) for name, row in rows.items()}


def _shira_rank(path: Path) -> int:
    try:
        config = json.loads(path.read_bytes())
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
    _require_kind(f"{name}: shira_weight", add, MERGEABLE, entries)
    kinds = (torch.int32, torch.int64, torch.float32)  # PEFT saves float32 on Windows
    _require_kind(f"{name}: shira_indices", at, kinds, 2, entries)
    if not torch.equal(at, at.trunc()):
        raise DamageError(f"{name}: shira_indices: expected whole numbers, found fractions")
    indices = _flat(name, at, old.shape)
    # PEFT keeps 16-bit adapters in float32, and torch adds them there and rounds once.
    wide = torch.promote_types(old.dtype, torch.float32)
    return indices, (take(old.contiguous(), indices).to("cpu", wide) + add.to(wide)).to(old.dtype)


def _load(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a safetensors file."""
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in list(file.keys())}
    except OSError as error:
        raise FormatError(f"{path.name} cannot be read: {error}") from error
    except FILE_ERRORS as error:
        raise DamageError(f"{path.name} is not a sound safetensors file: {error}") from error


def _pairs(tensors: Mapping[str, Tensor], first: str, second: str) -> Entries:
    """Group the rows NAME.first and NAME.second by NAME; there must be no others."""
    names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    expected = {f"{name}.{row}" for name in names for row in (first, second)}
    stray, missing = tensors.keys() - expected, expected - tensors.keys()
    if stray or missing:
        found = min(stray) if stray else f"no {min(missing)}"
        raise FormatError(f"expected rows NAME.{first} with NAME.{second}, found {found}")
    return {name: (tensors[f"{name}.{first}"], tensors[f"{name}.{second}"]) for name in names}


def _published(rows: Entries, base: Base, rename: Rename) -> Entries:
    """Return rows under published names, all of which are in the base."""
    renamed = {rename(name): row for name, row in rows.items()}
    missing = [name for name in renamed if name not in base]
    if missing:
        count = f"{len(missing)} of {len(renamed)} names"
        raise MismatchError(f"expected names of the base, found {missing[0]} ({count} not there)")
    if len(renamed) != len(rows):
        raise MismatchError(f"expected {len(rows)} names in the base, found {len(renamed)}")
    return renamed


def _read_rows(path: Path, base: Base, rename: Rename, field: str, first: str) -> Entries:
    """Return published name -> index row, values, of a file of ours; values are checked."""
    metadata, tensors = _load(path)
    rows = _pairs(tensors, first, "values")
    try:
        fields = {rename(name): value for name, value in json.loads(metadata[field]).items()}
    except (KeyError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"expected JSON in the metadata field {field}, found {error}") from error
    rows = _published(rows, base, rename)
    if odd := fields.keys() ^ rows.keys():
        raise DamageError(f"expected the same names in {field} and rows, found {min(odd)!r} in one")
    for name, (_, values) in rows.items():
        expected = _field(base[name].shape, base[name].dtype)
        if fields[name] != expected:
            raise MismatchError(f"{name}: expected {expected}, found {fields[name]}")
        _require_kind(f"{name}.values", values, (base[name].dtype,), values.numel())
    return rows


def _field(shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}


def _require_kind(what: str, row: Tensor, dtypes: Sequence[torch.dtype], *shape: int) -> None:
    expected, found = [_field(shape, dtype) for dtype in dtypes], _field(row.shape, row.dtype)
    if found not in expected:
        known = " or ".join(str(kind) for kind in expected)
        raise DamageError(f"{what}: expected {known}, found {found}")


def _flat(name: str, coords: Tensor, shape: Sequence[int]) -> Tensor:
    """Return flat indices [entries] of coordinates [ndim, entries], all of them inside `shape`."""
    flat = torch.zeros(coords.shape[1], dtype=torch.int64)
    for row, length in zip(coords.to(torch.int64), shape, strict=True):
        if len(row) and (row.min() < 0 or row.max() >= length):
            found = f"{int(row.min())} to {int(row.max())}"
            raise DamageError(f"{name}: expected indices from 0 to {length - 1}, found {found}")
        flat = flat * length + row
    return flat


def _coords(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Return coordinates [ndim, entries] of flat indices."""
    flat = indices.to(torch.int64)[None]
    rows = [flat // math.prod(shape[axis + 1 :]) % size for axis, size in enumerate(shape)]
    return torch.cat([flat[:0], *rows])


FORMATS = {  # name -> reader, packer: what makes the metadata field and the rows of a file
    "vllm": (_read_patches, _pack_patches),
    "coo": (_read_coo, _pack_coo),
    "shira": (_read_shira, None),
}
