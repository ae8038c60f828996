"""What a model says may not depend on what comes after: other families are refused."""

import pytest
import tiny_families as tiny
from family_steps import World
from newer_families import NEWER
from transformers import Gemma3TextConfig

from mm_piece.data import encode
from mm_piece.errors import ModelError
from mm_piece.models.base import load_base
from mm_piece.training.causality import require_causal

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", NEWER)
def test_families_that_are_tested_are_causal(family, tmp_path):
    world = World(family, tmp_path)
    model, processor = load_base(world.base)
    model.train()
    for example in (world.examples[0], world.examples[-2]):
        require_causal(model, encode(example, processor))
    assert model.training


def test_an_answer_that_sees_itself_is_refused(tmp_path):
    tokenizer = tiny.tokenizer_for("gemma", "gemma")
    settings = tiny._text(tokenizer, head_dim=8, sliding_window=8, tie_word_embeddings=True)
    config = Gemma3TextConfig(**settings, use_bidirectional_attention=True)
    tiny.save_tiny(config, tokenizer, tmp_path / "base")
    model, processor = load_base(tmp_path / "base")
    (tmp_path / "rows").mkdir()
    example = World("gemma3_text", tmp_path / "rows").examples[0]
    with pytest.raises(ModelError, match=r"'gemma3_text': what it says depends on the tokens that"):
        require_causal(model, encode(example, processor))
