"""A position as an ordinary checkpoint folder: read slice by slice, patched, written."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_piece.deltas.delta import Delta
from mm_piece.dtypes import SAFETENSORS_NAMES, dtype_name, view_bits
from mm_piece.errors import BaseError, MismatchError, StoreError, as_path
from mm_piece.files import safetensors as tensorfile
from mm_piece.files.atomic import creating_folder, reporting_os_errors
from mm_piece.files.safetensors import TensorSpec
from mm_piece.models.base import find_processor_folder
from mm_piece.models.checkpoint import Checkpoint, CheckpointTensor, fetch_checkpoint
from mm_piece.recipe import parse_bytes
from mm_piece.store.base_record import base_source, reading_of, trained_dtype
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.loading import (
    as_store,
    dtype_of,
    is_delta_file,
    require_base_source,
    require_delta_base,
)

_INDEX_NAME = "model.safetensors.index.json"
_SETTINGS_SUFFIXES = (".json", ".jinja", ".txt", ".model")


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
    checkpoint, deltas = _read_base_and_deltas(store, at, base)
    _require_known_weights(checkpoint, deltas)
    write_folder(checkpoint, deltas, to, shard_size)
    return to


def write_folder(
    checkpoint: Checkpoint, deltas: Sequence[Delta], to: Path, shard_size: str | int = "5GB"
) -> None:
    """Write what deltas make of a checkpoint as an ordinary folder, whole or not at all."""
    shards = _split_into_shards(checkpoint.weights, _parse_shard_size(shard_size))
    with reporting_os_errors(to), creating_folder(to) as folder:
        _copy_settings(checkpoint, folder)
        for name, weights in shards.items():
            _write_shard(folder / name, weights, deltas)
        if len(shards) > 1:
            _write_index(folder / _INDEX_NAME, shards)


def open_base_checkpoint(store: DeltaStore, base: str | Path | None = None) -> Checkpoint:
    """The files of a store's base, in the dtype trained in; BaseError if it is another base."""
    source, revision = (base, None) if base else base_source(store.base, store.path)
    reading = reading_of(store.base, store.path)
    folder = fetch_checkpoint(source, revision, **reading)
    checkpoint = Checkpoint(folder, trained_dtype(store.base, store.path), **reading)
    if (found := checkpoint.compute_fingerprint()) != (expected := store.base["fingerprint"]):
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
    checkpoint = open_base_checkpoint(opened, base)
    if "digest" not in opened.base:
        raise StoreError(f"{opened.path} has recorded no full digest of its base")
    if (found := checkpoint.compute_full_digest()) != (expected := opened.base["digest"]):
        raise BaseError(
            f"{checkpoint.folder} differs from the base of store {opened.path}: "
            f"expected digest {expected[:12]}…, found {found[:12]}…"
        )
    return found


def _read_base_and_deltas(
    source: str | Path | DeltaStore, at: int | None, base: str | Path | None
) -> tuple[Checkpoint, list[Delta]]:
    """The base's files and the deltas of a position of a store, or of a single delta file."""
    if is_delta_file(source):
        delta = Delta.load(source)
        checkpoint = Checkpoint(fetch_checkpoint(require_base_source(base)), dtype_of(delta))
        if not delta.parent:
            require_delta_base(delta, str(base), checkpoint.compute_fingerprint())
        return checkpoint, [delta]
    opened = as_store(source)
    deltas = opened.deltas(len(opened) if at is None else at)
    return open_base_checkpoint(opened, base), deltas


def _require_known_weights(checkpoint: Checkpoint, deltas: Sequence[Delta]) -> None:
    for delta in deltas:
        if unknown := sorted(delta.shapes.keys() - checkpoint.parameters.keys()):
            raise MismatchError(f"task {delta.task!r} changes {unknown[0]}, which is not there")


def _parse_shard_size(size: str | int) -> int:
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise StoreError(f"shard size {error}") from error


def _split_into_shards(
    weights: Sequence[CheckpointTensor], limit: int
) -> dict[str, list[CheckpointTensor]]:
    """Group weights, in order, into files of at most `limit` bytes."""
    groups: list[list[CheckpointTensor]] = [[]]
    filled = 0
    for weight in weights:
        size = _spec_of(weight).nbytes
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(weight)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    names = (f"model-{number:05d}-of-{len(groups):05d}" for number in range(1, len(groups) + 1))
    return {f"{name}.safetensors": group for name, group in zip(names, groups, strict=True)}


def _spec_of(weight: CheckpointTensor) -> TensorSpec:
    return TensorSpec(weight.key, SAFETENSORS_NAMES[weight.dtype], weight.location.shape)


def _write_shard(path: Path, weights: Sequence[CheckpointTensor], deltas: Sequence[Delta]) -> None:
    weights_by_spec = {_spec_of(weight): weight for weight in weights}
    specs = tensorfile.sort_tensor_specs(weights_by_spec)
    with path.open("wb") as file:
        file.write(tensorfile.build_header(specs, {"format": "pt"}))
        for spec in specs:
            for piece in weights_by_spec[spec].iter_patched(deltas):
                file.write(view_bits(weights_by_spec[spec].to_file_layout(piece)).numpy().data)


def _write_index(path: Path, shards: Mapping[str, Sequence[CheckpointTensor]]) -> None:
    weight_map = {weight.key: name for name, weights in shards.items() for weight in weights}
    total = sum(_spec_of(weight).nbytes for weights in shards.values() for weight in weights)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_settings(checkpoint: Checkpoint, to: Path) -> None:
    """Copy all but weights, and have the configuration say what is written: dtype, files, ties."""
    subfolder = str(checkpoint.reading.get("subfolder", ""))
    processor = checkpoint.root / find_processor_folder(str(checkpoint.root), None, subfolder)
    for folder in dict.fromkeys((processor, checkpoint.folder)):
        for file in sorted(folder.iterdir()):
            if file.suffix in _SETTINGS_SUFFIXES and file.is_file() and not _is_shard_index(file):
                shutil.copyfile(file, to / file.name)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # what older versions wrote
    config.pop("transformers_weights", None)  # names the base's own file
    config["dtype"] = dtype_name(checkpoint.dtype)
    if checkpoint.has_untied:
        _untie_embeddings(config)
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_shard_index(file: Path) -> bool:
    """Whether a file is an index of shards, also of a variant (…index.fp16.json)."""
    return ".index." in file.name and file.suffix == ".json"


def _untie_embeddings(config: dict[str, Any]) -> None:
    """Have a configuration say that a head is a weight of its own.

    transformers finds out by itself, others would put the embedding in its place.
    """
    config["tie_word_embeddings"] = False
    for section in config.values():
        if isinstance(section, dict) and "tie_word_embeddings" in section:
            section["tie_word_embeddings"] = False
