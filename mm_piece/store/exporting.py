"""A position as an ordinary checkpoint folder: read slice by slice, patched, written."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_piece.deltas.delta import Delta
from mm_piece.dtypes import SAFETENSORS_NAMES, bits, dtype_name
from mm_piece.errors import BaseError, MismatchError, StoreError, as_path
from mm_piece.files import safetensors as tensorfile
from mm_piece.files.atomic import new_folder, reported
from mm_piece.files.safetensors import Row
from mm_piece.models.base import processor_folder
from mm_piece.models.checkpoint import Checkpoint, Weight, fetch
from mm_piece.recipe import parse_bytes
from mm_piece.store.base_record import reading_of, trained_dtype, where
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import as_store, dtype_of, is_delta, named_base, require_base

_INDEX = "model.safetensors.index.json"
_SETTINGS = (".json", ".jinja", ".txt", ".model")


def export(
    store: str | Path | DeltaStore,
    at: int | None,
    to: str | Path,
    base: str | Path | None = None,
    shard_size: str | int = "5GB",
) -> Path:
    """Write the model at a position as an ordinary checkpoint folder, streamed slice by slice.

    `store` may be a single delta file, which needs its `base`. Tensors are those of the live model
    at that position, bit for bit, in the dtype trained in, under the names of the base's own files;
    a shard holds at most `shard_size` bytes, or one tensor. The folder is there whole or not at
    all. Raises StoreError if it exists and is not empty, BaseError if the base is another one.
    """
    to = as_path(to, "the folder to write")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StoreError(f"{to} exists and is not empty; export writes a new folder")
    checkpoint, deltas = _ingredients(store, at, base)
    _require_weights(checkpoint, deltas)
    write_folder(checkpoint, deltas, to, shard_size)
    return to


def write_folder(
    checkpoint: Checkpoint, deltas: Sequence[Delta], to: Path, shard_size: str | int = "5GB"
) -> None:
    """Write what deltas make of a checkpoint as an ordinary folder, whole or not at all."""
    shards = _shards(checkpoint.weights, _shard_bytes(shard_size))
    with reported(to), new_folder(to) as folder:
        _copy_settings(checkpoint, folder)
        for name, weights in shards.items():
            _write_shard(folder / name, weights, deltas)
        if len(shards) > 1:
            _write_index(folder / _INDEX, shards)


def checkpoint_of(store: DeltaStore, base: str | Path | None = None) -> Checkpoint:
    """The files of a store's base, in the dtype trained in; BaseError if it is another base."""
    source, revision = (base, None) if base else where(store.base, store.path)
    reading = reading_of(store.base, store.path)
    folder = fetch(source, revision, **reading)
    checkpoint = Checkpoint(folder, trained_dtype(store.base, store.path), **reading)
    if (found := checkpoint.fingerprint()) != (expected := store.base["fingerprint"]):
        raise BaseError(
            f"store {store.path} was made on another base than {checkpoint.folder}: "
            f"expected fingerprint {expected[:12]}…, found {found[:12]}…"
        )
    return checkpoint


def verify_base(store: str | Path | DeltaStore, base: str | Path | None = None) -> str:
    """Compare every bit of a store's base with the digest that the store recorded; return it.

    Reads the base's files slice by slice. Raises BaseError for another base, StoreError for a
    store that has no digest.
    """
    opened = as_store(store)
    checkpoint = checkpoint_of(opened, base)
    if "digest" not in opened.base:
        raise StoreError(f"{opened.path} has recorded no full digest of its base")
    if (found := checkpoint.full_digest()) != (expected := opened.base["digest"]):
        raise BaseError(
            f"{checkpoint.folder} differs from the base of store {opened.path}: "
            f"expected digest {expected[:12]}…, found {found[:12]}…"
        )
    return found


def _ingredients(
    source: str | Path | DeltaStore, at: int | None, base: str | Path | None
) -> tuple[Checkpoint, list[Delta]]:
    """The base's files and the deltas of a position of a store, or of a single delta file."""
    if is_delta(source):
        delta = Delta.load(source)
        checkpoint = Checkpoint(fetch(named_base(base)), dtype_of(delta))
        if not delta.parent:
            require_base(delta, str(base), checkpoint.fingerprint())
        return checkpoint, [delta]
    opened = as_store(source)
    deltas = opened.deltas(len(opened) if at is None else at)
    return checkpoint_of(opened, base), deltas


def _require_weights(checkpoint: Checkpoint, deltas: Sequence[Delta]) -> None:
    for delta in deltas:
        if unknown := sorted(delta.shapes.keys() - checkpoint.parameters.keys()):
            raise MismatchError(f"task {delta.task!r} changes {unknown[0]}, which is not there")


def _shard_bytes(size: str | int) -> int:
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise StoreError(f"shard size {error}") from error


def _shards(weights: Sequence[Weight], limit: int) -> dict[str, list[Weight]]:
    """Group weights, in order, into files of at most `limit` bytes."""
    groups: list[list[Weight]] = [[]]
    filled = 0
    for weight in weights:
        size = _row(weight).nbytes
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(weight)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    names = (f"model-{number:05d}-of-{len(groups):05d}" for number in range(1, len(groups) + 1))
    return {f"{name}.safetensors": group for name, group in zip(names, groups, strict=True)}


def _row(weight: Weight) -> Row:
    return Row(weight.key, SAFETENSORS_NAMES[weight.dtype], weight.place.shape)


def _write_shard(path: Path, weights: Sequence[Weight], deltas: Sequence[Delta]) -> None:
    by_row = {_row(weight): weight for weight in weights}
    rows = tensorfile.ordered(by_row)
    with path.open("wb") as file:
        file.write(tensorfile.header(rows, {"format": "pt"}))
        for row in rows:
            for piece in by_row[row].patched(deltas):
                file.write(bits(by_row[row].stored(piece)).numpy().data)


def _write_index(path: Path, shards: Mapping[str, Sequence[Weight]]) -> None:
    placed = {weight.key: name for name, weights in shards.items() for weight in weights}
    total = sum(_row(weight).nbytes for weights in shards.values() for weight in weights)
    content = {"metadata": {"total_size": total}, "weight_map": placed}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_settings(checkpoint: Checkpoint, to: Path) -> None:
    """Copy all but weights, and have the configuration say what is written: dtype, files, ties."""
    subfolder = str(checkpoint.reading.get("subfolder", ""))
    processor = checkpoint.root / processor_folder(str(checkpoint.root), None, subfolder)
    for folder in dict.fromkeys((processor, checkpoint.folder)):
        for file in sorted(folder.iterdir()):
            if file.suffix in _SETTINGS and file.is_file() and not _is_index(file):
                shutil.copyfile(file, to / file.name)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # what older versions wrote
    config.pop("transformers_weights", None)  # names the base's own file
    config["dtype"] = dtype_name(checkpoint.dtype)
    if checkpoint.apart:
        _untie(config)
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_index(file: Path) -> bool:
    """Whether a file is an index of shards, also of a variant (…index.fp16.json)."""
    return ".index." in file.name and file.suffix == ".json"


def _untie(config: dict[str, Any]) -> None:
    """Have a configuration say that a head is a weight of its own.

    transformers finds out by itself, others would put the embedding in its place.
    """
    config["tie_word_embeddings"] = False
    for part in config.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
