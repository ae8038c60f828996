"""Tiny architectures for open_clip and timm, and tiny language models: made, not downloaded."""

import json

import pytest
import torch
from tiny_llava import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from mm_piece.errors import ModelError
from mm_piece.models.assembly import assemble

TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16}
SIGLIP = {
    "image_size": 32,
    "timm_model_name": "vit_tiny_siglip",
    "timm_pool": "map",
    "timm_proj": "none",
}
ARCHITECTURES = {
    "tiny-ViT": {"vision_cfg": VIT},
    "tiny-ViT-quickgelu": {"vision_cfg": VIT, "quick_gelu": True},
    "tiny-ViT-tanh": {
        "vision_cfg": {**VIT, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}
    },
    "tiny-SigLIP": {"vision_cfg": SIGLIP, "custom_text": True},
    "tiny-SigLIP-tanh": {"vision_cfg": {**SIGLIP, "timm_model_name": "vit_tiny_siglip_tanh"}},
    "tiny-pool": {"vision_cfg": {**VIT, "attentional_pool": True}},
    "tiny-scale": {"vision_cfg": {**VIT, "ls_init_value": 0.1}},
    "tiny-unnormed": {"vision_cfg": {**VIT, "no_ln_pre": True}},
    "tiny-ResNet": {"vision_cfg": {**VIT, "layers": [1, 1, 1, 1], "width": 8}},
    "tiny-wide": {"vision_cfg": {**VIT, "image_size": [32, 48]}},
}
LANGUAGES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "final_logit_softcapping": 0.1},
}


def timm_tower(act_layer):
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}

    def build(pretrained=False, **options):
        chosen = {key: options[key] for key in ("num_classes", "global_pool")}
        return VisionTransformer(**sizes, **chosen, class_token=False, act_layer=act_layer)

    return build


def register(folder):
    """Tell open_clip the tiny architectures, and timm the towers of those like SigLIP."""
    import open_clip
    from timm.models import is_model, register_model

    for name, act_layer in (("vit_tiny_siglip", "gelu"), ("vit_tiny_siglip_tanh", "gelu_tanh")):
        if is_model(name):  # by another test module
            continue
        build = timm_tower(act_layer)
        build.__name__, build.__module__ = name, __name__
        register_model(build)
    for name, config in ARCHITECTURES.items():
        content = {"embed_dim": 32, "text_cfg": TEXT, **config}
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    open_clip.add_model_config(folder)


def make_language(folder, family="llama", tokenizer=None, rows=None, **changes):
    """Write a tiny causal language model with its tokenizer."""
    tokenizer = tokenizer or make_tokenizer()
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    options = {**sizes, **heads, **LANGUAGES.get(family, {}), **changes}
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, vocab_size=rows or len(tokenizer), **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def blind_tokenizer():
    """A tokenizer that has never heard of images, nor of padding or chats."""
    tokenizer = make_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] = {
        token.replace("<image>", "<other>"): number
        for token, number in content["model"]["vocab"].items()
    }
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<image>"]
    return type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(content)),
        eos_token="<|end|>",
    )


def stirred(name, **changes):
    """An open_clip tower in which no norm is the identity and no bias is zero."""
    import open_clip

    torch.manual_seed(0)
    visual = open_clip.create_model(name, text_cfg=dict(TEXT), **changes).visual.eval()
    for parameter in visual.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return visual


def shallow(name, layers):
    """The settings of a real architecture with fewer layers."""
    import open_clip

    config = open_clip.get_model_config(name)["vision_cfg"]
    return {"vision_cfg": {**config, "layers": layers}}


def refused(message, vision, language, to, pretrained, **options):
    with pytest.raises(ModelError, match=message) as caught:
        assemble(vision, language, to, pretrained, **options)
    assert "\n" not in str(caught.value)
