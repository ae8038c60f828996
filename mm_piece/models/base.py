"""Bases: a transformers model and its processor, from a hub id or a folder, in one dtype."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import logging
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from mm_piece.data import tokenizer_of
from mm_piece.distributed import is_partitioned
from mm_piece.dtypes import as_dtype
from mm_piece.errors import ModelError, PieceError, format_error
from mm_piece.families import rules_of, weights
from mm_piece.models import image_processor  # noqa: F401 - AutoProcessor finds what it registers
from mm_piece.models.placement import require_devices, require_experts, require_values
from mm_piece.recipe import require_options

# Options of `from_pretrained` that say which of a base's files hold its weights. A store records
# them: without them it would be another base.
READING_OPTIONS = ("subfolder", "variant", "use_safetensors")
_COMPUTE_OPTIONS = ("attn_implementation", "experts_implementation")


def load_base(base: str | Path, revision: str | None = None, **options: Any) -> tuple[Any, Any]:
    """The base and its processor (a tokenizer for a text model), in evaluation mode.

    `options` go to `from_pretrained` as they stand (dtype as a name or a torch.dtype, default
    float32). Raises ModelError in one line for an option that is not among `options_of`'s, and when
    the base is missing, of an unknown family, lacks weights or has some of another shape, is
    quantised, or has an adapter beside it.
    """
    options = validate_options(options)
    require_devices(options)
    logging.disable_progress_bar()
    source, subfolder = resolve_source(base), options.get("subfolder") or ""
    with raising_model_error(f"cannot load base {source}"):
        config = load_family_config(source, revision, subfolder)
        options["dtype"] = as_dtype(options.get("dtype", "float32"))
        # What does not fit is told by name below; transformers would point to a printed table.
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, loaded = auto_class_of(config).from_pretrained(source, revision=revision, **options)
        processor = _read_processor(source, config, revision, subfolder)
    require_complete_load(source, loaded)
    require_values(model)
    require_experts(model, options)
    return model.eval(), processor


def validate_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What may be said of how a base loads, under the names of today; ModelError for the rest."""
    try:
        return require_options(options)
    except ValueError as error:
        raise ModelError(f"loading a base: {error}") from error


def load_processor(base: str | Path, revision: str | None = None, **options: Any) -> Any:
    """The processor of a base alone (a text model's tokenizer); ModelError as in `load_base`."""
    source, subfolder = resolve_source(base), options.get("subfolder") or ""
    with raising_model_error(f"cannot load base {source}"):
        config = load_family_config(source, revision, subfolder)
        return _read_processor(source, config, revision, subfolder)


def pick_reading_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s options that say which files a base is read from."""
    return {key: options[key] for key in READING_OPTIONS if options.get(key) not in (None, "")}


def build_meta_model(base: str | Path, revision: str | None = None, **options: Any) -> Any:
    """The model of a base without values (on the meta device), from its configuration alone.

    Of `options` it takes where the configuration lies, and how the model computes.
    """
    source, computing = (
        resolve_source(base),
        {key: options[key] for key in _COMPUTE_OPTIONS if key in options},
    )
    with raising_model_error(f"cannot load base {source}"):
        config = load_family_config(source, revision, options.get("subfolder") or "")
        with torch.device("meta"):
            return auto_class_of(config).from_config(config, **computing).eval()


def load_family_config(source: str, revision: str | None = None, subfolder: str = "") -> Any:
    """The configuration of a base of a known family; ModelError as `plain_config`."""
    config = load_plain_config(source, revision, subfolder)
    rules_of(config.model_type)
    return config


def load_plain_config(source: str, revision: str | None = None, subfolder: str = "") -> Any:
    """The configuration of a model whose files hold its weights as they are.

    Raises ModelError for one with an adapter beside it, and for a quantised one.
    """
    if find_adapter_config_file(source, revision=revision, subfolder=subfolder):
        raise ModelError(
            f"{source} holds adapter_config.json: transformers would add that adapter to the "
            "weights. Remove the adapter's files if it is merged already, else merge it first "
            "(PEFT's merge_and_unload) and save the model alone"
        )
    config = AutoConfig.from_pretrained(source, revision=revision, subfolder=subfolder)
    if "quantization_config" in config.to_dict():
        raise ModelError(
            f"{source} is quantised (quantization_config in its config.json): its files do not "
            "hold the weights that are trained; name the base that it was made from"
        )
    return config


def auto_class_of(config: Any) -> Any:
    """The class whose `from_pretrained` loads a base of such a configuration."""
    return AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM


def require_complete_load(source: str, loaded: Mapping[str, Any]) -> None:
    """Raise ModelError for weights that transformers could not take from the files.

    It would draw them at random.
    """
    for name, found, expected in sorted(loaded["mismatched_keys"]):
        raise ModelError(
            f"{source}: {name} is {list(found)}, the model has {list(expected)}: "
            "its config.json is another model's"
        )
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(f"base {source} lacks {len(missing)} weights, {missing[0]!r} among them")


@contextmanager
def raising_model_error(message: str) -> Iterator[None]:
    """Context in which whatever a library raises becomes a ModelError of one line.

    A base comes from a user, and libraries answer to what does not fit with errors of any kind.
    """
    try:
        yield
    except PieceError:
        raise
    except Exception as error:
        raise ModelError(f"{message}: {format_error(error)}") from error


def max_positions_of(base: str | Path, revision: str | None = None, **options: Any) -> int:
    """How many positions the base's language model was made for."""
    source = resolve_source(base)
    with raising_model_error(f"cannot load base {source}"):
        config = load_family_config(source, revision, options.get("subfolder") or "")
        return config.get_text_config().max_position_embeddings


def resolve_source(base: str | Path) -> str:
    """A folder or hub id as transformers takes it; ModelError for a folder that is not there."""
    source = str(base)
    if not source:
        raise ModelError("base is empty; give a folder or a hub id")
    if not Path(source).is_dir() and (source.count("/") > 1 or source[:1] in "/."):
        raise ModelError(f"cannot load base {source}: there is no such folder")
    return source


def find_processor_folder(source: str, revision: str | None, subfolder: str) -> str:
    """The folder of a base that its processor lies in: that of the weights, or the outermost."""
    options: dict[str, Any] = {"revision": revision, "subfolder": subfolder}
    own = cached_file(
        source, TOKENIZER_CONFIG_FILE, _raise_exceptions_for_missing_entries=False, **options
    )
    return subfolder if own else ""


def _read_processor(source: str, config: Any, revision: str | None, subfolder: str) -> Any:
    auto = AutoProcessor if "vision_config" in config else AutoTokenizer
    folder = find_processor_folder(source, revision, subfolder) if subfolder else ""
    processor = auto.from_pretrained(source, revision=revision, subfolder=folder)
    if not processor.chat_template:  # older repositories keep it in the tokenizer's configuration
        processor.chat_template = tokenizer_of(processor).chat_template
    return processor


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The live weights under published names, detached: writing to them writes to the model.

    Weights that lie in parts on several processes stay what they are.
    """
    return {name: p if is_partitioned(p) else p.detach() for name, p in weights(model).items()}
