"""Vision-language models in the shapes of published ones, with random weights, and inputs for them.

SHAPES[name](toy)            a configuration; `toy` keeps the kind and shrinks every size
build_model(config, device)  the model in bf16, its weights drawn on the device
make_example(config, text)   one example: an image, `text` tokens, the last 4 of them supervised
"""

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor

SUPERVISED = 4  # tokens of an answer


class VisionSizes(TypedDict):
    """A CLIP vision tower's widths and depth, under their names in its configuration."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


class TextSizes(VisionSizes):
    """Those of a Llama."""

    num_key_value_heads: int
    vocab_size: int


def llava_7b(toy: bool = False) -> Any:
    """Return LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, Llama 2 7B."""
    return _llava_config(toy, _LLAMA_7B, image_size=336)


def llava_1b(toy: bool = False) -> Any:
    """Return LLaVA with TinyLlama's widths, 24 layers: 1.7 B parameters and small images."""
    text: TextSizes = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
    }
    return _llava_config(toy, text, image_size=28)


def qwen_7b(toy: bool = False) -> Any:
    """Return Qwen2.5-VL-7B."""
    from transformers import Qwen2_5_VLConfig

    text: dict[str, Any]
    if toy:
        text = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 152064,
            # the sections add up to half of a head's width
            "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default"},
        }
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
        }
    else:
        text = {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        }
        vision = {
            "hidden_size": 1280,
            "out_hidden_size": 3584,
        }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)


_LLAMA_7B: TextSizes = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
}


def _llava_config(toy: bool, text: TextSizes, image_size: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision: VisionSizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    if toy:
        image_size = 28
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        text = {
            **vision,
            "num_key_value_heads": 2,
            "vocab_size": 32064,
        }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=image_size, patch_size=14),
        text_config=LlamaConfig(**text),
        image_token_index=32000,
        vision_feature_layer=-2,
    )


def build_model(config: Any, device: str) -> Any:
    """Return the model in evaluation mode."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    # in bf16 from the start: a 7B model in fp32 would take 28 GB
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config)
            return model.eval()
    finally:
        torch.set_default_dtype(before)


def make_example(config: Any, text: int, seed: int = 0) -> dict[str, Tensor]:
    """Return one example: an image, then text, of which the last tokens are the answer."""
    random = torch.Generator().manual_seed(seed)
    make_image = _IMAGE_MAKERS[config.model_type]
    image, image_tokens = make_image(config, random)
    # ordinary words: away from special tokens at either end of the vocabulary
    words = torch.randint(1000, 30000, (text,), generator=random)
    ids = torch.cat([image_tokens, words])[None]  # (1, tokens)

    num_tokens = ids.shape[1]
    positions = torch.arange(num_tokens)[None]
    is_prompt = positions < num_tokens - SUPERVISED
    labels = torch.where(is_prompt, -100, ids)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        **image,
    }


def _llava_image(config: Any, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Return an image's inputs and its tokens in the text."""
    side = config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, generator=random)
    count = (side // config.vision_config.patch_size) ** 2
    tokens = torch.full((count,), config.image_token_id)
    return {"pixel_values": pixels.bfloat16()}, tokens


def _qwen_image(config: Any, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Return 24 by 24 patches, as of an image of 336 pixels; four by four for a toy."""
    vision = config.vision_config
    side = 24 if vision.depth > 2 else 4
    patch_size = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(side * side, patch_size, generator=random)  # (patches, values of a patch)

    # the model merges squares of patches into one token each
    count = side * side // vision.spatial_merge_size**2
    tokens = torch.full((count,), config.image_token_id)
    start = torch.tensor([config.vision_start_token_id])
    end = torch.tensor([config.vision_end_token_id])
    inputs = {
        "pixel_values": pixels.bfloat16(),
        "image_grid_thw": torch.tensor([[1, side, side]]),  # times, rows, columns
    }
    return inputs, torch.cat([start, tokens, end])


_IMAGE_MAKERS: dict[str, Callable[..., tuple[dict[str, Tensor], Tensor]]] = {
    "llava": _llava_image,
    "qwen2_5_vl": _qwen_image,
}

SHAPES: dict[str, Callable[[bool], Any]] = {
    "llava-1.5-7b": llava_7b,
    "qwen2.5-vl-7b": qwen_7b,
    "llava-1.7b": llava_1b,
}
