"""From examples to model inputs: images expanded to tokens, labels on the answers alone."""

from typing import Any

import torch
from torch import Tensor

from mm_piece.data.example import Example
from mm_piece.data.expansion import find_text_positions
from mm_piece.data.processor import Processor, is_text_only, tokenizer_of
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
# The value of a text token in each input that has one entry per token, beside its id.
_TEXT_TOKEN_VALUES = {
    "attention_mask": 1,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
}


def encode(example: Example, processor: Processor) -> dict[str, Tensor]:
    """Return model inputs of one example, batch dimension 1, with labels on the answers alone.

    They begin with the inputs of `encode_prompt`: training and generation ask the same question.
    The processor expands image tokens. Raises DataError where text and images disagree, ModelError
    where the chat template breaks the law that a prompt begins prompt and answer.
    """
    _require_types(example, processor)
    require_no_visual_tokens(example, processor)
    rendered = render_conversation(example, processor)
    question = rendered.text[: rendered.prompt_end]
    inputs = _run_processor(processor, question, example)

    turns = find_answer_positions(example)
    is_trained = [turn not in example.untrained_turns for turn in turns]
    earlier_spans = []
    for span, trained in zip(rendered.supervised_spans[:-1], is_trained[:-1], strict=True):
        if trained:
            earlier_spans.append(span)
    question_ids = inputs["input_ids"]  # (1, question)
    question_labels = _make_labels(example, processor, question, earlier_spans, question_ids)

    answer, num_supervised = _tokenize_answer(example, processor, rendered)
    answer_ids = torch.tensor([answer], dtype=torch.long)  # (1, answer)
    answer_labels = answer_ids.clone()
    if not is_trained[-1]:
        num_supervised = 0
    answer_labels[0, num_supervised:] = IGNORE_INDEX

    for key, value in _TEXT_TOKEN_VALUES.items():
        if key in inputs:
            answer_values = torch.full_like(answer_ids, value)
            inputs[key] = torch.cat([inputs[key], answer_values], dim=1)
    inputs["input_ids"] = torch.cat([question_ids, answer_ids], dim=1)
    inputs["labels"] = torch.cat([question_labels, answer_labels], dim=1)
    return inputs


def encode_prompt(example: Example, processor: Processor) -> dict[str, Tensor]:
    """Return model inputs of an example's last question, ready for generation."""
    _require_types(example, processor)
    require_no_visual_tokens(example, processor)
    prompt = render_prompt(example, processor)
    return _run_processor(processor, prompt, example)


def token_ids_of(
    example: Example,
    processor: Processor,
    generation: bool = False,
) -> list[int]:
    """Return the tokens of an example, or for `generation` of its last question alone.

    Images are not expanded: each is one token.
    """
    if generation:
        prompt = render_prompt(example, processor)
        return _tokenize_text(processor, prompt)

    rendered = render_conversation(example, processor)
    question = rendered.text[: rendered.prompt_end]
    question_ids = _tokenize_text(processor, question)
    answer_ids, _ = _tokenize_answer(example, processor, rendered)
    return [*question_ids, *answer_ids]


def _require_types(example: Any, processor: Processor) -> None:
    if not isinstance(example, Example):
        raise DataError(f"an example must be one that `read` gives, not {format_value(example)}")
    if not callable(processor):
        raise ModelError(f"the processor must be what `load` gives, not {format_value(processor)}")


def _make_labels(
    example: Example,
    processor: Processor,
    question: str,
    char_spans: list[Span],
    expanded: Tensor,
) -> Tensor:
    """Return labels for the expanded ids of a question: the ids in some spans of its text.

    Both tensors are (1, tokens).
    """
    plain_ids, char_offsets = _tokenize_with_offsets(processor, question)
    expanded_ids = expanded[0].tolist()
    # a language model has no image token, and no token has the id -1
    image_id = -1 if is_text_only(processor) else processor.image_token_id
    decode = tokenizer_of(processor).decode
    positions = find_text_positions(plain_ids, expanded_ids, image_id, decode)
    if positions is None:
        raise _make_expansion_error(example, processor, expanded_ids, plain_ids)

    labels = torch.full_like(expanded, IGNORE_INDEX)
    for start, end in char_spans:
        # a token at an edge of the span counts: its characters overlap the span
        for index, (low, high) in enumerate(char_offsets):
            if high <= start or low >= end:
                continue
            if index not in positions:
                raise _make_expansion_error(example, processor, expanded_ids, plain_ids)
            labels[0, positions[index]] = plain_ids[index]
    return labels


def _make_expansion_error(
    example: Example,
    processor: Processor,
    expanded_ids: list[int],
    plain_ids: list[int],
) -> ModelError:
    """Return the error for a processor that changed text; it names the tokens that it added."""
    added = dict.fromkeys(token for token in expanded_ids if token not in plain_ids)
    names = tokenizer_of(processor).convert_ids_to_tokens(list(added))
    listed = ", ".join(names)
    separator = ": it put " if names else ""
    return ModelError(
        f"{example.source} row {example.row}: the base's {type(processor).__name__} changed "
        f"more than image tokens{separator}{listed}"
    )


def _tokenize_answer(
    example: Example,
    processor: Processor,
    rendered: RenderedConversation,
) -> tuple[list[int], int]:
    """Return the tokens after the last question, and how many of them are supervised.

    They are those of the whole text, unless one token spans the end of the question and the
    beginning of the answer (two line breaks, say, where the prompt ends after the first). The
    question then keeps the tokens of a prompt, and the rest is tokenized by itself.
    """
    full_ids, char_offsets = _tokenize_with_offsets(processor, rendered.text)
    question = rendered.text[: rendered.prompt_end]
    question_ids = _tokenize_text(processor, question)
    num_question = len(question_ids)

    if full_ids[:num_question] == question_ids:
        answer_ids = full_ids[num_question:]
        char_offsets = char_offsets[num_question:]
    else:
        continuation = rendered.text[rendered.prompt_end :]
        answer_ids, char_offsets = _tokenize_continuation(
            processor, continuation, rendered.prompt_end
        )
        decode = tokenizer_of(processor).decode
        if decode([*question_ids, *answer_ids]) != decode(full_ids):
            raise ModelError(
                f"{example.source} row {example.row}: the tokenizer cannot part the question from "
                "the answer; give the base a chat template whose prompt ends where a token does"
            )

    _, end = rendered.supervised_spans[-1]
    num_supervised = sum(low < end for low, _ in char_offsets)
    return answer_ids, num_supervised


def _tokenize_continuation(
    processor: Processor,
    text: str,
    start: int,
) -> tuple[list[int], list[Span]]:
    """Return the tokens of a text that continues another at its character `start`.

    The spans of the tokens count the characters of both texts.
    """
    # At the beginning of a text some tokenizers put a space in front; a special token avoids it.
    mark = tokenizer_of(processor).eos_token or ""
    ids, char_offsets = _tokenize_with_offsets(processor, mark + text)
    num_marks = 1 if mark else 0
    shift = start - len(mark)

    spans = []
    for low, high in char_offsets[num_marks:]:
        spans.append((low + shift, high + shift))
    return ids[num_marks:], spans


def _tokenize_with_offsets(processor: Processor, text: str) -> tuple[list[int], list[Span]]:
    """Return the tokens of a text, and the characters of each."""
    tokenizer = tokenizer_of(processor)
    try:
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except Exception as error:  # transformers' tokenizers in pure Python have no offsets
        raise ModelError(
            "the base's tokenizer does not say which characters a token stands for; a fast one "
            f"does: {format_error(error)}"
        ) from error
    return coded["input_ids"], coded["offset_mapping"]


def _tokenize_text(processor: Processor, text: str) -> list[int]:
    tokenizer = tokenizer_of(processor)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _run_processor(processor: Processor, text: str, example: Example) -> dict[str, Tensor]:
    """Return what the processor makes of a text and the example's images."""
    # the template has written the special tokens already
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False}
    if is_text_only(processor) and example.images:
        raise DataError(
            f"{example.source} row {example.row} has an image, but the base is a text model"
        )

    try:
        if is_text_only(processor):
            return dict(processor(text=text, **options))
        images = example.open_images() or None
        inputs = dict(processor(text=[text], images=images, **options))
    except PieceError:
        raise
    except Exception as error:  # processors raise all kinds of errors
        unset = [name for name, value in vars(processor).items() if value is None]
        hint = f" (the processor has no {', '.join(unset)})" if unset else ""
        raise DataError(
            f"{example.source} row {example.row}: the base's processor cannot take it: "
            f"{format_error(error)}{hint}"
        ) from error

    _require_finite(inputs, processor, example)
    return inputs


def _require_finite(
    inputs: dict[str, Tensor],
    processor: Processor,
    example: Example,
) -> None:
    """Raise ModelError for pixel values that are not finite: those of an image file always are."""
    for key, value in inputs.items():
        if not value.is_floating_point() or value.isfinite().all():
            continue
        made_by = type(processor.image_processor).__name__
        raise ModelError(
            f"{example.source} row {example.row}: the base's {made_by} makes {key} that are "
            "not finite; mend image_mean, image_std or rescale_factor in its "
            "preprocessor_config.json"
        )
