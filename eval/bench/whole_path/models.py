"""Vision-language models in the shapes of published ones, with random weights, and inputs for them.

SHAPES[name](toy)       a configuration; `toy` keeps the kind and shrinks every size
build(config, device)   the model in bf16, its weights drawn on the device
example(config, text)   inputs and labels of one example: one image, `text` tokens, 4 supervised
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SUPERVISED = 4  # tokens of an answer


def llava_7b(toy: bool = False) -> Any:
    """LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, Llama 2 7B."""
    return _llava_config(toy, {**_LLAMA_7B}, image_size=336)


def llava_1b(toy: bool = False) -> Any:
    """LLaVA with TinyLlama's widths, 24 layers: 1.7 B parameters; small images, for a CPU."""
    text = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    return _llava_config(toy, {**text, **heads, "vocab_size": 32064}, image_size=28)


def qwen_7b(toy: bool = False) -> Any:
    """Qwen2.5-VL-7B."""
    from transformers import Qwen2_5_VLConfig

    if not toy:
        text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
        return Qwen2_5_VLConfig(
            text_config={**text, **heads},
            vision_config={"hidden_size": 1280, "out_hidden_size": 3584},
        )
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 152064}
    rope = {"rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default"}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    return Qwen2_5_VLConfig(
        text_config={**text, **heads, **rope}, vision_config={**vision, "out_hidden_size": 32}
    )


_LLAMA_7B = {
    **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064},
}


def _llava_config(toy: bool, text: dict[str, int], image_size: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16}
    if toy:
        image_size = 28
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        vision = {**small, "num_attention_heads": 2}
        text = {**small, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32064}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=image_size, patch_size=14),
        text_config=LlamaConfig(**text),
        image_token_id=32000,
        vision_feature_layer=-2,
    )


def build_model(config: Any, device: str) -> Any:
    """Return the model in evaluation mode."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return AutoModelForImageTextToText.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_example(config: Any, text: int, seed: int = 0) -> dict[str, Tensor]:
    """Return one example: an image, then text, of which the last tokens are the answer."""
    random = torch.Generator().manual_seed(seed)
    image, tokens = _IMAGE_MAKERS[config.model_type](config, random)
    words = torch.randint(1000, 30000, (text,), generator=random)
    ids = torch.cat([tokens, words])[None]
    labels = torch.where(torch.arange(ids.shape[1])[None] < ids.shape[1] - SUPERVISED, -100, ids)
    return {
        **{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels},
        **image,
    }


def _llava_image(config: Any, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    side = config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, generator=random).bfloat16()
    count = (side // config.vision_config.patch_size) ** 2
    return {"pixel_values": pixels}, torch.full((count,), config.image_token_id)


def _qwen_image(config: Any, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """24 by 24 patches, as of an image of 336 pixels; four by four for a toy."""
    side = 24 if config.vision_config.depth > 2 else 4
    vision = config.vision_config
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(side * side, size, generator=random).bfloat16()
    count = side * side // vision.spatial_merge_size**2
    tokens = torch.full((count,), config.image_token_id)
    start, end = (
        torch.tensor([t]) for t in (config.vision_start_token_id, config.vision_end_token_id)
    )
    grid = torch.tensor([[1, side, side]])
    return {"pixel_values": pixels, "image_grid_thw": grid}, torch.cat([start, tokens, end])


_IMAGE_MAKERS: dict[str, Callable[..., tuple[dict[str, Tensor], Tensor]]] = {
    "llava": _llava_image,
    "qwen2_5_vl": _qwen_image,
}

SHAPES: dict[str, Callable[[bool], Any]] = {
    "llava-1.5-7b": llava_7b,
    "qwen2.5-vl-7b": qwen_7b,
    "llava-1.7b": llava_1b,
}
