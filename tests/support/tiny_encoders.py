"""Folders of tiny vision encoders of transformers, as they are published."""

import torch
from transformers import (
    AutoModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PixtralVisionConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
)

EDGE, PATCH = 32, 8
_SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": EDGE,
    "patch_size": PATCH,
}
_WIDE = {**_SIZES, "intermediate_size": 32}
_TEXT = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}

CONFIGS = {
    "dinov2": Dinov2Config(**_SIZES, mlp_ratio=2),
    "registers": Dinov2WithRegistersConfig(**_SIZES, mlp_ratio=2, num_register_tokens=3),
    "dinov3": DINOv3ViTConfig(**_WIDE, num_register_tokens=4),
    "vit": ViTConfig(**_WIDE),
    # none of these can be LLaVA's tower
    "siglip2": Siglip2VisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=3),
    "convnext": ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=32, patch_size=4),
    "mae": ViTMAEConfig(**_WIDE),
    "pixtral": PixtralVisionConfig(**_WIDE),
}
_SQUARE = {"height": EDGE, "width": EDGE}
_CROPPED = {"size": {"shortest_edge": EDGE + 4}, "crop_size": _SQUARE}
_IMAGE_PROCESSORS = {
    "clip": CLIPImageProcessor(**_CROPPED),
    "siglip": SiglipImageProcessor(size=_SQUARE),
    "dinov2": BitImageProcessor(**_CROPPED),
    "registers": BitImageProcessor(**_CROPPED),
}
# Kinds that can be a tower, and the tokens that LLaVA sees of an image: 16 patches, registers.
TOKENS = {
    "clip": 16,
    "siglip": 16,
    "dinov2": 16,
    "registers": 19,
    "dinov3": 20,
    "vit": 16,
}


def write_encoder(folder, kind):
    """Write an encoder in which no weight is zero and no norm the identity; return its folder."""
    torch.manual_seed(7)
    if kind == "clip":  # these two are published with their text models
        model = CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_WIDE))
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=_TEXT, vision_config=_WIDE))
    elif kind == "vit":  # without a pooler, as classifiers are published
        model = ViTForImageClassification(CONFIGS[kind])
    else:
        model = AutoModel.from_config(CONFIGS[kind])

    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder)
    images = _IMAGE_PROCESSORS.get(kind, ViTImageProcessor(size=_SQUARE))
    images.save_pretrained(folder)
    return folder
