"""Tiny real instances of families whose published names come from transformers' own record.

Configurations and processors are transformers' classes; templates follow the published ones.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_families as tiny
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    Mistral3Config,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolLM3Config,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    VipLlavaConfig,
)

_PLAIN = {**tiny._CLIP, "num_hidden_layers": 2}


def _vipllava() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer_for("llava", "llava")
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**tiny._CLIP),
        text_config=LlamaConfig(**tiny._text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layers=[-2, -1],
    )
    return config, tiny.llava_processor(tokenizer)


def _llava_next_video() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer_for("llava", "llava")
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**tiny._CLIP),
        text_config=LlamaConfig(**tiny._text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=0,
        image_grid_pinpoints=tiny.PINPOINTS,
        vision_feature_layer=-2,
        spatial_pool_stride=1,
    )
    processor = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(size={"height": 16, "width": 16}),
        tiny.next_images(),
        tokenizer,
        **tiny.expansion(tokenizer),
    )
    return config, processor


def _gemma3_text_settings(tokenizer: Any) -> dict[str, Any]:
    return tiny._text(tokenizer, head_dim=8, sliding_window=8, tie_word_embeddings=True)


def _gemma3() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer_for(
        "gemma3",
        "gemma3",
        model_specific_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**_gemma3_text_settings(tokenizer)),
        vision_config={**_PLAIN, "vision_use_head": False, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 16, "width": 16}),
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=4,
    )
    return config, processor


def _internvl() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer_for(
        "internvl",
        "internvl",
        model_specific_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    size = {"height": 16, "width": 16}
    config = InternVLConfig(
        vision_config={**_PLAIN, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=Qwen2Config(**tiny._text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=2),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _mistral3() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer_for("pixtral", "pixtral")
    config = Mistral3Config(
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config=MistralConfig(**tiny._text(tokenizer, head_dim=8, sliding_window=None)),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _llava_pixtral() -> tuple[Any, Any]:
    """Pixtral as `mistral-community` publishes it: the tower of Mistral inside a LLaVA."""
    tokenizer = tiny.tokenizer_for("pixtral", "pixtral")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**size, num_attention_heads=2, patch_size=8),
        text_config=MistralConfig(**tiny._text(tokenizer, head_dim=8, sliding_window=None)),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8}),
        tokenizer,
        patch_size=8,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _idefics_config(kind: Callable[..., Any], tokenizer: Any) -> Any:
    return kind(
        vision_config={**_PLAIN, "image_size": 32, "patch_size": 8},
        text_config=LlamaConfig(**tiny._text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )


def _smolvlm() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer_for("idefics", "idefics")
    size = {"longest_edge": 32}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size=size, max_image_size=size, do_image_splitting=False),
        tokenizer,
        SmolVLMVideoProcessor(size=size, max_image_size=size),
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )
    return _idefics_config(SmolVLMConfig, tokenizer), processor


def _idefics3() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer_for("idefics", "idefics")
    processor = Idefics3Processor(
        Idefics3ImageProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        ),
        tokenizer,
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )
    return _idefics_config(Idefics3Config, tokenizer), processor


def _qwen3_5() -> tuple[Any, Any]:
    text = {
        "head_dim": 8,
        "num_hidden_layers": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention"]
        + ["full_attention"],
        "tie_word_embeddings": True,
    }
    vision = {k: v for k, v in tiny._QWEN3_VISION.items() if k != "deepstack_visual_indexes"}
    return tiny._qwen_vl(Qwen3_5Config, Qwen3VLProcessor, Qwen3VLVideoProcessor, vision, text)


def _gemma3_text() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer_for("gemma", "gemma")
    return Gemma3TextConfig(**_gemma3_text_settings(tokenizer)), tokenizer


def _smollm3() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer_for("qwen", "qwen2")
    return SmolLM3Config(**tiny._text(tokenizer, tie_word_embeddings=True)), tokenizer


def _phi3() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer_for("llama", "llama")
    return Phi3Config(**tiny._text(tokenizer)), tokenizer


def _olmo2() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer_for("llama", "llama")
    return Olmo2Config(**tiny._text(tokenizer)), tokenizer


NEWER_TEXT = ("gemma3_text", "smollm3", "phi3", "olmo2")
NEWER: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen3_5": _qwen3_5,
    "gemma3": _gemma3,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "llava (Pixtral)": _llava_pixtral,
    "mistral3": _mistral3,
    "vipllava": _vipllava,
    "llava_next_video": _llava_next_video,
    "gemma3_text": _gemma3_text,
    "smollm3": _smollm3,
    "phi3": _phi3,
    "olmo2": _olmo2,
}
ALL = (*tiny.BUILDERS, *NEWER)
ALL_TEXT = (*tiny.TEXT, *NEWER_TEXT)


def make_any(family: str, folder: Path) -> Path:
    """Write a tiny checkpoint of any family that is tested."""
    if family in NEWER:
        return tiny.save_tiny(*NEWER[family](), folder)
    return tiny.make(family, folder)
