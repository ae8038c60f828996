"""`assemble`: a vision encoder, a projector and a language model as one LLaVA checkpoint."""

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
    """A new base, and notes on it, a line each."""

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
    """Write a LLaVA of an open_clip vision encoder, a new projector and a causal language model.

    `vision` and `pretrained` name the encoder as open_clip does (see `load_vision_encoder`),
    `language` is a folder or hub id. `feature_layer` selects the hidden states of the encoder that
    the projector reads; the default is LLaVA's -2, and for SigLIP LLaVA-OneVision's -1. The
    projector's weights are drawn from `seed`: train it before the model can answer about images.
    The folder `to` is written completely or not at all. Raises ModelError, also if `to` exists and
    is not empty.
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
            # Again: the projector must not depend on what was drawn while models loaded.
            torch.default_generator.manual_seed(seed)
            projector = LlavaMultiModalProjector(config)
            weights = _collect_weights(encoder_weights, projector, llm, weights_dtype)
            model = _build_llava(config, llm, weights_dtype)
            logit_notes = _require_same_logits(model, llm, str(language))

    processor = _make_processor(settings, kind, images, llm)
    _write_checkpoint(to, model, weights, processor)

    notes = [
        _describe_encoder(config, kind),
        *llm.notes,
        *logit_notes,
        _UNTRAINED_NOTE.format(seed=seed),
    ]
    return AssembledBase(to, tuple(notes))


def _describe_encoder(config: LlavaConfig, kind: VisionEncoderKind) -> str:
    """Return the note on the vision encoder."""
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
    """Return the configuration of the LLaVA; ModelError for a feature layer that is not there."""
    # depth + 1 hidden states, that of the embedding included.
    depth = settings.num_hidden_layers
    layer = kind.feature_layer if feature_layer is None else feature_layer
    if not -depth - 1 <= layer <= depth:
        raise ModelError(f"feature layer {layer} is out of {-depth - 1}…{depth}")

    patches_per_edge = settings.image_size // settings.patch_size
    return LlavaConfig(
        vision_config=settings,
        text_config=llm.model.config,
        image_token_index=llm.image_token_id,
        image_seq_length=patches_per_edge**2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=_feature_strategy_of(kind),
        tie_word_embeddings=llm.is_tied,
    )


def _feature_strategy_of(kind: VisionEncoderKind) -> Literal["default", "full"]:
    """Return transformers' name for whether the first token is dropped."""
    return "default" if kind.num_class_tokens else "full"


def _collect_weights(
    encoder_weights: Mapping[str, Tensor],
    projector: nn.Module,
    llm: LanguageModel,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return all weights under published names, in the dtype to be written."""
    named: dict[str, Tensor] = {}
    for name, weight in encoder_weights.items():
        named[f"vision_tower.vision_model.{name}"] = weight
    for name, weight in projector.state_dict().items():
        named[f"multi_modal_projector.{name}"] = weight
    named |= llm.published_weights()
    return {name: weight.detach().to(dtype).contiguous() for name, weight in named.items()}


def _build_llava(config: LlavaConfig, llm: LanguageModel, dtype: torch.dtype) -> Any:
    """Build the LLaVA around the language model; all other parts are on the meta device."""
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
    """Raise ModelError unless the language model has the same logits inside LLaVA as alone.

    LLaVA computes logits from hidden states by the head alone. It loses a soft cap, as gemma2 has
    one: cap · tanh(logits / cap). A cap keeps the order of logits, and is only noted. Anything else
    that a model does to its logits is an error.
    """
    ids = torch.arange(8)[None]  # (1, tokens): any will do
    standalone = llm.model(input_ids=ids).logits
    inside_llava = model(input_ids=ids).logits

    cap = llm.model.config.to_dict().get("final_logit_softcapping")
    expected = cap * torch.tanh(inside_llava / cap) if cap else inside_llava
    if not torch.allclose(standalone.float(), expected.float(), rtol=1e-2, atol=1e-5):
        raise ModelError(
            f"{source}: LLaVA cannot hold {llm.model.config.model_type} models: "
            "it has no place for what they do to their logits"
        )

    if cap:
        return [f"logits are no longer capped at {cap:g}; their order stays"]
    return []


def _make_processor(
    settings: PreTrainedConfig,
    kind: VisionEncoderKind,
    images: PilBackend,
    llm: LanguageModel,
) -> LlavaProcessor:
    """Return the processor of the LLaVA."""
    return LlavaProcessor(
        image_processor=images,
        tokenizer=llm.tokenizer,
        patch_size=settings.patch_size,
        vision_feature_select_strategy=_feature_strategy_of(kind),
        num_additional_image_tokens=kind.num_class_tokens,
        chat_template=llm.tokenizer.chat_template,
    )


def _write_checkpoint(
    to: Path,
    model: Any,
    weights: dict[str, Tensor],
    processor: LlavaProcessor,
) -> None:
    """Write everything to a folder beside `to`, read it as a base is read, and move it to `to`."""
    with _reporting_write_errors(to), creating_folder(to) as folder:
        model.save_pretrained(
            folder,
            max_shard_size="5GB",
            state_dict=dict(weights),  # a copy: `save_pretrained` empties it while it writes
            save_original_format=False,  # the names are published ones already
        )
        processor.save_pretrained(folder)

        if Checkpoint(folder, model.dtype).compute_fingerprint() != compute_fingerprint(weights):
            raise ModelError(f"{to}: transformers wrote other weights than it was given")

        for file in folder.iterdir():
            file.chmod(0o644)  # some writers let the owner alone read


@contextmanager
def _reporting_write_errors(to: Path) -> Iterator[None]:
    """Raise ModelError of one line for every error of writing in the block.

    safetensors' writer has an error of its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        system_reason = error.strerror if isinstance(error, OSError) else None
        reason = system_reason or error
        raise ModelError(f"{to}: cannot be written: {reason}") from error
