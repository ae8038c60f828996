"""Answers are greedy and depend on weights and prompt alone, whatever a base's settings ask for."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import GenerationConfig

from mm_piece.data import read
from mm_piece.errors import ModelError
from mm_piece.evaluation.answers import generate_batch
from mm_piece.models.base import load_base
from mm_piece.models.generation import TOKEN_IDS, find_ignored_settings, greedy_decoding
from mm_piece.training.recipe_check import check

# A value of every generation setting that leads astray or fails, where `generate` reads it.
ASTRAY = {
    **{"max_length": 1, "max_new_tokens": 1, "min_length": 400, "min_new_tokens": 9},
    **{"early_stopping": True, "max_time": 1e-9, "stop_strings": ["a", "e"], "do_sample": True},
    **{"num_beams": 3, "use_mtp": True, "use_cache": False, "cache_implementation": "static"},
    **{"cache_config": {"backend": "quanto"}, "max_cache_len": 1, "temperature": 9.0, "top_k": 2},
    **{"top_p": 0.1, "min_p": 0.9, "top_h": 0.5, "typical_p": 0.2, "epsilon_cutoff": 0.3},
    **{"eta_cutoff": 0.3, "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0},
    **{
        "length_penalty": -3.0,
        "no_repeat_ngram_size": 1,
        "bad_words_ids": [[n] for n in range(99)],
    },
    **{"renormalize_logits": True, "forced_bos_token_id": 7, "forced_eos_token_id": 7},
    **{"remove_invalid_values": True, "exponential_decay_length_penalty": (1, 9.0)},
    **{"suppress_tokens": [*range(99)], "begin_suppress_tokens": [*range(99)]},
    **{"sequence_bias": [[[9], 99.0]], "token_healing": True, "guidance_scale": 9.0},
    **{"watermarking_config": {"bias": 99.0}, "num_return_sequences": 2},
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores"), True),
    **{"output_logits": True, "return_dict_in_generate": True, "encoder_no_repeat_ngram_size": 1},
    **{"is_assistant": True, "num_assistant_tokens": 5, "assistant_confidence_threshold": 0.9},
    **{"num_assistant_tokens_schedule": "constant", "prompt_lookup_num_tokens": 3},
    **{"max_matching_ngram_size": 2, "assistant_early_exit": 1, "assistant_lookbehind": 1},
    **{"target_lookbehind": 1, "assistant_ensemble_weight": 0.5, "speculation_type": "mtp"},
    **{"compile_config": {"mode": "x"}, "disable_compile": True},
    **{"continuous_batching_config": {"a": 1}, "low_memory": True, "penalty_alpha": 0.6},
    **{"dola_layers": "low", "diversity_penalty": 9.0, "num_beam_groups": 3},
    **{"constraints": ["x"], "force_words_ids": [[5]], "prefill_chunk_size": 3},
}
KEPT = {*TOKEN_IDS, "transformers_version", "_from_model_config"}


@pytest.fixture(scope="module")
def model_and_processor(base):
    return load_base(base)


@pytest.fixture(scope="module")
def expected(model_and_processor):
    """Answers of the base, whose own settings ask for nothing."""
    found = generate_batch(*model_and_processor, examples(), 3)
    assert all(found)
    return found


def examples():
    return [*read("scenes:charts/test[:2]"), *read("scenes:digits/test[:1]")]


def test_every_setting_has_a_value_that_leads_astray():
    """A later version's further setting fails here: give it a value, and see that it is left."""
    known = {key for key in vars(GenerationConfig()) if key not in KEPT}
    assert not known - ASTRAY.keys()


@pytest.mark.slow
@pytest.mark.parametrize("keys", [[key] for key in ASTRAY] + [[*ASTRAY]], ids=lambda k: k[0][:99])
def test_answers_are_greedy(keys, model_and_processor, expected):
    model, processor = model_and_processor
    own = model.generation_config
    model.generation_config = asked = GenerationConfig(**own.to_dict())
    try:
        for key in keys:
            setattr(asked, key, ASTRAY[key])
        before = dict(vars(asked))
        assert generate_batch(model, processor, examples(), 3) == expected
        assert model.generation_config is asked
        assert vars(asked) == before
    finally:
        model.generation_config = own


def test_a_model_in_training_mode_answers_as_it_would_in_evaluation_mode(
    model_and_processor, expected, monkeypatch
):
    """A training leaves its model in training mode, where dropout draws at random."""
    model, processor = model_and_processor
    layers = [module for module in model.modules() if hasattr(module, "attention_dropout")]
    for layer in layers:
        monkeypatch.setattr(layer, "attention_dropout", 0.9)
    assert layers
    model.train()
    try:
        assert generate_batch(model, processor, examples(), 3) == expected
        assert all(module.training for module in model.modules())
    finally:
        model.eval()


def test_the_ids_of_a_base_are_kept(model_and_processor):
    model, _ = model_and_processor
    own = model.generation_config
    with greedy_decoding(model, max_new_tokens=5) as settings:
        assert model.generation_config is settings
        assert [getattr(settings, name) for name in TOKEN_IDS] == [
            getattr(own, name) for name in TOKEN_IDS
        ]
    with pytest.raises(LookupError), greedy_decoding(model):
        raise LookupError
    assert model.generation_config is own


def astray(base, folder, file, **settings):
    """A copy of a base whose configuration asks for something."""
    shutil.copytree(base, folder)
    path = Path(folder) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_a_base_that_asks_for_more(base, tmp_path, expected):
    """In a file of its own, or in its configuration, as older ones have it; `check` says so."""
    asks = {"do_sample": True, "top_p": 0.1, "num_beams": 3, "temperature": 1.0}
    assert find_ignored_settings(base) == []
    for number, file in enumerate(("generation_config.json", "config.json")):
        folder = astray(base, tmp_path / str(number), file, **asks)
        if file == "config.json":
            (folder / "generation_config.json").unlink()
        assert find_ignored_settings(folder) == ["do_sample", "num_beams", "top_p"]
        assert generate_batch(*load_base(folder), examples(), 3) == expected
    task = "{name: t, train: 'scenes:digits/train[:1]', test: 'scenes:digits/test[:1]'}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{{base: '{folder}', store: '{tmp_path}/s', tasks: [{task}]}}")
    (note,) = check(recipe, "select.density=0.1").notes
    assert note.startswith("do_sample, num_beams, top_p in the base's generation settings: without")


def test_settings_that_transformers_refuses(base, tmp_path):
    folder = astray(base, tmp_path / "base", "generation_config.json", max_new_tokens=-1)
    for look in (find_ignored_settings, load_base):
        with pytest.raises(ModelError, match="^cannot load base .*max_new_tokens"):
            look(folder)


def test_check_says_what_a_template_adds_to_every_row(base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    template = folder / "chat_template.jinja"
    words = "{{ 'system: be brief\n' if messages[0].role != 'system' }}"
    given = "{{ 'system: ' ~ messages[0].content[0].text ~ '\n' if messages[0].role == 'system' }}"
    rest = template.read_text().replace(
        "for message in messages", "for message in messages if message.role != 'system'"
    )
    template.write_text(words + given + rest)
    task = "{name: t, train: 'scenes:digits/train[:1]', test: 'scenes:digits/test[:1]'}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{{base: '{folder}', store: '{tmp_path}/s', tasks: [{task}]}}")
    (note,) = check(recipe, "select.density=0.1").notes
    assert note.startswith("the base's chat template begins every row without a system text with")
    assert note.endswith("tokens: 'be brief'")
