"""open_clip's image towers as vision models of transformers: names, fused projections, settings.

open_clip's own VisionTransformer becomes a CLIPVisionModel, a SigLIP tower, which comes from timm,
a SiglipVisionModel. Hidden states stay equal to rounding; what they do not depend on is left out.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.activations import ACT2FN

from mm_piece.errors import ModelError
from mm_piece.families import RenamingRules

_FUSED_PATTERN = re.compile(r"\.(?:in_proj_|qkv\.)(weight|bias)$")
_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class VisionEncoderKind:
    """How one kind of tower becomes a vision model."""

    model_class: type[PreTrainedModel]
    config_class: Callable[..., PreTrainedConfig]
    read_settings: Callable[[Any], dict[str, Any]]
    renaming_rules: (
        RenamingRules  # from open_clip's names to those of the model, all applied in order
    )
    ignored_pattern: str  # names of what no hidden state depends on
    num_class_tokens: int  # how many tokens stand before the patches
    feature_layer: int  # which hidden states LLaVA models of this kind take

    @property
    def name(self) -> str:
        """What transformers calls the model."""
        return self.model_class.__name__


def encoder_kind_of(visual: nn.Module, name: str) -> VisionEncoderKind:
    """The kind of an open_clip tower; ModelError for one that is not supported."""
    kind = type(visual).__name__
    if kind not in ENCODER_KINDS:
        raise ModelError(f"{name} is not supported: open_clip's {kind}; {SUPPORTED}")
    return ENCODER_KINDS[kind]


def convert_encoder(visual: nn.Module, name: str) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Configuration and weights of the vision model equal to an open_clip tower.

    Raises ModelError that names what the tower has and transformers' model has no place for.
    """
    kind = encoder_kind_of(visual, name)
    weights = rename_weights(visual.state_dict(), kind)
    _require_known_weights(set(weights), kind, name)
    return kind.config_class(**kind.read_settings(visual)), weights


def _require_known_weights(found: set[str], kind: VisionEncoderKind, name: str) -> None:
    """Raise ModelError unless these are the weights of a vision model of some depth."""
    depth = len({key.split(".")[2] for key in found if key.startswith("encoder.layers.")})
    with torch.device("meta"):
        live = kind.model_class(kind.config_class(num_hidden_layers=depth)).state_dict()
    expected = {key.removeprefix("vision_model.") for key in live}  # transformers before 5.6
    if unknown := sorted(found - expected):
        what = f"{kind.name} has no place for its {unknown[0]}"
        raise ModelError(f"{name} is not supported: {what}; {SUPPORTED}")
    if missing := sorted(expected - found):
        raise ModelError(f"{name} is not supported: it has no {missing[0]}; {SUPPORTED}")


def rename_weights(weights: Mapping[str, Tensor], kind: VisionEncoderKind) -> dict[str, Tensor]:
    """A tower's weights under the names of transformers' model, fused projections split."""
    result: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if re.match(kind.ignored_pattern, name):
            continue
        for pattern, replacement in kind.renaming_rules:
            name = re.sub(pattern, replacement, name)
        if name.endswith("position_embedding.weight"):
            weight = weight.squeeze(0)  # timm keeps a batch dimension
        result |= _split_fused(name, weight)
    return result


def _split_fused(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Query, key and value apart: they lie one below the other in a fused projection."""
    fused = _FUSED_PATTERN.search(name)
    if not fused:
        return {name: weight}
    stem = name[: fused.start()]
    chunks = zip("qkv", weight.chunk(3), strict=True)
    return {f"{stem}.{letter}_proj.{fused[1]}": chunk for letter, chunk in chunks}


def _read_clip_settings(visual: Any) -> dict[str, Any]:
    block = visual.transformer.resblocks[0]
    return {
        "hidden_size": visual.conv1.out_channels,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(visual.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": _require_square(visual.image_size),
        "patch_size": _require_square(visual.patch_size),
        "hidden_act": _find_activation(block.mlp.gelu),
        "layer_norm_eps": block.ln_1.eps,
        "projection_dim": visual.output_dim,
    }


def _read_siglip_settings(visual: Any) -> dict[str, Any]:
    trunk, block = visual.trunk, visual.trunk.blocks[0]
    return {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": _require_square(visual.image_size),
        "patch_size": _require_square(trunk.patch_embed.patch_size),
        "hidden_act": _find_activation(block.mlp.act),
        "layer_norm_eps": block.norm1.eps,
    }


def _require_square(edges: tuple[int, int]) -> int:
    if edges[0] != edges[1]:
        raise ModelError(
            f"images or patches of {edges[0]} x {edges[1]} are not supported: no square"
        )
    return edges[0]


def _find_activation(module: nn.Module) -> str:
    """transformers' name of an activation, told by its values: classes differ between versions."""
    x = torch.linspace(-4, 4, 65)
    for name in _ACTIVATIONS:
        if torch.allclose(module(x), ACT2FN[name](x), rtol=0, atol=1e-6):
            return name
    raise ModelError(f"activation {module} is not supported; supported: {', '.join(_ACTIVATIONS)}")


_CLIP_RULES: RenamingRules = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_SIGLIP_RULES: RenamingRules = (
    (r"^trunk\.", ""),
    (r"^pos_embed$", "embeddings.position_embedding.weight"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.self_attn\.proj\.", ".self_attn.out_proj."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)
SUPPORTED = "supported: plain ViT towers (ViT-B-32, ViT-L-14, …) and SigLIP's (ViT-B-16-SigLIP, …)"

_HEADLESS_SIGLIP = partial(SiglipVisionConfig, vision_use_head=False)

# LLaVA-1.5 drops the class token; LLaVA-OneVision takes all of SigLIP's tokens.
ENCODER_KINDS = {
    "VisionTransformer": VisionEncoderKind(
        CLIPVisionModel, CLIPVisionConfig, _read_clip_settings, _CLIP_RULES, r"proj$", 1, -2
    ),
    "TimmModel": VisionEncoderKind(
        SiglipVisionModel,
        _HEADLESS_SIGLIP,
        _read_siglip_settings,
        _SIGLIP_RULES,
        r"trunk\.attn_pool\.|head\.",
        0,
        -1,
    ),
}
