"""Language models out of GGUF files, by transformers' own reader, and what it leaves out."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from transformers.utils.hub import cached_file

from mm_piece.dtypes import dtype_name
from mm_piece.errors import ModelError
from mm_piece.models.base import raising_model_error, require_complete_load

_SUFFIX = ".gguf"
_PRE_TOKENIZER_FIELD = "tokenizer.ggml.pre"
# llama.cpp's names of the pre-tokenizers that take each digit alone before GPT-2's splits.
_DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def split_gguf_source(source: str) -> tuple[str, str] | None:
    """Return the folder or hub id, and the name, of a GGUF file; None for another source.

    A folder whose only model is one GGUF file stands for that file. Raises ModelError for a folder
    with several.
    """
    if source.endswith(_SUFFIX):
        folder, _, name = source.rpartition("/")
        return folder or ".", name

    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    names = sorted(file.name for file in folder.glob(f"*{_SUFFIX}"))
    if len(names) > 1:
        raise ModelError(f"{source} holds {', '.join(names)}; name one of them")
    return (source, names[0]) if names else None


def load_gguf(
    folder: str,
    name: str,
    dtype: torch.dtype,
) -> tuple[Any, Any, list[str]]:
    """Return the language model of a GGUF file, dequantised to `dtype`, its tokenizer, and notes.

    `folder` is a folder or a hub id. Raises ModelError, in one line, for a file that is missing,
    damaged, or of a type that transformers cannot read.
    """
    source = f"{folder}/{name}"
    logging.disable_progress_bar()
    with raising_model_error(f"cannot load language model {source}"):
        tokenizer_type = _read_tokenizer_type(folder, name)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        loading: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=torch.float32,
            output_loading_info=True,
        )
    model, loaded = loading
    require_complete_load(source, loaded)

    _forget_quantisation(model)
    model.to(dtype)
    notes = [f"the weights of {name} were dequantised to {dtype_name(dtype)}"]
    notes += _split_digits(tokenizer, tokenizer_type)
    return model, tokenizer, notes


def _read_tokenizer_type(folder: str, name: str) -> str:
    """Return llama.cpp's name of the file's pre-tokenizer; "" if it has none.

    Raises ModelError where the reader of such files is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError("GGUF files need their reader: pip install 'mm-piece[gguf]'") from error

    file = cached_file(folder, name)
    assert file  # `cached_file` raises for a missing one
    field = GGUFReader(file).get_field(_PRE_TOKENIZER_FIELD)
    return field.contents() if field else ""


def _forget_quantisation(model: Any) -> None:
    """Take off what makes transformers refuse to save: the weights are plain ones now."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if "quantization_config" in model.config.to_dict():
        del model.config.quantization_config


def _split_digits(tokenizer: Any, tokenizer_type: str) -> list[str]:
    """Split numbers into digits where the file says so; return a note if that was missing."""
    if tokenizer_type not in _DIGIT_SPLITTERS:
        return []

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return [f"numbers are split into digits, as the tokenizer {tokenizer_type!r} does"]
