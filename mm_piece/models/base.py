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
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as _TEXT_MODELS,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as _IMAGE_MODELS,
)
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import logging
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from mm_piece.data.processor import tokenizer_of
from mm_piece.distributed import is_partitioned
from mm_piece.dtypes import as_dtype
from mm_piece.errors import ModelError, PieceError, format_error
from mm_piece.families import FAMILIES, weights
from mm_piece.models import image_processor  # noqa: F401 - AutoProcessor finds what it registers
from mm_piece.models.placement import require_devices, require_experts, require_values
from mm_piece.models.structure import require_groups
from mm_piece.recipe import require_options
from mm_piece.recipe.base_options import READING_OPTIONS

_COMPUTE_OPTIONS = ("attn_implementation", "experts_implementation")


def load_base(
    base: str | Path,
    revision: str | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a base and its processor (a language model's tokenizer), in evaluation mode.

    `options` go to `from_pretrained` as they are (dtype as a name or a torch.dtype, default
    float32). Raises ModelError, in one line, for an option that `require_options` refuses, and for
    a base that is missing, of an unknown family, quantised, without some of its weights or with
    weights of another shape, or has an adapter beside it.
    """
    options = validate_options(options)
    require_devices(options)
    logging.disable_progress_bar()

    source = resolve_source(base)
    subfolder = options.get("subfolder") or ""
    with raising_model_error(f"cannot load base {source}"):
        config = load_family_config(source, revision, subfolder)
        options["dtype"] = as_dtype(options.get("dtype", "float32"))

        # `require_complete_load` names what does not fit; transformers' own error would refer to a
        # table that it prints.
        options["output_loading_info"] = True
        options["ignore_mismatched_sizes"] = True
        auto_class = auto_class_of(config)
        model, loaded = auto_class.from_pretrained(source, revision=revision, **options)
        processor = _read_processor(source, config, revision, subfolder)

    require_complete_load(source, loaded)
    require_groups(model)
    require_values(model)
    require_experts(model, options)
    return model.eval(), processor


def validate_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of loading a base under their current names; ModelError for any other."""
    try:
        return require_options(options)
    except ValueError as error:
        raise ModelError(f"loading a base: {error}") from error


def load_processor(
    base: str | Path,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Load the processor of a base alone (a language model's tokenizer).

    Raises ModelError as `load_base` does.
    """
    source = resolve_source(base)
    subfolder = options.get("subfolder") or ""
    with raising_model_error(f"cannot load base {source}"):
        config = load_family_config(source, revision, subfolder)
        return _read_processor(source, config, revision, subfolder)


def pick_reading_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that select a base's files, as far as they are set."""
    picked: dict[str, Any] = {}
    for key in READING_OPTIONS:
        if options.get(key) not in (None, ""):
            picked[key] = options[key]
    return picked


def build_meta_model(
    base: str | Path,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Build the model of a base without values, on the meta device, from its configuration alone.

    Only two kinds of `options` matter: where the configuration is, and how the model computes.
    """
    source = resolve_source(base)
    subfolder = options.get("subfolder") or ""
    computing = {key: options[key] for key in _COMPUTE_OPTIONS if key in options}

    with raising_model_error(f"cannot load base {source}"):
        config = load_family_config(source, revision, subfolder)
        auto_class = auto_class_of(config)
        with torch.device("meta"):
            model = auto_class.from_config(config, **computing).eval()
        require_groups(model)
        return model


def load_family_config(
    source: str,
    revision: str | None = None,
    subfolder: str = "",
) -> Any:
    """Load the configuration of a base of a family that can be trained.

    Raises ModelError for another family, and as `load_plain_config` does.
    """
    config = load_plain_config(source, revision, subfolder)
    family = config.model_type
    if family not in FAMILIES and family not in _IMAGE_MODELS and family not in _TEXT_MODELS:
        raise ModelError(
            f"{source} is a model of type {family!r}, which is neither an image-text-to-text model "
            "nor a causal language model of transformers"
        )
    if config.is_encoder_decoder:
        raise ModelError(
            f"{source} is an encoder-decoder model (type {family!r}), which cannot be trained: its "
            "answer does not continue its question"
        )
    return config


def load_plain_config(
    source: str,
    revision: str | None = None,
    subfolder: str = "",
) -> Any:
    """Load the configuration of a model whose files contain its weights as they are.

    Raises ModelError for a model with an adapter beside it, and for a quantised one.
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
    """Return the class whose `from_pretrained` loads a base with this configuration."""
    return AutoModelForImageTextToText if _sees_images(config) else AutoModelForCausalLM


def _sees_images(config: Any) -> bool:
    return config.model_type in _IMAGE_MODELS


def require_complete_load(source: str, loaded: Mapping[str, Any]) -> None:
    """Raise ModelError for weights that the files do not contain, or in another shape.

    transformers draws such weights at random. `loaded` is its loading info.
    """
    for name, found, expected in sorted(loaded["mismatched_keys"]):
        raise ModelError(
            f"{source}: {name} is {list(found)}, the model has {list(expected)}: "
            "its config.json is another model's"
        )

    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ModelError(f"base {source} lacks {len(missing)} weights, {missing[0]!r} among them")


@contextmanager
def raising_model_error(message: str) -> Iterator[None]:
    """Raise a ModelError of one line for every error of a library in the block.

    A base comes from a user, and libraries answer with errors of any kind to one that does not fit.
    """
    try:
        yield
    except PieceError:
        raise
    except Exception as error:
        raise ModelError(f"{message}: {format_error(error)}") from error


def max_positions_of(
    base: str | Path,
    revision: str | None = None,
    **options: Any,
) -> int:
    """Return the number of positions that the base's language model was made for."""
    source = resolve_source(base)
    subfolder = options.get("subfolder") or ""
    with raising_model_error(f"cannot load base {source}"):
        config = load_family_config(source, revision, subfolder)
        return config.get_text_config().max_position_embeddings


def resolve_source(base: str | Path) -> str:
    """Return a folder or hub id as transformers takes it; ModelError for a missing folder."""
    source = str(base)
    if not source:
        raise ModelError("base is empty; give a folder or a hub id")

    # A hub id is `name` or `owner/name`.
    is_path = source.count("/") > 1 or source[:1] in "/."
    if is_path and not Path(source).is_dir():
        raise ModelError(f"cannot load base {source}: there is no such folder")
    return source


def find_processor_folder(source: str, revision: str | None, subfolder: str) -> str:
    """Return the folder of a base with its processor: that of the weights, or the outermost."""
    options: dict[str, Any] = {
        "revision": revision,
        "subfolder": subfolder,
        "_raise_exceptions_for_missing_entries": False,
    }
    own = cached_file(source, TOKENIZER_CONFIG_FILE, **options)
    return subfolder if own else ""


def _read_processor(
    source: str,
    config: Any,
    revision: str | None,
    subfolder: str,
) -> Any:
    """Read the processor of a base, its chat template included."""
    auto_class = AutoProcessor if _sees_images(config) else AutoTokenizer
    folder = find_processor_folder(source, revision, subfolder) if subfolder else ""
    processor = auto_class.from_pretrained(source, revision=revision, subfolder=folder)

    # Older repositories have the template in the tokenizer's configuration.
    if not processor.chat_template:
        processor.chat_template = tokenizer_of(processor).chat_template
    return processor


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the live weights under published names, detached: writes to them change the model.

    Partitioned weights are returned as they are, because the attributes of their shards do not
    outlast `detach`.
    """
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights(model).items():
        found[name] = weight if is_partitioned(weight) else weight.detach()
    return found
