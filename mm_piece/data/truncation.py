"""Examples that are too long lose text, never image tokens."""

import sys
from dataclasses import replace
from typing import Any

from torch import Tensor

from mm_piece.data.encoding import encode, encode_prompt, token_ids_of
from mm_piece.data.example import Example, Message, text_of
from mm_piece.data.thoughts import split_thoughts, truncate_answer
from mm_piece.errors import DataError


def encode_truncated(
    example: Example, processor: Any, max_length: int | None, generation: bool = False
) -> tuple[dict[str, Tensor], bool]:
    """Model inputs of at most `max_length` tokens, images included, and whether text was cut.

    All texts longer than some common number of characters are cut to it: questions in their middle,
    since instructions stand at both ends, answers and their thoughts at their end. For generation
    the last answer does not count. Raises DataError if the images alone are too long.
    """
    build = encode_prompt if generation else encode
    inputs = build(example, processor)
    excess = inputs["input_ids"].shape[1] - (max_length or sys.maxsize)
    if excess <= 0:
        return inputs, False
    max_text_tokens = len(token_ids_of(example, processor, generation)) - excess
    low, high = -1, max(map(_count_longest_text, example.messages))
    while low < high:  # the most characters with which the example fits
        middle = (low + high + 1) // 2
        fits = (
            len(token_ids_of(_truncate_example(example, middle), processor, generation))
            <= max_text_tokens
        )
        low, high = (middle, high) if fits else (low, middle - 1)
    if low < 0:
        raise DataError(
            f"{example.source} row {example.row}: max_length {max_length} leaves no room for text"
        )
    return build(_truncate_example(example, low), processor), True


def _truncate_example(example: Example, max_chars: int) -> Example:
    """The example with at most `most` characters in each message's text, images untouched."""
    return replace(
        example, messages=[_truncate_message(message, max_chars) for message in example.messages]
    )


def _count_longest_text(message: Message) -> int:
    """The characters of a message's text, or of the longer one of an answer's two."""
    return max(len(text) for text in (*split_thoughts(message), text_of(message)))


def _truncate_message(message: Message, max_chars: int) -> Message:
    if message["role"] == "assistant":
        return truncate_answer(message, max_chars)
    text = text_of(message)
    num_kept = min(max(max_chars, 0), len(text))
    head = (num_kept + 1) // 2
    return {
        **message,
        "content": _remove_characters(message, range(head, head + len(text) - num_kept)),
    }


def _remove_characters(message: Message, removed_range: range) -> list[dict[str, str]]:
    """Typed content less the characters `gone` of all its text, counted through."""
    parts, start = [], 0
    for content_part in message["content"]:
        text = content_part.get("text")
        if text is None:
            parts.append(content_part)
            continue
        low, high = (
            min(max(edge - start, 0), len(text))
            for edge in (removed_range.start, removed_range.stop)
        )
        parts.append({**content_part, "text": text[:low] + text[high:]})
        start += len(text)
    return parts
