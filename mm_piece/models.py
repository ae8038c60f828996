"""Bases: a transformers model and its processor, from a hub id or a folder, in one dtype."""

import os.path
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils import logging

from mm_piece import preprocessing  # noqa: F401 - AutoProcessor finds what it registers
from mm_piece.delta import fingerprint, full_digest
from mm_piece.errors import ModelError, StoreError
from mm_piece.names import hub_name, rules_of, weights
from mm_piece.sharding import is_cut, shape_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base(base: str | Path, revision: str | None = None, **options: Any) -> tuple[Any, Any]:
    """The base and its processor (a tokenizer for a text model), in evaluation mode.

    `options` go to `from_pretrained` as they stand (dtype as a name or a torch.dtype, default
    float32). Raises ModelError in one line when the base is missing, of an unknown family, or lacks
    weights.
    """
    logging.disable_progress_bar()
    source = _source(base)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        rules_of(config.model_type)
        options["dtype"] = as_dtype(options.get("dtype", "float32"))
        options |= {"revision": revision, "output_loading_info": True}
        model, loaded = _loader(config).from_pretrained(source, **options)
        processor = _processor(source, config, revision)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise _refused(source, error) from error
    if missing := loaded["missing_keys"]:
        raise ModelError(
            f"base {source} lacks {len(missing)} weights, {sorted(missing)[0]!r} among them"
        )
    return model.eval(), processor


def load_processor(base: str | Path, revision: str | None = None) -> Any:
    """The processor of a base alone (a text model's tokenizer); ModelError as in `load_base`."""
    source = _source(base)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        rules_of(config.model_type)
        return _processor(source, config, revision)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise _refused(source, error) from error


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name; ModelError names the allowed ones."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def positions_of(base: str | Path, revision: str | None = None) -> int:
    """How many positions the base's language model was made for."""
    config = AutoConfig.from_pretrained(_source(base), revision=revision)
    return config.get_text_config().max_position_embeddings


def blueprint(
    folder: str | Path, revision: str | None = None
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """What the model of a checkpoint folder (or hub id) has, without loading it.

    The shapes of its parameters under their published names, and the further published names of
    tied ones, which a file may hold or not.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), revision=revision)
        rules_of(config.model_type)
        with torch.device("meta"):
            model = _loader(config).from_config(config)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{folder}: {' '.join(str(error).split())[:300]}") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in weights(model).items()}
    every = model.named_parameters(remove_duplicate=False)
    return shapes, {hub_name(live, config.model_type) for live, _ in every} - shapes.keys()


def _source(base: str | Path) -> str:
    source = str(base)
    if not source:
        raise ModelError("base is empty; give a folder or a hub id")
    if not Path(source).is_dir() and (source.count("/") > 1 or source[:1] in "/."):
        raise ModelError(f"cannot load base {source}: there is no such folder")
    return source


def _refused(source: str, error: Exception) -> ModelError:
    return ModelError(f"cannot load base {source}: {' '.join(str(error).split())[:300]}")


def _processor(source: str, config: Any, revision: str | None) -> Any:
    auto = AutoProcessor if "vision_config" in config else AutoTokenizer
    return auto.from_pretrained(source, revision=revision)


def _loader(config: Any) -> Any:
    return AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The live weights under published names, detached: writing to them writes to the model.

    Weights that lie in parts on several processes stay what they are.
    """
    return {name: p if is_cut(p) else p.detach() for name, p in weights(model).items()}


def describe(model: Any, base: str | Path, revision: str | None, store: Path) -> dict[str, Any]:
    """What a store records of its base: where it lies, its family, dtype, size and fingerprint.

    A folder is recorded relative to the store, so that both can move together; a hub id with its
    revision.
    """
    named = tensors(model)
    first = next(iter(named.values()))
    return {
        **locate(base, revision, store),
        "family": model.config.model_type,
        "dtype": str(first.dtype).removeprefix("torch."),
        "parameters": sum(shape_of(tensor).numel() for tensor in named.values()),
        "bytes": sum(shape_of(t).numel() * t.element_size() for t in named.values()),
        "fingerprint": fingerprint(named),
        "digest": full_digest(named),
    }


def locate(base: str | Path, revision: str | None, store: Path) -> dict[str, Any]:
    """`{"folder": relative to the store}` for a local base, else `{"hub": id, "revision": …}`."""
    if Path(base).is_dir():
        return {"folder": _relative(Path(base).resolve(), store.resolve())}
    return {"hub": str(base), "revision": revision}


def relocated(base: dict[str, Any], store: Path, to: Path) -> dict[str, Any]:
    """What a store at `to` records of the base that `store` records; a folder stays where it is."""
    if "folder" not in base:
        return base
    return {**base, "folder": _relative((store / base["folder"]).resolve(), to.resolve())}


def trained_dtype(base: dict[str, Any], store: Path) -> torch.dtype:
    """The dtype that a store's deltas were trained in; StoreError if it does not say."""
    if "dtype" not in base:
        raise StoreError(f"store {store} does not say which dtype it was trained in")
    return as_dtype(base["dtype"])


def where(base: dict[str, Any], store: Path) -> tuple[str, str | None]:
    """What `load_base` takes for a base that a store recorded: source and revision."""
    if "folder" in base:
        folder = (store / base["folder"]).resolve()
        if not folder.is_dir():
            raise ModelError(f"the base of store {store} is not at {folder}; name it with --base")
        return str(folder), None
    if "hub" not in base:
        raise ModelError(f"store {store} does not say where its base is; name it with --base")
    return base["hub"], base.get("revision")


def _relative(folder: Path, start: Path) -> str:
    return Path(os.path.relpath(folder, start)).as_posix()  # Path climbs only from 3.12 on
