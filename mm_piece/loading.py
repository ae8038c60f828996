"""A model at a position: load it, move it in place, export it as an ordinary checkpoint."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_piece.delta import Delta, digest, fingerprint, put, take
from mm_piece.errors import MismatchError, ModelError, StoreError
from mm_piece.models import as_dtype, load_base, tensors, where
from mm_piece.names import group_of, hub_name
from mm_piece.store import DeltaStore

_SHARD_BYTES = 2**30


@dataclass
class _Attachment:
    """The store a live model belongs to, and the base's values of every entry touched so far."""

    store: DeltaStore
    index: dict[str, Tensor] = field(
        default_factory=dict
    )  # name -> sorted union of touched entries
    base: dict[str, Tensor] = field(default_factory=dict)  # name -> the base's values there


# Nothing is hung on the model itself: it stays the plain transformers model that others know.
_attachments: WeakKeyDictionary[nn.Module, _Attachment] = WeakKeyDictionary()


def load(
    base: str | Path | None = None,
    store: str | Path | DeltaStore | None = None,
    at: int | None = None,
    delta: str | Path | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """The model at a position of a store (default: the last) or with one delta, and its processor.

    `base` defaults to the one the store was made with; the dtype to the one it was trained in
    (another dtype is a cast after composition). Other options go to `from_pretrained`. Nothing is
    applied before everything was verified. Raises PositionError, MismatchError (another base),
    DamageError, ModelError.
    """
    if store is not None and delta is not None:
        raise StoreError("give a store or a single delta, not both")
    if delta is not None:
        return _load_delta(base, Delta.load(Path(delta)), options)
    if store is None:
        if base is None or at:
            raise StoreError("load needs a base, a store, or a base and a delta")
        return load_base(base, **options)
    opened = as_store(store)
    wanted = options.pop("dtype", None)
    source, revision = (
        (str(base), options.pop("revision", None)) if base else where(opened.base, opened.path)
    )
    model, processor = load_base(source, revision, dtype=opened.base["dtype"], **options)
    attach(model, opened)
    checkout(model, len(opened) if at is None else at)
    return (model if wanted is None else model.to(as_dtype(wanted))), processor


def attach(model: nn.Module, store: DeltaStore) -> None:
    """Tie a model that stands at the base to a store; MismatchError if it is another base."""
    found = fingerprint(tensors(model))
    if found != store.base["fingerprint"]:
        expected = store.base["fingerprint"]
        raise MismatchError(
            f"store {store.path} was made on another base: "
            f"expected fingerprint {expected[:12]}…, found {found[:12]}…"
        )
    _attachments[model] = _Attachment(store)


def checkout(model: nn.Module, at: int) -> None:
    """Move a loaded model to position `at` in place; only entries that deltas touched are written.

    Every delta on the way is verified, down to the values it expects to find, before the first
    write. Raises PositionError outside 0…T, StoreError for a model that was not loaded from a
    store.
    """
    if model not in _attachments:
        raise StoreError("checkout needs a model that mm_piece.load took from a store")
    attachment = _attachments[model]
    store = attachment.store = DeltaStore.open(attachment.store.path)
    deltas = store.deltas(at)
    live = tensors(model)
    _same_dtype(live, store)
    index, base = _widened(attachment, deltas, live)
    target = _state(deltas, index, base)
    for name, values in target.items():
        put(live[name], index[name], values)
    attachment.index, attachment.base = index, base


def export(
    store: str | Path | DeltaStore, at: int | None, to: str | Path, base: str | None = None
) -> Path:
    """Write the model at a position as an ordinary checkpoint folder, streamed shard by shard.

    Tensors are those of the live model at that position, bit for bit, in the dtype trained in,
    under the names of the base's own files. Raises StoreError if the folder exists and is not
    empty.
    """
    opened, to = as_store(store), Path(to)
    if to.exists() and any(to.iterdir()):
        raise StoreError(f"{to} exists and is not empty; export writes a new folder")
    folder = _folder(*((base, None) if base else where(opened.base, opened.path)))
    deltas = opened.deltas(len(opened) if at is None else at)
    to.mkdir(parents=True, exist_ok=True)
    _copy_settings(folder, to, opened.base["dtype"])
    _write_shards(_patched(folder, opened, deltas), to)
    return to


def outline(store: str | Path | DeltaStore, at: int | None) -> dict[str, Any]:
    """What the delta at a position (default: the last) holds: its header and a line per tensor."""
    opened = as_store(store)
    delta = opened.delta(len(opened) if at is None else at)
    tensors_of = [
        {
            "name": name,
            "group": group_of(name),
            "shape": list(delta.shapes[name]),
            "entries": len(index),
        }
        for name, index in delta.indices.items()
    ]
    facts = {
        "task": delta.task,
        "base": delta.base,
        "parent": delta.parent,
        "entries": delta.entries,
    }
    return {**facts, **delta.info, "tensors": tensors_of}


def _folder(source: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot get base {source}: {' '.join(str(error).split())}") from error


def as_store(store: str | Path | DeltaStore) -> DeltaStore:
    """A store from its path, or itself."""
    return store if isinstance(store, DeltaStore) else DeltaStore.open(Path(store))


def _load_delta(base: str | Path | None, delta: Delta, options: dict[str, Any]) -> tuple[Any, Any]:
    if base is None:
        raise StoreError("a single delta needs its base: load(base, delta=...)")
    dtypes = {str(values.dtype).removeprefix("torch.") for values in delta.values.values()}
    model, processor = load_base(base, **{"dtype": next(iter(dtypes), "float32"), **options})
    live = tensors(model)
    if not delta.parent and fingerprint(live) != delta.base:
        raise MismatchError(
            f"delta {delta.task!r} belongs to another base (fingerprint {delta.base[:12]}…)"
        )
    delta.apply(live)
    return model, processor


def _widened(
    attachment: _Attachment, deltas: Sequence[Delta], live: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Union of all entries touched so far and by `deltas`, with the base's values there.

    An entry that is new to the union was never written, so the live model still holds the base's
    value.
    """
    index, base = dict(attachment.index), dict(attachment.base)
    for name in {name for delta in deltas for name in delta.indices}:
        if name not in live:
            raise MismatchError(f"a delta names {name!r}, which the model does not have")
        known = index.get(name, torch.empty(0, dtype=torch.int64))
        parts = [d.indices[name].to(torch.int64) for d in deltas if name in d.indices]
        union = torch.cat([known, *parts]).unique()
        if len(union) and int(union[-1]) >= live[name].numel():
            raise MismatchError(f"a delta reaches past the end of {name!r}")
        values = take(live[name], union).cpu()
        put(values, torch.searchsorted(union, known), base.get(name, values[:0]))
        index[name], base[name] = union, values
    return index, base


def _state(
    deltas: Sequence[Delta], index: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Values of the union's entries after `deltas`, each checked against what it replaces."""
    state = {name: values.clone() for name, values in base.items()}
    for delta in deltas:
        for name, touched in delta.indices.items():
            at = torch.searchsorted(index[name], touched.to(torch.int64))
            if digest(take(state[name], at)) != delta.before[name]:
                raise MismatchError(
                    f"delta {delta.task!r} expects other values in {name!r}: wrong base or order"
                )
            put(state[name], at, delta.values[name])
    return state


def _same_dtype(live: Mapping[str, Tensor], store: DeltaStore) -> None:
    found = str(next(iter(live.values())).dtype).removeprefix("torch.")
    if found != store.base["dtype"]:
        raise MismatchError(
            f"the model is {found}, the store's deltas are {store.base['dtype']}: "
            "load it in that dtype to move it"
        )


def _patched(
    folder: Path, store: DeltaStore, deltas: Sequence[Delta]
) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors one by one, under the names of its files, with the deltas applied."""
    dtype, family = as_dtype(store.base["dtype"]), store.base["family"]
    seen: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - not a mapping
                tensor, name = shard.get_tensor(key), hub_name(key, family)
                tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
                _apply(deltas, name, tensor)
                seen.add(name)
                yield key, tensor
    if unknown := {name for delta in deltas for name in delta.indices} - seen:
        raise ModelError(f"the base's files hold no tensor {sorted(unknown)[0]!r}")


def _apply(deltas: Sequence[Delta], name: str, tensor: Tensor) -> None:
    for delta in deltas:
        if name not in delta.indices:
            continue
        if digest(take(tensor, delta.indices[name])) != delta.before[name]:
            raise MismatchError(
                f"delta {delta.task!r} expects other values in {name!r}: wrong base"
            )
        put(tensor, delta.indices[name], delta.values[name])


def _write_shards(named: Iterator[tuple[str, Tensor]], to: Path) -> None:
    """Shards of at most 1 GiB (a larger tensor alone in its own) and the index of them."""
    shards: list[dict[str, int]] = []
    shard: dict[str, Tensor] = {}
    for key, tensor in named:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > _SHARD_BYTES:
            shards.append(_write_shard(shard, to, len(shards)))
            shard = {}
        shard[key] = tensor
    shards.append(_write_shard(shard, to, len(shards)))
    if len(shards) == 1:
        (to / _shard_name(0)).rename(to / "model.safetensors")
        return
    weight_map = {key: _shard_name(number) for number, keys in enumerate(shards) for key in keys}
    total = sum(size for keys in shards for size in keys.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (to / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_shard(shard: dict[str, Tensor], to: Path, number: int) -> dict[str, int]:
    save_file(shard, to / _shard_name(number), metadata={"format": "pt"})
    return {key: tensor.nbytes for key, tensor in shard.items()}


def _shard_name(number: int) -> str:
    return f"model-{number + 1:05d}.safetensors"


def _copy_settings(folder: Path, to: Path, dtype: str) -> None:
    """Everything but weights, with the dtype trained in written into the configuration."""
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith(
            ".index.json"
        ):
            shutil.copyfile(file, to / file.name)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = dtype
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
