"""Published names for every generation of live names."""

import pytest
import torch
from names_table import GOLDEN, table
from newer_families import ALL, ALL_TEXT
from safetensors import safe_open
from tiny_families import BUILDERS
from transformers import AutoConfig, AutoModelForImageTextToText

from mm_piece.errors import ModelError
from mm_piece.families import FAMILIES, group_of, hub_name, parameter_location, weights
from mm_piece.models.base import load_base, tensors
from mm_piece.models.structure import require_groups
from mm_piece.published_names import PublishedNames

TOWER = "vision_tower.vision_model.encoder.layers.3.self_attn.q_proj.weight"
TEXT = "language_model.model.layers.7.mlp.gate_proj.weight"
HEAD = "language_model.lm_head.weight"
PROJECTOR = "multi_modal_projector.linear_1.weight"


@pytest.mark.parametrize(
    ("live", "published"),
    [
        ("model.vision_tower.encoder.layers.3.self_attn.q_proj.weight", TOWER),  # ≥ 5.6
        (
            "model.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj.weight",
            TOWER,
        ),  # ≤ 5.5
        (TOWER, TOWER),
        ("model.language_model.layers.7.mlp.gate_proj.weight", TEXT),
        (TEXT, TEXT),
        ("lm_head.weight", HEAD),
        (HEAD, HEAD),
        ("model.multi_modal_projector.linear_1.weight", PROJECTOR),
        (PROJECTOR, PROJECTOR),
    ],
)
def test_llava(live, published):
    assert hub_name(live, "llava") == published


def test_groups_and_places():
    assert parameter_location(TOWER) == ("vision", 3, "q_proj")
    assert parameter_location(TEXT) == ("language", 7, "gate_proj")
    assert parameter_location(PROJECTOR) == ("projector", None, "linear_1")
    assert group_of(HEAD) == "head"
    assert group_of("language_model.model.embed_tokens.weight") == "embedding"
    assert group_of("model.layers.0.mlp.up_proj.weight") == "language"
    assert group_of("lm_head.weight") == "head"


def test_unknown_family():
    with pytest.raises(ModelError, match="unknown model family 'bert'; known: .*llava"):
        hub_name("x", "bert")


def test_every_name_is_pinned():
    """Name, group and place of every weight; `python tests/support/names_table.py`."""
    assert table() == GOLDEN.read_text(encoding="utf-8")


@pytest.fixture(params=BUILDERS)
def family(request):
    return request.param


def test_every_generation_of_names_is_one(family, family_base):
    """Live names of 4.52 to 5.5 and of today, what is saved today and what is published."""
    model = load_base(family_base(family))[0]
    published = list(tensors(model))
    today = [name for name, _ in model.named_parameters()]
    middle = [n.replace("model.vision_tower.", "model.vision_tower.vision_model.") for n in today]
    assert [hub_name(name, family) for name in today] == published
    assert [hub_name(name, family) for name in middle] == published
    assert [hub_name(name, family) for name in published] == published
    with safe_open(family_base(family) / "model.safetensors", "pt") as file:
        assert {hub_name(name, family) for name in file.keys()} == set(published)  # noqa: SIM118
    assert len(set(published)) == len(published)


def test_a_tied_head_is_named_once(family, family_base):
    model = load_base(family_base(family))[0]
    named = [name for name in tensors(model) if group_of(name) in ("head", "embedding")]
    tied = family in ("llava_onevision", "qwen2_vl", "qwen3_vl", "gemma2", "qwen2")
    assert [group_of(name) for name in named] == (["embedding"] if tied else ["embedding", "head"])


@pytest.mark.parametrize("family", ALL)
def test_every_family_has_its_groups(family, family_base):
    groups = {group_of(name) for name in tensors(load_base(family_base(family))[0])} - {"head"}
    seeing = set() if family in ALL_TEXT else {"vision", "projector"}
    assert groups == {"language", "embedding"} | seeing


def test_other_towers_keep_their_names():
    name = "vision_tower.transformer.layers.0.attention.q_proj.weight"
    assert hub_name(f"model.{name}", "llava") == name


def test_every_family_has_a_tiny_base():
    assert set(FAMILIES) == set(BUILDERS)


def test_transformers_gives_the_same_names(family, family_base):
    """Our rules hold for every version of transformers, its record for every family."""
    model = load_base(family_base(family))[0]
    translate = PublishedNames(model)
    for live, _ in model.named_parameters():
        assert translate(live) == hub_name(live, family)


def meta(config):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def test_a_family_with_several_tensors_in_one_weight_is_named():
    """Published files of `qwen3_5_moe` may have the experts one by one."""
    config = AutoConfig.for_model("qwen3_5_moe")
    config.text_config.num_hidden_layers = 4
    config.text_config.layer_types = config.text_config.layer_types[:4]
    config.vision_config.depth = 1
    with pytest.raises(ModelError) as error:
        weights(meta(config))
    said = str(error.value)
    assert "model family 'qwen3_5_moe': its weight model.language_model.layers.0.mlp" in said
    assert "gate_up_proj is not one tensor of the published files" in said


def test_an_older_transformers_is_named(family_base, monkeypatch):
    model = load_base(family_base("gemma3"))[0]
    monkeypatch.setattr("transformers.__version__", "5.19.1")
    with pytest.raises(ModelError, match=r"'gemma3' needs transformers 5.20 or newer.* is 5.19.1"):
        PublishedNames(model)


def test_a_name_that_tells_another_group_is_refused(family_base, monkeypatch):
    """Names are all that deltas and reports have: the model's own modules must agree."""
    model = load_base(family_base("gemma3"))[0]
    require_groups(model)
    monkeypatch.setattr("mm_piece.models.structure.group_of", lambda name: "language")
    with pytest.raises(ModelError, match=r"would count as language, and is projector or vision"):
        require_groups(model)


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("t5gemma2", "is an encoder-decoder model"),
        ("clip", "type 'clip', which is neither"),
    ],
)
def test_a_family_that_cannot_be_trained_is_named(family, told, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=told):
        load_base(tmp_path)
