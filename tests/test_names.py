"""Published names for every generation of live names."""

import pytest

from mm_piece.errors import ModelError
from mm_piece.names import group_of, hub_name, place_of

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
    assert place_of(TOWER) == ("vision", 3, "q_proj")
    assert place_of(TEXT) == ("language", 7, "gate_proj")
    assert place_of(PROJECTOR) == ("projector", None, "linear_1")
    assert group_of(HEAD) == "head"
    assert group_of("language_model.model.embed_tokens.weight") == "embedding"
    assert group_of("model.layers.0.mlp.up_proj.weight") == "language"
    assert group_of("lm_head.weight") == "head"


def test_unknown_family():
    with pytest.raises(ModelError, match="unknown model family 'bert'; known: .*llava"):
        hub_name("x", "bert")
