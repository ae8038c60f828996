"""From examples to model inputs: images expanded to tokens, labels on the answers alone."""

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from mm_piece.data.chat_template import is_text_only, tokenizer_of
from mm_piece.data.example import Example
from mm_piece.data.prompts import (
    RenderedConversation,
    Span,
    find_answer_positions,
    render_conversation,
    render_prompt,
)
from mm_piece.data.special_tokens import require_no_visual_tokens
from mm_piece.errors import DataError, ModelError, PieceError, format_error, format_value

IGNORE_INDEX = -100  # the label of a token that is not supervised
# What a token of text has in the inputs with one entry per token, beside its id.
_TEXT_TOKEN_VALUES = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}


def encode(example: Example, processor: Any) -> dict[str, Tensor]:
    """Model inputs of one example, batch dimension 1, with labels on the answers' tokens alone.

    The inputs of the last question begin them: what is trained is what is asked. Image tokens are
    expanded by the processor. Raises DataError where text and images disagree, ModelError where the
    chat template breaks the law that a prompt begins prompt and answer.
    """
    _require_types(example, processor)
    require_no_visual_tokens(example, processor)
    rendered = render_conversation(example, processor)
    question = rendered.text[: rendered.prompt_end]
    inputs = _run_processor(processor, question, example)
    *earlier, is_trained = [
        turn not in example.untrained_turns for turn in find_answer_positions(example)
    ]
    earlier_spans = [*compress(rendered.supervised_spans[:-1], earlier)]
    labels = _make_labels(example, processor, question, earlier_spans, inputs["input_ids"])

    answer, supervised = _tokenize_answer(example, processor, rendered)
    ids = torch.tensor([answer], dtype=torch.long)
    for key in inputs.keys() & _TEXT_TOKEN_VALUES.keys():
        inputs[key] = torch.cat([inputs[key], torch.full_like(ids, _TEXT_TOKEN_VALUES[key])], dim=1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    ids = ids.clone()
    ids[0, supervised if is_trained else 0 :] = IGNORE_INDEX
    inputs["labels"] = torch.cat([labels, ids], dim=1)
    return inputs


def encode_prompt(example: Example, processor: Any) -> dict[str, Tensor]:
    """Model inputs of an example's last question, ready for generation."""
    _require_types(example, processor)
    require_no_visual_tokens(example, processor)
    return _run_processor(processor, render_prompt(example, processor), example)


def _require_types(example: Any, processor: Any) -> None:
    if not isinstance(example, Example):
        raise DataError(f"an example must be one that `read` gives, not {format_value(example)}")
    if not callable(processor):
        raise ModelError(f"the processor must be what `load` gives, not {format_value(processor)}")


def token_ids_of(example: Example, processor: Any, generation: bool = False) -> list[int]:
    """The tokens of an example, or of its last question; an image is one."""
    if generation:
        return _tokenize_text(processor, render_prompt(example, processor))
    rendered = render_conversation(example, processor)
    question = _tokenize_text(processor, rendered.text[: rendered.prompt_end])
    return [*question, *_tokenize_answer(example, processor, rendered)[0]]


def _make_labels(
    example: Example, processor: Any, question: str, char_spans: list[Span], expanded: Tensor
) -> Tensor:
    """Labels for the expanded ids; expansion adds image tokens only, so spans count the others."""
    plain, char_offsets = _tokenize_with_offsets(processor, question)
    image = -1 if is_text_only(processor) else processor.image_token_id
    others = (expanded[0] != image).nonzero().view(-1)
    text_ids = [token for token in plain if token != image]
    if (found := expanded[0][others].tolist()) != text_ids:
        extra = dict.fromkeys(token for token in found if token not in text_ids)
        names = tokenizer_of(processor).convert_ids_to_tokens(list(extra))
        raise ModelError(
            f"{example.source} row {example.row}: the base's {type(processor).__name__} changed "
            f"more than image tokens{': it put ' if names else ''}{', '.join(names)}"
        )
    labels = torch.full_like(expanded, IGNORE_INDEX)
    for start, end in char_spans:
        inside = [n for n, (low, high) in enumerate(char_offsets) if high > start and low < end]
        edges = (inside[0], inside[-1] + 1)
        low, high = (sum(token != image for token in plain[:edge]) for edge in edges)
        labels[0, others[low:high]] = expanded[0, others[low:high]]
    return labels


def _tokenize_answer(
    example: Example, processor: Any, rendered: RenderedConversation
) -> tuple[list[int], int]:
    """The tokens after the last question, and how many of them the model is to say.

    They are those of the whole text, unless one of its tokens holds the end of the question and the
    beginning of the answer (two line breaks of which a template asks with the first): the question
    is then as it will be asked, and the rest is tokenized by itself.
    """
    full_ids, char_offsets = _tokenize_with_offsets(processor, rendered.text)
    before = _tokenize_text(processor, rendered.text[: rendered.prompt_end])
    if full_ids[: len(before)] == before:
        answer, char_offsets = full_ids[len(before) :], char_offsets[len(before) :]
    else:
        answer, char_offsets = _tokenize_continuation(
            processor, rendered.text[rendered.prompt_end :], rendered.prompt_end
        )
        decode = tokenizer_of(processor).decode
        if decode([*before, *answer]) != decode(full_ids):
            raise ModelError(
                f"{example.source} row {example.row}: the tokenizer cannot part the question from "
                "the answer; give the base a chat template whose prompt ends where a token does"
            )
    end = rendered.supervised_spans[-1][1]
    return answer, sum(low < end for low, _ in char_offsets)


def _tokenize_continuation(processor: Any, text: str, start: int) -> tuple[list[int], list[Span]]:
    """The tokens of a text that goes on at a character of another, and their characters there.

    It stands after a special token while it is tokenized: at the beginning of a text, some
    tokenizers put a blank in front.
    """
    mark = tokenizer_of(processor).eos_token or ""
    ids, char_offsets = _tokenize_with_offsets(processor, mark + text)
    skip, shift = bool(mark), start - len(mark)
    return ids[skip:], [(low + shift, high + shift) for low, high in char_offsets[skip:]]


def _tokenize_with_offsets(processor: Any, text: str) -> tuple[list[int], list[Span]]:
    """The tokens of a text, and the characters of each."""
    try:
        coded = tokenizer_of(processor)(text, add_special_tokens=False, return_offsets_mapping=True)
    except Exception as error:  # one of Python alone, without offsets
        raise ModelError(
            "the base's tokenizer does not say which characters a token stands for; a fast one "
            f"does: {format_error(error)}"
        ) from error
    return coded["input_ids"], coded["offset_mapping"]


def _tokenize_text(processor: Any, text: str) -> list[int]:
    return tokenizer_of(processor)(text, add_special_tokens=False)["input_ids"]


def _run_processor(processor: Any, text: str, example: Example) -> dict[str, Tensor]:
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False}
    if is_text_only(processor) and example.images:
        raise DataError(
            f"{example.source} row {example.row} has an image, but the base is a text model"
        )
    try:
        if is_text_only(processor):
            return dict(processor(text, **options))
        inputs = dict(processor(text=[text], images=example.open_images() or None, **options))
    except PieceError:
        raise
    except Exception as error:  # processors raise whatever they trip over
        error_prefix = f"{example.source} row {example.row}: the base's processor cannot take it"
        unset = [key for key in vars(processor) if vars(processor)[key] is None]
        hint = f" (the processor has no {', '.join(unset)})" if unset else ""
        raise DataError(f"{error_prefix}: {format_error(error)}{hint}") from error
    _require_finite(inputs, processor, example)
    return inputs


def _require_finite(inputs: dict[str, Tensor], processor: Any, example: Example) -> None:
    """Raise ModelError for pixels that are no numbers: what an image holds always is some."""
    for key, value in inputs.items():
        if value.is_floating_point() and not value.isfinite().all():
            made_by = type(processor.image_processor).__name__
            raise ModelError(
                f"{example.source} row {example.row}: the base's {made_by} makes {key} that are "
                "not finite; mend image_mean, image_std or rescale_factor in its "
                "preprocessor_config.json"
            )
