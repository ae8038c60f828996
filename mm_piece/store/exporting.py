"""A position as an ordinary checkpoint folder: read slice by slice, patched, written."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_piece.deltas.delta import Delta
from mm_piece.dtypes import (
    SAFETENSORS_NAMES,
    dtype_name,
    view_bits,
)
from mm_piece.errors import (
    BaseError,
    MismatchError,
    StoreError,
    as_path,
)
from mm_piece.files import tensor_specs
from mm_piece.files.atomic import creating_folder, reporting_os_errors
from mm_piece.files.tensor_specs import TensorSpec
from mm_piece.models.base import find_processor_folder
from mm_piece.models.checkpoint import Checkpoint, fetch_checkpoint
from mm_piece.models.checkpoint_tensor import CheckpointTensor
from mm_piece.recipe import parse_bytes
from mm_piece.store.base_location import base_source
from mm_piece.store.base_reading import reading_of, trained_dtype
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.inspection import as_store, is_delta_file
from mm_piece.store.loading import (
    dtype_of,
    require_base_source,
    require_delta_base,
)

_INDEX_NAME = "model.safetensors.index.json"
# What was measured of the base, by us or by transformers' scripts: it is not true of the export.
_RESULT_FILES = {
    "ability.json",
    "all_results.json",
    "eval_results.json",
    "predict_results.json",
    "train_results.json",
    "trainer_state.json",
}
_SETTINGS_SUFFIXES = (".json", ".jinja", ".txt", ".model")  # also of templates and tokenizers


def export(
    store: str | Path | DeltaStore,
    to: str | Path,
    at: int | None = None,
    *,
    base: str | Path | None = None,
    shard_size: str | int = "5GB",
) -> Path:
    """Write the model at a position as an ordinary checkpoint folder, streamed slice by slice.

    The position defaults to the last. `store` may be a single delta file, which needs its `base`.
    Tensors equal those of the live model at that position, bit for bit, in the dtype trained in.
    Their names are those of the base's own files. A shard has at most `shard_size` bytes, or one
    tensor. The folder is complete or not there at all. Raises StoreError if it exists and is not
    empty, BaseError if the base is another one.
    """
    to = as_path(to, "the folder to write")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StoreError(f"{to} exists and is not empty; export writes a new folder")

    checkpoint, deltas = _read_base_and_deltas(store, at, base)
    _require_known_weights(checkpoint, deltas)
    write_folder(checkpoint, deltas, to, shard_size)
    return to


def write_folder(
    checkpoint: Checkpoint,
    deltas: Sequence[Delta],
    to: Path,
    shard_size: str | int = "5GB",
) -> None:
    """Write a checkpoint with deltas applied as an ordinary folder, complete or not at all."""
    limit = _parse_shard_size(shard_size)
    shards = _split_into_shards(checkpoint.weights, limit)
    # the folder gets its name last, when all files are complete
    with reporting_os_errors(to), creating_folder(to) as folder:
        _copy_settings(checkpoint, folder)
        for name, weights in shards.items():
            _write_shard(folder / name, weights, deltas)
        if len(shards) > 1:
            _write_index(folder / _INDEX_NAME, shards)


def open_base_checkpoint(
    store: DeltaStore,
    base: str | Path | None = None,
) -> Checkpoint:
    """Open the files of a store's base, in the dtype trained in; BaseError if another base."""
    source, revision = (base, None) if base else base_source(store.base, store.path)
    options = reading_of(store.base, store.path)
    folder = fetch_checkpoint(source, revision, **options)
    dtype = trained_dtype(store.base, store.path)
    checkpoint = Checkpoint(folder, dtype, **options)

    found = checkpoint.compute_fingerprint()
    expected = store.base.fingerprint
    if found != expected:
        raise BaseError(
            f"store {store.path} was made on another base than {checkpoint.folder}: "
            f"expected fingerprint {expected[:12]}…, found {found[:12]}…"
        )
    return checkpoint


def verify_base(
    store: str | Path | DeltaStore,
    base: str | Path | None = None,
) -> str:
    """Compare every bit of a store's base with the recorded digest; return the digest.

    The base's files are read slice by slice. Raises BaseError for another base, StoreError for a
    store that has no digest.
    """
    opened = as_store(store)
    checkpoint = open_base_checkpoint(opened, base)
    expected = opened.base.digest
    if expected is None:
        raise StoreError(f"{opened.path} has recorded no full digest of its base")

    found = checkpoint.compute_full_digest()
    if found != expected:
        raise BaseError(
            f"{checkpoint.folder} differs from the base of store {opened.path}: "
            f"expected digest {expected[:12]}…, found {found[:12]}…"
        )
    return found


def _read_base_and_deltas(
    source: str | Path | DeltaStore,
    at: int | None,
    base: str | Path | None,
) -> tuple[Checkpoint, list[Delta]]:
    """Open the base's files and read the deltas of a position of a store, or a delta file."""
    if is_delta_file(source):
        delta = Delta.load(source)
        return _open_delta_base(delta, base), [delta]

    opened = as_store(source)
    last = len(opened) if at is None else at
    deltas = opened.deltas(last)
    return open_base_checkpoint(opened, base), deltas


def _open_delta_base(delta: Delta, base: str | Path | None) -> Checkpoint:
    """Open the base's files of a single delta; BaseError if it starts from another base."""
    folder = fetch_checkpoint(require_base_source(base))
    checkpoint = Checkpoint(folder, dtype_of(delta))
    # a later delta of a chain does not start from its base; writing checks the values before
    if not delta.parent:
        found = checkpoint.compute_fingerprint()
        require_delta_base(delta, str(base), found)
    return checkpoint


def _require_known_weights(
    checkpoint: Checkpoint,
    deltas: Sequence[Delta],
) -> None:
    """Raise MismatchError if a delta changes a weight that the checkpoint does not have."""
    # checked before the first write, not when the weight's turn would have come
    known = checkpoint.parameters.keys()
    for delta in deltas:
        unknown = sorted(delta.shapes.keys() - known)
        if unknown:
            raise MismatchError(f"task {delta.task!r} changes {unknown[0]}, which is not there")


def _parse_shard_size(size: str | int) -> int:
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise StoreError(f"shard size {error}") from error


def _split_into_shards(
    weights: Sequence[CheckpointTensor],
    limit: int,
) -> dict[str, list[CheckpointTensor]]:
    """Group weights, in order, into files of at most `limit` bytes."""
    groups: list[list[CheckpointTensor]] = [[]]
    filled = 0
    for weight in weights:
        size = _spec_of(weight).nbytes
        # a tensor above the limit gets a file of its own: files cannot share a tensor
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(weight)
        filled += size

    total = len(groups)
    if total == 1:
        return {"model.safetensors": groups[0]}

    # the names that transformers gives to its own shards
    shards = {}
    for number, group in enumerate(groups, 1):
        shards[f"model-{number:05d}-of-{total:05d}.safetensors"] = group
    return shards


def _spec_of(weight: CheckpointTensor) -> TensorSpec:
    """Return name, dtype and shape of a weight in the exported files."""
    return TensorSpec(
        weight.key,
        SAFETENSORS_NAMES[weight.dtype],
        weight.location.shape,
    )


def _write_shard(
    path: Path,
    weights: Sequence[CheckpointTensor],
    deltas: Sequence[Delta],
) -> None:
    """Write one safetensors file; memory has one slice of one weight at a time."""
    weights_by_spec = {_spec_of(weight): weight for weight in weights}
    specs = tensor_specs.sort_tensor_specs(weights_by_spec)  # the order of safetensors' own writer
    with path.open("wb") as file:
        # transformers looks here for the framework that wrote the file
        header = tensor_specs.build_header(specs, {"format": "pt"})
        file.write(header)
        for spec in specs:
            weight = weights_by_spec[spec]
            for piece in weight.iter_patched(deltas):
                stored = weight.to_file_layout(piece)
                file.write(view_bits(stored).numpy().data)


def _write_index(
    path: Path,
    shards: Mapping[str, Sequence[CheckpointTensor]],
) -> None:
    """Write the index of a sharded checkpoint: which file has which weight."""
    total = 0
    weight_map = {}
    for name, weights in shards.items():
        for weight in weights:
            total += _spec_of(weight).nbytes
            weight_map[weight.key] = name

    content = {
        "metadata": {"total_size": total},
        "weight_map": weight_map,
    }
    text = json.dumps(content, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def _copy_settings(checkpoint: Checkpoint, to: Path) -> None:
    """Copy all files but weights and results; set dtype, files and ties as they are exported."""
    root = checkpoint.root
    subfolder = str(checkpoint.reading.get("subfolder", ""))
    processor = root / find_processor_folder(str(root), None, subfolder)
    # the weights' folder comes last: its files win over the processor's of the same name
    for folder in dict.fromkeys((processor, checkpoint.folder)):
        for file in sorted(folder.iterdir()):
            if _is_setting(file):
                shutil.copyfile(file, to / file.name)

    config_file = to / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the older name of "dtype"
    config.pop("transformers_weights", None)  # names the base's own file
    config["dtype"] = dtype_name(checkpoint.dtype)
    if checkpoint.has_untied:
        _untie_embeddings(config)

    text = json.dumps(config, indent=2) + "\n"
    config_file.write_text(text, encoding="utf-8")


def _is_setting(file: Path) -> bool:
    """Return whether a file says how a model or its processor is made."""
    if file.name in _RESULT_FILES or _is_shard_index(file):
        return False
    return file.suffix in _SETTINGS_SUFFIXES and file.is_file()


def _is_shard_index(file: Path) -> bool:
    """Return whether a file is an index of shards, also of a variant (…index.fp16.json)."""
    return ".index." in file.name and file.suffix == ".json"


def _untie_embeddings(config: dict[str, Any]) -> None:
    """Set in a configuration, at every level, that the output head is a weight of its own.

    transformers notices by itself; other libraries would put the embedding in its place.
    """
    config["tie_word_embeddings"] = False
    # a vision-language model has the setting once more for its language model
    for section in config.values():
        if isinstance(section, dict) and "tie_word_embeddings" in section:
            section["tie_word_embeddings"] = False
