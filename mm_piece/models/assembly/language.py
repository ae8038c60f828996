"""The language model of a LLaVA.

Its tokenizer gets an image token, and its chat template takes typed content: a message may be a
list of texts and images instead of a string.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import logging

from mm_piece.data.chat_template import base_template_of
from mm_piece.data.processor import Tokenizer
from mm_piece.errors import ModelError
from mm_piece.models.assembly.gguf import load_gguf, split_gguf_source
from mm_piece.models.base import load_plain_config, raising_model_error, require_complete_load

IMAGE_TOKEN = "<image>"

# Put before the model's own template, which then finds plain strings as contents.
_FLATTEN_TEMPLATE = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.content is defined and message.content is iterable
        and message.content is not string -%}
    {%- set text = namespace(content='') -%}
    {%- for part in message.content -%}
      {%- set text.content = text.content
            + ('<image>' if part.type == 'image' else part.text) -%}
    {%- endfor -%}
    {%- set message = dict(message, content=text.content) -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- else -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
# For a model without a template. A prompt does not end with a space: models would learn to stop at
# once.
_PLAIN_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- 'ASSISTANT:' -}}
    {%- generation -%}{{- ' ' + message.content + eos_token -}}{%- endgeneration -%}
  {%- elif message.role == 'user' -%}
    {{- 'USER: ' + message.content + '\\n' -}}
  {%- else -%}
    {{- message.content + '\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model ready for images, and notes on what was changed for it."""

    model: Any
    tokenizer: Tokenizer
    notes: tuple[str, ...]

    @property
    def image_token_id(self) -> int:
        """Id of the image token."""
        return _image_token_id_of(self.tokenizer)

    @property
    def end_token_ids(self) -> list[int]:
        """Ids that end an answer: the model's and the tokenizer's, which may differ."""
        own = self.model.generation_config.eos_token_id  # None, one id, or several
        own_ids = own if isinstance(own, list) else [own]
        return sorted({self.tokenizer.eos_token_id, *own_ids} - {None})

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding; a configuration may say so where it is not."""
        head = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        return head.weight is embedding.weight


def load_language(
    source: str,
    dtype: torch.dtype,
    chat_template: str | None = None,
) -> LanguageModel:
    """Load a causal language model from a folder, hub id or GGUF file, and prepare it for images.

    `chat_template` takes the place of its own. Its notes list what was changed. Raises ModelError,
    in one line, for a model that is missing, lacks weights, or has no place in LLaVA.
    """
    gguf = split_gguf_source(source)
    if gguf:
        model, tokenizer, notes = load_gguf(*gguf, dtype)
    else:
        model, tokenizer = _load_pretrained(source, dtype)
        notes = []
    # The checkpoint's configuration must not contain a path of the machine that wrote it.
    model.config.name_or_path = Path(source).name
    _require_supported_layout(model, source)

    notes += _add_image_token(model, tokenizer)
    notes += _set_pad_token(tokenizer, source)
    notes += _set_chat_template(tokenizer, chat_template)
    return LanguageModel(model.eval(), tokenizer, tuple(notes))


def _load_pretrained(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a language model and its tokenizer as they are; ModelError for another kind of model."""
    logging.disable_progress_bar()
    with raising_model_error(f"cannot load language model {source}"):
        config = load_plain_config(source)
        if "vision_config" in config:
            raise ModelError(
                f"{source} is a {config.model_type} model and sees already; a text model is needed"
            )

        tokenizer = AutoTokenizer.from_pretrained(source)
        loading: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, loaded = loading
    require_complete_load(source, loaded)
    return model, tokenizer


def _require_supported_layout(model: Any, source: str) -> None:
    """Raise ModelError unless a model is a body with `embed_tokens` and a head of one matrix.

    LLaVA has nothing else.
    """
    head = model.get_output_embeddings()
    is_one_matrix = isinstance(head, nn.Linear) and head.bias is None
    body = dict(model.base_model.named_children())
    if not is_one_matrix or "embed_tokens" not in body:
        raise ModelError(
            f"{source}: LLaVA cannot hold {model.config.model_type} models; "
            "it can those built like llama, qwen2, qwen3 or gemma2"
        )


def _image_token_id_of(tokenizer: Tokenizer) -> int:
    token, *_ = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN])
    return token


@torch.no_grad()
def _add_image_token(model: Any, tokenizer: Tokenizer) -> list[str]:
    """Add the image token where it is missing, and return a note if it was.

    New rows of the embeddings are the mean of the others.
    """
    is_known = IMAGE_TOKEN in tokenizer.get_vocab()
    added = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens([added], special_tokens=True)
    token = _image_token_id_of(tokenizer)

    # Many models have more rows than tokens, so that the new token often has one already.
    vocabulary_size = model.get_input_embeddings().num_embeddings
    has_grown = token >= vocabulary_size
    if has_grown:
        # transformers' own mean resizing draws new rows around the mean, at random.
        model.resize_token_embeddings(token + 1, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            table = layer.weight  # (tokens, hidden)
            mean = table[:vocabulary_size].float().mean(0)
            table[vocabulary_size:] = mean.to(table.dtype)

    if is_known:
        return []
    note = f"{IMAGE_TOKEN} was added to the tokenizer as {token}"
    if has_grown:
        note += f"; the vocabulary grew from {vocabulary_size} to {token + 1}"
    return [note]


def _set_pad_token(tokenizer: Tokenizer, source: str) -> list[str]:
    """Set a padding token where there is none, and return a note if so."""
    if tokenizer.eos_token is None:
        raise ModelError(f"{source}: its tokenizer has no end token, and answers would never end")
    if tokenizer.pad_token is not None:
        return []

    tokenizer.pad_token = tokenizer.eos_token
    return [f"the tokenizer has no padding token; {tokenizer.eos_token} is used"]


def _set_chat_template(tokenizer: Tokenizer, given: str | None) -> list[str]:
    """Set a chat template that takes typed content; return a note if there was none before.

    Raises ModelError for a given one that is empty.
    """
    if given is not None and not given.strip():
        raise ModelError("the chat template is empty")
    own = given or base_template_of(tokenizer)
    tokenizer.chat_template = _FLATTEN_TEMPLATE + (own or _PLAIN_TEMPLATE)
    if own:
        return []
    return ["the language model has no chat template; a plain USER/ASSISTANT is used"]
