"""Examples that are too long lose text, never image tokens."""

import sys
from dataclasses import replace
from typing import Any

from torch import Tensor

from mm_piece.data.encoding import encode, encode_prompt, token_ids
from mm_piece.data.example import Example, Message, text_of
from mm_piece.data.thoughts import shortened, thoughts_of
from mm_piece.errors import DataError


def fitted(
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
    room = len(token_ids(example, processor, generation)) - excess
    low, high = -1, max(map(_longest, example.messages))
    while low < high:  # the most characters with which the example fits
        middle = (low + high + 1) // 2
        fits = len(token_ids(_cut(example, middle), processor, generation)) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    if low < 0:
        raise DataError(
            f"{example.source} row {example.row}: max_length {max_length} leaves no room for text"
        )
    return build(_cut(example, low), processor), True


def _cut(example: Example, most: int) -> Example:
    """The example with at most `most` characters in each message's text, images untouched."""
    return replace(example, messages=[_shortened(message, most) for message in example.messages])


def _longest(message: Message) -> int:
    """The characters of a message's text, or of the longer one of an answer's two."""
    return max(len(text) for text in (*thoughts_of(message), text_of(message)))


def _shortened(message: Message, most: int) -> Message:
    if message["role"] == "assistant":
        return shortened(message, most)
    text = text_of(message)
    keep = min(max(most, 0), len(text))
    head = (keep + 1) // 2
    return {**message, "content": _without(message, range(head, head + len(text) - keep))}


def _without(message: Message, gone: range) -> list[dict[str, str]]:
    """Typed content less the characters `gone` of all its text, counted through."""
    parts, start = [], 0
    for part in message["content"]:
        text = part.get("text")
        if text is None:
            parts.append(part)
            continue
        low, high = (min(max(edge - start, 0), len(text)) for edge in (gone.start, gone.stop))
        parts.append({**part, "text": text[:low] + text[high:]})
        start += len(text)
    return parts
