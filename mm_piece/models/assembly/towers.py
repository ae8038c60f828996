"""open_clip's vision encoders as models of transformers: names, fused projections, settings.

open_clip's own VisionTransformer becomes a CLIPVisionModel. A SigLIP encoder, which comes from
timm, becomes a SiglipVisionModel. Hidden states stay equal up to rounding; weights that they do not
depend on are left out.
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
from mm_piece.models.assembly.openclip import SUPPORTED, load_visual
from mm_piece.models.image_processor import make_image_processor

# torch's MultiheadAttention calls the fused projection in_proj_weight, timm qkv.weight.
_FUSED_PATTERN = re.compile(r"\.(?:in_proj_|qkv\.)(weight|bias)$")
_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class VisionEncoderKind:
    """How one kind of vision encoder becomes a model of transformers."""

    model_class: type[PreTrainedModel]
    config_class: Callable[..., PreTrainedConfig]
    read_settings: Callable[[Any], dict[str, Any]]
    renaming_rules: RenamingRules  # from open_clip's names; all of them apply, in order
    ignored_pattern: str  # names of weights that no hidden state depends on

    @property
    def name(self) -> str:
        """Name of the model in transformers."""
        return self.model_class.__name__


def load_openclip_encoder(
    vision: str,
    pretrained: str | None,
    image_size: int | None,
) -> tuple[Any, Any]:
    """Return one of open_clip's encoders as a model of transformers, and its image processor.

    `vision` and `pretrained` are as for `load_visual`; the model is float32. Raises ModelError.
    """
    visual: Any = load_visual(vision, pretrained)
    settings, weights = convert_encoder(visual, vision)
    preprocessing = dict(visual.preprocess_cfg)
    if image_size is not None:
        preprocessing["size"] = image_size
    images = make_image_processor(preprocessing)

    model = encoder_kind_of(visual, vision).model_class(settings)
    live_names = {key.removeprefix("vision_model."): key for key in model.state_dict()}
    model.load_state_dict({live_names[name]: weight for name, weight in weights.items()})
    return model.eval(), images


def encoder_kind_of(visual: nn.Module, name: str) -> VisionEncoderKind:
    """Return the kind of an open_clip vision encoder; ModelError for an unsupported one."""
    kind = type(visual).__name__
    if kind not in ENCODER_KINDS:
        raise ModelError(f"{name} is not supported: open_clip's {kind}; {SUPPORTED}")
    return ENCODER_KINDS[kind]


def convert_encoder(
    visual: nn.Module,
    name: str,
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Return configuration and weights of the model that equals an open_clip vision encoder.

    Raises ModelError for a weight that one of the two has and the other has not.
    """
    kind = encoder_kind_of(visual, name)
    weights = rename_weights(visual.state_dict(), kind)
    _require_known_weights(set(weights), kind, name)

    settings = kind.read_settings(visual)
    return kind.config_class(**settings), weights


def _require_known_weights(found: set[str], kind: VisionEncoderKind, name: str) -> None:
    """Raise ModelError unless these are the names of the weights of a model of some depth."""
    # A name is encoder.layers.N.…
    layers = {key.split(".")[2] for key in found if key.startswith("encoder.layers.")}
    config = kind.config_class(num_hidden_layers=len(layers))
    with torch.device("meta"):
        live = kind.model_class(config).state_dict()
    expected = {key.removeprefix("vision_model.") for key in live}  # transformers before 5.6

    unknown = sorted(found - expected)
    if unknown:
        what = f"{kind.name} has no place for its {unknown[0]}"
        raise ModelError(f"{name} is not supported: {what}; {SUPPORTED}")

    missing = sorted(expected - found)
    if missing:
        raise ModelError(f"{name} is not supported: it has no {missing[0]}; {SUPPORTED}")


def rename_weights(
    weights: Mapping[str, Tensor],
    kind: VisionEncoderKind,
) -> dict[str, Tensor]:
    """Return an encoder's weights under transformers' names, fused projections split."""
    result: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if re.match(kind.ignored_pattern, name):
            continue

        for pattern, replacement in kind.renaming_rules:
            name = re.sub(pattern, replacement, name)
        if name.endswith("position_embedding.weight"):
            weight = weight.squeeze(0)  # (1, tokens, width) in timm -> (tokens, width)
        result |= _split_fused(name, weight)
    return result


def _split_fused(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Split a fused projection into query, key and value, which are stacked in it."""
    fused = _FUSED_PATTERN.search(name)
    if not fused:
        return {name: weight}

    stem = name[: fused.start()]
    kind = fused[1]  # weight or bias
    query, key, value = weight.chunk(3)  # (3 * out, in) -> 3 x (out, in)
    return {
        f"{stem}.q_proj.{kind}": query,
        f"{stem}.k_proj.{kind}": key,
        f"{stem}.v_proj.{kind}": value,
    }


def _read_clip_settings(visual: Any) -> dict[str, Any]:
    """Read the settings of a CLIPVisionConfig off an open_clip VisionTransformer."""
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
    """Read the settings of a SiglipVisionConfig off a timm vision encoder."""
    trunk = visual.trunk
    block = trunk.blocks[0]
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
    """Return the edge of a square; ModelError for another rectangle."""
    if edges[0] != edges[1]:
        raise ModelError(
            f"images or patches of {edges[0]} x {edges[1]} are not supported: no square"
        )
    return edges[0]


def _find_activation(module: nn.Module) -> str:
    """Return transformers' name of an activation; ModelError if it has none.

    The values decide, because the classes differ between versions.
    """
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
# The head pools hidden states, which LLaVA reads before that.
_HEADLESS_SIGLIP = partial(SiglipVisionConfig, vision_use_head=False)

ENCODER_KINDS = {
    "VisionTransformer": VisionEncoderKind(
        model_class=CLIPVisionModel,
        config_class=CLIPVisionConfig,
        read_settings=_read_clip_settings,
        renaming_rules=_CLIP_RULES,
        ignored_pattern=r"proj$",
    ),
    "TimmModel": VisionEncoderKind(
        model_class=SiglipVisionModel,
        config_class=_HEADLESS_SIGLIP,
        read_settings=_read_siglip_settings,
        renaming_rules=_SIGLIP_RULES,
        ignored_pattern=r"trunk\.attn_pool\.|head\.",
    ),
}
