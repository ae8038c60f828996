"""From examples to model inputs: images expanded to tokens, labels on the answers alone."""

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from mm_piece.errors import DataError, ModelError, PieceError, reason
from mm_piece.tasks.examples import Example
from mm_piece.tasks.templates import (
    Span,
    answers,
    conversation,
    is_text,
    prompt,
    require_no_visual_tokens,
    special_at,
    tokenizer_of,
)

IGNORED = -100  # the label of a token that is not supervised


def encode(example: Example, processor: Any) -> dict[str, Tensor]:
    """Model inputs of one example, batch dimension 1, with labels on the answers' tokens alone.

    Image tokens are expanded by the processor. Raises DataError where text and images disagree,
    ModelError where the chat template breaks the law that a prompt's tokens begin the tokens of
    prompt and answer.
    """
    require_no_visual_tokens(example, processor)
    text, spans = conversation(example, processor)
    inputs = _process(processor, text, example)
    inputs["labels"] = _labels(example, processor, text, spans, inputs["input_ids"])
    return inputs


def encode_prompt(example: Example, processor: Any) -> dict[str, Tensor]:
    """Model inputs of an example's last question, ready for generation."""
    require_no_visual_tokens(example, processor)
    return _process(processor, prompt(example, processor), example)


def token_ids(example: Example, processor: Any, generation: bool = False) -> list[int]:
    """The tokens of an example's text, an image as one; for generation up to its last answer."""
    text = prompt(example, processor) if generation else conversation(example, processor)[0]
    return _ids(processor, text)


def count_tokens(text: str, processor: Any) -> int:
    """The number of tokens of a text; an image counts as one."""
    return len(_ids(processor, text))


def _labels(
    example: Example, processor: Any, text: str, spans: list[Span], expanded: Tensor
) -> Tensor:
    """Labels for the expanded ids; expansion adds image tokens only, so spans count the others."""
    plain = _ids(processor, text)
    image = -1 if is_text(processor) else processor.image_token_id
    others = (expanded[0] != image).nonzero().view(-1)
    kept = [token for token in plain if token != image]
    if (found := expanded[0][others].tolist()) != kept:
        extra = dict.fromkeys(token for token in found if token not in kept)
        names = tokenizer_of(processor).convert_ids_to_tokens(list(extra))
        raise ModelError(
            f"{example.source} row {example.row}: the base's {type(processor).__name__} changed "
            f"more than image tokens{': it put ' if names else ''}{', '.join(names)}"
        )
    labels = torch.full_like(expanded, IGNORED)
    found = _token_spans(example, processor, text, spans)
    learned = [turn not in example.unlearned for turn in answers(example)]
    for start, stop in compress(found, learned):
        low, high = (sum(token != image for token in plain[:edge]) for edge in (start, stop))
        labels[0, others[low:high]] = expanded[0, others[low:high]]
    return labels


def _token_spans(
    example: Example, processor: Any, text: str, spans: list[Span]
) -> list[tuple[int, int]]:
    """The tokens of each answer: from the end of its prompt to the token that ends its turn.

    Where a template renders earlier answers otherwise than the last one (Qwen3 drops their
    thoughts), those begin with the first token of their text.
    """
    tokenizer = tokenizer_of(processor)
    try:
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except Exception as error:  # one of Python alone, without offsets
        raise ModelError(
            "the base's tokenizer does not say which characters a token stands for; a fast one "
            f"does: {reason(error)}"
        ) from error
    whole, offsets = coded["input_ids"], coded["offset_mapping"]
    found = []
    for turn, (start, end) in zip(answers(example), spans, strict=True):
        before = _ids(processor, prompt(example, processor, turn))
        begins = whole[: len(before)] == before
        if turn == len(example.messages) - 1 and not begins:
            raise ModelError(
                f"{example.source} row {example.row}: "
                "the chat template's prompt is not a prefix of prompt + answer"
            )
        end += len(special_at(text, end, tokenizer))
        inside = [n for n, (low, high) in enumerate(offsets) if high > start and low < end]
        found.append((len(before) if begins else inside[0], inside[-1] + 1))
    return found


def _ids(processor: Any, text: str) -> list[int]:
    return tokenizer_of(processor)(text, add_special_tokens=False)["input_ids"]


def _process(processor: Any, text: str, example: Example) -> dict[str, Tensor]:
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False}
    if is_text(processor) and example.images:
        raise DataError(
            f"{example.source} row {example.row} has an image, but the base is a text model"
        )
    try:
        if is_text(processor):
            return dict(processor(text, **options))
        return dict(processor(text=[text], images=example.pictures() or None, **options))
    except PieceError:
        raise
    except Exception as error:  # processors raise whatever they trip over
        where = f"{example.source} row {example.row}: the base's processor cannot take it"
        unset = [key for key in vars(processor) if vars(processor)[key] is None]
        hint = f" (the processor has no {', '.join(unset)})" if unset else ""
        raise DataError(f"{where}: {reason(error)}{hint}") from error
