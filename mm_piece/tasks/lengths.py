"""Examples that are too long lose text, never image tokens."""

import sys
from dataclasses import replace
from typing import Any

from torch import Tensor

from mm_piece.errors import DataError
from mm_piece.tasks.encoding import count_tokens, encode, encode_prompt
from mm_piece.tasks.examples import Example, Message, all_text_of, text_of
from mm_piece.tasks.templates import conversation, prompt
from mm_piece.tasks.turns import REASONING


def fitted(
    example: Example, processor: Any, max_length: int | None, generation: bool = False
) -> tuple[dict[str, Tensor], bool]:
    """Model inputs of at most `max_length` tokens, images included, and whether text was cut.

    All texts longer than some common number of characters are cut to it: questions in their middle,
    since instructions stand at both ends, answers at their end. For generation the last answer does
    not count. Raises DataError if the images alone are too long.
    """
    build = encode_prompt if generation else encode
    inputs = build(example, processor)
    excess = inputs["input_ids"].shape[1] - (max_length or sys.maxsize)
    if excess <= 0:
        return inputs, False
    room = _length(example, processor, generation) - excess
    low, high = -1, max(len(all_text_of(message)) for message in example.messages)
    while low < high:  # the most characters with which the example fits
        middle = (low + high + 1) // 2
        fits = _length(_cut(example, middle), processor, generation) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    if low < 0:
        raise DataError(
            f"{example.source} row {example.row}: max_length {max_length} leaves no room for text"
        )
    return build(_cut(example, low), processor), True


def _length(example: Example, processor: Any, generation: bool) -> int:
    """Tokens of the example, an image counted as one."""
    text = prompt(example, processor) if generation else conversation(example, processor)[0]
    return count_tokens(text, processor)


def _cut(example: Example, most: int) -> Example:
    """The example with at most `most` characters in each message's text, images untouched."""
    return replace(example, messages=[_shortened(message, most) for message in example.messages])


def _shortened(message: Message, most: int) -> Message:
    text, is_answer = text_of(message), message["role"] == "assistant"
    # An answer without any character would teach to say nothing.
    keep = min(max(most, len(text) - len(text.lstrip()) + 1 if is_answer else 0), len(text))
    head = keep if is_answer else (keep + 1) // 2
    thoughts = {name: message[name][:most] for name in REASONING if name in message}
    content = _without(message, range(head, head + len(text) - keep))
    return {**message, **thoughts, "content": content}


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
