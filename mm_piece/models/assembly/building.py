"""Tower + projector + language model, written as one ordinary LLaVA checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mm_piece.deltas.delta import compute_fingerprint
from mm_piece.dtypes import as_dtype
from mm_piece.errors import ModelError
from mm_piece.files.atomic import creating_folder
from mm_piece.models.assembly.language import LanguageModel, load_language
from mm_piece.models.assembly.openclip import load_vision_encoder
from mm_piece.models.assembly.towers import VisionEncoderKind, convert_encoder, encoder_kind_of
from mm_piece.models.base import raising_model_error
from mm_piece.models.checkpoint import Checkpoint
from mm_piece.models.image_processor import PilBackend, make_image_processor

_UNTRAINED_NOTE = (
    "the projector is untrained (seed {seed}): train it first, for example with "
    "`select: {{density: {{projector: 1.0}}}}`"
)


@dataclass(frozen=True)
class AssembledBase:
    """A new base, and what there is to know about it, a line each."""

    folder: Path
    notes: tuple[str, ...]


def assemble(
    vision: str,
    language: str | Path,
    to: str | Path,
    pretrained: str | None = None,
    *,
    feature_layer: int | None = None,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
) -> AssembledBase:
    """Write a LLaVA of an open_clip tower, a new projector and a causal language model.

    `vision` and `pretrained` name the tower as open_clip does (see `load_tower`), `language` a
    folder or hub id. `feature_layer` says which hidden states of the tower the projector reads;
    default: LLaVA's -2, for SigLIP LLaVA-OneVision's -1. The projector's weights are drawn from
    `seed`: it must be trained before the model can tell anything about images. The folder `to` is
    there whole or not at all. Raises ModelError, also if `to` exists and is not empty.
    """
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ModelError(f"{to} exists and is not empty; assemble writes a new folder")
    weights_dtype = as_dtype(dtype)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.default_generator.manual_seed(seed)
        visual: Any = load_vision_encoder(vision, pretrained)
        kind = encoder_kind_of(visual, vision)
        settings, encoder_weights = convert_encoder(visual, vision)
        images = make_image_processor(visual.preprocess_cfg)
        llm = load_language(str(language), weights_dtype)
        with raising_model_error(f"{language} and {vision} do not make a LLaVA"):
            config = _make_llava_config(kind, settings, llm, feature_layer)
            torch.default_generator.manual_seed(seed)
            weights = _collect_weights(
                encoder_weights, LlavaMultiModalProjector(config), llm, weights_dtype
            )
            model = _build_llava(config, llm, weights_dtype)
            capped = _require_same_logits(model, llm, str(language))
    notes = [_describe_encoder(config, kind), *llm.notes, *capped]
    _write_checkpoint(to, model, weights, _make_processor(settings, kind, images, llm))
    return AssembledBase(to, (*notes, _UNTRAINED_NOTE.format(seed=seed)))


def _describe_encoder(config: LlavaConfig, kind: VisionEncoderKind) -> str:
    return (
        f"the tower is a {kind.name}; its hidden states {config.vision_feature_layer} "
        f"make {config.image_seq_length} tokens an image"
    )


def _make_llava_config(
    kind: VisionEncoderKind,
    settings: PreTrainedConfig,
    llm: LanguageModel,
    feature_layer: int | None,
) -> LlavaConfig:
    depth = settings.num_hidden_layers
    layer = kind.feature_layer if feature_layer is None else feature_layer
    if not -depth - 1 <= layer <= depth:
        raise ModelError(f"feature layer {layer} is out of {-depth - 1}…{depth}")
    return LlavaConfig(
        vision_config=settings,
        text_config=llm.model.config,
        image_token_index=llm.image_token_id,
        image_seq_length=(settings.image_size // settings.patch_size) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=_feature_strategy_of(kind),
        tie_word_embeddings=llm.is_tied,
    )


def _feature_strategy_of(kind: VisionEncoderKind) -> Literal["default", "full"]:
    """transformers' word for whether the first token is dropped."""
    return "default" if kind.num_class_tokens else "full"


def _collect_weights(
    encoder_weights: Mapping[str, Tensor],
    projector: nn.Module,
    llm: LanguageModel,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """All weights under published names, in the dtype to be written."""
    named = {
        f"vision_tower.vision_model.{name}": weight for name, weight in encoder_weights.items()
    }
    for name, weight in projector.state_dict().items():
        named[f"multi_modal_projector.{name}"] = weight
    named |= llm.published_weights()
    return {name: weight.detach().to(dtype).contiguous() for name, weight in named.items()}


def _build_llava(config: LlavaConfig, llm: LanguageModel, dtype: torch.dtype) -> Any:
    """The model as transformers builds it around the language model; the rest holds no data."""
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.to(dtype)
    model.model.language_model = llm.model.base_model
    model.lm_head = llm.model.get_output_embeddings()
    model.generation_config = GenerationConfig(
        bos_token_id=llm.tokenizer.bos_token_id,
        eos_token_id=llm.end_token_ids,
        pad_token_id=llm.tokenizer.pad_token_id,
    )
    return model.eval()


@torch.inference_mode()
def _require_same_logits(model: Any, llm: LanguageModel, source: str) -> list[str]:
    """Raise ModelError unless the language model says inside LLaVA what it says alone.

    LLaVA computes logits from hidden states by the head alone. A cap keeps their order, so it is
    only noted; anything else that a model does to its logits would be lost.
    """
    ids = torch.arange(8)[None]
    standalone, inside_llava = llm.model(input_ids=ids).logits, model(input_ids=ids).logits
    cap = llm.model.config.to_dict().get("final_logit_softcapping")
    expected = cap * torch.tanh(inside_llava / cap) if cap else inside_llava
    if not torch.allclose(standalone.float(), expected.float(), rtol=1e-2, atol=1e-5):
        raise ModelError(
            f"{source}: LLaVA cannot hold {llm.model.config.model_type} models: "
            "it has no place for what they do to their logits"
        )
    return [f"logits are no longer capped at {cap:g}; their order stays"] if cap else []


def _make_processor(
    settings: PreTrainedConfig, kind: VisionEncoderKind, images: PilBackend, llm: LanguageModel
) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=images,
        tokenizer=llm.tokenizer,
        patch_size=settings.patch_size,
        vision_feature_select_strategy=_feature_strategy_of(kind),
        num_additional_image_tokens=kind.num_class_tokens,
        chat_template=llm.tokenizer.chat_template,
    )


def _write_checkpoint(
    to: Path, model: Any, weights: dict[str, Tensor], processor: LlavaProcessor
) -> None:
    """Write everything beside `to`, look at it as a base will be looked at, and move it there."""
    with _reporting_write_errors(to), creating_folder(to) as folder:
        # The names are the published ones already, which those that transformers would write are
        # not. What it is given it takes apart while it writes.
        given = {"state_dict": dict(weights), "save_original_format": False}
        model.save_pretrained(folder, max_shard_size="5GB", **given)
        processor.save_pretrained(folder)
        if Checkpoint(folder, model.dtype).compute_fingerprint() != compute_fingerprint(weights):
            raise ModelError(f"{to}: transformers wrote other weights than it was given")
        for file in folder.iterdir():
            file.chmod(0o644)  # some writers keep theirs to their owner


@contextmanager
def _reporting_write_errors(to: Path) -> Iterator[None]:
    """Turn what the system refuses into one line; safetensors' writer has an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ModelError(f"{to}: cannot be written: {reason}") from error
