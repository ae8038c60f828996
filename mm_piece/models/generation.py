"""Greedy decoding, whatever a base's own generation configuration asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from mm_piece.models.base import raising_model_error, resolve_source

# The settings of a base's generation configuration that greedy answers take over.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

# Values of generation settings that ask for nothing beyond greedy decoding.
_GREEDY_DEFAULTS: dict[str, Any] = {
    "_from_model_config": True,
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "use_cache": True,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


@contextmanager
def greedy_decoding(model: Any, **settings: Any) -> Iterator[GenerationConfig]:
    """Keep a model generating greedily while the block runs.

    Gives the configuration to generate with: the base's token ids, and `settings`. The model's own
    configuration is replaced meanwhile, because `generate` fills in from it what this one leaves
    open. The model is in evaluation mode, which a training leaves it out of: dropout would draw.
    """
    own = model.generation_config
    values: dict[str, Any] = {name: getattr(own, name) for name in TOKEN_IDS}
    values |= {"do_sample": False, "num_beams": 1}
    values |= settings
    greedy = GenerationConfig(**values)

    modes = [(module, module.training) for module in model.modules()]
    model.generation_config = greedy
    model.eval()
    try:
        yield greedy
    finally:
        model.generation_config = own
        for module, is_training in modes:
            module.training = is_training


def find_ignored_settings(
    base: str | Path,
    revision: str | None = None,
    subfolder: str = "",
    **_: Any,
) -> list[str]:
    """Return the names of a base's generation settings that its greedy answers ignore."""
    source = resolve_source(base)
    location: dict[str, Any] = {
        "revision": revision or "main",
        "subfolder": subfolder,
    }
    with raising_model_error(f"cannot load base {source}"):
        try:
            own = GenerationConfig.from_pretrained(source, **location)
        except OSError:  # older bases have these settings in their model configuration
            own = GenerationConfig.from_pretrained(source, "config.json", **location)

    known = vars(GenerationConfig()).keys() - {*TOKEN_IDS, "transformers_version"}
    ignored = []
    for key, value in own.to_diff_dict().items():
        if key in known and value != _GREEDY_DEFAULTS.get(key):
            ignored.append(key)
    return sorted(ignored)
