"""`assemble`: a vision encoder, a projector and a language model as one LLaVA checkpoint."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mm_piece.deltas.delta import compute_fingerprint
from mm_piece.dtypes import as_dtype
from mm_piece.errors import ModelError
from mm_piece.files.atomic import creating_folder
from mm_piece.models.assembly.alignment import ImageTextPair, align_projector
from mm_piece.models.assembly.language import LanguageModel, load_language
from mm_piece.models.assembly.vision import VisionEncoder, load_vision_encoder
from mm_piece.models.base import raising_model_error, tensors
from mm_piece.models.checkpoint import Checkpoint

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
    image_size: int | None = None,
    vision_layer: int | Sequence[int] | None = None,
    pairs: Iterable[ImageTextPair] | None = None,
    chat_template: str | None = None,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
) -> AssembledBase:
    """Write a LLaVA of a vision encoder, a new projector and a causal language model.

    `vision` is a folder or hub id of transformers, or names a model of open_clip, whose weights are
    `pretrained`; `image_size` is the edge of its images (see `load_vision_encoder`). `vision_layer`
    selects the hidden states of the encoder that the projector reads, one or several side by side;
    the default is LLaVA's -2 for CLIP, else -1. `language` is a folder, hub id or GGUF file; a
    `chat_template` takes the place of its own.

    The projector's weights are drawn from `seed`, and then it must be trained before the model can
    answer about images. With `pairs`, images and short texts that name what they show, it starts
    from the map that ridge regression finds (see `align_projector`).

    The folder `to` is written completely or not at all. Raises ModelError, also if `to` exists and
    is not empty.
    """
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ModelError(f"{to} exists and is not empty; assemble writes a new folder")

    weights_dtype = as_dtype(dtype)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.default_generator.manual_seed(seed)
        encoder = load_vision_encoder(vision, pretrained, image_size)
        llm = load_language(str(language), weights_dtype, chat_template)

        with raising_model_error(f"{language} and {vision} do not make a LLaVA"):
            config = _make_llava_config(encoder, llm, vision_layer)
            # Again: the projector must not depend on what was drawn while models loaded.
            torch.default_generator.manual_seed(seed)
            projector = LlavaMultiModalProjector(config)
            model = _build_llava(config, encoder, projector, llm)
            logit_notes = _require_same_logits(model, llm, str(language))

    processor = _make_processor(encoder, llm)
    projector_note = _UNTRAINED_NOTE.format(seed=seed)
    if pairs is not None:
        projector_note = align_projector(model, processor, pairs)
    _write_checkpoint(to, model.to(weights_dtype), processor)

    notes = [
        _describe_encoder(config, encoder),
        *encoder.notes,
        *llm.notes,
        *logit_notes,
        projector_note,
    ]
    return AssembledBase(to, tuple(notes))


def _describe_encoder(config: LlavaConfig, encoder: VisionEncoder) -> str:
    """Return the note on the vision encoder."""
    layers = config.vision_feature_layer
    shown = ", ".join(map(str, layers)) if isinstance(layers, list) else layers
    return (
        f"the tower is a {type(encoder.model).__name__} for images of {encoder.edge} pixels; its "
        f"hidden states {shown} make {config.image_seq_length} tokens an image"
    )


def _make_llava_config(
    encoder: VisionEncoder,
    llm: LanguageModel,
    vision_layer: int | Sequence[int] | None,
) -> LlavaConfig:
    """Return the configuration of the LLaVA; ModelError for a layer that is not there."""
    layer = encoder.default_layer if vision_layer is None else vision_layer
    layers = [layer] if isinstance(layer, int) else list(layer)

    # depth + 1 hidden states, that of the embedding included.
    depth = encoder.model.config.num_hidden_layers
    wrong = [number for number in layers if not -depth - 1 <= number <= depth]
    if wrong or not layers:
        shown = wrong[0] if wrong else "()"
        raise ModelError(f"vision layer {shown} is out of {-depth - 1}…{depth}")

    return LlavaConfig(
        vision_config=encoder.model.config,
        text_config=llm.model.config,
        image_token_index=llm.image_token_id,
        image_seq_length=encoder.num_image_tokens,
        vision_feature_layer=layers[0] if len(layers) == 1 else layers,
        vision_feature_select_strategy=encoder.feature_strategy,
        tie_word_embeddings=llm.is_tied,
    )


def _build_llava(
    config: LlavaConfig,
    encoder: VisionEncoder,
    projector: LlavaMultiModalProjector,
    llm: LanguageModel,
) -> Any:
    """Build the LLaVA of its parts; its language model has the dtype it was loaded in."""
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)

    model.model.vision_tower = encoder.model
    model.model.multi_modal_projector = projector
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


def _make_processor(encoder: VisionEncoder, llm: LanguageModel) -> LlavaProcessor:
    """Return the processor of the LLaVA."""
    return LlavaProcessor(
        image_processor=encoder.images,
        tokenizer=llm.tokenizer,
        patch_size=encoder.patch_size,
        vision_feature_select_strategy=encoder.feature_strategy,
        num_additional_image_tokens=encoder.num_prefix_tokens,
        chat_template=llm.tokenizer.chat_template,
    )


def _write_checkpoint(
    to: Path,
    model: Any,
    processor: LlavaProcessor,
) -> None:
    """Write everything to a folder beside `to`, read it as a base is read, and move it to `to`."""
    weights: dict[str, Tensor] = {}
    for name, weight in tensors(model).items():
        weights[name] = weight.contiguous()

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
