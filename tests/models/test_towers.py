"""Towers of open_clip in transformers' models: equal hidden states, or a plain refusal."""

import pytest
import torch
from extras import needs
from tiny_towers import refused, register, shallow, stirred
from transformers import CLIPVisionModel, SiglipVisionModel

from mm_piece.errors import ModelError
from mm_piece.models.assembly.towers import convert_encoder

pytestmark = [pytest.mark.slow, needs("open_clip")]


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory):
    register(tmp_path_factory.mktemp("architectures"))


@pytest.mark.parametrize(
    ("name", "changes", "activation"),
    [
        ("tiny-ViT", None, "gelu"),
        ("tiny-ViT-quickgelu", None, "quick_gelu"),
        ("tiny-ViT-tanh", None, "gelu_pytorch_tanh"),
        ("tiny-SigLIP", None, "gelu"),
        ("tiny-SigLIP-tanh", None, "gelu_pytorch_tanh"),
        ("ViT-B-32", 12, "gelu"),
        ("ViT-L-14", 2, "gelu"),
        ("ViT-L-14-336-quickgelu", 1, "quick_gelu"),
        ("ViT-B-16-SigLIP", None, "gelu"),
    ],
)
@torch.inference_mode()
def test_hidden_states_equal_those_of_open_clip(name, changes, activation):
    visual = stirred(name, **shallow(name, changes) if changes else {})
    config, weights = convert_encoder(visual, name)
    assert config.hidden_act == activation
    siglip = "SigLIP" in name
    model = (SiglipVisionModel if siglip else CLIPVisionModel)(config).eval()
    model.load_state_dict(weights)
    expected = []
    stack = visual.trunk.blocks if siglip else visual.transformer.resblocks
    for layer in (*stack, visual.trunk.norm if siglip else visual.ln_post):
        layer.register_forward_hook(lambda _, __, output: expected.append(output))
    pixels = torch.randn(2, 3, *visual.image_size)
    visual(pixels)
    found = model(pixels, output_hidden_states=True)
    last = found.last_hidden_state if siglip else model.post_layernorm(found.last_hidden_state)
    assert len(found.hidden_states) == len(expected)
    for state, other in zip((*found.hidden_states[1:], last), expected, strict=True):
        assert (state - other).abs().max() <= 2e-6 * other.abs().max()


@pytest.mark.parametrize(
    ("vision", "pretrained", "message"),
    [
        ("ViT-B-33", "openai", "no architecture 'ViT-B-33'; nearest: .*ViT-B-32"),
        (
            "ViT-B/32",
            None,
            "needs weights .--pretrained.; allowed: openai, laion400m_e31, .* file, random",
        ),
        ("ViT-B-32", "opnai", "ViT-B-32 has no weights 'opnai'; allowed: openai, "),
        ("ViT-B-32", "openai", "trained with QuickGELU; use ViT-B-32-quickgelu"),
        ("RN50", "openai", "its tower is a ResNet; supported: "),
        ("coca_ViT-B-32", "random", "its tower has attentional pooling; supported: "),
        ("tiny-pool", "random", "its tower has attentional pooling; supported: "),
        ("tiny-scale", "random", "layer scale; supported: "),
        ("ViT-H-14-CLIPA", "random", "no norm before its layers; supported: "),
        ("convnext_base", "random", "its tower is timm's convnext_base; supported: "),
        ("tiny-wide", "random", "32 x 48 are not supported"),
        ("local-dir:absent", None, "cannot read the settings of local-dir:absent"),
        ("local-dir:absent", "openai", "cannot read the settings of local-dir:absent"),
        ("hf-hub:absent/absent", None, "cannot read the settings of hf-hub:absent/absent"),
    ],
)
def test_towers_that_are_refused(tmp_path, vision, pretrained, message):
    refused(message, vision, "absent", tmp_path / "base", pretrained)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-pool", "CLIPVisionModel has no place for its attn_pool"),
        ("tiny-scale", "CLIPVisionModel has no place for its encoder.layers.0.ls_1.gamma"),
        ("tiny-unnormed", "it has no pre_layrnorm"),
        ("tiny-ResNet", "open_clip's ModifiedResNet"),
    ],
)
def test_what_settings_did_not_tell_the_weights_do(name, message):
    with pytest.raises(ModelError, match=f"{name} is not supported: {message}.*; supported: "):
        convert_encoder(stirred(name), name)
