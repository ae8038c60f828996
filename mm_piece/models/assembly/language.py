"""The language model of a LLaVA: its tokenizer knows images, its chat template typed content."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mm_piece.data.chat_template import base_template_of
from mm_piece.errors import ModelError
from mm_piece.models.base import load_plain_config, raising_model_error, require_complete_load

IMAGE_TOKEN = "<image>"

# Goes before the model's own template: whatever follows it finds plain strings as contents.
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
# For a model without a template. No space ends a prompt: it would teach models to stop at once.
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
    """A causal language model ready for images, and what was changed or chosen to make it so."""

    model: Any
    tokenizer: Any
    notes: tuple[str, ...]

    @property
    def image_token_id(self) -> int:
        """The id of the image token."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @property
    def end_token_ids(self) -> list[int]:
        """The ids that end an answer: the model's and the tokenizer's, which may differ."""
        own = self.model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        return sorted({self.tokenizer.eos_token_id, *own} - {None})

    def published_weights(self) -> dict[str, Tensor]:
        """Its weights under the published names of a LLaVA; a tied head is left out."""
        named = self.model.base_model.state_dict()
        named = {f"language_model.model.{name}": weight for name, weight in named.items()}
        if not self.is_tied:
            named["language_model.lm_head.weight"] = self.model.get_output_embeddings().weight
        return named

    @property
    def is_tied(self) -> bool:
        """Whether its head is its embedding; a configuration may say so where it is not."""
        head, table = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        return head.weight is table.weight


def load_language(source: str, dtype: torch.dtype) -> LanguageModel:
    """A causal language model from a folder or hub id, prepared for images; see its notes.

    Raises ModelError in one line when it is missing, is no language model that LLaVA can hold, or
    lacks weights.
    """
    model, tokenizer = _load_pretrained(source, dtype)
    _require_supported_layout(model, source)
    notes = [*_add_image_token(model, tokenizer), *_set_pad_token(tokenizer, source)]
    notes += _set_chat_template(tokenizer)
    return LanguageModel(model.eval(), tokenizer, tuple(notes))


def _load_pretrained(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    logging.disable_progress_bar()
    with raising_model_error(f"cannot load language model {source}"):
        config = load_plain_config(source)
        if "vision_config" in config:
            raise ModelError(
                f"{source} is a {config.model_type} model and sees already; a text model is needed"
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        found: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    model, loaded = found
    require_complete_load(source, loaded)
    model.config.name_or_path = Path(source).name  # a checkpoint tells no paths of its maker
    return model, tokenizer


def _require_supported_layout(model: Any, source: str) -> None:
    """LLaVA has a body with `embed_tokens` and a head that is one matrix, and nothing else."""
    head = model.get_output_embeddings()
    body = dict(model.base_model.named_children())
    if not isinstance(head, nn.Linear) or head.bias is not None or "embed_tokens" not in body:
        raise ModelError(
            f"{source}: LLaVA cannot hold {model.config.model_type} models; "
            "it can those built like llama, qwen2, qwen3 or gemma2"
        )


@torch.no_grad()
def _add_image_token(model: Any, tokenizer: Any) -> list[str]:
    """Add the image token where it is missing; new rows of the embeddings are the others' mean."""
    known = IMAGE_TOKEN in tokenizer.get_vocab()
    tokenizer.add_tokens(
        [AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True
    )
    token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    vocabulary_size = model.get_input_embeddings().num_embeddings
    if token >= vocabulary_size:
        model.resize_token_embeddings(token + 1, mean_resizing=False)
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table[vocabulary_size:] = table[:vocabulary_size].float().mean(0).to(table.dtype)
    if known:
        return []
    grown = (
        f"; the vocabulary grew from {vocabulary_size} to {token + 1}"
        if token >= vocabulary_size
        else ""
    )
    return [f"{IMAGE_TOKEN} was added to the tokenizer as {token}{grown}"]


def _set_pad_token(tokenizer: Any, source: str) -> list[str]:
    if tokenizer.eos_token is None:
        raise ModelError(f"{source}: its tokenizer has no end token, and answers would never end")
    if tokenizer.pad_token is not None:
        return []
    tokenizer.pad_token = tokenizer.eos_token
    return [f"the tokenizer has no padding token; {tokenizer.eos_token} is used"]


def _set_chat_template(tokenizer: Any) -> list[str]:
    own = base_template_of(tokenizer)
    tokenizer.chat_template = _FLATTEN_TEMPLATE + (own or _PLAIN_TEMPLATE)
    return (
        [] if own else ["the language model has no chat template; a plain USER/ASSISTANT is used"]
    )
